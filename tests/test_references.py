"""The pages of reference say what the code says: settings with their defaults, variables, errors, SQLSTATEs."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

import walletmigrate
from walletmigrate.config import (
    CaptureSettings,
    Column,
    ExporterSettings,
    FlagSettings,
    Mapping,
    Roles,
    Settings,
    ThrottleSettings,
)
from walletmigrate.configchecks import CrossCheck
from walletmigrate.errors import ConfigError, UsageError, WalletMigrateError
from walletmigrate.job_options import Options, parsed

ROOT = Path(__file__).parents[1]
SOURCE = Path(walletmigrate.__file__).parent
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
TABLES = ("flags", "capture", "throttle", "exporter", "roles", "mappings")
MODELS: dict[str, type[BaseModel]] = {
    "Top level": Settings,
    "`[flags]`": FlagSettings,
    "`[capture]`": CaptureSettings,
    "`[throttle]`": ThrottleSettings,
    "`[exporter]`": ExporterSettings,
    "`[roles]`": Roles,
    "`[[mappings]]`": Mapping,
    "`[[mappings.columns]]`": Column,
    "`[[mappings.cross_checks]]`": CrossCheck,
}
BASE = {
    "Top level": [],
    "`[[mappings]]`": ['name = "users"', 'table = "users"', 'key = "id"'],
    "`[[mappings.columns]]`": ['bucket = "cash"', 'column = "coins"', 'currency = "EUR"', "scale = 2"],
    "`[[mappings.cross_checks]]`": ['name = "deposits"', 'sql = "select id as key, coins as expected from users"'],
}


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    tables = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]


def documented(title: str) -> dict[str, list[str]]:
    """The rows of a table of settings, by the setting's name."""
    found = rows(section(SETTINGS, title))
    assert all(len(row) == 5 for row in found), "a row has another number of cells than its head"
    return {row[0].split("<br>")[0].strip("`"): row for row in found}


def written(name: str) -> str:
    """A field as the file has it."""
    return "schema" if name == "ledger_schema" else name


def default_of(field: FieldInfo) -> str:
    """A default as the page has it."""
    value = field.default
    if field.is_required():
        return "required"
    if value is None:
        return "none"
    if isinstance(value, timedelta):
        return f'`"{value.days}d"`'
    if isinstance(value, dict):
        return f"`{value}`"
    return f"`{json.dumps(str(value) if isinstance(value, Path | Decimal) else value)}`"


def variable_of(title: str, name: str) -> str:
    """The environment variable of a field."""
    if title.startswith("`[["):
        return ""
    table = "" if title == "Top level" else title.strip("`[]").upper() + "__"
    return f"`WALLETMIGRATE_{table}{name.upper()}`"


def variable_in(row: list[str]) -> str:
    """The environment variable that the page names."""
    return row[0].partition("<br>")[2]


@pytest.mark.parametrize("title", MODELS)
def test_every_setting_is_documented_with_its_default_and_its_variable(title: str) -> None:
    fields = {
        name: one for name, one in MODELS[title].model_fields.items() if title != "Top level" or name not in TABLES
    }
    found = documented(title)
    assert list(found) == [written(name) for name in fields]
    for name, field in fields.items():
        row = found[written(name)]
        assert (variable_in(row), row[2]) == (variable_of(title, name), default_of(field)), name
        secret = SecretStr in (field.annotation, *get_args(field.annotation))
        assert ("*Secret*" in row[4]) is secret, name


@pytest.mark.parametrize("table", TABLES)
def test_a_table_in_the_environment_that_is_no_json_is_named(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"WALLETMIGRATE_{table.upper()}", "{")
    file = tmp_path / "walletmigrate.toml"
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^WALLETMIGRATE_{table.upper()} in the environment must be valid JSON"):
        Settings.load(file)


def test_every_table_of_the_file_has_a_part_of_its_own() -> None:
    tables = {name for name in Settings.model_fields if name in TABLES}
    assert tables == set(TABLES)
    assert [title for title in re.findall(r"^## (.+)$", SETTINGS, re.MULTILINE) if "[" in title] == list(MODELS)[1:]


def examples() -> list[tuple[str, str, str]]:
    """Part, setting and example, where there is one: secrets have none."""
    found = [(title, name, row[3]) for title in MODELS for name, row in documented(title).items()]
    return [(title, name, example.strip("`")) for title, name, example in found if example != "–"]


@pytest.mark.parametrize(("title", "name", "example"), examples())
def test_an_example_of_a_setting_is_accepted_and_is_of_that_setting(
    title: str, name: str, example: str, tmp_path: Path
) -> None:
    parts = {key: list(lines) for key, lines in BASE.items()}
    lines = [line for line in parts.get(title, []) if not line.startswith(f"{name} =")]
    parts[title] = [*lines, example]
    order = [key for key in MODELS if key in parts]
    text = "\n".join(line for key in order for line in ([key.strip("`")] if "[" in key else []) + parts[key])
    file = tmp_path / "walletmigrate.toml"
    file.write_text(text, encoding="utf-8")
    assert list(tomllib.loads(example)) == [name]
    Settings.load(file)


def test_the_whole_example_is_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", SETTINGS, re.DOTALL)
    file = tmp_path / "walletmigrate.toml"
    file.write_text(block, encoding="utf-8")
    assert Settings.load(file).mapping("users").column("cash").scale == 2


def test_every_variable_that_the_code_reads_is_documented_and_no_other() -> None:
    of_settings = {variable_in(row).strip("`") for title in MODELS for row in documented(title).values()} - {""}
    others = {row[0].strip("`") for row in rows(section(SETTINGS, "Variables that are no settings"))}
    read = set()
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        read |= {
            f"WALLETMIGRATE_{name}" for name in re.findall(r'ENVIRONMENT_PREFIX(?:\}|\s*\+\s*")([A-Z][A-Z_]+)', text)
        }
        read |= set(re.findall(r"WALLETMIGRATE_[A-Z_]*[A-Z]", text))
    assert others == read - of_settings
    assert others | of_settings | {"WALLETMIGRATE_ROLES", "WALLETMIGRATE_MAPPINGS"} == set(
        re.findall(r"WALLETMIGRATE_[A-Z_]*[A-Z]", SETTINGS)
    )


def test_the_settings_of_a_job_are_documented_with_their_defaults_and_bounds() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    found = {row[0].strip("`"): row[1:3] for row in rows(section(text, "Settings"))}
    assert {name: default for name, (default, _) in found.items()} == Options().shown()
    for name, (default, allowed) in found.items():
        *words, bounds = allowed.split(", or ")
        least, most = bounds.split(" to ")
        assert words == ([] if default[0].isdigit() else [default])
        parsed(f"{name}={value}" for value in (*words, least, most))
        for value in (f"{float(least) / 10:g}" if "." in least else str(int(least) - 1), str(int(most) + 1)):
            with pytest.raises(UsageError):
                parsed([f"{name}={value}"])


def test_a_text_shows_a_metric_with_a_label_that_it_has() -> None:
    table = rows(section((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), "Metrics"))
    labels = {row[0].strip("`"): row[2] for row in table if len(row) == 5}
    shown = [
        (path.name, *found.groups())
        for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "runbooks").glob("*.md"))
        for found in re.finditer(r"\b(walletmigrate_\w+?)(?:_bucket)?\{(\w+)=", path.read_text(encoding="utf-8"))
    ]
    assert shown
    of_prometheus = ("instance", "job")  # it puts them to every series
    wrong = [one for one in shown if one[2] not in of_prometheus and f"`{one[2]}`" not in labels.get(one[1], "")]
    assert wrong == []


def errors() -> Iterator[type[WalletMigrateError]]:
    """Every class of error that has a code of its own."""
    for module in pkgutil.iter_modules(walletmigrate.__path__):
        if module.name != "testing":  # a plugin, which pytest has to load before anybody else
            importlib.import_module(f"walletmigrate.{module.name}")
    found: list[type[WalletMigrateError]] = [WalletMigrateError]
    for each in found:
        found += [inner for inner in each.__subclasses__() if inner not in found]
    yield from (each for each in found if "code" in vars(each) and each.__module__.startswith("walletmigrate."))


def test_every_error_is_documented_with_its_code_and_its_exit_code() -> None:
    table = [row for row in rows(ERRORS) if len(row) == 5]
    known = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in table}
    assert len(known) == len(table)
    assert known == {each.__name__: (each.code, str(each.exit_code)) for each in errors()}
    assert all(row[3] and row[4] for row in table)


def test_refusals_are_documented_apart_from_what_ends_a_transaction() -> None:
    refusals = {row[0].strip("`") for row in rows(section(ERRORS, "Refusals of a posting"))}
    assert refusals == {each.__name__ for each in errors() if issubclass(each, walletmigrate.PostingRefused)}


def test_every_exit_code_of_a_command_is_documented() -> None:
    codes = {row[0] for row in rows(section(ERRORS, "Exit codes"))}
    assert codes == {"0", "1", "2", "3", "4", "5", "130"}
    assert codes >= {str(each.exit_code) for each in errors()}


def test_every_sqlstate_that_the_functions_raise_is_documented() -> None:
    sql = "".join(path.read_text(encoding="utf-8") for path in (SOURCE / "sql").glob("*.sql"))
    raised = set(re.findall(r"errcode = '(\w{5})'", sql))
    part = section(ERRORS, "SQLSTATEs of the database's functions")
    listed = {row[0] for row in rows(part)}
    inner = {"WM000", "WM050"}
    assert listed == raised - inner
    assert inner <= raised
    assert set(re.findall(r"\bWM\d{3}\b", part)) - listed - inner == {"WM023"}
    assert "'WM023'" in sql


def test_a_wrong_default_and_a_setting_that_is_gone_are_noticed() -> None:
    assert default_of(Settings.model_fields["observation_window"]) == '`"7d"`'
    assert default_of(Mapping.model_fields["name"]) == "required"
    assert default_of(ThrottleSettings.model_fields["check"]) == "none"
    assert rows("| a | b |\n|---|---|\n| 1 | 2 |\n") == [["1", "2"]]
