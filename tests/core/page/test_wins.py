from __future__ import annotations

import pytest

from alignkit.page.record import read_record
from alignkit.page.wins import win_rates
from page_fixtures import SETTINGS, Write

PROMPTS = [f"prompt {number}" for number in range(10)]


def test_each_run_is_compared_with_its_model_before_training(write_run: Write) -> None:
    found = win_rates([read_record(write_run(prompts=PROMPTS))])
    # The score of the first of ten prompts rises, those of the others fall; the held-out reward never changes.
    assert [(rate.second, rate.reward, rate.num_steps, rate.count) for rate in found] == [
        ("before training", "shine", 1, 10), ("before training", "shine", 2, 10),
        ("before training", "pixels", 1, 10), ("before training", "pixels", 2, 10),
    ]  # fmt: skip
    assert [rate.rate for rate in found] == pytest.approx([0.1, 0.1, 0.5, 0.5])
    # Wilson's interval of 1 and of 5 of 10.
    assert (found[0].low, found[0].high) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert (found[2].low, found[2].high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_two_runs_are_compared_on_their_common_prompts(write_run: Write) -> None:
    one = read_record(write_run("one", prompts=PROMPTS))
    two = read_record(write_run("two", prompts=[*PROMPTS[:4], "another"], updates=20))
    found = {(r.first, r.second, r.reward): r for r in win_rates([one, two]) if r.num_steps == 1}
    assert found["one", "two", "shine"].count == 4
    assert found["one", "two", "shine"].rate == pytest.approx(0.25)
    assert ("one", "one before training", "shine") in found


def test_the_sum_counts_if_both_train_the_same_rewards_and_it_is_more_than_one_of_them(write_run: Write) -> None:
    def rewards(name: str, settings: str) -> set[str]:
        record = read_record(write_run(name, settings=settings))
        for point in record.points.values():
            for image in point.images.values():
                image.scores["pixels"] = 0.0  # type: ignore[index]
                image.scores["reward"] += 0.1  # type: ignore[index]
        other = read_record(write_run(f"{name}2"))
        return {rate.reward for rate in win_rates([record, other]) if rate.second == other.name}

    assert rewards("same", SETTINGS) == {"reward", "shine", "pixels"}
    assert rewards("different", SETTINGS.replace("shine", "gloss")) == {"shine", "pixels"}


def test_a_run_without_points_has_no_win_rate(write_run: Write) -> None:
    assert win_rates([read_record(write_run(prompts=()))]) == []
