"""A PostgreSQL server of its own that a test may stop and start again, at one and the same address."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url

import skips
from servers import SETTINGS, Postgres
from walletmigrate.embedded import Server


class Flaky:
    """The server. Its address is a link to the folder of the socket, which is another one after each start."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._data, self._link = binaries, folder / "data", folder / "socket"
        self._server: Server | None = None
        self.start()

    def start(self) -> None:
        """Start it where it is down."""
        if self._server is None:
            self._server = Server.start(self._binaries, data=self._data, persistent=True, settings=SETTINGS)
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(str(make_url(self._server.url).query["host"]))

    def stop(self) -> None:
        """Stop it, whoever is connected."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def create(self, name: str) -> str:
        """A new database's URL, which stays the same over a stop and a start."""
        self.start()
        assert self._server is not None
        url = make_url(self._server.create_database(name))
        return url.update_query_dict({"host": str(self._link)}).render_as_string(hide_password=False)


@contextmanager
def flaky(server: Postgres) -> Iterator[Flaky]:
    """A server of the same programs as ``server``."""
    if server.binaries is None:
        skips.skip("container")
    folder = Path(tempfile.mkdtemp(prefix="wm-flaky-"))
    folder.chmod(0o755)
    made = None
    try:
        made = Flaky(server.binaries, folder)
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)
