"""The folder of a person's answers: what outlives the process, what is refused, what is taken back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError, ConfigError
from alignkit.serving.answers import Answers, Pair

SETTINGS = {"model": "tiny", "seed": 0}
FIRST, SECOND, THIRD = Pair(0, 0), Pair(1, 0), Pair(1, 1)


def opened(folder: Path, **settings: Any) -> Answers:
    answers = Answers(folder, SETTINGS | settings, prompts=2)
    answers.begin()
    return answers


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a preference, a tie and a skipped pair."""
    answers = opened(tmp_path / "new" / "choices")
    answers.add(FIRST, "right", 1, {"text": "a"})
    answers.add(SECOND, "tie", 0, {"text": "b"})
    answers.add(THIRD, "skip", 0, {"text": "b"})
    return answers.folder


def test_a_line_names_winner_and_loser_or_neither(folder: Path) -> None:
    first, tie, skipped = lines(folder)
    assert first == {
        "text": "a", "winner": "images/000000_0_0.png", "loser": "images/000000_0_1.png", "answer": "right",
        "left": "images/000000_0_1.png", "right": "images/000000_0_0.png", "prompt": 0, "copy": 0,
    }  # fmt: skip
    assert [line["winner"] for line in (tie, skipped)] == [line["loser"] for line in (tie, skipped)] == [None, None]


def test_answers_are_found_again_and_the_last_can_be_undone(folder: Path) -> None:
    again = opened(folder)
    assert again.choices == {FIRST: "right", SECOND: "tie", THIRD: "skip"}
    assert again.counts() == "1 pair, 1 tie, 1 skipped"
    assert again.undo() == THIRD and again.undo() == SECOND and again.last == FIRST
    assert opened(folder).choices == {FIRST: "right"}
    again.add(THIRD, "left", 0, {"text": "b"})
    assert again.counts() == "2 pairs" and len(lines(folder)) == 2
    for _ in range(2):
        again.undo()
    with pytest.raises(AlignkitError, match="there is no answer to undo"):
        again.undo()
    assert opened(folder).choices == {}


@pytest.mark.parametrize(("piece", "kept"), [(b'{"text": "c", "prom', 3), (b"\xf0\x9f", 3), (b"", 3)])
def test_a_piece_of_a_line_that_was_never_confirmed_is_removed(folder: Path, piece: bytes, kept: int) -> None:
    table = folder / "pairs.jsonl"
    whole = table.read_bytes()
    table.write_bytes(whole + piece)
    assert len(opened(folder).choices) == kept and table.read_bytes() == whole


def test_a_whole_line_without_its_end_is_kept(folder: Path) -> None:
    table = folder / "pairs.jsonl"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1])
    assert len(opened(folder).choices) == 3 and table.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ["", "[1]", '{"prompt": 0, "copy": 5}', '{"prompt": 2, "copy": 0, "answer": "tie"}',
     '{"prompt": 0, "copy": 0, "answer": "tie"}', '{"prompt": "0", "copy": 5, "answer": "tie"}',
     '{"prompt": 0, "copy": [], "answer": "tie"}', '{"prompt": 0, "copy": 5, "answer": "both"}'],
)  # fmt: skip
def test_a_line_of_another_kind_is_refused_with_its_number(folder: Path, line: str) -> None:
    with (folder / "pairs.jsonl").open("a") as table:
        table.write(f"{line}\n")
    with pytest.raises(ConfigError, match=r"pairs.jsonl, line 4: found .*, expected a line of alignkit prefer"):
        opened(folder)
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 4


def test_other_settings_are_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"its images were made with seed = 0, found 1; use the same settings, or"):
        opened(folder, seed=1)
    (folder / "prefer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"prefer\.json is damaged .*; choose another folder"):
        opened(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"exists already, without prefer\.json; choose another folder"):
            opened(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_answer_that_cannot_be_written_leaves_the_file_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, whole = opened(folder), (folder / "pairs.jsonl").read_bytes()
    answers.undo()
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AlignkitError, match=r"could not be written \(No space left on device\); try again"):
        answers.add(THIRD, "skip", 0, {"text": "b"})
    assert len(lines(folder)) == 2
    answers.add(THIRD, "skip", 0, {"text": "b"})
    assert (folder / "pairs.jsonl").read_bytes() == whole


def test_a_second_process_on_the_same_folder_is_noticed(folder: Path) -> None:
    answers = opened(folder)
    opened(folder).undo()
    for act in (answers.undo, lambda: answers.add(Pair(0, 1), "tie", 0, {"text": "a"})):
        with pytest.raises(AlignkitError, match="was changed by another program; end alignkit prefer"):
            act()
    assert len(lines(folder)) == 2
