"""Print the results of commands: JSON for programs, tables and lists for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import typer

from alignkit.registry import Component, plural

if TYPE_CHECKING:
    from rich.console import Console


class _Lasting:
    """A stream that goes silent when it can no longer be written, as when its pipe is closed or its disk is full."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        # What waits in the buffer is written once more when Python ends, and would change its exit status.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting_console(stderr: bool = False, plain: bool = False) -> Console:
    """Return a console whose stream may close while the command runs; with `plain` it is never a terminal."""
    from rich.console import Console

    stream: Any = _Lasting(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, force_terminal=False if plain else None, markup=False, highlight=False)


@contextmanager
def loading(console: Console | None = None) -> Iterator[None]:
    """Show that libraries load, which takes seconds, on a terminal; with a `console`, also in a log."""
    shown = console or lasting_console(stderr=True)
    what = "loading torch, diffusers and transformers"
    if shown.is_terminal:
        with shown.status(what):
            yield
    else:
        if console is not None:
            console.print(what)
        yield


def print_json(value: Any) -> None:
    """Print a value as indented JSON; what JSON lacks is printed as a string."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table without lines, its columns wrapped to the width of the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)


def print_components(rows: Sequence[Component]) -> None:
    """Print a heading for each kind and each component with its line of help, wrapped to the width of the terminal.

    The distribution is printed unless it is alignkit. Plugins that cannot be used come last, with the full reason.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    working = [row for row in rows if not row.broken]
    for kind in dict.fromkeys(row.kind for row in working):
        console.print(Text(plural(kind), "bold"))
        group = [row for row in working if row.kind == kind]
        width = max(len(row.name) for row in group)
        for row in group:
            origin = "" if row.distribution == "alignkit" else f"  ({row.distribution} {row.version})".rstrip()
            about = Text.assemble(" ".join(row.help.split()), (origin, "dim"))
            name = row.name
            for line in about.wrap(console, max(console.width - width - 4, 8)):
                line.rstrip()
                console.print(Text.assemble("  ", (f"{name:<{width}}", "cyan"), "  ", line), soft_wrap=True)
                name = ""
    if len(working) < len(rows):
        console.print(Text("broken plugins", "bold red"))
    for row in rows:
        if row.broken:
            text = Text.assemble((row.name, "red"), f"  {row.broken}", (f"  ({row.distribution} {row.version})", "dim"))
            console.print(Padding(text, (0, 0, 0, 2)))


def print_component(item: Mapping[str, Any], chosen: bool) -> None:
    """Print a component or section as `alignkit.commands.show.show` gives it.

    `chosen`: the user named the model, so a model without settings for the component is reported too.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"{item['kind']} {item['name']}", "bold cyan"), Text(item["origin"], "dim"))
    console.print(Text(f"{item['doc']}\n"))
    if "text" in item:
        typer.echo(item["text"].rstrip())
    for field in item["fields"]:
        default = "required" if field["default"] is None else f"= {field['default']}"
        console.print(Text.assemble((field["name"], "cyan"), f" {default}  ", (field["type"], "dim")))
        if field["doc"]:
            console.print(Padding(Text(field["doc"]), (0, 0, 0, 4), expand=False))
    model = item.get("model", {"settings": (), "recipes": ()})
    if chosen and "name" in model and not (model["settings"] or model["recipes"]):
        console.print(Text(f"\n{model['name']} changes none of these settings."))
    heading = f"{model.get('name')}{'' if chosen else ', the default model,'}"
    if model["settings"]:
        console.print(Text(f"\n{heading} changes:", "bold"))
    for one in model["settings"]:
        notes = [] if one["default"] is None else [f"default {one['default']}"]
        if one["where"] and item["kind"] == "algorithm":
            notes += [f"with {' or '.join(one['where'])} as the only reward"]
        elif one["where"]:
            notes += [f"under {', '.join(one['where'])}"]
        note = f"  ({'; '.join(notes)})" if notes else ""
        line = Text.assemble((one["key"], "cyan"), f" = {one['value']}", (note, "dim"))
        console.print(Padding(line, (0, 0, 0, 2), expand=False))
    if model["recipes"]:
        console.print(Text(f"\n{heading} takes, unless --recipe names another or paper:", "bold"))
    for one in model["recipes"]:
        where = f"  (with {one['where']} as the only reward)" if one["where"] else ""
        line = Text.assemble("recipe ", (one["name"], "cyan"), ", not the paper's", (where, "dim"))
        console.print(Padding(line, (0, 0, 0, 2), expand=False))


def print_warnings(lines: Iterable[str]) -> None:
    """Print a line each to stderr."""
    for line in lines:
        typer.secho(f"warning: {line}", fg="yellow", err=True)
