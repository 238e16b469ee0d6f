"""The kernel distance between the features of two sets of images."""

from __future__ import annotations

import pytest
import torch

from alignkit.evaluation.statistics import kernel_distance


def normal(count: int, seed: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_it_equals_the_sum_over_all_pairs_of_different_rows() -> None:
    x, y = normal(5, 0), normal(5, 1)
    spread = (x.double() - x.double().mean(0)).square().mean().sqrt()
    a, b = ((v.double() - x.double().mean(0)) / spread for v in (x, y))

    def kernel(u: torch.Tensor, v: torch.Tensor) -> float:
        return float((u @ v / 6 + 1) ** 3)

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(
        kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i]) for i, j in pairs
    ) / len(pairs)
    assert kernel_distance(x, y)[0] == pytest.approx(expected)


def test_equal_images_have_no_distance() -> None:
    x = normal(30, 0)
    assert kernel_distance(x, x) == pytest.approx((0, 0, 0), abs=1e-9)


def test_equal_distributions_have_a_distance_near_zero_and_others_a_large_one() -> None:
    x = normal(300, 0)
    same, low, high = kernel_distance(x, normal(300, 1))
    assert low < same < high and abs(same) < 0.05
    moved, low, high = kernel_distance(x, normal(300, 2) + 1)
    assert low > 0.2 and low < moved < high


def test_prompts_are_resampled_with_all_of_their_images() -> None:
    # The change depends on the prompt, so three images of each add little information: repeated samples show it.
    def sets(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.cat([normal(40, 3 * seed + i) for i in range(3)])
        return before, before + (0.5 * normal(40, 1000 + seed) + 0.5).repeat(3, 1)

    found = torch.tensor([kernel_distance(*sets(seed), prompts=40, samples=100) for seed in range(30)])
    errors = (found[:, 2] - found[:, 1]) / 3.92
    assert 0.7 < float(errors.mean() / found[:, 0].std()) < 1.4
    rows = torch.tensor([kernel_distance(*sets(seed), samples=100) for seed in range(5)])
    assert float(((rows[:, 2] - rows[:, 1]) / 3.92 / errors[:5]).mean()) < 0.85


def test_images_of_one_prompt_are_not_paired() -> None:
    x, y = normal(3, 0), normal(3, 1)
    # Rows that are the same image twice add nothing.
    assert kernel_distance(x.repeat(2, 1), y.repeat(2, 1), prompts=3)[0] == pytest.approx(kernel_distance(x, y)[0])
    with pytest.raises(ValueError, match="of 4 prompts"):
        kernel_distance(x, y, prompts=4)


def test_offset_and_scale_of_the_features_do_not_matter() -> None:
    x, y = normal(40, 0), normal(40, 1) + 0.5
    assert kernel_distance(7 * x + torch.arange(6.0), 7 * y + torch.arange(6.0)) == pytest.approx(
        kernel_distance(x, y), rel=1e-4
    )


def test_it_is_deterministic_and_leaves_the_global_rng_alone() -> None:
    state = torch.get_rng_state()
    assert kernel_distance(normal(9, 0), normal(9, 1)) == kernel_distance(normal(9, 0), normal(9, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="two prompts"):
        kernel_distance(normal(1, 0), normal(1, 1))
