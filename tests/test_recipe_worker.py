"""The recipe for Celery under a real worker, whose process is killed in the middle of a task."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from sqlalchemy import Engine

from commandline import Project, project_at
from ledger import rows, scalar
from monitoring import until
from recipes import checked, code_of
from scrapes import Series, everything

SHOP = """
from shop_tasks import app

app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={{"data_folder_in": {folder!r}, "data_folder_out": {folder!r}}},
    task_ignore_result=True,
)
"""
WAITING = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Project:
    made, _ = project_at(tmp_path, database_url, "dual_write")
    return made


@pytest.fixture
def engine(project: Project) -> Iterator[Engine]:
    with checked(project) as made:
        yield made


class Shop:
    """The recipe as a module in a folder, with a broker in a folder."""

    def __init__(self, project: Project, folder: Path, tasks: str = code_of("Celery")) -> None:
        queue = folder / "queue"
        queue.mkdir()
        (folder / "shop_tasks.py").write_text(tasks, encoding="utf-8")
        (folder / "shop.py").write_text(SHOP.format(folder=str(queue)), encoding="utf-8")
        self.folder = folder
        self.environment = {
            **os.environ,
            "WALLETMIGRATE_CONFIG": str(project.config),
            "WALLETMIGRATE_DATABASE_URL": project.url,
            "SHOP_DATABASE_URL": project.url.replace("postgresql:", "postgresql+psycopg:"),
        }

    def pay(self, *arguments: int) -> None:
        """Send the task from a process of its own, as a web server does."""
        code = f"import shop, shop_tasks; shop_tasks.pay_out_prize.delay{arguments}"
        subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=self.environment, check=True, timeout=60)

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[Any]]:
        """A worker with one process, ended by its own id."""
        command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool", "prefork", "-c", "1"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        log = (self.folder / "worker.log").open("wb")
        made = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        try:
            yield made
        finally:
            made.terminate()
            try:
                made.wait(60)
            finally:
                made.kill()
                made.wait()
                log.close()

    def told(self) -> str:
        return (self.folder / "worker.log").read_text(encoding="utf-8", errors="replace")[-3000:]


def child_of(worker: subprocess.Popen[Any]) -> int:
    """The process that runs the tasks. There may be a helper of the pool's beside it, which has no connection."""
    listed = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text(encoding="ascii").split()
    return max(int(one) for one in listed)


def test_a_worker_process_killed_in_the_middle_of_a_task_has_it_done_again_and_paid_once(
    project: Project, engine: Engine, tmp_path: Path
) -> None:
    shop = Shop(project, tmp_path)
    with shop.worker() as worker, engine.connect() as holder:
        holder.exec_driver_sql("select * from users where id = 1 for update")
        shop.pay(1, 7)
        until(lambda: scalar(engine, WAITING) == 1, shop.told)
        os.kill(child_of(worker), signal.SIGKILL)
        until(lambda: scalar(engine, WAITING) == 2, shop.told)  # the lost one's session, and the next one's
        holder.rollback()
        for _ in range(2):
            shop.pay(1, 8)
        until(lambda: rows(engine, "select sum(total_coins) from users where id = 1") == [(150,)], shop.told)
        shop.pay(2, 7)  # comes last, so that the double has been looked at
        until(lambda: rows(engine, "select sum(total_coins) from users where id = 2") == [(125,)], shop.told)
        assert worker.poll() is None
    assert rows(engine, "select reference_id, count(*) from wallet.transactions where type = 'prize' group by 1") == [
        ("7", 2),
        ("8", 1),
    ]


def scraped(port: int) -> dict[Series, float]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return everything(answer.read().decode())
    except URLError:
        return {}


def test_the_parent_of_a_worker_serves_what_its_processes_count(
    project: Project, engine: Engine, tmp_path: Path
) -> None:
    recipe = code_of("Celery")
    (line,) = re.findall(r"^adapter = .*$", recipe, re.MULTILINE)
    tasks = recipe.replace(line, code_of("Metrics and heartbeat")) + code_of("Metrics of Celery")
    shop = Shop(project, tmp_path, tasks)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    shop.environment |= {"METRICS_PORT": str(port)}
    paid = ("walletmigrate_dual_write_total", (("operation", "credit"), ("outcome", "ok")))
    shop.pay(1, 7)
    shop.environment["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    with shop.worker():
        until(lambda: scraped(port).get(paid) == 1, shop.told)
        assert {name for name, _ in scraped(port)} >= {"walletmigrate_flag_age_seconds"}
        # The parent's and its process's.
        until(lambda: scalar(engine, "select count(*) from wallet.processes where name = 'shop'") >= 2, shop.told)
    assert rows(engine, "select total_coins from users where id = 1") == [(125,)]
