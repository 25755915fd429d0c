"""How a function becomes a command: the options that all share, and how every command ends."""

from __future__ import annotations

import inspect
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version as version_of
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import typer
from sqlalchemy.exc import DBAPIError
from typer.core import TyperGroup

from walletmigrate import command_log, connect, console, rights, schema
from walletmigrate.console import Answer
from walletmigrate.errors import DatabaseUnreachable, UsageError, WalletMigrateError
from walletmigrate.functions import FUNCTIONS_VERSION
from walletmigrate.invocation import Run

Handler = TypeVar("Handler", bound=Callable[..., Answer])

_ClickError: type[Any] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")

CONFIG = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration. Default: WALLETMIGRATE_CONFIG, walletmigrate.toml."),
]
DATABASE_URL = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        metavar="URL",
        help="PostgreSQL. Better: WALLETMIGRATE_DATABASE_URL, unseen by ps.",
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
WORKERS = Annotated[int | None, typer.Option("--workers", min=1, max=1000, help="Processes; with --dask, tasks.")]
DASK = Annotated[
    str | None,
    typer.Option("--dask", metavar="tcp://HOST:PORT", help="Run on a Dask cluster; by default on all of it."),
]


def versions() -> Answer:
    """Of the package, of what it stands on, and of the schema and functions that its ``install`` makes."""
    names = ("walletmigrate", "sqlalchemy", "psycopg", "flagsmith")
    found = {name: version_of(name) for name in names} | {"python": platform.python_version()}
    others = ", ".join(f"{name} {number}" for name, number in found.items() if name != "walletmigrate")
    installs = {"schema_revision": schema.head(), "functions_version": FUNCTIONS_VERSION}
    lines = (
        f"walletmigrate {found['walletmigrate']} ({others})",
        f"installs schema revision {installs['schema_revision']}, functions version {FUNCTIONS_VERSION}",
    )
    return Answer({"versions": found, **installs}, lines)


def _tell_version(context: typer.Context, asked: bool) -> None:
    if asked:
        raise typer.Exit(console.show("version", versions(), as_json=bool(context.obj)))


VERSION = Annotated[
    bool,
    typer.Option(
        "--version",
        is_eager=True,
        callback=_tell_version,
        help="The same as the command `version`.",
    ),
]
_DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Check and tell, change nothing.")]
_ACTOR = Annotated[
    str | None, typer.Option("--actor", help="Who does this. Default: WALLETMIGRATE_ACTOR, else user:NAME.")
]
_REASON = Annotated[str | None, typer.Option("--reason", help="Why, for the audit log. Wanted for every change.")]
_CONFIRM = Annotated[
    str | None, typer.Option("--confirm", metavar="MAPPING", help="The mapping's name; asked for on a terminal.")
]

Role = Literal["app", "operator", "auditor", "installer", "none"]
"""Which role of the configuration a command runs with. An installer owns the legacy tables and may make roles; with
"none" no right on the ledger is needed.
"""

ROLES: Final[dict[str, Role]] = {}
"""Every command and its role; see docs/roles.md."""

_VARIABLES: Final = {
    "--database-url": "WALLETMIGRATE_DATABASE_URL",
    "--from-database": "WALLETMIGRATE_FROM_DATABASE",
}

BEGIN_ANEW: Final = frozenset({"verify", "archive", "archive check", "snapshot verify", "evidence", "evidence check"})
"""Commands that prove something of one moment: half of it proves nothing, and is not gone on with."""

LOOK_FIRST: Final = {
    "adjust": "walletmigrate history --account KEY",
    "phase advance": "walletmigrate phase show",
    "phase back": "walletmigrate phase show",
    "rollback": "walletmigrate phase show",
}
"""Commands that would do another step if they were run again after they have done theirs, as `adjust`, the phase's
without ``--to``, and ``rollback --exercise``; and what shows whether they have.
"""

COMMON: Final = {"config": (CONFIG, None), "database_url": (DATABASE_URL, None), "as_json": (JSON, False)}
CHANGES: Final = {"dry_run": (_DRY_RUN, False), "actor": (_ACTOR, None), "reason": (_REASON, None)}
CONFIRMS: Final = {"confirm": (_CONFIRM, None)}


def command(
    app: typer.Typer,
    name: str,
    *,
    group: str = "",
    changes: bool = False,
    confirms: bool = False,
    role: Role | None = None,
) -> Callable[[Handler], Handler]:
    """Register ``handler(run, **its own options) -> Answer`` as a command with the options that all share.

    Without a name it is what the group itself does when no command of the group is named.
    Without ``role``, what changes something runs as an operator, and what only looks as an auditor.
    """
    options = {**COMMON, **(CHANGES if changes else {}), **(CONFIRMS if confirms else {})}
    full_name = f"{group} {name}".strip()
    ROLES[full_name] = role or ("operator" if changes else "auditor")

    def register(handler: Handler) -> Handler:
        def invoke(context: typer.Context, **values: Any) -> int:
            if context.invoked_subcommand is not None:
                return console.OK
            root = context.find_root().params
            shared: dict[str, Any] = {option: values.pop(option) or root.get(option) for option in COMMON}
            rest: dict[str, Any] = {option: values.pop(option) for option in options if option not in COMMON}
            run = Run(full_name, **shared, **rest, changes=changes, mapping=values.get("mapping"))
            return carry_out(run, lambda run: handler(run, **values))

        _disguise(invoke, handler, options)
        (app.command(name) if name else app.callback(invoke_without_command=True))(invoke)
        return handler

    return register


def carry_out(run: Run, call: Callable[[Run], Answer]) -> int:
    """Call, print what came of it, and give the exit code; of what changes something, tell the log. Nothing escapes
    but what ends the process.
    """
    began = time.monotonic()
    try:
        code = _ended(run, call)
        if run.changes:
            command_log.tell(run, code, time.monotonic() - began)
        return code
    finally:
        run.close()


def _ended(run: Run, call: Callable[[Run], Answer]) -> int:
    try:
        if run.changes:
            command_log.check(run)
        return console.show(run.command, call(run), as_json=run.as_json)
    except WalletMigrateError as error:
        return console.show_error(run.command, error, as_json=run.as_json)
    except DBAPIError as error:
        known = rights.missing(run, ROLES.get(run.command, "installer"), error) or console.typed(error, run.address)
        if isinstance(known, DatabaseUnreachable) and error.connection_invalidated and run.command in LOOK_FIRST:
            # It was there; so the commit may have been done, and only its answer be lost.
            detail = f"{known.detail}; what was asked for may be done: {_how_to_go_on(run.command)}"
            known = replace(known, detail=detail)
        return console.show_error(run.command, known, as_json=run.as_json)
    except BrokenPipeError:
        # Who read the answer has gone, as `head` does; nor can Python's own flush at the end reach anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return console.FAILURE
    except (KeyboardInterrupt, typer.Abort):
        said = f"interrupted: what was committed stays; {_how_to_go_on(run.command)}"
        return console.show_failure(run.command, "interrupted", said, console.INTERRUPTED, as_json=run.as_json)
    except Exception as error:  # noqa: BLE001 - a defect, too, ends with one document and a code
        console.say("".join(traceback.format_exception(error)))
        said = f"internal error: {type(error).__name__}: {error}"
        return console.show_failure(run.command, "internal", said, console.FAILURE, as_json=run.as_json)


def _how_to_go_on(command: str) -> str:
    if look := LOOK_FIRST.get(command):
        return f"look, before you run the same command again, at: {look}"
    return f"the same command {'begins anew' if command in BEGIN_ANEW else 'goes on from there'}"


def _tell_of_secrets(words: Sequence[str]) -> None:
    """A password in an argument is seen by every user of the machine, and kept by the shell."""
    for before, word in pairwise(["", *words]):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if connect.has_secret(value):
            instead = _VARIABLES.get(option, _VARIABLES["--database-url"])
            console.say(
                f"a password stands in {option or 'an argument'}, where `ps` and the shell's history show it: put the "
                f"URL into {instead}, or the password into the file that PGPASSFILE names or into a service file"
            )


class Group(TyperGroup):
    """The root command: errors of usage end like all others, also under --json."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run and exit with the command's code."""
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        _tell_of_secrets(words)
        try:
            # For what is printed before the options are read: --version.
            code = super().main(args=words, **{**extra, "standalone_mode": False, "obj": as_json})
        except _ClickError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                console.say(error.format_message())
                sys.exit(console.USAGE)
            context = getattr(error, "ctx", None)
            said = context.command_path.partition(" ")[2] if context else ""
            hint = f" See: walletmigrate {said} --help".replace("  ", " ")
            failure = UsageError(error.format_message() + hint)
            sys.exit(console.show_error(said, failure, as_json=as_json))
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(console.show_failure("", "interrupted", "interrupted", console.INTERRUPTED, as_json=as_json))
        sys.exit(code if isinstance(code, int) else console.OK)


class WithDefault(TyperGroup):
    """A command that has commands below it: what names none of these is the command itself."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name in front of what is not one of the others'."""
        if not args or args[0] not in self.commands:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def below(app: typer.Typer, name: str) -> typer.Typer:
    """A group for commands below one that is registered already, such as `backfill undo` below `backfill`."""
    known = next(one for one in app.registered_commands if one.name == name)
    app.registered_commands.remove(known)
    group = typer.Typer(cls=WithDefault)
    known.name = WithDefault.default
    group.registered_commands.append(known)
    app.add_typer(group, name=name, help=inspect.getdoc(known.callback))
    return group


def _disguise(invoke: Callable[..., int], handler: Callable[..., Answer], options: dict[str, tuple[Any, Any]]) -> None:
    """Give ``invoke`` the signature that Typer reads: the handler's own options, then the shared ones."""
    own = list(inspect.signature(handler, eval_str=True).parameters.values())[1:]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(one.replace(kind=kind) for one in own),
        *(inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in options.items()),
    ]
    # `inspect.signature` reads it where it is set; the type of functions has no word of it.
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {one.name: one.annotation for one in parameters}
    invoke.__doc__ = handler.__doc__
