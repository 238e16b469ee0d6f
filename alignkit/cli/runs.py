"""The commands about runs: check, train, prepare, sample, evaluate, gallery and report."""

from __future__ import annotations

import dataclasses
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from alignkit.cli.options import (
    Algo,
    Json,
    Model,
    Out,
    Recipe,
    Rewards,
    Seed,
    Set,
    StepList,
    Steps,
    Trust,
    overrides,
    step_list,
)
from alignkit.cli.output import lasting_console, loading, print_json, print_table, print_warnings
from alignkit.errors import AlignkitError

WIDE = 110
"""Width of a terminal, in columns, that has room for every interval of the table."""


def check(
    file: Annotated[Path | None, typer.Argument(metavar="FILE")] = None,
    algo: Algo = None,
    recipe: Recipe = None,
    reward: Rewards = None,
    model: Model = None,
    steps: Steps = None,
    out: Out = None,
    seed: Seed = None,
    assignments: Set = None,
    trust: Trust = False,
    servers: Annotated[bool, typer.Option("--servers", help="Also ask the servers of rewards.")] = False,
) -> None:
    """Find all mistakes in a run file before any weight loads.

    A run file is a program. Lists the code that it would import, with the place of each, and the addresses that it
    would send to. Nothing is sent without --servers.

    \b
    alignkit check run.toml
    alignkit check run.toml --servers
    alignkit check run.toml --algo lasro --set train.updates=500
    """
    with loading():
        from alignkit.runs.run import load

    run = load(file, overrides(algo, reward, model, steps, out, seed, assignments, recipe), trust=trust)
    for line in run.disclosure():
        typer.echo(line)
    skipped = run.check(servers)
    for what in skipped:
        typer.echo(f"skipped as broken: {what}")
    for warning in run.warnings():
        typer.echo(f"warning: {warning}")
    typer.echo(f"{file or 'settings'}: no mistakes found ({run.description()})")


def train(
    file: Annotated[Path | None, typer.Argument(metavar="FILE")] = None,
    algo: Algo = None,
    recipe: Recipe = None,
    reward: Rewards = None,
    model: Model = None,
    steps: Steps = None,
    out: Out = None,
    seed: Seed = None,
    assignments: Set = None,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Resume an interrupted run.")] = None,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the run folder.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print a line a round instead of a live view.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all metrics.")] = False,
) -> None:
    """Train a model, from a run file, flags or both; flags win.

    \b
    alignkit train --algo lasro --reward attribute_binding
    alignkit train run.toml --set train.learning_rate=1e-5
    alignkit train --algo lasro --reward attribute_binding --recipe paper
    alignkit train --model my/pipeline --reward attribute_binding=0.8 --reward other=0.2
    alignkit train --resume runs/first
    alignkit train --resume runs/first --set scoring.on_error=skip
    """
    changes = overrides(algo, reward, model, steps, out, seed, assignments, recipe)
    if file is None and resume is None and not changes:
        raise AlignkitError(
            "train: found no run file and no settings; name some, as in: alignkit train --algo lasro --reward "
            "attribute_binding"
        )
    console = None if quiet else lasting_console(plain=plain)
    notes = lasting_console(stderr=True)
    with nullcontext() if console is None else loading(console):
        from alignkit.runs.run import load

        run = load(file, changes, resume=resume, trust=trust)

    received = signal.SIGINT

    def stop(number: int, _: object) -> None:
        nonlocal received
        received = signal.Signals(number)
        signal.signal(number, before[received])  # a second signal stops the run at once
        notes.print("stopping after this update; press Ctrl-C again to stop at once", soft_wrap=True)
        run.stop()

    # Cluster schedulers send SIGTERM before they kill, and a terminal that closes sends SIGHUP, unless nohup is used.
    stopping = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {one: signal.signal(one, stop) for one in stopping if signal.getsignal(one) != signal.SIG_IGN}
    try:
        for _ in run.train(console, verbose):
            continue
    except KeyboardInterrupt:
        run.stop()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if run.stopping:
        notes.print(f"stopped; resume with: alignkit train --resume {run.folder}", soft_wrap=True)
        raise typer.Exit(128 + received)
    if quiet:
        lasting_console().print(run.folder, soft_wrap=True)


def prepare_run(
    file: Annotated[Path | None, typer.Argument(metavar="FILE")] = None,
    algo: Algo = None,
    recipe: Recipe = None,
    model: Model = None,
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="The cache (data.cache).")] = None,
    assignments: Set = None,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Json = False,
) -> None:
    """Encode the prompts and images of a run ahead of time.

    `train` reads them from the same cache. Can be interrupted and repeated: nothing is encoded twice.

    \b
    alignkit prepare run.toml --cache cache
    alignkit prepare --algo ddpo --model shapes_lcm --cache cache --set data.prompts=prompts.txt
    """
    from rich.console import Console
    from rich.filesize import decimal

    with loading():
        from alignkit.commands.prepare import prepare
        from alignkit.runs.run import load

    changes = overrides(algo, None, model, None, None, None, assignments, recipe)
    run = load(file, changes | ({"data.cache": cache} if cache is not None else {}), trust=trust)
    prepared, notes = prepare(run, None if quiet or as_json else Console(stderr=True))
    for note in notes:
        typer.echo(note, err=True)
    if as_json:
        return print_json([dataclasses.asdict(row) for row in prepared])
    cells = ([p.what, f"{p.read:,}", f"{p.encoded:,}", f"{p.entries:,}", decimal(p.bytes)] for p in prepared)
    print_table(["what", "in the run", "new", "in the cache", "on disk"], cells)
    typer.echo(run.config.data.cache)


def sample(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    steps: StepList = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new or empty folder; by default samples, samples-2, ...")
    ] = None,
) -> None:
    """Generate images with a trained run or a model.

    The folder holds the images, metadata.jsonl with prompt, seed, steps and model of each, and grid.png with all side
    by side. `alignkit score` and `alignkit pairs` read it, and so does data.images of a run file.

    \b
    alignkit sample runs/first "a red circle and a blue square"
    alignkit sample shapes_lcm "a green heart" --steps 1,2,4 --count 3 --out images
    """
    with loading():
        from alignkit.commands.sample import sample as sample_images
        from alignkit.runs.run import open_run

    numbers = step_list(steps)
    run = open_run(source)
    for number, path in enumerate(sample_images(run, prompts, out, steps=numbers, seed=seed, count=count)):
        if not number:  # the model is loaded, and so is on this disk
            print_warnings(run.misread(prompts))
        typer.echo(path)


def evaluate_runs(
    sources: Annotated[list[str], typer.Argument(metavar="RUN...")],
    steps: StepList = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another reward to measure; repeatable.")
    ] = None,
    unseen: Annotated[bool, typer.Option("--unseen", help="Held-out prompts only.")] = False,
    win_rate: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show how often each run wins by this reward.")
    ] = None,
    fid: Annotated[str | None, typer.Option(metavar="FOLDER", help="Real images: measure FID and KID to them.")] = None,
    points: Annotated[bool, typer.Option("--points", help="Measure the weights of every point of a run too.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the rows to a CSV file.")] = None,
    assignments: Set = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure rewards and drift before and after training.

    Uses training prompts and held-out prompts, and gives 95 % intervals. Drift is the distance of the images from
    those of the model before training: a kernel distance in that model's own features, 0 if nothing changed.

    --fid takes a folder of images, or what data.images takes. FID and KID are distances to these images in the same
    features, so they are not those of papers, which use an Inception network; both are free of the bias of few images.
    With --points, the line below the table names the point with the smallest FID (the elbow rule of LaSRO's appendix
    E), which `alignkit export RUN --checkpoint N` takes. --win-rate compares images of the same prompt and noise: each
    run with its model before training, and every two runs; with it, JSON is an object of "rows" and "wins".

    Terminals of 110 columns, JSON and CSV also show intervals of the means, next to those of the difference.

    \b
    alignkit evaluate runs/first
    alignkit evaluate runs/first runs/control --steps 1,2,4,8 --csv table.csv
    alignkit evaluate runs/first --unseen --json
    alignkit evaluate runs/first runs/control --win-rate attribute_binding
    alignkit evaluate runs/first --unseen --points --fid my/photos
    alignkit evaluate runs/first --set 'evaluate.rewards=[{name = "clip_score", checkpoint = "my/clip"}]'
    """
    from rich.console import Console

    with loading():
        from alignkit.commands.evaluate import as_csv, evaluate
        from alignkit.evaluation.choice import elbow
        from alignkit.evaluation.hacking import verdict
        from alignkit.evaluation.table import table, wins_table
        from alignkit.files import write_file
        from alignkit.runs.run import open_run

    if csv is not None and csv.exists():
        raise AlignkitError(f"--csv {csv}: exists already; choose another name")
    changes = overrides(None, None, None, None, None, None, assignments)
    runs = [open_run(source, changes, trust) for source in sources]
    for run in runs:
        print_warnings(run.misread())
    rows = evaluate(
        runs, step_list(steps), reward or (), not unseen, Console(stderr=True),
        win_rate=win_rate or "", real=fid or "", points=points,
    )  # fmt: skip
    if csv is not None:
        write_file(csv, as_csv(rows))
    if as_json:
        every = [dataclasses.asdict(row) for row in rows]
        return print_json({"rows": every, "wins": [dataclasses.asdict(w) for w in rows.wins]} if win_rate else every)
    console = Console()
    for kind in dict.fromkeys(row.prompts for row in rows):
        of_kind = [row for row in rows if row.prompts == kind]
        console.print(table(of_kind, wide=console.width >= WIDE))
        for name in dict.fromkeys(row.run for row in of_kind):
            own = [row for row in of_kind if row.run == name]
            found = verdict([row for row in own if row.update is None])
            for text in (found.text if found else "", elbow(own)):
                if text:
                    console.print(f"{name}, {kind} prompts: {text}", markup=False, highlight=False, soft_wrap=True)
    if rows.wins:
        console.print(wins_table(rows.wins))


def draw_gallery(
    sources: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    rows: Annotated[int, typer.Option(min=1, help="Most prompts to show.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of sampler steps; by default the first that was measured.")
    ] = None,
    pick: Annotated[
        Literal["spread", "rise", "fall"],
        typer.Option(help="Prompts: spread over all rewards before training, or those that rose or fell most."),
    ] = "spread",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG to write.")] = Path("gallery.png"),
) -> None:
    """Show images and scores before training and after each run.

    A row for each prompt, a column before training, and one for each run, with the same noise. The images are those
    that runs keep at their points: before training, and of the weights that a run exports. No model is loaded.

    Prompts are chosen by a fixed rule: sorted by the trained reward before training (of equals by their order in the
    file; of the first run, if there are several), then taken at evenly spaced quantiles. With --pick rise they are
    those whose reward rose most, on average over the runs, which shows what training does, and not how often. The mean
    changes over all prompts of the points stand below the images.

    \b
    alignkit gallery runs/first
    alignkit gallery runs/first runs/second --rows 12 --steps 2 --out both.png
    """
    import io

    with loading():
        from alignkit.commands.gallery import gallery
        from alignkit.files import write_file

    if out.exists():
        raise AlignkitError(f"--out {out}: exists already; choose another name")
    content = io.BytesIO()
    gallery(sources, rows, steps, pick).save(content, "PNG")
    write_file(out, content.getvalue())
    typer.echo(out)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; by default report.html in the run folder, or here.")
    ] = None,
) -> None:
    """Write a page about runs: rewards, images, curves.

    The page is one HTML file that needs no network. It shows what the run folders hold and loads no model. Every run
    writes its own page when it ends; several runs stand side by side on one page, with win rates.

    \b
    alignkit report runs/first
    alignkit report runs/first runs/control --out comparison.html
    """
    with loading():
        from alignkit.page.page import write_page

    typer.echo(write_page(folders, out))
