"""A database to try the commands on: a scratch server with a small legacy table, and files that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from walletmigrate import connect, schema
from walletmigrate.embedded import Server
from walletmigrate.errors import UsageError
from walletmigrate.starter import write_configuration

MARK = "# Made by `walletmigrate sandbox`: it is written anew by the next one."
TENANTS = ("acme", "globex", "initech")

_TABLE = """
create table public.users (
    id bigint generated always as identity primary key,
    tenant text not null,
    role text not null,
    total_coins numeric(12, 2) not null default 0,
    promo_coins integer not null default 0
) with (fillfactor = 70);

insert into public.users (tenant, role, total_coins, promo_coins)
select
    (array['acme', 'globex', 'initech'])[1 + g % 3],
    case when g % 50 = 0 then 'owner' else 'member' end,
    (g * 7919 % 100000) / 100.0,
    g % 20
from generate_series(1, {rows}) as g;
"""

_SETTINGS = """\
{mark}
# The database lives as long as the command runs. Nothing in it is worth anything: try whatever you like.

database_url = "{url}"
observation_window = "0s"   # gates look back over this; days where it matters, nothing in a sandbox

[[mappings]]
name = "users"
table = "public.users"
key = "id"
policy = "shadow"
traits = {{ tenant = "tenant", role = "role" }}

  [[mappings.columns]]
  bucket = "cash"
  column = "total_coins"
  currency = "EUR"
  scale = 2
  floor = "0"

  [[mappings.columns]]
  bucket = "promo"
  column = "promo_coins"
  currency = "EUR"
  scale = 0
  floor = "0"
"""


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox; an empty one has no files. No password: only this machine's user reaches the server."""

    url: str
    folder: Path | None
    config: Path | None
    rows: int
    postgres_version: str


@contextmanager
def sandbox(folder: Path | None, rows: int = 1000) -> Iterator[Sandbox]:
    """Run a scratch server with ``rows`` users of three tenants, and write files that fit it to ``folder``.

    Without a folder the database is empty, for an application that makes its tables itself. At the end server and
    data are gone; the files stay, and the next sandbox writes them anew. Raises UsageError when the folder has a
    configuration of somebody else's, EmbeddedUnavailable without a server.
    """
    config = folder / "walletmigrate.toml" if folder else None
    if config and config.exists() and not config.read_text(encoding="utf-8").startswith(MARK):
        raise UsageError(f"{config} was not made by a sandbox: name another folder")
    with Server.start() as server:
        url = server.create_database("app")
        if folder and config:
            _furnish(url, folder, config, rows)
        yield Sandbox(url, folder, config, rows if folder else 0, server.version)


def _furnish(url: str, folder: Path, config: Path, rows: int) -> None:
    """Make the legacy table, and the files."""
    engine = connect.engine(url, application_name="walletmigrate sandbox")
    with engine.begin() as connection:
        schema.run_script(connection, _TABLE.format(rows=rows))
    engine.dispose()
    # Flags of an earlier sandbox would say what this one has not come to.
    (folder / "flags" / "environment.json").unlink(missing_ok=True)
    write_configuration(config, _SETTINGS.format(mark=MARK, url=url), replace=True)
