"""The regulariser `reference`: stay close to the model before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import Context, Prediction, Regulariser, Rows


@dataclass
class ReferenceDistance(Regulariser[None, Rows]):
    """Mean squared distance between the policy's predictions and those of the model before training.

    It takes every prediction of a clean latent through which the algorithm's loss has a gradient, and repeats it at the
    same latent, time, text and guidance with the model before training. The gradient of few samples is mostly noise;
    this pulls back moves that later rounds do not repeat, so that larger learning rates become possible. It needs
    neither a teacher nor images, and serves models without a distillation loss as well.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"predictions"})

    def loss(
        self, rows: Rows | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not predictions:
            ctx.warn(
                "regulariser reference: the algorithm's loss made no prediction with gradient in some updates, where "
                "this regulariser had no effect"
            )
            return torch.zeros((), device=ctx.policy.device), {}
        with ctx.policy.reference():
            before = torch.cat([ctx.policy.denoise(p.x, p.t, p.prompt, p.guidance_scale) for p in predictions])
        value = (torch.cat([p.clean for p in predictions]) - before).pow(2).mean()
        return value, {"reference_loss": value}
