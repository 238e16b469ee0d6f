"""Inspect prompts before a run: which of them a reward cannot score, and its questions about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from alignkit.config.load import load as load_config
from alignkit.data.misread import count_words, foreign_mark, mark_name
from alignkit.data.prompt_sets import prompt_file
from alignkit.data.prompts import read_examples
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit.rewards.checked import blaming
from alignkit.rewards.weighted import WeightedRewards
from alignkit.runs.build import Parts

Problem = Literal["broken", "unscorable", "truncated", "syntax", "repeated"]
_SIDE = 64
"""Width and height of the grey image that loaded rewards are tried on."""


@dataclass(frozen=True)
class Finding:
    """A problem of one prompt."""

    problem: Problem
    """broken: cannot be read; unscorable: the reward rejects it; truncated: its end is ignored; syntax: weights,
    adapters, wildcards and choices of other tools, which are plain text here; repeated."""
    number: int
    """Position among the prompts that can be read, from 1; 0 for a broken one."""
    prompt: str
    """The text; empty for a broken one."""
    why: str
    """The reason, in one line."""


@dataclass(frozen=True)
class Questions:
    """The questions of a reward about images of one prompt."""

    prompt: str
    questions: tuple[str, ...]
    refused: str
    """Reason why the reward cannot score it; empty if it can, as far as is known before any weight loads."""


def lint(
    source: str | Path, reward: str, overrides: Mapping[str, Any] | None = None, load: bool = False
) -> tuple[int, list[Finding]]:
    """Return the number of prompts in the file or set `source`, and their problems for `reward` and the model.

    Without `load` no weights are loaded; the tokenizer of the model that `overrides` name counts the tokens if it is on
    this disk, else words are counted for Stable Diffusion's text encoders. With it the reward scores a grey image with
    each prompt, which also finds words that it does not know and prompts that it truncates. Raises AlignkitError if the
    file or the reward itself is wrong.
    """
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    named = config.model.name if "model.name" in (overrides or {}) else ""
    count, model = (Parts(config).facts().count_tokens if named else None), f"model {named}"
    if count is None:
        count, model = count_words, "Stable Diffusion"
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
            findings.append(Finding("repeated", number, example.text, f"same text as prompt {seen}"))
        if mark := foreign_mark(example.text):
            why = f"{mark!r} is {mark_name(example.text)} in other tools, and plain text here"
            findings.append(Finding("syntax", number, example.text, why))
        if (tokens := count(example.text))[1] > tokens[0]:
            why = f"{model}: reads {tokens[0]} tokens, found {tokens[1]}; the end of the prompt is ignored"
            findings.append(Finding("truncated", number, example.text, why))
        for problem, why in _problems(rewards, example, load):
            findings.append(Finding(problem, number, example.text, why))
    return len(examples), findings


def _problems(rewards: WeightedRewards, example: Example, loaded: bool) -> Iterator[tuple[Problem, str]]:
    name, _, reward = rewards.rewards[0]
    try:
        rewards.check([replace(example, place="")])  # a finding names the place itself
        if not loaded:
            return
        scores = rewards.score(torch.full((1, 3, _SIDE, _SIDE), 0.5), [example], 1)
    except ConfigError as error:
        yield "unscorable", str(error)
        return
    if not scores.valid[0]:
        why = scores.reason.removeprefix(f"{name}: ") or "cannot score a grey image of it"
        yield "unscorable", f"{name}: {why}"
    elif float(scores.parts.get(f"{name}/truncated", torch.zeros(1))[0]) > 0:
        with blaming(name, reward, "in tokens"):
            limit = reward.tokens(example)
        read = f"reads {limit[0]} tokens, found {limit[1]}" if limit else "does not read all of it"
        yield "truncated", f"{name}: {read}; the end of the prompt is ignored"


def questions(source: str, reward: str, overrides: Mapping[str, Any] | None = None) -> list[Questions]:
    """Return the questions of `reward` about each prompt; `source` is a file, a set, or a prompt itself.

    Raises AlignkitError for a reward without questions.
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
        out.append(Questions(example.text, tuple(scoring.explain(example)), refused))
    if not any(one.questions or one.refused for one in out):
        raise ConfigError(f"reward {name}: has no questions to show; it reads prompts as they are")
    return out


def same(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, blanks and full stops at the end."""
    return " ".join(text.casefold().split()).rstrip(" .")
