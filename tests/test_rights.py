"""Every command runs with the least of the roles, and says which grant is missing; each role's forbidden actions."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

import ledger
from commandline import REASON, Project
from conftest import MakeDatabase
from walking import SERVICES, begun, carried_out, files, steps
from walletmigrate import connect
from walletmigrate.commands import ROLES
from walletmigrate.facts import read_facts

DOCUMENT = Path(__file__).parents[1] / "docs" / "roles.md"

LESSER = {"auditor": ("app",), "operator": ("auditor", "app"), "installer": ("operator", "auditor", "app")}
"""Who may not do what this role may. Those that act come first, and are the likeliest to be taken for it."""


@dataclass(frozen=True)
class Crew:
    """A project, and the URL of a login in each of the roles; the installer is the superuser of the tests."""

    project: Project
    urls: dict[str, str]
    names: dict[str, str]


@pytest.fixture
def crew(make_database: MakeDatabase, tmp_path: Path) -> Iterator[Crew]:
    url = make_database()
    project, engine = begun(tmp_path, url)
    names, urls = {}, {"installer": url}
    for role in ("app", "operator", "auditor", "stranger"):
        names[role], password = f"app_{secrets.token_hex(6)}", secrets.token_hex(8)
        ledger.execute(engine, f"create role {names[role]} login password '{password}'")
        if role != "stranger":
            ledger.execute(engine, f"grant wallet_{role} to {names[role]}")
        address = make_url(url).set(username=names[role], password=password)
        urls[role] = address.render_as_string(hide_password=False)
    yield Crew(project, urls, names)
    for name in names.values():
        ledger.execute(engine, f"drop owned by {name}")
        ledger.execute(engine, f"drop role {name}")


LOOK = (
    "select phase, (select count(*) from wallet.audit_log), (select count(*) from wallet.jobs), "
    "(select last_value from wallet.line), (select string_agg(state::text, '') from wallet.accounts), "
    "(select count(*) from wallet.bypasses), (select string_agg(fingerprint || fence::text, '') from wallet.mappings), "
    "(select count(*) from pg_trigger) from wallet.control"
)


def test_every_command_runs_with_its_role_and_names_the_grant_that_a_lesser_one_lacks(crew: Crew) -> None:
    admin = connect.engine(crew.urls["installer"], application_name="test", poolclass=NullPool)
    seen: set[str] = set()
    wrong: list[tuple[object, ...]] = []
    for line, words, command in steps(admin, crew.project):
        seen.add(command)
        # Out of phase retired, the way back makes triggers and functions anew.
        retired = ledger.scalar(admin, "select phase from wallet.control") == "retired"
        needed = "installer" if command == "phase back" and retired else ROLES[command]
        given = [*words, *(REASON if needed in ("operator", "installer") else ()), "--json"]
        for role in () if command == "history" else LESSER[needed]:  # which the application's role may read as well
            state = (ledger.rows(admin, LOOK), crew.project.flag_path.read_bytes(), files(crew.project.folder))
            said = crew.project.run(*given, url=crew.urls[role])
            error = said.document.get("error", {})
            fields = error.get("fields", {})
            told = (said.exit_code, error.get("code"), fields.get("needs"), fields.get("role"))
            wanted = None if ROLES[command] == "installer" else f"wallet_{ROLES[command]}"
            if told != (4, "grant_missing", wanted, crew.names[role]):
                wrong.append((line, role, told, error.get("message")))
            if state != (ledger.rows(admin, LOOK), crew.project.flag_path.read_bytes(), files(crew.project.folder)):
                wrong.append((line, role, "has changed something"))
        done = crew.project.run(*given, url=crew.urls[needed])
        if not carried_out(command, done):
            wrong.append((line, needed, done.exit_code, done.stdout, done.stderr))
    assert wrong == [], "\n" + "\n".join(map(str, wrong))
    assert seen | SERVICES | {name for name, role in ROLES.items() if role == "none"} == set(ROLES)


def test_a_command_without_a_ledger_s_rights_runs_for_anybody(crew: Crew) -> None:
    for command in ("version", "flags list", "flags check"):
        assert ROLES[command] == "none"
        assert crew.project.run(*command.split(), url=crew.urls["stranger"]).exit_code in (0, 4), command
    assert crew.project.run("init", "--dry-run", url=crew.urls["auditor"]).exit_code in (0, 2)


def test_the_exporter_and_a_verification_that_writes_nothing_run_as_an_auditor(crew: Crew) -> None:
    engine = connect.engine(crew.urls["auditor"], application_name="test", poolclass=NullPool)
    with engine.connect() as connection:
        assert read_facts(connection, "wallet").phase == "legacy"
    engine.dispose()
    assert crew.project.run("verify", "--dry-run", url=crew.urls["auditor"]).exit_code == 3


def test_a_member_that_lacks_another_right_is_sent_to_install(crew: Crew) -> None:
    engine = connect.engine(crew.urls["installer"], application_name="test", poolclass=NullPool)
    ledger.set_phase(engine, "dual_write")
    ledger.execute(engine, "revoke all on public.users from wallet_operator")
    said = crew.project.run("backfill", *REASON, "--json", url=crew.urls["operator"])
    assert (said.exit_code, said.document["error"]["fields"]["member"]) == (4, True)
    assert "walletmigrate install" in said.document["error"]["message"]
    crew.project.change("install")
    assert crew.project.run("backfill", *REASON, url=crew.urls["operator"]).exit_code == 0
    engine.dispose()


WRITES = {
    ("operator", "jobs"): {"insert", "update"},
    ("operator", "job_batches"): {"insert", "update", "delete"},
    ("operator", "control"): {"update"},
    ("operator", "audit_log"): {"insert"},
    ("operator", "verifications"): {"insert"},
    ("operator", "bypasses"): {"delete"},
    ("operator", "bypasses_pruned"): {"insert", "update"},
    ("operator", "snapshots"): {"insert", "update", "delete"},
    ("operator", "snapshot_balances"): {"insert", "update", "delete"},
    ("operator", "snapshot_totals"): {"insert", "update", "delete"},
    ("operator", "snapshot_checksums"): {"insert", "update", "delete"},
    ("operator", "processes"): {"insert", "update", "delete"},
    ("app", "processes"): {"insert", "update", "delete"},
    ("operator", "flag_documents"): {"insert", "update"},
    ("app", "flag_documents"): {"insert", "update"},
}
READS = {"accounts", "transactions", "wallet_entries", "control", "mappings", "flag_documents", "line", "processes"}
"""What the application's role may read; the other two may read everything."""


def test_every_action_on_every_table_that_a_role_has_no_right_to_is_refused(crew: Crew) -> None:
    admin = connect.engine(crew.urls["installer"], application_name="test", poolclass=NullPool)
    tables = [
        (str(name), str(column))
        for name, column in ledger.rows(
            admin,
            "select c.relname, (select quote_ident(a.attname) from pg_attribute as a "
            "where a.attrelid = c.oid and a.attnum > 0 and a.attidentity = '' order by a.attnum limit 1) "
            "from pg_class as c where c.relnamespace = 'wallet'::regnamespace and c.relkind in ('r', 'v', 'S') "
            # Those behind identity columns are nobody's.
            "and not exists (select from pg_depend as d where d.objid = c.oid and d.deptype = 'i' and c.relkind = 'S') "
            "order by 1",
        )
    ]
    assert {"accounts", "transactions", "audit_log", "line"} <= {name for name, _ in tables}
    kinds = dict(ledger.rows(admin, "select relname, relkind::text from pg_class"))
    wrong = []
    for role in ("app", "operator", "auditor"):
        engine = connect.engine(crew.urls[role], application_name="test", poolclass=NullPool)
        with engine.connect() as connection:
            for table, column in tables:
                actions = {
                    "select": f"select 1 from wallet.{table} limit 1",
                    "insert": f"insert into wallet.{table} ({column}) select {column} from wallet.{table} where false",
                    "update": f"update wallet.{table} set {column} = null where false",
                    "delete": f"delete from wallet.{table} where false",
                    "truncate": f"truncate wallet.{table}",
                }
                if kinds[table] == "S":
                    actions = {"select": actions["select"], "update": f"select setval('wallet.{table}', 1, true)"}
                may = set(WRITES.get((role, table), set()))
                may |= {"select"} if role != "app" or table in READS else set()
                if kinds[table] == "v":
                    actions = {"select": actions["select"]}
                for action, statement in actions.items():
                    if allowed(connection, statement) != (action in may):
                        wrong.append((role, table, action))
        engine.dispose()
    admin.dispose()
    assert wrong == [], "\n" + "\n".join(map(str, wrong))


def allowed(connection: object, statement: str) -> bool:
    """Whether a role has the right to run a statement, whatever else is wrong with it."""
    try:
        connection.execute(text(statement))  # type: ignore[attr-defined]
    except DBAPIError as error:
        return getattr(error.orig, "sqlstate", None) != "42501"
    finally:
        connection.rollback()  # type: ignore[attr-defined]
    return True


WORKING = {
    *("begin_snapshot", "fold_snapshot", "advance_snapshot", "merge_snapshots", "drop_snapshots", "adopt_journal"),
    *("fold_system_accounts", "fill_accounts", "set_line", "undo_openings", "erase"),
}
WORKING_OF_A_MAPPING = {
    *("cut", "last", "span", "backfill", "late", "open", "freeze", "seal", "unfreeze", "unseal", "close"),
    *("amend", "rewrite", "correct", "recount", "recalculate", "standing"),
}
"""Functions of jobs and repairs, which the operator may run besides those that post. Whoever adds one adds it here."""


def test_each_role_may_run_its_own_functions_and_an_auditor_and_the_public_none(crew: Crew) -> None:
    admin = connect.engine(crew.urls["installer"], application_name="test", poolclass=NullPool)
    query = (
        "select p.proname from pg_proc as p where p.pronamespace = 'wallet'::regnamespace "
        "and has_function_privilege(:role, p.oid, 'execute') order by 1"
    )
    assert ledger.rows(admin, query, role=crew.names["auditor"]) == []
    assert ledger.rows(admin, query, role=crew.names["stranger"]) == []
    posting = {"diverged", "enter_batch", "labelled", "replay", "resolve", "turn_stale"}
    own = {f"{name}_users" for name in ("leg", "lock", "move", "plain", "post", "settle")}
    assert {name for (name,) in ledger.rows(admin, query, role=crew.names["app"])} == posting | own
    working = {f"{name}_users" for name in WORKING_OF_A_MAPPING} | WORKING
    assert {name for (name,) in ledger.rows(admin, query, role=crew.names["operator"])} == posting | own | working
    admin.dispose()


def test_the_table_of_commands_and_roles_is_what_the_commands_have() -> None:
    rows = re.findall(r"^\| `walletmigrate ([^`]+)` \| (\w+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    wanted = "\n".join(f"| `walletmigrate {name}` | {role} |" for name, role in sorted(ROLES.items()))
    assert dict(rows) == ROLES, f"docs/roles.md wants:\n{wanted}"
