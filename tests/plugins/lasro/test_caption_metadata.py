"""LaSRO on captioned images, ablation (b), by the gradient of the reward, (e): each image keeps its own metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alignkit.training.trainer import Trainer
from alignkit_lasro.lasro import LaSRO
from method_checks import collect


def test_two_captioned_images_of_one_text_are_scored_by_their_own_targets(
    make_trainer: Callable[..., Trainer], signs: dict[str, Any]
) -> None:
    trainer = make_trainer({
        **signs, "algorithm.gradient_of": "reward", "algorithm.states_from": "images", "regulariser": [],
        "train.rows_per_update": 6,
    })  # fmt: skip
    ctx, method = trainer.ctx, trainer.algorithm
    assert isinstance(method, LaSRO)
    captions = trainer.batch().captions
    states = collect(trainer).states
    assert states.prompt.texts == ["a sign"] * 6 and states.prompt.examples == captions
    assert sorted(caption.metadata["target"] for caption in captions) == ["EXIT"] * 3 + ["OPEN"] * 3
    wanted = torch.tensor([1.0 if caption.metadata["target"] == "OPEN" else -1.0 for caption in captions])
    clean = states.clean.detach().requires_grad_()
    scores = method.score(clean, states, ctx)
    expected = wanted * ctx.policy.decode(clean).mean((1, 2, 3))
    torch.testing.assert_close(scores, expected, atol=3e-3, rtol=0)  # of 8-bit images
    found, along = (torch.autograd.grad(x.sum(), clean)[0].flatten(1) for x in (scores, expected))
    assert bool((torch.cosine_similarity(found, along) > 0.99).all())
