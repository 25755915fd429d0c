"""The batches of a job, as they stand in the table ``job_batches``: cut, split, set aside, taken up again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

from walletmigrate import connect
from walletmigrate.config import Settings
from walletmigrate.errors import PreconditionRefused
from walletmigrate.job_rows import Job, begin, change, get, table
from walletmigrate.schema import quoted

FIRST_FAILURES: Final = 10
"""How many batches may fail alike before the first one succeeds: then it is not the rows, and the job fails."""

_LOCKED: Final = "55P03"
"""SQLSTATE of a lock that was not had in time."""


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
        insert(connection, settings, job, claimed.batch_pass, claimed.after, claimed.upto, keys)
        return f"the first {job.alike} batches failed for the same reason: {reason}"
    if keys == 1:
        return _set_aside(connection, settings, claimed, reason)
    if keys:
        middle = span(connection, settings, job, claimed.after, claimed.upto, keys // 2).upto
        insert(connection, settings, job, claimed.batch_pass, claimed.after, middle, keys // 2)
        insert(connection, settings, job, claimed.batch_pass, middle, claimed.upto, keys - keys // 2)
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


def rest(engine: Engine, settings: Settings, job_id: int, step: str) -> None:
    """Once this returns, nothing more is done for a job that does not run: for what takes its work back.

    Claims whose work has not begun are taken from their workers; batches at work are waited for, as long as the
    engine's sessions wait for a lock. PreconditionRefused, for ``step``, if one lasts longer.
    """
    batches = table(settings, "job_batches")
    claimed = text(f"select number from {batches} where job_id = :id and state = 'claimed' order by number")
    with begin(engine) as connection:
        numbers = list(connection.execute(claimed, {"id": job_id}).scalars())
    taken = text(
        f"update {batches} set state = 'pending', lease_until = null "
        "where job_id = :id and number = :number and state = 'claimed'"
    )
    # Each in a transaction of its own: who waits for the lock of one keeps none that a worker could wait for.
    for number in numbers:
        try:
            with begin(engine) as connection:
                connection.execute(taken, {"id": job_id, "number": number})
        except DBAPIError as error:
            if connect.sqlstate(error) != _LOCKED:
                raise
            reason = (f"a batch of job {job_id} is still at work", f"walletmigrate jobs show {job_id}")
            raise PreconditionRefused(step, [reason]) from error


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


def insert(
    connection: Connection, settings: Settings, job: Job, batch_pass: int, after: str | None, upto: str, keys: int
) -> Row[Any]:
    """Put a batch that waits to be claimed into the table."""
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


def span(connection: Connection, settings: Settings, job: Job, after: str | None, until: str, limit: int) -> Row[Any]:
    """Where at most ``limit`` keys behind ``after`` end, not beyond ``until``: (upto, keys)."""
    query = (
        f"select upto, keys from {function(settings, job, 'cut')}(cast(:after as text), cast(:until as text), :limit)"
    )
    return connection.execute(text(query), {"after": after, "until": until, "limit": limit}).one()


def function(settings: Settings, job: Job, name: str) -> str:
    """One of the functions made for the job's mapping."""
    return f"{quoted(settings.ledger_schema)}.{quoted(f'{name}_{job.mapping}')}"


def accounts_per_key(settings: Settings, job: Job) -> int:
    """How many accounts a legacy row has."""
    return len(settings.mapping(job.mapping).columns)


def _count(connection: Connection, settings: Settings, job: Job, after: str | None, upto: str) -> int:
    return int(span(connection, settings, job, after, upto, 2**31 - 1).keys)


def _set_aside(connection: Connection, settings: Settings, claimed: Claim, reason: str) -> str | None:
    job = claimed.job
    accounts = accounts_per_key(settings, job)
    key = span(connection, settings, job, claimed.after, claimed.upto, 1).upto
    row = insert(connection, settings, job, claimed.batch_pass, claimed.after, key, 1)
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
