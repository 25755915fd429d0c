"""Bring the ledger and the fence into a database, and take them out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.engine import Engine

from walletmigrate import capture, functions, retired_guards, schema, survey
from walletmigrate.audit import Act, record
from walletmigrate.config import Mapping, Roles, Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.functions import relation
from walletmigrate.grants import grant
from walletmigrate.retired import is_retired, legacy_table
from walletmigrate.schema import quoted
from walletmigrate.standing import FENCE_MENDED, REASON, confirmation, show


@dataclass(frozen=True)
class InstallResult:
    """What an install found and did. ``unconvertible`` are (mapping, key, column, value) that refuse it.

    ``phase`` is where the migration stands; ``granted_to`` are the roles that were to have the application's role.
    ``mended`` are the mappings whose fence had been down: writes may have gone past it, and `verify` has to look.
    """

    schema: str
    revision: str
    mappings: tuple[str, ...]
    fences_made: tuple[str, ...]
    unconvertible: tuple[tuple[str, str, str, str], ...]
    dry_run: bool
    phase: str = "legacy"
    granted_to: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()


def install(
    engine: Engine, settings: Settings, act: Act, *, dry_run: bool = False, grant_to: Sequence[str] = ()
) -> InstallResult:
    """Make roles, schema, functions and the fence of every mapping, in one transaction. Idempotent.

    One transaction, because a bucket that the functions know and the fence does not would be open to raw writes.
    ``grant_to`` are the roles that the application logs in with: they become members of ``roles.app`` in it too,
    since a role without the right to run the functions could not post from the moment that they are there.
    Raises PreconditionRefused while a legacy value does not convert exactly, when the functions of a mapping would
    change the meaning of accounts that are open, or when a role of ``grant_to`` does not exist.
    """
    with engine.begin() as connection:
        retired = is_retired(connection, settings.ledger_schema)
        tables = {
            mapping.name: legacy_table(connection, settings.ledger_schema, mapping) for mapping in settings.mappings
        }
        bad = tuple(
            (mapping.name, str(key), column, str(value))
            for mapping in (() if retired else settings.mappings)
            for key, column, value in survey.unconvertible(connection, mapping)
        )
        _refuse(connection, settings, bad, dry_run=dry_run, grant_to=grant_to)
        phase = show(connection, settings).phase
    made: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    if not dry_run:
        made, mended = capture.with_short_locks(
            engine, lambda connection: _put_in(connection, settings, tables, act, grant_to)
        )
    return InstallResult(
        *(settings.ledger_schema, schema.head(), _names(settings), made, bad, dry_run),
        phase=phase,
        granted_to=tuple(grant_to),
        mended=mended,
    )


def _put_in(
    connection: Connection,
    settings: Settings,
    tables: dict[str, survey.LegacyTable],
    act: Act,
    grant_to: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Make everything, the fences last, since they lock the tables; the mappings whose fence was made, and mended."""
    make_roles(connection, settings.roles)
    _make_schema(connection, settings)
    for mapping in settings.mappings:
        _let_owner_read(connection, settings, mapping)
    _lock_legacy_first(connection, settings)
    connection.exec_driver_sql(f"set local role {quoted(settings.roles.owner)}")
    schema.migrate(connection, settings.ledger_schema)
    _refuse(connection, settings, (), dry_run=False)
    down = {
        mapping.name: _made_anew(connection, settings, mapping, tables[mapping.name]) for mapping in settings.mappings
    }
    grant(connection, settings)
    connection.exec_driver_sql("reset role")
    for role in grant_to:
        _make_member(connection, settings.roles.app, role)
    for mapping in settings.mappings:
        if down[mapping.name]:
            # Also where the triggers stand, and only what they call was replaced: who called it is waited out.
            connection.exec_driver_sql(f"lock table {relation(mapping)} in share row exclusive mode")
    retired = is_retired(connection, settings.ledger_schema)
    fenced = () if retired else settings.mappings
    made = tuple(m.name for m in fenced if capture.install_fence(connection, settings, m))
    facts: dict[str, Any] = {"fences": list(made), "revision": schema.head(), "granted_to": list(grant_to)}
    if retired:
        facts["mended"] = [one for m in settings.mappings for one in retired_guards.mend(connection, settings, m)]
    record(connection, settings, "install", act, details=facts)
    # Under these locks: a verification that begins later has seen all that was written before.
    for name, problems in down.items():
        if problems:
            record(connection, settings, FENCE_MENDED, act, mapping=name, details={"problems": problems})
    return made, tuple(name for name, problems in down.items() if problems)


def _lock_legacy_first(connection: Connection, settings: Settings) -> None:
    """Lock the tables whose fence will be made, before a migration locks the ledger's: postings lock in that order.

    The other way round, each posting in flight holds a legacy row and waits for the journal, and under steady
    traffic no attempt would ever come through.
    """
    if schema.revision(connection, settings.ledger_schema) in (None, schema.head()):
        return
    if is_retired(connection, settings.ledger_schema):
        return
    for mapping in settings.mappings:
        if capture.fence_problems(connection, settings, mapping):
            connection.exec_driver_sql(f"lock table {relation(mapping)} in share row exclusive mode")


def _made_anew(connection: Connection, settings: Settings, mapping: Mapping, table: survey.LegacyTable) -> list[str]:
    """Make the functions of a mapping; returns how its fence was down until now, nothing if it stood or is new."""
    found = []
    if capture.fence_recorded(connection, settings, mapping):
        problems = capture.fence_problems(connection, settings, mapping)
        found = [f"{one.trigger} {one.problem}" for one in problems if one.blind]
    functions.make_functions(
        connection, settings, mapping, table, retired=is_retired(connection, settings.ledger_schema)
    )
    return found


def uninstall(
    engine: Engine, settings: Settings, act: Act, *, drop_ledger: bool = False, dry_run: bool = False
) -> None:
    """Take the fence and the functions out; the adapter goes on with plain updates. Idempotent.

    Accounts turn stale first, in batches of their own. The journal stays, unless ``drop_ledger``. Raises
    PreconditionRefused unless the phase is `legacy` and no account is frozen.
    """
    with engine.begin() as connection:
        if not schema.installed(connection, settings.ledger_schema):
            return
        _refuse_uninstall(connection, settings)
    if dry_run:
        return
    gone = [mapping.name for mapping in settings.mappings if _take_out(engine, settings, mapping)]
    if not gone and not drop_ledger:
        return
    with engine.begin() as connection:
        record(connection, settings, "uninstall", act, details={"mappings": gone, "drop_ledger": drop_ledger})
        if drop_ledger:
            connection.exec_driver_sql(f"drop schema {quoted(settings.ledger_schema)} cascade")


def _take_out(engine: Engine, settings: Settings, mapping: Mapping) -> bool:
    """Take one mapping's fence and functions out; False when it was not installed."""
    with engine.begin() as connection:
        if functions.installed_mapping(connection, settings.ledger_schema, mapping.name) is None:
            return False
    more = True
    while more:
        # What a posting in flight has locked is skipped: waiting here, without the legacy row, could deadlock.
        with engine.begin() as connection:
            more = capture.turn_stale(connection, settings, mapping, "uninstall", skip_locked=True)
    capture.with_short_locks(engine, lambda connection: _drop(connection, settings, mapping))
    return True


def _drop(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """Under the lock of the table, legacy before accounts as everyone locks: the last states, then the fence."""
    connection.exec_driver_sql(f"lock table {relation(mapping)} in access exclusive mode")
    _refuse_uninstall(connection, settings)
    while capture.turn_stale(connection, settings, mapping, "uninstall"):
        pass
    capture.remove_triggers(connection, settings, mapping)
    for signature in functions.mapping_functions(connection, settings.ledger_schema, mapping.name):
        connection.exec_driver_sql(f"drop function {signature}")
    # The row stays, without a fingerprint: a later install must not change the meaning of the accounts that stay.
    connection.execute(
        text(
            f"update {quoted(settings.ledger_schema)}.mappings set fingerprint = '', fence = '{{}}' where name = :name"
        ),
        {"name": mapping.name},
    )


def make_roles(connection: Connection, roles: Roles) -> None:
    """Make the four roles where they are missing; none can log in. The application's role is granted later."""
    for name in (roles.owner, roles.app, roles.operator, roles.auditor):
        if not connection.scalar(text("select 1 from pg_roles where rolname = :name"), {"name": name}):
            connection.exec_driver_sql(f"create role {quoted(name)} nologin")
    _join(connection, roles.owner)


def _make_member(connection: Connection, app: str, role: str) -> None:
    """Let a role of the application use the rights of ``app``; nothing is granted that it has."""
    query = text("select pg_has_role(:role, :app, 'usage')")
    if not connection.scalar(query, {"role": role, "app": app}):
        new = (connection.dialect.server_version_info or (0,)) >= (16,)
        # Before 16 a role that is NOINHERIT has to SET ROLE.
        options = " with inherit true" if new else ""
        connection.exec_driver_sql(f"grant {quoted(app)} to {quoted(role)}{options}")


def _join(connection: Connection, owner: str) -> None:
    """Let the installing role act as the owner: make what is the owner's, and put its functions into triggers."""
    new = (connection.dialect.server_version_info or (0,)) >= (16,)
    # Since 16 who makes a role is its member, but may neither use its rights nor SET ROLE to it.
    privileges = "usage, set" if new else "usage"
    query = text("select bool_and(pg_has_role(:name, p)) from unnest(string_to_array(:privileges, ', ')) as p")
    if not connection.scalar(query, {"name": owner, "privileges": privileges}):
        options = " with inherit true, set true" if new else ""
        connection.exec_driver_sql(f"grant {quoted(owner)} to current_user{options}")


def _names(settings: Settings) -> tuple[str, ...]:
    return tuple(mapping.name for mapping in settings.mappings)


def _refuse(
    connection: Connection, settings: Settings, bad: tuple[Any, ...], *, dry_run: bool, grant_to: Sequence[str] = ()
) -> None:
    reasons = [
        (
            f"{name}: {column} of {key} holds {value}, which is no exact amount",
            f"update the row, or raise the scale of column {column!r} in the configuration",
        )
        for name, key, column, value in bad
        if not dry_run
    ]
    known = set(connection.scalars(text("select rolname from pg_roles"))) if grant_to else set()
    mend = "name the role that the application logs in with, or create it first"
    reasons += [(f"there is no role {role!r} to grant to", mend) for role in grant_to if role not in known]
    if schema.installed(connection, settings.ledger_schema):
        reasons += _newer(connection, settings)
        for mapping in settings.mappings:
            reasons += _changed_meaning(connection, settings, mapping)
    if reasons:
        raise PreconditionRefused("install", reasons)


def _newer(connection: Connection, settings: Settings) -> list[tuple[str, str]]:
    """An older release takes nothing back that a newer one has put in."""
    stands = schema.revision(connection, settings.ledger_schema)
    if stands is None or schema.known(stands):
        return []
    what = f"the ledger's schema is at revision {stands}, which this release does not know: a newer one made it"
    return [(what, "install with the newer release; this one can go on posting meanwhile")]


def _changed_meaning(connection: Connection, settings: Settings, mapping: Mapping) -> list[tuple[str, str]]:
    """A column, scale or unit that open accounts were opened under must not change beneath them.

    More decimals may come in major units: each balance and each transaction is still what it was.
    """
    stands = functions.installed_mapping(connection, settings.ledger_schema, mapping.name, removed=True)
    if stands is None or stands.fingerprint == functions.fingerprint(mapping):
        return []
    counted = connection.scalar(
        text(f"select count(*) from {quoted(settings.ledger_schema)}.accounts where mapping = :name"),
        {"name": mapping.name},
    )
    was, now = stands.definition, functions.definition(mapping)
    types = was.get("types", {})
    kept = all(any(_same_meaning(c, n, types.get(c["column"], "")) for n in now["columns"]) for c in was["columns"])
    if not counted or (kept and was["table"] == now["table"] and was["key"] == now["key"]):
        return []
    what = f"{counted} accounts of mapping {mapping.name!r} were opened under another table, key, column, scale or unit"
    mend = "put the old values back, or begin a new ledger beside this one: runbooks/currency-or-scale-change.md"
    return [(what, mend)]


def _same_meaning(was: dict[str, Any], now: dict[str, Any], sql_type: str) -> bool:
    """Whether what was written of a column is true under its new definition.

    Of a floating-point column it is not: what was rounded away at the old scale is a part of the value at the new one.
    """
    if any(was[name] != now[name] for name in ("bucket", "currency", "column", "unit")):
        return False
    floats = sql_type.startswith(("double precision", "real"))
    wider = was["unit"] == "major" and now["scale"] > was["scale"] and not floats
    return bool(now["scale"] == was["scale"] or wider)


def _refuse_uninstall(connection: Connection, settings: Settings) -> None:
    name = quoted(settings.ledger_schema)
    phase = connection.scalar(text(f"select phase from {name}.control"))
    frozen = connection.scalar(text(f"select count(*) from {name}.accounts where state = 'frozen'"))
    reasons = []
    if phase != "legacy":
        reasons.append((f"the phase is {phase}", f"walletmigrate phase back {REASON}  # until legacy"))
    if frozen:
        mend = f"walletmigrate unfreeze --confirm {confirmation(settings)} {REASON}"
        reasons.append((f"{frozen} accounts are frozen: the ledger alone is true", mend))
    if reasons:
        raise PreconditionRefused("uninstall", reasons)


def _make_schema(connection: Connection, settings: Settings) -> None:
    name, owner = quoted(settings.ledger_schema), quoted(settings.roles.owner)
    connection.exec_driver_sql(f"create schema if not exists {name} authorization {owner}")


def _let_owner_read(connection: Connection, settings: Settings, mapping: Mapping) -> None:
    """The definer functions read the legacy row for themselves; operators lock rows and write them back."""
    owner, operator = quoted(settings.roles.owner), quoted(settings.roles.operator)
    auditor, table = quoted(settings.roles.auditor), relation(mapping)
    connection.exec_driver_sql(f"grant usage on schema {quoted(mapping.schema_name)} to {owner}, {operator}, {auditor}")
    connection.exec_driver_sql(f"grant select on {table} to {owner}, {operator}, {auditor}")
    connection.exec_driver_sql(f"grant update on {table} to {operator}")
    hidden = connection.scalar(
        text("select relrowsecurity from pg_class where oid = cast(:t as regclass)"), {"t": table}
    )
    if hidden:
        # A fence that cannot see a row would take it for deleted.
        connection.exec_driver_sql(f"drop policy if exists walletmigrate_owner on {table}")
        connection.exec_driver_sql(f"create policy walletmigrate_owner on {table} for select to {owner} using (true)")
