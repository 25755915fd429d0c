"""Steps of an operator, with whichever release stands first on the module search path; JSON on standard output."""

from __future__ import annotations

import json
import sys
from typing import Any

from sqlalchemy.pool import NullPool

import ledger
from walletmigrate import StaticSource, connect, doctor, fences, functions
from walletmigrate.audit import Act
from walletmigrate.backfill import backfill
from walletmigrate.errors import WalletMigrateError
from walletmigrate.install import install
from walletmigrate.report import status
from walletmigrate.verify import verify

ACT = Act("tests", "a deploy")


def step(url: str, name: str) -> Any:
    """What came of it; for an error its type, exit code and words."""
    settings = ledger.users_settings(url)
    engine = connect.engine(url, application_name="tool", poolclass=NullPool)
    mapping = settings.mapping(None)
    try:
        match name:
            case "install":
                return install(engine, settings, ACT).revision
            case "mode":
                return fences.set_mode(engine, settings, mapping, "mirror", ACT).after
            case "backfill":
                return backfill(engine, settings, mapping, ACT).opened
            case "verify":
                return verify(engine, settings, mapping, ACT).clean
            case "doctor":
                with engine.connect() as connection:
                    return [one.what for one in doctor.examine(connection, settings)]
            case "status":
                return status(engine, settings, StaticSource({})).phase
    except WalletMigrateError as error:
        return [type(error).__name__, error.exit_code, str(error)]
    raise AssertionError(name)


if __name__ == "__main__":
    url, *names = sys.argv[1:]
    sys.stdout.write(json.dumps([functions.FUNCTIONS_VERSION, *(step(url, name) for name in names)]) + "\n")
