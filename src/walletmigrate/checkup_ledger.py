"""Whether what was installed still stands as it was made: schema, functions, fence, triggers, sequences, owners."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate import capture, functions, retired, retired_guards, schema
from walletmigrate.checkup import BYPASSES, CHANGED, DRIFT, INSTALL, INSTALLATION, RELEASES, RETIRED, Finding
from walletmigrate.config import Mapping, Settings
from walletmigrate.schema import quoted, render
from walletmigrate.standing import REASON

_RELATION: Final = re.compile(r"^create (table|sequence|view) \S+?\.(\w+)", re.MULTILINE)
# The body of one that begins "atomic" is no text in the catalog.
_FUNCTION: Final = re.compile(
    r"^create (?:or replace )?function \S+?\.(\w+)\((.*?)^(?:as \$\$(.*?)\$\$;|begin atomic$)", re.DOTALL | re.MULTILINE
)
_SET_LINE: Final = re.compile(r"^create function \S+?\.set_line\(.*?^end;", re.DOTALL | re.MULTILINE)
_PATH: Final = re.compile(r"^set search_path = (.*)$", re.MULTILINE)
_KINDS: Final = {"table": "r", "sequence": "S", "view": "v"}
_LOOK: Final = f"walletmigrate verify --mark-stale {REASON}"
_UPGRADE: Final = "finish the deploy: the newer release everywhere, this command too"


@dataclass(frozen=True)
class _Function:
    """What a function does, and as whom."""

    body: str
    definer: bool
    path: str


def missing(connection: Connection, settings: Settings) -> list[Finding]:
    """Tables, views and sequences that are gone. While one is, most else cannot be looked at."""
    name = settings.ledger_schema
    wanted = set(_RELATION.findall(render("ledger", schema=quoted(name))))
    rows = connection.execute(
        text("select relkind::text, relname from pg_class where relnamespace = cast(:schema as regnamespace)"),
        {"schema": quoted(name)},
    )
    there = {tuple(row) for row in rows}
    gone = sorted(one for one in wanted if (_KINDS[one[0]], one[1]) not in there)
    return [
        Finding(f"the {kind} {name}.{one} is missing", _again(settings, kind, one), INSTALLATION) for kind, one in gone
    ]


def _again(settings: Settings, kind: str, name: str) -> str:
    """What makes a relation anew."""
    ledger = quoted(settings.ledger_schema)
    full = f"{ledger}.{name}"
    two = f"create sequence {full} as smallint minvalue 1 maxvalue 2 start 1;"
    # It depends on the sequence, and so went along.
    function = _SET_LINE.search(render("ledger", schema=ledger))
    made = {
        "line": f"{two} {' '.join(function[0].split()) if function else ''}",
        "ceiling": f"{two} update {ledger}.control set phase = phase;",
        "transaction_ids": f"create sequence {full} as bigint; "
        f"select setval('{full}', max(id)) from {ledger}.transactions;",
    }.get(name)
    if kind != "sequence" or made is None:
        return f"stop the application's postings, and restore the {kind} from a backup: nothing makes its rows again"
    return f"in psql, as a superuser: set role {quoted(settings.roles.owner)}; {made} reset role; then: {INSTALL}"


def of_schema(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """What all mappings share."""
    yield from _revision(connection, settings)
    yield from _owners(connection, settings)
    yield from _triggers(connection, settings)
    made = _made([render("ledger", schema=quoted(settings.ledger_schema))])
    again = f"make it anew as the ledger's migration has it; then: {_LOOK}"
    yield from _differences(connection, settings, made, again)
    yield from _ceiling(connection, settings)
    yield from _replica_role(connection)


def of_mapping(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Finding]:
    """What was made for one mapping."""
    stands = functions.installed_mapping(connection, settings.ledger_schema, mapping.name)
    if stands is None:
        yield Finding(f"mapping {mapping.name!r} is not installed", INSTALL, INSTALLATION)
        return
    look = partial(retired.legacy_table, connection, settings.ledger_schema, mapping)
    altered = functions.alteration(connection, mapping, stands, look)
    if altered:
        yield Finding(*altered, CHANGED)
    same = stands.fingerprint == functions.fingerprint(mapping)
    if not same:
        what = f"mapping {mapping.name!r} was installed from another configuration: every posting is refused"
        yield Finding(what, INSTALL, CHANGED)
    yield from _version(mapping, stands)
    counter = f"{quoted(settings.ledger_schema)}.rejected_{mapping.name}"
    if connection.scalar(text("select to_regclass(:name) is null"), {"name": counter}):
        yield Finding(
            f"the sequence {counter} is missing: raw writes to frozen accounts fail by it", INSTALL, INSTALLATION
        )
    if same and not altered and stands.functions_version == functions.FUNCTIONS_VERSION:
        yield from _as_made(connection, settings, mapping)
    replaced = capture.function_problems(connection, settings, mapping)
    for problem in capture.fence_problems(connection, settings, mapping):
        first = INSTALL if replaced else f"walletmigrate capture install {REASON}"
        mend = f"{first}; walletmigrate verify --mapping {mapping.name} --mark-stale {REASON}"
        yield Finding(f"the fence: {problem.trigger} {problem.problem}", mend, DRIFT)
    if retired.is_retired(connection, settings.ledger_schema):
        for what in retired_guards.problems(connection, settings, mapping):
            yield Finding(f"the retired table: {what}", INSTALL, RETIRED)


def _revision(connection: Connection, settings: Settings) -> Iterator[Finding]:
    stands, head = schema.revision(connection, settings.ledger_schema), schema.head()
    if stands == head:
        return
    what = f"the ledger's schema is at revision {stands}, this release has {head}"
    if stands is None or schema.known(stands):
        yield Finding(f"{what}: it was not installed yet", INSTALL, RELEASES)
    else:
        yield Finding(f"{what}: a newer release was installed", _UPGRADE, RELEASES)


def _version(mapping: Mapping, stands: functions.Installed) -> Iterator[Finding]:
    made, mine = stands.functions_version, functions.FUNCTIONS_VERSION
    what = f"the functions of {mapping.name!r} are of version {made}, this release makes {mine}"
    if made < mine:
        yield Finding(what, INSTALL, RELEASES)
    elif made > mine:
        yield Finding(f"{what}: a newer release was installed", _UPGRADE, RELEASES)


def _as_made(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Finding]:
    """Every function but the fence's, which are compared with what was recorded when they were made."""
    name = settings.ledger_schema
    legacy = retired.legacy_table(connection, name, mapping)
    systems = functions.system_accounts(connection, name)
    for currency in dict.fromkeys(column.currency for column in mapping.columns):
        for one in functions.SYSTEM_ACCOUNTS:
            if (one, currency) not in systems:
                what = f"the system account {one!r} of {currency} is missing"
                yield Finding(what, "restore it from a backup: postings refer to its id", INSTALLATION)
                return
    is_retired = retired.is_retired(connection, name)
    scripts = functions.scripts(connection, settings, mapping, legacy, retired=is_retired)
    if is_retired and retired_guards.columns_stand(connection, mapping):
        scripts.append(retired_guards.guard(settings, mapping))
    made = _made(scripts)
    fence = {f"fence_{mapping.name}", f"fence_truncate_{mapping.name}", *functions.SHARED_GUARDS}
    others = {name: one for name, one in made.items() if name not in fence}
    yield from _differences(connection, settings, others, f"{INSTALL}; {_LOOK}")


def _made(scripts: list[str]) -> dict[str, _Function]:
    """The functions of some scripts, by name; a later one takes an earlier one's place."""
    found = {}
    for name, head, body in (match for script in scripts for match in _FUNCTION.findall(script)):
        path = _PATH.search(head)
        found[name] = _Function(body, "security definer" in head, _plain(path[1]) if path else "")
    return found


def _differences(
    connection: Connection, settings: Settings, made: dict[str, _Function], mend: str
) -> Iterator[Finding]:
    rows = connection.execute(
        text(
            "select proname, prosrc, prosecdef, (select substr(c, 13) from unnest(proconfig) as c "
            "where starts_with(c, 'search_path=')) as path "
            "from pg_proc where pronamespace = cast(:schema as regnamespace) and proname = any(:names)"
        ),
        {"schema": quoted(settings.ledger_schema), "names": list(made)},
    )
    standing = {row.proname: _Function(row.prosrc, row.prosecdef, _plain(row.path or "")) for row in rows}
    for name, wanted in sorted(made.items()):
        what = f"the function {settings.ledger_schema}.{name}"
        now = standing.get(name)
        if now is None:
            yield Finding(f"{what} is missing", mend, INSTALLATION)
        elif now.body != wanted.body:
            yield Finding(f"{what} was replaced", mend, INSTALLATION)
        elif now.definer != wanted.definer:
            runs = "its owner" if now.definer else "its caller"
            yield Finding(f"{what} runs as {runs}, and must not", mend, INSTALLATION)
        elif now.path != wanted.path:
            yield Finding(f"{what} has not the search_path that it was made with", mend, INSTALLATION)


def _plain(path: str) -> str:
    return re.sub(r'[\s"]', "", path)


def _owners(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """A function that runs with its owner's rights has other rights under another owner."""
    owner = settings.roles.owner
    rows = connection.execute(
        text(
            "select kind, name, owner from ("
            "select 'function' as kind, p.oid::regprocedure::text as name, pg_get_userbyid(p.proowner) as owner "
            "from pg_proc as p where p.pronamespace = cast(:schema as regnamespace) union all "
            "select case c.relkind when 'S' then 'sequence' when 'v' then 'view' else 'table' end, "
            "c.oid::regclass::text, pg_get_userbyid(c.relowner) from pg_class as c "
            "where c.relnamespace = cast(:schema as regnamespace) and c.relkind in ('r', 'p', 'v', 'S') union all "
            "select 'schema', quote_ident(n.nspname), pg_get_userbyid(n.nspowner) from pg_namespace as n "
            "where n.oid = cast(:schema as regnamespace)) as x where owner <> :owner order by 1, 2"
        ),
        {"schema": quoted(settings.ledger_schema), "owner": owner},
    )
    for row in rows:
        mend = f"as a superuser: alter {row.kind} {row.name} owner to {quoted(owner)}; then: {INSTALL}"
        yield Finding(f"the {row.kind} {row.name} is {row.owner}'s, not {owner}'s", mend, INSTALLATION)


def _triggers(connection: Connection, settings: Settings) -> Iterator[Finding]:
    rows = connection.execute(
        text(
            "select w.relation, w.trigger from (values ('transactions', 'append_only'), "
            "('transactions', 'append_only_truncate'), ('audit_log', 'append_only'), "
            "('audit_log', 'append_only_truncate'), ('verifications', 'append_only'), "
            "('verifications', 'append_only_truncate'), ('control', 'ceiling')) as w (relation, trigger) "
            "where not exists (select from pg_trigger as t where t.tgname = w.trigger "
            "and t.tgrelid = to_regclass(format('%I.%I', cast(:schema as text), w.relation)) "
            "and (t.tgenabled = 'A' or w.trigger = 'ceiling' and t.tgenabled = 'O'))"
        ),
        {"schema": settings.ledger_schema},
    )
    for relation, trigger in rows:
        what = f"the trigger {trigger} on {settings.ledger_schema}.{relation} is missing or does not always fire"
        mend = "walletmigrate verify, then make the trigger anew as the ledger's migration has it"
        yield Finding(what, mend, INSTALLATION)


def _ceiling(connection: Connection, settings: Settings) -> Iterator[Finding]:
    name = quoted(settings.ledger_schema)
    row = connection.execute(text(f"select k.phase, c.last_value from {name}.control as k, {name}.ceiling as c")).one()
    if (row.phase == "legacy") != (row.last_value == 1):
        taken = "legacy" if row.last_value == 1 else "dual_write or later"
        what = f"postings take the phase for {taken}; it is {row.phase}"
        mend = f"as the ledger's owner: update {name}.control set phase = phase"
        yield Finding(what, mend, INSTALLATION)


def _replica_role(connection: Connection) -> Iterator[Finding]:
    """The fence always fires; triggers and foreign keys of the application do not in a session that says replica."""
    rows = connection.execute(
        text(
            "select d.datname, pg_get_userbyid(nullif(s.setrole, 0)) as role, c as setting "
            "from pg_db_role_setting as s left join pg_database as d on d.oid = s.setdatabase "
            "cross join lateral unnest(s.setconfig) as c "
            "where starts_with(c, 'session_replication_role=') and c <> 'session_replication_role=origin' "
            "and (s.setdatabase = 0 or d.datname = current_database()) order by 1, 2"
        )
    )
    found = False
    for row in rows:
        found = True
        target = f"role {quoted(row.role)}" if row.role else f"database {quoted(row.datname)}"
        inside = f" in database {quoted(row.datname)}" if row.role and row.datname else ""
        what = f"sessions of {target}{inside} begin with {row.setting}: the application's triggers do not fire in them"
        mend = f"as a superuser: alter {target}{inside} reset session_replication_role; then restart those sessions"
        yield Finding(what, mend, BYPASSES)
    now = connection.scalar(text("select current_setting('session_replication_role')"))
    if now != "origin" and not found:
        what = f"every session begins with session_replication_role={now}: the application's triggers do not fire"
        yield Finding(what, "as a superuser: alter system reset session_replication_role; reload the server", BYPASSES)
