"""Two mapped tables of the same keys, two buckets and two currencies: for tests of what is taken for something else."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pydantic import SecretStr
from sqlalchemy.pool import NullPool

from ledger import ACT, execute, rows, set_phase, unguarded
from walletmigrate import LegacyBalanceAdapter, Mapping, Movement, Settings, StaticSource, connect
from walletmigrate.backfill import backfill
from walletmigrate.fences import Mode, set_mode
from walletmigrate.install import install

DUAL = StaticSource({"wallet.dualWrite": True})
OFF = StaticSource({})
CASH, DOLLARS, PROMO = ("cash", "EUR"), ("cash", "USD"), ("promo", "EUR")
COLUMNS = {CASH: "coins", DOLLARS: "dollars", PROMO: "promo"}
TABLES = ("users", "clubs")

Account = tuple[str, ...]

ONE: set[Account] = {("users", "1", *CASH)}
ONE_AND_TWO: set[Account] = {*ONE, ("users", "2", *CASH)}
ALL_OF_ONE: set[Account] = {("users", "1", *column) for column in COLUMNS}
USERS: set[Account] = {("users", str(key), *column) for key in (1, 2, 3) for column in COLUMNS}


RAW = "update users set coins = coins + 5 where id = 1"
FIRST = "mapping = 'users' and key = '1' and bucket = 'cash' and currency = 'EUR'"
FROZEN = (
    "update wallet.control set phase = 'frozen'",
    "select wallet.freeze_users(null, null)",
    "select wallet.freeze_clubs(null, null)",
)


class Town:
    """Users and clubs, three each with the same keys; each has two buckets, one of them in two currencies."""

    def __init__(self, url: str) -> None:
        self.engine = connect.engine(url, application_name="walletmigrate-test", poolclass=NullPool)
        for number, table in enumerate(TABLES):
            execute(
                self.engine,
                f"create table {table} (id bigint primary key, tenant text, coins numeric(20, 2), "
                "dollars numeric(20, 2), promo numeric(20, 2))",
            )
            execute(
                self.engine,
                f"insert into {table} select g, 'acme', {number}000 + g, {number}100 + g, {number}200 + g "
                "from generate_series(1, 3) as g",
            )
        self.settings = Settings(database_url=SecretStr(url), mappings=tuple(map(mapping, TABLES)))
        install(self.engine, self.settings, ACT)
        set_phase(self.engine, "dual_write")
        self.jobs = [backfill(self.engine, self.settings, m, ACT).job_id or 0 for m in self.settings.mappings]
        self.job = self.jobs[0]
        self.users = self.settings.mapping("users")

    def accounts(self) -> dict[Account, tuple[Any, ...]]:
        """Everything that is known of each account, with its legacy balance, and how many transactions it has."""
        found: dict[Account, tuple[Any, ...]] = {}
        for table in TABLES:
            for (bucket, currency), column in COLUMNS.items():
                query = (
                    "select a.key, a.state::text, a.balance, a.state_at, a.state_reason, a.job_id, "
                    f"(select l.{column} from {table} as l where l.id::text = a.key), "
                    "(select count(*) from wallet.wallet_entries as e where e.account_id = a.id) "
                    "from wallet.accounts as a where a.mapping = :m and a.bucket = :b and a.currency = :c"
                )
                for key, *rest in rows(self.engine, query, m=table, b=bucket, c=currency):
                    found[table, key, bucket, currency] = tuple(rest)
        return found

    def post(self, *movements: Movement, source: StaticSource = DUAL) -> int:
        adapter = LegacyBalanceAdapter(self.settings, source, mapping="users")
        with self.engine.begin() as connection:
            return adapter.apply(connection, movements)[0].transaction_id or 0

    def sql(self, statement: str) -> None:
        execute(self.engine, statement)

    def mode(self, mode: Mode) -> None:
        set_mode(self.engine, self.settings, self.users, mode, ACT)

    def past_the_fence(self, statement: str) -> None:
        with unguarded(self.engine, "users") as connection:
            connection.exec_driver_sql(statement)
        install(self.engine, self.settings, ACT)


def mapping(name: str) -> Mapping:
    columns = [
        {"bucket": bucket, "currency": currency, "column": column, "scale": 2}
        for (bucket, currency), column in COLUMNS.items()
    ]
    fields = {"name": name, "table": f"public.{name}", "key": "id", "traits": {"tenant": "tenant"}, "columns": columns}
    return Mapping.model_validate(fields)


def movement(operation: Any, key: int, amount: int, **fields: Any) -> Movement:
    if operation == "set_balance":
        fields = {"actor": ACT.actor, "reason": ACT.reason, **fields}
    else:
        fields["type"] = "test"
    return Movement(operation=operation, key=key, amount=Decimal(amount), bucket="cash", currency="EUR", **fields)
