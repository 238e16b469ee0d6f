"""RG-LCD on two captioned images of one text: expert and gradient of the reward have the metadata of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignkit.data.images import ImageSet
from alignkit.training.trainer import Trainer
from alignkit_rg_lcd.algorithm import RGLCD, Compared
from method_checks import collect, updates

MakeTrainer = Callable[..., Trainer]

SETTINGS: dict[str, Any] = {"algorithm.name": "rg_lcd", "train.rows_per_update": 6}
PROXY: dict[str, Any] = {
    **SETTINGS, "algorithm.proxy": True, "algorithm.proxy_rows": 6, "surrogate.patch": 2, "surrogate.width": 16,
    "surrogate.layers": 3, "surrogate.heads": 2,
}  # fmt: skip
SIGNS = {"OPEN": 1, "EXIT": -1}


def target_of(trainer: Trainer, latent: Tensor) -> str:
    """Return the target of the captioned image with this latent, as its file states it."""
    images, policy = trainer._images, trainer.ctx.policy
    assert isinstance(images, ImageSet)
    found = [images.load(index) for index in range(len(images))]
    encoded = policy.encode_images(torch.stack([image for image, _ in found]))
    (place,) = [i for i, z in enumerate(encoded) if torch.allclose(z, latent, atol=1e-5)]
    target: str = found[place][1].metadata["target"]
    return target


def test_the_expert_has_the_metadata_of_each_image(make_trainer: MakeTrainer, signs: dict[str, Any]) -> None:
    trainer = make_trainer(PROXY | signs)
    rows = collect(trainer).lesson
    assert isinstance(rows, Compared) and set(rows.prompt.texts) == {"a sign"}
    wanted = torch.tensor([SIGNS[target_of(trainer, z)] for z in rows.latents[:, 0]])
    assert sorted(wanted.tolist()) == [-1] * 3 + [1] * 3
    for place in range(3):
        expected = wanted * trainer.ctx.policy.decode(rows.latents[:, place]).mean((1, 2, 3))
        assert torch.allclose(rows.expert[:, place], expected, atol=3e-3)  # of 8-bit images


def test_the_gradient_of_the_reward_has_the_metadata_of_each_image(
    make_trainer: MakeTrainer, signs: dict[str, Any]
) -> None:
    trainer = make_trainer(SETTINGS | signs)
    method, ctx, (rows,) = trainer.algorithm, trainer.ctx, updates(trainer)
    assert isinstance(method, RGLCD) and set(rows.prompt.texts) == {"a sign"}
    wanted = torch.tensor([SIGNS[target_of(trainer, z)] for z in rows.latents])
    assert sorted(wanted.tolist()) == [-1] * 3 + [1] * 3
    prediction, target = (z.detach().requires_grad_() for z in method._predict(rows, ctx))
    method._predict = lambda rows, ctx: (prediction, target)  # type: ignore[method-assign]
    _, metrics = method.loss(rows, ctx)
    expected = -(wanted * ctx.policy.decode(prediction).mean((1, 2, 3))).mean()
    torch.testing.assert_close(metrics["reward_loss"], expected, atol=3e-3, rtol=0)  # of 8-bit images
    found, along = (torch.autograd.grad(x, prediction)[0].flatten(1) for x in (metrics["reward_loss"], expected))
    assert bool((torch.cosine_similarity(found, along) > 0.99).all())
