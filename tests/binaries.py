"""Programs of Debian packages that some tests run: found on the PATH, or fetched into the checkout.

Fetching is ``apt-get download`` and ``dpkg-deb -x``: no root, nothing installed, no service started.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import skips

CACHE = Path(__file__).resolve().parent.parent / ".packages"
"""Git-ignored, and kept from one run to the next."""

_SECONDS = 120
_FOLDERS = ("usr/bin", "usr/sbin", "bin", "sbin")
_PLACES = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))


@dataclass(frozen=True)
class Program:
    """A program to run; ``libraries`` are folders of shared libraries that this machine lacks."""

    path: Path
    libraries: tuple[Path, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What the program's process needs, and nothing of this process's own."""
        found = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, self.libraries))} if self.libraries else {}
        return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", **found}


class Unavailable(Exception):
    """The program is not here, and cannot be fetched; the text says why."""


def program(package: str, name: str) -> Program:
    """Give program ``name`` of Debian's ``package``; where there is none the test skips, in CI it fails."""
    made = _once(package, name)
    if isinstance(made, str):
        skips.skip("program", f"there is no {name}: {made}; it is in Debian's package {package}")
    return made


@cache
def _once(package: str, name: str) -> Program | str:
    """The program, or why there is none: what failed is not tried again for every test."""
    try:
        return found(package, name)
    except Unavailable as error:
        return str(error)


def found(package: str, name: str, *, places: str = _PLACES, folder: Path = CACHE) -> Program:
    """The program on one of ``places``, else from the package, fetched by one process at a time.

    Raises Unavailable.
    """
    here = shutil.which(name, path=places)
    if here is not None:
        return Program(Path(here))
    with _alone(folder):
        root = folder / package
        if not root.is_dir():
            unfinished = folder / f"{package}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _fetch(package, name, unfinished, folder, places)
            for rest in ("archives", "lists", "cache"):
                shutil.rmtree(folder / rest, ignore_errors=True)
            unfinished.rename(root)
    return _inside(root, name)


def _fetch(package: str, name: str, root: Path, folder: Path, places: str) -> None:
    root.mkdir()
    archive = _download(package, folder, places)
    _unpack(archive, root, places)
    for library in _libraries(archive, places) if _missing(_inside(root, name)) else ():
        _unpack(_download(library, folder, places), root, places)
    still = _missing(_inside(root, name))
    if still:
        raise Unavailable(f"it lacks {', '.join(still)}")


def _download(package: str, folder: Path, places: str) -> Path:
    """The package's archive. Without package lists, or with old ones, lists of our own are made first."""
    target = folder / "archives"
    target.mkdir(exist_ok=True)
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    own = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=true"]
    options = ["APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    try:
        _run(["apt-get", *_set(options), "download", package], target, places)
    except Unavailable:
        options += own
        _run(["apt-get", *_set(options), "update"], target, places)
        _run(["apt-get", *_set(options), "download", package], target, places)
    return max(target.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime_ns)


def _set(options: list[str]) -> list[str]:
    return [word for option in options for word in ("-o", option)]


def _unpack(archive: Path, root: Path, places: str) -> None:
    _run(["dpkg-deb", "-x", str(archive), str(root)], root, places)


def _libraries(archive: Path, places: str) -> tuple[str, ...]:
    """The packages of shared libraries that the archive depends on and that are not installed."""
    depends = _run(["dpkg-deb", "-f", str(archive), "Depends"], archive.parent, places)
    names = re.findall(r"(?:^|,\s*)(lib(?!js-)[a-z0-9.+-]+)", depends)
    return tuple(name for name in names if not _installed(name, places))


def _installed(package: str, places: str) -> bool:
    try:
        status = _run(["dpkg-query", "-W", "-f", "${Status}", package], Path("/"), places)
    except Unavailable:
        return False
    return status.endswith(" installed")


def _missing(made: Program) -> list[str]:
    """The shared libraries that the program would not find."""
    said = subprocess.run(
        ["ldd", str(made.path)], capture_output=True, text=True, env=made.environment, timeout=_SECONDS, check=False
    )
    return re.findall(r"(\S+) => not found", said.stdout)


def _inside(root: Path, name: str) -> Program:
    for folder in _FOLDERS:
        path = root / folder / name
        if path.is_file():
            libraries = {one.parent for one in root.glob("**/*.so.*")}
            return Program(path, tuple(sorted(libraries)))
    raise Unavailable(f"the package in {root} has no program {name}")


def _run(command: list[str], folder: Path, places: str) -> str:
    words = shutil.which(command[0], path=places)
    if words is None:
        raise Unavailable(f"this machine has no {command[0]}")
    environment = {**os.environ, "PATH": places, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [words, *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command)} took more than {_SECONDS} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no words").splitlines()[-1]
        raise Unavailable(f"{' '.join(command[:1] + command[-2:])}: {last}")
    return done.stdout.strip()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep the other test processes of this checkout out; the lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
