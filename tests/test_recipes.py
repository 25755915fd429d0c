"""The recipes of docs/recipes.md, run as they stand there: the code of each framework, on a real ledger."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

import adapting
from commandline import Project, project_at
from ledger import rows, scalar
from walletmigrate import LegacyBalanceAdapter
from walletmigrate.errors import IdempotencyKeyReused, InsufficientFunds

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"
D = Decimal


@pytest.fixture
def project(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Ten users of 100 each whose balance must not fall below 0, dual-write on for all."""
    made, _ = project_at(tmp_path, database_url, "dual_write")
    made.config.write_text(made.config.read_text(encoding="utf-8") + 'floor = "0"\n', encoding="utf-8")
    made.change("install")
    monkeypatch.setenv("WALLETMIGRATE_CONFIG", str(made.config))
    monkeypatch.setenv("WALLETMIGRATE_DATABASE_URL", database_url)
    monkeypatch.setenv("SHOP_DATABASE_URL", database_url.replace("postgresql:", "postgresql+psycopg:"))
    return made


@pytest.fixture
def engine(project: Project) -> Iterator[Engine]:
    from walletmigrate import connect

    made = connect.engine(project.url, application_name="test")
    yield made
    adapting.check_invariants(made, project.settings)
    made.dispose()


def recipe(heading: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the block under a heading as a module; its names."""
    text = RECIPES.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    module = ModuleType(f"recipe_{heading.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"{RECIPES.name}: {heading}", "exec"), module.__dict__)
    return module.__dict__


def coins(engine: Engine, key: int = 1) -> Any:
    return scalar(engine, "select total_coins from public.users where id = :key", key=key)


def postings(engine: Engine, name: str) -> int:
    return int(scalar(engine, "select count(*) from wallet.transactions where type = :name", name=name))


# FastAPI and Flask

Call = Callable[..., tuple[int, Any]]
FAIL_AT_COMMIT = """
create function fail() returns trigger language plpgsql as 'begin raise exception ''no''; end';
create constraint trigger fail after update on users deferrable initially deferred
for each row when (new.total_coins = 87) execute function fail();
"""


def shop_behaves(call: Call, engine: Engine) -> None:
    """Bookings, replays, refusals and commits that fail, over HTTP."""
    assert call("GET", "/users/1/balance") == (200, {"balance": "100.00"})
    booking = {"user": 1, "price": "30.25"}
    for _ in range(2):
        assert call("POST", "/bookings", booking, key="a", request="req-7") == (201, {"balance": "69.75"})
    assert postings(engine, "booking") == 1
    assert scalar(engine, "select correlation_id from wallet.transactions where type = 'booking'") == "req-7"
    assert call("POST", "/bookings", {**booking, "price": "31"}, key="a") == (422, {"error": "key_reused"})
    assert call("POST", "/bookings", {**booking, "price": "70"}, key="b") == (409, {"error": "insufficient_funds"})
    assert call("POST", "/bookings", {**booking, "user": 99}, key="c") == (404, {"error": "unknown_account"})
    assert call("POST", "/bookings", {**booking, "price": "1.001"}, key="d") == (422, {"error": "invalid_amount"})
    assert (call("GET", "/users/1/balance"), coins(engine)) == ((200, {"balance": "69.75"}), D("69.75"))
    with engine.begin() as connection:
        connection.exec_driver_sql(FAIL_AT_COMMIT, execution_options={"no_parameters": True})
    assert call("POST", "/bookings", {"user": 2, "price": "13"}, key="e")[0] == 500  # not 201, and then no booking
    assert coins(engine, 2) == 100


def test_the_recipe_for_fastapi(project: Project, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = recipe("FastAPI", monkeypatch)
    transport = httpx.ASGITransport(names["app"], raise_app_exceptions=False)
    with asyncio.Runner() as loop:
        client = httpx.AsyncClient(transport=transport, base_url="http://shop.test")

        def call(method: str, path: str, body: Any = None, key: str = "", request: str = "") -> tuple[int, Any]:
            headers = {"Idempotency-Key": key, "X-Request-Id": request}
            answer = loop.run(client.request(method, path, json=body, headers=headers))
            return answer.status_code, answer.json() if answer.status_code < 500 else None

        shop_behaves(call, engine)
        loop.run(client.aclose())
        loop.run(names["engine"].dispose())


def test_the_recipe_for_flask(project: Project, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = recipe("Flask", monkeypatch)
    client = names["app"].test_client()

    def call(method: str, path: str, body: Any = None, key: str = "", request: str = "") -> tuple[int, Any]:
        headers = {"Idempotency-Key": key, "X-Request-Id": request}
        # A context of its own, as a server's thread has: what the recipe binds is not left to the next test.
        answer = copy_context().run(client.open, path, method=method, json=body, headers=headers)
        return answer.status_code, answer.get_json()

    shop_behaves(call, engine)
    names["engine"].dispose()


# Celery


class Celery:
    """What Celery documents of a task's retries: only the errors named, at most ``max_retries`` times."""

    between: Callable[[int], None] = staticmethod(lambda _: None)
    """Called where Celery waits for its back-off."""

    def __init__(self, name: str) -> None:
        self.name = name

    def task(
        self, *, acks_late: bool, autoretry_for: tuple[type[Exception], ...], retry_backoff: bool, max_retries: int
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        assert acks_late
        assert retry_backoff

        def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
            def delivered(*arguments: Any) -> Any:
                for attempt in range(max_retries):
                    try:
                        return run(*arguments)
                    except autoretry_for:
                        Celery.between(attempt)
                return run(*arguments)

            return delivered

        return decorate


class Signal:
    """What of a signal the recipe uses."""

    heard: Callable[..., None]

    def connect(self, receiver: Callable[..., None]) -> Callable[..., None]:
        self.heard = receiver
        return receiver


@pytest.fixture
def celery(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    made, signals = ModuleType("celery"), ModuleType("celery.signals")
    started = Signal()
    made.__dict__.update(Celery=Celery, signals=signals)
    signals.__dict__.update(worker_process_init=started)
    monkeypatch.setitem(sys.modules, "celery", made)
    monkeypatch.setitem(sys.modules, "celery.signals", signals)
    url = project.url + ("&" if "?" in project.url else "?") + "options=-c%20lock_timeout%3D100"
    monkeypatch.setenv("SHOP_DATABASE_URL", url.replace("postgresql:", "postgresql+psycopg:"))
    names = recipe("Celery", monkeypatch)
    started.heard(sender=None)  # as in a worker that was just forked
    yield names
    names["engine"].dispose()


def test_a_celery_task_that_was_delivered_twice_pays_once(celery: dict[str, Any], engine: Engine) -> None:
    """A worker that was lost after the commit and before the acknowledgement looks just so."""
    for _ in range(3):
        celery["pay_out_prize"](1, 7)
    celery["pay_out_prize"](1, 8)
    assert (coins(engine), postings(engine, "prize")) == (150, 2)


def test_a_celery_task_is_retried_after_what_may_be_retried(
    celery: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    with engine.connect() as holder:
        holder.exec_driver_sql("select * from users where id = 1 for update")

        def between(attempt: int) -> None:
            attempts.append(attempt)
            if attempt == 1:
                holder.rollback()  # who held the row lets it go

        monkeypatch.setattr(Celery, "between", staticmethod(between))
        celery["pay_out_prize"](1, 7)
    assert attempts == [0, 1]
    assert (coins(engine), postings(engine, "prize")) == (125, 1)


def test_a_celery_task_is_retried_after_a_commit_that_nobody_heard_of(
    celery: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost behind the commit: the task cannot know, and the key finds out."""
    begin = celery["Session"].begin
    lost: list[bool] = []

    @contextmanager
    def losing() -> Iterator[Any]:
        with begin() as session:
            yield session
        if not lost:
            lost.append(True)
            raise OperationalError("commit", {}, psycopg.OperationalError("server closed the connection unexpectedly"))

    monkeypatch.setattr(celery["Session"], "begin", losing)
    celery["pay_out_prize"](1, 7)
    assert (lost, coins(engine), postings(engine, "prize")) == ([True], 125, 1)


def test_a_celery_task_that_is_refused_is_not_retried(
    celery: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Celery, "between", staticmethod(lambda _: pytest.fail("it was retried")))
    celery["pay_out_prize"](1, 7)
    monkeypatch.setitem(celery, "PRIZE", D(26))
    with pytest.raises(IdempotencyKeyReused):
        celery["pay_out_prize"](1, 7)
    assert coins(engine) == 125


# Django


class Wrapper:
    """What Django documents of its connection and of atomic(): autocommit outside, a transaction, savepoints within."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._depth = 0
        self.connection: psycopg.Connection[Any] | None = None

    def ensure_connection(self) -> None:
        if self.connection is None:
            self.connection = psycopg.connect(self._url, autocommit=True)

    @contextmanager
    def atomic(self) -> Iterator[None]:
        self.ensure_connection()
        assert self.connection is not None
        name = f"s{self._depth}"
        if self._depth:
            self.connection.execute(f"savepoint {name}")
        else:
            self.connection.autocommit = False
        self._depth += 1
        try:
            yield
        except BaseException:
            self._end(f"rollback to savepoint {name}", self.connection.rollback)
            raise
        self._end(f"release savepoint {name}", self.connection.commit)

    def _end(self, inner: str, outer: Callable[[], None]) -> None:
        assert self.connection is not None
        self._depth -= 1
        if self._depth:
            self.connection.execute(inner)
        else:
            outer()
            self.connection.autocommit = True


@pytest.fixture
def django(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wrapper]:
    wrapper = Wrapper(project.url)
    transaction = ModuleType("django.db.transaction")
    transaction.__dict__["atomic"] = wrapper.atomic
    made = ModuleType("django.db")
    made.__dict__.update(connection=wrapper, transaction=transaction)
    monkeypatch.setitem(sys.modules, "django", ModuleType("django"))
    monkeypatch.setitem(sys.modules, "django.db", made)
    yield wrapper
    if wrapper.connection is not None:
        wrapper.connection.close()


def fail_after(django: Wrapper, work: Callable[[], object]) -> None:
    """A view of Django's that writes a model, does the work, and fails."""
    with django.atomic():
        assert django.connection is not None
        django.connection.execute("update users set tenant = 'globex' where id = 1")
        work()
        raise ZeroDivisionError


def test_the_recipe_for_django_posts_in_djangos_transaction(
    django: Wrapper, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = recipe("Django", monkeypatch)["book"]
    assert book(1, D(30), 7).mode == "dual_write"
    assert book(1, D(30), 7).replayed
    assert (coins(engine), postings(engine, "booking")) == (70, 1)
    with pytest.raises(InsufficientFunds):
        book(1, D(71), 8)
    # A view's own transaction around it, which fails in the end: money and model go back together.
    with pytest.raises(ZeroDivisionError):
        fail_after(django, lambda: book(1, D(10), 9))
    assert rows(engine, "select total_coins, tenant from users where id = 1") == [(70, "acme")]
    # An inner one that fails is a savepoint: the outer transaction goes on.
    with django.atomic():
        with pytest.raises(ZeroDivisionError):
            fail_after(django, lambda: book(1, D(10), 10))
        book(1, D(20), 11)
    assert (coins(engine), postings(engine, "booking")) == (50, 2)


def test_a_lock_that_django_waits_for_too_long_can_be_tried_again_with_the_same_key(
    django: Wrapper, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = recipe("Django", monkeypatch)["book"]
    django.ensure_connection()
    assert django.connection is not None
    django.connection.execute("set lock_timeout = 100")
    with engine.connect() as holder:
        holder.exec_driver_sql("select * from users where id = 1 for update")
        with pytest.raises(OperationalError):
            book(1, D(30), 7)
    assert not book(1, D(30), 7).replayed
    assert coins(engine) == 70


def test_a_posting_outside_of_atomic_stands_by_itself(
    django: Wrapper, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter: LegacyBalanceAdapter = recipe("Django", monkeypatch)["adapter"]
    django.ensure_connection()
    assert django.connection is not None
    adapter.debit(django.connection, 1, 5, type="booking")
    assert (coins(engine), postings(engine, "booking")) == (95, 1)


def test_every_recipe_has_a_test() -> None:
    headings = re.findall(r"^## (.+)$", RECIPES.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["What holds everywhere", "FastAPI", "Flask", "Celery", "Django"]
