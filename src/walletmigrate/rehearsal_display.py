"""What a rehearsal says while it runs, on standard error only: live on a terminal, else a line per stage."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from walletmigrate.rehearsal_report import Stage

_REFRESHES_PER_SECOND: Final = 8


class Display(Protocol):
    """What the rehearsal tells; none of it changes what the rehearsal does."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, and leave the terminal as it was."""
        ...

    def begin(self, title: str) -> None:
        """A stage begins."""

    def step(self, what: str) -> None:
        """The migration takes a step."""

    def done(self, transactions: int) -> None:
        """So many transactions are done since the start; told from several threads."""

    def end(self, stage: Stage, remark: str) -> None:
        """The stage is over."""

    def note(self, what: str) -> None:
        """Something worth a line of its own."""


class Silence:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, title: str) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""

    def done(self, transactions: int) -> None:
        """Say nothing."""

    def end(self, stage: Stage, remark: str) -> None:
        """Say nothing."""

    def note(self, what: str) -> None:
        """Say nothing."""


class Lines(Silence):
    """One line for each finished stage, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def end(self, stage: Stage, remark: str) -> None:
        """Say how the stage went."""
        self._console.print(_summary(stage), remark, highlight=False, markup=False, soft_wrap=True)

    def note(self, what: str) -> None:
        """Say it."""
        self._console.print(Text(what), highlight=False, soft_wrap=True)


class Live(Lines):
    """A bar over all transactions with the step that is being taken; finished stages scroll by above it."""

    def __init__(self, console: Console, transactions: int) -> None:
        super().__init__(console)
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting the workers", total=transactions)
        self._title = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def end(self, stage: Stage, remark: str) -> None:
        """Say how the stage went, and what was done in it on a line below."""
        self._console.print(_summary(stage), highlight=False, soft_wrap=True)
        if remark:
            self._console.print(Text(f"  {remark}", "dim"), highlight=False)

    def begin(self, title: str) -> None:
        """Name the stage beside the bar."""
        self._title = title
        self._progress.update(self._task, description=title)

    def step(self, what: str) -> None:
        """Name the step beside the bar."""
        self._progress.update(self._task, description=f"{self._title} · {what}")

    def done(self, transactions: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=transactions)


def display(transactions: int, *, progress: bool) -> Display:
    """Choose: nothing, a live bar if standard error is a terminal, else lines."""
    if not progress:
        return Silence()
    console = Console(stderr=True)
    return Live(console, transactions) if console.is_terminal else Lines(console)


def _summary(stage: Stage) -> Text:
    latency = f", p50 {stage.p50_ms:.1f} ms, p99 {stage.p99_ms:.1f} ms" if stage.p50_ms and stage.p99_ms else ""
    figures = f"{stage.transactions:>7,} transactions, {stage.per_second:>6,.0f}/s{latency}"
    return Text.assemble((f"{stage.name:<20}", "bold"), f" {figures}")
