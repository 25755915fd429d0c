"""Mappings, flags and roles: read from walletmigrate.toml and the environment, each error with its line.

What is given wins in this order: arguments, environment (``WALLETMIGRATE_<FIELD>``, inside a table
``WALLETMIGRATE_FLAGS__POLL_SECONDS``), file. Secrets come from the environment or from arguments only.
"""

from __future__ import annotations

import os
import re
import tomllib
import uuid
from collections import abc
from contextvars import ContextVar
from datetime import timedelta
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from walletmigrate.configchecks import CrossCheck, fitting
from walletmigrate.configfields import (
    SQL_NAME,
    Address,
    BalanceColumn,
    BucketName,
    CallableName,
    Count,
    CurrencyName,
    Duration,
    Floor,
    KeyColumn,
    LedgerName,
    LegacyName,
    RoleName,
    Scale,
    Seconds,
    Share,
    TraitName,
    wrong,
)
from walletmigrate.configfile import (
    ENVIRONMENT_PREFIX,
    EXAMPLES,
    MAX_SCALE,
    Lines,
    Origin,
    config_error,
    fields_in_environment,
    file_values,
    raise_first,
    read_text,
    secrets_in,
    unreadable_variable,
)
from walletmigrate.errors import (
    ConfigError,
    InvalidAmount,
    InvalidKey,
    UnknownBucket,
    UnknownCurrency,
    UnknownMapping,
)

DEFAULT_FILE = "walletmigrate.toml"
MAX_INTEGER_DIGITS = 30

KeyType = Literal["integer", "uuid", "text"]
_KEYS: dict[KeyType, str] = {
    "integer": "one int of at most 64 bits",
    "uuid": "one uuid.UUID, or its text of 36 characters",
    "text": "one str without NUL",
}

_QUANTA = tuple(Decimal(1).scaleb(-scale) for scale in range(MAX_SCALE + 1))
_EXACT = Context(prec=MAX_INTEGER_DIGITS + MAX_SCALE, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[Inexact, InvalidOperation])
WIDE = Context(prec=200)
"""For sums and differences of amounts and balances: the application's own context may round."""

_SHORT = Context(prec=6, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)


class Column(_Model):
    """One writable balance column of a legacy table.

    ``unit`` "minor" means that the column counts the smallest unit (value = column / 10^scale). ``floor``
    (major units) binds debits only; None means that there is no floor.
    """

    bucket: BucketName
    column: BalanceColumn
    currency: CurrencyName
    scale: Scale
    unit: Literal["major", "minor"] = "major"
    floor: Floor | None = None

    @field_validator("floor")
    @classmethod
    def _floor_fits_scale(cls, floor: Decimal | None, info: ValidationInfo) -> Decimal | None:
        scale = info.data.get("scale")
        if floor is None or scale is None:
            return floor
        if not floor.is_finite() or floor.adjusted() >= MAX_INTEGER_DIGITS:
            raise wrong(f"{floor} is no amount of at most {MAX_INTEGER_DIGITS} digits")
        try:
            return _quantized(floor, scale)
        except Inexact:
            raise wrong(
                f"{floor} has more decimals than scale = {scale}", "round the floor or raise the scale"
            ) from None

    @property
    def quantum(self) -> Decimal:
        """The smallest amount of the currency, in major units: 0.01 at scale 2."""
        return _QUANTA[self.scale]


class Mapping(_Model):
    """One legacy table with its key, balance columns and trait columns (trait name → column).

    Names of the table and of its columns are spelt as the catalog has them, upper and lower case included.
    """

    name: LedgerName
    table: str
    key: KeyColumn
    policy: Literal["shadow", "strict"] = "shadow"
    traits: abc.Mapping[TraitName, LegacyName] = {}
    columns: tuple[Column, ...]
    cross_checks: tuple[CrossCheck, ...] = ()
    _origin: Origin = PrivateAttr(default_factory=Origin)

    def __hash__(self) -> int:
        return hash((self.name, self.table, self.key))

    @field_validator("table")
    @classmethod
    def _table_is_a_name(cls, table: str) -> str:
        parts = table.split(".")
        if len(parts) > 2 or not all(SQL_NAME.fullmatch(part) and len(part.encode()) <= 63 for part in parts):
            raise wrong(
                f"{table!r} is not the name of a table that can be mapped (letters, digits, _ and $)",
                'write schema and table, for example "public.users"; a table of another name has to be renamed first',
            )
        return table

    @field_validator("columns")
    @classmethod
    def _columns_differ(cls, columns: tuple[Column, ...], info: ValidationInfo) -> tuple[Column, ...]:
        if not columns:
            raise wrong("no column")
        money: set[tuple[str, str]] = set()
        names = {info.data.get("key")}
        for index, column in enumerate(columns):
            if (column.bucket, column.currency) in money:
                what = f"bucket {column.bucket!r} has a column in {column.currency} already"
                raise wrong(what, "give this column another bucket or currency", index, "bucket")
            if column.column in names:
                what = f"column {column.column!r} is in use in this mapping already"
                raise wrong(what, "each bucket needs a writable column of its own", index, "column")
            money.add((column.bucket, column.currency))
            names.add(column.column)
        return columns

    @field_validator("cross_checks")
    @classmethod
    def _checks_fit(cls, checks: tuple[CrossCheck, ...], info: ValidationInfo) -> tuple[CrossCheck, ...]:
        columns = info.data.get("columns")
        return fitting(checks, [(one.bucket, one.currency) for one in columns]) if columns else checks

    @property
    def schema_name(self) -> str:
        """The schema of the legacy table; "public" if the configuration names none."""
        return self.table.rpartition(".")[0] or "public"

    @property
    def table_name(self) -> str:
        """The legacy table without its schema."""
        return self.table.rpartition(".")[2]

    @property
    def buckets(self) -> tuple[str, ...]:
        """The names of the buckets, in the order of the configuration; the first is the default."""
        return tuple(dict.fromkeys(column.bucket for column in self.columns))

    def column(self, bucket: str | None = None, currency: str | None = None) -> Column:
        """The column of a bucket (default: the first column's) and a currency (default: its only one).

        Raises UnknownBucket, or UnknownCurrency if there is none such or several and none was named.
        """
        bucket = self.columns[0].bucket if bucket is None else bucket
        here = [column for column in self.columns if column.bucket == bucket]
        if not here:
            raise UnknownBucket(self.name, bucket, self.buckets)
        found = [column for column in here if currency is None or column.currency == currency]
        if len(found) != 1:
            raise UnknownCurrency(self.name, bucket, currency, tuple(column.currency for column in here))
        return found[0]

    def problem(self, message: str, fix: str, *place: str | int) -> ConfigError:
        """An error about this mapping, with file and line when it came from a file.

        ``place`` is the path inside the mapping, such as ``"key"`` or ``"columns", 0, "scale"``.
        """
        return self._origin.error(message, fix, *place)


class FlagSettings(_Model):
    """Where flags come from: a file, or a Flagsmith server that is polled every ``poll_seconds``."""

    source: Literal["file", "flagsmith"] = "file"
    path: Path = Path("flags/environment.json")
    api_url: Address = ""
    poll_seconds: Seconds = 10

    @field_validator("api_url")
    @classmethod
    def _url_of_the_server(cls, url: str, info: ValidationInfo) -> str:
        if not url and info.data.get("source") == "flagsmith":
            raise wrong('missing, and source = "flagsmith" needs it')
        return url if not url or url.endswith("/") else url + "/"


class CaptureSettings(_Model):
    """What the catalogue of writes past the adapter keeps. A query's raw text may hold personal data, so it is off."""

    raw_queries: bool = False
    retention: Duration = timedelta(days=30)


class ExporterSettings(_Model):
    """Where `walletmigrate exporter` listens, as seen from where `doctor` is called; empty: doctor does not look.

    A statement of its look at the database may take ``look_seconds``; what it saw is served for ``hold_seconds``.
    """

    url: Address = ""
    look_seconds: Seconds = 6
    hold_seconds: Seconds = 10


class ThrottleSettings(_Model):
    """Limits above which jobs stand still; one that is not set is not looked at. ``check`` names a callable.

    ``snapshot_seconds`` is how long in all they hold a job with its snapshot open, before it ends.
    """

    replica_lag_seconds: Seconds | None = None
    lock_waits: Count | None = None
    active_sessions: Count | None = None
    wal_bytes_per_second: Count | None = None
    batch_seconds: Seconds | None = None
    check: CallableName | None = None
    snapshot_seconds: Seconds = 600


class Roles(_Model):
    """Names of the database roles. All four differ: the owner's rights must not reach the application."""

    owner: RoleName = "wallet_owner"
    app: RoleName = "wallet_app"
    operator: RoleName = "wallet_operator"
    auditor: RoleName = "wallet_auditor"

    @field_validator("app", "operator", "auditor")
    @classmethod
    def _roles_differ(cls, role: str, info: ValidationInfo) -> str:
        if role in info.data.values():
            raise wrong(f"role {role!r} stands for two roles", "give owner, app, operator and auditor a role each")
        return role


_FILE_VALUES: ContextVar[dict[str, Any]] = ContextVar("walletmigrate_file_values")


class _FileSource(PydanticBaseSettingsSource):
    """What `Settings.load` has read; nothing when Settings is built directly."""

    def get_field_value(
        self,
        field: FieldInfo,  # noqa: ARG002 (the signature of the base class)
        field_name: str,
    ) -> tuple[Any, str, bool]:
        return _FILE_VALUES.get({}).get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return _FILE_VALUES.get({})


class Settings(BaseSettings):
    """The whole configuration. Built from arguments and environment, or by `load` also from a file.

    The field ``ledger_schema`` is ``schema`` in the file and WALLETMIGRATE_LEDGER_SCHEMA in the environment.
    Building it directly from wrong arguments raises pydantic's ValidationError.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    database_url: SecretStr | None = None
    flagsmith_key: SecretStr | None = None
    flagsmith_admin_key: SecretStr | None = None
    replica_urls: SecretStr | None = None
    ledger_schema: LedgerName = "wallet"
    observation_window: Duration = timedelta(days=7)
    compare_share: Share = 1.0
    flags: FlagSettings = FlagSettings()
    capture: CaptureSettings = CaptureSettings()
    throttle: ThrottleSettings = ThrottleSettings()
    exporter: ExporterSettings = ExporterSettings()
    roles: Roles = Roles()
    mappings: tuple[Mapping, ...] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the base class's signature)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the base class's signature)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, file: in this order."""
        return init_settings, env_settings, _FileSource(settings_cls)

    @field_validator("ledger_schema")
    @classmethod
    def _schema_is_free(cls, schema: str) -> str:
        if schema.startswith("pg_") or schema in ("information_schema", "public"):
            raise wrong(f"schema {schema!r} belongs to PostgreSQL or the application", 'write schema = "wallet"')
        return schema

    @field_validator("database_url")
    @classmethod
    def _url_of_postgres(cls, url: SecretStr | None) -> SecretStr | None:
        try:
            known = url is None or make_url(url.get_secret_value()).drivername.startswith("postgres")
        except ArgumentError:
            known = False
        if not known:
            raise wrong("not the URL of a PostgreSQL database", "write postgresql://user@host:5432/database")
        return url

    @field_validator("mappings")
    @classmethod
    def _mappings_differ(cls, mappings: tuple[Mapping, ...]) -> tuple[Mapping, ...]:
        names: set[str] = set()
        columns: dict[tuple[str, str, str], str] = {}
        for index, mapping in enumerate(mappings):
            if mapping.name in names:
                raise wrong(f"two mappings are named {mapping.name!r}", "give one another name", index, "name")
            names.add(mapping.name)
            for at, column in enumerate(mapping.columns):
                place = (mapping.schema_name, mapping.table_name, column.column)
                if place in columns:
                    what = f"column {column.column!r} is in mapping {columns[place]!r} already"
                    raise wrong(what, "one column belongs to one mapping", index, "columns", at, "column")
                columns[place] = mapping.name
        return mappings

    @classmethod
    def load(cls, path: Path | str | None = None, **overrides: Any) -> Settings:
        """Read a file (None: WALLETMIGRATE_CONFIG, else ./walletmigrate.toml), environment, ``overrides``.

        An override that is None counts as not given. Raises ConfigError for the first problem (by line); its
        ``fix`` counts the others, and its notes (``__notes__``) are their texts.
        """
        file = Path(path or os.environ.get(ENVIRONMENT_PREFIX + "CONFIG") or DEFAULT_FILE)
        given = {name: value for name, value in overrides.items() if value is not None}
        text = read_text(file)
        values = tomllib.loads(text)
        origin = Origin(str(file), Lines(text).found)
        problems = list(secrets_in(values, origin))
        settings = None
        token = _FILE_VALUES.set(file_values(values, file))
        try:
            settings = cls(**given)
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)
            problems += [config_error(dict(one), origin, given, _KNOWN) for one in found]
        except SettingsError:
            problems.append(unreadable_variable())
        finally:
            _FILE_VALUES.reset(token)
        if settings and not settings.mappings:
            problems.append(origin.error("no mapping.", f"add {EXAMPLES['mappings']}."))
        if problems or settings is None:
            raise_first(problems)
        if "mappings" not in given.keys() | fields_in_environment():
            for index, mapping in enumerate(settings.mappings):
                mapping._origin = Origin(origin.file, origin.lines, ("mappings", index))
        return settings

    def mapping(self, name: str | None = None) -> Mapping:
        """The mapping of that name; None means the only one. Raises UnknownMapping."""
        if name is None and len(self.mappings) == 1:
            return self.mappings[0]
        for mapping in self.mappings:
            if mapping.name == name:
                return mapping
        known = tuple(mapping.name for mapping in self.mappings)
        raise UnknownMapping("(none named)" if name is None else name, known)


_KNOWN = {
    (): tuple("schema" if name == "ledger_schema" else name for name in Settings.model_fields),
    ("flags",): tuple(FlagSettings.model_fields),
    ("capture",): tuple(CaptureSettings.model_fields),
    ("throttle",): tuple(ThrottleSettings.model_fields),
    ("exporter",): tuple(ExporterSettings.model_fields),
    ("roles",): tuple(Roles.model_fields),
    ("mappings",): tuple(Mapping.model_fields),
    ("mappings", "columns"): tuple(Column.model_fields),
    ("mappings", "cross_checks"): tuple(CrossCheck.model_fields),
}


def _quantized(value: Decimal, scale: int) -> Decimal:
    """``value`` with exactly ``scale`` decimals, zero without a sign. Raises Inexact rather than round."""
    result = value.quantize(_QUANTA[scale], context=_EXACT)
    return result or result.copy_abs()


def exact(amount: Decimal | int, column: Column, *, allow_negative: bool = False, allow_zero: bool = False) -> Decimal:
    """``amount`` (major units) as a Decimal with exactly the column's decimals.

    Positive amounts only, unless allowed otherwise (targets of set_balance). Zeros after the last decimal do
    not count: 1.50 is an amount at scale 1. Raises InvalidAmount.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | Decimal):
        raise InvalidAmount(amount, f"pass a Decimal or an int, not {type(amount).__name__}")
    value = Decimal(amount)
    if not value.is_finite():
        raise InvalidAmount(amount, "pass a finite number")
    if value and value.adjusted() >= MAX_INTEGER_DIGITS:
        # Shortened: an int of thousands of digits has no repr at all.
        raise InvalidAmount(_SHORT.plus(value), f"pass at most {MAX_INTEGER_DIGITS} digits before the point")
    if not value and not allow_zero:
        raise InvalidAmount(amount, "pass another than zero" if allow_negative else "pass more than zero")
    if value < 0 and not allow_negative:
        raise InvalidAmount(amount, "pass a positive amount; the operation gives the direction")
    try:
        return _quantized(value, column.scale)
    except Inexact:
        problem = f"{column.currency} has {column.scale} decimals in bucket {column.bucket!r}; round it first"
        raise InvalidAmount(amount, problem) from None


def key_value(text: str, key_type: KeyType) -> int | uuid.UUID | str:
    """The key of this canonical text, as an application has it."""
    return int(text) if key_type == "integer" else uuid.UUID(text) if key_type == "uuid" else text


def key_text(value: object, key_type: KeyType, mapping: str = "") -> str:
    """The canonical text of an account key, the same for equal keys. ``mapping`` names it in the error.

    integer: an int of 64 bits; uuid: a UUID or its 36 characters, any case; text: a str without NUL.
    Raises InvalidKey.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidKey(mapping, f"int of {value.bit_length()} bits", _KEYS[key_type])
    if key_type == "integer" and isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    if key_type == "uuid" and isinstance(value, uuid.UUID):
        return str(value)
    if key_type == "uuid" and isinstance(value, str) and _UUID.fullmatch(value):
        return value.lower()
    if key_type == "text" and isinstance(value, str) and not _UNSTORABLE.search(value):
        return str.__str__(value)
    raise InvalidKey(mapping, value, _KEYS[key_type])
