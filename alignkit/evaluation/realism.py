"""Distances between generated images and real ones, FID and KID, without bias and with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 20
"""Groups of prompts that the jackknife leaves out, one at a time."""
FID = "fid"
KID = "kid"


def frechet_distance(generated: Tensor, real: Tensor) -> Tensor:
    """Return the distance of two Gaussians with the moments of features (N, D) and (M, D), a scalar (FID).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017). Its bias falls as 1/N.
    """
    (mean1, cov1), (mean2, cov2) = (_moments(x.double()) for x in (generated, real))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    trace = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    value: Tensor = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return value


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.T.cov()


def kernel_inception_distance(generated: Tensor, real: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of features (N, D) and (M, D), a scalar (KID).

    The kernel is (x y / D + 1)^3 (Binkowski et al. 2018). The value may be slightly negative.
    """
    x, y = generated.double(), real.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return among(x) + among(y) - 2 * kernel(x, y).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    FID: frechet_distance,
    KID: kernel_inception_distance,
}


@dataclass(frozen=True)
class Distance:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def distances(
    distance: Callable[[Tensor, Tensor], Tensor], before: Tensor, after: Tensor, real: Tensor, prompts: int
) -> tuple[Distance, Distance, Distance]:
    """Return the distance to real images before training, after it, and the change.

    `before` and `after` are features (N, D) of images, of which rows i, i + `prompts`, ... belong to prompt i; `real`
    are features (M, D). The estimates are those of a jackknife over blocks of prompts and of real images, which
    removes the bias in 1/N of FID, and their intervals its standard error times 1.96. Features are normalised by the
    spread of the real ones, so that distances are of order 1 in any network's features. Raises ValueError for fewer
    prompts or real images than `BLOCKS`.
    """
    if min(prompts, len(real)) < BLOCKS:
        raise ValueError(f"found {prompts} prompts and {len(real)} real images, expected at least {BLOCKS} of each")
    center, spread = real.mean(0), real.std(0).mean().clamp(min=1e-6)
    before, after, real = ((x - center) / spread for x in (before, after, real))
    block = (torch.arange(len(before)) % prompts) * BLOCKS // prompts
    real_block = torch.arange(len(real)) * BLOCKS // len(real)

    def estimates(keep: Tensor, keep_real: Tensor) -> Tensor:
        first, second = (distance(x[keep], real[keep_real]) for x in (before, after))
        return torch.stack([first, second, second - first])

    whole = estimates(block >= 0, real_block >= 0)
    parts = torch.stack([estimates(block != i, real_block != i) for i in range(BLOCKS)])
    values = BLOCKS * whole - (BLOCKS - 1) * parts.mean(0)
    errors = ((BLOCKS - 1) * (parts - parts.mean(0)).square().mean(0)).sqrt()
    first, second, change = (
        Distance(float(value), float(value - 1.96 * error), float(value + 1.96 * error))
        for value, error in zip(values, errors, strict=True)
    )
    return first, second, change
