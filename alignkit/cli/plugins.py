"""The commands about plugins, `list`, `show`, `new` and `check-plugin`: parse, call, print."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import Json
from alignkit.cli.output import print_json, print_table
from alignkit.errors import AlignkitError
from alignkit.registry import KINDS, default_registry, nearest, normalise, plural


def list_(kind: Annotated[str | None, typer.Argument(metavar="KIND")] = None, as_json: Json = False) -> None:
    """List algorithms, rewards, samplers, surrogates, models and policies, with who brought them.

    \b
    alignkit list                everything
    alignkit list rewards        one kind
    alignkit list --json         for programs
    """
    from rich.text import Text

    plurals = {plural(k): k for k in KINDS}
    wanted = plurals.get(kind.lower(), kind.lower()) if kind else None
    if kind and wanted not in KINDS:
        raise AlignkitError(f"list: found {kind!r}, expected one of {', '.join(plurals)}{nearest(kind, plurals)}")
    rows = default_registry().components(wanted)
    if as_json:
        return print_json([dataclasses.asdict(row) for row in rows])
    cells = []
    for row in rows:
        what = Text(f"broken: {row.broken}", "red") if row.broken else Text(row.help)
        cells.append([row.kind, Text(row.name, "cyan"), what, Text(f"{row.distribution} {row.version}", "dim")])
    print_table(["kind", "name", "what it is", "from"], cells)


def show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Show one component or one section of a run file: what it is, its paper, its fields and their defaults.

    \b
    alignkit show lasro
    alignkit show train          the [train] section of a run file
    alignkit show lcm --json
    """
    from alignkit.config.reference import component, section

    registry = default_registry()
    found = [component(registry, row) for row in registry.named(name)] or section(name)
    if not found:
        names = [row.name for row in registry.components() if not row.broken]
        raise AlignkitError(f"show: unknown name {name!r}{nearest(normalise(name), names)} (`alignkit list` shows all)")
    if as_json:
        return print_json(found)
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    for item in found:
        console.print(Text(f"{item['kind']} {item['name']}", "bold cyan"), Text(item["origin"], "dim"))
        console.print(Text(item["doc"]), "")
        for field in item["fields"]:
            default = "required" if field["default"] is None else f"= {field['default']}"
            console.print(Text.assemble((field["name"], "cyan"), f" {default}  ", (field["type"], "dim")))
            if field["doc"]:
                console.print(Padding(Text(field["doc"]), (0, 0, 0, 4), expand=False))


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where; else alignkit-NAME here.")] = None,
) -> None:
    """Write a plugin to begin with: a reward, an algorithm or a sampler, with its test, ready to be installed.

    \b
    alignkit new reward contrast
    alignkit new algorithm my_method --out my/method
    alignkit new sampler my_walk
    """
    from alignkit.commands import new as templates

    folder = templates.new(kind, name, out)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        typer.echo(path)
    typer.echo(f"next: pip install -e {folder}", err=True)


def check_plugin(
    package: Annotated[str, typer.Argument(metavar="PACKAGE")],
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="What rewards are to score.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KIND.NAME.FIELD=VALUE", help="A field, in TOML; repeatable.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch checkpoints that are not here.")] = False,
    as_json: Json = False,
) -> None:
    """Hold what a plugin brings to its promises: batches, gradients, chance, odd inputs, checkpoints.

    PACKAGE is a distribution, an entry point or a package. What cannot be checked here is skipped, with the reason: a
    checkpoint that is not on this disk, say. Exit code 1 if anything failed.

    \b
    alignkit check-plugin alignkit_samplers
    alignkit check-plugin alignkit-contrast --set reward.contrast.scale=2.0
    alignkit check-plugin acme --set reward.acme_ocr.checkpoint=my/ocr --prompts my/prompts.jsonl
    """
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the library that reads it is imported
    from rich.text import Text

    from alignkit.commands import check_plugin as checks
    from alignkit.config.toml import parse_assignment
    from alignkit.data.prompts import read_examples

    settings = dict(parse_assignment(text) for text in assignments or ())
    verdicts = list(checks.check_plugin(package, settings, read_examples(prompts) if prompts else None))
    if as_json:
        print_json([dataclasses.asdict(verdict) for verdict in verdicts])
    else:
        colors = {"passed": "green", "failed": "red", "skipped": "yellow"}
        cells = (
            [v.kind, Text(v.name, "cyan"), Text(v.status, colors[v.status]), Text(v.detail), f"{v.seconds:.1f} s"]
            for v in verdicts
        )
        print_table(["kind", "name", "verdict", "why, or with what", "time"], cells)
    if any(verdict.status == "failed" for verdict in verdicts):
        raise typer.Exit(1)
