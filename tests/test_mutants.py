"""Every guard of the SQL is missed by a test when it is taken away: the record is whole, and a part of it is played.

`make mutants` plays all of it. How guards are read out, and how the record is kept, CONTRIBUTING.md says.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mutants import plugin
from mutants.__main__ import joined, run
from mutants.guards import all_guards, guards
from mutants.record import REASON, RECORD, killed, known, load, reasons, written

TESTS = Path(__file__).parent

FUNCTION = """
create or replace function {{ schema }}.example_{{ mapping }}() returns void
language plpgsql
security definer
set search_path = pg_catalog, {{ schema }}, pg_temp
as $$
begin
BODY
end
$$;
"""


def read(body: str) -> list[str]:
    """The names of the guards of a function with this body, without those of its head."""
    found = guards("posting", FUNCTION.replace("BODY", body))
    assert all(guard.place == "posting.example" for guard in found)
    return [guard.name for guard in found if not re.match(r"security definer|set search_path", guard.name)]


def test_every_guard_of_the_sql_is_on_record_and_nothing_else_is() -> None:
    entries = load()
    assert sorted(known().keys() - entries.keys()) == []
    assert sorted(entries.keys() - known().keys()) == []


def test_the_record_stands_as_the_command_writes_it() -> None:
    assert RECORD.read_text(encoding="utf-8") == written(load())


def test_a_reason_is_a_sentence() -> None:
    bad = {guard: why for guard, why in reasons(load()).items() if not re.fullmatch(r"[A-Z`].{20,}\.", why)}
    assert bad == {}


def test_every_test_on_record_is_there() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py")}
    named = {test.partition("[")[0] for test in killed(load()).values()}
    split = {test: test.partition("::") for test in sorted(named)}
    assert [test for test, (file, _, name) in split.items() if f"def {name}(" not in files.get(file, "")] == []


def test_a_part_of_the_record_is_played_and_each_of_its_guards_is_missed() -> None:
    command = [sys.executable, "-m", "mutants", "play", "--share", "48", "--jobs", "1"]
    done = subprocess.run(command, cwd=TESTS.parent, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    played = re.search(r"(\d+) of (\d+) played were missed", done.stdout)
    assert played is not None
    assert played[1] == played[2]
    assert int(played[1]) >= 10


def test_a_guard_that_no_test_misses_is_told_and_so_is_a_test_that_is_not_there() -> None:
    guard = next(guard for guard in known() if guard.startswith("snapshots."))
    bystander = "test_append_only.py::test_personal_data_stands_apart_and_can_be_erased"
    nobody = "test_append_only.py::test_none"
    results = list(run([(guard, [bystander]), (guard, [nobody])], 1))
    assert [(result["guard"], result["killer"]) for result in results] == [(guard, None)] * 2
    assert [result["broken"] for result in results] == ["", f"there is no test {nobody}"]


def test_a_test_that_fails_anyway_misses_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"fails anyway": "E  cannot connect", "misses it": "E  100 is not 90", "does not run": "E  TimeoutError"}
    monkeypatch.setattr(plugin, "failure", said.get)
    guard = next(guard for guard in known() if guard.startswith("snapshots."))

    def verdict(*names: str) -> tuple[str | None, str]:
        items: Any = [(name, name) for name in names]
        as_it_stands: Any = {"fails anyway": "E  cannot connect"}.get
        found = plugin.verdict(guard, items, as_it_stands)
        return found["killer"], found.get("broken", "")

    assert verdict("passes", "does not run", "fails anyway", "misses it") == ("misses it", "")
    assert verdict("fails anyway", "passes") == (None, "fails anyway fails as it stands: cannot connect")
    assert verdict("passes", "does not run") == (None, "TimeoutError")
    assert verdict("passes") == (None, "")


def test_all_that_begins_with_one_test_is_played_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is played once as it stands."""
    parts: list[list[tuple[str, list[str]]]] = []

    def note(options: list[str], *_: object) -> None:
        parts.append(json.loads(Path(options[1]).read_text(encoding="utf-8")))

    monkeypatch.setattr("mutants.__main__._pytest", note)
    plan = [(f"guard {number}", [f"test_x.py::test_{number % 5}"]) for number in range(20)]
    assert list(run([*plan, ("without tests", [])], 3)) == []
    assert sum(map(len, parts)) == 21
    assert len(parts) > 1
    homes = {(test, number) for number, part in enumerate(parts) for _, tests in part for test in tests}
    assert sorted(test for test, _ in homes) == [f"test_x.py::test_{number}" for number in range(5)]


def test_names_that_a_shell_took_apart_at_their_spaces_are_put_together_again() -> None:
    names = ["test_a.py", "test_b.py::test_c[a credit to a stale account]", "test_d.py::test_e[x[1] of y]", "test_f.py"]
    assert joined(" ".join(names).split()) == names
    assert joined(names) == names


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("if a then\n b := 1;\nend if;", ["a → false"]),
        ("if a and b then\n c := 1;\nend if;", ["a → true", "a and b → false", "b → true"]),
        ("if a or b then\n c := 1;\nend if;", ["a → false", "b → false"]),
        ("if x between 1 and 2 and b then\n c := 1;\nend if;", None),
        ("c := (a or b) is not true;", ["a → false", "b → false"]),
        ("c := case when a then 1 when b or d then 2 end;", ["a → false", "b → false", "d → false"]),
        ("c := case x when 'one' then 1 end;", ["'one' → null"]),
        ("with a as (select 1) insert into t table a;", []),
        ("with a as (insert into t values (1)) insert into u values (2);", None),
        ("exit when a is null;", ["a is null → false"]),
        ("exit outer when a or b;", ["a → false", "b → false"]),
        ("c := exists (select from t where t.id = 1);", ["t.id = 1 → true"]),
        ("select a into b from t left join u on t.id = u.id;", ["t.id = u.id → true"]),
        ("raise exception 'no; no' using errcode = 'WM000';", None),
        ("null;\nexception\n when deadlock_detected or lock_not_available then\n  raise;", None),
        ("perform 1 from t where a order by t.id for no key update;", None),
        ("{{ 'if' }} x;\ninsert into t values (1) on conflict do nothing;", None),
    ],
)
def test_guards_are_read_out_of_the_sql(body: str, names: list[str] | None) -> None:
    expected = {
        "if x between": ["x between 1 and 2 → true", "x between 1 and 2 and b → false", "b → true"],
        "raise exception": ["raise exception 'no; no' using errcode = 'WM000' → removed"],
        "null;\nexception": [
            "deadlock_detected → sqlstate 'WM999'",
            "lock_not_available → sqlstate 'WM999'",
            "raise → removed",
        ],
        "with a as (insert": ["with a as (insert into t values (1)) insert into u values (2) → removed"],
        "perform 1": ["a → true", "order by t.id → removed", "for no key update → removed"],
        "{{ 'if' }}": ["insert into t values (1) on conflict do nothing → removed", "on conflict do nothing → removed"],
    }
    if names is None:
        names = next(value for start, value in expected.items() if body.startswith(start))
    assert read(body) == names


def test_what_is_taken_away_is_the_guard_alone() -> None:
    source = FUNCTION.replace("BODY", "if a and b then\n raise;\nend if;")
    mutants = {guard.name: guard.mutated(source) for guard in guards("posting", source)}
    assert "if true and b then" in mutants["a → true"]
    assert "if false then" in mutants["a and b → false"]
    assert "then\n null;" in mutants["raise → removed"]
    assert "security" not in mutants["security definer → removed"]


def test_comments_space_and_other_functions_do_not_change_a_guard_s_name() -> None:
    before = FUNCTION.replace("BODY", "if a\n and b then\n raise;\nend if;")
    after = FUNCTION.replace("_{{ mapping }}", "") + before.replace("a\n and b", "a and -- why\n        b")
    assert {guard.id for guard in guards("posting", before)} <= {guard.id for guard in guards("posting", after)}


def test_the_machine_reads_what_the_protocol_stands_on() -> None:
    """A reader that went blind would leave nothing to record: these are there, by hand."""
    found = known().keys()
    assert len(all_guards()) > 1000
    assert {
        "mapping.side: for no key update → removed",
        "mapping.side: perform probe_account('{{ mapping }}', p_key, p_bucket, p_currency) → removed",
        "mapping.leg: order by a.id → removed",
        "mapping.lock: order by l.{{ key }} → removed",
        "mapping.plain: raise → removed",
        "posting.shadow_ledger: raise → removed",
        "posting.shadow_ledger: v_state like '40%' → false",
        "posting.post_movement: on conflict do nothing → removed",
        "posting.probe_account: security definer → removed",
        "fence.fence: a.state = 'mirrored' → true",
        "fence.fence: a.balance = {{ c.before }} → true",
        "fence.fence: pg_has_role(session_user, to_regrole('{{ app }}')::oid, 'member') is not true → true",
        "fence.fence: {{ open }} → true",
        "fence.fence_truncate: order by a.id → removed",
        "ledger.schema: alter table {{ schema }}.transactions enable always trigger append_only; → removed",
        "triggers.fence: trigger after delete → removed",
        "triggers.fence: enable always trigger after update → enable",
    } <= found


def test_reasons_and_tests_are_told_apart() -> None:
    entries = {"a": "test_x.py::test_y", "b": f"{REASON}It is so."}
    assert killed(entries) == {"a": "test_x.py::test_y"}
    assert reasons(entries) == {"b": "It is so."}
