"""The `alignkit` command: global options, commands, error messages. Imports torch only when a command needs it."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from alignkit import __version__
from alignkit.cli import pairs, plugins, prompts, results, rewards, runs
from alignkit.commands.added import build
from alignkit.errors import AlignkitError
from alignkit.registry import Component, default_registry, normalise


class _Added(TyperCommand):
    """A command of a plugin: listed with its line of help, imported when it or its `--help` is called."""

    def __init__(self, row: Component) -> None:
        super().__init__(row.name, help=row.help)
        self._row = row

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return build(default_registry(), self._row).make_context(*args, **kwargs)


class _Group(TyperGroup):
    """The commands of alignkit and of plugins.

    Errors that alignkit raises on purpose are printed as red lines, except with --debug; any other error is a bug and
    keeps its traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        try:
            added = [row.name.replace("_", "-") for row in _added()]
        except AlignkitError as error:  # two plugins with the same name; --help still works
            _print_error(error)
            added = []
        return [*super().list_commands(ctx), *added]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        if found := [row for row in _added() if row.name == normalise(cmd_name)]:
            return _Added(found[0])
        for row in default_registry().components("command"):
            if row.broken:  # the command may be one of this plugin
                typer.secho(f"warning: {row.origin} is broken: {row.broken}", fg="yellow", err=True)
        return None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignkitError as error:
            if ctx.params["debug"]:
                raise
            _print_error(error)
            raise typer.Exit(1) from None
        except OSError as error:  # of a file that nothing above expected to fail; a closed pipe has no name
            if ctx.params["debug"] or error.filename is None:
                raise
            reason = (error.strerror or type(error).__name__).lower()
            _print_error(AlignkitError(f"{error.filename}: {reason}; correct the path, or its permissions"))
            raise typer.Exit(1) from None


def _added() -> list[Component]:
    return [row for row in default_registry().components("command") if not row.broken]


def _print_error(error: AlignkitError) -> None:
    for line in str(error).splitlines():
        # Messages quote files and servers, whose control characters would reach the terminal.
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in line)
        typer.secho(f"error: {plain}", fg="red", err=True)


app = typer.Typer(
    cls=_Group,
    help="Reward alignment of few-step text-to-image diffusion models.\n\nTry `alignkit train --algo lasro --reward "
    "attribute_binding`: it needs no download and runs on a laptop.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    if version:
        typer.echo(f"alignkit {__version__}")
        raise typer.Exit
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters, such as Greek ones in code page 1252
            stream.reconfigure(errors="backslashreplace")
    # Set before the libraries are imported: their notes on optional packages do not concern this run.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # report a failed look-up once, not at every retry


app.command("list")(plugins.list_components)
app.command()(plugins.show)
app.command()(runs.check)
app.command()(runs.train)
app.command("prepare")(runs.prepare_run)
app.command()(runs.sample)
app.command()(rewards.score)
app.command()(rewards.serve)
app.command()(pairs.pairs)
app.command()(pairs.prefer)
app.command("evaluate")(runs.evaluate_runs)
app.command("gallery")(runs.draw_gallery)
app.command()(runs.report)
app.command("export")(results.export_run)
app.command()(plugins.new)
app.command("check-plugin")(plugins.check_plugin)
app.add_typer(prompts.prompts_app, name="prompts")
