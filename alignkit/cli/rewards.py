"""The commands `score` and `serve`, about one reward: parse, call, print."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli import options
from alignkit.cli.options import Json, Model, Set
from alignkit.cli.output import loading, print_json
from alignkit.errors import AlignkitError

Device = Annotated[str, typer.Option(help="Device to score on: auto, cpu, cuda, cuda:1, ...")]


def score(
    reward: Annotated[str, typer.Argument(metavar="REWARD")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt per image, or one for all; by default metadata.jsonl, or a.txt."),
    ] = None,
    device: Device = "auto",
    model: Model = None,
    assignments: Set = None,
    as_json: Json = False,
) -> None:
    """Score the images of a folder with a reward.

    Prompts come from metadata.jsonl, as `alignkit sample` writes it, from a.txt for a.png, or from --prompts.
    Settings of the reward are those of a run with this model. Prints a line for each image as soon as it is scored,
    with the parts of its score, or why it could not be scored.

    \b
    alignkit score attribute_binding samples
    alignkit score attribute_binding captioned/
    alignkit score attribute_binding samples/ --prompts prompts.txt
    alignkit score pickscore samples/ --prompts prompts.txt --device cuda:1
    alignkit score attribute_binding samples/ --prompts prompts.jsonl --json
    """
    with loading():
        from alignkit.commands.score import score_batches

    overrides = options.overrides(None, None, model, None, None, None, assignments)
    _note_settings(reward, overrides)
    records: list[dict[str, Any]] = []
    columns: list[str] | None = None
    try:
        for batch in score_batches(reward, folder, prompts, overrides, device):
            records += batch
            if not as_json:
                columns = _print_scores(batch, columns)
    finally:
        # Also if a later image or the reward raises.
        if as_json and records:
            print_json(records)
    if all(record["score"] is None for record in records):
        reason = next((record["reason"] for record in records if record["reason"]), "the reward gives no reason")
        raise AlignkitError(f"{folder}: {reward} could not score any of the {len(records)} images: {reason}")


def _note_settings(reward: str, overrides: dict[str, Any]) -> None:
    """Note settings that come from the default model: its checkpoint, say, is not the one on the reward's page."""
    from alignkit.config.bundles import find_bundle
    from alignkit.config.sections import ModelConfig

    if "model.name" in overrides:
        return
    name = ModelConfig().name
    for entry in find_bundle(name).defaults.get("reward", ()):
        if isinstance(entry, dict) and entry["name"] == reward:
            own = [f"{k} = {v}" for k, v in entry.items() if k != "name" and f"reward.{reward}.{k}" not in overrides]
            if own:
                typer.echo(f"note: {reward} has settings of {name}, the default model: {', '.join(own)}", err=True)


def _print_scores(records: Sequence[dict[str, Any]], columns: list[str] | None) -> list[str]:
    """Print a line for each record, after a new heading if the records have parts that `columns` lack.

    Returns the columns. The part with the reward's bare name is the score itself and gets no column.
    """
    found = dict.fromkeys(part for record in records for part in record["parts"] if "/" in part)
    if columns is None or found.keys() - columns:
        columns = list(found)
        names = [part.partition("/")[2] for part in columns]
        typer.echo("  ".join([f"{'score':>10}", *(f"{name:>8}" for name in names), "image  prompt"]))
    for record in records:
        score = "not scored" if record["score"] is None else f"{record['score']:.4f}"
        cells = [f"{score:>10}", *_cells(record["parts"], columns), record["image"], " ".join(record["prompt"].split())]
        typer.echo("  ".join([*cells, *([f"({record['reason']})"] if record["reason"] else [])]))
    return columns


def _cells(parts: dict[str, float], columns: Sequence[str]) -> Iterator[str]:
    for part in columns:
        width, value = max(8, len(part.partition("/")[2])), parts.get(part, math.nan)
        yield f"{'' if math.isnan(value) else f'{value:.4g}':>{width}}"


def serve(
    reward: Annotated[str, typer.Argument(metavar="REWARD")],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8188,
    network: Annotated[bool, typer.Option("--network", help="Accept other machines; needs a token.")] = False,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
    model: Model = None,
    assignments: Set = None,
) -> None:
    """Serve a reward over HTTP.

    Runs on this or other machines use it with the reward `remote`. With ALIGNKIT_TOKEN in the environment, clients
    must send that token. Without --network only this machine is served.

    \b
    alignkit serve attribute_binding
    alignkit serve image_reward --port 8190 --device cuda:1
    ALIGNKIT_TOKEN=... alignkit serve pickscore --host 0.0.0.0 --network
    """
    with loading():
        from alignkit.serving.server import open_server

    overrides = options.overrides(None, None, model, None, None, None, assignments)
    _note_settings(reward, overrides)
    with open_server(reward, overrides, host, port, network, device, batch_size) as server:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops it as Ctrl-C does
        typer.echo(f"{server.name} at {server.url}, fingerprint {server.fingerprint}; Ctrl-C stops it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
