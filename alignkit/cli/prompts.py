"""The commands `prompts lint`, `prompts phrases` and `prompts curate`: parse, call, print."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli import options
from alignkit.cli.options import Json, Model, Set
from alignkit.cli.output import print_json
from alignkit.errors import AlignkitError

prompts_app = typer.Typer(
    help="Inspect and select prompts before a run.\n\n"
    "FILE is a .txt, .jsonl or .parquet file, or an included set: animals, attributes, counting or spatial, each also "
    "with the ending _held_out.\n\n"
    "\b\nalignkit prompts lint prompts.txt --reward attribute_binding\nalignkit prompts phrases attributes\n"
    "alignkit prompts curate prompts.txt --out kept.txt",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[str, typer.Argument(metavar="FILE")]


@prompts_app.command()
def lint(
    file: File,
    reward: Annotated[str, typer.Option(metavar="NAME", help="The reward that will score them.")],
    load: Annotated[bool, typer.Option("--load", help="Load the reward and try each prompt on a grey image.")] = False,
    model: Model = None,
    assignments: Set = None,
    as_json: Json = False,
) -> None:
    """Report prompts that a reward or the model misreads.

    These are prompts that a reward cannot score, that are too long or repeated, or have marks of other tools.

    Weights as (red:1.3), <lora:...>, __wildcards__ and {choices|of others} are plain text here. Without --load no
    weights are needed: the tokenizer of --model finds prompts that are too long for it, without --model those of more
    than 77 words and signs are found. Words that the reward does not know, and prompts that are too long for the
    reward, need --load. Exits with 1 if a prompt cannot be read or scored.

    \b
    alignkit prompts lint attributes --reward attribute_binding
    alignkit prompts lint prompts.txt --reward clip_score --load
    alignkit prompts lint prompts.jsonl --reward ocr --json
    """
    from alignkit.commands.lint import lint

    count, findings = lint(file, reward, _overrides(model, assignments), load)
    if as_json:
        print_json({"prompts": count, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            place = f"prompt {finding.number}: {finding.prompt}" if finding.number else "a prompt"
            typer.echo(f"{finding.problem} {place}\n  {finding.why}")
        typer.echo(f"{file}: {count} prompts, {len(findings)} problems")
    if any(finding.problem in ("broken", "unscorable") for finding in findings):
        raise typer.Exit(1)


@prompts_app.command()
def phrases(
    file: Annotated[str, typer.Argument(metavar="FILE_OR_PROMPT")],
    reward: Annotated[
        str, typer.Option(metavar="NAME", help="The reward whose questions to show.")
    ] = "attribute_binding",
    model: Model = None,
    assignments: Set = None,
    as_json: Json = False,
) -> None:
    """Show the questions of a reward about each prompt.

    attribute_binding, vqa_score, ocr and others answer questions; clip_score, for one, has none.

    \b
    alignkit prompts phrases "a red chair and a blue wooden cup"
    alignkit prompts phrases prompts.txt --json
    alignkit prompts phrases prompts.jsonl --reward ocr
    """
    from alignkit.commands.lint import questions

    found = questions(file, reward, _overrides(model, assignments))
    if as_json:
        return print_json([dataclasses.asdict(one) for one in found])
    for one in found:
        typer.echo(one.prompt)
        for line in one.questions:
            typer.echo(f"  {line}")
        if one.refused:
            typer.secho(f"  refused: {one.refused}", fg="yellow")


@prompts_app.command()
def curate(
    file: File,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the kept prompts go; a new .txt or .jsonl file.")],
    distance: Annotated[float, typer.Option(help="Smallest distance of two kept prompts: 1 - cosine.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after keeping this many.")] = None,
    encoder: Annotated[str, typer.Option(metavar="NAME", help="Hub id or folder; by default the model's own.")] = "",
    search: Annotated[str, typer.Option(metavar="HOW", help="faiss, torch, or auto: faiss where installed.")] = "auto",
    model: Model = None,
    assignments: Set = None,
    as_json: Json = False,
) -> None:
    """Keep prompts that differ, as LaSRO selects them.

    Drops repeated prompts, and those too close to one that was kept. Reads the file from the top. A text encoder
    measures the distance of two prompts: CLIP, BERT, T5, a sentence encoder, or the text encoder of the diffusion
    model. Distances depend on the encoder: try several.

    \b
    alignkit prompts curate prompts.txt --out kept.txt
    alignkit prompts curate prompts.jsonl --out kept.jsonl --distance 0.2 --limit 2000 --json
    alignkit prompts curate prompts.txt --out kept.txt --encoder openai/clip-vit-large-patch14
    """
    from alignkit.commands.curate import TextEmbedding, check, curate
    from alignkit.config.load import load as load_config
    from alignkit.data.prompts import read_examples
    from alignkit.files import write_file

    if out.exists():
        raise AlignkitError(f"--out {out}: exists already; choose another name")
    overrides = _overrides(model, assignments)
    config = load_config(None, overrides)
    examples = read_examples(file, config.data.prompt_column)
    if out.suffix not in (".txt", ".jsonl"):
        raise AlignkitError(f"--out {out}: expected a name that ends in .txt or .jsonl")
    if out.suffix == ".txt" and any(e.metadata or "\n" in e.text for e in examples):
        raise AlignkitError(
            f"--out {out}: {file} has metadata or texts of several lines; choose a name that ends in .jsonl"
        )
    check(distance, search)
    embedding = TextEmbedding(encoder, config.model.name)
    kept, dropped = curate(examples, embedding, distance, limit, search)
    lines = [e.text if out.suffix == ".txt" else _line({**e.metadata, "text": e.text}) for e in kept]
    write_file(out, "\n".join(lines) + "\n")
    repeated = sum(one.repeated for one in dropped)
    if as_json:
        left_out = [dataclasses.asdict(one) for one in dropped]
        about = {"encoder": encoder or config.model.name, "truncated": embedding.truncated}
        return print_json({"out": str(out), "read": len(examples), "kept": len(kept), "dropped": left_out, **about})
    unread = len(examples) - len(kept) - len(dropped)
    near, source = len(dropped) - repeated, encoder or config.model.name
    typer.echo(
        f"{out}: {len(kept)} of {len(examples)} prompts kept; {repeated} repeated, {near} within {distance} of a kept "
        f"one by the text encoder of {source}" + (f", {unread} not reached" if unread else "")
    )
    if embedding.truncated:
        typer.echo(f"warning: {embedding.truncated} prompts are longer than the encoder reads; their ends are ignored")
    if not encoder and "model.name" not in overrides:
        typer.echo(f"warning: {source} is the default model; name an --encoder that suits these prompts")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _overrides(model: str | None, assignments: list[str] | None) -> dict[str, Any]:
    return options.overrides(None, None, model, None, None, None, assignments)
