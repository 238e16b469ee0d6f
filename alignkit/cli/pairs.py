"""The commands that make preference pairs, with a reward (`pairs`) or a person (`prefer`): parse, call, print."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli.options import Json, Rewards, Set, Steps, Trust, overrides
from alignkit.cli.output import loading, print_json, print_warnings
from alignkit.errors import AlignkitError

Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts; by default those of training.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many prompts, from the top.")]
NoiseSeed = Annotated[int, typer.Option(help="Seed of the noise.")]


def pairs(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL_OR_IMAGES")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the pairs; new or empty.")],
    prompts: Prompts = None,
    reward: Rewards = None,
    count: Annotated[int, typer.Option(min=2, help="Images per prompt.")] = 4,
    every: Annotated[
        bool, typer.Option("--every", help="Every two images that differ, not only best and worst.")
    ] = False,
    margin: Annotated[float, typer.Option(min=0, help="Smallest difference of two scores.")] = 0.0,
    limit: Limit = None,
    steps: Steps = None,
    seed: NoiseSeed = 0,
    assignments: Set = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Make preference pairs with a model and a reward.

    Generates several images of each prompt, scores them, and keeps the best and the worst. A folder of `alignkit
    sample`, or another with metadata.jsonl, gives its images instead. The new folder holds the images and pairs.jsonl,
    one line per pair with text, files, scores and seed. Name it as data.pairs in a run file, for diffusion_dpo and for
    pso in its offline mode.

    \b
    alignkit pairs shapes_lcm --out my/pairs
    alignkit pairs runs/first --prompts my/prompts.txt --count 8 --out my/other
    alignkit pairs samples --reward attribute_binding --out my/third
    alignkit train --algo diffusion_dpo --set data.pairs=my/pairs
    """
    with loading():
        from alignkit.commands.pairs import make_pairs, pairs_of_images
        from alignkit.data.image_files import METADATA
        from alignkit.runs.run import load, open_run

    changes = _changes(prompts, reward, None, assignments)
    if (Path(source) / METADATA).is_file():
        for name in ("prompts", "count", "steps", "seed"):
            if (given := context.get_parameter_source(name)) and given.name == "COMMANDLINE":
                raise AlignkitError(f"--{name}: {source} holds images, and none is generated; leave it out")
        made = pairs_of_images(load(None, changes), Path(source), out, limit=limit, every=every, margin=margin)
    else:
        run = open_run(source, changes, trust)
        print_warnings(run.misread())
        made = make_pairs(run, out, count=count, limit=limit, steps=steps, seed=seed, every=every, margin=margin)
    for what in made.skipped:
        typer.echo(f"skipped as broken: {what}", err=True)
    if as_json:
        return print_json(dataclasses.asdict(made))
    without = f"; {made.undecided} without a preference" if made.undecided else ""
    typer.echo(f"{made.folder}: {made.pairs} pairs of {made.prompts} prompts{without}")


def prefer(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the pairs; new, or of an earlier call.")],
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs per prompt.")] = 1,
    limit: Limit = None,
    before: Annotated[
        bool, typer.Option("--before", help="Show a run next to its model before training, from the same noise.")
    ] = False,
    steps: Steps = None,
    seed: NoiseSeed = 0,
    port: Annotated[int, typer.Option(help="The port of the page; 0 takes a free one.")] = 8189,
    assignments: Set = None,
) -> None:
    """Choose the better of two images on a page in the browser.

    Shows two images of a prompt at a time, side by side in random order: choose one, call them equal, or skip them,
    by click or key. Only this machine can open the page. Every answer is written to pairs.jsonl at once; call the
    command again to go on. Name the folder as data.pairs in a run file, for diffusion_dpo and for pso in its offline
    mode; ties and skipped pairs are left out.

    \b
    alignkit prefer shapes_lcm --out my/choices --limit 100
    alignkit prefer runs/first --prompts my/prompts.txt --count 2 --out my/other
    alignkit prefer runs/first --before --out my/comparison
    alignkit train --algo diffusion_dpo --set data.pairs=my/choices
    """
    with loading():
        from alignkit.runs.run import open_run
        from alignkit.serving.prefer import open_prefer, start

    run = open_run(source, _changes(prompts, None, steps, assignments))
    print_warnings(run.misread())
    skipped = run.skipped()
    server = open_prefer(run, out, count=count, limit=limit, seed=seed, before=before, port=port, skipped=skipped)
    for what in skipped or ():
        typer.echo(f"skipped as broken: {what}", err=True)
    with server:
        if server.pending:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops it as Ctrl-C does
            try:
                start(server, run)
                done = f", {server.done} of them answered before" if server.done else ""
                typer.echo(f"open {server.url} in a browser: {server.total} pairs{done}; Ctrl-C ends")
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo(err=True)
    left = f"; {len(server.pending)} of {server.total} left" if server.pending else "; all are answered"
    typer.echo(f"{out}: {server.summary()}{left}")
    if command := server.next_command():
        typer.echo(f"train on them: {command}")
    if server.failure:
        raise server.failure


def _changes(
    prompts: Path | None, reward: list[str] | None, steps: int | None, assignments: list[str] | None
) -> dict[str, Any]:
    from alignkit.data.prompt_sets import prompt_file

    changes = overrides(None, reward, None, steps, None, None, assignments)
    return changes | ({"data.prompts": str(prompt_file(prompts).resolve())} if prompts is not None else {})
