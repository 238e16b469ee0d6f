"""Slow rewards: scored in a thread of their own, in order, and released."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from alignkit.errors import AlignkitError, PluginError, TransientError
from alignkit.records import Example, Scores
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards
from scoring_fixtures import EXAMPLES, IMAGES, Flaky, Slow, loaded


def test_a_process_ends_while_a_slow_reward_is_still_scoring() -> None:
    program = """
import time, torch
from alignkit.rewards import worker
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
worker.PATIENCE = 0.1
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


def test_a_process_does_not_wait_for_an_idle_slow_reward() -> None:
    """Its thread was never closed and waits for a call when the process ends, which must not take `PATIENCE`."""
    program = """
import atexit, time, torch
ends = []
atexit.register(lambda: print(time.monotonic() - ends[0] < 30))  # runs last
from alignkit.rewards import worker
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
worker.PATIENCE = 60
class Slow(Reward):
    slow = True
    def __call__(self, images, examples):
        return images.mean((1, 2, 3))
WeightedRewards([("slow", 1.0, Slow())]).score(torch.zeros(1, 3, 8, 8), [Example("a")], 1)
ends.append(time.monotonic())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "True\n", ended.stderr


def test_images_are_freed_once_they_are_scored_and_a_closed_reward_reopens() -> None:
    rewards = loaded(Slow(fail=[2]), Scoring(retry_seconds=0.01))
    images = IMAGES.clone()
    (member,) = rewards._members
    held = weakref.ref(images)
    member.begin(images, EXAMPLES).result()
    del images
    for _ in range(100):
        gc.collect()
        if held() is None:
            break
        time.sleep(0.05)
    assert held() is None
    rewards.close()
    # It retries as if it had never been closed, in this thread and in a new one.
    assert member(IMAGES, EXAMPLES).valid.all()
    assert member.begin(IMAGES, EXAMPLES).result().valid.all()
    rewards.close()


def test_a_slow_reward_is_not_retried_once_it_is_closed() -> None:
    begun, ended = threading.Event(), threading.Event()

    class Away(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            begun.set()
            raise TransientError("connection refused")

    rewards = WeightedRewards([("away", 1.0, Away())], scoring=Scoring(retries=3, retry_seconds=600, retry_limit=6000))
    (member,) = rewards._members
    scores = member.begin(IMAGES, EXAMPLES)
    scores.add_done_callback(lambda _: ended.set())
    assert begun.wait(60)
    rewards.close()
    assert ended.wait(60) and isinstance(scores.exception(), TransientError)


def test_slow_rewards_score_while_the_next_chunk_is_made_and_other_rewards_score() -> None:
    """Each waits until the other has begun and the last chunk is made, so sequential scoring would deadlock."""
    everything_made, both_begun = threading.Event(), threading.Barrier(2, timeout=60)

    class Waiting(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            if not self.calls:
                assert everything_made.wait(60)
                both_begun.wait()
            return super().__call__(images, examples)

    def chunks() -> Iterator[tuple[Tensor, Sequence[Example]]]:
        for i in range(0, 6, 2):
            yield IMAGES[i : i + 2], EXAMPLES[i : i + 2]
        everything_made.set()

    rewards = WeightedRewards([("a", 1.0, Waiting()), ("b", 0.5, Waiting()), ("c", 1.0, Flaky())])
    found = rewards.score_each(chunks())
    plain = WeightedRewards([("a", 1.0, Flaky()), ("b", 0.5, Flaky()), ("c", 1.0, Flaky())])
    expected = plain.score(IMAGES, EXAMPLES, 2)
    assert torch.equal(torch.cat([s.values for s in found]), expected.values)
    for name, values in expected.parts.items():
        assert torch.equal(torch.cat([s.parts[name] for s in found]), values)
    rewards.close()


def test_a_slow_reward_scores_in_order_one_call_at_a_time_without_gradient_and_autocast() -> None:
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
        loaded(Strict(), Scoring()).score(IMAGES.clone().requires_grad_(), EXAMPLES, 1)
    assert seen == [e.text for e in EXAMPLES]


def test_without_overlap_or_with_a_gradient_a_slow_reward_scores_in_the_calling_thread() -> None:
    threads: set[threading.Thread] = set()

    class Here(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            threads.add(threading.current_thread())
            return super().__call__(images, examples)

    loaded(Here(), Scoring(overlap=False)).score(IMAGES, EXAMPLES, 2)
    x = IMAGES.clone().requires_grad_()
    loaded(Here(), Scoring())(x, EXAMPLES).values.sum().backward()
    assert threads == {threading.main_thread()} and x.grad is not None


@pytest.mark.parametrize("slow", [True, False])
def test_messages_count_images_over_the_chunks_of_a_call(slow: bool) -> None:
    class Picky(Slow if slow else Flaky):  # type: ignore[misc]
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            if any(e.text == "prompt 5" for e in examples):
                raise ValueError("not this one")
            return images.mean((1, 2, 3))

    rewards = loaded(Picky(), Scoring())
    with pytest.raises(PluginError, match=r"failed while scoring image 5, 'prompt 5': ValueError: not this one"):
        rewards.score(IMAGES, EXAMPLES, 4)
    rewards.close()


def test_after_a_failure_a_slow_reward_does_not_score_the_rest(waits: list[float]) -> None:
    made = threading.Event()

    class Failing(Slow):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            self.calls += 1
            made.wait(60)
            raise ValueError("gone")

    def chunks() -> Iterator[tuple[Tensor, Sequence[Example]]]:
        for i in range(6):
            yield IMAGES[i : i + 1], EXAMPLES[i : i + 1]
        made.set()
        raise AlignkitError("the decoder broke")

    reward = Failing()
    rewards = loaded(reward, Scoring())
    with pytest.raises(AlignkitError, match="decoder"):
        rewards.score_each(chunks())
    rewards.close()
    assert reward.calls <= 2
