"""The file walletmigrate.toml as text: reading it, the line of each part, and what is wrong there.

Nothing here knows the models; `walletmigrate.config` does.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from walletmigrate.errors import ConfigError

ENVIRONMENT_PREFIX = "WALLETMIGRATE_"
MAX_SCALE = 18

Place = tuple[str | int, ...]
Known = Mapping[tuple[str, ...], Sequence[str]]

# Keys of the file whose Python name differs.
_RENAMED = {"schema": "ledger_schema", "ledger_schema": "schema"}
_SECRET_KEYS = (
    "replica_urls",
    "flagsmith_key",
    "flagsmith_admin_key",
    "admin_key",
    "environment_key",
    "api_key",
    "password",
)

_TABLES = ("FLAGS", "CAPTURE", "THROTTLE", "EXPORTER", "ROLES", "MAPPINGS")

# What a right value looks like, by key: the fix of an error that has no better one.
EXAMPLES: Mapping[str | int, str] = {
    "schema": 'schema = "wallet"',
    "observation_window": 'observation_window = "7d"',
    "compare_share": "compare_share = 1.0, a share from 0 to 1",
    "source": 'source = "file" or source = "flagsmith"',
    "path": 'path = "flags/environment.json"',
    "api_url": 'api_url = "http://localhost:8000/api/v1/"',
    "poll_seconds": "poll_seconds = 10",
    "flags": "a [flags] table with source and path",
    "capture": 'a [capture] table such as retention = "30d"',
    "raw_queries": "raw_queries = true or raw_queries = false",
    "retention": 'retention = "30d"',
    "throttle": "a [throttle] table such as replica_lag_seconds = 10",
    "replica_lag_seconds": "replica_lag_seconds = 10",
    "lock_waits": "lock_waits = 5",
    "active_sessions": "active_sessions = 50",
    "wal_bytes_per_second": "wal_bytes_per_second = 50_000_000",
    "batch_seconds": "batch_seconds = 2",
    "check": 'check = "python:module:function"',
    "exporter": 'an [exporter] table such as url = "http://localhost:9464"',
    "url": 'url = "http://localhost:9464"',
    "look_seconds": "look_seconds = 6",
    "hold_seconds": "hold_seconds = 10",
    "roles": 'a [roles] table such as owner = "wallet_owner", app = "wallet_app"',
    "name": 'name = "users"',
    "table": 'table = "public.users"',
    "key": 'key = "id"',
    "policy": 'policy = "shadow" or policy = "strict"',
    "traits": 'traits = { tenant = "tenant_id" }',
    "mappings": "a [[mappings]] table, as `walletmigrate init` writes it",
    "columns": "a [[mappings.columns]] table with bucket, column, currency, scale and unit",
    "bucket": 'bucket = "cash"',
    "column": 'column = "balance"',
    "currency": 'currency = "EUR"',
    "scale": f"scale = 2, a whole number from 0 to {MAX_SCALE}",
    "unit": 'unit = "major" or unit = "minor"',
    "floor": 'floor = "0"',
    "cross_checks": "a [[mappings.cross_checks]] table with name and sql",
    "sql": 'sql = "select user_id as key, sum(amount) as expected from … group by 1"',
    "tolerance": 'tolerance = "0.50"',
    "others": 'others = "zero" or others = "ignore"',
}


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a part of the configuration was written. Equal to any other: it does not change what is meant."""

    file: str | None = None
    lines: Mapping[Place, int] = field(default_factory=dict)
    base: Place = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0

    def line(self, place: Place) -> int | None:
        """The line of ``place``, or of the nearest table around it; None without a file."""
        path = self.base + place
        if self.file is None:
            return None
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)

    def error(self, message: str, fix: str, *place: str | int) -> ConfigError:
        """An error about what was written at ``place``."""
        return ConfigError(message, self.file, self.line(place), fix)


def read_text(file: Path) -> str:
    """The text of a TOML file that parses. Raises ConfigError."""
    name = str(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        fix = "write it with `walletmigrate init`, or name another in WALLETMIGRATE_CONFIG."
        raise ConfigError("there is no such file.", name, None, fix) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError("this line is not UTF-8.", name, line, "save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{error.strerror}.", name, None, "name a file that can be read.") from None
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
        what = str(error).replace(found[0], "") if found else str(error)
        if found and found[1]:
            message, line = f"not valid TOML at column {found[2]}: {what}.", int(found[1])
        else:
            message, line = f"not valid TOML: {what}, and the file ends.", text.rstrip().count("\n") + 1
        raise ConfigError(message, name, line, "mend the syntax of this line.") from None
    return text


def file_values(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """The file's values by field name, without secrets, the path of the flag file relative to the file."""
    values = {_RENAMED.get(name, name): value for name, value in values.items() if name not in _SECRET_KEYS}
    flags = values.setdefault("flags", {})
    if isinstance(flags, dict):
        flags = {name: value for name, value in flags.items() if name not in _SECRET_KEYS}
        path = flags.setdefault("path", "flags/environment.json")
        if isinstance(path, str) and path:
            flags["path"] = str(file.parent / path)
        values["flags"] = flags
    if _has_password(values.get("database_url")):
        del values["database_url"]
    return values


def _has_password(url: object) -> bool:
    return isinstance(url, str) and bool(re.search(r"//[^/@:]*:.+@|password\s*=", url, re.IGNORECASE))


def secrets_in(values: Mapping[str, Any], origin: Origin) -> Iterator[ConfigError]:
    """An error for each secret that the file holds; none of them shows it."""
    if _has_password(values.get("database_url")):
        fix = "delete the password here and set WALLETMIGRATE_DATABASE_URL to the whole URL."
        yield origin.error("a password does not belong in this file.", fix, "database_url")
    flags = values.get("flags")
    places: list[Place] = [(key,) for key in _SECRET_KEYS if key in values]
    places += [("flags", key) for key in _SECRET_KEYS if isinstance(flags, dict) and key in flags]
    for place in places:
        variable = "WALLETMIGRATE_FLAGSMITH_ADMIN_KEY" if "admin" in str(place[-1]) else "WALLETMIGRATE_FLAGSMITH_KEY"
        variable = "WALLETMIGRATE_REPLICA_URLS" if place[-1] == "replica_urls" else variable
        fix = f"delete it here and set {variable} or WALLETMIGRATE_DATABASE_URL."
        yield origin.error(f"{place[-1]!r} is a secret and does not belong in this file.", fix, *place)


def fields_in_environment() -> set[str]:
    """The fields that the environment sets, wholly or in part."""
    set_names = (name.upper() for name, value in os.environ.items() if value)
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).split("__")[0].lower()
        for name in set_names
        if name.startswith(ENVIRONMENT_PREFIX)
    }


def unreadable_variable() -> ConfigError:
    """The error for an environment variable that must be JSON and is not."""
    given = {name.upper(): value for name, value in os.environ.items() if value}
    tables = [ENVIRONMENT_PREFIX + table for table in _TABLES]
    names = [name for name in tables if name in given and not _is_json(given[name])]
    return ConfigError(f"{' and '.join(names)} in the environment must be valid JSON.", fix="write JSON, or unset it.")


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


_PHRASES = {
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "mapping_type": "must be a table",
    "tuple_type": "must be an array of tables",
    "too_short": "must not be empty",
    "string_type": "must be a string in quotes",
}


def config_error(found: Mapping[str, Any], origin: Origin, given: Mapping[str, Any], known: Known) -> ConfigError:
    """One of pydantic's errors as ours: what is wrong, where, and the fix."""
    context = found.get("ctx", {})
    loc: Place = (*found["loc"], *context.get("path", ()))
    place = (_RENAMED.get(str(loc[0]), loc[0]), *loc[1:]) if loc else loc
    key = next((part for part in reversed(place) if isinstance(part, str) and part != "[key]"), "")
    example = next((EXAMPLES[part] for part in reversed(place) if part in EXAMPLES), "")
    fix = context.get("fix") or (f"write {example}" if example else "")
    message = _message(found["type"], key, context.get("text") or str(found["msg"]))
    if found["type"] == "extra_forbidden":
        message, fix = _unknown_key(place, known)
    fix += "." if fix and not fix.endswith((".", "?")) else ""
    variable = _variable(loc)
    if loc and loc[0] in given:
        return ConfigError(f"argument {message}.", fix=fix)
    if variable:
        return ConfigError(f"{variable} in the environment: {message}.", fix=fix)
    return origin.error(f"{message}.", fix, *place)


def _message(kind: str, key: str, text: str) -> str:
    if kind == "missing":
        return f"{key!r} is missing"
    if kind == "walletmigrate":
        return f"{key}: {text}"
    return f"{key!r} " + _PHRASES.get(kind, text.replace("Input should be", "must be"))


def _unknown_key(place: Place, known: Known) -> tuple[str, str]:
    table = tuple(part for part in place[:-1] if isinstance(part, str))
    name = str(place[-1])
    where = f" in {'[[' + '.'.join(table) + ']]' if table[0] == 'mappings' else '[' + table[0] + ']'}" if table else ""
    here = [key for key in known.get(table, ()) if key not in _SECRET_KEYS]
    near = difflib.get_close_matches(name.lower(), here, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"delete it; the keys here are {', '.join(here)}."
    return f"unknown key {name!r}{where}", fix


def _variable(loc: Place) -> str | None:
    """The environment variable that gave the value at ``loc``, if one did."""
    present = {name.upper() for name, value in os.environ.items() if value}
    names = (ENVIRONMENT_PREFIX + "__".join(map(str, loc[:n])).upper() for n in range(len(loc), 0, -1))
    return next((name for name in names if name in present), None)


def raise_first(problems: Sequence[ConfigError]) -> NoReturn:
    """Raise the first problem by line; its ``fix`` counts the others, its notes are their texts."""
    first, *others = sorted(problems, key=lambda problem: problem.line or 0)
    if others:
        count = "1 more problem" if len(others) == 1 else f"{len(others)} more problems"
        lines = ", ".join(str(other.line) for other in others if other.line)
        first.fix += f" ({count}{f', line {lines}' if lines else ''})"
    for other in others:
        first.add_note(str(other))
    raise first


class Lines:
    """The line of every table, key and array item of a TOML text that is known to parse: path → line."""

    _BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
    _STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL)
    _BARE = re.compile(r"[A-Za-z0-9_-]+")
    _SCALAR = re.compile(r"[^,\]}#\n]+")

    def __init__(self, text: str) -> None:
        self.found: dict[Place, int] = {}
        self._text, self._at, self._counts = text, 0, dict[Place, int]()
        base: Place = ()
        while self._next():
            if self._takes("[["):
                base = self._header(array=True)
            elif self._takes("["):
                base = self._header(array=False)
            else:
                self._pair(base)

    def _next(self) -> str:
        """Go past blanks and comments; the character there, "" at the end."""
        blank = self._BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at
        return self._text[self._at : self._at + 1]

    def _takes(self, token: str) -> bool:
        self._next()
        taken = self._text.startswith(token, self._at)
        self._at += len(token) if taken else 0
        return taken

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if not match:
            raise AssertionError(f"a TOML text that parses has nothing else at {self._at}")
        self._at = match.end()
        return match[0]

    def _mark(self, path: Place, at: int) -> None:
        line = self._text.count("\n", 0, at) + 1
        for length in range(1, len(path) + 1):
            self.found.setdefault(path[:length], line)

    def _key(self) -> tuple[int, list[str]]:
        """Where a dotted key starts, and its parts."""
        self._next()
        start, parts = self._at, list[str]()
        while True:
            quoted = self._next() in ('"', "'")
            part = self._take(self._STRING if quoted else self._BARE)
            parts.append(next(iter(tomllib.loads(f"{part} = 0"))) if quoted else part)
            if not self._takes("."):
                return start, parts

    def _header(self, *, array: bool) -> Place:
        """The path of a table; each array of tables on the way means its last item."""
        start, parts = self._key()
        self._takes("]]" if array else "]")
        base: Place = ()
        for part in parts[:-1]:
            base += (part,)
            base += (self._counts[base] - 1,) if base in self._counts else ()
        base += (parts[-1],)
        if array:
            self._counts[base] = self._counts.get(base, 0) + 1
            base += (self._counts[base] - 1,)
        self._mark(base, start)
        return base

    def _pair(self, base: Place) -> None:
        start, parts = self._key()
        self._mark((*base, *parts), start)
        self._takes("=")
        self._value((*base, *parts))

    def _value(self, path: Place) -> None:
        first = self._next()
        self._mark(path, self._at)
        if first in ('"', "'"):
            self._take(self._STRING)
        elif self._takes("["):
            self._items("]", lambda index: self._value((*path, index)))
        elif self._takes("{"):
            self._items("}", lambda _: self._pair(path))
        else:
            self._take(self._SCALAR)

    def _items(self, close: str, item: Callable[[int], None]) -> None:
        index = 0
        while not self._takes(close):
            item(index)
            self._takes(",")
            index += 1
