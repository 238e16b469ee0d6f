"""The score cache: entries are found by content and returned bit for bit."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.records import Example, Scores
from alignkit.rewards.cache import ScoreCache, keys_of
from alignkit.rewards.checked import Scoring
from scoring_fixtures import EXAMPLES, IMAGES, Flaky, loaded


def test_a_score_is_found_by_content_and_equal_to_the_bit(tmp_path: Path) -> None:
    first, second = Flaky(), Flaky()
    made = loaded(first, Scoring(cache=ScoreCache(tmp_path / "scores"))).score(IMAGES, EXAMPLES, 4)
    cache = ScoreCache(tmp_path / "scores")
    found = loaded(second, Scoring(cache=cache)).score(IMAGES, EXAMPLES, 4)
    assert (first.calls, second.calls, len(cache)) == (2, 0, 6)
    assert torch.equal(found.values, made.values) and found.valid.all()
    assert torch.equal(found.parts["flaky/twice"], made.parts["flaky/twice"])
    cache.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda i, e, f: (i + torch.eye(4) / 255, e, f),
        lambda i, e, f: (i, [Example(x.text + " ") for x in e], f),
        lambda i, e, f: (i, [Example(x.text, {"target": 1}) for x in e], f),
        lambda i, e, f: (i, e, f + "!"),
        lambda i, e, f: (i.transpose(2, 3), e, f),
        lambda i, e, f: (i.reshape(6, 3, 2, 8), e, f),
    ],
)
def test_any_other_content_has_another_key(change: Callable[..., Any]) -> None:
    images, examples, fingerprint = change(IMAGES * 0.9, EXAMPLES, "version 1")
    keys = keys_of("version 1", IMAGES * 0.9, EXAMPLES)
    assert keys == keys_of("version 1", IMAGES * 0.9 + 1e-6, EXAMPLES)  # the same 8-bit file
    assert len(set(keys)) == 6 and not set(keys) & set(keys_of(fingerprint, images, examples))


def test_a_chunk_with_one_new_image_is_scored_as_a_whole(tmp_path: Path) -> None:
    rewards = loaded(Flaky(), Scoring(cache=ScoreCache(tmp_path / "scores")))
    rewards.score(IMAGES[:3], EXAMPLES[:3], 3)
    seen: list[int] = []
    call = Flaky.__call__
    Flaky.__call__ = lambda self, x, e: seen.append(len(e)) or call(self, x, e)  # type: ignore[method-assign, func-returns-value]
    try:
        rewards.score(IMAGES[:4], EXAMPLES[:4], 4)
    finally:
        Flaky.__call__ = call  # type: ignore[method-assign]
    assert seen == [4]
    rewards.close()


def test_only_scores_of_deterministic_black_boxes_with_a_fingerprint_are_cached(tmp_path: Path) -> None:
    class Smooth(Flaky):
        differentiable = True

    class Moody(Flaky):
        deterministic = False

    for reward in (Smooth(), Moody(), Flaky(mark="")):
        rewards = loaded(reward, Scoring(cache=ScoreCache(tmp_path / "scores")))
        for _ in range(2):
            rewards.score(IMAGES, EXAMPLES, 6)
        assert reward.calls == 2
    assert not (tmp_path / "scores").exists()


def test_an_image_that_could_not_be_scored_is_scored_again(tmp_path: Path) -> None:
    class Shy(Flaky):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
            self.calls += 1
            return Scores(images.mean((1, 2, 3)), torch.arange(len(images)) != 1)

    reward = Shy()
    rewards = loaded(reward, Scoring(cache=ScoreCache(tmp_path / "scores")))
    for _ in range(2):
        assert rewards.score(IMAGES, EXAMPLES, 3).valid.tolist() == [True, False, True] * 2
    assert reward.calls == 4
    rewards.close()


def test_a_file_that_is_not_a_cache_is_refused_in_one_line_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "scores"
    file.write_bytes(b"a letter to my mother" * 100)
    with pytest.raises(AlignkitError, match=r"scores: cannot be used as a score cache \(.*\); delete it"):
        loaded(Flaky(), Scoring(cache=ScoreCache(file))).score(IMAGES, EXAMPLES, 6)
    assert file.read_bytes().startswith(b"a letter")


def test_threads_and_processes_may_share_the_file(tmp_path: Path) -> None:
    caches = [ScoreCache(tmp_path / "scores") for _ in range(2)]

    def fill(number: int) -> None:
        for i in range(20):
            scores = Scores(torch.tensor([float(i)]), torch.tensor([True]))
            caches[number % 2].put([f"{number}-{i}"], scores)
            caches[number % 2].put([f"both-{i}"], scores)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches[0]) == len(caches[1]) == 100
    found = caches[1].get([f"both-{i}" for i in range(20)], torch.device("cpu"))
    assert found is not None and found.values.tolist() == list(range(20))
    for cache in caches:
        cache.close()
    with sqlite3.connect(tmp_path / "scores") as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    plain.close()
