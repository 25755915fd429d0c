"""The recipes of docs/recipes.md, run as they stand there: the code of each framework, on a real ledger."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import count
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import django
import httpx
import prometheus_client
import psycopg
import pytest
import uvicorn
from celery.signals import task_retry, worker_process_init
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import OperationalError

from commandline import Project, project_at
from ledger import rows, scalar
from monitoring import until
from recipes import RECIPES, checked, code_of
from walletmigrate import LegacyBalanceAdapter
from walletmigrate.errors import IdempotencyKeyReused, InsufficientFunds

NUMBERS = count()
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
    with checked(project) as made:
        yield made


def recipe(heading: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the block under a heading as a module; its names."""
    code = code_of(heading)
    # A new name each time: Celery gives every app of a process the tasks of all others, by module and name.
    module = ModuleType(f"recipe_{heading.lower()}_{next(NUMBERS)}")
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


@contextmanager
def served(names: dict[str, Any]) -> Iterator[str]:
    """The address of the recipe's application under uvicorn, in a thread with a loop of its own."""
    server = uvicorn.Server(uvicorn.Config(names["app"], host="127.0.0.1", port=0, log_level="critical"))

    async def serve() -> None:
        await server.serve()
        await names["engine"].dispose()

    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_recipe_for_fastapi(project: Project, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(recipe("FastAPI", monkeypatch)) as address, httpx.Client(base_url=address) as client:

        def call(method: str, path: str, body: Any = None, key: str = "", request: str = "") -> tuple[int, Any]:
            headers = {"Idempotency-Key": key, "X-Request-Id": request}
            answer = client.request(method, path, json=body, headers=headers)
            return answer.status_code, answer.json() if answer.status_code < 500 else None

        shop_behaves(call, engine)


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

RETRIES = 5
"""At most, as the recipe says."""


@dataclass
class Celery:
    """The recipe's names. ``retried`` is called between two tries."""

    names: dict[str, Any]
    retried: Callable[[], None] = lambda: None

    def send(self, *arguments: Any) -> Any:
        return self.names["pay_out_prize"].delay(*arguments)

    def pay(self, *arguments: Any) -> None:
        """Send a task, and wait until it is done."""
        self.send(*arguments).get(timeout=60)


@pytest.fixture
def celery(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    url = project.url + ("&" if "?" in project.url else "?") + "options=-c%20lock_timeout%3D100"
    monkeypatch.setenv("SHOP_DATABASE_URL", url.replace("postgresql:", "postgresql+psycopg:"))
    made = Celery(recipe("Celery", monkeypatch))
    app = made.names["app"]
    # Celery runs the task, and each of its retries, where it is sent: no broker, no worker's thread to wait for.
    app.conf.update(task_always_eager=True, broker_url="memory://")
    worker_process_init.send(sender=None)  # as in a worker that was just forked

    def between(**_: Any) -> None:
        made.retried()

    task_retry.connect(between)
    yield made
    task_retry.disconnect(between)
    made.names["engine"].dispose()
    app.close()


def test_a_celery_task_that_was_delivered_twice_pays_once(celery: Celery, engine: Engine) -> None:
    """A worker that was lost after the commit and before the acknowledgement looks just so."""
    for _ in range(3):
        celery.pay(1, 7)
    celery.pay(1, 8)
    assert (coins(engine), postings(engine, "prize")) == (150, 2)


def test_a_celery_task_is_retried_after_what_may_be_retried(celery: Celery, engine: Engine) -> None:
    attempts = []
    with engine.connect() as holder:
        holder.exec_driver_sql("select * from users where id = 1 for update")

        def between() -> None:
            attempts.append(coins(engine))
            if len(attempts) == 2:
                holder.rollback()  # who held the row lets it go

        celery.retried = between
        celery.pay(1, 7)
    assert attempts == [100, 100]
    assert (coins(engine), postings(engine, "prize")) == (125, 1)


def test_a_celery_task_is_retried_after_a_commit_that_nobody_heard_of(
    celery: Celery, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost behind the commit: the task cannot know, and the key finds out."""
    begin = celery.names["Session"].begin
    lost: list[bool] = []

    @contextmanager
    def losing() -> Iterator[Any]:
        with begin() as session:
            yield session
        if not lost:
            lost.append(True)
            raise OperationalError("commit", {}, psycopg.OperationalError("server closed the connection unexpectedly"))

    monkeypatch.setattr(celery.names["Session"], "begin", losing)
    celery.pay(1, 7)
    assert (lost, coins(engine), postings(engine, "prize")) == ([True], 125, 1)


def test_a_celery_task_that_is_refused_is_not_retried(
    celery: Celery, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []
    celery.retried = lambda: tried.append(True)
    celery.pay(1, 7)
    monkeypatch.setitem(celery.names, "PRIZE", D(26))
    sent = celery.send(1, 7)
    sent.get(timeout=60, propagate=False)
    assert (sent.state, type(sent.result).__name__) == ("FAILURE", IdempotencyKeyReused.__name__)
    assert (tried, coins(engine)) == ([], 125)


# Django


@cache
def users() -> Any:
    """The users' table as a model of Django's, which is told of itself once in a process."""
    from django.conf import settings

    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql"}})
    django.setup()
    from django.db import models

    fields = {name: models.TextField() for name in ("tenant", "role")}
    total = models.DecimalField(max_digits=12, decimal_places=2)
    meta = type("Meta", (), {"app_label": "shop", "db_table": "users", "managed": False})
    return type("User", (models.Model,), {**fields, "total_coins": total, "Meta": meta, "__module__": __name__})


@pytest.fixture
def book(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The recipe, with Django's connection to this test's database."""
    users()
    from django.db import connections

    url = make_url(project.url)
    where = {"NAME": url.database, "USER": url.username, "HOST": url.host or url.query["host"]}
    connections.settings["default"].update(where, PORT=url.port or url.query["port"])
    yield recipe("Django", monkeypatch)["book"]
    connections["default"].close()
    del connections["default"]


def fail_after(work: Callable[[], object]) -> None:
    """A view of Django's that writes a model, does the work, and fails."""
    from django.db import transaction

    with transaction.atomic():
        user = users().objects.get(id=1)
        user.tenant = "globex"
        user.save(update_fields=["tenant"])
        work()
        raise ZeroDivisionError


def test_the_recipe_for_django_posts_in_djangos_transaction(book: Callable[..., Any], engine: Engine) -> None:
    from django.db import transaction

    assert book(1, D(30), 7).mode == "dual_write"
    assert book(1, D(30), 7).replayed
    assert (coins(engine), postings(engine, "booking")) == (70, 1)
    with pytest.raises(InsufficientFunds):
        book(1, D(71), 8)
    # A view's own transaction around it, which fails in the end: money and model go back together.
    with pytest.raises(ZeroDivisionError):
        fail_after(lambda: book(1, D(10), 9))
    assert rows(engine, "select total_coins, tenant from users where id = 1") == [(70, "acme")]
    # An inner one that fails is a savepoint: the outer transaction goes on.
    with transaction.atomic():
        with pytest.raises(ZeroDivisionError):
            fail_after(lambda: book(1, D(10), 10))
        book(1, D(20), 11)
    assert (coins(engine), postings(engine, "booking")) == (50, 2)


def test_a_lock_that_django_waits_for_too_long_can_be_tried_again_with_the_same_key(
    book: Callable[..., Any], engine: Engine
) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("set lock_timeout = 100")
    with engine.connect() as holder:
        holder.exec_driver_sql("select * from users where id = 1 for update")
        with pytest.raises(OperationalError):
            book(1, D(30), 7)
    assert not book(1, D(30), 7).replayed
    assert coins(engine) == 70


def test_a_posting_outside_of_atomic_stands_by_itself(book: Callable[..., Any], engine: Engine) -> None:
    from django.db import connection

    adapter: LegacyBalanceAdapter = book.__globals__["adapter"]
    connection.ensure_connection()
    adapter.debit(connection.connection, 1, 5, type="booking")
    assert (coins(engine), postings(engine, "booking")) == (95, 1)


def test_a_model_that_is_saved_whole_writes_past_the_adapter_and_one_that_names_its_fields_does_not(
    book: Callable[..., Any], engine: Engine
) -> None:
    user = users().objects.get(id=1)
    book(1, D(30), 7)
    user.tenant = "globex"
    user.save(update_fields=["tenant"])
    assert (coins(engine), scalar(engine, "select state from wallet.accounts where key = '1'")) == (70, "mirrored")
    user.save()
    assert (coins(engine), scalar(engine, "select state from wallet.accounts where key = '1'")) == (100, "stale")
    book(1, D(30), 8)
    user.refresh_from_db(fields=["total_coins"])
    assert user.total_coins == 70


def test_what_the_recipes_leave_out_counts_what_is_posted_and_lives(
    project: Project, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    names = recipe("Metrics and heartbeat", monkeypatch)
    try:
        with engine.begin() as connection:
            names["adapter"].debit(connection, 1, 30, type="booking")
        labels = {"operation": "debit", "outcome": "ok"}
        assert registry.get_sample_value("walletmigrate_dual_write_total", labels) == 1
        until(lambda: rows(engine, "select name, problem from wallet.processes") == [("shop", None)])
    finally:
        names["heartbeat"].close()


def test_every_recipe_has_a_test() -> None:
    headings = re.findall(r"^## (.+)$", RECIPES.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [
        "What holds everywhere",
        "Metrics and heartbeat",
        "Metrics of Celery",
        "FastAPI",
        "Flask",
        "Celery",
        "Django",
    ]
