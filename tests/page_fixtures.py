"""Run folders written by hand, for the page about runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from alignkit.evaluation.rows import Row

Write = Callable[..., Path]

SETTINGS = """
seed = 3
recipe = ""
[model]
name = "shapes_lcm"
[sampler]
name = "lcm"
num_steps = 2
[train]
updates = 40
[algorithm]
name = "draft"
[[reward]]
name = "shine"
weight = 1.0
"""
ENVIRONMENT = {"python": "3.11", "versions": {"alignkit": "0.1.0"}, "git": "c0ffee", "cpu": "Example 9000", "gpus": []}
STEPS = (1, 2)
EVIL = [
    "<script>document.title = 'owned'</script>",
    "\"><img src=x onerror=\"document.title='owned'\"> ' onmouseover='1",
    "</style><style>body { display: none }</style>",
    "{{ 7 * 7 }} {% raw %} </script><!--",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "emoji \N{JACK-O-LANTERN}\u200d\N{ARTIST PALETTE} and \u4e2d\u6587",
    "long " * 1000,
    "x" * 5000,
    "half of a pair \ud83c",
]
"""Texts that must neither run nor break the layout."""


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        """Tag of the innermost element and text, in order."""
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.inside):
            self.text.append((self.inside[-1] if self.inside else "", data))


def plain(page: str) -> str:
    """Return the text of a page with single blanks."""
    return " ".join(" ".join(text for _, text in Elements(page).text).split())


def rows(update: int, rise: float = 0.01, count: int = 64) -> list[dict[str, Any]]:
    """Return the rows of an evaluation at an update: the reward rises by `rise` an update, the held-out one half."""
    found = []
    for steps in STEPS:
        for name, before, factor in (("reward", 0.5, 1.0), ("shine", 0.5, 1.0), ("pixels", 0.4, 0.5)):
            row = Row(name, steps, count, before, before_low=before - 0.1, before_high=before + 0.1)
            changes: dict[str, Any] = {}
            if update:
                change = rise * factor * update
                changes = {
                    "after": before + change, "difference": change, "low": change - 0.05, "high": change + 0.05,
                    "after_low": before + change - 0.1, "after_high": before + change + 0.1,
                }  # fmt: skip
            found.append(asdict(row) | {"held_out": name == "pixels"} | changes)
    return found


def update_line(step: int, **metrics: float | None) -> dict[str, Any]:
    known = {"reward": 0.5 + step / 100, "loss": -step / 10, "grad_norm": 1.0, "reward/part": 0.1}
    return {"step": step} | known | metrics | {"seconds": 2.0, "images_per_second": 8.0}


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any] | str]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def write_images(folder: Path, update: int, prompts: Sequence[str], size: int = 32) -> None:
    """Write a point whose images get redder with the update; the score of prompt 0 rises, that of the others falls."""
    point = folder / "points" / f"{update:06d}"
    point.mkdir(parents=True)
    scores = []
    for place, prompt in enumerate(prompts):
        for steps in STEPS:
            file = f"{place:03d}_{steps}steps.png"
            Image.new("RGB", (size, size), (min(255, 4 * update), 20 * place % 256, 40 * steps)).save(point / file)
            change = update / 100 * (1 if place == 0 else -0.1 * place)
            known = {"reward": 0.5 + change, "shine": 0.5 + change, "pixels": 0.25}
            scores.append({"file": file, "prompt": prompt, "steps": steps, "scores": known})
    (point / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """A function that writes the folder of a run: 40 updates, points at 0, 20 and 40, an evaluation, an export."""

    def write(
        name: str = "first",
        prompts: Sequence[str] = ("a red circle", "a blue square", "a green star"),
        updates: int = 40,
        rise: float = 0.01,
        warnings: Sequence[str] = (),
        settings: str = SETTINGS,
        ended: bool = True,
        size: int = 32,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.toml").write_text(settings, encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
        lines: list[Mapping[str, Any]] = [{"step": 0, "warning": text} for text in warnings]
        lines.append({"step": 0, "evaluation": rows(0)})
        for step in range(updates + 1):
            if step:
                lines.append(update_line(step))
            if prompts and step in {0, updates // 2, updates}:
                lines.append({"step": step, "point": rows(step, rise), "seconds": 6.0})
                write_images(folder, step, prompts, size)
        if ended:
            lines.append({"step": updates, "exported": updates, "weights": "best", "text": "exports update 40: best"})
            lines.append({"step": updates, "evaluation": rows(updates, rise, 100)})
            lines.append({"step": updates, "verdict": "no sign", "text": "no sign of reward hacking: all is well"})
        write_lines(folder, lines)
        return folder

    return write


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """Pretend to run in the kernel of a notebook; return its outputs, each with all it has shown by MIME type."""
    outputs: list[list[dict[str, str]]] = []

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        shown = [bundle]
        outputs.append(shown)
        return SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))

    for name, contents in (
        ("IPython", {"get_ipython": lambda: SimpleNamespace(kernel=object()), "version_info": (9, 0)}),
        ("IPython.display", {"display": display}),
    ):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return outputs
