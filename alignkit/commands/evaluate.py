"""Compare runs: every reward before and after training, on seen and unseen prompts, the drift of the images, their
distance to real ones, and win rates."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from alignkit.data.real import count_real, real_images
from alignkit.errors import AlignkitError, ConfigError
from alignkit.evaluation.measure import Measurement, compare, measure, win_rates
from alignkit.evaluation.realism import BLOCKS, DISTANCES, distances
from alignkit.evaluation.rows import Row
from alignkit.evaluation.statistics import kernel_distance
from alignkit.evaluation.wins import WinRate
from alignkit.page.cells import rows_cell
from alignkit.page.notebook import CellProgress, in_notebook
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from alignkit.runs.run import Run

DRIFT = "drift"
"""Name of the row with the kernel distance to the images of the model before training."""


class Evaluation(list[Row]):
    """The rows of an evaluation, and the win rates if a reward was named for them. A notebook shows them as a table."""

    wins: Sequence[WinRate] = ()

    def to_frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas DataFrame, a column for each field of a row. Raises AlignkitError without pandas.

        Example: `rows.to_frame().pivot(index="reward", columns="num_steps", values="difference")`.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise AlignkitError("to_frame: pandas is not installed; install it with: pip install pandas") from error
        return DataFrame([asdict(row) for row in self], columns=[field.name for field in fields(Row)])

    def _repr_html_(self) -> str:
        return rows_cell(self)


def evaluate(
    runs: Sequence[Run],
    steps: Sequence[int] | None = None,
    rewards: Sequence[str] = (),
    seen: bool = True,
    console: Console | None = None,
    progress: bool | None = None,
    win_rate: str = "",
    real: str = "",
    points: bool = False,
) -> Evaluation:
    """Return the rows of all runs, sorted by prompts, number of steps and reward.

    `rewards` are measured in addition to those that a run names. With `seen`, training prompts are measured as well, as
    many as held-out ones. `win_rate` names a reward: how often an image of a run has a higher score than that of the
    model before training, and of every other run, from the same prompt and noise, stands in `wins` of the result.
    `real` names images as data.images does, or a folder of plain images: FID and KID to them, in the features of the
    model before training, are rows too. With `points` the weights that a run kept at its points are measured as well;
    their rows have `update`. Runs that start from the same model and are measured in the same way share the measurement
    before training. Progress is shown on `console`; without one, in the cell of a notebook, and else nowhere. With
    `progress` True it is shown in a terminal too, with False nowhere. The rows are a list that a notebook shows as a
    table.
    """
    if win_rate:
        _check_win_rate(runs, win_rate, steps, rewards, seen)
    if real:
        _check_real(runs, real, seen)
    before: dict[str, Measurement] = {}
    measured: list[Measured] = []
    with _bars(console, progress) as bars:
        rows = [
            replace(row, run=name, departure=run.departure() if run.weights else "")
            for run, name in zip(runs, _names(runs), strict=True)
            for row in _rows(run, name, steps, rewards, seen, before, bars, measured, real, points)
        ]
    # Sorting is stable: runs stay in the order given.
    names = list(dict.fromkeys(row.reward for row in rows))
    kinds = list(dict.fromkeys(row.prompts for row in rows))
    rows.sort(key=lambda row: (kinds.index(row.prompts), row.num_steps, names.index(row.reward)))
    result = Evaluation(rows)
    if win_rate:
        result.wins = list(_wins(measured, win_rate))
    return result


@dataclass(frozen=True)
class Measured:
    """One run on one kind of prompts."""

    name: str
    kind: str
    before: Measurement
    after: Measurement
    trained: bool


def _wins(measured: Sequence[Measured], reward: str) -> Iterator[WinRate]:
    """Yield the win rates of each run over its model before training, and of every two runs."""
    for m in measured:
        if m.trained:
            yield from _of_kind(win_rates(m.name, m.after, "before training", m.before, reward), m.kind)
    for one, other in combinations(measured, 2):
        if one.kind == other.kind and one.name != other.name:
            yield from _of_kind(win_rates(one.name, one.after, other.name, other.after, reward), one.kind)


def _check_win_rate(
    runs: Sequence[Run], reward: str, steps: Sequence[int] | None, extra: Sequence[str], seen: bool
) -> None:
    """Raise ConfigError if a run does not measure the reward, or two runs not on the same prompts in the same way."""

    def way(run: Run) -> str:
        settings, trained = run.config.evaluate, {one.name: one.fields for one in run.config.rewards}
        fields = {**settings.held_out_rewards(), **trained}.get(reward, {})
        prompts = run.held_out(), run.prompts(run.skipped())[: settings.limit] if seen else []
        return repr((fields, settings.seed, settings.samples, list(steps or settings.steps), prompts))

    for run, name in zip(runs, _names(runs), strict=True):
        known = run.with_measured(extra).names
        if reward not in known:
            raise ConfigError(f"--win-rate: found {reward!r}, expected one that {name} measures: {', '.join(known)}")
        if way(run) != way(runs[0]):
            raise ConfigError(
                f"--win-rate: {_names(runs)[0]} and {name} are not measured alike; give both the same prompts, seed "
                f"and settings of {reward} with --set evaluate.prompts=..., evaluate.seed=... and "
                f"reward.{reward}.KEY=..."
            )


def _check_real(runs: Sequence[Run], real: str, seen: bool) -> None:
    """Raise ConfigError for too few prompts or real images, or images that cannot be found."""
    count = count_real(real)
    for run in runs:
        settings, unseen = run.config.evaluate, run.held_out()
        kinds = [unseen, run.prompts(run.skipped())[: settings.limit]] if seen else [unseen]
        fewest = min((len(examples) for examples in kinds if examples), default=0)
        if min(fewest, count) < BLOCKS:
            raise ConfigError(
                f"--fid: found {fewest} prompts and {count} real images, expected at least {BLOCKS} of each; raise "
                "evaluate.limit or name more images"
            )


def _of_kind(found: Sequence[WinRate], kind: str) -> list[WinRate]:
    return [replace(rate, prompts=kind) for rate in found]


def _bars(console: Console | None, wanted: bool | None) -> Progress | CellProgress:
    """Return the display of progress: on the console, in the cell of a notebook, or none."""
    if console is None and wanted is not False and in_notebook():
        return CellProgress()
    shown = wanted is not False and (console is not None or wanted is True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not shown)


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names for tables; runs whose folders have the same name get their paths."""
    names = [run.name for run in runs]
    alike = [name == run.folder.name and names.count(name) > 1 for run, name in zip(runs, names, strict=True)]
    return [str(run.folder) if same else name for run, name, same in zip(runs, names, alike, strict=True)]


def _rows(
    run: Run,
    name: str,
    steps: Sequence[int] | None,
    extra: Sequence[str],
    seen: bool,
    before: dict[str, Measurement],
    bars: Progress | CellProgress,
    measurements: list[Measured],
    real: str,
    points: bool,
) -> list[Row]:
    config, settings = run.config, run.config.evaluate
    prompts: dict[str, list[Example]] = {"unseen": run.held_out()}
    if seen:
        prompts["seen"] = run.prompts(run.skipped())[: settings.limit]
    if not any(prompts.values()):
        raise ConfigError("evaluate.prompts: missing; expected a file of held-out prompts")
    chosen = list(steps or settings.steps)
    for number in chosen:
        run.sampler(number)
    with closing(run.with_measured(extra, run.scoring())) as rewards:
        for examples in prompts.values():
            rewards.check(examples)
        policy = run.policy()
        photos = None
        if real:
            batches = real_images(real, policy.image_size, settings.batch_size)
            photos = torch.cat([policy.features(images.to(policy.device)).cpu() for images in batches])
        rewards.load(policy.device)
        weights: dict[int | None, Mapping[str, Tensor]] = {None: run.weights}
        if points:
            weights |= {update: policy.read_export(folder) for update, folder in run.points()}
        rows: list[Row] = []
        for kind, examples in prompts.items():
            if not examples:
                continue

            def measured(
                when: str, kind: str = kind, examples: Sequence[Example] = examples, rewards: WeightedRewards = rewards
            ) -> Measurement:
                passes = len(examples) * settings.samples * sum(chosen)
                task = bars.add_task(f"{name}, {kind} prompts, {when}", total=passes)
                try:
                    return measure(
                        policy, run.sampler(), rewards, examples, chosen, settings.seed, settings.batch_size,
                        features=policy.features, samples=settings.samples, advance=partial(bars.advance, task),
                    )  # fmt: skip
                finally:
                    bars.remove_task(task)

            # Everything that the measurement before training depends on.
            model = replace(config.model, teacher="", lora_rank=0, lora_targets=[])
            key = repr((model, config.sampler, config.rewards, settings, examples, chosen, extra))
            if key not in before:
                with policy.reference():
                    before[key] = measured("before")
            for update, used in weights.items():
                with policy.using(used):
                    after = measured("after" if update is None else f"update {update}")
                found = compare(before[key], after, rewards.held_out)
                found += drift(before[key].features, after.features, len(examples))
                if photos is not None:
                    found += realism(before[key].features, after.features, photos, len(examples))
                rows += [replace(row, prompts=kind, update=update) for row in found]
                if update is None:
                    measurements.append(Measured(name, kind, before[key], after, bool(run.weights)))
    return rows


def drift(before: Mapping[int, Tensor], after: Mapping[int, Tensor], prompts: int) -> list[Row]:
    """Return one row per number of steps: the kernel distance between the features (N, D) before and after.

    Both are of images of `prompts` texts; with fewer than 2 there is no distance and no row.
    """
    rows = []
    for num_steps, features in before.items():
        if prompts < 2:
            continue
        distance, low, high = kernel_distance(features, after[num_steps], prompts)
        rows.append(Row(DRIFT, num_steps, prompts, 0.0, distance, distance, low, high))
    return rows


def realism(before: Mapping[int, Tensor], after: Mapping[int, Tensor], real: Tensor, prompts: int) -> list[Row]:
    """Return the rows of FID and KID by number of steps, between features (N, D) and those of `real` images (M, D)."""
    rows = []
    for num_steps, features in before.items():
        for name, distance in DISTANCES.items():
            first, second, change = distances(distance, features, after[num_steps], real, prompts)
            rows.append(
                Row(
                    name, num_steps, prompts, first.value, second.value, change.value, change.low, change.high,
                    first.low, first.high, second.low, second.high,
                )
            )  # fmt: skip
    return rows


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV, after a line of headings."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
