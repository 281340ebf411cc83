"""What every command shares: its usual options, how it speaks, and how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, errors included.")
set_option = click.option(
    "-s", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. -s tuning.r=16."
)


def _sources(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return what a shell offers for a run: presets, then files."""
    from importlib.resources import files

    names = sorted(path.name.removesuffix(".toml") for path in files("privfed").joinpath("presets").iterdir())
    return [
        *map(CompletionItem, (n for n in names if n.startswith(incomplete))),
        CompletionItem(incomplete, type="file"),
    ]


source_argument = click.argument("source", metavar="RUN.TOML|PRESET", shell_complete=_sources)


class Group(click.Group):
    """A group that suggests the nearest command and ends with privfed's exit codes."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from privfed.errors import nearest

            hint = nearest(args[0], self.list_commands(ctx)) if args else ""
            raise click.UsageError(f"{error.message}{hint}", ctx=ctx) from error


class Root(Group):
    """The whole command line: with ``--json`` a usage error is one object on stdout like any other."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        try:
            return super().main(args, *rest, **{**options, "standalone_mode": False})
        except click.ClickException as error:
            if "--json" in given:
                _fail(error.format_message(), type(error).__name__, error.exit_code, as_json=True)
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            _fail("Stopped.", "Interrupted", 1, "--json" in given)


def say(as_json: bool, *lines: str) -> None:
    """Print an answer's lines on stdout, unless it goes there as JSON."""
    if not as_json:
        for line in lines:
            click.echo(line)


def log(line: str) -> None:
    """Say on stderr what is being done."""
    click.echo(line, err=True)


def run_body(body: Callable[[], Mapping[str, Any]], as_json: bool) -> None:
    """Run a command's body; turn privfed's errors into one sentence and its exit code."""
    from privfed.errors import PrivfedError

    try:
        found = body()
    except PrivfedError as error:
        _fail(str(error), type(error).__name__, error.exit_code, as_json)
    except KeyboardInterrupt:
        _fail("Stopped. Continue a run with --resume.", "Interrupted", 1, as_json)
    except BrokenPipeError:
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(found, indent=1, allow_nan=False))
    if found.get("ok") is False:
        if "message" in found and not as_json:
            click.echo(f"Error: {found['message']}", err=True)
        sys.exit(int(found.get("exit_code", 1)))


def _fail(message: str, kind: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}, indent=1))
    else:
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)
