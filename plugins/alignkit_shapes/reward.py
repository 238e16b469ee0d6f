"""The pixel check as a reward. It uses no network, so it shows when a policy exploits the errors of a VQA model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import Example, Reward, Scores
from alignkit.data.decode import to_uint8
from alignkit.errors import ConfigError
from alignkit_shapes.pixel_check import answers, exact, find_regions
from alignkit_shapes.scenes import COLORS, SHAPES, SIZE, Thing

_PHRASE = re.compile(rf"\b({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})\b")


def things_of(text: str) -> list[Thing]:
    """Return the things that a caption names."""
    return [Thing(shape, color) for color, shape in _PHRASE.findall(text.lower())]


@dataclass
class PixelCheck(Reward):
    """Share of attribute binding's questions that palette and outlines answer with yes, in [0, 1], without any network.

    The part `exact` is 1 if the image shows the things that the prompt names and nothing else.
    """

    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)

    def check(self, examples: Iterable[Example]) -> None:
        for example in examples:
            if not things_of(example.text):
                raise ConfigError(
                    f"pixel_check: the prompt {example.text!r} names no coloured shape of the embedded world; expected "
                    'one, such as "a red circle"; change the prompt or leave it out'
                )

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        if images.shape[-2:] != (SIZE, SIZE):
            raise ConfigError(
                f"pixel_check: found images of {images.shape[-2]} x {images.shape[-1]} pixels, expected {SIZE} x "
                f"{SIZE}, the size of the embedded world"
            )
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        binding, whole = [], []
        for image, example in zip(pixels, examples, strict=True):
            regions, things = find_regions(image), things_of(example.text)
            replies = answers(regions, things)
            binding.append(sum(replies) / len(replies))
            whole.append(float(exact(regions, things)))
        values = torch.tensor(binding, dtype=torch.float32, device=images.device)
        valid = torch.ones(len(values), dtype=torch.bool, device=images.device)
        return Scores(values, valid, {"exact": torch.tensor(whole, dtype=torch.float32, device=images.device)})
