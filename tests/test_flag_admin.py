"""Flags switched on a Flagsmith server: the same edits as in the file, wholly done or exactly told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flagsmith_stub
from flag_documents import body, document
from flagsmith_stub import ADMIN_KEY, ENVIRONMENT_KEY, FlagsmithStub
from walletmigrate.errors import (
    ConfigError,
    FlagChangeIncomplete,
    FlagDocumentInvalid,
    FlagServerRefused,
    FlagsMissing,
    FlagSourceUnreachable,
    UsageError,
)
from walletmigrate.flag_admin import FlagAdmin
from walletmigrate.flag_edits import FlagState, Override
from walletmigrate.flag_file import FlagFile
from walletmigrate.flags import (
    ALL_FLAGS,
    DUAL_WRITE,
    ENABLE_WITHDRAWALS,
    READ_FROM_LEDGER,
    Decision,
    Document,
    read_document,
)

TIMEOUT = 0.4
"""Seconds that a call waits for the server here; only calls that hang wait so long."""


@pytest.fixture
def flagsmith() -> Iterator[FlagsmithStub]:
    with flagsmith_stub.running() as server:
        yield server


@pytest.fixture
def admin(flagsmith: FlagsmithStub) -> FlagAdmin:
    return FlagAdmin(flagsmith.api_url, ENVIRONMENT_KEY, ADMIN_KEY, 5.0)


def impatient(flagsmith: FlagsmithStub) -> FlagAdmin:
    return FlagAdmin(flagsmith.api_url, ENVIRONMENT_KEY, ADMIN_KEY, TIMEOUT)


def decided(flagsmith: FlagsmithStub, account: str = "42", **traits: str) -> Decision:
    """What processes decide by the document that the server gives them."""
    content = read_document(body(flagsmith.document()), "the stub")
    return Document(content, "the stub", lambda _: None).decide(account, traits)


def state_of(admin: FlagAdmin, flag: str) -> FlagState:
    return next(state for state in admin.list() if state.flag == flag)


def overrides_of(flagsmith: FlagsmithStub, flag: str) -> dict[str, bool]:
    """The flag's overrides on the server, the first to be heard first."""
    project = flagsmith.project
    found = sorted(project.overrides.get(flagsmith.flag(flag), {}).items(), key=lambda one: one[1]["priority"])
    return {project.segments[number]["name"]: one["enabled"] for number, one in found}


# What an edit comes to


def test_a_flag_set_for_everyone_is_one_call_and_on_for_everyone(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    done = admin.set(DUAL_WRITE, True, everyone=True)
    assert (done.changed, done.before.default, done.after.default) == (True, False, True)
    assert [method for method, _ in flagsmith.writes] == ["PATCH"]
    assert decided(flagsmith) == Decision(dual_write=True)


def test_a_cohort_is_one_segment_that_all_flags_share(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    for flag in ALL_FLAGS:
        admin.set(flag, True, trait=("tenant", "acme"))
    assert [segment["name"] for segment in flagsmith.project.segments.values()] == ["tenant-acme"]
    assert decided(flagsmith, tenant="acme") == Decision(True, True, True)
    assert decided(flagsmith, tenant="globex") == Decision()


def test_a_cohort_is_switched_without_the_classic_call_that_answers_500(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    admin.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    assert overrides_of(flagsmith, DUAL_WRITE) == {"tenant-acme": False}
    assert not [path for _, path in flagsmith.calls if path.startswith("/api/v1/environments/")]


def test_a_segment_that_no_flag_of_the_environment_uses_is_found_and_shared(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    flagsmith.add_segment("our-first-customer", "EQUAL", "tenant", "acme")
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    assert overrides_of(flagsmith, DUAL_WRITE) == {"our-first-customer": True}


def test_segments_beyond_the_first_page_are_found_without_following_the_servers_address(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    for number in range(205):
        flagsmith.add_segment(f"plan-{number}", "EQUAL", "plan", str(number))
    admin.set(DUAL_WRITE, True, trait=("plan", "204"))
    assert len(flagsmith.project.segments) == 205
    assert overrides_of(flagsmith, DUAL_WRITE) == {"plan-204": True}


def test_a_segment_is_switched_by_its_name_whatever_its_rules(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    flagsmith.add_segment("old customers", "GREATER_THAN", "age", "5")
    admin.set(DUAL_WRITE, True, segment="old customers")
    assert decided(flagsmith, age="7").dual_write
    assert not decided(flagsmith, age="3").dual_write
    with pytest.raises(UsageError, match=r"no segment is named 'old' \(there are: old customers\)"):
        admin.set(DUAL_WRITE, True, segment="old")
    admin.remove(DUAL_WRITE, segment="old customers")
    assert overrides_of(flagsmith, DUAL_WRITE) == {}


def test_off_wins_over_on_among_cohorts_and_both_over_the_percentage(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, True, percent=100)
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    admin.set(DUAL_WRITE, False, trait=("role", "vip"))
    admin.set(DUAL_WRITE, True, trait=("tenant", "globex"))
    assert list(overrides_of(flagsmith, DUAL_WRITE).values()) == [False, True, True, True]
    assert not decided(flagsmith, tenant="acme", role="vip").dual_write
    admin.set(DUAL_WRITE, True, trait=("role", "vip"))
    admin.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    assert not decided(flagsmith, tenant="acme", role="vip").dual_write
    assert decided(flagsmith, tenant="globex", role="vip").dual_write
    assert list(overrides_of(flagsmith, DUAL_WRITE))[-1] == "percent-of-accounts-dev"


def test_overrides_made_in_the_dashboard_keep_their_order(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    for place, name in enumerate(("b", "a", "c")):
        flagsmith.override(DUAL_WRITE, flagsmith.add_segment(name, "EQUAL", name, "1"), True, 10 * place)
    admin.set(DUAL_WRITE, False, trait=("tenant", "acme"))
    assert list(overrides_of(flagsmith, DUAL_WRITE)) == ["tenant-acme", "b", "a", "c"]


def test_raising_the_percentage_moves_the_one_segment_of_all_flags(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    admin.set(DUAL_WRITE, True, percent=25)
    admin.set(READ_FROM_LEDGER, True, percent=25)
    inside = {str(key) for key in range(300) if decided(flagsmith, str(key)).read_from_ledger}
    done = admin.set(READ_FROM_LEDGER, True, percent=60)
    assert done.also == (DUAL_WRITE,)
    more = {str(key) for key in range(300) if decided(flagsmith, str(key)) == Decision(True, True)}
    assert inside < more
    assert len(flagsmith.project.segments) == 1


def test_the_percentage_of_another_environment_of_the_project_is_left_alone(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    other = flagsmith.add_segment("percent-of-accounts-prod", "PERCENTAGE_SPLIT", "$.identity.identifier", "5")
    admin.set(DUAL_WRITE, True, percent=50)
    admin.set(DUAL_WRITE, True, percent=75)
    assert flagsmith.project.segments[other]["rules"][0]["rules"][0]["conditions"][0]["value"] == "5"
    assert overrides_of(flagsmith, DUAL_WRITE) == {"percent-of-accounts-dev": True}


def test_a_percentage_that_was_ended_and_set_again_picks_the_same_accounts(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, True, percent=30)
    inside = [decided(flagsmith, str(key)).dual_write for key in range(200)]
    admin.remove(DUAL_WRITE, percent=True)
    admin.set(DUAL_WRITE, True, percent=30)
    assert [decided(flagsmith, str(key)).dual_write for key in range(200)] == inside


@pytest.mark.parametrize("account", ["7", "wallet-42", 'a "quoted" one', "a/b?c&d", "ä"])
def test_an_account_is_overridden_by_its_key_and_its_override_ended(
    flagsmith: FlagsmithStub, admin: FlagAdmin, account: str
) -> None:
    admin.set(DUAL_WRITE, True, account=account)
    assert decided(flagsmith, account).dual_write
    assert not decided(flagsmith, account + "1").dual_write
    admin.set(READ_FROM_LEDGER, True, account=account)
    admin.set(DUAL_WRITE, False, account=account)
    assert decided(flagsmith, account) == Decision()
    admin.remove(DUAL_WRITE, account=account)
    assert [one["feature"] for one in flagsmith.project.states.values()] == [flagsmith.flag(READ_FROM_LEDGER)]


def test_off_for_everyone_leaves_nobody_on_and_keeps_who_was_switched_off(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, True, everyone=True)
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    admin.set(DUAL_WRITE, False, trait=("role", "vip"))
    admin.set(DUAL_WRITE, True, percent=50)
    admin.set(DUAL_WRITE, True, account="7")
    admin.set(DUAL_WRITE, False, everyone=True)
    assert overrides_of(flagsmith, DUAL_WRITE) == {"role-vip": False}
    assert not flagsmith.project.states
    assert not any(decided(flagsmith, str(key), tenant="acme").dual_write for key in range(50))


@pytest.mark.parametrize(
    "way",
    [{"everyone": True}, {"trait": ("tenant", "acme")}, {"percent": 40}, {"account": "7"}],
    ids=["everyone", "trait", "percent", "account"],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_same_edit_again_changes_nothing_and_a_dry_run_writes_nothing(
    flagsmith: FlagsmithStub, admin: FlagAdmin, way: dict[str, Any], enabled: bool
) -> None:
    planned = admin.set(DUAL_WRITE, enabled, **way, dry_run=True)
    assert flagsmith.writes == []
    done = admin.set(DUAL_WRITE, enabled, **way)
    assert planned == done
    written = len(flagsmith.writes)
    again = admin.set(DUAL_WRITE, enabled, **way)
    assert not again.changed
    assert len(flagsmith.writes) == written


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(ALL_FLAGS[:2]),
            st.sampled_from([True, False, None]),
            st.sampled_from(
                [
                    {"everyone": True},
                    {"trait": ("tenant", "acme")},
                    {"trait": ("role", "vip")},
                    {"percent": 100},
                    {"account": "7"},
                ]
            ),
        ),
        max_size=7,
    )
)
def test_any_edits_mean_the_same_on_the_server_as_in_the_file(tmp_path: Path, edits: list[Any]) -> None:
    path = tmp_path / "environment.json"
    path.write_bytes(body(document()))
    file = FlagFile(path)
    with flagsmith_stub.running() as flagsmith:
        admin = FlagAdmin(flagsmith.api_url, ENVIRONMENT_KEY, ADMIN_KEY)
        for flag, enabled, who in edits:
            for editor in (file, admin):
                if enabled is None and "everyone" not in who:
                    ended: dict[str, Any] = {**who, "percent": True} if "percent" in who else who
                    editor.remove(flag, **ended)
                elif enabled is not None:
                    editor.set(flag, enabled, **who)
        for account in ("7", "8"):
            for traits in ({}, {"tenant": "acme"}, {"role": "vip"}, {"tenant": "acme", "role": "vip"}):
                assert decided(flagsmith, account, **traits) == file.document().decide(account, traits)


# Refusals: nothing was done


@pytest.mark.parametrize(
    ("key", "admin_key", "status", "told"),
    [
        (ENVIRONMENT_KEY, "wrong", 401, "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY"),
        ("ser.wrong", ADMIN_KEY, 403, "WALLETMIGRATE_FLAGSMITH_KEY"),
    ],
)
def test_a_wrong_key_is_refused_says_which_and_shows_none(
    flagsmith: FlagsmithStub, key: str, admin_key: str, status: int, told: str
) -> None:
    with pytest.raises(FlagServerRefused) as refused:
        FlagAdmin(flagsmith.api_url, key, admin_key).set(DUAL_WRITE, True, everyone=True)
    assert (refused.value.status, refused.value.exit_code) == (status, 4)
    assert told in str(refused.value)
    assert "wrong" not in str(refused.value)
    assert flagsmith.writes == []


@pytest.mark.parametrize("status", [403, 409])
@pytest.mark.parametrize(
    "way", [{"everyone": True}, {"trait": ("tenant", "acme")}, {"percent": 100}, {"account": "7"}], ids=str
)
def test_change_requests_are_told_and_leave_every_flag_as_it_was(
    flagsmith: FlagsmithStub, admin: FlagAdmin, way: dict[str, Any], status: int
) -> None:
    flagsmith.project.change_requests = status
    with pytest.raises(FlagServerRefused, match="change requests are on") as refused:
        admin.set(DUAL_WRITE, True, **way)
    assert refused.value.status == status
    assert decided(flagsmith, "7", tenant="acme") == Decision()


def test_a_flag_that_the_server_spells_otherwise_is_named_with_the_right_spelling(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    flagsmith.project.features[31] = "wallet.dualwrite"
    flagsmith.project.features[32] = "wallet.readFromLedgr"
    with pytest.raises(FlagsMissing) as missing:
        admin.set(ENABLE_WITHDRAWALS, True, everyone=True)
    assert list(missing.value.missing) == [DUAL_WRITE, READ_FROM_LEDGER]
    assert list(missing.value.near) == [("wallet.dualwrite", DUAL_WRITE), ("wallet.readFromLedgr", READ_FROM_LEDGER)]
    assert flagsmith.writes == []


def test_a_server_that_is_down_or_answers_500_is_unreachable() -> None:
    with flagsmith_stub.running() as flagsmith:
        admin, url = FlagAdmin(flagsmith.api_url, ENVIRONMENT_KEY, ADMIN_KEY), flagsmith.api_url
        flagsmith.fail("GET", "segments", status=500)
        with pytest.raises(FlagSourceUnreachable, match="answered 500"):
            admin.set(DUAL_WRITE, True, everyone=True)
    flagsmith.server_close()
    with pytest.raises(FlagSourceUnreachable, match="the connection failed") as down:
        admin.set(DUAL_WRITE, True, everyone=True)
    assert url in str(down.value)


def test_a_server_that_hangs_is_given_up(flagsmith: FlagsmithStub) -> None:
    flagsmith.fail("GET", "features", hang=True)
    with pytest.raises(FlagSourceUnreachable, match=f"no answer within {TIMEOUT:g} s"):
        impatient(flagsmith).set(DUAL_WRITE, True, everyone=True)
    assert flagsmith.writes == []


def test_an_admin_api_that_answers_otherwise_is_said_to(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    flagsmith.fail("GET", "features", status=200, times=1)
    with pytest.raises(
        FlagDocumentInvalid, match=r"answers otherwise than known \(KeyError\('environment_default'\)\)"
    ):
        admin.read()
    flagsmith.fail("GET", "segments", status=200, times=1)
    with pytest.raises(FlagServerRefused, match="has no 'results'"):
        admin.read()
    flagsmith.fail("GET", "features", status=404)
    with pytest.raises(FlagServerRefused, match="too old"):
        admin.read()


def test_an_address_that_is_no_admin_api_is_refused() -> None:
    with pytest.raises(ConfigError, match="/api/v1/"):
        FlagAdmin("http://127.0.0.1:1/", ENVIRONMENT_KEY, ADMIN_KEY)


def test_validate_says_what_is_wrong_and_raises_nothing(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    assert admin.validate() == ()
    admin.set(READ_FROM_LEDGER, True, everyone=True)
    assert "counts as off" in admin.validate()[0]
    flagsmith.fail("GET", "segments", status=401)
    assert "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY" in admin.validate()[0]


# Changes of several calls


def test_a_cohort_whose_segment_was_made_and_not_switched_is_as_it_was_and_the_next_try_uses_it(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    flagsmith.fail("PATCH", "features", status=403, times=1)
    with pytest.raises(FlagServerRefused):
        admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    assert decided(flagsmith, tenant="acme") == Decision()
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    assert len(flagsmith.project.segments) == 1
    assert decided(flagsmith, tenant="acme").dual_write


def test_a_percentage_that_was_moved_is_moved_back_when_the_flag_is_refused(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, False, percent=20)
    flagsmith.fail("PATCH", "features", status=409)
    with pytest.raises(FlagServerRefused) as refused:
        admin.set(DUAL_WRITE, True, percent=60)
    assert refused.value.__notes__ == ["what was done before that was undone"]
    assert state_of(impatient(flagsmith), DUAL_WRITE).overrides == (
        Override("percent-of-accounts-dev", "percent", "20", False),
    )


def test_a_percentage_that_cannot_be_moved_back_is_told_as_done(flagsmith: FlagsmithStub, admin: FlagAdmin) -> None:
    admin.set(DUAL_WRITE, False, percent=20)
    flagsmith.fail("PATCH", "features", status=409)
    flagsmith.fail("PUT", "segments", status=403, after=1)
    with pytest.raises(FlagChangeIncomplete) as incomplete:
        admin.set(DUAL_WRITE, True, percent=60)
    error = incomplete.value
    assert error.done == ["move segment percent-of-accounts-dev from 20 to 60 percent"]
    assert [what for what, _ in error.left] == [f"switch {DUAL_WRITE} on for percent-of-accounts-dev"]
    assert "undoing it failed, too" in error.__notes__[0]


def test_an_override_that_is_gone_already_is_no_error_and_one_that_a_server_cannot_end_is(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    flagsmith.fail("DELETE", "segment-overrides", status=404, times=1)
    with pytest.raises(FlagServerRefused, match="too old"):
        admin.remove(DUAL_WRITE, trait=("tenant", "acme"))
    flagsmith.fail("DELETE", "segment-overrides", status=404, done=True, times=1)
    assert admin.remove(DUAL_WRITE, trait=("tenant", "acme")).changed
    assert overrides_of(flagsmith, DUAL_WRITE) == {}


@pytest.mark.parametrize("status", [500, 403])
def test_off_for_everyone_that_stops_in_the_midst_is_off_already_and_says_what_is_left(
    flagsmith: FlagsmithStub, admin: FlagAdmin, status: int
) -> None:
    admin.set(DUAL_WRITE, True, everyone=True)
    admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    admin.set(DUAL_WRITE, True, account="7")
    flagsmith.fail("DELETE", "segment-overrides", status=status)
    with pytest.raises(FlagChangeIncomplete) as incomplete:
        admin.set(DUAL_WRITE, False, everyone=True)
    error = incomplete.value
    assert error.exit_code == 1
    assert not any(decided(flagsmith, key, tenant="acme").dual_write for key in ("7", "8"))
    assert error.done == [
        f"switch {DUAL_WRITE} off for everyone, off for tenant-acme",
        f"end the override of {DUAL_WRITE} for account 7",
    ]
    mend = f"walletmigrate flags set {DUAL_WRITE} remove --cohort tenant-acme --reason '…'"
    assert error.left == [(f"end the override of {DUAL_WRITE} for tenant-acme", mend)]
    assert mend in str(error)
    flagsmith.faults.clear()
    admin.remove(DUAL_WRITE, segment="tenant-acme")
    assert overrides_of(flagsmith, DUAL_WRITE) == {}


@pytest.mark.parametrize("way", [{"everyone": True}, {"trait": ("tenant", "acme")}, {"account": "7"}])
@pytest.mark.parametrize("lost", [{"status": 500}, {"status": 0}, {"hang": True}], ids=["500", "cut off", "hangs"])
def test_a_change_whose_answer_was_lost_is_looked_at_again_and_found_done(
    flagsmith: FlagsmithStub, way: dict[str, Any], lost: dict[str, Any]
) -> None:
    path = "featurestates" if "account" in way else "features"
    flagsmith.fail("POST" if "account" in way else "PATCH", path, done=True, times=1, **lost)
    assert impatient(flagsmith).set(DUAL_WRITE, True, **way).changed
    assert decided(flagsmith, "7", tenant="acme").dual_write


def test_a_change_that_was_not_carried_out_is_told_to_be_as_it_was(flagsmith: FlagsmithStub) -> None:
    flagsmith.fail("PATCH", "features", times=1)
    with pytest.raises(FlagSourceUnreachable) as unreachable:
        impatient(flagsmith).set(DUAL_WRITE, True, everyone=True)
    assert "nothing was changed" in unreachable.value.__notes__[0]
    assert not isinstance(unreachable.value, FlagChangeIncomplete)


def test_an_answer_of_another_shape_in_the_midst_is_an_error_of_the_library(
    flagsmith: FlagsmithStub, admin: FlagAdmin
) -> None:
    flagsmith.fail("POST", "segments", status=200)
    with pytest.raises(FlagSourceUnreachable, match=r"answered otherwise than known \(KeyError\('id'\)\)"):
        admin.set(DUAL_WRITE, True, trait=("tenant", "acme"))
    assert overrides_of(flagsmith, DUAL_WRITE) == {}


def test_a_change_of_which_nobody_knows_whether_it_was_carried_out_is_told_so(flagsmith: FlagsmithStub) -> None:
    flagsmith.fail("GET", "environment-document", status=503, after=1)
    flagsmith.fail("PATCH", "features", done=True, times=1)
    with pytest.raises(FlagChangeIncomplete) as incomplete:
        impatient(flagsmith).set(DUAL_WRITE, True, everyone=True)
    assert incomplete.value.done == []
    assert incomplete.value.left == [(f"switch {DUAL_WRITE} on for everyone", "run the same command again")]
    assert "not known to be" in str(incomplete.value)
