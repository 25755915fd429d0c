"""The rehearsal on a copy of one's own table: it passes on every shape, and no other column leaves the source."""

from __future__ import annotations

import csv
import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, make_url
from typer.testing import CliRunner

import skips
from commandline import app
from conftest import MakeDatabase
from ledger import engine_named, execute, rows, scalar
from servers import SETTINGS, Postgres
from walletmigrate import embedded, rehearsal_steps, verify
from walletmigrate.config import Column, Mapping
from walletmigrate.embedded import Server as Embedded
from walletmigrate.errors import ConfigError, PreconditionRefused, UsageError
from walletmigrate.rehearsal_report import Report
from walletmigrate.rehearsal_source import Wish, opened
from walletmigrate.rehearse import rehearse_copy
from walletmigrate.run_reports import report_rehearsal

ROWS = 30
TRANSACTIONS = 300
UNREACHABLE = "postgresql://nobody:s3cret-p-ss@127.0.0.1:1/none"
STILL_OPEN = "databases that are still read"
PERSONAL = ("ada@", "Lovelace", "+44", "10.0.0.")

SHOP = """
create schema shop;
create domain shop.coins as numeric(12, 2);
create function shop.fair(value integer) returns boolean language sql immutable as 'select value >= 0';
create table shop.users (
    id integer primary key, email text not null unique, surname text, phone text,
    tenant varchar(20), role text not null,
    total_coins shop.coins not null check (total_coins >= -50), promo integer, last_ip inet default '10.0.0.9',
    constraint fair check (shop.fair(promo)), constraint sane check (total_coins > -1000 or promo > 0)
);
insert into shop.users (id, email, surname, phone, tenant, role, total_coins, promo)
select g, 'ada@' || g || '.invalid', 'Lovelace ' || g, '+44 ' || g,
    case when g % 7 > 0 then 'tenant ' || g % 4 end, case g % 5 when 0 then 'vip' else 'member' end,
    case g % 6 when 0 then -12.34 else g * 17.05 end, g % 3 * 10
from generate_series(1, 30) as g
"""

CENTS = """
create table public.wallets (id uuid primary key, owner_email text, balance_cents bigint not null, points numeric);
insert into public.wallets
select ('00000000-0000-4000-8000-' || lpad(g::text, 12, '0'))::uuid, 'ada@' || g || '.invalid', g * 1999, g / 8.0
from generate_series(1, 30) as g
"""

FLOATS = """
create type public.plan as enum ('free', 'paid');
create table public.accounts (login varchar(40) primary key, plan public.plan, balance double precision, surname text);
insert into public.accounts
select 'ada@' || g || '.invalid', (case g % 3 when 0 then 'free' when 1 then 'paid' end)::public.plan,
    0.1::float8 * g + 0.2::float8, 'Lovelace'
from generate_series(1, 30) as g
"""


def column(name: str, bucket: str = "cash", **more: Any) -> Column:
    return Column.model_validate({"bucket": bucket, "column": name, "currency": "EUR", "scale": 2, **more})


USERS = Mapping(
    name="users",
    table="shop.users",
    key="id",
    traits={"role": "role", "tenant": "tenant"},
    columns=(column("total_coins", floor="-20"), column("promo", "promo", scale=0, floor="0")),
)
WALLETS = Mapping(
    name="wallets",
    table="public.wallets",
    key="id",
    policy="strict",
    columns=(column("balance_cents", unit="minor"), column("points", currency="XTS", scale=3)),
)


@dataclass(frozen=True)
class Kept:
    """A source database, and a login that may read the named columns of one of its tables and nothing else."""

    url: str
    admin: Engine

    @contextmanager
    def reader(self, schema: str, table: str, *columns: str) -> Iterator[str]:
        name, password = f"reader_{secrets.token_hex(6)}", secrets.token_hex(8)
        execute(self.admin, f"create role {name} login password '{password}'")
        execute(self.admin, f"grant usage on schema {schema} to {name}")
        if columns:
            # Column by column: no right on the whole table.
            execute(self.admin, f"grant select ({', '.join(columns)}) on {schema}.{table} to {name}")
        try:
            yield make_url(self.url).set(username=name, password=password).render_as_string(hide_password=False)
        finally:
            execute(self.admin, f"drop owned by {name}")
            execute(self.admin, f"drop role {name}")


@pytest.fixture
def kept(make_database: MakeDatabase) -> Kept:
    url = make_database()
    return Kept(url, engine_named(url))


def put(kept: Kept, script: str) -> None:
    with kept.admin.begin() as connection:
        connection.exec_driver_sql(script, execution_options={"no_parameters": True})


def run(server: Postgres, wish: Wish, **options: Any) -> Report:
    given = {"workers": 2, "transactions": TRANSACTIONS, "progress": False, "flag_lag": 0, **options}
    with opened(wish, given.get("seed", 1)) as source:
        return rehearse_copy(source, database_url=server.url, **given)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What stood in the scratch database when it was last verified: the rows of every table, as text."""
    honest = verify.verify
    seen: dict[str, list[str]] = {}

    def look(engine: Engine, *arguments: Any, **options: Any) -> Any:
        named = rows(
            engine,
            "select format('%I.%I', schemaname, tablename) from pg_tables "
            "where schemaname not in ('pg_catalog', 'information_schema')",
        )
        seen.clear()
        seen.update({name: [one for (one,) in rows(engine, f"select t::text from {name} as t")] for (name,) in named})
        statistics = "select coalesce(most_common_vals::text, '') || coalesce(histogram_bounds::text, '') from pg_stats"
        query = "select datname from pg_stat_activity where application_name = 'walletmigrate-rehearse-source'"
        seen[STILL_OPEN] = [one for (one,) in rows(engine, query)]
        seen["pg_stats"] = [one for (one,) in rows(engine, statistics)]
        return honest(engine, *arguments, **options)

    monkeypatch.setattr(rehearsal_steps, "verify", look)
    return seen


def passed(report: Report, transactions: int = TRANSACTIONS) -> None:
    assert (report.errors, report.verdict) == ((), "pass")
    assert (report.applied, report.mismatches, report.drift_accounts) == (transactions, 0, 0)
    assert report.bypass_writes > 0
    assert report.resyncs > 0


def test_a_copy_of_the_named_columns_migrates_and_goes_back_and_nothing_personal_is_in_it(
    server: Postgres, kept: Kept, scratch: dict[str, list[str]], tmp_path: Path
) -> None:
    put(kept, SHOP)
    before = rows(kept.admin, "select * from shop.users order by id")
    start = {
        str(id_): (coins, promo)
        for id_, coins, promo in rows(kept.admin, "select id, total_coins, promo from shop.users")
    }
    files = {"report": tmp_path / "report.json", "balances": tmp_path / "balances.csv"}
    with kept.reader("shop", "users", "id", "tenant", "role", "total_coins", "promo") as url:
        report = run(server, Wish(url, USERS), **files)
    passed(report)
    assert rows(kept.admin, "select * from shop.users order by id") == before
    assert len(scratch["shop.users"]) == ROWS
    assert make_url(kept.url).database not in scratch[STILL_OPEN]
    for name, found in scratch.items():
        assert not [one for one in found if any(word in one for word in PERSONAL)], name
    document = json.loads(files["report"].read_text(encoding="utf-8"))
    assert document["source"] == {
        "host": document["source"]["host"],
        "port": document["source"]["port"],
        "database": make_url(kept.url).database,
        "postgres_version": server.version,
        "standby": False,
        "mapping": "users",
        "proposed": False,
        "table": "shop.users",
        "rows": ROWS,
        "rows_copied": ROWS,
        "columns_copied": ["id", "tenant", "role", "total_coins", "promo"],
        "columns_left_out": ["email", "surname", "phone", "last_ip"],
        "keys": "copied",
        "traits": "copied",
        "checks_copied": ["users_total_coins_check"],
        "checks_left_out": ["fair", "sane"],
    }
    page = tmp_path / "rehearsal.html"
    report_rehearsal(files["report"], page)
    said = page.read_text(encoding="utf-8")
    assert "id, tenant, role, total_coins, promo" in said
    moved = {(one["bucket"], one["currency"]): Decimal(one["expected"]) for one in document["totals"]}
    assert set(moved) == {("cash", "EUR"), ("promo", "EUR")}
    assert sum(moved.values()) == Decimal(document["expected_total"]) == report.ledger_total
    with files["balances"].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * ROWS
    untouched = 0
    for line in lines:
        assert Decimal(line["legacy_balance"]) == Decimal(line["ledger_balance"]) == Decimal(line["expected_balance"])
        untouched += Decimal(line["legacy_balance"]) == start[line["account_id"]][line["bucket"] == "promo"]
        assert Decimal(line["legacy_balance"]) >= (-20 if line["bucket"] == "cash" else 0)
    assert 0 < untouched < 2 * ROWS


def test_uuid_keys_and_minor_units_without_a_trait_pass_under_the_strict_policy(
    server: Postgres, kept: Kept, scratch: dict[str, list[str]]
) -> None:
    put(kept, CENTS)
    report = run(server, Wish(kept.url, WALLETS))
    passed(report)
    assert report.copied_from is not None
    assert (report.copied_from.keys, report.copied_from.traits) == ("copied", "made up")
    # Two currencies have no sum; each has its own.
    assert (report.legacy_total, report.ledger_total, report.expected_total) == (None, None, None)
    assert [(one.currency, one.accounts) for one in report.totals] == [("EUR", ROWS), ("XTS", ROWS)]
    euros = {each.account_id: each.ledger for each in report.balances if each.currency == "EUR"}
    assert set(euros) == {f"00000000-0000-4000-8000-{g:012}" for g in range(1, ROWS + 1)}
    legacy = sum(int(one.split(",")[1]) for one in scratch["public.wallets"])
    assert sum(euros.values()) == Decimal(legacy).scaleb(-2)  # type: ignore[arg-type]
    assert any(f"cohort-{n}" in one for one in scratch["public.wallets"] for n in range(8))


def test_a_float_column_with_text_keys_is_proposed_and_its_keys_never_leave_the_source(
    server: Postgres, kept: Kept, scratch: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(kept, FLOATS)
    monkeypatch.chdir(tmp_path)
    with kept.reader("public", "accounts", "login", "plan", "balance") as url:
        words = (
            f"rehearse --database-url {server.url} --workers 2 --transactions-count {TRANSACTIONS} --flag-lag 0 --json"
        )
        done = CliRunner().invoke(app, words.split(), env={"WALLETMIGRATE_FROM_DATABASE": url})
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["verdict"], document["applied"], document["accounts"]) == ("pass", TRANSACTIONS, ROWS)
    source = document["source"]
    assert (source["proposed"], source["mapping"], source["table"]) == (True, "accounts", "public.accounts")
    assert source["columns_copied"] == ["login", "plan", "balance"]
    assert (source["keys"], source["traits"]) == ("replaced", "copied")
    assert str(make_url(url).password) not in done.output
    keys = {one.split(",")[0] for one in scratch["public.accounts"]}
    assert keys == {f"(account-{n}" for n in range(1, ROWS + 1)}
    for name, found in scratch.items():
        assert not [one for one in found if any(word in one for word in PERSONAL)], name


def lines_of(wish: Wish, seed: int = 1) -> list[list[str]]:
    """What the copy consists of, field by field."""
    with opened(wish, seed) as source:
        return [line.split("\t") for line in b"".join(source.chunks()).decode().splitlines()]


def test_the_source_is_read_in_one_read_only_transaction_with_a_name_and_limits(kept: Kept) -> None:
    put(kept, SHOP)
    with opened(Wish(kept.url, USERS), 1) as source:
        shown = [
            source._connection.exec_driver_sql(f"show {name}").scalar()
            for name in ("transaction_isolation", "transaction_read_only", "lock_timeout", "statement_timeout")
        ]
        assert shown == ["repeatable read", "on", "5s", "5min"]
        assert session(kept) == 1
        execute(kept.admin, "update shop.users set total_coins = total_coins + 1")
        execute(kept.admin, "insert into shop.users (id, email, role, total_coins) values (99, 'x', 'vip', 1)")
        copied = [line.split("\t") for line in b"".join(source.chunks()).decode().splitlines()]
        assert len(copied) == source.facts.rows_copied == ROWS
        assert sum(Decimal(line[1]) for line in copied) == scalar(
            kept.admin, "select sum(total_coins - 1) from shop.users where id < 99"
        )
        source.close()
        assert session(kept) == 0


def session(kept: Kept) -> int:
    query = "select count(*) from pg_stat_activity where application_name = :name and datname = :database"
    database = make_url(kept.url).database
    found: int = scalar(kept.admin, query, name="walletmigrate-rehearse-source", database=database)
    return found


def test_columns_that_may_not_be_read_are_named_with_the_grant_and_no_row_is_read(kept: Kept) -> None:
    put(kept, SHOP)
    with kept.reader("shop", "users", "id", "role") as url, pytest.raises(PreconditionRefused) as caught:
        lines_of(Wish(url, USERS))
    name = make_url(url).username
    ((what, mend),) = caught.value.reasons
    assert what == f"role {name} may not read total_coins, promo, tenant of shop.users"
    assert mend == f'grant select ("total_coins", "promo", "tenant") on "shop"."users" to "{name}"'


def test_a_schema_that_may_not_be_used_is_named_with_the_grant(kept: Kept) -> None:
    put(kept, SHOP)
    with (
        kept.reader("public", "", *()) as url,
        pytest.raises(PreconditionRefused, match=r"grant usage on schema .shop."),
    ):
        lines_of(Wish(url, USERS))


def test_values_that_do_not_convert_are_listed_and_nothing_is_run(kept: Kept, tmp_path: Path) -> None:
    put(kept, SHOP)
    execute(kept.admin, "update shop.users set promo = null where id in (3, 4)")
    with pytest.raises(PreconditionRefused) as caught:
        lines_of(Wish(kept.url, USERS))
    assert [what for what, _ in caught.value.reasons] == [
        f"promo of {key} holds NULL, which is no exact amount" for key in (3, 4)
    ]
    report = tmp_path / "report.json"
    config = configured(tmp_path, "users", "shop.users", "promo", 0)
    said = rehearse_with(config, "--from-database", kept.url, "--report", str(report), "--database-url", UNREACHABLE)
    assert said.exit_code == 4
    assert "promo of 3 holds NULL" in said.stderr
    assert not report.exists()


def test_a_check_on_a_column_without_a_floor_is_refused_at_once_since_it_could_not_be_unfrozen(kept: Kept) -> None:
    put(kept, SHOP)
    cash, promo = USERS.columns
    open_below = USERS.model_copy(update={"columns": (cash, promo.model_copy(update={"floor": None}))})
    with pytest.raises(PreconditionRefused) as caught:
        lines_of(Wish(kept.url, open_below))
    assert [what.partition(",")[0] for what, _ in caught.value.reasons] == [
        f"shop.users checks promo by constraint {name}" for name in ("fair", "sane")
    ]
    assert {mend for _, mend in caught.value.reasons} == {
        "set a floor for the column in the configuration; `walletmigrate init` writes one"
    }


def configured(folder: Path, name: str, table: str, balance: str, scale: int, *, more: str = "") -> Path:
    path = folder / "walletmigrate.toml"
    path.write_text(
        f'[[mappings]]\nname = "{name}"\ntable = "{table}"\nkey = "id"\n  [[mappings.columns]]\n'
        f'  bucket = "cash"\n  column = "{balance}"\n  currency = "EUR"\n  scale = {scale}\n  floor = "0"\n{more}',
        encoding="utf-8",
    )
    return path


def rehearse_with(config: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["rehearse", "--config", str(config), *words])


def test_a_dry_run_tells_what_would_be_copied_and_makes_no_database(
    server: Postgres, kept: Kept, tmp_path: Path
) -> None:
    put(kept, SHOP)
    config = configured(tmp_path, "users", "shop.users", "total_coins", 2)
    words = ("--from-database", kept.url, "--limit-accounts", "7", "--database-url", UNREACHABLE, "--dry-run")
    said = rehearse_with(config, *words)
    assert said.exit_code == 0, said.output
    assert "7 of 30 rows; keys copied, traits made up" in said.stdout
    assert (
        "columns copied: id, total_coins; left out: email, surname, phone, tenant, role, promo, last_ip" in said.stdout
    )
    assert "columns of the copy: id integer, total_coins numeric(12,2), rehearsal_cohort text" in said.stdout
    document = json.loads(rehearse_with(config, *words, "--json").stdout)
    assert document["source"]["rows_copied"] == 7
    assert "surname" not in document["query"]


def test_a_source_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    config = configured(tmp_path, "users", "shop.users", "total_coins", 2)
    said = rehearse_with(config, "--from-database", UNREACHABLE)
    assert said.exit_code == 5
    assert "127.0.0.1:1" in said.stderr
    assert "s3cret" not in said.output


def test_a_table_that_is_not_there_and_one_without_a_row_are_refused(kept: Kept, tmp_path: Path) -> None:
    put(kept, SHOP)
    config = configured(tmp_path, "users", "shop.customers", "total_coins", 2)
    said = rehearse_with(config, "--from-database", kept.url)
    assert (said.exit_code, "no table 'shop.customers'" in said.stderr) == (2, True)
    execute(kept.admin, "truncate shop.users")
    with pytest.raises(PreconditionRefused, match=r"shop\.users has no row"):
        lines_of(Wish(kept.url, USERS))


def test_rows_that_are_hidden_from_the_reader_are_no_rehearsal(kept: Kept) -> None:
    put(kept, SHOP)
    execute(kept.admin, "alter table shop.users enable row level security")
    with (
        kept.reader("shop", "users", "id", "tenant", "role", "total_coins", "promo") as url,
        pytest.raises(ConfigError, match="row-level security hides rows"),
    ):
        lines_of(Wish(url, USERS))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--keep-keys",), "--keep-keys is about a copied table"),
        (("--dry-run",), "--dry-run is about a copied table"),
        (("--from-database", UNREACHABLE, "--transactions", "t.csv"), "exclude each other"),
        (("--from-database", UNREACHABLE, "--keep-keys", "--pseudonymous"), "leave one out"),
        (("--from-database", UNREACHABLE, "--mapping", "none"), "none"),
        (("--from-database", UNREACHABLE), "several mappings (users, coins): name one"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    one = configured(tmp_path, "coins", "shop.coins", "total_coins", 2).read_text(encoding="utf-8")
    said = rehearse_with(configured(tmp_path, "users", "shop.users", "total_coins", 2, more=one), *words)
    assert (said.exit_code, told in said.stderr) == (2, True), said.output


def test_a_database_without_a_likely_table_asks_for_a_mapping(kept: Kept) -> None:
    with pytest.raises(UsageError, match="no table looks as if it held balances"):
        lines_of(Wish(kept.url))
    put(kept, CENTS)
    with pytest.raises(UsageError, match="no table is proposed as mapping 'users'; proposed are: wallets"):
        lines_of(Wish(kept.url, name="users"))


def test_a_sample_is_of_the_size_asked_for_and_hangs_on_the_seed_alone(kept: Kept) -> None:
    put(kept, SHOP)
    first, again, other = (lines_of(Wish(kept.url, USERS, limit=9), seed) for seed in (1, 1, 2))
    assert len(first) == len(other) == 9
    assert first == again
    assert {line[0] for line in first} != {line[0] for line in other}
    with opened(Wish(kept.url, USERS, limit=9), 1) as source:
        assert (source.facts.rows, source.facts.rows_copied) == (ROWS, 9)


def test_what_is_replaced_is_replaced_in_the_source_and_the_same_all_over(kept: Kept) -> None:
    put(kept, SHOP)
    put(kept, CENTS)
    put(kept, FLOATS)
    truth = rows(kept.admin, "select total_coins, tenant, role from shop.users")
    copied = lines_of(Wish(kept.url, USERS, pseudonymous=True))
    assert sorted(int(line[0]) for line in copied) == list(range(1, ROWS + 1))
    assert all(value == "\\N" or value.startswith("value-") for line in copied for value in line[3:])
    assert {len({line[3] for line in copied}), len({line[4] for line in copied})} == {2, 5}
    for at, place in ((4, 1), (3, 2)):
        groups = {
            name: sorted(Decimal(line[1]) for line in copied if line[at] == name)
            for name in {line[at] for line in copied}
        }
        real = {row[place]: sorted(one[0] for one in truth if one[place] == row[place]) for row in truth}
        assert sorted(groups.values()) == sorted(real.values())
    wallets = lines_of(Wish(kept.url, WALLETS, pseudonymous=True, limit=3))
    assert sorted(line[0][-4:] for line in wallets) == ["0001", "0002", "0003"]
    floats = Wish(kept.url, name="accounts")
    assert {line[0] for line in lines_of(floats)} == {f"account-{n}" for n in range(1, ROWS + 1)}
    assert all(line[0].startswith("ada@") for line in lines_of(replace(floats, keep_keys=True)))


def test_a_hot_standby_can_be_the_source(server: Postgres, kept: Kept, tmp_path: Path) -> None:
    if server.binaries is None:
        skips.skip("container")
    put(kept, SHOP)
    with standby(server) as url:
        there = make_url(url).set(database=make_url(kept.url).database).render_as_string(hide_password=False)
        with opened(Wish(there, USERS), 1) as source:
            assert source.facts.standby
            assert len(b"".join(source.chunks()).splitlines()) == ROWS


@contextmanager
def standby(server: Postgres) -> Iterator[str]:
    """A hot standby that has replayed what the server had written."""
    assert server.binaries is not None
    with tempfile.TemporaryDirectory(prefix="wm-standby-") as scratch:
        data = Path(scratch) / "data"
        program = str(server.binaries / "pg_basebackup")
        command = [program, "-D", str(data), "-d", server.url, "--checkpoint=fast", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        (data / "standby.signal").touch()
        for path in (Path(scratch), data, *data.rglob("*")):
            _hand_over(path)
        with Embedded.start(server.binaries, data=data, persistent=True, settings=SETTINGS) as started:
            yield started.url


def _hand_over(path: Path) -> None:
    account = embedded._account()
    os.chown(path, account.uid, account.gid, follow_symlinks=False)
