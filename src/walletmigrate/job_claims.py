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
from walletmigrate.job_batches import Claim, accounts_per_key, function, insert, span
from walletmigrate.job_options import FIRST_SIZE, SMOOTHED
from walletmigrate.job_rows import COLUMNS, Batch, Job, change, get, job_of, table

LATE_FACTOR: Final = 10
"""How many times larger the batches of a last pass are: nearly all of their rows are only looked at."""

IN_STEP: Final = 10
"""How many accounts that need nothing are as much work as one that is written."""

_IDLE: Final = "60s"


class ClaimLost(Exception):
    """Another worker has the batch, or the job was cancelled: what was done under the old token is rolled back."""


class AtRest(ClaimLost):
    """The job was taken out of work between the claim and its work, which does not begin then."""


@dataclass(frozen=True)
class NoClaim:
    """Nothing to be claimed: the job does not run, or is held, or has ``ended``, or others are at its last batches, or
    its rate has no room yet (``paced``).
    """

    job: Job
    ended: bool
    paced: bool = False


def claim(connection: Connection, settings: Settings, job_id: int, worker: str, passes: int = 1) -> Claim | NoClaim:
    """Take a batch that was given back, split or lost, else cut the next one; in a short transaction of its own.

    ``passes`` is how many passes over the keys the job's kind has.
    """
    # A claim that a crash of the server takes back takes its cut with it: no need to wait for the disk.
    connection.exec_driver_sql("set local synchronous_commit = off")
    while True:
        job = get(connection, settings, job_id, lock=True)
        # Who holds a job says so again and again; one that is stalled is held by a process that is gone.
        if job.state != "running" or (job.held is not None and not job.stalled):
            return NoClaim(job, ended=False)
        ahead = _ahead(connection, settings, job)
        most = job.options.burst(accounts_per_key(settings, job), -ahead)
        found = _waiting(connection, settings, job, most) or _cut(connection, settings, job, most)
        if found is not None:
            # Asked for again and again, and not slept through with a claim in the hand: a pause, a cancellation and
            # another rate hold within moments, however slow this one is.
            if ahead > 1:
                return NoClaim(job, ended=False, paced=True)
            return _taken(connection, settings, job, found, worker)
        if _open(connection, settings, job_id):
            return NoClaim(job, ended=False)
        if job.job_pass >= passes:
            return NoClaim(job, ended=True)
        change(connection, settings, job_id, "pass = pass + 1, cursor = null, until_key = null")


def hold(connection: Connection, settings: Settings, claimed: Claim) -> None:
    """Lock the claimed batch for the rest of the transaction. Raises ClaimLost, or AtRest where the job does not run.

    Who takes a claim back (`job_batches.rest`) has to change the row of the batch: what waited here for its lock looks
    at that row anew, and at no other.
    """
    # A worker that was cut off from the server must not hold its rows for hours. And no batch waits for the disk: one
    # that a crash of the server takes back takes its mark with it, and what others wrote on top of it came after it in
    # the log. Without it each batch would make the application's commits wait for its own flush.
    found = connection.execute(
        text(
            f"select set_config('idle_in_transaction_session_timeout', '{_IDLE}', true), "
            "set_config('synchronous_commit', 'off', true) "
            f"from {table(settings, 'job_batches')} "
            "where job_id = :job and number = :number and token = :token and state = 'claimed' "
            # A crash that takes a claim back gives its number and its token to the next one.
            "and after_key is not distinct from :after and upto_key = :upto "
            # It may have slept for its rate meanwhile.
            f"and exists (select from {table(settings)} where id = :job and state = 'running') for no key update"
        ),
        {**claimed.identity, "after": claimed.after, "upto": claimed.upto},
    ).one_or_none()
    if found is None:
        raise ClaimLost if get(connection, settings, claimed.job.id).state == "running" else AtRest


def complete(connection: Connection, settings: Settings, claimed: Claim, batch: Batch, seconds: float) -> Job:
    """Note the batch as done and add it to the job, in the transaction that did the work. Raises ClaimLost."""
    row = connection.execute(
        text(
            f"with b as (update {table(settings, 'job_batches')} set state = 'done', done = :done, failed = :failed, "
            "seconds = :seconds, error = null, at = clock_timestamp() "
            "where job_id = :job and number = :number and token = :token and state = 'claimed' returning job_id) "
            f"update {table(settings)} as j set items_done = items_done + :done, "
            "items_failed = items_failed + :failed, last_batch_seconds = :seconds, proven = true, alike = 0, "
            # What it took longer than its share is gone: a server that is slow is not asked for more at once. What it
            # has left is the next one's.
            "paced_until = case when paced_until is not null then "
            "greatest(paced_until, clock_timestamp()) - make_interval(secs => :unused) end, "
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
            "unused": _unused(settings, claimed, batch),
        },
    ).one_or_none()
    if row is None:
        raise ClaimLost
    return job_of(row)


def _charge(settings: Settings, job: Job, found: Claim | Row[Any] | _Cut) -> float:
    """The accounts that a batch is thought to write, until it is known: all, and in a last pass few."""
    return float(found.keys * accounts_per_key(settings, job)) / (LATE_FACTOR if found.batch_pass > 1 else 1)


def _unused(settings: Settings, claimed: Claim, batch: Batch) -> float:
    """The seconds of its rate that a batch has not used up, as it found accounts that needed nothing: the lock of their
    row is a tenth of the work. Negative if it wrote more than was thought.
    """
    rate = claimed.job.options.rate
    if rate is None or batch.written is None:
        return 0.0
    in_step = max(0, claimed.keys * accounts_per_key(settings, claimed.job) - batch.written)
    return (_charge(settings, claimed.job, claimed) - batch.written - in_step / IN_STEP) / rate


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


def _waiting(connection: Connection, settings: Settings, job: Job, most: int | None) -> Row[Any] | None:
    """A batch to be taken up again. Small ones first, so that one bad row is soon alone; as long as no batch has
    succeeded yet, in their order, so that good rows are soon met."""
    query = (
        f"select number, pass as batch_pass, after_key, upto_key, keys, attempts from {table(settings, 'job_batches')} "
        "where job_id = :id and (state = 'pending' or (state = 'claimed' and lease_until < clock_timestamp())) "
        "order by case when :proven then keys end, number limit 1 for no key update skip locked"
    )
    found = connection.execute(text(query), {"id": job.id, "proven": job.proven}).one_or_none()
    if found is None or most is None:
        return found
    most *= LATE_FACTOR if found.batch_pass > 1 else 1
    return found if found.keys <= most else _part(connection, settings, job, found, most)


def _part(connection: Connection, settings: Settings, job: Job, found: Row[Any], most: int) -> Row[Any]:
    """The first keys of a batch that was cut before there was this rate; the rest waits."""
    upto = span(connection, settings, job, found.after_key, found.upto_key, most).upto
    if upto is None or upto == found.upto_key:
        return found
    connection.execute(
        text(
            f"update {table(settings, 'job_batches')} set state = 'pending', lease_until = null, after_key = :upto, "
            "keys = keys - :most where job_id = :id and number = :number"
        ),
        {"id": job.id, "number": found.number, "upto": upto, "most": most},
    )
    return insert(connection, settings, job, found.batch_pass, found.after_key, upto, most)


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


def _cut(connection: Connection, settings: Settings, job: Job, most: int | None) -> _Cut | None:
    until = job.until_key
    if until is None:
        until = connection.scalar(text(f"select {function(settings, job, 'last')}()"))
        if until is None:
            return None
    size = _size(connection, settings, job, most)
    late = job.job_pass > 1
    found = span(connection, settings, job, job.cursor, until, size * (LATE_FACTOR if late else 1))
    if not found.keys:
        return None
    return _Cut(job.job_pass, job.cursor, found.upto, found.keys, until, size)


def _size(connection: Connection, settings: Settings, job: Job, most: int | None) -> int:
    if job.options.batch_size is not None and job.options.rate is None:
        return job.options.batch_size
    # Not of parts and halves of a batch, which say nothing of a whole one: while a bad row is sought, the size would
    # grow with each.
    query = (
        f"select seconds from {table(settings, 'job_batches')} "
        "where job_id = :id and state = 'done' and pass = :pass and keys * 2 > :whole order by number desc limit :many"
    )
    whole = (job.batch_size or FIRST_SIZE) * (LATE_FACTOR if job.job_pass > 1 else 1)
    values = {"id": job.id, "pass": job.job_pass, "whole": whole, "many": SMOOTHED}
    seconds = list(connection.execute(text(query), values).scalars())
    size = job.options.size(job.batch_size, seconds)
    return size if most is None else min(size, most)


def _ahead(connection: Connection, settings: Settings, job: Job) -> float:
    """The seconds from now on that what was claimed takes at the job's rate; below 0 what was done has left of it."""
    if job.options.rate is None:
        return 0.0
    query = f"select extract(epoch from paced_until - clock_timestamp()) from {table(settings)} where id = :id"
    return float(connection.scalar(text(query), {"id": job.id}) or 0)


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
        "accounts": _charge(settings, job, found),
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
