"""Flags that several commands share, and their conversion to overrides of a run file."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from alignkit.config.toml import parse_assignment
from alignkit.errors import AlignkitError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Recipe = Annotated[str | None, typer.Option(metavar="NAME", help="Settings that a plugin ships; paper: none (recipe).")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Registered model, hub id or folder (model.name).")]
Algo = Annotated[str | None, typer.Option(metavar="NAME", help="The algorithm (algorithm.name).")]
Rewards = Annotated[list[str] | None, typer.Option(metavar="NAME[=WEIGHT]", help="A reward; repeatable.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler (sampler.num_steps).")]
Out = Annotated[str | None, typer.Option(metavar="FOLDER", help="The run folder (output).")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness (seed).")]
StepList = Annotated[str | None, typer.Option(metavar="N[,N...]", help="Numbers of sampler steps, as 1,2,4.")]
Trust = Annotated[bool, typer.Option("--trust", help="Import code and send tokens as the run file says.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, in TOML; repeatable.")]


def overrides(
    algo: str | None,
    reward: list[str] | None,
    model: str | None,
    steps: int | None,
    out: str | None,
    seed: int | None,
    assignments: list[str] | None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Return the flags as a table from the keys that they stand for to values."""
    given = {
        "algorithm.name": algo, "model.name": model, "sampler.num_steps": steps, "output": out, "seed": seed,
        "recipe": recipe,
    }  # fmt: skip
    for key in ("algorithm.name", "model.name", "output"):
        if given[key] == "":
            raise AlignkitError(f"{key}: found an empty name on the command line; name one, or leave out its flag")
    result: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if reward:
        result["reward"] = [_reward(text) for text in reward]
    return result | dict(parse_assignment(text) for text in assignments or ())


def _reward(text: str) -> dict[str, Any]:
    name, equals, weight = text.partition("=")
    if not equals:
        return {"name": name}
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AlignkitError(f"--reward {text}: found weight {weight!r}, expected NAME or NAME=NUMBER")
    return {"name": name, "weight": number}


def step_list(text: str | None) -> list[int] | None:
    """Parse numbers of steps, as "1,2,4". Raises AlignkitError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise AlignkitError(f"--steps {text}: expected whole numbers of 1 or more, separated by commas, as 1,2,4")
    return [int(part) for part in parts] or None
