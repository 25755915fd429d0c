"""A plugin of pytest that plays tests against mutated SQL: ``-p mutants.plugin --mutants PLAN``.

PLAN is a JSON file: [[guard, [test, …]], …]. For each guard its tests run, one after the other, in databases whose
functions are installed without it, until one fails. One process, one server, for as many guards as there are. What
came of each is appended to PLAN's neighbour ``….out``, a line of JSON each.

With ``--reach FILE`` the tests run as they are, on SQL that notes in the server's log which guards they can miss.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import psycopg
import pytest
from _pytest.runner import runtestprotocol
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url

import interleaving
import ledger
import servers
from mutants.guards import Guard
from mutants.reach import PREPARE, digest, instrumented
from mutants.record import known
from walletmigrate import schema

PATIENCE_SECONDS = 4.0
"""How long a test waits for a lock that, without the guard, may never be asked for."""
LIMIT_SECONDS = 60

_BROKEN = re.compile(
    r"psycopg\.errors\.(SyntaxError|Undefined\w+|Ambiguous\w+|DatatypeMismatch|WrongObjectType|Invalid\w*Definition"
    r"|InvalidColumnReference|InvalidName)\b"
)
_HIT = re.compile(r"GUARD (.*) REACHED$", re.MULTILINE)

Transform = Callable[[str, str], str]


class Mutating(jinja2.BaseLoader):
    """The package's templates, with something done to them."""

    def __init__(self, original: jinja2.BaseLoader, transform: Transform) -> None:
        self._original = original
        self._transform = transform

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str | None, Any]:
        """Give the template's text, transformed."""
        source, path, fresh = self._original.get_source(environment, template)
        return self._transform(template.removesuffix(".sql"), source), path, fresh


@contextmanager
def templates(transform: Transform) -> Iterator[None]:
    """Render transformed templates for as long as this lasts."""
    environment = schema._environment()
    original, cache = environment.loader, environment.cache
    assert original is not None
    assert cache is not None
    environment.loader = Mutating(original, transform)
    cache.clear()
    try:
        yield
    finally:
        environment.loader = original
        cache.clear()


@contextmanager
def without(name: str) -> Iterator[None]:
    """Install everything without one guard, for as long as this lasts."""
    guard = known()[name]
    if isinstance(guard, Guard):
        with templates(lambda template, source: guard.mutated(source) if template == guard.template else source):
            yield
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
    """Be less patient than the tests are: without a guard a lock may never be waited for."""
    if config.getoption("--mutants"):
        interleaving.PATIENCE_SECONDS = PATIENCE_SECONDS
        ledger.PATIENCE_SECONDS = PATIENCE_SECONDS


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
    """Play each guard's tests without it. A test of the guard "" is played as it stands, and has to pass."""
    items = {plain(item.nodeid): item for item in session.items}
    with path.with_suffix(".out").open("a", encoding="utf-8") as out:
        for guard, tests in json.loads(path.read_text(encoding="utf-8")):
            began = time.monotonic()
            result = {"guard": guard, **verdict(guard, [(test, items.get(test)) for test in tests])}
            json.dump({**result, "seconds": round(time.monotonic() - began, 2)}, out, ensure_ascii=False)
            out.write("\n")
            out.flush()


def verdict(guard: str, tests: list[tuple[str, pytest.Item | None]]) -> dict[str, Any]:
    """The first test that fails without the guard, with its last words; or that none does."""
    broken = ""
    for test, item in tests:
        if item is None:
            broken = broken or f"there is no test {test}"
            continue
        if guard:
            with without(guard):
                words = failure(item)
        else:
            words = failure(item)
        if words is None:
            continue
        if guard and _BROKEN.search(words) and "set search_path" not in guard:
            broken = broken or _last(words)
            continue
        return {"killer": test, "words": _last(words)}
    return {"killer": None, "broken": broken}


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
