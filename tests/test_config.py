"""The configuration: what is accepted, what is refused, and that each refusal names its line and the fix."""

from __future__ import annotations

import copy
import pickle
import tomllib
import uuid
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal, localcontext
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from walletmigrate.config import Column, FlagSettings, KeyType, Mapping, Roles, Settings, exact, key_text
from walletmigrate.configfile import Lines
from walletmigrate.errors import (
    ConfigError,
    InvalidAmount,
    InvalidKey,
    PostingRefused,
    UnknownBucket,
    UnknownCurrency,
    UnknownMapping,
)

GOOD = """\
schema = "wallet"
observation_window = "7d"
compare_share = 1.0

[flags]
source = "file"
path = "flags/environment.json"
poll_seconds = 10

[exporter]
url = "http://localhost:9464"

[roles]
owner = "wallet_owner"
app = "wallet_app"

[[mappings]]
name = "users"
table = "public.users"
key = "id"
policy = "strict"
traits = { tenant = "tenant_id", role = "role" }

  [[mappings.columns]]
  bucket = "cash"
  column = "total_coins"
  currency = "EUR"
  scale = 2
  unit = "major"
  floor = "-5.5"

  [[mappings.columns]]
  bucket = "promo"
  column = "promoCents"
  currency = "EUR"
  scale = 2
  unit = "minor"

[[mappings]]
name = "shops"
table = "shop"
key = "code"

  [[mappings.columns]]
  bucket = "cash"
  column = "balance"
  currency = "JPY"
  scale = 0
"""

Written = Callable[[str], Path]
Refusal = Callable[[str, str], ConfigError]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(text: str) -> Path:
        file = tmp_path / "walletmigrate.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def refusal(written: Written) -> Refusal:
    """Replace the first ``old`` of the good file by ``new`` and give the error that this makes."""

    def load(old: str, new: str) -> ConfigError:
        assert old in GOOD
        with pytest.raises(ConfigError) as raised:
            Settings.load(written(GOOD.replace(old, new, 1)))
        return raised.value

    return load


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def column(scale: int = 2, **fields: Any) -> Column:
    return Column(bucket="cash", column="balance", currency="EUR", scale=scale, **fields)


def test_a_good_file_gives_every_value(written: Written, tmp_path: Path) -> None:
    settings = Settings.load(written(GOOD))
    assert settings.ledger_schema == "wallet"
    assert settings.observation_window == timedelta(days=7)
    assert settings.compare_share == 1.0
    assert settings.database_url is None
    assert settings.roles == Roles(owner="wallet_owner", app="wallet_app")
    assert settings.flags.path == tmp_path / "flags/environment.json"
    users, shops = settings.mappings
    assert (users.schema_name, users.table_name, users.policy) == ("public", "users", "strict")
    assert (shops.schema_name, shops.table_name, shops.policy) == ("public", "shop", "shadow")
    assert users.traits == {"tenant": "tenant_id", "role": "role"}
    assert users.buckets == ("cash", "promo")
    assert users.columns[0].floor == Decimal("-5.50")
    assert str(users.columns[0].floor) == "-5.50"
    assert users.columns[1].floor is None
    assert users.columns[1].unit == "minor"


def test_the_flag_file_lies_beside_the_file_even_when_it_is_not_named(written: Written, tmp_path: Path) -> None:
    settings = Settings.load(written(GOOD.replace('path = "flags/environment.json"\n', "")))
    assert settings.flags.path == tmp_path / "flags/environment.json"


def test_arguments_win_over_the_environment_and_the_environment_over_the_file(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(GOOD)
    monkeypatch.setenv("WALLETMIGRATE_COMPARE_SHARE", "0.5")
    monkeypatch.setenv("WALLETMIGRATE_OBSERVATION_WINDOW", "12h")
    monkeypatch.setenv("WALLETMIGRATE_LEDGER_SCHEMA", "")
    monkeypatch.setenv("WALLETMIGRATE_FLAGS__POLL_SECONDS", "30")
    settings = Settings.load(file, observation_window="30m", database_url=None)
    assert settings.observation_window == timedelta(minutes=30)
    assert settings.compare_share == 0.5
    assert settings.ledger_schema == "wallet"
    assert settings.flags.poll_seconds == 30
    assert settings.flags.source == "file"


def test_the_file_is_found_by_its_variable_and_else_in_the_current_folder(
    written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = written(GOOD)
    monkeypatch.chdir(file.parent)
    assert Settings.load().mapping("users").key == "id"
    other = tmp_path / "other.toml"
    other.write_text(GOOD.replace('key = "id"', 'key = "uid"'), encoding="utf-8")
    monkeypatch.setenv("WALLETMIGRATE_CONFIG", str(other))
    assert Settings.load().mapping("users").key == "uid"
    assert Settings.load(file).mapping("users").key == "id"


def test_secrets_come_from_the_environment_and_never_show(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALLETMIGRATE_DATABASE_URL", "postgresql://app:hunter2@localhost/shop")
    monkeypatch.setenv("WALLETMIGRATE_FLAGSMITH_KEY", "ser.hunter3")
    settings = Settings.load(written(GOOD))
    assert settings.database_url is not None
    assert settings.flagsmith_key is not None
    assert settings.database_url.get_secret_value().endswith("hunter2@localhost/shop")
    assert settings.flagsmith_key.get_secret_value() == "ser.hunter3"
    assert "hunter" not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize(
    "url",
    ["postgresql://app:hunter2@h/d", "postgresql://app:hun/ter2@h/d", "postgresql://h/d?password=hunter2"],
)
def test_a_password_in_the_file_is_refused_and_not_repeated(refusal: Refusal, url: str) -> None:
    error = refusal('schema = "wallet"', f'schema = "wallet"\ndatabase_url = "{url}"')
    assert error.line == 2
    assert "WALLETMIGRATE_DATABASE_URL" in error.fix
    assert "hunter" not in str(error)


def test_a_database_url_without_a_password_may_stand_in_the_file(written: Written) -> None:
    settings = Settings.load(written('database_url = "postgresql://app@localhost:5432/shop"\n' + GOOD))
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == "postgresql://app@localhost:5432/shop"


@pytest.mark.parametrize("key", ["flagsmith_key", "environment_key", "api_key", "flagsmith_admin_key", "admin_key"])
def test_a_flagsmith_key_in_the_file_is_refused_at_its_line(refusal: Refusal, key: str) -> None:
    error = refusal("poll_seconds = 10", f'{key} = "ser.hunter2"')
    assert error.line == line_of(GOOD, "poll_seconds")
    assert ("_ADMIN_KEY" if "admin" in key else "WALLETMIGRATE_FLAGSMITH_KEY") in error.fix
    assert "hunter" not in str(error)
    at_top = refusal('schema = "wallet"', f'{key} = "ser.hunter2"')
    assert at_top.line == 1
    assert "hunter" not in str(at_top)


def test_a_wrong_database_url_in_the_environment_is_named_but_not_shown(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALLETMIGRATE_DATABASE_URL", "hunter2")
    with pytest.raises(ConfigError, match="WALLETMIGRATE_DATABASE_URL") as raised:
        Settings.load(written(GOOD))
    assert raised.value.file is None
    assert raised.value.line is None
    assert "hunter" not in str(raised.value)
    with pytest.raises(ValidationError) as direct:
        Settings()
    assert "hunter" not in str(direct.value)


@pytest.mark.parametrize(
    ("old", "new", "says", "fix"),
    [
        ('schema = "wallet"', 'shema = "wallet"', "unknown key 'shema'", "did you mean 'schema'?"),
        ('schema = "wallet"', 'Schema = "wallet"', "unknown key 'Schema'", "did you mean 'schema'?"),
        ('schema = "wallet"', 'ledger_schema = "w"', "unknown key 'ledger_schema'", "did you mean 'schema'?"),
        ('schema = "wallet"', 'schema = "pg_x"', "belongs to PostgreSQL", 'schema = "wallet"'),
        ('schema = "wallet"', 'schema = "Wallet"', "no usable name", 'schema = "wallet"'),
        ('schema = "wallet"', "schema = 7", "must be a string", 'schema = "wallet"'),
        ('"7d"', '"7 days"', "observation_window", '"7d"'),
        ('"7d"', "7", "observation_window", '"7d"'),
        ('"7d"', '"-7d"', "observation_window", '"7d"'),
        ("compare_share = 1.0", "compare_share = 1.01", "less than or equal to 1", "from 0 to 1"),
        ("compare_share = 1.0", "compare_share = -0.1", "greater than or equal to 0", "from 0 to 1"),
        ("compare_share = 1.0", "compare_share = nan", "compare_share", "from 0 to 1"),
        ("compare_share = 1.0", "compare_share = true", "not a number", "from 0 to 1"),
        ('source = "file"', 'source = "flagsmth"', "must be 'file' or 'flagsmith'", 'source = "file"'),
        ("poll_seconds = 10", "poll_secs = 10", "in [flags]", "did you mean 'poll_seconds'?"),
        ("poll_seconds = 10", "poll_seconds = 0", "greater than 0", "poll_seconds = 10"),
        ("poll_seconds = 10", 'api_url = "ftp://h"', "not an http", "api_url ="),
        ("poll_seconds = 10", 'api_url = "http://u:p@h/"', "without a user", "api_url ="),
        ('url = "http://localhost:9464"', 'url = "h:1"', "not an http", 'url = "http://localhost'),
        ('url = "http://localhost:9464"', 'url = "http://u@h"', "without a user", "url ="),
        ('url = "http://localhost:9464"', "look_seconds = 0", "greater than 0", "look_seconds = 6"),
        ('url = "http://localhost:9464"', "hold_seconds = true", "not a number", "hold_seconds = 10"),
        (
            'url = "http://localhost:9464"',
            'urls = ""',
            "unknown key 'urls' in",
            "did you mean 'url'?",
        ),
        ('app = "wallet_app"', 'app = "wallet_owner"', "stands for two roles", "a role each"),
        ('app = "wallet_app"', 'app = "Wallet App"', "no usable name", "[roles]"),
        ('app = "wallet_app"', 'ap = "wallet_app"', "unknown key 'ap' in [roles]", "did you mean 'app'?"),
        ('name = "users"', 'name = "Users"', "no usable name", 'name = "users"'),
        ('name = "users"', f'name = "{"u" * 41}"', "no usable name", 'name = "users"'),
        ('name = "users"', 'name = "u-s"', "no usable name", 'name = "users"'),
        ('table = "public.users"', 'table = "db.public.users"', "not the name of a table", "public.users"),
        ('table = "public.users"', 'table = "users u"', "not the name of a table", "public.users"),
        ('table = "public.users"', 'table = "us$$ers"', "not the name of a table", "public.users"),
        ('key = "id"', 'key = "i$$d"', "not the name of a column", "one column"),
        ('column = "total_coins"', 'column = "co$$ins"', "is an expression or no name", "the column itself"),
        ('key = "id"', 'key = ["a", "b"]', "composite keys are not supported", "unique and not null"),
        ('key = "id"', 'key = "a, b"', "composite keys are not supported", "unique and not null"),
        ('key = "id"', 'key = "lower(id)"', "not the name of a column", "one column"),
        ('policy = "strict"', 'policy = "strickt"', "must be 'shadow' or 'strict'", 'policy = "shadow"'),
        ('policy = "strict"', "polcy = 1", "unknown key 'polcy' in [[mappings]]", "did you mean 'policy'?"),
        ('role = "role"', 'role = "upper(role)"', "not the name of a column", "one column"),
        ('role = "role"', "role = 3", "must be a string", "traits = {"),
        ('role = "role"', '"the role" = "role"', "no usable name", "traits = {"),
        ('bucket = "cash"', 'bucket = "Cash"', "no usable name", 'bucket = "cash"'),
        ('bucket = "cash"', f'bucket = "{"c" * 32}"', "no usable name", 'bucket = "cash"'),
        ('column = "total_coins"', 'column = "a + b"', "must be one writable column", "several columns"),
        ('column = "total_coins"', 'column = "sum(a)"', "must be one writable column", "several columns"),
        ('currency = "EUR"', 'currency = "eur"', "no usable name", 'currency = "EUR"'),
        ('currency = "EUR"', 'currency = "E"', "no usable name", 'currency = "EUR"'),
        ("scale = 2", "scale = 19", "less than or equal to 18", "from 0 to 18"),
        ("scale = 2", "scale = -1", "greater than or equal to 0", "from 0 to 18"),
        ("scale = 2", "scale = 2.0", "not a whole number", "from 0 to 18"),
        ("scale = 2", "scale = true", "not a whole number", "from 0 to 18"),
        ("scale = 2", 'scale = "2"', "not a whole number", "from 0 to 18"),
        ("scale = 2", "scle = 2", "unknown key 'scle' in [[mappings.columns]]", "did you mean 'scale'?"),
        ('unit = "major"', 'unit = "cents"', "must be 'major' or 'minor'", 'unit = "major"'),
        ('floor = "-5.5"', "floor = -5.5", "cannot be a float", 'floor = "-5.5"'),
        ('floor = "-5.5"', "floor = true", "cannot be a float or a boolean", "floor ="),
        ('floor = "-5.5"', 'floor = "-5.555"', "more decimals than scale = 2", "round the floor"),
        ('floor = "-5.5"', 'floor = "NaN"', "not an amount", "write digits"),
        ('floor = "-5.5"', 'floor = "1e3"', "not an amount", "write digits"),
        ('floor = "-5.5"', f"floor = {'9' * 31}", "at most 30 digits", "floor ="),
    ],
)
def test_a_wrong_value_is_refused_with_its_file_its_line_and_the_fix(
    refusal: Refusal, tmp_path: Path, old: str, new: str, says: str, fix: str
) -> None:
    error = refusal(old, new)
    problems = [str(error), *getattr(error, "__notes__", [])]
    place = f"{tmp_path / 'walletmigrate.toml'}:{line_of(GOOD, old)}: "
    about = [problem for problem in problems if problem.startswith(place) and says in problem]
    assert about, problems
    assert fix in about[0].partition(" Fix: ")[2]
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("missing", "header"),
    [
        ('name = "users"\n', "[[mappings]]"),
        ('table = "public.users"\n', "[[mappings]]"),
        ('key = "id"\n', "[[mappings]]"),
        ('  bucket = "cash"\n', "[[mappings.columns]]"),
        ('  column = "total_coins"\n', "[[mappings.columns]]"),
        ('  currency = "EUR"\n', "[[mappings.columns]]"),
        ("  scale = 2\n", "[[mappings.columns]]"),
    ],
)
def test_a_missing_key_is_reported_at_the_header_of_its_table(refusal: Refusal, missing: str, header: str) -> None:
    error = refusal(missing, "")
    key = missing.split(maxsplit=1)[0]
    assert error.message == f"{key!r} is missing."
    assert error.line == line_of(GOOD, header)
    assert f"write {key} = " in error.fix


def test_a_missing_key_of_the_second_column_is_reported_there(refusal: Refusal) -> None:
    error = refusal('  column = "promoCents"\n', "")
    assert error.line == line_of(GOOD, '  [[mappings.columns]]\n  bucket = "promo"')


@pytest.mark.parametrize(
    ("old", "new", "says", "line"),
    [
        ('name = "shops"', 'name = "users"', "two mappings are named 'users'", 'name = "shops"'),
        ('bucket = "promo"', 'bucket = "cash"', "has a column in EUR already", 'bucket = "promo"'),
        ('"promoCents"', '"total_coins"', "in use in this mapping already", 'column = "promoCents"'),
        ('"promoCents"', '"id"', "in use in this mapping already", 'column = "promoCents"'),
    ],
)
def test_what_must_be_unique_is_refused_at_its_second_place(
    refusal: Refusal, old: str, new: str, says: str, line: str
) -> None:
    error = refusal(old, new)
    assert says in error.message
    assert error.line == line_of(GOOD, line)
    assert error.fix


def test_one_column_cannot_belong_to_two_mappings(written: Written) -> None:
    text = GOOD.replace('table = "shop"', 'table = "users"').replace('"balance"', '"total_coins"')
    with pytest.raises(ConfigError, match="is in mapping 'users' already") as raised:
        Settings.load(written(text))
    assert raised.value.line == line_of(GOOD, 'column = "balance"')


def test_the_same_bucket_may_hold_two_currencies(written: Written) -> None:
    text = GOOD.replace('bucket = "promo"', 'bucket = "cash"').replace("EUR", "USD", 1)
    assert Settings.load(written(text)).mapping("users").buckets == ("cash",)


def test_several_problems_are_counted_and_all_are_told(refusal: Refusal) -> None:
    error = refusal(GOOD[: GOOD.index("[flags]")], 'shema = "wallet"\nzzz = 1\ncompare_share = 3\n\n')
    assert error.line == 1
    assert error.fix.endswith("(2 more problems, line 2, 3)")
    assert [note.split(":")[1] for note in error.__notes__] == ["2", "3"]
    assert "compare_share" in error.__notes__[1]


def test_an_error_from_the_environment_names_the_variable(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALLETMIGRATE_FLAGS__POLL_SECONDS", "soon")
    with pytest.raises(ConfigError, match=r"^WALLETMIGRATE_FLAGS__POLL_SECONDS in the environment: ") as raised:
        Settings.load(written(GOOD))
    assert (raised.value.file, raised.value.line) == (None, None)
    monkeypatch.setenv("WALLETMIGRATE_FLAGS__POLL_SECONDS", "5")
    monkeypatch.setenv("WALLETMIGRATE_MAPPINGS", "[{")
    with pytest.raises(ConfigError, match=r"^WALLETMIGRATE_MAPPINGS in the environment must be valid JSON"):
        Settings.load(written(GOOD))


def test_an_error_from_an_argument_has_no_line(written: Written) -> None:
    with pytest.raises(ConfigError, match=r"^argument 'compare_share' must be less") as raised:
        Settings.load(written(GOOD), compare_share=2)
    assert raised.value.line is None


def test_flagsmith_needs_an_address_and_gets_its_slash(written: Written) -> None:
    text = GOOD.replace('source = "file"', 'source = "flagsmith"')
    with pytest.raises(ConfigError, match='missing, and source = "flagsmith" needs it') as raised:
        Settings.load(written(text))
    assert raised.value.line == line_of(GOOD, "[flags]")
    assert "api_url" in raised.value.fix
    text = text.replace("poll_seconds = 10", 'api_url = "http://localhost:8000/api/v1"')
    assert Settings.load(written(text)).flags.api_url == "http://localhost:8000/api/v1/"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('schema = "wallet', 1),
        ('schema = "wallet"\nkey = \n', 2),
        ("a = 1\n\na = 2\n", 3),
        ('a = 1\nb = """\ntext', 3),
        ("[flags]\n[flags]\n", 2),
    ],
)
def test_a_syntax_error_names_its_line(written: Written, text: str, line: int) -> None:
    with pytest.raises(ConfigError, match="not valid TOML") as raised:
        Settings.load(written(text))
    assert raised.value.line == line
    assert raised.value.fix


def test_a_file_that_is_missing_or_unreadable_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file") as raised:
        Settings.load(tmp_path / "none.toml")
    assert "walletmigrate init" in raised.value.fix
    with pytest.raises(ConfigError, match="directory"):
        Settings.load(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('schema = "wallet"\n# Guthaben für alle\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8") as raised:
        Settings.load(latin)
    assert raised.value.line == 2


def test_a_file_without_a_mapping_is_refused(written: Written) -> None:
    with pytest.raises(ConfigError, match="no mapping") as raised:
        Settings.load(written(GOOD[: GOOD.index("[[mappings]]")]))
    assert "walletmigrate init" in raised.value.fix
    with pytest.raises(ConfigError, match="no column") as raised:
        Settings.load(written('[[mappings]]\nname = "u"\ntable = "u"\nkey = "id"\ncolumns = []\n'))
    assert raised.value.line == 5


def test_a_table_where_an_array_of_tables_belongs_is_refused(written: Written) -> None:
    with pytest.raises(ConfigError, match="must be an array of tables") as raised:
        Settings.load(written('[mappings]\nname = "users"\n'))
    assert raised.value.line == 1


def test_a_file_with_carriage_returns_or_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "windows.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert Settings.load(file).mapping("users").key == "id"
    file.write_bytes(GOOD.replace("scale = 2", "scale = 20", 1).replace("\n", "\r\n").encode())
    with pytest.raises(ConfigError) as raised:
        Settings.load(file)
    assert raised.value.line == line_of(GOOD, "scale = 2")


def test_every_key_of_a_file_has_its_line_however_it_is_written() -> None:
    text = (
        'a = 1 # [x]\n"b.c".d = "]"\n\n[[m]]\nn = """\n[no]\n"""\n[[m.c]]\nk = 1\n[[m.c]]\nk = [\n  1,\n'
        "  [2, 3],\n  { p = 4, q = '#' },\n]\n[m.t]\nz = 1979-05-27 07:32:00\n[[m]]\n[[m.c]]\nk = 0x1F\n"
        "o = { p.q = {}, r = [] }\n"
    )
    tomllib.loads(text)
    expected = {
        ("a",): 1,
        ("b.c", "d"): 2,
        ("m",): 4,
        ("m", 0): 4,
        ("m", 0, "n"): 5,
        ("m", 0, "c", 0): 8,
        ("m", 0, "c", 0, "k"): 9,
        ("m", 0, "c", 1): 10,
        ("m", 0, "c", 1, "k"): 11,
        ("m", 0, "c", 1, "k", 0): 12,
        ("m", 0, "c", 1, "k", 1, 1): 13,
        ("m", 0, "c", 1, "k", 2, "q"): 14,
        ("m", 0, "t"): 16,
        ("m", 0, "t", "z"): 17,
        ("m", 1): 18,
        ("m", 1, "c", 0): 19,
        ("m", 1, "c", 0, "k"): 20,
        ("m", 1, "c", 0, "o", "p", "q"): 21,
        ("m", 1, "c", 0, "o", "r"): 21,
    }
    found = Lines(text).found
    assert {place: found.get(place) for place in expected} == expected


def test_a_mapping_knows_its_lines_and_they_do_not_change_what_it_equals(written: Written) -> None:
    loaded = Settings.load(written(GOOD)).mapping("users")
    problem = loaded.problem("no such column.", "name another.", "columns", 1, "column")
    assert problem.line == line_of(GOOD, 'column = "promoCents"')
    assert loaded.problem("x", "y", "policy", "none").line == line_of(GOOD, 'policy = "strict"')
    built = Mapping(**tomllib.loads(GOOD)["mappings"][0])
    assert built.problem("x", "y", "key").line is None
    assert built == loaded
    assert hash(built) == hash(loaded)
    assert len({built, loaded}) == 1


def test_settings_are_frozen_and_survive_a_pickle(written: Written) -> None:
    settings = Settings.load(written(GOOD), database_url="postgresql://a:b@localhost/c")
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert again.mapping("users").problem("x", "y", "key").line == line_of(GOOD, 'key = "id"')
    assert copy.deepcopy(settings) == settings
    with pytest.raises(ValidationError):
        settings.compare_share = 0.1
    with pytest.raises(ValidationError):
        settings.mapping("users").columns[0].scale = 3


def test_settings_can_be_built_from_objects_without_a_file() -> None:
    mapping = Mapping(name="users", table="users", key="id", columns=(column(),))
    settings = Settings(mappings=(mapping,), flags=FlagSettings(poll_seconds=1))
    assert settings.mapping() is settings.mappings[0]
    assert settings.observation_window == timedelta(days=7)
    with pytest.raises(ValidationError):
        Mapping(name="users", table="users", key="id", columns=())


def test_a_mapping_is_found_by_name_and_alone_without_one(written: Written) -> None:
    settings = Settings.load(written(GOOD))
    assert settings.mapping("shops").name == "shops"
    with pytest.raises(UnknownMapping) as raised:
        settings.mapping("user")
    assert (raised.value.mapping, raised.value.known) == ("user", ("users", "shops"))
    with pytest.raises(UnknownMapping):
        settings.mapping()


def test_a_column_is_found_by_bucket_and_currency(written: Written) -> None:
    users = Settings.load(written(GOOD)).mapping("users")
    assert users.column().column == "total_coins"
    assert users.column("promo").column == "promoCents"
    assert users.column("promo", "EUR").column == "promoCents"
    with pytest.raises(UnknownBucket) as no_bucket:
        users.column("gold")
    assert no_bucket.value.known == ("cash", "promo")
    with pytest.raises(UnknownCurrency) as no_currency:
        users.column(currency="USD")
    assert (no_currency.value.bucket, no_currency.value.currency) == ("cash", "USD")


def test_a_bucket_of_two_currencies_wants_the_currency_named() -> None:
    dollars = Column(bucket="cash", column="usd", currency="USD", scale=2)
    mapping = Mapping(name="users", table="users", key="id", columns=(column(), dollars))
    assert mapping.column(currency="USD") == dollars
    with pytest.raises(UnknownCurrency) as raised:
        mapping.column("cash")
    assert raised.value.currency is None
    assert raised.value.known == ("EUR", "USD")


@pytest.mark.parametrize("scale", range(19))
def test_the_quantum_is_the_smallest_amount(scale: int) -> None:
    assert column(scale).quantum * 10**scale == 1
    assert column(scale).quantum.as_tuple().exponent == -scale


def test_a_floor_of_minus_zero_loses_its_sign() -> None:
    assert str(column(floor="-0").floor) == "0.00"


class Coins(IntEnum):
    FIVE = 5


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (Decimal("12.5"), "12.50"),
        (3, "3.00"),
        (Coins.FIVE, "5.00"),
        (Decimal("1.5000"), "1.50"),
        (Decimal("1E+3"), "1000.00"),
        (Decimal("0.01"), "0.01"),
        (10**30 - 1, "9" * 30 + ".00"),
        (Decimal("9" * 30 + ".99"), "9" * 30 + ".99"),
    ],
)
def test_an_exact_amount_comes_out_with_the_decimals_of_the_scale(amount: Decimal | int, text: str) -> None:
    assert str(exact(amount, column())) == text


@pytest.mark.parametrize(
    "amount",
    [
        1.0,
        True,
        "1",
        None,
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("-Infinity"),
        0,
        Decimal("0.00"),
        Decimal("-0"),
        -1,
        Decimal("-0.01"),
        Decimal("0.001"),
        Decimal("1.005"),
        Decimal("1E-999999"),
        Decimal("1E+999999"),
        10**30,
        pytest.param(10**5000, id="an int without a repr"),
        pytest.param(-(10**5000), id="a negative int without a repr"),
    ],
)
def test_what_is_no_exact_positive_amount_is_refused(amount: Any) -> None:
    with pytest.raises(InvalidAmount) as raised:
        exact(amount, column())
    assert isinstance(raised.value, PostingRefused)
    assert len(str(raised.value)) < 150


def test_a_target_may_be_zero_or_negative_when_it_is_allowed() -> None:
    assert str(exact(Decimal("-0"), column(), allow_zero=True)) == "0.00"
    assert format(exact(0, column(18), allow_zero=True), "f") == "0." + "0" * 18
    assert exact(-5, column(), allow_negative=True) == Decimal("-5.00")
    with pytest.raises(InvalidAmount):
        exact(-5, column(), allow_zero=True)
    with pytest.raises(InvalidAmount):
        exact(0, column(), allow_negative=True)


def test_an_amount_does_not_depend_on_the_decimal_context_of_the_caller() -> None:
    with localcontext() as context:
        context.prec = 3
        assert str(exact(Decimal("123456.78"), column())) == "123456.78"
        assert str(column(floor="-123456.78").floor) == "-123456.78"


@pytest.mark.parametrize(
    ("value", "key_type", "text"),
    [
        (42, "integer", "42"),
        (-(2**63), "integer", "-9223372036854775808"),
        (Coins.FIVE, "integer", "5"),
        (uuid.UUID("6F9619FF-8B86-D011-B42D-00CF4FC964FF"), "uuid", "6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
        ("6F9619FF-8B86-D011-B42D-00CF4FC964FF", "uuid", "6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
        ("Ana María", "text", "Ana María"),
        ("", "text", ""),
    ],
)
def test_a_key_has_one_canonical_text(value: object, key_type: KeyType, text: str) -> None:
    assert key_text(value, key_type) == text


@pytest.mark.parametrize(
    ("value", "key_type"),
    [
        ("42", "integer"),
        (True, "integer"),
        (42.0, "integer"),
        (2**63, "integer"),
        pytest.param(10**5000, "integer", id="an int without a repr"),
        pytest.param(10**5000, "text", id="an int without a repr as text"),
        (Decimal(42), "integer"),
        ((1, 2), "integer"),
        (None, "integer"),
        ("6f9619ff8b86d011b42d00cf4fc964ff", "uuid"),
        ("{6f9619ff-8b86-d011-b42d-00cf4fc964ff}", "uuid"),
        ("6f9619ff-8b86-d011-b42d-00cf4fc964ff\n", "uuid"),
        (7, "uuid"),
        (7, "text"),
        (b"a", "text"),
        ("a\0b", "text"),
        ("\ud800", "text"),
        (("a", "b"), "text"),
    ],
)
def test_a_key_of_another_form_is_refused(value: object, key_type: KeyType) -> None:
    with pytest.raises(InvalidKey) as raised:
        key_text(value, key_type, "users")
    assert raised.value.mapping == "users"
    assert "'users': pass one " in str(raised.value)
