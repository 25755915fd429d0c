"""The ledger's schema: SQL files rendered for a configuration, and the migrations that make it.

The SQL files are Jinja templates; every name that enters them is quoted here or checked by the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from sqlalchemy import Connection, text

if TYPE_CHECKING:
    # Imported where it is used: an application that posts needs none of it, and most commands do not.
    from alembic.config import Config
    from alembic.script import ScriptDirectory

VERSION_TABLE = "schema_version"


def quoted(name: str) -> str:
    """An identifier as SQL writes it, whatever it contains."""
    return '"' + name.replace('"', '""') + '"'


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("walletmigrate", "sql")
    return jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def render(name: str, **context: Any) -> str:
    """The SQL of ``sql/<name>.sql`` for these names. A missing name is an error, never an empty string."""
    return _environment().get_template(f"{name}.sql").render(**context)


def statements(name: str, **context: Any) -> dict[str, str]:
    """The statements of ``sql/<name>.sql`` by the names that stand before them (``-- name: …``)."""
    parts = render(name, **context).split("-- name: ")[1:]
    named = (part.split("\n", 1) for part in parts)
    return {title.strip(): body.rstrip().removesuffix(";") for title, body in named}


def run_script(connection: Connection, sql: str) -> None:
    """Run a script of several statements as it stands: a percent sign in it is no placeholder."""
    connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


def installed(connection: Connection, schema: str) -> bool:
    """Whether the ledger's migrations have been run in this database."""
    return bool(
        connection.scalar(text("select to_regclass(:t) is not null"), {"t": f"{quoted(schema)}.{VERSION_TABLE}"})
    )


def revision(connection: Connection, schema: str) -> str | None:
    """The migration the schema stands at, None when there is none."""
    from alembic.migration import MigrationContext

    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema}
    )
    return context.get_current_revision()


def head() -> str:
    """The newest migration this release ships."""
    found = _scripts().get_current_head()
    assert found is not None
    return found


def known(revision: str) -> bool:
    """Whether this release ships the migration of that name."""
    return any(one.revision == revision for one in _scripts().walk_revisions())


def migrate(connection: Connection, schema: str) -> None:
    """Bring the schema to this release's newest migration, in the caller's transaction. Idempotent."""
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    config.attributes["schema"] = schema
    command.upgrade(config, "head")


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.files("walletmigrate") / "migrations"))
    return config


def hide_from_autogenerate(schema: str = "wallet") -> Any:
    """An ``include_name`` hook for the application's own Alembic, so that it does not see the ledger.

    Pass it as ``context.configure(include_schemas=True, include_name=hide_from_autogenerate())``.
    """

    def include_name(name: str | None, kind: str, parents: MappingABC[str, str | None]) -> bool:
        return not ((kind == "schema" and name == schema) or parents.get("schema_name") == schema)

    return include_name
