"""Make preference pairs with a reward, of a model's images or of image files, as `[data] pairs` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from alignkit.commands.score import captioned, score_files
from alignkit.data.decode import to_uint8
from alignkit.data.preferences import IMAGES, TABLE
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import writing
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
    _check(out, margin)
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
    with writing(out):
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
                    origin: dict[str, Any] = {"seed": seed, "steps": sampler.num_steps, "model": run.name}
                    chosen = list(preferred(row, every, margin))
                    example, number = examples[start + place], start + place
                    names = {i: f"{IMAGES}/{number:06d}_{i}.png" for pair in chosen for i in pair}
                    for index, name in names.items():
                        _save(pixels[place, index], out / name)
                    if example.metadata:
                        origin["metadata"] = dict(example.metadata)
                    for line in _lines(example.text, names, row, chosen):
                        table.write(json.dumps(line | origin, ensure_ascii=False) + "\n")
                    table.flush()
                    made, undecided = made + len(chosen), undecided + (not chosen)
    return _made(Made(str(out), len(examples), made, undecided, tuple(skipped or ())))


def pairs_of_images(
    run: Run, folder: Path, out: Path, *, limit: int | None = None, every: bool = False, margin: float = 0.0
) -> Made:
    """Score the images of a folder with the run's rewards, and write pairs of those with the same prompt.

    The images are found as by `alignkit score`; the chosen ones are copied. Images of a prompt are compared whatever
    their seed and number of steps. Otherwise as `make_pairs`, whose lines also name seed, steps and model.
    """
    _check(out, margin)
    files, examples = captioned(folder, None, run.config)
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.text, []).append(place)
    groups = dict(list(groups.items())[:limit])
    places = [place for group in groups.values() for place in group]
    values: list[float] = []
    for _, scores in score_files(run, [files[p] for p in places], [examples[p] for p in places]):
        values += scores.values.masked_fill(~scores.valid, torch.nan).tolist()
    by_place = dict(zip(places, values, strict=True))
    made = undecided = 0
    with writing(out):
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        with (out / TABLE).open("x", encoding="utf-8") as table:
            for group in groups.values():
                row = [by_place[place] for place in group]
                chosen = list(preferred(row, every, margin))
                names = {i: f"{IMAGES}/{group[i]:06d}{files[group[i]].suffix}" for pair in chosen for i in pair}
                for index, name in names.items():
                    shutil.copyfile(files[group[index]], out / name)
                for line in _lines(examples[group[0]].text, names, row, chosen):
                    table.write(json.dumps(line, ensure_ascii=False) + "\n")
                made, undecided = made + len(chosen), undecided + (not chosen)
    return _made(Made(str(out), len(groups), made, undecided))


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
    text: str, names: Mapping[int, str], scores: Sequence[float], chosen: Sequence[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    for winner, loser in chosen:
        yield {
            "text": text,
            "winner": names[winner],
            "loser": names[loser],
            "winner_score": scores[winner],
            "loser_score": scores[loser],
        }


def _check(out: Path, margin: float) -> None:
    if margin < 0:
        raise ConfigError(f"margin: found {margin}, expected 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; choose another folder")


def _made(made: Made) -> Made:
    """Return it, or raise AlignkitError if there is no pair."""
    if not made.pairs:
        raise AlignkitError(
            f"{made.folder}: for none of the {made.prompts} prompts two images got different scores; generate more per "
            "prompt (--count), lower --margin, or test the reward with alignkit score"
        )
    return made


def _save(pixels: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 to a file."""
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
