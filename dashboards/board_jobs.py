"""The dashboard of the jobs over all accounts."""

from __future__ import annotations

from collections.abc import Sequence

from panels import ANY_IS_NOTEWORTHY, ANY_IS_WRONG, PLAIN, Board, Panel, by, lines, number


def jobs() -> Board:
    """The jobs over all accounts."""
    return Board(
        "jobs",
        "walletmigrate: backfill and jobs",
        "The newest jobs over all accounts: how far they are, how fast, what failed.",
        (("Now", _jobs_now()), ("Over time", _jobs_over_time())),
    )


def _jobs_now() -> Sequence[Panel]:
    done, left = 'walletmigrate_job_items{kind="backfill"}', 'walletmigrate_job_remaining{kind="backfill"}'
    return (
        number(
            "Backfill done",
            "Share of the newest backfill's items that are done.",
            [(f"sum({done}) / (sum({done}) + sum({left}) > 0)", "done")],
            unit="percentunit",
            steps=PLAIN,
            no_value="no backfill yet",
            span=6,
        ),
        number(
            "Items left",
            "Items left to do by the newest jobs, by kind; no number while a job has not counted them yet.",
            [(by("kind", "walletmigrate_job_remaining"), "{{kind}}")],
            unit="short",
            steps=PLAIN,
            span=6,
        ),
        number(
            "Items failed",
            "Items of the newest jobs that failed, by kind; at least 1 if the job itself failed.",
            [(by("kind", "walletmigrate_job_failed"), "{{kind}}")],
            unit="short",
            steps=ANY_IS_WRONG,
            span=6,
        ),
        number(
            "Paused",
            "Newest jobs that are paused, by kind. They go on where they were when they are started again.",
            [(by("kind", "walletmigrate_job_paused"), "{{kind}}")],
            unit="short",
            steps=ANY_IS_NOTEWORTHY,
            span=6,
        ),
    )


def _jobs_over_time() -> Sequence[Panel]:
    speed = "deriv(walletmigrate_job_items[$__rate_interval])"
    return (
        lines(
            "Items done",
            "Items done by the newest job of each mapping, added up by kind. It falls when a new job begins.",
            [(by("kind", "walletmigrate_job_items"), "{{kind}}")],
            unit="short",
        ),
        lines(
            "Speed",
            "Items per second by kind, as the exporter sees them: in steps of a batch.",
            [(f"clamp_min(max by (kind) ({speed}), 0)", "{{kind}}")],
            unit="ops",
        ),
        lines(
            "Batch duration",
            "Seconds of the last batch of the newest jobs, by kind. Each batch is one transaction.",
            [(by("kind", "walletmigrate_job_batch_seconds"), "{{kind}}")],
            unit="s",
        ),
        lines(
            "Accounts not in step",
            "Accounts that a backfill has to bring up: unknown to the ledger as of the last verification, or stale.",
            [(by("state", 'walletmigrate_accounts{state=~"absent|stale"}'), "{{state}}")],
            unit="short",
            stacked=True,
        ),
    )
