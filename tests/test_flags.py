"""Decisions: what a document wants of an account, how fast it is remembered, and what a bad one cannot do."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from flagsmith import Flagsmith
from flagsmith.offline_handlers import LocalFileHandler
from hypothesis import given, settings
from hypothesis import strategies as st

import flag_documents
import walletmigrate.flags
from flag_documents import body, document, identity, segment, state, tenant
from walletmigrate.errors import FlagDocumentInvalid, FlagsMissing, UsageError
from walletmigrate.flags import (
    ALL_FLAGS,
    DUAL_WRITE,
    ENABLE_WITHDRAWALS,
    OFF,
    READ_FROM_LEDGER,
    Decision,
    Document,
    FlagNotice,
    Json,
    StaticSource,
    missing_flags,
    read_document,
)

SHIPPED = Path(__file__).parent.parent / "flags" / "environment.json"
ON = Decision(True, True, True)


def made(content: Json, notices: list[FlagNotice] | None = None) -> Document:
    told: list[FlagNotice] = [] if notices is None else notices
    return Document(content, "test", told.append)


def test_the_shipped_document_knows_all_flags_and_has_them_off_for_everyone() -> None:
    content = read_document(SHIPPED.read_bytes(), "shipped")
    shipped = made(content)
    assert missing_flags(content) == ()
    assert content["project"]["segments"] == []
    assert shipped.decide("42", {"tenant": "acme"}) == OFF
    assert not shipped.needs_traits


def test_the_shipped_document_is_read_by_flagsmiths_own_file_handler() -> None:
    client = Flagsmith(offline_mode=True, offline_handler=LocalFileHandler(str(SHIPPED)))
    flags = client.get_identity_flags("42", {"tenant": "acme"})
    assert {name: flags.is_feature_enabled(name) for name in ALL_FLAGS} == dict.fromkeys(ALL_FLAGS, False)


def test_a_trait_switches_a_cohort_and_a_missing_trait_falls_to_the_default() -> None:
    found = made(document(segments=[tenant(1, "acme", *ALL_FLAGS)]))
    assert found.decide("42", {"tenant": "acme"}) == ON
    assert found.decide("42", {"tenant": "globex"}) == OFF
    assert found.decide("42", {}) == OFF
    assert found.needs_traits


def test_an_account_of_its_own_wins_over_its_cohort() -> None:
    own = identity("42", state(ENABLE_WITHDRAWALS, False))
    found = made(document(segments=[tenant(1, "acme", *ALL_FLAGS)], identities=[own]))
    assert found.decide("42", {"tenant": "acme"}) == Decision(True, True, False)
    assert found.decide("43", {"tenant": "acme"}) == ON


def test_a_shared_percentage_picks_the_same_accounts_for_all_flags_and_keeps_them_when_raised() -> None:
    def chosen(percent: int) -> set[str]:
        states = [state(flag, True, 0) for flag in ALL_FLAGS]
        split = segment(12, "PERCENTAGE_SPLIT", "$.identity.identifier", str(percent), states)
        found = made(document(segments=[split]))
        decisions = {str(key): found.decide(str(key), {}) for key in range(2000)}
        assert set(decisions.values()) == {ON, OFF}
        return {key for key, decision in decisions.items() if decision == ON}

    quarter, half = chosen(25), chosen(50)
    assert quarter < half
    assert 400 < len(quarter) < 600
    assert 900 < len(half) < 1100


def test_a_percentage_of_a_trait_takes_tenants_whole() -> None:
    split = segment(12, "PERCENTAGE_SPLIT", "tenant", "50", [state(DUAL_WRITE, True, 0)])
    found = made(document(segments=[split]))
    decisions = {name: {found.decide(str(n), {"tenant": name}) for n in range(20)} for name in "abcdefghijkl"}
    assert all(len(each) == 1 for each in decisions.values())
    assert len(set.union(*decisions.values())) == 2
    assert found.memoised == 12


def test_reading_without_writing_counts_as_off_and_is_told_once_per_document() -> None:
    notices: list[FlagNotice] = []
    found = made(document(READ_FROM_LEDGER, ENABLE_WITHDRAWALS, segments=[tenant(1, "a", DUAL_WRITE)]), notices)
    barrier = threading.Barrier(8)

    def ask(number: int) -> None:
        barrier.wait()
        for key in range(50):
            traits = {"tenant": f"{number}-{key}"}
            assert found.decide("42", traits) == Decision(False, False, True)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [notice.kind for notice in notices] == ["read_without_dual_write"]
    assert notices[0].document_id == found.id
    assert found.decide("42", {"tenant": "a"}) == ON
    made(document(READ_FROM_LEDGER), notices).decide("42", {})
    assert len(notices) == 2


def test_a_report_that_raises_does_not_reach_the_caller() -> None:
    def broken(notice: FlagNotice) -> None:
        raise RuntimeError(notice.detail)

    assert Document(document(READ_FROM_LEDGER), "test", broken).decide("42", {}) == OFF


def test_without_a_report_a_notice_is_one_logged_warning(caplog: pytest.LogCaptureFixture) -> None:
    found = Document(document(READ_FROM_LEDGER), "test")
    for key in range(3):
        found.decide(str(key), {})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert READ_FROM_LEDGER in caplog.text


@pytest.mark.parametrize("missing", ALL_FLAGS)
def test_a_document_must_know_each_flag_spelt_exactly_so(missing: str) -> None:
    names = [name.lower() if name == missing else name for name in ALL_FLAGS]
    content = document(names=names)
    assert missing_flags(content) == (missing,)
    with pytest.raises(FlagsMissing, match=f"has {missing.lower()}, which must be spelt {missing}") as caught:
        read_document(body(content), "test")
    assert caught.value.missing == (missing,)


def test_an_empty_document_lacks_all_three() -> None:
    assert missing_flags(document(names=())) == ALL_FLAGS


@pytest.mark.parametrize(
    ("segments", "identities", "needed"),
    [
        ([], [], False),
        ([tenant(1, "acme", DUAL_WRITE)], [], True),
        ([tenant(1, "acme")], [], False),
        ([tenant(1, "acme", "something.else")], [], False),
        ([segment(1, "PERCENTAGE_SPLIT", "", "50", [state(DUAL_WRITE, True, 0)])], [], False),
        ([segment(1, "PERCENTAGE_SPLIT", "tenant", "50", [state(DUAL_WRITE, True, 0)])], [], True),
        ([segment(1, "EQUAL", "$.environment.name", "test", [state(DUAL_WRITE, True, 0)])], [], False),
        ([segment(1, "EQUAL", "$.identity.traits.tenant", "a", [state(DUAL_WRITE, True, 0)])], [], True),
        ([], [identity("42", state(DUAL_WRITE, True))], False),
    ],
)
def test_traits_are_needed_only_where_they_can_change_a_flag_of_ours(
    segments: list[Json], identities: list[Json], needed: bool
) -> None:
    assert made(document(segments=segments, identities=identities)).needs_traits is needed


def test_accounts_that_nothing_tells_apart_share_one_remembered_decision() -> None:
    own = identity("7", state(DUAL_WRITE, False))
    found = made(document(segments=[tenant(1, "acme", DUAL_WRITE)], identities=[own]))
    for key in range(1000):
        wanted = found.decide(str(key), {"tenant": "acme", "role": f"role {key}"})
        assert wanted.dual_write is (key != 7)
    assert found.memoised == 2


def test_an_account_whose_key_is_the_empty_text_is_nobody_elses_stand_in() -> None:
    found = made(document(identities=[identity("", state(DUAL_WRITE, True))]))
    assert not found.decide("42", {}).dual_write
    assert found.decide("", {}).dual_write


def test_the_memory_is_bounded_and_what_was_forgotten_is_decided_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walletmigrate.flags, "MEMO_SIZE", 10)
    found = made(document(segments=[tenant(1, "t3", DUAL_WRITE)]))
    for _ in range(2):
        wanted = [found.decide("42", {"tenant": f"t{number}"}).dual_write for number in range(100)]
        assert wanted == [number == 3 for number in range(100)]
        assert found.memoised == 10


def test_equal_values_of_different_types_are_remembered_apart() -> None:
    found = made(document(segments=[segment(1, "EQUAL", "vip", "true", [state(DUAL_WRITE, True, 0)])]))
    assert [found.decide("42", {"vip": value}).dual_write for value in (1, True, "true", 1, True)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_a_trait_that_cannot_be_hashed_is_decided_without_memory() -> None:
    found = made(document(DUAL_WRITE, segments=[tenant(1, "acme", READ_FROM_LEDGER)]))
    odd: Any = {"tenant": ["acme"]}
    assert found.decide("42", odd) == Decision(True, False, False)
    assert found.memoised == 0


def test_a_condition_on_anything_else_is_evaluated_each_time() -> None:
    states = [state(DUAL_WRITE, True, 0)]
    found = made(document(segments=[segment(1, "EQUAL", "$.identity.traits.tenant", "acme", states)]))
    assert found.decide("42", {"tenant": "acme"}).dual_write
    assert not found.decide("42", {"tenant": "globex"}).dual_write
    assert found.memoised == 0


def test_what_the_engine_cannot_evaluate_counts_as_off_and_is_told_once() -> None:
    notices: list[FlagNotice] = []
    found = made(document(segments=[segment(1, "MODULO", "age", "2|0", [state(DUAL_WRITE, True, 0)])]), notices)
    assert found.decide("42", {"age": 4}).dual_write
    beyond = [10**number for number in (400, 401, 402)]  # no float can hold them, and the engine divides by one
    assert {found.decide("42", {"age": age}) for age in beyond} == {OFF}
    assert [notice.kind for notice in notices] == ["evaluation_failed"]


@pytest.mark.parametrize(("operator", "value"), flag_documents.UNREADABLE, ids=flag_documents.named)
@pytest.mark.parametrize("path", ["plan", "$.identity.identifier"])
def test_a_condition_that_makes_the_engine_raise_is_refused_with_its_place(
    path: str, operator: str, value: object
) -> None:
    asked = segment(2, operator, path, value, [state(DUAL_WRITE, True, 0)])
    content = document(segments=[tenant(1, "acme", DUAL_WRITE), asked, tenant(3, "globex", READ_FROM_LEDGER)])
    with pytest.raises(FlagDocumentInvalid) as caught:
        made(read_document(body(content), "test"))
    place = (
        "project.segments[1].rules[0].rules[0].conditions[0] (segment segment-2): Flagsmith's engine cannot evaluate"
    )
    assert caught.value.detail.startswith(f"{place} {path} {operator} ")
    assert "; write " in caught.value.detail


def test_a_condition_is_tried_although_another_decides_before_it() -> None:
    asked = tenant(1, "acme", DUAL_WRITE)
    asked["rules"][0]["rules"][0]["conditions"].append({"operator": "REGEX", "property_": "plan", "value": "("})
    asked["rules"].append({"type": "NONE", "conditions": [{"operator": "IN", "property_": "role", "value": 5}]})
    with pytest.raises(FlagDocumentInvalid, match=r"rules\[0\]\.rules\[0\]\.conditions\[1\] .*plan REGEX '\('"):
        made(document(segments=[asked]))
    del asked["rules"][0]
    with pytest.raises(FlagDocumentInvalid, match=r"rules\[0\]\.conditions\[0\] .*role IN 5"):
        made(document(segments=[asked]))


@pytest.mark.parametrize("priority", ["x", "1", None, [1]])
def test_a_priority_that_is_no_number_is_refused(priority: object) -> None:
    ranked = tenant(7, "acme", READ_FROM_LEDGER)
    ranked["feature_states"][0]["feature_segment"] = {"priority": priority}
    with pytest.raises(FlagDocumentInvalid, match=r"priority \(segment segment-7\) is .*: write a number"):
        made(read_document(body(document(segments=[tenant(1, "a", DUAL_WRITE), ranked])), "test"))


@pytest.mark.parametrize(("number", "weight"), [(1, "50"), (1, None), ("x", 50)])
def test_a_share_of_a_variant_that_is_no_number_is_refused(number: object, weight: object) -> None:
    option = {"id": number, "percentage_allocation": weight, "multivariate_feature_option": {"value": "a"}}
    content = document(segments=[tenant(1, "acme", DUAL_WRITE)])
    for holder in (content, content["project"]["segments"][0]):
        holder["feature_states"][0]["multivariate_feature_state_values"] = [option]
        with pytest.raises(FlagDocumentInvalid, match=r"feature_states\[0\]\.multivariate_feature_state_values: write"):
            made(read_document(body(content), "test"))
        holder["feature_states"][0]["multivariate_feature_state_values"] = []


def test_what_the_engine_tolerates_or_never_asks_for_us_stays_in_force() -> None:
    odd = [("WHAT", "x"), ("PERCENTAGE_SPLIT", "abc"), ("MODULO", "x|y"), ("EQUAL", 5), ("IN", [1, "b"])]
    ours = [
        segment(n, operator, "plan", value, [state(DUAL_WRITE, True, 0)]) for n, (operator, value) in enumerate(odd)
    ]
    others = [segment(8, "REGEX", "plan", "(", [state("new.checkout", True, 0)]), segment(9, "IN", "plan", 5, [])]
    others[0]["feature_states"][0]["feature_segment"]["priority"] = "x"
    content = document(READ_FROM_LEDGER, segments=ours + others, names=(*ALL_FLAGS, "new.checkout"))
    notices: list[FlagNotice] = []
    found = made(read_document(body(content), "test"), notices)
    assert [found.decide("42", {"plan": plan}).dual_write for plan in ("pro", "b", 1, 5)] == [False, True, True, True]
    assert {notice.kind for notice in notices} == {"read_without_dual_write"}


def test_a_document_does_not_change_with_what_it_was_made_of_or_gave_away() -> None:
    cohort = tenant(1, "", DUAL_WRITE)
    condition = cohort["rules"][0]["rules"][0]["conditions"][0]
    condition.update(operator="IN", value=["acme"])  # a list, which Flagsmith's client does not copy
    content = document(segments=[cohort])
    found = made(content)
    for given_away in (content, found.content):
        given_away["feature_states"].clear()
        given_away["project"]["segments"][0]["feature_states"][0]["enabled"] = False
    condition["value"].clear()
    assert found.decide("42", {"tenant": "acme"}).dual_write


def test_equal_documents_have_one_id_and_others_another() -> None:
    content = document(DUAL_WRITE)
    turned = dict(reversed(content.items()))
    assert json.dumps(turned) != json.dumps(content)
    assert made(turned).id == made(content).id != made(document()).id


def _without(*path: str) -> bytes:
    content = document(segments=[tenant(1, "acme", DUAL_WRITE)])
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return body(content)


def _with_enabled(value: object, where: str) -> bytes:
    content = document(segments=[tenant(1, "acme", DUAL_WRITE)], identities=[identity("4", state(DUAL_WRITE, True))])
    places = {
        "default": content["feature_states"],
        "segment": content["project"]["segments"][0]["feature_states"],
        "identity": content["identity_overrides"][0]["identity_features"],
    }
    places[where][0]["enabled"] = value
    return body(content)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"<html>502 Bad Gateway</html>",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        body(document())[:-10],
        b"[" * 100_000,
        b'{"a":' * 100_000,
        _without("api_key"),
        _without("name"),
        _without("project"),
        _without("project", "segments"),
        _without("feature_states"),
        body({**document(), "feature_states": None}),
        body({**document(), "feature_states": [None]}),
        body({**document(), "feature_states": "wallet.dualWrite"}),
        body({**document(), "project": []}),
        body({**document(), "identity_overrides": [{"identifier": "42"}]}),
        _with_enabled("false", "default"),
        _with_enabled(1, "segment"),
        _with_enabled(None, "identity"),
    ],
    ids=range(23),
)
def test_garbage_is_refused_as_a_document(garbage: bytes) -> None:
    with pytest.raises(FlagDocumentInvalid):
        made(read_document(garbage, "test"))


_states = st.builds(state, st.sampled_from(ALL_FLAGS), st.booleans(), st.integers(0, 3))
_segments = st.one_of(
    st.builds(
        segment,
        st.just(0),
        st.sampled_from(["EQUAL", "NOT_EQUAL", "IN", "IS_SET", "IS_NOT_SET", "PERCENTAGE_SPLIT", "CONTAINS"]),
        st.sampled_from(["tenant", "role", "$.identity.identifier", "$.environment.name", ""]),
        st.sampled_from(["acme", "globex", "acme,1", "1", "50", "test"]),
        st.lists(_states, max_size=4),
    )
)
_identities = st.builds(
    identity, st.sampled_from(["1", "2", ""]), st.builds(state, st.sampled_from(ALL_FLAGS), st.booleans())
)
_traits = st.dictionaries(
    st.sampled_from(["tenant", "role", "other"]),
    st.one_of(st.sampled_from(["acme", "globex"]), st.integers(0, 1), st.booleans()),
)


@settings(deadline=None)
@given(
    on=st.sets(st.sampled_from(ALL_FLAGS)),
    segments=st.lists(_segments, max_size=4),
    identities=st.lists(_identities, max_size=2),
    asked=st.lists(st.tuples(st.sampled_from(["1", "2", "3", ""]), _traits), min_size=1, max_size=8),
)
def test_a_remembered_decision_is_what_flagsmiths_client_says_of_that_account(
    on: set[str], segments: list[Json], identities: list[Json], asked: list[tuple[str, dict[str, str | int]]]
) -> None:
    segments = [{**copy.deepcopy(each), "id": number} for number, each in enumerate(segments, 1)]
    content = document(*on, segments=segments, identities=identities)
    found = made(content)

    class Handler:
        def get_environment(self) -> Any:
            return content

    client = Flagsmith(offline_mode=True, offline_handler=Handler())
    for identifier, traits in asked * 2:
        flags = client.get_identity_flags(identifier, dict(traits))
        wanted = Decision(*(flags.is_feature_enabled(name) for name in ALL_FLAGS)).guarded
        assert found.decide(identifier, traits) == wanted


def test_a_static_source_says_what_it_was_told_for_everyone_and_can_be_switched() -> None:
    source = StaticSource({DUAL_WRITE: True})
    before = source.snapshot()
    assert before.decide("42", {}) == Decision(True, False, False)
    source.set(ON)
    assert source.snapshot().decide("42", {}) == ON
    assert before.decide("42", {}) == Decision(True, False, False)
    assert (before.age_seconds(), before.needs_traits) == (0.0, False)
    assert StaticSource().snapshot().decide("42", {}) == OFF


def test_a_static_source_guards_reads_too() -> None:
    assert StaticSource(Decision(read_from_ledger=True)).snapshot().decide("42", {}) == OFF
    assert StaticSource({READ_FROM_LEDGER: True}).snapshot().decide("42", {}) == OFF


def test_a_misspelt_flag_of_a_static_source_is_named_with_what_was_meant() -> None:
    with pytest.raises(UsageError, match=r"'wallet\.dualwrite'.*Did you mean wallet\.dualWrite\?"):
        StaticSource({"wallet.dualwrite": True})
