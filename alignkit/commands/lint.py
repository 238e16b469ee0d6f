"""Prompts before a run: which of them a reward cannot score, and what it asks about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from alignkit.config.load import load as load_config
from alignkit.data.prompt_sets import prompt_file
from alignkit.data.prompts import read_examples
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit.rewards.checked import blaming
from alignkit.rewards.weighted import WeightedRewards
from alignkit.runs.build import Parts

Problem = Literal["broken", "unscorable", "truncated", "repeated"]
_SIDE = 64
"""Of the grey image that loaded rewards are tried on."""


@dataclass(frozen=True)
class Finding:
    """Something about one prompt that its author should know."""

    problem: Problem
    """broken: cannot be read; unscorable: the reward refuses it; truncated: its end is not read; repeated."""
    number: int
    """Which of the prompts that can be read, 1 the first; 0 for a broken one."""
    prompt: str
    """Its text; empty for a broken one."""
    why: str
    """One line."""


@dataclass(frozen=True)
class Asked:
    """What a reward asks about images of one prompt."""

    prompt: str
    questions: tuple[str, ...]
    refused: str
    """Why the reward cannot score it; empty where it can, as far as is known before any weight loads."""


def lint(
    source: str | Path, reward: str, overrides: Mapping[str, Any] | None = None, load: bool = False
) -> tuple[int, list[Finding]]:
    """The number of prompts in the file or set `source`, and what is wrong with some of them under `reward`.

    Without `load` what can be told before any weight loads. With it the reward scores a grey image with each prompt,
    and tells of words that it does not know and of ends that it does not read. Raises AlignkitError for what is wrong
    with file or reward themselves.
    """
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    broken: list[str] = []
    examples = read_examples(source, config.data.prompt_column, broken)
    findings = [Finding("broken", 0, "", what) for what in broken]
    rewards = WeightedRewards(Parts(config).trained_rewards())
    rewards.check([])
    if load:
        rewards.load(torch.device("cpu"))
    first: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        seen = first.setdefault(same(example.text), number)
        if seen != number:
            findings.append(Finding("repeated", number, example.text, f"prompt {seen} again"))
        for problem, why in _problems(rewards, example, load):
            findings.append(Finding(problem, number, example.text, why))
    return len(examples), findings


def _problems(rewards: WeightedRewards, example: Example, loaded: bool) -> Iterator[tuple[Problem, str]]:
    name, _, reward = rewards.rewards[0]
    try:
        rewards.check([replace(example, place="")])  # a finding has its place
        if not loaded:
            return
        scores = rewards.score(torch.full((1, 3, _SIDE, _SIDE), 0.5), [example], 1)
    except ConfigError as error:
        yield "unscorable", str(error)
        return
    if not scores.valid[0]:
        why = scores.reason.removeprefix(f"{name}: ") or "marks a grey image of it as one that cannot be scored"
        yield "unscorable", f"{name}: {why}"
    elif float(scores.parts.get(f"{name}/truncated", torch.zeros(1))[0]) > 0:
        with blaming(name, reward, "in tokens"):
            limit = reward.tokens(example)
        told = f"reads {limit[0]} tokens, found {limit[1]}" if limit else "does not read all of it"
        yield "truncated", f"{name}: {told}; what stands at its end counts for nothing"


def ask(source: str, reward: str, overrides: Mapping[str, Any] | None = None) -> list[Asked]:
    """What `reward` asks about images of each prompt; `source` is a file, a set, or a prompt itself.

    Raises AlignkitError for a reward that asks nothing.
    """
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    file = prompt_file(source)
    is_file = file.exists() or file.suffix in (".txt", ".jsonl", ".parquet")
    examples = read_examples(file, config.data.prompt_column) if is_file else [Example(source)]
    rewards = WeightedRewards(Parts(config).trained_rewards())
    rewards.check([])
    ((name, _, scoring),) = rewards.rewards
    out = []
    for example in examples:
        refused = next((why for _, why in _problems(rewards, example, loaded=False)), "")
        out.append(Asked(example.text, tuple(scoring.explain(example)), refused))
    if not any(asked.questions or asked.refused for asked in out):
        raise ConfigError(f"reward {name}: asks no questions; it reads prompts as they are")
    return out


def same(text: str) -> str:
    """Equal for texts that differ in upper and lower case, in blanks, and in points at the end alone."""
    return " ".join(text.casefold().split()).rstrip(" .")
