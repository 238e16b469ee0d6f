"""The gradient of the reward itself: DRaFT, and its mixture with a policy gradient."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "draft",
        "alignkit_draft.draft:DRaFT",
        "Gradient of a differentiable reward through the last sampler steps (DRaFT-K, DRaFT-LV)",
    )
    register(
        "hybrid",
        "alignkit_draft.hybrid:Hybrid",
        "Policy gradient on the stochastic steps, the gradient of the reward or of a surrogate on the last",
    )
