"""Commands that look: status, once and live, the way of one mutation, the metrics exporter, the version."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Annotated, Final

import typer
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from walletmigrate.cli_flags import flag_text
from walletmigrate.commands import command, versions
from walletmigrate.console import FAILURE, INTERRUPTED, OK, Answer, plain, reasons_as_json, reasons_as_lines, typed
from walletmigrate.errors import ConfigError, UsageError, WalletMigrateError
from walletmigrate.flag_impact import rollout
from walletmigrate.invocation import NO_URL, Run, period, wait_for_the_end
from walletmigrate.report import JobStatus, Status
from walletmigrate.report import status as look
from walletmigrate.standing import shown_span, shown_time
from walletmigrate.trace import trace as find

PORT: Final = 9464
INTERVAL: Final = 5.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "status")(status)
    command(app, "watch")(watch)
    command(app, "trace")(trace)
    command(app, "exporter")(exporter)
    command(app, "version", role="none")(version)


def status(run: Run) -> Answer:
    """Say where the migration stands, what runs, why the next step is refused, and the next command."""
    seen = look(run.engine, run.settings, run.source)
    document = {**plain(seen), "refused": reasons_as_json(seen.refused)}
    return Answer(document, tuple(_lines(seen)))


def watch(
    run: Run,
    interval: Annotated[
        float, typer.Option(min=0.5, max=3600, metavar="SECONDS", help="From the end of one look to the next.")
    ] = INTERVAL,
) -> Answer:
    """Show status live on this terminal until Ctrl-C; a database that goes away is said, and tried again."""
    if run.as_json or not sys.stdout.isatty():
        raise UsageError("watch shows a live view and needs a terminal: walletmigrate status prints once, also --json")
    engine, settings, source = run.engine, run.settings, run.source
    views = _views(lambda: _next_first(_lines(look(engine, settings, source))), run)
    # Here and not above: no other command of this room draws a screen.
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    try:
        with Live(console=console, auto_refresh=False) as live:
            for lines in views:
                # Cut to the terminal's width: a line that wraps is worse than one that ends early.
                live.update(Text("\n".join(lines), overflow="ellipsis", no_wrap=True), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        return Answer({}, exit_code=INTERRUPTED, printed=True)
    raise AssertionError("unreachable: the views do not end")


def _next_first(lines: list[str]) -> list[str]:
    """The last line, which names the next command, before the others: a small terminal cuts off what is below."""
    return [lines[-1], *lines[:-1]]


def _views(seen: Callable[[], list[str]], run: Run) -> Iterator[list[str]]:
    """What is seen now, again and again; while the database does not answer, what was seen last, and since when."""
    last: list[str] = []
    at = datetime.now().astimezone()
    while True:
        try:
            last, at = seen(), datetime.now().astimezone()
            head = f"{shown_time(at)}; Ctrl-C ends it"
        except (DBAPIError, WalletMigrateError) as error:
            failure = error if isinstance(error, WalletMigrateError) else typed(error, run.address)
            head = f"NOT REACHED: {failure}\nbelow is what was seen at {shown_time(at)}; tried again; Ctrl-C ends it"
        yield [*head.splitlines(), "", *last]


def trace(
    run: Run,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="A correlation id, or an idempotency key.")],
    since: Annotated[
        str, typer.Option(metavar="1d", help="How far back the journal is read; all: from the start.")
    ] = "1d",
) -> Answer:
    """Print the whole way of one mutation: ledger, key, failures, audit log. Exit 1 if nothing carries the id."""
    back = None if since == "all" else period(since)
    with run.engine.connect() as plain_connection:
        connection = plain_connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        found = find(connection, run.settings, identifier, since=back)
    lines = [f"{shown_time(one.at)}  {one.where:7}  {one.what}" for one in found]
    notes: tuple[str, ...] = ()
    if not found:
        notes = (f"nothing carries {identifier!r} since {since}: try --since all",)
    elif back is not None and all(one.where != "ledger" for one in found):
        notes = (f"no transaction carries it since {since}: try --since all",)
    document = {"correlation_id": found[0].correlation_id if found else None, "rows": [plain(one) for one in found]}
    return Answer(document, tuple(lines), notes, OK if found else FAILURE)


def exporter(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PORT,
    address: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
) -> Answer:
    """Serve the metrics that stand in the database, for Prometheus. Ctrl-C ends it."""
    if run.settings.database_url is None:
        raise ConfigError("no database URL is set", fix=NO_URL)
    from walletmigrate.exporter import serve  # not above: the other commands of this room serve nothing

    source = run.source

    def counted(connection: Connection) -> dict[str, float]:
        return rollout(connection, run.settings, source.snapshot())

    served = serve(run.settings, port, address, rollout=counted)
    try:
        url = f"http://{address}:{served.port}/metrics"
        wait_for_the_end(run, Answer({"url": url, "running": True}, (f"serving {url}",)))
    finally:
        served.close()
    return Answer({}, printed=True)


def version(run: Run) -> Answer:  # noqa: ARG001 - every command gets its run
    """Say the versions of the package, of what it stands on, and of the schema and functions that it installs."""
    return versions()


def _lines(seen: Status) -> list[str]:
    since = f" since {shown_time(seen.since)}" if seen.since else ""
    lines = [f"phase: {seen.phase}{since}" if seen.installed else "phase: legacy (the ledger is not installed)"]
    by = seen.stopped
    stopped = f"line: STOPPED since {shown_time(by.at)} by {by.actor}: {by.reason}" if by else "line: STOPPED"
    lines.append("line: runs" if seen.line_running else stopped)
    lines.append(f"flags: {seen.flags.source}" + (f" ({seen.flags.problem})" if seen.flags.problem else ""))
    lines += [flag_text(state) for state in seen.flags.flags]
    if seen.installed:
        counts = ", ".join(f"{count} {state}" for state, count in seen.accounts.items())
        lines.append(f"accounts: {counts}; {seen.drifted} drifted")
        for currency, amount in seen.imbalance.items():
            lines.append(f"NOT BALANCED: the ledger's balances in {currency} come to {amount}, and not to 0")
        lines.append(f"failures in the observation window: {seen.failures}")
    lines += [_job_line(job) for job in seen.jobs]
    for run in seen.verifications:
        verdict = "clean" if run.clean else f"NOT CLEAN, drift {run.drift_amount} in {run.drift_accounts} accounts"
        if run.clean and run.voided:
            verdict = f"clean, but voided by another verification at {shown_time(run.voided)}"
        lines.append(f"verified: {run.mapping} {run.currency} at {shown_time(run.finished_at)}: {verdict}")
    for left in seen.reconciliations:
        what = f"{left.accounts} accounts left that differ, by {left.amount} {left.currency} (run {left.id})"
        lines.append(f"reconciled: {left.mapping} with {left.truth}: {what}")
    if seen.next_phase and seen.refused:
        lines.append(f"the way to {seen.next_phase} is closed:")
        lines += reasons_as_lines(seen.refused)
    elif seen.next_phase:
        lines.append(f"the way to {seen.next_phase} is open")
    lines.append(f"next: {seen.next_command}")
    return lines


def _job_line(job: JobStatus) -> str:
    done = job.items_done + job.items_failed
    of = f" of {job.items_total}" if job.items_total is not None else ""
    state = "running, but no batch for a minute" if job.stalled else job.state
    if job.held is not None:
        state = f"running, but waiting: {job.held}"
    # Rounded down: 100 % is said of nothing that is not done. What is over is not on its way.
    over = job.state in ("done", "cancelled")
    share = f", {int(job.share * 100)} %" if job.share is not None and not over else ""
    # A slow job is not one that does nothing.
    rate = f", {job.rate:.{1 if job.rate < 9.95 else 0}f}/s" if job.rate is not None else ""
    eta = f", about {shown_span(timedelta(seconds=job.eta_seconds))} left" if job.eta_seconds is not None else ""
    failed = f", {job.items_failed} failed" if job.items_failed else ""
    return f"job {job.id}: {job.kind} of {job.mapping}, {state}, {done}{of} accounts{share}{failed}{rate}{eta}"
