"""Edits of the flag file: what was set is what Flagsmith's own client then says, and never half of it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flagsmith import Flagsmith
from flagsmith.offline_handlers import LocalFileHandler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flag_documents import body, document, identity, segment, state, tenant
from walletmigrate.errors import FlagDocumentInvalid, FlagsMissing, FlagSourceUnreachable, UsageError
from walletmigrate.flag_edits import FlagState, Override
from walletmigrate.flag_file import FlagFile
from walletmigrate.flag_sources import FileSource
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, ENABLE_WITHDRAWALS, READ_FROM_LEDGER, Json

SHIPPED = Path(__file__).parent.parent / "flags" / "environment.json"


@pytest.fixture
def file(tmp_path: Path) -> FlagFile:
    """A copy of the shipped file."""
    path = tmp_path / "environment.json"
    path.write_bytes(SHIPPED.read_bytes())
    return FlagFile(path)


def official(file: FlagFile, flag: str, account: str = "42", **traits: str) -> bool:
    """What Flagsmith's own client says of the file."""
    client = Flagsmith(offline_mode=True, offline_handler=LocalFileHandler(str(file.path)))
    return bool(client.get_identity_flags(account, dict(traits)).is_feature_enabled(flag))


def content_of(file: FlagFile) -> Any:
    return json.loads(file.path.read_bytes())


def put(file: FlagFile, content: Json) -> None:
    file.path.write_bytes(body(content))


def state_of(file: FlagFile, flag: str) -> FlagState:
    return next(state for state in file.list() if state.flag == flag)


def test_the_shipped_file_lists_three_flags_off_and_is_valid(file: FlagFile) -> None:
    assert file.list() == tuple(FlagState(flag, False) for flag in ALL_FLAGS)
    assert file.validate() == ()


def test_the_shipped_file_has_the_form_that_edits_write() -> None:
    text = SHIPPED.read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


@pytest.mark.parametrize("flag", ALL_FLAGS)
def test_a_flag_set_for_everyone_is_on_for_everyone(file: FlagFile, flag: str) -> None:
    change = file.set(flag, True, everyone=True)
    assert change.changed
    assert (change.before, change.after) == (FlagState(flag, False), FlagState(flag, True))
    assert change.also == ()
    for each in ALL_FLAGS:
        assert official(file, each) is (each == flag)
    file.set(flag, False, everyone=True)
    assert not official(file, flag)


def test_a_cohort_is_one_segment_that_all_flags_share(file: FlagFile) -> None:
    for flag in ALL_FLAGS:
        file.set(flag, True, trait=("tenant", "acme"))
    (cohort,) = content_of(file)["project"]["segments"]
    assert cohort["name"] == "tenant-acme"
    for flag in ALL_FLAGS:
        assert state_of(file, flag).overrides == (Override("tenant-acme", "trait", "tenant=acme", True),)
        assert official(file, flag, tenant="acme")
        assert not official(file, flag, tenant="globex")
        assert not official(file, flag)


def test_a_cohort_made_elsewhere_is_recognised_by_its_rules(file: FlagFile) -> None:
    put(file, document(segments=[tenant(11, "acme", DUAL_WRITE)]))
    file.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    (cohort,) = content_of(file)["project"]["segments"]
    assert (cohort["id"], cohort["name"], len(cohort["feature_states"])) == (11, "segment-11", 2)
    assert official(file, READ_FROM_LEDGER, tenant="acme")


def test_rules_that_mean_the_opposite_are_not_taken_for_the_cohort(file: FlagFile) -> None:
    opposite = tenant(11, "acme", DUAL_WRITE)
    opposite["rules"][0]["rules"][0]["type"] = "NONE"
    put(file, document(segments=[opposite]))
    assert state_of(file, DUAL_WRITE).overrides == (Override("segment-11", "segment", "", True),)
    file.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    assert official(file, READ_FROM_LEDGER, tenant="acme")
    assert not official(file, READ_FROM_LEDGER, tenant="globex")


def test_a_cohort_can_be_switched_off_against_everyone(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, everyone=True)
    file.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    assert not official(file, DUAL_WRITE, tenant="acme")
    assert official(file, DUAL_WRITE, tenant="globex")


@pytest.mark.parametrize("first", [True, False])
def test_among_cohorts_off_wins_over_on_whichever_was_set_first(file: FlagFile, first: bool) -> None:
    cohorts = {True: ("tenant", "acme"), False: ("role", "guide")}
    for enabled in (first, not first):
        file.set(DUAL_WRITE, enabled, trait=cohorts[enabled])
    assert official(file, DUAL_WRITE, tenant="acme", role="user")
    assert not official(file, DUAL_WRITE, tenant="acme", role="guide")


def test_a_cohort_wins_over_the_percentage_and_an_account_over_both(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, percent=100)
    file.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    file.set(DUAL_WRITE, True, account="7")
    assert official(file, DUAL_WRITE, "42", tenant="globex")
    assert not official(file, DUAL_WRITE, "42", tenant="acme")
    assert official(file, DUAL_WRITE, "7", tenant="acme")


def test_an_account_is_overridden_by_its_key_alone(file: FlagFile) -> None:
    for flag in (DUAL_WRITE, ENABLE_WITHDRAWALS):
        file.set(flag, True, account="42")
    assert len(content_of(file)["identity_overrides"]) == 1
    assert state_of(file, DUAL_WRITE).overrides == (Override("", "account", "42", True),)
    assert official(file, DUAL_WRITE, "42")
    assert not official(file, DUAL_WRITE, "4")
    assert not official(file, DUAL_WRITE, "421")
    file.set(DUAL_WRITE, False, account="42")
    assert not official(file, DUAL_WRITE, "42")
    assert official(file, ENABLE_WITHDRAWALS, "42")


def chosen(file: FlagFile, flag: str) -> set[int]:
    client = Flagsmith(offline_mode=True, offline_handler=LocalFileHandler(str(file.path)))
    return {key for key in range(1000) if client.get_identity_flags(str(key), {}).is_feature_enabled(flag)}


def test_all_flags_at_one_percentage_pick_the_same_accounts(file: FlagFile) -> None:
    for flag in ALL_FLAGS:
        file.set(flag, True, percent=30)
    assert len(content_of(file)["project"]["segments"]) == 1
    first, *others = [chosen(file, flag) for flag in ALL_FLAGS]
    assert 230 < len(first) < 370
    assert others == [first, first]


def test_raising_the_percentage_keeps_who_is_in_and_takes_the_other_flags_along(file: FlagFile) -> None:
    for flag in (DUAL_WRITE, READ_FROM_LEDGER):
        file.set(flag, True, percent=20)
    before = chosen(file, DUAL_WRITE)
    change = file.set(DUAL_WRITE, True, percent=60)
    assert change.before.overrides == (Override("percent-of-accounts", "percent", "20", True),)
    assert change.after.overrides == (Override("percent-of-accounts", "percent", "60", True),)
    assert change.also == (READ_FROM_LEDGER,)
    assert before < chosen(file, DUAL_WRITE)
    assert chosen(file, READ_FROM_LEDGER) == chosen(file, DUAL_WRITE)


def test_a_flag_does_not_join_at_another_percentage_and_move_the_others_unasked(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, percent=50)
    text = file.path.read_bytes()
    with pytest.raises(UsageError, match=r"stands at 50 \(wallet\.dualWrite\)"):
        file.set(READ_FROM_LEDGER, True, percent=10)
    assert file.path.read_bytes() == text


def test_a_percentage_that_was_ended_and_set_again_picks_the_same_accounts(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, percent=30)
    before = chosen(file, DUAL_WRITE)
    assert file.remove(DUAL_WRITE, percent=True).changed
    assert chosen(file, DUAL_WRITE) == set()
    file.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    file.set(DUAL_WRITE, True, percent=30)
    assert chosen(file, DUAL_WRITE) == before


def test_a_percentage_of_a_trait_takes_its_values_whole(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, percent=50, percent_of="tenant")
    tenants = {name: {official(file, DUAL_WRITE, str(key), tenant=name) for key in range(5)} for name in "abcdefgh"}
    assert all(len(answers) == 1 for answers in tenants.values())
    assert set.union(*tenants.values()) == {True, False}
    with pytest.raises(UsageError, match="splits by tenant"):
        file.set(READ_FROM_LEDGER, True, percent=50)


def test_a_percentage_that_carries_the_applications_own_flags_is_left_alone(file: FlagFile) -> None:
    theirs = segment(7, "PERCENTAGE_SPLIT", "", "10", [state("new.checkout", True, 0)])
    put(file, {**document(segments=[theirs], names=(*ALL_FLAGS, "new.checkout"))})
    file.set(DUAL_WRITE, True, percent=50)
    first, second = content_of(file)["project"]["segments"]
    assert first == theirs
    assert second["name"] == "percent-of-accounts"


@pytest.mark.parametrize("percent", [0, -1, 101, True, 12.5, "25"])
def test_a_percentage_that_means_nothing_is_refused(file: FlagFile, percent: Any) -> None:
    with pytest.raises(UsageError, match="from 1 to 100"):
        file.set(DUAL_WRITE, True, percent=percent)
    assert file.path.read_bytes() == SHIPPED.read_bytes()


def test_off_for_everyone_leaves_nobody_on(file: FlagFile) -> None:
    file.set(DUAL_WRITE, True, everyone=True)
    file.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    file.set(DUAL_WRITE, True, percent=100)
    file.set(DUAL_WRITE, True, account="42")
    file.set(DUAL_WRITE, False, account="43")
    file.set(READ_FROM_LEDGER, True, trait=("tenant", "acme"))
    change = file.set(DUAL_WRITE, False, everyone=True)
    assert change.after == FlagState(DUAL_WRITE, False, (Override("", "account", "43", False),))
    assert not official(file, DUAL_WRITE, "42", tenant="acme")
    assert official(file, READ_FROM_LEDGER, "42", tenant="acme")


def test_on_for_everyone_keeps_who_was_switched_off_and_says_so(file: FlagFile) -> None:
    file.set(DUAL_WRITE, False, account="43")
    file.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    change = file.set(DUAL_WRITE, True, everyone=True)
    assert [override.enabled for override in change.after.overrides] == [False, False]
    assert official(file, DUAL_WRITE, "42")
    assert not official(file, DUAL_WRITE, "43")
    assert not official(file, DUAL_WRITE, "42", tenant="acme")


WAYS: tuple[dict[str, Any], ...] = (
    {"everyone": True},
    {"trait": ("tenant", "acme")},
    {"percent": 25},
    {"percent": 25, "percent_of": "tenant"},
    {"account": "42"},
)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_same_call_again_changes_nothing(file: FlagFile, way: dict[str, Any], enabled: bool) -> None:
    file.set(DUAL_WRITE, not enabled, **way)
    assert file.set(DUAL_WRITE, enabled, **way).changed
    text, inode = file.path.read_bytes(), file.path.stat().st_ino
    again = file.set(DUAL_WRITE, enabled, **way)
    assert not again.changed
    assert again.before == again.after
    assert (file.path.read_bytes(), file.path.stat().st_ino) == (text, inode)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_dry_run_says_what_would_change_and_writes_nothing(file: FlagFile, way: dict[str, Any]) -> None:
    would = file.set(DUAL_WRITE, True, dry_run=True, **way)
    assert would.changed
    assert file.path.read_bytes() == SHIPPED.read_bytes()
    assert file.set(DUAL_WRITE, True, **way) == would


def test_removing_an_override_gives_back_what_everyone_has(file: FlagFile) -> None:
    for flag in (DUAL_WRITE, READ_FROM_LEDGER):
        file.set(flag, True, trait=("tenant", "acme"))
        file.set(flag, True, account="42")
    assert file.remove(DUAL_WRITE, trait=("tenant", "acme")).after.overrides == (Override("", "account", "42", True),)
    assert file.remove(DUAL_WRITE, account="42").after == FlagState(DUAL_WRITE, False)
    assert not official(file, DUAL_WRITE, "42", tenant="acme")
    assert official(file, READ_FROM_LEDGER, "43", tenant="acme")
    for way in ({"trait": ("tenant", "acme")}, {"account": "42"}):
        file.remove(READ_FROM_LEDGER, **way)
    left = content_of(file)
    assert (left["project"]["segments"], left["identity_overrides"]) == ([], [])


@pytest.mark.parametrize("way", [{"trait": ("tenant", "acme")}, {"percent": True}, {"account": "42"}], ids=str)
def test_removing_what_is_not_there_changes_nothing(file: FlagFile, way: dict[str, Any]) -> None:
    text = file.path.read_bytes()
    assert not file.remove(DUAL_WRITE, **way).changed
    assert file.path.read_bytes() == text


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("wallet.dualwrite", DUAL_WRITE),
        ("dualWrite", DUAL_WRITE),
        ("wallet.readFromLedgr", READ_FROM_LEDGER),
        ("wallet.withdrawals", ENABLE_WITHDRAWALS),
    ],
)
def test_an_unknown_flag_is_refused_with_what_was_meant(file: FlagFile, asked: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {meant}"):
        file.set(asked, True, everyone=True)
    with pytest.raises(UsageError, match=f"Did you mean {meant}"):
        file.remove(asked, percent=True)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"everyone": True, "account": "42"},
        {"trait": ("tenant", "acme"), "percent": 5},
        {"percent_of": "tenant", "everyone": True},
        {"trait": ("tenant", "")},
        {"trait": ("", "acme")},
        {"trait": ("$.identity.key", "acme")},
        {"trait": ("tenant", "1.2.3:semver")},
        {"trait": ("tenant", "acme\n")},
        {"account": ""},
        {"account": "\udcff"},
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_leaves_the_file_as_it_was(file: FlagFile, way: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        file.set(DUAL_WRITE, True, **way)
    assert file.path.read_bytes() == SHIPPED.read_bytes()
    assert os.listdir(file.path.parent) == [file.path.name]


@pytest.mark.parametrize("account", ["7", "a,b", "[1]", "Zoë Łuk", "6f1c1f0e-7c5e-4b55-9f3f-0a2f1f6f3a11", " x"])
def test_any_text_can_be_an_accounts_key(file: FlagFile, account: str) -> None:
    file.set(DUAL_WRITE, True, account=account)
    assert official(file, DUAL_WRITE, account)
    assert not official(file, DUAL_WRITE, "a")
    assert FileSource(file.path).snapshot().decide(account, {}).dual_write


def test_the_files_mode_is_kept(file: FlagFile) -> None:
    file.path.chmod(0o640)
    file.set(DUAL_WRITE, True, everyone=True)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640


def test_a_link_stays_a_link_and_its_file_is_edited(file: FlagFile, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "flags.json"
    link.symlink_to(file.path)
    FlagFile(link).set(DUAL_WRITE, True, everyone=True)
    assert link.is_symlink()
    assert official(file, DUAL_WRITE)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(
    file: FlagFile, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UsageError, match="No space left on device"):
        file.set(DUAL_WRITE, True, everyone=True)
    assert file.path.read_bytes() == SHIPPED.read_bytes()
    assert os.listdir(file.path.parent) == [file.path.name]


def test_a_file_that_is_not_there_or_no_document_is_refused(file: FlagFile, tmp_path: Path) -> None:
    for gone in (FlagFile(tmp_path / "none.json"), FlagFile(tmp_path / "none" / "none.json")):
        with pytest.raises(FlagSourceUnreachable):
            gone.set(DUAL_WRITE, True, everyone=True)
        assert len(gone.validate()) == 1
    file.path.write_text("{")
    with pytest.raises(FlagDocumentInvalid):
        file.set(DUAL_WRITE, True, everyone=True)
    assert len(file.validate()) == 1
    put(file, document(names=ALL_FLAGS[:2]))
    with pytest.raises(FlagsMissing):
        file.list()
    assert ENABLE_WITHDRAWALS in file.validate()[0]


def test_validate_names_what_flagsmith_takes_without_a_word(file: FlagFile) -> None:
    splits = [
        segment(n, "PERCENTAGE_SPLIT", "", "25", [state(f, True, 0)])
        for n, f in ((1, DUAL_WRITE), (2, READ_FROM_LEDGER))
    ]
    put(file, document(segments=splits))
    problems = file.validate()
    assert any("segment-1, segment-2 pick different accounts" in problem for problem in problems)
    assert any("on for segment segment-2" in problem for problem in problems)

    put(file, document(segments=[tenant(1, "a", DUAL_WRITE), tenant(1, "b", DUAL_WRITE)]))
    assert file.validate() == ("2 segments have the id 1; only the last one counts. Give each its own.",)

    put(file, document(names=(*ALL_FLAGS, DUAL_WRITE)))
    assert file.validate() == (f"{DUAL_WRITE} stands in feature_states 2 times; the last one counts.",)

    put(file, document(READ_FROM_LEDGER))
    assert len(file.validate()) == 1
    put(file, document(identities=[identity("42", state(READ_FROM_LEDGER, True))]))
    assert "on for account 42" in file.validate()[0]
    put(file, document(READ_FROM_LEDGER, DUAL_WRITE))
    assert file.validate() == ()


def test_what_the_file_says_besides_is_kept(file: FlagFile) -> None:
    content = document(names=(*ALL_FLAGS, "new.checkout"), identities=[identity("9", state("new.checkout", True))])
    content["own"] = {"note": "Zoë"}
    put(file, content)
    file.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    file.set(DUAL_WRITE, False, everyone=True)
    edited = content_of(file)
    assert edited.pop("updated_at") > content.pop("updated_at")
    assert edited == content
    assert "Zoë" in file.path.read_text(encoding="utf-8")


def test_a_source_that_reads_the_file_sees_an_edit(file: FlagFile) -> None:
    source = FileSource(file.path, check_seconds=0)
    before = source.snapshot()
    file.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    assert source.snapshot().decide("42", {"tenant": "acme"}).dual_write
    assert not before.decide("42", {"tenant": "acme"}).dual_write


def test_edits_of_several_threads_are_all_kept(file: FlagFile) -> None:
    barrier = threading.Barrier(8)

    def edit(number: int) -> None:
        barrier.wait()
        for turn in range(3):
            FlagFile(file.path).set(DUAL_WRITE, True, trait=("tenant", f"{number}-{turn}"))

    threads = [threading.Thread(target=edit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = {override.value for override in state_of(file, DUAL_WRITE).overrides}
    assert values == {f"tenant={number}-{turn}" for number in range(8) for turn in range(3)}
    ids = [each["id"] for each in content_of(file)["project"]["segments"]]
    assert len(set(ids)) == 24


def test_edits_of_several_processes_are_all_kept(file: FlagFile) -> None:
    program = (
        "import sys; from walletmigrate.flag_file import FlagFile\n"
        "sys.stdin.read()\n"
        "for turn in range(5):\n"
        "    FlagFile(sys.argv[1]).set('wallet.dualWrite', True, account=f'{sys.argv[2]}-{turn}')\n"
    )
    editors = [
        subprocess.Popen([sys.executable, "-c", program, str(file.path), str(number)], stdin=subprocess.PIPE)
        for number in range(3)
    ]
    for editor in editors:
        assert editor.stdin is not None
        editor.stdin.close()  # the signal to begin
    assert [editor.wait(60) for editor in editors] == [0, 0, 0]
    assert len(state_of(file, DUAL_WRITE).overrides) == 15


_ways = st.sampled_from(
    [
        {"everyone": True},
        {"trait": ("tenant", "acme")},
        {"trait": ("role", "guide")},
        {"account": "42"},
        {"percent": 100},
    ]
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.sampled_from(ALL_FLAGS), st.booleans(), _ways), max_size=8))
def test_after_any_edits_flagsmiths_client_says_what_the_rules_of_precedence_say(
    file: FlagFile, edits: list[tuple[str, bool, dict[str, Any]]]
) -> None:
    file.path.write_bytes(SHIPPED.read_bytes())
    model: dict[str, dict[str, bool]] = {flag: {"everyone": False} for flag in ALL_FLAGS}
    for flag, enabled, way in edits:
        file.set(flag, enabled, **way)
        if "everyone" in way and not enabled:
            model[flag] = {name: on for name, on in model[flag].items() if not on}
        model[flag][str(way.get("trait", way.get("account", next(iter(way)))))] = enabled
    people = {
        "41": {"tenant": "acme"},
        "42": {"tenant": "acme", "role": "guide"},
        "43": {"role": "guide"},
        "44": {},
    }
    for flag, rules in model.items():
        for account, traits in people.items():
            own = [rules[str((name, value))] for name, value in traits.items() if str((name, value)) in rules]
            order = [rules.get("42") if account == "42" else None, all(own) if own else None]
            order += [rules.get("percent"), rules["everyone"]]
            assert official(file, flag, account, **traits) is next(each for each in order if each is not None)
