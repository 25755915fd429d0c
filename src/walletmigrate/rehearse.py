"""The whole migration, rehearsed in a scratch database: on a file of transactions, or on a copy of one's own table.

With a file the legacy table starts with every account at 0, with a copy at the balances that were copied. Several
worker processes replay the transactions through the adapter, each account's in order, while the migration walks from
legacy alone to the ledger alone and back. What makes dual-writes fail in practice happens on the way: raw SQL from
other connections, a worker that is killed, flags that arrive late, old snapshots, the line stopped and resumed.
Nothing of it touches a database of the user's: on a server of theirs, a database with a random name and four
roles are made and dropped again.
"""

from __future__ import annotations

import secrets
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from walletmigrate import connect, embedded, schema, traffic
from walletmigrate.config import Column, Roles, Settings
from walletmigrate.errors import DatabaseUnreachable, PreconditionRefused, UsageError, WalletMigrateError
from walletmigrate.functions import relation
from walletmigrate.rehearsal_crew import Crew, WorkersFailed
from walletmigrate.rehearsal_display import Display, display
from walletmigrate.rehearsal_ground import CopyGround, FileGround, Ground, amount_of, prepare, settings_of
from walletmigrate.rehearsal_messages import Assignment
from walletmigrate.rehearsal_metrics import serving
from walletmigrate.rehearsal_raw import NOTES
from walletmigrate.rehearsal_report import (
    AccountBalances,
    Report,
    check_writable,
    judge,
    write_balances,
)
from walletmigrate.rehearsal_source import Source
from walletmigrate.rehearsal_stages import Walk, legs_of
from walletmigrate.rehearsal_steps import Migration
from walletmigrate.rehearsal_traffic import usual_count
from walletmigrate.schema import quoted
from walletmigrate.traffic import Place, Traffic, Transaction

__all__ = ["FLAG_LAG_SECONDS", "MOST_WORKERS", "Report", "rehearse", "rehearse_copy", "rehearse_traffic"]

MOST_WORKERS: Final = 64
FLAG_LAG_SECONDS: Final = 5.0
"""How much later the last process decides by a flag flip than the first."""

MOST_LAG_SECONDS: Final = 60.0
_APPLICATION: Final = "walletmigrate-rehearse"


def rehearse(
    transactions: Path | None = None,
    *,
    workers: int = 4,
    seed: int = 1,
    report: Path | None = None,
    balances: Path | None = None,
    database_url: str | None = None,
    progress: bool = True,
    flag_lag: float = FLAG_LAG_SECONDS,
    metrics_port: int | None = None,
) -> Report:
    """Rehearse the migration on a file of transactions, or on traffic made from the seed.

    The seed also decides which worker gets which accounts, which tenants go first, and which transactions are
    sent twice or come as raw SQL. Flag flips reach the workers up to ``flag_lag`` seconds apart, each after a delay
    of its own. ``report`` and ``balances`` are files to write the JSON and the CSV to. Without ``database_url``
    an embedded server is started; with it, the scratch database is made on that server. With ``metrics_port`` (0: a
    free one) its metrics are served on loopback while it runs.

    Returns the report, whatever the verdict. Raises UnreadableInput or UsageError before anything is run,
    EmbeddedUnavailable or DatabaseUnreachable when there is no server to run it on, PreconditionRefused when
    the URL's user may not create databases and roles there.
    """
    _check(workers, flag_lag, report, balances)
    read = traffic.generate(seed) if transactions is None else traffic.read(transactions)
    made = rehearse_traffic(
        read,
        workers=workers,
        seed=seed,
        database_url=database_url,
        progress=progress,
        flag_lag=flag_lag,
        metrics_port=metrics_port,
    )
    _write(made, report, balances)
    return made


def rehearse_traffic(
    read: Traffic,
    *,
    workers: int,
    seed: int,
    database_url: str | None = None,
    progress: bool = True,
    flag_lag: float = FLAG_LAG_SECONDS,
    metrics_port: int | None = None,
) -> Report:
    """Rehearse on traffic that is read already; else like `rehearse`."""
    ground, notes = FileGround(read), _left_out(read)
    return _rehearse_on(ground, workers, seed, database_url, progress, flag_lag, notes, metrics_port)


def rehearse_copy(
    source: Source,
    *,
    workers: int = 4,
    seed: int = 1,
    transactions: int | None = None,
    report: Path | None = None,
    balances: Path | None = None,
    database_url: str | None = None,
    progress: bool = True,
    flag_lag: float = FLAG_LAG_SECONDS,
    metrics_port: int | None = None,
) -> Report:
    """Rehearse on a copy of somebody's own legacy table, with traffic made from its distribution.

    ``source`` is what `rehearsal_source.opened` gives, which has looked at the table and refused what cannot be
    rehearsed. ``transactions`` are as many as fit the number of accounts unless said otherwise. The rest is as in
    `rehearse`; ``database_url`` is the server of the scratch database, never the source.
    """
    _check(workers, flag_lag, report, balances)
    count = usual_count(source.facts.rows_copied) if transactions is None else transactions
    if count < 1:
        raise UsageError(f"{count} transactions: name at least 1")
    ground = CopyGround(source, seed=seed, count=count)
    made = _rehearse_on(ground, workers, seed, database_url, progress, flag_lag, (), metrics_port)
    _write(made, report, balances)
    return made


def _check(workers: int, flag_lag: float, *results: Path | None) -> None:
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"{workers} workers: name 1 to {MOST_WORKERS}")
    if not 0 <= flag_lag <= MOST_LAG_SECONDS:
        raise UsageError(f"a flag lag of {flag_lag:g} s: name 0 to {MOST_LAG_SECONDS:g}")
    check_writable(*results)


def _write(made: Report, report: Path | None, balances: Path | None) -> None:
    if balances is not None:
        write_balances(made, balances)
    if report is not None:
        report.write_text(made.to_json(), encoding="utf-8")


def _left_out(read: Traffic) -> tuple[str, ...]:
    if not (read.repeated or read.zero):
        return ()
    return (f"{read.repeated} rows repeat an earlier one, {read.zero} move nothing: left out",)


def _rehearse_on(
    ground: Ground,
    workers: int,
    seed: int,
    database_url: str | None,
    progress: bool,
    flag_lag: float,
    notes: tuple[str, ...],
    metrics_port: int | None,
) -> Report:
    made = None
    try:
        with ExitStack() as stack:
            shown = stack.enter_context(display(ground.count, progress=progress))
            for note in notes:
                shown.note(note)
            server = database_url or stack.enter_context(embedded.Server.start()).url
            roles = stack.enter_context(_roles(server))
            url = stack.enter_context(connect.scratch_database(server))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="walletmigrate-")))
            engine = connect.engine(url, application_name=_APPLICATION)
            stack.callback(engine.dispose)
            settings = settings_of(ground.mapping, roles, folder)
            metrics = None
            if metrics_port is not None:
                metrics = folder / "metrics"
                metrics.mkdir()
                shown.note(f"metrics: {stack.enter_context(serving(engine, settings, metrics, metrics_port))}")
            made = _Rehearsal(engine, url, settings, ground, workers, seed, flag_lag, shown, metrics).run()
            for error in made.errors:
                shown.note(error)
    except (SQLAlchemyError, DatabaseUnreachable) as error:
        if made is None:
            raise _typed(error) from error
        left = f"the scratch database and its roles could not be removed: {error}"
        return replace(made, verdict="fail", errors=(*made.errors, left))
    return made


def _typed(error: SQLAlchemyError | DatabaseUnreachable) -> Exception:
    """A right that the user of the URL lacks, as a refusal; anything else as it is."""
    if not isinstance(error, DBAPIError) or connect.sqlstate(error) != "42501":
        return error
    said = str(error.orig).partition("\n")[0]
    mend = "let that user create databases and roles, or name no server: an embedded one is started"
    return PreconditionRefused("the rehearsal on that server", [(said, mend)])


class _Rehearsal:
    def __init__(
        self,
        engine: Engine,
        url: str,
        settings: Settings,
        ground: Ground,
        workers: int,
        seed: int,
        flag_lag: float,
        shown: Display,
        metrics: Path | None,
    ) -> None:
        self._engine = engine
        self._url = url
        self._settings = settings
        self._ground = ground
        self._workers = workers
        self._seed = seed
        self._flag_lag = flag_lag
        self._shown = shown
        self._metrics = metrics
        self._errors: list[str] = []
        with engine.begin() as connection:
            self._read = prepare(connection, ground, settings.roles)
            self._version = str(connection.scalar(text("show server_version"))).split()[0]

    def run(self) -> Report:
        migration = Migration(self._engine, self._settings, self._settings.flags.path, self._read, self._seed)
        crew = Crew(self._assignments(), self._shown.done)
        walk = Walk(migration, crew, self._shown, self._flag_lag)
        try:
            with crew:
                walk.go()
        except WorkersFailed as error:
            self._errors += [*error.reasons, *crew.traces]
        except (WalletMigrateError, SQLAlchemyError) as error:
            self._errors += [str(error), *crew.reasons]
        self._errors += walk.total.examples
        ledger = quoted(self._settings.ledger_schema)
        return judge(
            transactions=len(self._read.transactions),
            applied=crew.done if self._errors else walk.total.applied,
            mismatches=walk.total.mismatches + self._count(f"{ledger}.failures"),
            balances=self._balances(),
            stages=walk.stages,
            postgres_version=self._version,
            bypass_writes=self._count(NOTES),
            replayed=walk.total.replayed,
            resyncs=self._count(f"{ledger}.transactions where kind = 'resync'"),
            serialization_retries=walk.total.serialization,
            errors=self._errors,
            copied_from=self._ground.copied_from,
        )

    def _assignments(self) -> list[Assignment]:
        shares: list[list[list[Transaction]]] = [[] for _ in range(self._workers)]
        for leg in legs_of(self._read.transactions):
            for share in shares:
                share.append([])
            for one in leg:
                shares[zlib.crc32(f"{self._seed} {one.account}".encode()) % self._workers][-1].append(one)
        begins = [{one.account for leg in share for one in leg} for share in shares]
        return [
            Assignment(
                number=number + 1,
                seed=self._seed,
                url=self._url,
                role=self._settings.roles.app,
                settings=self._settings,
                flag_file=self._settings.flags.path,
                key_type=self._ground.key_type,
                trait=self._read.trait,
                start={place: amount for place, amount in self._read.start.items() if place[0] in begins[number]},
                legs=tuple(map(tuple, share)),
                isolation=_isolation(self._workers - 1 - number),
                flag_delay=self._flag_lag * number / max(1, self._workers - 1),
                metrics=self._metrics,
            )
            for number, share in enumerate(shares)
        ]

    def _count(self, rows: str) -> int:
        """How many rows a table of the database has; 0 if there is none."""
        try:
            with self._engine.begin() as connection:
                table = rows.partition(" ")[0]
                if connection.scalar(text("select to_regclass(:table) is null"), {"table": table}):
                    return 0
                return int(connection.scalar(text(f"select count(*) from {rows}")) or 0)
        except SQLAlchemyError as error:
            self._errors.append(f"the rows of {rows} could not be counted: {error}")
            return 0

    def _balances(self) -> tuple[AccountBalances, ...]:
        """Every account of the traffic with its three balances, in the traffic's order."""
        legacy: dict[Place, Decimal] = {}
        ledger: dict[Place, Decimal] = {}
        columns = self._settings.mapping().columns
        try:
            with self._engine.begin() as connection:
                for place, column in enumerate(columns):
                    legacy.update(self._legacy(connection, place, column))
                    if schema.installed(connection, self._settings.ledger_schema):
                        ledger.update(self._ledger(connection, place, column))
        except SQLAlchemyError as error:
            self._errors.append(f"the balances could not be read: {error}")
        return tuple(
            AccountBalances(
                at[0], legacy.get(at), ledger.get(at), expected, columns[at[1]].bucket, columns[at[1]].currency
            )
            for at, expected in self._read.expectations.items()
        )

    def _legacy(self, connection: Connection, place: int, column: Column) -> Iterator[tuple[Place, Decimal]]:
        mapping = self._settings.mapping()
        names = f"{quoted(mapping.key)}::text as key, {quoted(column.column)}::text as raw"
        for row in connection.execute(text(f"select {names} from {relation(mapping)}")):
            yield (row.key, place), amount_of(column, row.raw)

    def _ledger(self, connection: Connection, place: int, column: Column) -> Iterator[tuple[Place, Decimal]]:
        known = text(
            f"select key, balance from {quoted(self._settings.ledger_schema)}.accounts "
            "where bucket = :bucket and currency = :currency"
        )
        for row in connection.execute(known, {"bucket": column.bucket, "currency": column.currency}):
            yield (row.key, place), row.balance


def _isolation(from_the_last: int) -> IsolationLevel:
    """The last worker runs at SERIALIZABLE, the one before it at REPEATABLE READ, all others at READ COMMITTED."""
    return ("SERIALIZABLE", "REPEATABLE READ")[from_the_last] if from_the_last < 2 else "READ COMMITTED"


@contextmanager
def _roles(server: str) -> Iterator[Roles]:
    """Names of roles of this rehearsal's own; the roles are dropped at the end, after their database."""
    stem = f"rehearsal_{secrets.token_hex(6)}"
    roles = Roles(owner=f"{stem}_owner", app=f"{stem}_app", operator=f"{stem}_operator", auditor=f"{stem}_auditor")
    try:
        yield roles
    except BaseException:
        with suppress(SQLAlchemyError):  # what happened first is what is told
            _drop_roles(server, roles)
        raise
    _drop_roles(server, roles)


def _drop_roles(server: str, roles: Roles) -> None:
    admin = connect.engine(server, application_name=_APPLICATION, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    try:
        with admin.connect() as connection:
            for name in (roles.app, roles.operator, roles.auditor, roles.owner):
                connection.exec_driver_sql(f"drop role if exists {quoted(name)}")
    finally:
        admin.dispose()
