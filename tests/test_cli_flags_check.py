"""What `flags check` and its like say of a document: good, doubtful, broken, or beyond what Flagsmith can evaluate."""

from __future__ import annotations

import json
from typing import Any

import pytest

from commandline import REASON, Project
from flag_documents import UNREADABLE, document, identity, named, segment, state, tenant
from flagging import audited, bare, project
from walletmigrate.flags import ALL_FLAGS, DUAL_WRITE, ENABLE_WITHDRAWALS, READ_FROM_LEDGER, Json

__all__ = ["bare", "project"]


def put(project: Project, content: Json) -> None:
    project.flag_path.write_text(json.dumps(content), encoding="utf-8")


def told(project: Project) -> list[str]:
    said = project.run("flags", "check", "--json")
    assert said.exit_code == 4, said
    return [one["what"] for one in said.document["error"]["fields"]["reasons"]]


def test_good_flags_pass_the_check(bare: Project) -> None:
    put(bare, document(DUAL_WRITE, segments=[tenant(1, "acme", READ_FROM_LEDGER)]))
    said = bare.run("flags", "check")
    assert (said.exit_code, "all three flags are known" in said.stdout) == (0, True)


@pytest.mark.parametrize("name", ["wallet.dualwrite", "wallet.dual_write", "Wallet.DualWrite", "wallet.dualWrites"])
def test_a_misspelt_flag_is_named_with_the_right_spelling(bare: Project, name: str) -> None:
    put(bare, document(names=(name, *ALL_FLAGS[1:])))
    said = bare.run("flags", "check")
    assert said.exit_code == 4
    assert f"has {name}, which must be spelt {DUAL_WRITE}" in said.stderr


def test_reads_without_writes_are_named_with_what_mends_them(bare: Project) -> None:
    put(bare, document(segments=[tenant(1, "acme", READ_FROM_LEDGER)]))
    said = bare.run("flags", "check", "--json")
    assert (said.exit_code, said.document["error"]["code"]) == (4, "precondition")
    assert said.document["error"]["fields"]["reasons"] == [
        {
            "what": f"{READ_FROM_LEDGER} is on for segment segment-1 and {DUAL_WRITE} is not: it counts as off.",
            "mend": f"walletmigrate flags set {DUAL_WRITE} on --cohort segment-1 --reason '…'",
        }
    ]
    bare.run("flags", "set", DUAL_WRITE, "on", "--cohort", "segment-1", "--no-audit", *REASON)
    assert bare.run("flags", "check").exit_code == 0


def split(number: int, flag: str, enabled: bool, priority: int) -> Json:
    return segment(number, "PERCENTAGE_SPLIT", "tenant", "50", [state(flag, enabled, priority)])


def trait(number: int, name: str, value: str, enabled: bool, priority: int) -> Json:
    return segment(number, "EQUAL", name, value, [state(DUAL_WRITE, enabled, priority)])


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ([trait(1, "tenant", "acme", True, 1), trait(2, "tenant", "acme", False, 2)], "they are the same accounts"),
        ([trait(1, "tenant", "acme", True, 1), trait(2, "role", "vip", False, 2)], "is off for segment segment-2"),
        ([trait(1, "tenant", "acme", True, 1), trait(2, "role", "vip", False, 1)], "ranks no lower"),
        ([trait(1, "tenant", "acme", True, 5), split(2, DUAL_WRITE, False, 1)], "is on for segment segment-1"),
        ([trait(1, "plan", "pro", True, 5)], "the trait plan, which no mapping has"),
        ([split(1, DUAL_WRITE, True, 1), split(2, ENABLE_WITHDRAWALS, True, 1)], "pick different accounts"),
    ],
)
def test_overrides_that_contradict_are_named(bare: Project, segments: list[Json], said: str) -> None:
    put(bare, document(segments=segments))
    (what,) = told(bare)
    assert said in what


def test_overrides_that_do_not_meet_or_rank_as_they_should_pass(bare: Project) -> None:
    apart = [trait(1, "tenant", "acme", True, 1), trait(2, "tenant", "globex", False, 2)]
    ranked = [trait(3, "role", "vip", False, 0), split(4, DUAL_WRITE, False, 9)]
    put(bare, document(segments=apart + ranked))
    assert bare.run("flags", "check").exit_code == 0


def test_an_account_that_is_both_on_and_off_is_named(bare: Project) -> None:
    content = document()
    for enabled in (True, False):
        features = [state(DUAL_WRITE, enabled)]
        content["identity_overrides"].append({"identifier": "7", "identity_features": features})
    put(bare, content)
    assert told(bare) == [f"{DUAL_WRITE} is both on and off for account 7."]


BROKEN: list[tuple[str, Any, str]] = [
    ("feature_states", None, "feature_states is not a valid list"),
    ("feature_states", [{"enabled": True}], "feature_states[0].feature is missing"),
    ("feature_states", [{"feature": {"id": 1}, "enabled": True}], "feature_states[0].feature.name is missing"),
    ("feature_states", [state(DUAL_WRITE, "false")], "'enabled' of wallet.dualWrite is 'false'"),  # type: ignore[arg-type]
    (
        "project",
        {"segments": [{"id": 1, "name": "x", "rules": "all"}]},
        "project.segments[0].rules is not a valid list",
    ),
    ("project", {}, "project.segments is missing"),
    ("identity_overrides", [{"identifier": 7, "identity_features": []}], "identity_overrides[0].identifier is not"),
    ("api_key", 5, "api_key is not a valid string"),
]


@pytest.mark.parametrize(("name", "value", "said"), BROKEN, ids=[said for _, _, said in BROKEN])
def test_a_broken_document_is_refused_with_the_place_that_is_wrong(
    bare: Project, name: str, value: object, said: str
) -> None:
    put(bare, {**document(), name: value})
    for words in (["check"], ["list"], ["set", DUAL_WRITE, "on", "--everyone", "--no-audit", *REASON]):
        found = bare.run("flags", *words, "--json")
        assert (found.exit_code, found.document["error"]["code"]) == (2, "flag_document")
        assert said in found.document["error"]["fields"]["detail"]


def test_a_broken_file_ends_the_check_with_2_and_one_that_is_gone_with_5(bare: Project) -> None:
    bare.flag_path.write_text('{"feature_states": [')
    assert "not JSON" in bare.run("flags", "check").stderr
    assert bare.run("flags", "check").exit_code == 2
    bare.flag_path.unlink()
    assert bare.run("flags", "check").exit_code == 5


def asking(operator: str, value: object) -> Json:
    """A document in which a segment of dual-write has that condition of the trait role."""
    return document(segments=[segment(5, operator, "role", value, [state(DUAL_WRITE, True, 1)])])


@pytest.mark.parametrize(("operator", "value"), UNREADABLE, ids=named)
def test_a_condition_that_cannot_be_evaluated_ends_the_check_with_2_and_is_named(
    bare: Project, operator: str, value: object
) -> None:
    put(bare, asking(operator, value))
    said = bare.run("flags", "check")
    assert (said.exit_code, said.stdout) == (2, "")
    assert f"conditions[0] (segment segment-5): Flagsmith's engine cannot evaluate role {operator}" in said.stderr
    assert "; write " in said.stderr


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (asking("REGEX", "("), "cannot evaluate role REGEX '('"),
        (asking("IN", 5), "cannot evaluate role IN 5"),
        (
            document(segments=[{**tenant(5, "a"), "feature_states": [state(DUAL_WRITE, True, "x")]}]),  # type: ignore[arg-type]
            "project.segments[0].feature_states[0].feature_segment.priority (segment segment-5) is 'x': write a number",
        ),
    ],
    ids=["regex", "in", "priority"],
)
def test_every_command_refuses_a_document_that_cannot_be_evaluated_and_writes_nothing(
    project: Project, content: Json, detail: str
) -> None:
    put(project, content)
    stood, rows = project.flag_path.read_bytes(), audited(project)
    flip = ["flags", "set", DUAL_WRITE]
    for words in (
        ["flags", "check"],
        ["flags", "list"],
        ["flags", "explain", "1"],
        [*flip, "on", "--everyone", "--dry-run"],
        [*flip, "on", "--everyone", *REASON],
        [*flip, "off", "--everyone", *REASON],
        [*flip, "remove", "--account", "7", *REASON],
    ):
        said = project.run(*words, "--json")
        assert (said.exit_code, said.document["error"]["code"]) == (2, "flag_document"), words
        assert detail in said.document["error"]["fields"]["detail"]
    cutover = ["cutover", "--cohort", "tenant=acme", "--confirm", "users", *REASON]
    for words, exit_code in ((["doctor"], 3), (cutover, 4)):  # both say all that they find
        said = project.run(*words)
        assert (said.exit_code, detail in said.stdout + said.stderr) == (exit_code, True), said
    assert (project.flag_path.read_bytes(), audited(project)) == (stood, rows)
    assert project.run("rollback", "--json", *REASON).document["phase_after"] == "dual_write", "the phase is enough"


@pytest.mark.parametrize(
    ("operator", "value", "said", "mend"),
    [
        ("WHAT", "x", "asks for role WHAT 'x', which holds for nobody: Flagsmith knows no operator WHAT", "EQUAL, "),
        ("Equals", "x", "Flagsmith knows no operator Equals", "the operator can be EQUAL"),
        ("PERCENTAGE_SPLIT", "abc", "holds for nobody: Flagsmith cannot read that value", "a number from 0 to 100"),
        ("PERCENTAGE_SPLIT", "25%", "holds for nobody", "a number from 0 to 100"),
        ("PERCENTAGE_SPLIT", "-1", "holds for nobody", "a number from 0 to 100"),
        ("MODULO", "x|y", "role MODULO 'x|y', which holds for nobody", "divisor|remainder"),
        ("MODULO", "2", "holds for nobody", "divisor|remainder"),
    ],
)
def test_a_condition_that_holds_for_nobody_is_named_and_stays_in_force(
    bare: Project, operator: str, value: str, said: str, mend: str
) -> None:
    put(bare, asking(operator, value))
    found = bare.run("flags", "check", "--json")
    (doubt,) = found.document["error"]["fields"]["reasons"]
    assert (found.exit_code, found.document["error"]["code"]) == (4, "precondition")
    assert (said in doubt["what"], mend in doubt["mend"]) == (True, True), doubt
    assert not bare.flags.document().decide("7", {"role": "x"}).dual_write
    bare.run("flags", "set", DUAL_WRITE, "on", "--everyone", "--no-audit", *REASON)
    assert bare.flags.document().decide("7", {"role": "x"}).dual_write


def test_conditions_that_hold_for_somebody_and_segments_of_other_flags_pass(bare: Project) -> None:
    good = [("PERCENTAGE_SPLIT", "12.5"), ("MODULO", "2|0"), ("REGEX", "^vip$"), ("IN", "a,b"), ("IS_SET", None)]
    ours = [segment(n, op, "role", value, [state(DUAL_WRITE, True, n)]) for n, (op, value) in enumerate(good)]
    others = [segment(n, "WHAT", "plan", "x", states) for n, states in ((8, []), (9, [state("checkout", True, 1)]))]
    put(bare, document(segments=ours + others, names=(*ALL_FLAGS, "checkout")))
    assert bare.run("flags", "check").exit_code == 0


@pytest.mark.parametrize(
    "name", ["wallet.dualwrite", "wallet.dual_write", "wallet.dualWrites", "wallet.dualWirte", "walet.dualWrite"]
)
def test_a_misspelt_flag_beside_the_right_one_is_named(bare: Project, name: str) -> None:
    content = document(name, names=(*ALL_FLAGS, name))
    said = f"{name} stands beside {DUAL_WRITE}, and nothing asks for it: names must be spelt exactly so."
    put(bare, content)
    assert told(bare) == [said]
    assert said in bare.run("flags", "list").stderr
    content["feature_states"].pop()
    put(bare, {**content, "identity_overrides": [identity("7", state(name, True))]})
    assert told(bare) == [said]


def test_flags_of_the_applications_own_are_no_misspelt_ones(bare: Project) -> None:
    own = (
        "wallet.dualWriteV2",
        "wallet.dualWrite2",
        "wallet.dualRead",
        "wallet.enableDeposits",
        "wallet.readFromCache",
    )
    put(bare, document(*own, names=(*ALL_FLAGS, *own, "wallet.readFromLedgerCache", "checkout")))
    assert bare.run("flags", "check").exit_code == 0
