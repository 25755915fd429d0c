"""Claims of batches: whoever works on one has its token, and the lock of its row as long as it works.

A claim is a short transaction under the lock of the job's row. The batch's own transaction then holds the lock of
the batch's row: as long as it does, nobody else takes the batch, however long it lasts; when its session ends, the
next claim finds the row free and its lease over. Locks are taken in one order, batch before job, and a claim, which
has the job's first, goes past locked batches: so no two of them wait for each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from walletmigrate.config import Settings
from walletmigrate.job_batches import Claim, accounts_per_key, function, span
from walletmigrate.job_rows import COLUMNS, Batch, Job, change, get, job_of, table

LATE_FACTOR: Final = 10
"""How many times larger the batches of a last pass are: nearly all of their rows are only looked at."""

_IDLE: Final = "60s"


class ClaimLost(Exception):
    """Another worker has the batch, or the job was cancelled: what was done under the old token is rolled back."""


@dataclass(frozen=True)
class NoClaim:
    """Nothing to be claimed: the job does not run, or is held, or has ``ended``, or others are at its last batches."""

    job: Job
    ended: bool


def claim(connection: Connection, settings: Settings, job_id: int, worker: str, passes: int = 1) -> Claim | NoClaim:
    """Take a batch that was given back, split or lost, else cut the next one; in a short transaction of its own.

    ``passes`` is how many passes over the keys the job's kind has.
    """
    # A claim that a crash of the server takes back takes its cut with it: no need to wait for the disk.
    connection.exec_driver_sql("set local synchronous_commit = off")
    while True:
        job = get(connection, settings, job_id, lock=True)
        if job.state != "running" or job.held is not None:
            return NoClaim(job, ended=False)
        found = _waiting(connection, settings, job)
        if found is not None:
            return _taken(connection, settings, job, found, worker)
        cut = _cut(connection, settings, job)
        if cut is not None:
            return _taken(connection, settings, job, cut, worker)
        if _open(connection, settings, job_id):
            return NoClaim(job, ended=False)
        if job.job_pass >= passes:
            return NoClaim(job, ended=True)
        change(connection, settings, job_id, "pass = pass + 1, cursor = null, until_key = null")


def hold(connection: Connection, settings: Settings, claimed: Claim) -> None:
    """Lock the claimed batch for the rest of the transaction. Raises ClaimLost."""
    # A worker that was cut off from the server must not hold its rows for hours.
    found = connection.execute(
        text(
            f"select set_config('idle_in_transaction_session_timeout', '{_IDLE}', true) "
            f"from {table(settings, 'job_batches')} "
            "where job_id = :job and number = :number and token = :token and state = 'claimed' for no key update"
        ),
        claimed.identity,
    ).one_or_none()
    if found is None:
        raise ClaimLost


def complete(connection: Connection, settings: Settings, claimed: Claim, batch: Batch, seconds: float) -> Job:
    """Note the batch as done and add it to the job, in the transaction that did the work. Raises ClaimLost."""
    row = connection.execute(
        text(
            f"with b as (update {table(settings, 'job_batches')} set state = 'done', done = :done, failed = :failed, "
            "seconds = :seconds, error = null, at = clock_timestamp() "
            "where job_id = :job and number = :number and token = :token and state = 'claimed' returning job_id) "
            f"update {table(settings)} as j set items_done = items_done + :done, "
            "items_failed = items_failed + :failed, last_batch_seconds = :seconds, proven = true, alike = 0, "
            "updated_at = clock_timestamp(), details = details || jsonb_build_object('counts', ("
            "select coalesce(jsonb_object_agg(n.name, coalesce(cast(details -> 'counts' ->> n.name as numeric), 0) "
            "+ coalesce(cast(cast(:counts as jsonb) ->> n.name as numeric), 0)), '{}') from ("
            "select jsonb_object_keys(coalesce(details -> 'counts', '{}')) union "
            "select jsonb_object_keys(cast(:counts as jsonb))) as n (name))) "
            f"from b where j.id = b.job_id and j.state in ('running', 'paused', 'failed') returning {COLUMNS}"
        ),
        {
            **claimed.identity,
            "done": batch.done,
            "failed": batch.failed,
            "seconds": seconds,
            "counts": json.dumps(dict(batch.counts)),
        },
    ).one_or_none()
    if row is None:
        raise ClaimLost
    return job_of(row)


def give_back(connection: Connection, settings: Settings, claimed: Claim) -> None:
    """Let the next claim have the batch. Nothing, if it is somebody else's by now."""
    get(connection, settings, claimed.job.id, lock=True)
    connection.execute(
        text(
            f"update {table(settings, 'job_batches')} set state = 'pending', lease_until = null "
            "where job_id = :job and number = :number and token = :token and state = 'claimed'"
        ),
        claimed.identity,
    )


def lose(connection: Connection, settings: Settings, claimed: Claim) -> None:
    """Count a commit that was refused for its token."""
    give_back(connection, settings, claimed)
    change(connection, settings, claimed.job.id, "claims_lost = claims_lost + 1")


def _waiting(connection: Connection, settings: Settings, job: Job) -> Row[Any] | None:
    """A batch to be taken up again. Small ones first, so that one bad row is soon alone; as long as no batch has
    succeeded yet, in their order, so that good rows are soon met."""
    query = (
        f"select number, pass as batch_pass, after_key, upto_key, keys, attempts from {table(settings, 'job_batches')} "
        "where job_id = :id and (state = 'pending' or (state = 'claimed' and lease_until < clock_timestamp())) "
        "order by case when :proven then keys end, number limit 1 for no key update skip locked"
    )
    return connection.execute(text(query), {"id": job.id, "proven": job.proven}).one_or_none()


@dataclass(frozen=True)
class _Cut:
    """A batch that does not stand in the database yet."""

    batch_pass: int
    after_key: str | None
    upto_key: str
    keys: int
    until: str
    size: int
    attempts: int = 0


def _cut(connection: Connection, settings: Settings, job: Job) -> _Cut | None:
    until = job.until_key
    if until is None:
        until = connection.scalar(text(f"select {function(settings, job, 'last')}()"))
        if until is None:
            return None
    size = _size(connection, settings, job)
    late = job.job_pass > 1
    found = span(connection, settings, job, job.cursor, until, size * (LATE_FACTOR if late else 1))
    if not found.keys:
        return None
    return _Cut(job.job_pass, job.cursor, found.upto, found.keys, until, size)


def _size(connection: Connection, settings: Settings, job: Job) -> int:
    if job.options.batch_size is not None and job.options.rate is None:
        return job.options.batch_size
    query = (
        f"select seconds from {table(settings, 'job_batches')} "
        "where job_id = :id and state = 'done' and pass = :pass order by number desc limit 20"
    )
    seconds = list(connection.execute(text(query), {"id": job.id, "pass": job.job_pass}).scalars())
    size = job.options.size(job.batch_size, seconds)
    if job.options.rate is not None:
        # No more at once than a second's worth: a rate is no burst.
        size = min(size, max(1, int(job.options.rate / accounts_per_key(settings, job))))
    return size


_PACED: Final = (
    "claims = claims + 1, paced_until = case when cast(:rate as float8) is not null then "
    "greatest(paced_until, clock_timestamp()) + make_interval(secs => :accounts / cast(:rate as float8)) end"
)
_TOKEN: Final = (
    "returning id, batches, claims, coalesce(greatest(0, extract(epoch from paced_until - clock_timestamp()) "
    "- :accounts / cast(:rate as float8)), 0)::float8 as delay"
)
_LEASE: Final = "clock_timestamp() + make_interval(secs => j.delay + :lease)"


def _taken(connection: Connection, settings: Settings, job: Job, found: Row[Any] | _Cut, worker: str) -> Claim:
    """Note the claim with a token of its own, and its turn if there is a rate."""
    jobs, batches = table(settings), table(settings, "job_batches")
    values: dict[str, Any] = {
        "id": job.id,
        "rate": job.options.rate,
        "accounts": found.keys * accounts_per_key(settings, job) / (LATE_FACTOR if found.batch_pass > 1 else 1),
        "lease": job.options.lease_seconds,
        "worker": worker,
    }
    if isinstance(found, _Cut):
        values |= {"pass": found.batch_pass, "after": found.after_key, "upto": found.upto_key, "keys": found.keys}
        values |= {"until": found.until, "size": found.size}
        moved = "cursor = :upto, until_key = :until, batch_size = :size, batches = batches + 1"
        statement = (
            f"with j as (update {jobs} set {moved}, {_PACED} where id = :id {_TOKEN}), b as (insert into {batches} "
            "(job_id, number, pass, after_key, upto_key, keys, state, token, lease_until, worker, attempts) "
            f"select j.id, j.batches, :pass, :after, :upto, :keys, 'claimed', j.claims, {_LEASE}, :worker, 1 from j "
            "returning number, token) select b.number, b.token, j.delay from b, j"
        )
    else:
        values["number"] = found.number
        statement = (
            f"with j as (update {jobs} set {_PACED} where id = :id {_TOKEN}) update {batches} as b "
            "set state = 'claimed', token = j.claims, worker = :worker, attempts = attempts + 1, "
            f"lease_until = {_LEASE} from j where b.job_id = j.id and b.number = :number "
            "returning b.number, b.token, j.delay"
        )
    row = connection.execute(text(statement), values).one()
    return Claim(
        job=job,
        number=row.number,
        token=row.token,
        after=found.after_key,
        upto=found.upto_key,
        keys=found.keys,
        batch_pass=found.batch_pass,
        attempts=found.attempts + 1,
        delay=row.delay,
    )


def _open(connection: Connection, settings: Settings, job_id: int) -> bool:
    query = (
        f"select exists (select from {table(settings, 'job_batches')} "
        "where job_id = :id and state in ('pending', 'claimed'))"
    )
    return bool(connection.scalar(text(query), {"id": job_id}))
