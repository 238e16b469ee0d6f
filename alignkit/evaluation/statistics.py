"""Statistics of an evaluation: the distance between two sets of images, and bootstrap intervals of means."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_distance(
    first: Tensor, second: Tensor, prompts: int = 0, samples: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """Return the squared maximum mean discrepancy between features (N, D) of two sets, and its 95 % interval.

    Row i of both sets belongs to the same prompt and noise. Rows i, i + `prompts`, i + 2 `prompts`, ... belong to the
    same prompt; with `prompts` = 0 every row has its own. Pairs of one prompt are left out of every term, so the
    estimate has mean 0 if nothing changed (the U-statistic of Gretton et al. 2012, Lemma 6) and may be slightly
    negative. The interval is a bootstrap over prompts, with all of their images. The kernel is that of KID,
    (x y / D + 1)^3 (Binkowski et al. 2018), on features centred by the mean of the first set and normalised by its
    standard deviation over all D. Raises ValueError for fewer than two prompts.
    """
    prompts = prompts or len(first)
    if prompts < 2 or first.shape != second.shape or len(first) % prompts:
        raise ValueError(
            f"kernel_distance: found {tuple(first.shape)} and {tuple(second.shape)} of {prompts} prompts, expected the "
            "same shape, with equally many rows for each of at least two prompts"
        )
    center = first.double().mean(0)
    scale = (first.double() - center).square().mean().sqrt().clamp(min=1e-6)
    x, y = (first.double() - center) / scale, (second.double() - center) / scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    cross = kernel(x, y)
    terms = (kernel(x, x) + kernel(y, y) - cross - cross.T).view(-1, prompts, len(x) // prompts, prompts).mean((0, 2))
    generator = torch.Generator().manual_seed(seed)
    resampled = [torch.arange(prompts)]
    resampled += [torch.randint(prompts, (prompts,), generator=generator) for _ in range(samples)]
    means = []
    for rows in resampled:
        other = rows[:, None] != rows[None, :]  # a prompt that was sampled twice is not paired with itself
        means.append((terms[rows][:, rows] * other).sum() / other.sum().clamp(min=1))
    low, high = torch.stack(means[1:]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(means[0]), low, high


def bootstrap(before: Tensor, after: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of after - before (P,) and its 95 % interval, from prompts resampled with replacement.

    The bootstrap is paired: the two values of a prompt stay together, so differences in difficulty cancel.
    """
    return interval(after.double() - before.double(), samples, seed)


def interval(values: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of `values` (P,) and its 95 % interval: percentiles of the means of resampled values."""
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values.double()[resampled].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().mean()), low, high
