"""Whether each role has what it needs, and nobody has more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import Connection, text

from walletmigrate.checkup import INSTALL, RIGHTS, Finding
from walletmigrate.config import Mapping, Settings
from walletmigrate.functions import installed_mapping, relation
from walletmigrate.grants import wanted
from walletmigrate.retired import is_retired
from walletmigrate.schema import quoted

PUBLIC: Final = "PUBLIC"
_WRITES: Final = ("insert", "update", "delete", "truncate")
_OF_OWNER: Final = {
    "schema": ("usage",),
    "table": ("select", "insert", "update", "delete"),
    "sequence": ("usage", "select", "update"),
    "function": ("execute",),
}

_GRANTED: Final = """
select g.kind, g.name, lower(g.privilege) as privilege,
    case g.grantee when 0 then 'PUBLIC' else pg_get_userbyid(g.grantee) end as grantee
from (
    select 'schema' as kind, n.nspname::text as name, a.privilege_type as privilege, a.grantee
    from pg_namespace as n cross join lateral aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) as a
    where n.nspname = :schema
    union all
    select case c.relkind when 'S' then 'sequence' else 'table' end, c.relname, a.privilege_type, a.grantee
    from pg_class as c
    cross join lateral aclexplode(
        coalesce(c.relacl, acldefault((case c.relkind when 'S' then 's' else 'r' end)::"char", c.relowner))
    ) as a
    where c.relnamespace = cast(:quoted as regnamespace) and c.relkind in ('r', 'p', 'v', 'm', 'S')
    union all
    -- A right on one column is a right on the table.
    select 'table', c.relname, a.privilege_type, a.grantee
    from pg_attribute as t inner join pg_class as c on c.oid = t.attrelid cross join lateral aclexplode(t.attacl) as a
    where c.relnamespace = cast(:quoted as regnamespace)
    union all
    select 'function', p.oid::regprocedure::text, a.privilege_type, a.grantee
    from pg_proc as p cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) as a
    where p.pronamespace = cast(:quoted as regnamespace)
) as g
"""

Right = tuple[str, str, str, str]
"""Kind, name, privilege, grantee."""


def examine(connection: Connection, settings: Settings, logins: Sequence[str] = ()) -> Iterator[Finding]:
    """Missing roles and rights, rights that are too many, and ``logins`` of the application that may not post."""
    roles = settings.roles
    known = set(connection.scalars(text("select rolname from pg_roles")))
    gone = [one for one in (roles.owner, roles.app, roles.operator, roles.auditor) if one not in known]
    for role in gone:
        yield Finding(f"there is no role {role!r}", INSTALL, RIGHTS)
    if gone:
        return
    if connection.scalar(text("select rolcanlogin from pg_roles where rolname = :role"), {"role": roles.owner}):
        mend = f"as a superuser: alter role {quoted(roles.owner)} nologin"
        yield Finding(f"{roles.owner} can log in: it may write the ledger by hand", mend, RIGHTS)
    yield from _in_the_ledger(connection, settings)
    if not is_retired(connection, settings.ledger_schema):
        for mapping in settings.mappings:
            if installed_mapping(connection, settings.ledger_schema, mapping.name) is not None:
                yield from _on_the_table(connection, settings, mapping)
    yield from _logins(connection, settings, logins, known)


def _in_the_ledger(connection: Connection, settings: Settings) -> Iterator[Finding]:
    names = {"schema": settings.ledger_schema, "quoted": quoted(settings.ledger_schema)}
    granted = {tuple(row) for row in connection.execute(text(_GRANTED), names)}
    needed = {
        (one.kind, one.name, privilege, role)
        for one in wanted(connection, settings)
        for privilege in one.privileges
        for role in one.roles
    }
    owner = settings.roles.owner
    things = {(kind, name) for kind, name, _, _ in granted | needed}
    needed |= {(kind, name, one, owner) for kind, name in things for one in _OF_OWNER[kind]}
    # A sequence that is gone is found as such.
    sequences = "select relname from pg_class where relkind = 'S' and relnamespace = cast(:quoted as regnamespace)"
    there = set(connection.scalars(text(sequences), names))
    needed = {one for one in needed if one[0] != "sequence" or one[1] in there}
    for kind, name, privilege, role in sorted(needed - granted):
        target = _target(settings, kind, name)
        mend = INSTALL if role != owner else f"as a superuser: grant {privilege} on {kind} {target} to {quoted(role)}"
        yield Finding(f"{role} lacks {privilege} on {kind} {target}", mend, RIGHTS)
    for kind, name, privilege, role in sorted(one for one in granted - needed if _too_much(settings, one)):
        target = _target(settings, kind, name)
        who = PUBLIC if role == PUBLIC else quoted(role)
        mend = f"as the ledger's owner: revoke {privilege} on {kind} {target} from {who}"
        yield Finding(f"{role} has {privilege} on {kind} {target}, and needs it not", mend, RIGHTS)


def _too_much(settings: Settings, right: Right) -> bool:
    """Others may be let read the ledger, not write it."""
    kind, _, privilege, role = right
    roles = settings.roles
    if role == roles.owner:
        return False
    if role in (PUBLIC, roles.app, roles.operator, roles.auditor):
        return True
    return (kind == "schema" and privilege == "create") or (kind == "table" and privilege in _WRITES)


def _target(settings: Settings, kind: str, name: str) -> str:
    if kind in ("schema", "function"):
        return quoted(name) if kind == "schema" else name
    return f"{quoted(settings.ledger_schema)}.{quoted(name)}"


def _on_the_table(connection: Connection, settings: Settings, mapping: Mapping) -> Iterator[Finding]:
    """The fence and the jobs read the legacy table for themselves; operators write it back."""
    roles, table = settings.roles, relation(mapping)
    if connection.scalar(text("select to_regclass(:table) is null"), {"table": table}):
        return  # found already, as an alteration
    reading = {"select": (roles.owner, roles.operator, roles.auditor), "update": (roles.operator,)}
    for privilege, needing in reading.items():
        for role in needing:
            query = text("select has_table_privilege(:role, cast(:table as regclass), :privilege)")
            if not connection.scalar(query, {"role": role, "table": table, "privilege": privilege}):
                yield Finding(f"{role} lacks {privilege} on {mapping.table}", INSTALL, RIGHTS)
    for role in reading["select"]:
        query = text("select has_schema_privilege(:role, :schema, 'usage')")
        if not connection.scalar(query, {"role": role, "schema": mapping.schema_name}):
            yield Finding(f"{role} lacks usage on schema {mapping.schema_name}", INSTALL, RIGHTS)
    hidden = text(
        "select relrowsecurity and not exists (select from pg_policy as p where p.polrelid = c.oid "
        "and p.polname = 'walletmigrate_owner') from pg_class as c where c.oid = cast(:table as regclass)"
    )
    if connection.scalar(hidden, {"table": table}):
        what = f"{mapping.table} has row-level security, and {roles.owner} no policy that lets the fence see every row"
        yield Finding(what, INSTALL, RIGHTS)


def _logins(connection: Connection, settings: Settings, logins: Sequence[str], known: set[str]) -> Iterator[Finding]:
    """Without the application's role a login's postings are refused, from the moment that the functions are there."""
    app = settings.roles.app
    member = text("select pg_has_role(cast(:login as name), cast(:app as name), 'usage')")
    for login in logins:
        mend = f"grant {quoted(app)} to {quoted(login)}"
        if login not in known:
            yield Finding(f"there is no role {login!r}", "name the role that the application logs in with", RIGHTS)
        elif not connection.scalar(member, {"login": login, "app": app}):
            yield Finding(f"{login} is no member of {app}: its postings are refused", mend, RIGHTS)
