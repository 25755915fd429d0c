"""Every reason for which a test is not run; CONTRIBUTING.md lists them, and a test holds the two together.

Nothing else in the tests skips. What can be installed is not a reason in CI: with ``CI=true`` such a test fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final, NoReturn

import pytest


@dataclass(frozen=True)
class Reason:
    """``why`` a test cannot run here, and what to do about it; ``installable`` says whether CI has to have it."""

    why: str
    mend: str
    installable: bool = False


REASONS: Final = {
    "program": Reason(
        "PgBouncer, Prometheus or Alertmanager is not on the PATH and cannot be fetched",
        "install Debian's packages `pgbouncer`, `prometheus`, `prometheus-alertmanager`",
        installable=True,
    ),
    "pg_basebackup": Reason(
        "the server's programs lack `pg_basebackup`",
        "install PostgreSQL's client programs of the same version, or name a server that has them",
        installable=True,
    ),
    "dask": Reason(
        "the extra `dask` is not installed", "`.venv/bin/pip install -c constraints.txt -e '.[dev]'`", installable=True
    ),
    "container": Reason(
        "the server runs in a container, and its programs are not here", "name one without `docker:`: `--postgres 16`"
    ),
    "data": Reason(
        "the file of real bank transactions is not part of the repository", "`WALLETMIGRATE_SHARED_DATA=/path/to/data`"
    ),
    "root": Reason("only root can start a server under another account", "run the tests as root"),
    "fork": Reason("the system has no `fork`", "run the tests on Linux or macOS"),
    "icu": Reason(
        "only ICU has nondeterministic collations, and this PostgreSQL was built without it",
        "name a server with ICU; Debian's have it",
    ),
    "not valid": Reason("NOT NULL can be NOT VALID from PostgreSQL 18 on", "`--postgres 18`"),
}


def skip(reason: str, detail: str = "") -> NoReturn:
    """End the test for one of `REASONS`; ``detail`` says more of what was looked for."""
    known = REASONS[reason]
    told = f"{known.why}{f' ({detail})' if detail else ''}; {known.mend}"
    if known.installable and os.environ.get("CI") == "true":
        pytest.fail(told)
    pytest.skip(told)


def unless(condition: bool, reason: str) -> pytest.MarkDecorator:
    """Skip the marked test for one of `REASONS` that nobody can install, unless the condition holds."""
    known = REASONS[reason]
    assert not known.installable, "in CI this must fail, and a mark cannot"
    return pytest.mark.skipif(not condition, reason=f"{known.why}; {known.mend}")
