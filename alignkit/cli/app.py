"""The `alignkit` command: its groups, global options and error messages. Imports no torch before a command needs it."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from alignkit import __version__
from alignkit.cli import plugins, prompts, rewards, runs
from alignkit.errors import AlignkitError


class _Group(TyperGroup):
    """Prints what alignkit raises on purpose as red lines, but for --debug; anything else is a bug and keeps its
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignkitError as error:
            if ctx.params["debug"]:
                raise
            for line in str(error).splitlines():
                typer.secho(f"error: {line}", fg="red", err=True)
            raise typer.Exit(1) from None


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
    # Before they are imported: their notes on optional packages and defaults are not about this run.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # that a look-up failed is told once, and not at every try


app.command("list")(plugins.list_)
app.command()(plugins.show)
app.command()(runs.check)
app.command()(runs.train)
app.command("prepare")(runs.prepare_)
app.command()(runs.sample)
app.command()(rewards.score)
app.command()(rewards.serve)
app.command()(runs.pairs)
app.command("evaluate")(runs.evaluate_)
app.command()(plugins.new)
app.command("check-plugin")(plugins.check_plugin)
app.add_typer(prompts.prompts_app, name="prompts")
