"""The batches of a job, as they stand in the table ``job_batches``: cut, claimed, done, split, set aside.

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
from walletmigrate.job_rows import Batch, Job, change, get, table
from walletmigrate.schema import quoted

FIRST_FAILURES: Final = 10
"""How many batches may fail alike before the first one succeeds: then it is not the rows, and the job fails."""

LATE_FACTOR: Final = 10
"""How many times larger the batches of a last pass are: nearly all of their rows are only looked at."""

_IDLE: Final = "60s"
_COMMITTABLE: Final = ("running", "paused", "failed")


class ClaimLost(Exception):
    """Another worker has the batch, or the job was cancelled: what was done under the old token is rolled back."""


@dataclass(frozen=True)
class Claim:
    """A batch that is this worker's: the keys k with ``after`` < k <= ``upto``, to be begun in ``delay`` seconds."""

    job: Job
    number: int
    token: int
    after: str | None
    upto: str
    keys: int
    batch_pass: int
    attempts: int
    delay: float = 0.0

    @property
    def identity(self) -> dict[str, int]:
        """What a commit has to match."""
        return {"job": self.job.id, "number": self.number, "token": self.token}


@dataclass(frozen=True)
class NoClaim:
    """Nothing to be claimed: the job does not run, or has ``ended``, or others are at its last batches."""

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
        if job.state != "running":
            return NoClaim(job, ended=False)
        found = _waiting(connection, settings, job) or _cut(connection, settings, job)
        if found is not None:
            return _taken(connection, settings, job, found, worker)
        if _open(connection, settings, job_id):
            return NoClaim(job, ended=False)
        if job.job_pass >= passes:
            return NoClaim(job, ended=True)
        change(connection, settings, job_id, "pass = pass + 1, cursor = null, until_key = null")


def hold(connection: Connection, settings: Settings, claimed: Claim) -> None:
    """Lock the claimed batch for the rest of the transaction. Raises ClaimLost."""
    # A worker that was cut off from the server must not hold its rows for hours.
    connection.exec_driver_sql(f"set local idle_in_transaction_session_timeout = '{_IDLE}'")
    found = connection.execute(
        text(
            f"select 1 from {table(settings, 'job_batches')} "
            "where job_id = :job and number = :number and token = :token and state = 'claimed' for no key update"
        ),
        claimed.identity,
    ).one_or_none()
    if found is None:
        raise ClaimLost


def complete(connection: Connection, settings: Settings, claimed: Claim, batch: Batch, seconds: float) -> Job:
    """Note the batch as done and add it to the job, in the transaction that did the work. Raises ClaimLost."""
    job = get(connection, settings, claimed.job.id, lock=True)
    done = connection.execute(
        text(
            f"update {table(settings, 'job_batches')} set state = 'done', done = :done, failed = :failed, "
            "seconds = :seconds, error = null, at = clock_timestamp() "
            "where job_id = :job and number = :number and token = :token and state = 'claimed'"
        ),
        {**claimed.identity, "done": batch.done, "failed": batch.failed, "seconds": seconds},
    ).rowcount
    if not done or job.state not in _COMMITTABLE:
        raise ClaimLost
    counts = dict(job.counts)
    for name, value in batch.counts.items():
        counts[name] = counts.get(name, 0) + value
    return change(
        connection,
        settings,
        job.id,
        "items_done = items_done + :done, items_failed = items_failed + :failed, last_batch_seconds = :seconds, "
        "proven = true, alike = 0, held = null, held_at = null, updated_at = clock_timestamp(), "
        "details = details || jsonb_build_object('counts', cast(:counts as jsonb))",
        done=batch.done,
        failed=batch.failed,
        seconds=seconds,
        counts=json.dumps(counts),
    )


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


def fail(connection: Connection, settings: Settings, claimed: Claim, reason: str) -> str | None:
    """Split a batch that failed in halves, or set its only row aside; why the whole job must stop, else None."""
    job = get(connection, settings, claimed.job.id, lock=True)
    held = connection.execute(
        text(
            f"delete from {table(settings, 'job_batches')} "
            "where job_id = :job and number = :number and token = :token and state = 'claimed'"
        ),
        claimed.identity,
    ).rowcount
    if not held:
        return None
    job = change(
        connection,
        settings,
        job.id,
        "alike = case when proven then 0 when last_error = :reason then alike + 1 else 1 end, last_error = :reason",
        reason=reason,
    )
    keys = _count(connection, settings, job, claimed.after, claimed.upto)
    if job.alike >= FIRST_FAILURES:
        _insert(connection, settings, job, claimed.batch_pass, claimed.after, claimed.upto, keys)
        return f"the first {job.alike} batches failed for the same reason: {reason}"
    if keys == 1:
        return _set_aside(connection, settings, claimed, reason)
    if keys:
        middle = _next(connection, settings, job, claimed.after, claimed.upto, keys // 2).upto
        _insert(connection, settings, job, claimed.batch_pass, claimed.after, middle, keys // 2)
        _insert(connection, settings, job, claimed.batch_pass, middle, claimed.upto, keys - keys // 2)
    return None


def revive(connection: Connection, settings: Settings, job: Job, *, aside: bool) -> None:
    """At a start: leases of earlier runs end at once, and ``aside``, what was set aside is tried again."""
    batches = table(settings, "job_batches")
    connection.execute(
        text(
            f"update {batches} set attempts = 0, "
            "lease_until = case when state = 'claimed' then clock_timestamp() end "
            "where (job_id, number) in ("
            f"select job_id, number from {batches} where job_id = :id and state in ('pending', 'claimed') "
            "for no key update skip locked)"
        ),
        {"id": job.id},
    )
    if not aside:
        return
    again = connection.execute(
        text(f"update {batches} set state = 'pending' where job_id = :id and state = 'set_aside' returning failed"),
        {"id": job.id},
    )
    failed = sum(row.failed for row in again)
    changes = "proven = false, alike = 0, last_error = null, items_failed = greatest(items_failed - :failed, 0)"
    change(connection, settings, job.id, changes, failed=failed)


def set_aside(connection: Connection, settings: Settings, job_id: int) -> list[Row[Any]]:
    """The rows that a job has set aside, as (key, reason, attempts, at)."""
    query = (
        f"select upto_key as key, error as reason, attempts, at from {table(settings, 'job_batches')} "
        "where job_id = :id and state = 'set_aside' order by number"
    )
    return list(connection.execute(text(query), {"id": job_id}))


def clear(connection: Connection, settings: Settings, job_id: int) -> None:
    """Drop the batches of a job that is done; what was set aside stays."""
    query = f"delete from {table(settings, 'job_batches')} where job_id = :id and state = 'done'"
    connection.execute(text(query), {"id": job_id})


def _waiting(connection: Connection, settings: Settings, job: Job) -> Row[Any] | None:
    """A batch to be taken up again. Small ones first, so that one bad row is soon alone; as long as no batch has
    succeeded yet, in their order, so that good rows are soon met."""
    query = (
        f"select number, pass as batch_pass, after_key, upto_key, keys, attempts from {table(settings, 'job_batches')} "
        "where job_id = :id and (state = 'pending' or (state = 'claimed' and lease_until < clock_timestamp())) "
        "order by case when :proven then keys end, number limit 1 for no key update skip locked"
    )
    return connection.execute(text(query), {"id": job.id, "proven": job.proven}).one_or_none()


def _cut(connection: Connection, settings: Settings, job: Job) -> Row[Any] | None:
    until = job.until_key
    if until is None:
        until = connection.scalar(text(f"select {_function(settings, job, 'last')}()"))
        if until is None:
            return None
    size = _size(connection, settings, job)
    late = job.job_pass > 1
    found = _next(connection, settings, job, job.cursor, until, size * (LATE_FACTOR if late else 1))
    if not found.keys:
        return None
    changed = "cursor = :cursor, until_key = :until, batch_size = :size"
    change(connection, settings, job.id, changes=changed, cursor=found.upto, until=until, size=size)
    return _insert(connection, settings, job, job.job_pass, job.cursor, found.upto, found.keys)


def _size(connection: Connection, settings: Settings, job: Job) -> int:
    query = (
        f"select seconds from {table(settings, 'job_batches')} "
        "where job_id = :id and state = 'done' and pass = :pass order by number desc limit 20"
    )
    seconds = list(connection.execute(text(query), {"id": job.id, "pass": job.job_pass}).scalars())
    size = job.options.size(job.batch_size, seconds)
    if job.options.rate is not None:
        # No more at once than a second's worth: a rate is no burst.
        size = min(size, max(1, int(job.options.rate / _accounts_per_key(settings, job))))
    return size


def _taken(connection: Connection, settings: Settings, job: Job, found: Row[Any], worker: str) -> Claim:
    accounts = found.keys * _accounts_per_key(settings, job) / (LATE_FACTOR if found.batch_pass > 1 else 1)
    row = connection.execute(
        text(
            f"update {table(settings)} set claims = claims + 1, "
            "paced_until = case when cast(:rate as float8) is null then null "
            "else greatest(paced_until, clock_timestamp()) + make_interval(secs => :accounts / cast(:rate as float8)) "
            "end where id = :id "
            "returning claims, coalesce(greatest(0, extract(epoch from paced_until - clock_timestamp()) "
            "- :accounts / cast(:rate as float8)), 0)::float8 as delay"
        ),
        {"id": job.id, "rate": job.options.rate, "accounts": float(accounts)},
    ).one()
    connection.execute(
        text(
            f"update {table(settings, 'job_batches')} set state = 'claimed', token = :token, worker = :worker, "
            "attempts = attempts + 1, lease_until = clock_timestamp() + make_interval(secs => :lease) "
            "where job_id = :id and number = :number"
        ),
        {
            "id": job.id,
            "number": found.number,
            "token": row.claims,
            "worker": worker,
            "lease": row.delay + job.options.lease_seconds,
        },
    )
    return Claim(
        job=job,
        number=found.number,
        token=row.claims,
        after=found.after_key,
        upto=found.upto_key,
        keys=found.keys,
        batch_pass=found.batch_pass,
        attempts=found.attempts + 1,
        delay=row.delay,
    )


def _set_aside(connection: Connection, settings: Settings, claimed: Claim, reason: str) -> str | None:
    job = claimed.job
    accounts = _accounts_per_key(settings, job)
    key = _next(connection, settings, job, claimed.after, claimed.upto, 1).upto
    row = _insert(connection, settings, job, claimed.batch_pass, claimed.after, key, 1)
    connection.execute(
        text(
            f"update {table(settings, 'job_batches')} set state = 'set_aside', failed = :failed, error = :reason, "
            "attempts = :attempts, at = clock_timestamp() where job_id = :id and number = :number"
        ),
        {"id": job.id, "number": row.number, "failed": accounts, "reason": reason, "attempts": claimed.attempts},
    )
    changes = "items_failed = items_failed + :failed, updated_at = clock_timestamp()"
    change(connection, settings, job.id, changes, failed=accounts)
    aside = len(set_aside(connection, settings, job.id))
    if aside > job.options.max_failures:
        return f"{aside} rows were set aside, more than max-failures={job.options.max_failures}; the last for: {reason}"
    return None


def _open(connection: Connection, settings: Settings, job_id: int) -> bool:
    query = (
        f"select exists (select from {table(settings, 'job_batches')} "
        "where job_id = :id and state in ('pending', 'claimed'))"
    )
    return bool(connection.scalar(text(query), {"id": job_id}))


def _insert(
    connection: Connection, settings: Settings, job: Job, batch_pass: int, after: str | None, upto: str, keys: int
) -> Row[Any]:
    numbered = f"with numbered as (update {table(settings)} set batches = batches + 1 where id = :id returning batches)"
    return connection.execute(
        text(
            f"{numbered} insert into {table(settings, 'job_batches')} "
            "(job_id, number, pass, after_key, upto_key, keys, state) "
            "select :id, batches, :pass, :after, :upto, :keys, 'pending' from numbered "
            "returning number, pass as batch_pass, after_key, upto_key, keys, attempts"
        ),
        {"id": job.id, "pass": batch_pass, "after": after, "upto": upto, "keys": keys},
    ).one()


def _next(connection: Connection, settings: Settings, job: Job, after: str | None, until: str, limit: int) -> Row[Any]:
    query = (
        f"select upto, keys from {_function(settings, job, 'cut')}(cast(:after as text), cast(:until as text), :limit)"
    )
    return connection.execute(text(query), {"after": after, "until": until, "limit": limit}).one()


def _count(connection: Connection, settings: Settings, job: Job, after: str | None, upto: str) -> int:
    return int(_next(connection, settings, job, after, upto, 2**31 - 1).keys)


def _function(settings: Settings, job: Job, name: str) -> str:
    return f"{quoted(settings.ledger_schema)}.{quoted(f'{name}_{job.mapping}')}"


def _accounts_per_key(settings: Settings, job: Job) -> int:
    return len(settings.mapping(job.mapping).columns)
