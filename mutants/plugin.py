"""A plugin of pytest that plays tests against mutated SQL: ``-p mutants.plugin --mutants PLAN``.

PLAN is a JSON file: [[guard, [test, …]], …]. For each guard its tests run, one after the other, in databases whose
functions are installed without it, until one fails that does not fail as it stands. One process, one server, for as
many guards as there are. What came of each is appended to PLAN's neighbour ``….out``, a line of JSON each.

With ``--reach FILE`` the tests run as they are, on SQL that notes in the server's log which guards they can miss.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from _pytest.runner import runtestprotocol
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url

import copies
import interleaving
import ledger
import servers
from mutants.clones import Clones
from mutants.guards import TEMPLATES, Guard, template
from mutants.reach import PREPARE, digest, instrumented
from mutants.record import known
from walletmigrate import connect, schema

PATIENCE_SECONDS = 10.0
"""How long a test waits for a lock that, without the guard, may never be asked for."""
STATEMENT_TIMEOUT_MS = 15_000
"""How long a statement may take: without a guard a loop may have no end, and that is missed by its test."""
CLONES = Clones()

_BROKEN = re.compile(
    r"psycopg\.errors\.(SyntaxError|Undefined\w+|Ambiguous\w+|DatatypeMismatch|WrongObjectType|Invalid\w*Definition"
    r"|InvalidColumnReference|InvalidName)\b"
)
_HIT = re.compile(r"GUARD (.*) REACHED$", re.MULTILINE)

Transform = Callable[[str, str], str]


@contextmanager
def templates(transform: Transform, names: Iterable[str] = TEMPLATES) -> Iterator[None]:
    """Render these templates transformed, for as long as this lasts; the others stay compiled."""
    environment = schema._environment()
    get = environment.get_template
    made = {f"{name}.sql": environment.from_string(transform(name, template(name))) for name in names}
    environment.get_template = lambda name, *more: made.get(name) or get(name, *more)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del environment.get_template


@contextmanager
def without(name: str) -> Iterator[None]:
    """Install everything without one guard, for as long as this lasts."""
    guard = known()[name]
    if isinstance(guard, Guard):
        CLONES.guard = guard
        with templates(lambda _, source: guard.mutated(source), [guard.template]):
            yield
        CLONES.guard = None
        return

    def rewrite(_c: object, _u: object, statement: str, parameters: Any, _x: object, _m: object) -> tuple[str, Any]:
        return guard.mutated(statement), parameters

    event.listen(Engine, "before_cursor_execute", rewrite, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", rewrite)


def plain(nodeid: str) -> str:
    """A test's name without the folder and the server that it runs on."""
    return re.sub(r"\[pg\d+-?", "[", nodeid.removeprefix("tests/")).removesuffix("[]")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--mutants", metavar="PLAN", help="play these tests against mutated SQL")
    parser.addoption("--reach", metavar="FILE", help="note which guards each test can miss")


def pytest_configure(config: pytest.Config) -> None:
    """Install each time, and be less patient than the tests are: without a guard a lock may never be waited for."""
    copies.ANEW.append("mutants")
    if config.getoption("--mutants"):
        interleaving.PATIENCE_SECONDS = PATIENCE_SECONDS
        ledger.PATIENCE_SECONDS = PATIENCE_SECONDS
        limits = {**(connect.engine.__kwdefaults__ or {}), "statement_timeout_ms": STATEMENT_TIMEOUT_MS}
        connect.engine.__kwdefaults__ = limits


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Play the plan instead of the tests."""
    if path := session.config.getoption("--mutants"):
        play(session, Path(path))
        return True
    if path := session.config.getoption("--reach"):
        reach(session, Path(path))
        return True
    return None


def play(session: pytest.Session, path: Path) -> None:
    """Play each guard's tests without it."""
    items = {plain(item.nodeid): item for item in session.items}
    CLONES.put_in()
    as_it_stands = cache(failure)
    with path.with_suffix(".out").open("a", encoding="utf-8") as out:
        for guard, tests in json.loads(path.read_text(encoding="utf-8")):
            began = time.monotonic()
            named = [(test, item) for name in tests for test, item in of_name(items, name)]
            result = {"guard": guard, **verdict(guard, named, as_it_stands)}
            json.dump({**result, "seconds": round(time.monotonic() - began, 2)}, out, ensure_ascii=False)
            out.write("\n")
            out.flush()


def of_name(items: dict[str, pytest.Item], name: str) -> list[tuple[str, pytest.Item | None]]:
    """The test of a name; or, where that is a file or a test with parameters, all there are."""
    found: list[tuple[str, pytest.Item | None]] = [
        (test, item) for test, item in items.items() if test == name or test.startswith((f"{name}[", f"{name}::"))
    ]
    return found or [(name, None)]


def verdict(
    guard: str, tests: list[tuple[str, pytest.Item | None]], as_it_stands: Callable[[pytest.Item], str | None]
) -> dict[str, Any]:
    """The first test that fails without the guard and not with it, with its last words; or that none does."""
    broken = []
    for test, item in tests:
        if item is None:
            broken.append(f"there is no test {test}")
            continue
        with without(guard):
            words = failure(item)
        if words is None:
            continue
        if _unsound(guard, words):
            broken.append(_last(words))
        elif (anyway := as_it_stands(item)) is not None:
            broken.append(f"{test} fails as it stands: {_last(anyway)}")
        else:
            return {"killer": test, "words": _last(words)}
    return {"killer": None, "words": "", "broken": next(iter(broken), "")}


def _unsound(guard: str, words: str) -> bool:
    """Whether the test failed because the mutant does not run, or only because it took too long."""
    if re.search(r"^E +(concurrent\.futures\._base\.)?TimeoutError|within \d+ s$", words, re.MULTILINE):
        return True
    return bool(_BROKEN.search(words)) and "set search_path" not in guard


def failure(item: pytest.Item) -> str | None:
    """Run a test anew, with all fixtures but the session's; what it said when it failed."""
    item._initrequest()  # type: ignore[attr-defined]
    reports = runtestprotocol(item, log=False, nextitem=item.session)  # type: ignore[arg-type]
    failed = [report for report in reports if report.failed and report.when != "teardown"]
    return failed[0].longreprtext if failed else None


def _last(words: str) -> str:
    told = [line for line in words.splitlines() if line.startswith("E  ")]
    return (told or words.splitlines() or [""])[0].lstrip("E ")[:160]


def reach(session: pytest.Session, path: Path) -> None:
    """Run each test once, and write {test: {"seconds", "guards"}} of those that pass."""
    started = servers._embedded

    def prepared(spec: str) -> Iterator[servers.Postgres]:
        for server in started(spec):
            with psycopg.connect(server.url_for("template1").replace("+psycopg", ""), autocommit=True) as connection:
                connection.execute(PREPARE)
            logs.append(Path(str(make_url(server.url).query["host"]), "server.log"))
            yield server

    logs: list[Path] = []
    servers._embedded = prepared
    found = {}
    names = {digest(guard): guard for guard in known()}
    with templates(instrumented):
        for item in session.items:
            offset = logs[0].stat().st_size if logs else 0
            began = time.monotonic()
            words = failure(item)
            seconds = time.monotonic() - began
            if words is None and logs:
                with logs[0].open(encoding="utf-8", errors="replace") as log:
                    log.seek(offset)
                    guards = sorted({names[mark] for mark in _HIT.findall(log.read())})
                found[plain(item.nodeid)] = {"seconds": round(seconds, 2), "guards": guards}
            elif words is not None:
                print(f"{plain(item.nodeid)}: {_last(words)}", flush=True)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
