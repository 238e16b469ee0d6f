"""Commands that plugins add to the command line, built when they are called and not before."""

from __future__ import annotations

from typing import Any

import typer

from alignkit.errors import PluginError
from alignkit.registry import Component, Registry


def build(registry: Registry, row: Component) -> Any:
    """Import the target of a command and return it as a click command.

    Raises PluginError for a target that cannot be imported, and for parameters that typer cannot read.
    """
    target = registry.get("command", row.name)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=row.name, help=target.info.help or row.help)
    else:
        app.command(row.name, help=target.__doc__ or row.help)(target)
    try:
        return typer.main.get_group(app).commands[row.name]
    except Exception as error:
        raise PluginError(
            f"command {row.name} ({row.target}, {row.origin}): its parameters cannot be read by typer: {error}"
        ) from error
