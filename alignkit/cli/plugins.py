"""The commands `list`, `show`, `new` and `check-plugin`: parse, call, print."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import Json
from alignkit.cli.output import print_component, print_components, print_json, print_table
from alignkit.errors import AlignkitError
from alignkit.registry import KINDS, default_registry, nearest, plural


def list_components(kind: Annotated[str | None, typer.Argument(metavar="KIND")] = None, as_json: Json = False) -> None:
    """List what is installed, by kind.

    One line each, cut to the width of the terminal; `alignkit show NAME` prints everything. The distribution is
    listed if it is not alignkit. Plugins that cannot be imported come last, with the reason.

    \b
    alignkit list                everything
    alignkit list rewards        one kind
    alignkit list --json         for programs
    """
    wanted = next((one for one in KINDS if kind and kind.lower() in (one, plural(one))), None)
    if kind and not wanted:
        plurals = [plural(one) for one in KINDS]
        raise AlignkitError(f"list: found {kind!r}, expected one of {', '.join(plurals)}{nearest(kind, plurals)}")
    rows = default_registry().components(wanted)
    if as_json:
        return print_json([dataclasses.asdict(row) for row in rows])
    if wanted and all(row.broken for row in rows):
        typer.echo(f"no {plural(wanted)}", err=True)
    print_components(rows)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model whose settings to show.")] = None,
    as_json: Json = False,
) -> None:
    """Show a component or a section of a run file.

    Prints the description, the paper, the fields with their defaults, and the settings that a model (the default
    model, or --model) changes.

    \b
    alignkit show lasro
    alignkit show lasro --model sdxl_lcm
    alignkit show train          the [train] section of a run file
    alignkit show lcm --json
    """
    from alignkit.commands.show import show

    found = show(default_registry(), name, model)
    if as_json:
        return print_json(found)
    for item in found:
        print_component(item, chosen=model is not None)


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The new folder; by default alignkit-NAME.")
    ] = None,
) -> None:
    """Write a plugin to start from, with its test.

    KIND is reward, algorithm, sampler, surrogate or model. The plugin can be installed, trained with and tested as
    it is written.

    \b
    alignkit new reward contrast
    alignkit new algorithm my_method --out my/method
    alignkit new model my_model
    """
    from alignkit.commands import new as templates

    folder = templates.new(kind, name, out)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        typer.echo(path)
    typer.echo(f"next: pip install -e {folder}", err=True)


def check_plugin(
    package: Annotated[str, typer.Argument(metavar="PACKAGE")],
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts that rewards score.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KIND.NAME.FIELD=VALUE", help="A field, in TOML; repeatable.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download missing checkpoints.")] = False,
    as_json: Json = False,
) -> None:
    """Check the components of a plugin against their interfaces.

    Checks batches, gradients, randomness, odd inputs and checkpoints, whatever applies to the kind. PACKAGE is a
    distribution, an entry point or a package. Components that cannot be checked here are skipped with the reason,
    such as a checkpoint that is not on this disk. Exits with 1 if a check fails.

    \b
    alignkit check-plugin alignkit_samplers
    alignkit check-plugin alignkit-contrast --set reward.contrast.scale=2.0
    alignkit check-plugin acme --set reward.acme_ocr.checkpoint=my/ocr --prompts my/prompts.jsonl
    """
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
    from rich.text import Text

    from alignkit.commands import check_plugin as checks
    from alignkit.config.toml import parse_assignment
    from alignkit.data.prompts import read_examples

    settings = dict(parse_assignment(text) for text in assignments or ())
    results = list(checks.check_plugin(package, settings, read_examples(prompts) if prompts else None))
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        colors = {"passed": "green", "failed": "red", "skipped": "yellow"}
        cells = (
            [r.kind, Text(r.name, "cyan"), Text(r.status, colors[r.status]), Text(r.detail), f"{r.seconds:.1f} s"]
            for r in results
        )
        print_table(["kind", "name", "result", "reason, or settings", "time"], cells)
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)
