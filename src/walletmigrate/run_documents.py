"""The documents of jobs and verifications, and what all reports of runs are put together from."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from walletmigrate import job_batches, verify_findings
from walletmigrate.config import Settings
from walletmigrate.corrections import recorded
from walletmigrate.documents import Chart, Document, Heading, Table, shown
from walletmigrate.errors import UnknownRun
from walletmigrate.schema import quoted

RUNS: Final = 200
"""How many verifications a report looks back on."""

_PLACE: Final = ("key", "bucket", "currency")
_AMOUNTS: Final = ("legacy_before", "legacy_after", "ledger_before", "ledger_after", "difference")


def scale_of(settings: Settings) -> int:
    """The most decimals that any column has; amounts of others show zeros behind theirs."""
    return max((column.scale for mapping in settings.mappings for column in mapping.columns), default=2)


def amounts_of(scale: int, *titles: str) -> tuple[Heading, ...]:
    """A heading of amounts for each title."""
    return tuple(Heading(title, "amount", scale) for title in titles)


def money_of(scale: int) -> tuple[Heading, ...]:
    """The headings of both sides."""
    return amounts_of(scale, "legacy", "ledger", "difference")


def facts_of(one: Any) -> tuple[tuple[str, str], ...]:
    """All fields of a dataclass as facts."""
    return written([(field.name, getattr(one, field.name)) for field in fields(one)])


def written(facts: list[tuple[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Facts as text, their names as words."""
    return tuple((name.replace("_", " "), shown(value, Heading(name))) for name, value in facts)


def of_job(connection: Connection, settings: Settings, number: int | None, charts: tuple[Chart, ...]) -> Document:
    """One job, its audit rows, and the accounts that it left as they are. Raises UnknownRun."""
    name = quoted(settings.ledger_schema)
    row = _found(
        connection,
        "select id, kind, mapping, state, actor, reason, version, items_total, items_done, items_failed, started_at, "
        f"updated_at, finished_at, details from {name}.jobs",
        "job",
        number,
    )
    facts = [(title, value) for title, value in row._mapping.items() if title != "details"]
    facts += [(title.replace("_", " "), value) for title, value in (row.details.get("counts") or {}).items()]
    facts += [("error", row.details["error"])] if "error" in row.details else []
    title = f"Job {row.id}: {row.kind}"
    tables = (_audit(connection, settings, row.id), _left(connection, settings, row))
    return Document(title, written(facts), tables, charts)


def _left(connection: Connection, settings: Settings, job: Row[Any]) -> Table:
    """What a reconciliation reported, refused or failed at, as far as it stands on record; and rows set aside."""
    items = [recorded(one) for one in job.details.get("items", [])]
    rows: list[tuple[Any, ...]] = [
        (
            *(one.outcome.replace("_", " "), one.key, one.bucket, one.currency),
            *(one.legacy_before, one.ledger_before, one.truth, one.difference, one.why),
        )
        for one in items
    ]
    # A reconciliation has put its own among the items when it came to its end.
    known = {one.key for one in items if one.outcome == "failed"}
    aside = [one for one in job_batches.set_aside(connection, settings, job.id) if one.key not in known]
    rows += [("set aside", one.key, *[None] * 6, one.reason) for one in aside]
    names = tuple(Heading(name) for name in ("outcome", *_PLACE))
    sides = amounts_of(scale_of(settings), "legacy", "ledger", "truth", "difference")
    return Table("Left as they are", (*names, *sides, Heading("why")), rows)


def _audit(connection: Connection, settings: Settings, job: int) -> Table:
    """The audit rows of a job, streamed; what one did to an account, and its amounts, in columns of their own."""
    name = quoted(settings.ledger_schema)
    amounts = ", ".join(f"case when x.moved then (a.details ->> '{each}')::numeric end" for each in _AMOUNTS)
    texts = ", ".join(f"case when x.moved then a.details ->> '{each}' end" for each in _PLACE)
    query = text(
        f"select a.at, a.action, a.actor, a.reason, a.mapping, {texts}, {amounts}, "
        "case when x.moved then (a.details ->> 'transaction_id')::bigint end, "
        # As PostgreSQL writes it: the driver would make floats of its numbers.
        "(case when x.moved then a.details - cast(:apart as text[]) else a.details end)::text "
        f"from {name}.audit_log as a cross join lateral (select a.details ?& cast(:place as text[]) "
        "and (a.action like 'reconcile %' or a.action in ('adjust', 'recalculate', 'set_balance', 'reverse')) as moved"
        ") as x where a.job_id = :job order by a.id"
    )
    values = {"job": job, "place": [*_PLACE], "apart": [*_PLACE, *_AMOUNTS, "transaction_id"]}
    titles = (*("action", "actor", "reason", "mapping"), *_PLACE)
    headings = (
        *(Heading("at", "time"), *map(Heading, titles)),
        *amounts_of(scale_of(settings), *(each.replace("_", " ") for each in _AMOUNTS)),
        *(Heading("transaction", "count"), Heading("details")),
    )
    return Table("Audit log", headings, map(tuple, connection.execute(query.execution_options(yield_per=2000), values)))


def of_verification(
    connection: Connection, settings: Settings, number: int | None, charts: tuple[Chart, ...]
) -> Document:
    """One verification, a row for each finding, and those before it. Raises UnknownRun."""
    name, scale = quoted(settings.ledger_schema), scale_of(settings)
    columns = "id, mapping, currency, form, started_at, finished_at, clean, complete, accounts, missing, drift_accounts"
    query = f"select {columns}, drift_amount, actor, details from {name}.verifications"
    row = _found(connection, query, "verification", number)
    facts = [(title, value) for title, value in row._mapping.items() if title != "details"]
    facts += [(f"findings: {kind}", said) for kind, said in verify_findings.left_out(row.details).items()]
    rest = [one for one in row.details.items() if one[0] not in (*verify_findings.KINDS, verify_findings.FOUND)]
    details = [(title, json.dumps(value, ensure_ascii=False)) for title, value in rest]
    counts = ("accounts", "missing", "drifted")
    headings = (
        *(Heading("run", "count"), Heading("finished at", "time"), Heading("clean")),
        *(Heading(title, "count") for title in counts),
        *(*amounts_of(scale, "drift"), Heading("actor")),
    )
    log = connection.execute(
        text(
            "select id, finished_at, clean, accounts, missing, drift_accounts, drift_amount, actor "
            f"from {name}.verifications where mapping = :mapping and currency = :currency and id <= :id "
            f"order by id desc limit {RUNS}"
        ),
        {"mapping": row.mapping, "currency": row.currency, "id": row.id},
    )
    tables = (
        _findings(row.details, scale),
        Table("Details", (Heading("what"), Heading("value")), details),
        Table(f"This run and the last {RUNS - 1} before it", headings, [tuple(one) for one in log]),
    )
    return Document(f"Verification {row.id} of {row.mapping}, {row.currency}", written(facts), tables, charts)


def _findings(details: dict[str, Any], scale: int) -> Table:
    """Each finding that is on record in a row of its own."""
    names = tuple(Heading(name) for name in ("kind", "key", "bucket", "currency"))
    sides = amounts_of(scale, "legacy", "ledger", "expected")
    rows = [
        (
            *(one.kind.replace("_", " "), one.key, one.bucket, one.currency, one.legacy, one.ledger, one.expected),
            *(one.state, one.problem if one.target is None else f"{one.problem}: {one.target}"),
        )
        for one in verify_findings.of_record(details)
    ]
    return Table("Findings", (*names, *sides, Heading("state"), Heading("problem")), rows)


def _found(connection: Connection, query: str, kind: str, number: int | None) -> Row[Any]:
    where = " where id = :id" if number is not None else ""
    row = connection.execute(text(f"{query}{where} order by id desc limit 1"), {"id": number}).one_or_none()
    if row is None:
        raise UnknownRun(kind, "at all" if number is None else str(number), "See: walletmigrate status")
    return row
