"""Functions without one of their guards, in a database that is installed already."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Engine, text


@dataclass(frozen=True)
class Mutant:
    """A guard: the functions it stands in, a pattern of the text that is it, and what is put there."""

    functions: tuple[str, ...]
    guard: str
    replacement: str


ACCOUNT_LOCKS = Mutant(("fence_users", "side_users"), r"for no key update( of \w+)?", "")
PROBE = Mutant(("probe_account",), r"in \('read committed', 'read uncommitted'\)", "is not null")


def remove(engine: Engine, mutant: Mutant) -> None:
    """Make the functions anew without the guard; every one of them must have had it."""
    with engine.begin() as connection:
        connection.exec_driver_sql("set local search_path = pg_catalog, wallet, pg_temp")
        for name in mutant.functions:
            source = connection.scalar(
                text("select pg_get_functiondef(oid) from pg_proc where proname = :name and prokind = 'f'"),
                {"name": name},
            )
            mutated, count = re.subn(mutant.guard, mutant.replacement, source)
            assert count
            connection.exec_driver_sql(mutated, execution_options={"no_parameters": True})
