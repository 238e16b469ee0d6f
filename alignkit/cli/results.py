"""The command that hands a trained run on: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from alignkit.cli.output import loading


def export_run(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder; by default RUN/export/FORMAT.")
    ] = None,
    format: Annotated[
        Literal["diffusers", "peft", "kohya", "comfyui", "merged"], typer.Option(help="The reader of the weights.")
    ] = "diffusers",
    weights: Annotated[
        Literal["average", "last", "best"] | None, typer.Option(help="By default those that the run exports itself.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="N", help="Update of a checkpoint or a point; by default the last checkpoint.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiply the effect of the LoRA.")] = 1.0,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload the folder to a private repository of the hub."),
    ] = None,
) -> None:
    """Export the weights of a run for other tools.

    Writes the weights and a model card into a new folder. diffusers: a LoRA file for load_lora_weights, or the UNet
    after full fine-tuning. peft: an adapter folder. kohya, comfyui: a LoRA file for kohya's scripts, ComfyUI, A1111
    and Forge. merged: a whole pipeline with the weights in it.

    \b
    alignkit export runs/first
    alignkit export runs/first --format comfyui --out my/lora
    alignkit export runs/first --format merged --scale 0.8 --out my/model
    alignkit export runs/first --checkpoint 100 --format kohya --out my/earlier
    """
    with loading():
        from alignkit.runs.export import push as upload
        from alignkit.runs.run import open_run

    folder = open_run(run).export(out or "", format, weights=weights or "", checkpoint=checkpoint, scale=scale)
    typer.echo(folder)
    if push is not None:
        typer.echo(upload(folder, push))
