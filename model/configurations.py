"""The configurations that are explored, each from every state of an account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from model.crowds import ANY, line_stopper, operator, raw, reader, writer
from model.explore import Configuration
from model.protocol import Rules
from model.sessions import Actor

JOBS = ("backfill", "freeze", "unfreeze")
SHORT, LONG = (True,), (False,)


def _under(capture: str, rules: Rules, crowd: Callable[[Rules], tuple[Actor, ...]]) -> tuple[Actor, ...]:
    """The crowd, with the fence in another mode."""
    return crowd(replace(rules, capture=capture))


Crowd = Callable[[Rules], tuple[Actor, ...]]

QUICK: dict[str, Crowd] = {
    "two writers with one key": lambda r: (writer(r, "A"), writer(r, "B")),
    "a writer, raw SQL, a job": lambda r: (writer(r, "A"), raw(r), operator(r, "backfill")),
    "a writer, three jobs, the phase moving, a reader": lambda r: (
        writer(r, "A"),
        operator(r, *JOBS, "phase", transactions=3),
        reader(r),
    ),
    "a writer whose ledger leg may fail, a job, the line": lambda r: (
        writer(r, "A", leg_may_fail=True),
        operator(r, *JOBS),
        line_stopper(r),
    ),
    "a writer twice in one transaction, raw SQL between": lambda r: (
        writer(r, "A", calls=("post", "raw", "post", "read")),
        operator(r, *JOBS, transactions=2),
    ),
    "mode reject: a writer, raw SQL": lambda r: _under("reject", r, lambda m: (writer(m, "A"), raw(m))),
    "mode mirror: a writer, raw SQL, the line": lambda r: _under(
        "mirror", r, lambda m: (writer(m, "A"), raw(m), line_stopper(m))
    ),
}
"""The reduced set: some seconds, and every kind of event."""

FULL: dict[str, Crowd] = {
    "two writers, one key, each twice": lambda r: (writer(r, "A", transactions=2), writer(r, "B", transactions=2)),
    "two writers, two keys, raw SQL": lambda r: (writer(r, "A"), writer(r, "B", amount=2, key="j"), raw(r)),
    "two writers, raw SQL, a job": lambda r: (writer(r, "A"), writer(r, "B"), raw(r), operator(r, *JOBS)),
    "a writer, raw SQL twice, two jobs": lambda r: (
        writer(r, "A"),
        raw(r, transactions=2),
        operator(r, *JOBS, transactions=2),
    ),
    "a writer, raw SQL, two jobs at once": lambda r: (
        writer(r, "A"),
        raw(r),
        operator(r, *JOBS, name="operator 1"),
        operator(r, *JOBS, name="operator 2"),
    ),
    "two writers, three jobs, the phase moving, a reader": lambda r: (
        writer(r, "A"),
        writer(r, "B"),
        operator(r, *JOBS, "phase", transactions=3),
        reader(r),
    ),
    "two writers, a job, the line, a reader": lambda r: (
        writer(r, "A"),
        writer(r, "B"),
        operator(r, *JOBS),
        line_stopper(r),
        reader(r),
    ),
    "a writer whose ledger leg may fail, another, a job": lambda r: (
        writer(r, "A", leg_may_fail=True),
        writer(r, "B"),
        operator(r, *JOBS),
    ),
    "a writer whose ledger leg may fail, raw SQL, two jobs": lambda r: (
        writer(r, "A", leg_may_fail=True),
        raw(r),
        operator(r, *JOBS, transactions=2),
    ),
    "two writers with several calls in a transaction, a job": lambda r: (
        writer(r, "A", calls=("post", "raw", "read")),
        writer(r, "B", calls=("raw", "post", "post")),
        operator(r, *JOBS),
    ),
    "mode mirror: a writer, raw SQL, two jobs": lambda r: _under(
        "mirror", r, lambda m: (writer(m, "A"), raw(m), operator(m, *JOBS, transactions=2))
    ),
    "mode mirror: a writer with raw SQL between, a job, the line": lambda r: _under(
        "mirror",
        r,
        lambda m: (writer(m, "A", calls=("post", "raw", "post")), raw(m), operator(m, *JOBS), line_stopper(m)),
    ),
    "mode mirror: raw SQL twice, two jobs, a reader": lambda r: _under(
        "mirror", r, lambda m: (raw(m, transactions=2), operator(m, *JOBS, transactions=2), reader(m))
    ),
    "mode reject: a writer with raw SQL between, two jobs": lambda r: _under(
        "reject",
        r,
        lambda m: (writer(m, "A", calls=("post", "raw", "post")), raw(m), operator(m, *JOBS, transactions=2)),
    ),
    "any mode: a writer, raw SQL, two jobs": lambda r: _under(
        "any", r, lambda m: (writer(m, "A"), raw(m), operator(m, *JOBS, transactions=2))
    ),
    "any mode: a writer with raw SQL between, raw SQL twice": lambda r: _under(
        "any", r, lambda m: (writer(m, "A", calls=("raw", "post", "raw")), raw(m, transactions=2))
    ),
    "everybody at once": lambda r: (
        writer(r, "A", ways=SHORT),
        writer(r, "B", ways=LONG),
        raw(r, what=("update", "replace")),
        operator(r, *JOBS, transactions=2),
        line_stopper(r),
        reader(r),
    ),
}

CROWDS = {**QUICK, **FULL}


def configuration(name: str, rules: Rules | None = None) -> Configuration:
    """The configuration of this name, with the protocol as it is unless other rules are given."""
    return Configuration(name, CROWDS[name](rules or Rules()), ANY)
