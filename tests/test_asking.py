"""How one reward is asked: again when it fails for a while, in a thread when it is slow, from a cache if it may."""

from __future__ import annotations

import gc
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.asking import Asking
from alignkit.errors import AlignkitError, PluginError, TransientError
from alignkit.interfaces import Example, Reward, Scores
from alignkit.rewards import WeightedRewards
from alignkit.score_cache import ScoreCache, keys_of

EXAMPLES = [Example(f"prompt {i}") for i in range(6)]
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Judge(Reward):
    """The mean of all pixels, from an answer that may fail; counts how often it is asked."""

    def __init__(self, fail: Sequence[int] = (), mark: str = "judge 1") -> None:
        self.asked, self.fail, self.mark = 0, set(fail), mark

    def fingerprint(self) -> str:
        return self.mark

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        self.asked += 1
        if self.asked in self.fail:
            raise TransientError("connection refused")
        values = images.mean((1, 2, 3))
        return Scores(values, torch.ones(len(values), dtype=torch.bool), {"twice": 2 * values})


class Slow(Judge):
    slow = True


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for, none of which is made but on the clock."""
    found: list[float] = []
    monkeypatch.setattr("alignkit.asking.wait", lambda closed, seconds: found.append(seconds))
    monkeypatch.setattr("alignkit.asking.monotonic", lambda: sum(found))
    return found


def loaded(reward: Reward, asking: Asking, name: str = "judge") -> WeightedRewards:
    rewards = WeightedRewards([(name, 1.0, reward)], asking=asking)
    rewards.load(torch.device("cpu"))
    return rewards


# what passes is tried again


def test_a_failure_that_passes_changes_nothing_but_the_time(waits: list[float]) -> None:
    judge = Judge(fail=[1, 2])
    scores = loaded(judge, Asking(retry_seconds=0.5)).score(IMAGES, EXAMPLES, 6)
    assert torch.equal(scores.values, loaded(Judge(), Asking()).score(IMAGES, EXAMPLES, 6).values)
    assert judge.asked == 3 and waits == [0.5, 1.0]


@pytest.mark.parametrize("reward", [Judge, Slow])
def test_a_reward_that_never_answers_is_named_after_a_bounded_number_of_tries(
    waits: list[float], reward: type[Judge]
) -> None:
    judge = reward(fail=range(100))
    with pytest.raises(TransientError, match=r"^reward 'judge' did not answer, asked 4 times in 7 seconds: connection"):
        loaded(judge, Asking(retries=3)).score(IMAGES, EXAMPLES, 6)
    assert judge.asked == 4 and waits == [1.0, 2.0, 4.0]


def test_a_reward_that_hangs_is_asked_no_more_once_the_time_is_up(waits: list[float]) -> None:
    class Hangs(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            waits.append(120)
            return super().__call__(images, examples)

    with pytest.raises(TransientError, match="did not answer, asked 3 times in 363 seconds"):
        loaded(Hangs(fail=range(100)), Asking()).score(IMAGES, EXAMPLES, 6)
    assert waits == [120, 1, 120, 2, 120]
    with pytest.raises(TransientError, match="did not answer, asked once"):
        loaded(Hangs(fail=range(100)), Asking(retry_limit=120)).score(IMAGES, EXAMPLES, 6)


def test_one_second_is_told_as_one(waits: list[float]) -> None:
    with pytest.raises(TransientError, match="did not answer, asked 2 times in 1 second: connection refused"):
        loaded(Judge(fail=range(100)), Asking(retries=1)).score(IMAGES, EXAMPLES, 6)


def test_what_does_not_pass_is_not_tried_again(waits: list[float]) -> None:
    class Broken(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            self.asked += 1
            raise ValueError("no JSON: I would rather talk about ships")

    judge = Broken()
    told = "reward 'judge' failed while scoring picture 0, 'prompt 0': ValueError: no JSON"
    with pytest.raises(PluginError, match=told):
        loaded(judge, Asking()).score(IMAGES, EXAMPLES, 6)
    assert judge.asked == 2 and waits == []  # the second time to find the picture


# numbers that are none


def test_a_score_that_is_no_number_is_refused_or_left_out_by_choice() -> None:
    class Odd(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return images.mean((1, 2, 3)).index_fill(0, torch.tensor([2]), torch.nan)

    told: list[str] = []
    with pytest.raises(PluginError, match=r"'odd' returned nan for picture 2, 'prompt 2'.*scoring\.broken"):
        loaded(Odd(), Asking(), "odd").score(IMAGES, EXAMPLES, 6)
    scores = loaded(Odd(), Asking(broken="skip", warn=told.append), "odd").score(IMAGES, EXAMPLES, 6)
    assert scores.valid.tolist() == [True, True, False, True, True, True]
    assert list(scores.reasons) == ["", "", "odd: its score is not finite", "", "", ""]
    assert scores.values.isnan().tolist() == (~scores.valid).tolist()
    assert len(told) == 1 and "'odd'" in told[0]


def test_a_picture_that_is_not_scored_has_no_gradient_and_spoils_none() -> None:
    """The root is of a number below 0 for one picture: its score is masked, and without more its gradient is NaN."""

    class Root(Reward):
        differentiable = True

        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return (images.mean((1, 2, 3)) - 2.0 * torch.tensor([e.text == "prompt 2" for e in examples])).sqrt()

    images = IMAGES.clone().requires_grad_()
    scores = loaded(Root(), Asking(broken="skip"), "root")(images, EXAMPLES)
    scores.values[scores.valid].sum().backward()
    assert images.grad is not None and scores.valid.tolist() == [True, True, False, True, True, True]
    assert images.grad.flatten(1).abs().amax(1).gt(0).tolist() == scores.valid.tolist()
    assert bool(images.grad.isfinite().all())


def test_what_a_reward_writes_into_metadata_reaches_no_other() -> None:
    class Counting(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            for example in examples:
                assert "seen" not in example.metadata and example.metadata["deep"] == [1]
                example.metadata["seen"] = True  # type: ignore[index]
                example.metadata["deep"].append(2)
            return super().__call__(images, examples)

    rewards = WeightedRewards([("a", 1.0, Counting()), ("b", 1.0, Counting())])
    examples = [Example("a", {"deep": [1]})] * 6
    rewards.score(IMAGES, examples, 2)
    assert examples[0].metadata == {"deep": [1]}


# slow rewards


def test_a_process_ends_while_a_slow_reward_still_answers() -> None:
    program = """
import time, torch
from alignkit import asking
from alignkit.interfaces import Example, Reward
from alignkit.rewards import WeightedRewards
asking.PATIENCE = 0.1
class Slow(Reward):
    slow = True
    def __call__(self, images, examples):
        time.sleep(600)
class Broken(Reward):
    def __call__(self, images, examples):
        raise ValueError("no")
WeightedRewards([("slow", 1.0, Slow()), ("broken", 1.0, Broken())]).score(torch.zeros(1, 3, 8, 8), [Example("a")], 1)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "reward 'broken' failed" in ended.stderr


def test_a_process_does_not_wait_for_a_slow_reward_that_rests() -> None:
    """Never closed, it waits for its next call when the process ends, which must not cost `PATIENCE`."""
    program = """
import atexit, time, torch
ends = []
atexit.register(lambda: print(time.monotonic() - ends[0] < 30))  # runs last
from alignkit import asking
from alignkit.interfaces import Example, Reward
from alignkit.rewards import WeightedRewards
asking.PATIENCE = 60
class Slow(Reward):
    slow = True
    def __call__(self, images, examples):
        return images.mean((1, 2, 3))
WeightedRewards([("slow", 1.0, Slow())]).score(torch.zeros(1, 3, 8, 8), [Example("a")], 1)
ends.append(time.monotonic())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "True\n", ended.stderr


def test_pictures_are_let_go_once_they_are_scored_and_a_closed_reward_is_opened_again() -> None:
    rewards = loaded(Slow(fail=[2]), Asking(retry_seconds=0.01))
    pictures = IMAGES.clone()
    (asked,) = rewards._asked
    held = weakref.ref(pictures)
    asked.begin(pictures, EXAMPLES).result()
    del pictures
    for _ in range(100):
        gc.collect()
        if held() is None:
            break
        time.sleep(0.05)
    assert held() is None
    rewards.close()
    # Asked where one stands, it is tried again as if it had never been closed; and so it is in a thread anew.
    assert asked(IMAGES, EXAMPLES).valid.all()
    assert asked.begin(IMAGES, EXAMPLES).result().valid.all()
    rewards.close()


def test_a_slow_reward_that_was_let_go_is_not_asked_again() -> None:
    begun, ended = threading.Event(), threading.Event()

    class Away(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            begun.set()
            raise TransientError("connection refused")

    rewards = WeightedRewards([("away", 1.0, Away())], asking=Asking(retries=3, retry_seconds=600, retry_limit=6000))
    (asked,) = rewards._asked
    answer = asked.begin(IMAGES, EXAMPLES)
    answer.add_done_callback(lambda _: ended.set())
    assert begun.wait(60)
    rewards.close()
    assert ended.wait(60) and isinstance(answer.exception(), TransientError)


def test_slow_rewards_answer_while_the_next_chunk_is_made_and_while_others_answer() -> None:
    """Each waits until the others have begun and the last chunk is made: in turn they would wait for ever."""
    everything_made, both_begun = threading.Event(), threading.Barrier(2, timeout=60)

    class Waiting(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            if not self.asked:
                assert everything_made.wait(60)
                both_begun.wait()
            return super().__call__(images, examples)

    def chunks() -> Iterator[tuple[Tensor, Sequence[Example]]]:
        for i in range(0, 6, 2):
            yield IMAGES[i : i + 2], EXAMPLES[i : i + 2]
        everything_made.set()

    rewards = WeightedRewards([("a", 1.0, Waiting()), ("b", 0.5, Waiting()), ("c", 1.0, Judge())])
    found = rewards.score_each(chunks())
    plain = WeightedRewards([("a", 1.0, Judge()), ("b", 0.5, Judge()), ("c", 1.0, Judge())])
    expected = plain.score(IMAGES, EXAMPLES, 2)
    assert torch.equal(torch.cat([s.values for s in found]), expected.values)
    for name, values in expected.parts.items():
        assert torch.equal(torch.cat([s.parts[name] for s in found]), values)
    rewards.close()


def test_a_slow_reward_is_asked_in_order_one_call_at_a_time_without_gradient_and_autocast() -> None:
    seen: list[str] = []
    inside = threading.Lock()

    class Strict(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            assert inside.acquire(blocking=False)
            time.sleep(0.002)
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            assert threading.current_thread() is not threading.main_thread()
            seen.extend(e.text for e in examples)
            inside.release()
            return super().__call__(images, examples)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loaded(Strict(), Asking()).score(IMAGES.clone().requires_grad_(), EXAMPLES, 1)
    assert seen == [e.text for e in EXAMPLES]


def test_without_overlap_and_with_a_gradient_a_slow_reward_is_asked_where_one_stands() -> None:
    threads: set[threading.Thread] = set()

    class Here(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            threads.add(threading.current_thread())
            return super().__call__(images, examples)

    loaded(Here(), Asking(overlap=False)).score(IMAGES, EXAMPLES, 2)
    x = IMAGES.clone().requires_grad_()
    loaded(Here(), Asking())(x, EXAMPLES).values.sum().backward()
    assert threads == {threading.main_thread()} and x.grad is not None


@pytest.mark.parametrize("slow", [True, False])
def test_messages_count_pictures_over_the_chunks_of_a_call(slow: bool) -> None:
    class Picky(Slow if slow else Judge):  # type: ignore[misc]
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            if any(e.text == "prompt 5" for e in examples):
                raise ValueError("not this one")
            return images.mean((1, 2, 3))

    rewards = loaded(Picky(), Asking())
    with pytest.raises(PluginError, match=r"failed while scoring picture 5, 'prompt 5': ValueError: not this one"):
        rewards.score(IMAGES, EXAMPLES, 4)
    rewards.close()


def test_behind_a_failure_a_slow_reward_is_not_asked_for_the_rest(waits: list[float]) -> None:
    made = threading.Event()

    class Failing(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            self.asked += 1
            made.wait(60)
            raise ValueError("gone")

    def chunks() -> Iterator[tuple[Tensor, Sequence[Example]]]:
        for i in range(6):
            yield IMAGES[i : i + 1], EXAMPLES[i : i + 1]
        made.set()
        raise AlignkitError("the decoder broke")

    judge = Failing()
    rewards = loaded(judge, Asking())
    with pytest.raises(AlignkitError, match="decoder"):
        rewards.score_each(chunks())
    rewards.close()
    assert judge.asked <= 2


# the cache


def test_a_score_is_found_again_to_the_bit_by_content(tmp_path: Path) -> None:
    first, second = Judge(), Judge()
    made = loaded(first, Asking(cache=ScoreCache(tmp_path / "scores"))).score(IMAGES, EXAMPLES, 4)
    cache = ScoreCache(tmp_path / "scores")
    found = loaded(second, Asking(cache=cache)).score(IMAGES, EXAMPLES, 4)
    assert (first.asked, second.asked, len(cache)) == (2, 0, 6)
    assert torch.equal(found.values, made.values) and found.valid.all()
    assert torch.equal(found.parts["judge/twice"], made.parts["judge/twice"])
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
def test_any_other_content_is_another_key(change: Callable[..., Any]) -> None:
    images, examples, fingerprint = change(IMAGES * 0.9, EXAMPLES, "judge 1")
    keys = keys_of("judge 1", IMAGES * 0.9, EXAMPLES)
    assert keys == keys_of("judge 1", IMAGES * 0.9 + 1e-6, EXAMPLES)  # the same 8-bit file
    assert len(set(keys)) == 6 and not set(keys) & set(keys_of(fingerprint, images, examples))


def test_a_chunk_of_which_one_picture_is_new_is_asked_for_as_a_whole(tmp_path: Path) -> None:
    judge = Judge()
    rewards = loaded(judge, Asking(cache=ScoreCache(tmp_path / "scores")))
    rewards.score(IMAGES[:3], EXAMPLES[:3], 3)
    seen: list[int] = []
    ask = Judge.__call__
    Judge.__call__ = lambda self, x, e: seen.append(len(e)) or ask(self, x, e)  # type: ignore[method-assign, func-returns-value]
    try:
        rewards.score(IMAGES[:4], EXAMPLES[:4], 4)
    finally:
        Judge.__call__ = ask  # type: ignore[method-assign]
    assert seen == [4]
    rewards.close()


def test_only_a_black_box_that_says_it_repeats_itself_is_kept(tmp_path: Path) -> None:
    class Smooth(Judge):
        differentiable = True

    class Moody(Judge):
        deterministic = False

    for judge in (Smooth(), Moody(), Judge(mark="")):
        rewards = loaded(judge, Asking(cache=ScoreCache(tmp_path / "scores")))
        for _ in range(2):
            rewards.score(IMAGES, EXAMPLES, 6)
        assert judge.asked == 2
    assert not (tmp_path / "scores").exists()


def test_a_picture_that_could_not_be_scored_is_asked_for_again(tmp_path: Path) -> None:
    class Shy(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
            self.asked += 1
            return Scores(images.mean((1, 2, 3)), torch.arange(len(images)) != 1)

    judge = Shy()
    rewards = loaded(judge, Asking(cache=ScoreCache(tmp_path / "scores")))
    for _ in range(2):
        assert rewards.score(IMAGES, EXAMPLES, 3).valid.tolist() == [True, False, True] * 2
    assert judge.asked == 4
    rewards.close()


def test_a_file_that_is_no_cache_is_one_clear_line_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "scores"
    file.write_bytes(b"a letter to my mother" * 100)
    with pytest.raises(AlignkitError, match=r"scores: cannot be used as a cache of scores \(.*\); delete it"):
        loaded(Judge(), Asking(cache=ScoreCache(file))).score(IMAGES, EXAMPLES, 6)
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
