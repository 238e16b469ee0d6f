from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console
from torch import Tensor

from alignkit.evaluation.measure import Measurement, compare
from alignkit.evaluation.measure import measure as evaluate
from alignkit.evaluation.statistics import bootstrap
from alignkit.evaluation.table import table
from alignkit.interfaces import Policy, Reward, Sampler
from alignkit.records import Example, Prompt, Scores, Transition
from alignkit.rewards.weighted import WeightedRewards
from alignkit.rollout import seeded_noises
from bare_policy import BarePolicy


class Toy(BarePolicy):
    """clean = x / 2 + brightness + the length of the text / 100, on latents that are themselves the image."""

    latent_shape = (3, 4, 4)
    device = torch.device("cpu")
    guidance_scale = 1.0

    def __init__(self, brightness: float = 0.0) -> None:
        self.brightness = torch.nn.Parameter(torch.tensor(brightness))

    def encode(self, texts: Sequence[str]) -> Prompt:
        return Prompt(torch.tensor([[[len(text) / 100]] for text in texts]), torch.arange(len(texts)))

    def encode_images(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        return x / 2 + self.brightness + prompt.features[:, :, :, None]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.brightness]

    def weights(self) -> dict[str, Tensor]:
        return {"brightness": self.brightness}

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = self.brightness
        self.brightness = torch.nn.Parameter(weights["brightness"])
        yield
        self.brightness = own

    @contextmanager
    def reference(self) -> Iterator[None]:
        with torch.no_grad(), self.using({"brightness": torch.tensor(0.0)}):
            yield


@dataclass
class Noisy(Sampler):
    def grid(self, policy: Policy) -> Tensor:
        return torch.linspace(1, 0, self.num_steps + 1)[:-1]

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        clean = policy.denoise(x, self.grid(policy)[k], prompt)
        return Transition(clean, torch.where(k == self.num_steps - 1, 0.0, 0.3), clean)


class Brightness(Reward):
    """The mean of the image; an example with "dark" in its metadata cannot be scored."""

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        valid = torch.tensor(["dark" not in example.metadata for example in examples])
        return Scores(images.flatten(1).mean(1), valid)


EXAMPLES = [Example("a" * (1 + number)) for number in range(7)]


REWARDS = WeightedRewards([("brightness", 2.0, Brightness())])


def measure(
    brightness: float = 0.0, steps: Sequence[int] = (1, 2, 4), size: int = 3, seed: int = 5, samples: int = 1
) -> Measurement:
    return evaluate(Toy(brightness), Noisy(), REWARDS, EXAMPLES, steps, seed, size, grid_size=4, samples=samples)


def test_a_part_that_is_given_only_before_training_is_not_compared() -> None:
    def measured(**parts: Tensor) -> Measurement:
        values = {(1, "reward"): torch.rand(6)} | {(1, name): part for name, part in parts.items()}
        return Measurement(values, torch.zeros(0, 1, 3, 4, 4, dtype=torch.uint8))

    rows = compare(measured(score=torch.rand(6), yes=torch.rand(6)), measured(score=torch.full((6,), torch.nan)))
    assert [row.reward for row in rows] == ["reward"]


def test_a_prompt_gets_the_same_noise_in_every_batch_size() -> None:
    one, other = measure(size=3), measure(size=7)
    assert one.values.keys() == other.values.keys() == {(k, n) for k in (1, 2, 4) for n in ("reward", "brightness")}
    for key, values in one.values.items():
        assert values.shape == (7,)
        torch.testing.assert_close(values, other.values[key], rtol=0, atol=1e-6)


def test_a_prompts_value_is_the_mean_over_its_samples() -> None:
    several, one = measure(samples=3, size=4), [measure(seed=seed) for seed in (5, 6, 7)]
    for key, found in several.values.items():
        assert torch.allclose(found, torch.stack([m.values[key] for m in one]).mean(0))
    assert torch.equal(several.images, one[0].images)


def test_another_seed_gives_other_noise() -> None:
    assert not torch.allclose(measure(seed=5).values[1, "reward"], measure(seed=6).values[1, "reward"])


def test_evaluation_leaves_the_global_generator_and_the_sampler_alone() -> None:
    before, sampler = torch.get_rng_state(), Noisy(num_steps=3)
    evaluate(Toy(), sampler, REWARDS, EXAMPLES, [1], 0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler.num_steps == 3


def test_one_step_gives_the_prediction_from_the_seeded_noise() -> None:
    noise = seeded_noises((3, 4, 4), 1, [(5, 2)])[:, 0]
    clean = noise / 2 + 0.03
    expected = ((clean / 2 + 0.5).clamp(0, 1) * 255).round().mean() / 255
    torch.testing.assert_close(measure().values[1, "brightness"][2], expected)
    torch.testing.assert_close(measure().values[1, "reward"][2], 2 * expected)


def test_the_first_images_are_kept_for_the_grid() -> None:
    found = measure(steps=[1, 2]).images
    assert found.shape == (4, 2, 3, 4, 4) and found.dtype == torch.uint8
    assert torch.equal(measure(steps=[1, 2], size=1).images, found)


def test_a_brighter_model_is_measured_prompt_by_prompt() -> None:
    rows = compare(measure(), measure(brightness=0.2))
    assert [(row.num_steps, row.reward) for row in rows[:2]] == [(1, "reward"), (1, "brightness")]
    for row in rows:
        assert row.count == 7
        assert row.after is not None and row.difference is not None
        assert row.difference == pytest.approx(row.after - row.before)
        assert row.low is not None and row.high is not None and 0 < row.low <= row.difference <= row.high


def test_an_image_that_cannot_be_scored_is_left_out_of_both_sides() -> None:
    examples = [*EXAMPLES[:3], Example("night", {"dark": True})]
    before, after = (evaluate(Toy(b), Noisy(), REWARDS, examples, [1], 5, 4) for b in (0.0, 0.1))
    assert math.isnan(before.values[1, "reward"][3])
    (row, _) = compare(before, after)
    assert row.count == 3
    assert row.before == pytest.approx(float(before.values[1, "reward"][:3].mean()))


def test_without_scores_there_is_no_row() -> None:
    examples = [Example("night", {"dark": True})]
    assert compare(evaluate(Toy(), Noisy(), REWARDS, examples, [1], 5, 4)) == []


def test_the_interval_of_equal_differences_is_a_point() -> None:
    before = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert bootstrap(before, before + 0.25) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_the_interval_agrees_with_the_normal_one_for_many_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(400, generator=generator)
    after = before + 0.1 + 0.2 * torch.randn(400, generator=generator)
    difference, low, high = bootstrap(before, after, samples=4000)
    half = 1.96 * float((after - before).std()) / math.sqrt(400)
    assert difference == pytest.approx(float((after - before).mean()), abs=1e-6)
    assert low == pytest.approx(difference - half, abs=0.1 * half)
    assert high == pytest.approx(difference + half, abs=0.1 * half)


def test_the_bootstrap_is_deterministic_and_leaves_the_global_rng_alone() -> None:
    before, after, state = torch.rand(9), torch.rand(9), torch.get_rng_state()
    assert bootstrap(before, after) == bootstrap(before, after)
    assert bootstrap(before, after) != bootstrap(before, after, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def printed(*measurements: Measurement, wide: bool = False) -> str:
    console = Console(width=110 if wide else 100)
    with console.capture() as capture:
        console.print(table(compare(*measurements), wide=wide))
    return capture.get()


def test_the_table_shows_every_reward_with_its_interval() -> None:
    text = printed(measure(), measure(brightness=0.2))
    row = compare(measure(), measure(brightness=0.2))[0]
    assert f"{row.before:.3f}" in text and f"{row.difference:+.3f}" in text and f"[{row.low:+.3f}, " in text
    assert text.count("brightness") == 3 and text.count("95 % interval") == 1
    means = f"{row.before:.3f} [{row.before_low:.3f}, {row.before_high:.3f}]"
    assert means not in text and means in printed(measure(), measure(brightness=0.2), wide=True)
    assert f"{row.after:.3f} [{row.after_low:.3f}, " in printed(measure(), measure(brightness=0.2), wide=True)


def test_the_table_before_training_has_no_difference() -> None:
    text = printed(measure())
    assert f"{float(measure().values[1, 'reward'].mean()):.3f}" in text
    assert "after" not in text and "interval" not in text


def test_a_total_that_equals_its_part_is_shown_once() -> None:
    plain = WeightedRewards([("brightness", 1.0, Brightness())])
    text = printed(evaluate(Toy(), Noisy(), plain, EXAMPLES, [1], 5, 4))
    assert len(text.splitlines()) == len(printed(measure(steps=[1])).splitlines()) - 1
    assert "brightness" in text
