"""The metrics of a rehearsal: a real Prometheus scrapes a real one, and every panel of the dashboards has data."""

from __future__ import annotations

import csv
import json
import math
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from binaries import program
from board_files import FOLDER, expressions
from commandline import SCRIPT
from monitoring import Server, configured_prometheus, hurried
from walletmigrate import traffic
from walletmigrate.errors import UsageError
from walletmigrate.rehearse import rehearse

WORKERS, TRANSACTIONS, SEED = 2, 1500, 11
EXAMPLE = "127.0.0.1:9464"
"""The address in the committed configuration, and in what dashboards/README.md says to run."""


@dataclass(frozen=True)
class Seen:
    """A rehearsal that is over, and the Prometheus that has scraped it meanwhile."""

    report: dict[str, Any]
    server: Server
    begin: float
    end: float

    def history(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """The labels and the numbers of each series, as Grafana would draw them; NaN left out."""
        found = self.server.history(expression, self.begin, self.end)
        numbers = [(one["metric"], [float(value) for _, value in one["values"]]) for one in found]
        return [(labels, [value for value in values if not math.isnan(value)]) for labels, values in numbers]

    def highest(self, expression: str) -> float:
        return max(value for _, values in self.history(expression) for value in values)


def transactions(folder: Path) -> Path:
    """A file of made-up transactions."""
    file = folder / "transactions.csv"
    made = traffic.generate(SEED, TRANSACTIONS)
    with file.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["transaction_id", "account_id", "tenant", "date", "type", "amount"])
        writer.writerows(
            [one.id, one.account, one.tenant, "2026-01-01", one.type, one.amount] for one in made.transactions
        )
    return file


def configuration(port: int, folder: Path) -> dict[str, Any]:
    """The committed one, with the rehearsal's port, and all rules evaluated as often as it says."""
    text = (FOLDER / "rehearsal.yml").read_text(encoding="utf-8")
    assert text.count(EXAMPLE) == 1
    config: dict[str, Any] = yaml.safe_load(text.replace(EXAMPLE, f"127.0.0.1:{port}"))
    config["rule_files"] = [str(hurried(FOLDER / name, folder)) for name in config["rule_files"]]
    return config


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A rehearsal by the command line on a server of its own, scraped from its beginning to its end."""
    program("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("rehearsed")
    report = folder / "report.json"
    words = ["rehearse", "--transactions", str(transactions(folder)), "--workers", str(WORKERS)]
    # Each flip of a flag lasts some scrapes, however fast the machine is.
    words += ["--flag-lag", "6", "--metrics-port", "0", "--report", str(report)]
    with subprocess.Popen(
        [SCRIPT, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            found = re.fullmatch(r"metrics: http://127\.0\.0\.1:(\d+)/metrics\n", said)
            assert found, said + process.stderr.read()
            begin = time.time()
            with configured_prometheus(folder, configuration(int(found[1]), folder)) as server:
                _, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors
                yield Seen(json.loads(report.read_text(encoding="utf-8")), server, begin, time.time())
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("name", expressions())
def test_every_panel_shows_data_of_a_rehearsal(seen: Seen, name: str) -> None:
    expression = expressions()[name].replace("$__rate_interval", "4s")  # Grafana: four times the scrape interval
    assert any(values for _, values in seen.history(expression)), expression


def test_prometheus_sees_the_whole_way_and_what_happens_on_it(seen: Seen) -> None:
    # The phases that wait for flags last longer than the second between two scrapes; the others may fall between.
    phases = {labels["phase"] for labels, values in seen.history("walletmigrate_phase") if 1 in values}
    assert phases >= {"dual_write", "read_ledger"}
    assert seen.highest('walletmigrate_accounts{state="mirrored"}') == seen.report["accounts"]
    assert seen.highest('walletmigrate_job_items{kind="backfill"}') > 0
    # Flags arrive in one process after the other, and the one that was killed counts for a minute.
    assert seen.highest("walletmigrate_flag_documents") >= WORKERS
    assert seen.highest('walletmigrate_flag_rollout_ratio{flag="wallet.readFromLedger"}') == 1
    assert seen.highest("sum(walletmigrate_bypass_writes_total)") > 0
    assert seen.highest('ALERTS{alertname="WalletMigrateBypassWrites", alertstate="firing"}') == 1
    # All workers are counted, also the one that was killed, and no counter goes back.
    posted = 'sum(walletmigrate_dual_write_total{outcome=~"ok|skipped"})'
    ((_, counts),) = seen.history(posted)
    assert counts == sorted(counts)
    assert seen.report["applied"] / 2 < counts[-1] <= seen.report["applied"]
    assert seen.highest('walletmigrate_dual_write_total{outcome="replayed"}') > 0
    for source in ("legacy", "ledger"):
        assert seen.highest(f'walletmigrate_read_total{{source="{source}"}}') > 0
    # Nothing went wrong, and that is what is seen.
    assert seen.report["verdict"] == "pass"
    for nothing in ("walletmigrate_mismatch_total", "walletmigrate_drift_accounts", "walletmigrate_ledger_imbalance"):
        assert seen.highest(nothing) == 0


def test_a_port_that_is_taken_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            rehearse(transactions(tmp_path), progress=False, metrics_port=port)


# An application may have loaded prometheus_client for itself, before the workers could say where to count.
LOADED = """
import prometheus_client, sys
from pathlib import Path
from walletmigrate.rehearsal_metrics import counting
from walletmigrate.observe import Read
(observer,) = counting(Path(sys.argv[1]))
observer(Read("ledger", "match", 0.001, "accounts", "cash", "EUR"))
"""


def test_a_worker_counts_in_its_folder_whatever_was_loaded_before(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], check=True)
    assert [path.name.partition("_")[0] for path in sorted(tmp_path.iterdir())] == ["counter", "gauge", "histogram"]
