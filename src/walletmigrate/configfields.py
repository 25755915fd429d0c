"""The types of single values in the configuration, each with a message and a fix of its own."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from walletmigrate.configfile import MAX_SCALE

SQL_NAME = re.compile(r"(?!.*\$\$)[^\W\d][\w$]*")
"""A name of the legacy database. Two dollars in a row would end the functions that it stands in."""
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def wrong(text: str, fix: str = "", *path: str | int) -> PydanticCustomError:
    """A problem in one value; ``path`` leads from the validated value to the part that is wrong."""
    return PydanticCustomError("walletmigrate", "{text}", {"text": text, "fix": fix, "path": path})


def _spelt(pattern: str, rule: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise wrong(f"{value!r} is no usable name: {rule}")
        return value

    return AfterValidator(check)


def _legacy_name(value: str) -> str:
    if not SQL_NAME.fullmatch(value) or len(value.encode()) > 63:
        raise wrong(f"{value!r} is not the name of a column", "name one column, spelt as in the database")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong("not a whole number")
    return value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise wrong("not a number")
    return value


def _single_key(value: object) -> object:
    if isinstance(value, list | tuple) or (isinstance(value, str) and "," in value):
        raise wrong(
            "composite keys are not supported: an account is identified by one column",
            'name a column that is unique and not null, such as key = "id"; add one to the table if need be',
        )
    return value


def _single_column(value: object) -> object:
    if isinstance(value, str) and not SQL_NAME.fullmatch(value):
        raise wrong(
            f"{value!r} is an expression or no name of letters, digits, _ and $; a legacy balance must be one writable "
            "column",
            "name the column itself; several columns are several [[mappings.columns]] with a bucket each",
        )
    return value


def _duration(value: object) -> object:
    if isinstance(value, timedelta) and value >= timedelta(0):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise wrong("not a duration", 'write a number and s, m, h or d, for example observation_window = "7d"')
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _exact_floor(value: object) -> object:
    if isinstance(value, bool | float):
        raise wrong("a floor must be exact, so it cannot be a float or a boolean", f'write floor = "{value}"')
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", value.strip()):
        raise wrong(f"{value!r} is not an amount", 'write digits in major units, for example floor = "-50.00"')
    return value


def _exact_tolerance(value: object) -> object:
    if isinstance(value, bool | float):
        raise wrong("a tolerance must be exact, so it cannot be a float or a boolean", f'write tolerance = "{value}"')
    if isinstance(value, str) and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value.strip()):
        raise wrong(f"{value!r} is no tolerance", 'write digits in major units, for example tolerance = "0.50"')
    if isinstance(value, int | Decimal) and not value >= 0:
        raise wrong("a tolerance is not negative", 'write tolerance = "0.50"')
    return value


def _one_query(value: object) -> object:
    query = value.strip().rstrip(";").rstrip() if isinstance(value, str) else ""
    if not query or "\0" in query:
        raise wrong("not a query", 'write sql = "select user_id as key, sum(amount) as expected from … group by 1"')
    return query


def _callable_name(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"python:[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
        raise wrong("not the name of a function", 'write check = "python:module:function"')
    return value


def _address(value: str) -> str:
    if value and (not re.match(r"https?://[^/\s]", value) or "@" in value):
        raise wrong("not an http or https address without a user")
    return value


LedgerName = Annotated[str, _spelt(r"[a-z][a-z0-9_]{0,39}", "a small letter, then up to 39 of a-z, 0-9 and _")]
CheckName = Annotated[str, _spelt(r"[a-z][a-z0-9_-]{0,39}", "a small letter, then up to 39 of a-z, 0-9, _ and -")]
BucketName = Annotated[str, _spelt(r"[a-z][a-z0-9_]{0,30}", "a small letter, then up to 30 of a-z, 0-9 and _")]
CurrencyName = Annotated[str, _spelt(r"[A-Z][A-Z0-9]{1,11}", "2 to 12 of A-Z and 0-9, a letter first")]
RoleName = Annotated[str, _spelt(r"[a-z_][a-z0-9_]{0,62}", "a small letter or _, then up to 62 of a-z, 0-9 and _")]
TraitName = Annotated[
    str, _spelt(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}", "a letter, then up to 62 of letters, digits, _ . -")
]
LegacyName = Annotated[str, AfterValidator(_legacy_name)]
Address = Annotated[str, AfterValidator(_address)]


KeyColumn = Annotated[LegacyName, BeforeValidator(_single_key)]
BalanceColumn = Annotated[LegacyName, BeforeValidator(_single_column)]
Scale = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_SCALE)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=1)]
Seconds = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=86_400)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
CallableName = Annotated[str, BeforeValidator(_callable_name)]
Duration = Annotated[timedelta, BeforeValidator(_duration)]
Floor = Annotated[Decimal, BeforeValidator(_exact_floor)]
Tolerance = Annotated[Decimal, BeforeValidator(_exact_tolerance)]
Query = Annotated[str, BeforeValidator(_one_query)]
