"""Make preference pairs with a model and a reward, in the format that `[data] pairs` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.data.preferences import IMAGES, TABLE
from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
from alignkit.rollout import sample_images

if TYPE_CHECKING:
    from alignkit.runs.run import Run


@dataclass(frozen=True)
class Made:
    """Counts of the pairs that were made."""

    folder: str
    prompts: int
    pairs: int
    undecided: int
    """Prompts without a pair: equal scores, or fewer than two images that could be scored."""
    skipped: tuple[str, ...] = ()
    """Broken prompts, if the run skips them."""


def make_pairs(
    run: Run,
    out: Path,
    *,
    count: int = 4,
    limit: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    every: bool = False,
    margin: float = 0.0,
) -> Made:
    """Generate `count` images per training prompt, score them with the run's rewards, write pairs into a new folder.

    `limit` prompts are used, from the top, with `steps` sampler steps (None: as the run has it). Best and worst image
    of a prompt make a pair; with `every`, every two images do whose scores differ. Scores must differ by more than
    `margin`. A line of `pairs.jsonl` is written after the images that it names, so the output of an interrupted call
    can be read. Image i of prompt p has the noise of (seed, p * count + i), whatever the batch. Raises ConfigError if
    `out` is not empty.
    """
    if count < 2:
        raise ConfigError(f"count: found {count}, expected 2 or more images of each prompt")
    if margin < 0:
        raise ConfigError(f"margin: found {margin}, expected 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; choose another folder")
    skipped = run.skipped()
    examples, rewards = run.prompts(skipped)[:limit], WeightedRewards(run.trained_rewards(), scoring=run.scoring())
    sampler = run.sampler(steps)
    if not examples:
        raise ConfigError("data.prompts: missing; name the prompts with --prompts")
    rewards.check(examples)
    policy = run.policy()
    rewards.load(policy.device)
    size = max(1, run.config.evaluate.batch_size // count)
    made = undecided = 0
    try:
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        with (out / TABLE).open("x", encoding="utf-8") as table:
            for start in range(0, len(examples), size):
                repeated = [e for e in examples[start : start + size] for _ in range(count)]
                seeds = [(seed, start * count + i) for i in range(len(repeated))]
                with torch.no_grad(), policy.using(run.weights):
                    images = sample_images(policy, sampler, [e.text for e in repeated], seeds)
                scores = rewards.score(images, repeated, len(repeated))
                values = scores.values.masked_fill(~scores.valid, torch.nan).view(-1, count)
                pixels = to_uint8(images.view(-1, count, *images.shape[1:])).cpu()
                for place, row in enumerate(values.tolist()):
                    origin = {"seed": seed, "steps": sampler.num_steps, "model": run.name}
                    chosen = list(preferred(row, every, margin))
                    lines = _lines(examples[start + place], start + place, row, chosen, origin)
                    for index in sorted({index for pair in chosen for index in pair}):
                        _save(pixels[place, index], out / _name(start + place, index))
                    table.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                    table.flush()
                    made, undecided = made + len(chosen), undecided + (not chosen)
    except OSError as error:
        raise AlignkitError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    if not made:
        raise AlignkitError(
            f"{out}: for none of the {len(examples)} prompts two images got different scores; generate more per prompt "
            "(--count), lower --margin, or test the reward with alignkit score"
        )
    return Made(str(out), len(examples), made, undecided, tuple(skipped or ()))


def preferred(scores: Sequence[float], every: bool = False, margin: float = 0.0) -> Iterator[tuple[int, int]]:
    """Yield (winner, loser) as indices into the scores of one prompt's images; NaN: could not be scored.

    These are the best and the worst, the first of equal ones; with `every`, every two, by decreasing winning score.
    """
    order = sorted((i for i, score in enumerate(scores) if score == score), key=lambda i: -scores[i])
    if not every and order:
        worst = min(order, key=lambda i: scores[i])
        order = [order[0], worst] if order[0] != worst else []
    for winner, loser in combinations(order, 2):
        if scores[winner] - scores[loser] > margin:
            yield winner, loser


def _lines(
    example: Example, number: int, scores: Sequence[float], chosen: Sequence[tuple[int, int]], origin: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for winner, loser in chosen:
        line = {
            "text": example.text,
            "winner": _name(number, winner),
            "loser": _name(number, loser),
            "winner_score": scores[winner],
            "loser_score": scores[loser],
            **origin,
        }
        yield line | ({"metadata": dict(example.metadata)} if example.metadata else {})


def _name(prompt: int, index: int) -> str:
    return f"{IMAGES}/{prompt:06d}_{index}.png"


def _save(pixels: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 to a file."""
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
