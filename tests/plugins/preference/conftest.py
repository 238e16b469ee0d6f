"""What the tests of preference methods share: pairs of bright and dark images, trainers on the tiny pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from alignkit.training.trainer import Trainer


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Eight pairs of noisy images, of which the brighter one is preferred."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(8):
        names = {"winner": f"{number}_w.png", "loser": f"{number}_l.png"}
        for name, brightness in zip(names.values(), (190, 65), strict=True):
            pixels = brightness + torch.randint(-60, 60, (64, 64, 3), generator=generator)
            Image.fromarray(pixels.byte().numpy()).save(folder / name)
        lines.append(json.dumps({"text": f"{('a red circle', 'a blue square')[number % 2]}", **names}))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def make(
    make_trainer: Callable[..., Trainer], tiny_teacher: Path, pair_folder: Path, odd_rewards: None
) -> Callable[..., Trainer]:
    """A trainer on the consistency model, or with `ddim=True` on its teacher, which predicts the noise."""

    def build(name: str, overrides: dict[str, Any] | None = None, ddim: bool = False) -> Trainer:
        settings: dict[str, Any] = {"algorithm.name": name, "data.pairs": str(pair_folder), "train.rows_per_update": 8}
        if ddim:
            settings |= {
                "model.name": str(tiny_teacher), "sampler.name": "ddim", "sampler.eta": 1.0, "sampler.num_steps": 3,
                "evaluate.steps": [3],
            }  # fmt: skip
        return make_trainer(settings | (overrides or {}))

    return build


@pytest.fixture
def seen() -> Callable[[Tensor], Tensor]:
    """Latents in which the brightness of an image shows; to the untrained encoder all images look much alike."""

    def encode(images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, 8)
        return 4 * torch.cat([small, small[:, :1]], 1) - 2

    return encode
