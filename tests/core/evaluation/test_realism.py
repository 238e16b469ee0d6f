"""FID and KID: against formulas, without bias, with intervals that hold the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignkit.evaluation.realism import distances, frechet_distance, kernel_inception_distance


def normal(count: int, seed: int, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    x = normal(50, 0)
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    # Equal covariances I and diag(4, 1, 1, 1): (2 - 1)^2, and |(3, 0, 0, 0)|^2 for the means.
    other = white * torch.tensor([2.0, 1, 1, 1]) + torch.tensor([3.0, 0, 0, 0])
    assert float(frechet_distance(white, other)) == pytest.approx(1 + 9)
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_leaves_out_pairs_of_an_image_with_itself() -> None:
    x, y = normal(5, 0), normal(6, 1) + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within = [sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) for s in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y)
    expected = within[0] / (5 * 4) + within[1] / (6 * 5) - 2 * across / (5 * 6)
    assert float(kernel_inception_distance(x, y)) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_inception_distance])
def test_images_like_the_real_ones_are_at_distance_0_however_few(distance: object) -> None:
    assert callable(distance)
    found = [
        distances(distance, *(normal(60, 2 * i) + shift for shift in (0, 1)), normal(80, 2 * i + 1), 60)
        for i in range(8)
    ]
    firsts = torch.tensor([first.value for first, _, _ in found])
    # The plain estimate of FID is biased by as much as 0.3 here.
    assert abs(float(firsts.mean())) < 0.06
    assert sum(first.low <= 0 <= first.high for first, _, _ in found) >= 6
    assert all(change.low > 0 and first.value < second.value for first, second, change in found)


def test_images_of_a_prompt_stay_together_and_too_few_prompts_are_refused() -> None:
    x = normal(30, 0)
    three = torch.cat([x, x, x])  # three equal images of each prompt
    one = distances(kernel_inception_distance, three, three + 1, normal(40, 1), 30)[2]
    wrong = distances(kernel_inception_distance, three, three + 1, normal(40, 1), 90)[2]
    assert one.high - one.low > wrong.high - wrong.low
    with pytest.raises(ValueError, match="found 10 prompts and 40 real images, expected at least 20"):
        distances(frechet_distance, x[:10], x[:10], normal(40, 1), 10)
