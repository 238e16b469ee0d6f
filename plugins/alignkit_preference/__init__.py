"""Methods that learn from pairs of which one is preferred, one file each."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "diffusion_dpo",
        "alignkit_preference.diffusion_dpo:DiffusionDPO",
        "Direct preference optimisation on pairs of images, offline; no reward is asked",
    )
    register(
        "pso",
        "alignkit_preference.pso:PSO",
        "Pairwise sample optimisation of distilled models, on own samples with any reward or on pairs of images",
    )
