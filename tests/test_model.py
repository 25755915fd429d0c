"""The model of the protocol (see model/README.md), its reduced set.

Every reachable state holds the invariants, and once a guard is taken away some state does not.
"""

from __future__ import annotations

import dataclasses

import pytest

from model.configurations import QUICK, configuration
from model.crowds import ANY, MIRRORED, raw, writer
from model.explore import Configuration, Result, explore
from model.mutants import MUTANTS, Mutant
from model.protocol import Guards, Rules

HAPPENED = (
    "opens the account: mirrored",
    "opens the account: frozen",
    "writes the account: stale",
    "writes the account: frozen",
    "writes the account: closed",
    "finds key k used",
    "key k was used since its snapshot: cannot serialize",
    "the legacy row changed since its snapshot: cannot serialize",
    "the account changed since its snapshot: cannot serialize",
    "the account was opened since its snapshot: cannot serialize",
    "probes for an account",
    "finds the legacy row deleted",
    "the legacy row is there already",
    "takes its subtransaction back",
    "the ledger leg fails: True",
    "sees the line stopped",
    "stops the line",
    "moves the phase to frozen",
    "sees the line run, the phase frozen",
    "error: the column is frozen",
    "error: the fence rejects",
    "the fence's mode: stale",
    "the fence's mode: mirror",
    "the fence's mode: reject",
    "writes the account: mirrored 0",
    "writes the account: closed 0",
    "is rolled back",
    "answers none",
)
"""What an exploration that found nothing must at least have met."""


@pytest.fixture(scope="module")
def explored() -> dict[str, Result]:
    return {name: explore(configuration(name)) for name in QUICK}


@pytest.mark.parametrize("name", QUICK)
def test_every_reachable_state_of_the_protocol_holds_the_invariants(explored: dict[str, Result], name: str) -> None:
    result = explored[name]
    assert result.broken is None, "\n".join([*result.trace, result.broken])
    assert result.states > 1000


@pytest.mark.parametrize("words", HAPPENED)
def test_the_exploration_meets_every_kind_of_event(explored: dict[str, Result], words: str) -> None:
    assert any(event.startswith(words) for result in explored.values() for event in result.events)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutated_protocol_is_caught_unless_its_guard_stands_twice(mutant: Mutant) -> None:
    result = mutant.hunt()
    if mutant.breaks is None:
        assert result.broken is None, "\n".join([*result.trace, result.broken])
    else:
        assert result.broken is not None
        assert result.broken.startswith(mutant.breaks)
        assert result.trace[0].startswith("At first: ")
        assert len(result.trace) > 1


def test_every_guard_has_its_mutant() -> None:
    assert sorted(mutant.guard for mutant in MUTANTS) == sorted(each.name for each in dataclasses.fields(Guards))


def test_a_guard_that_stands_twice_is_missed_once_both_are_gone() -> None:
    rules = Rules(dataclasses.replace(Guards(), adapter_marks_stale=False, fence=False))
    result = explore(Configuration("no mark, no fence", (writer(rules, "writer"),), ANY))
    assert result.broken == "invariant 1: mirrored at 10, but legacy is 11"


def test_a_trace_tells_in_words_the_shortest_way_to_what_broke() -> None:
    rules = Rules(dataclasses.replace(Guards(), fence=False))
    crowd = (raw(rules, levels=(False,), what=("update",)), writer(rules, "A"), writer(rules, "B"))
    result = explore(Configuration("no fence", crowd, (MIRRORED,)))
    assert result.trace == (
        "At first: legacy 10, account mirrored 10.",
        "raw SQL: begins: update (read committed); begins a statement on the legacy row.",
        "raw SQL: locks the legacy row at 10; writes legacy: 14.",
        "raw SQL: commits.",
    )
    assert result.broken == "invariant 1: mirrored at 10, but legacy is 14"


def test_writers_that_are_alike_are_not_told_apart_and_nothing_is_lost_by_it(explored: dict[str, Result]) -> None:
    alike, apart = (
        explored["two writers with one key"],
        explore(configuration("two writers with one key"), symmetry=False),
    )
    assert (alike.broken, alike.events, alike.depth) == (None, apart.events, apart.depth)
    assert alike.states < 0.6 * apart.states
