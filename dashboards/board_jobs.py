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
            "Items left to do by the newest jobs, by kind and mapping; no number while a job has not counted them yet.",
            [(by("kind, mapping", "walletmigrate_job_remaining"), "{{kind}} {{mapping}}")],
            unit="short",
            steps=PLAIN,
            span=6,
        ),
        number(
            "Items failed",
            "Items of the newest jobs that failed, by kind and mapping; at least 1 if the job itself failed.",
            [(by("kind, mapping", "walletmigrate_job_failed"), "{{kind}} {{mapping}}")],
            unit="short",
            steps=ANY_IS_WRONG,
            span=6,
        ),
        number(
            "Paused",
            "1 for each newest job that is paused, by kind and mapping. It goes on where it was when started again.",
            [(by("kind, mapping", "walletmigrate_job_paused"), "{{kind}} {{mapping}}")],
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
            "Items done by the newest job of each kind and mapping. It falls when a new job begins.",
            [(by("kind, mapping", "walletmigrate_job_items"), "{{kind}} {{mapping}}")],
            unit="short",
        ),
        lines(
            "Speed",
            "Items per second by kind and mapping, as the exporter sees them: in steps of a batch.",
            [(f"clamp_min(max by (kind, mapping) ({speed}), 0)", "{{kind}} {{mapping}}")],
            unit="ops",
        ),
        lines(
            "Batch duration",
            "Seconds of the last batch of the newest jobs, by kind and mapping. Each batch is one transaction.",
            [(by("kind, mapping", "walletmigrate_job_batch_seconds"), "{{kind}} {{mapping}}")],
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
