"""Methods that learn from pairs of which one is preferred, one file each."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "diffusion_dpo",
        "alignkit_preference.diffusion_dpo:DiffusionDPO",
        "Direct preference optimisation on pairs of images, offline; needs no reward",
    )
    register(
        "pso",
        "alignkit_preference.pso:PSO",
        "Pairwise sample optimisation of distilled models, on own samples with any reward or on pairs of images",
    )
    register(
        "d3po",
        "alignkit_preference.d3po:D3PO",
        "Prefer each step of the better of two trajectories, as direct preference optimisation; any black-box reward",
    )
    register(
        "rebel",
        "alignkit_preference.rebel:REBEL",
        "Regress the difference of two log-likelihood ratios to that of rewards; any black-box reward",
    )
