"""SQL that tells which of its guards a test can miss: those whose condition came out otherwise than the mutant's."""

from __future__ import annotations

import hashlib

from mutants.guards import TEMPLATES, Guard, guards

PREPARE = """
create schema if not exists mutants;
grant usage on schema mutants to public;
create or replace function mutants.reached(guard text, value boolean, mutant boolean)
returns boolean language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_known text := 'mutants.g' || guard;
begin
    if value is distinct from mutant and coalesce(current_setting(v_known, true), '') = '' then
        perform set_config(v_known, 'x', false);
        raise log 'GUARD % REACHED', guard;
    end if;
    return value;
end
$$;
"""
"""Run once in a server's template database."""


def digest(guard: str) -> str:
    """A guard's id as it stands in the log."""
    return hashlib.sha256(guard.encode()).hexdigest()[:16]


def instrumented(name: str, source: str) -> str:
    """A template that notes what is reached. What is no condition and no statement counts with its function."""
    if name not in TEMPLATES:
        return source
    marks: list[tuple[int, int, int, str]] = []
    for guard in guards(name, source):
        mark = digest(guard.id)
        if guard.place.endswith(".schema") or (name == "ledger" and "fold" not in guard.place):
            continue
        if guard.literal in ("true", "false"):
            marks += _around(guard, f"mutants.reached('{mark}', (", f"), {guard.literal})")
        elif guard.kind == "statement":
            marks.append((guard.start, 1, -guard.end, f"assert mutants.reached('{mark}', true, false); "))
    for position, _, _, text in sorted(marks, reverse=True):
        source = source[:position] + text + source[position:]
    return source


def _around(guard: Guard, before: str, after: str) -> list[tuple[int, int, int, str]]:
    """Of operands that begin alike the longer opens first; of those that end alike it closes last."""
    return [(guard.start, 1, -guard.end, before), (guard.end, 0, -guard.start, after)]
