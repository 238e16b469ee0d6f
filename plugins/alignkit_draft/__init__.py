"""DRaFT: the gradient of the reward itself, through the decoder and the last steps of the sampler."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "draft",
        "alignkit_draft.draft:DRaFT",
        "Gradient of a differentiable reward through the last sampler steps (DRaFT-K, DRaFT-LV)",
    )
