"""DDPO: policy gradient over the steps of a sampler; on the latent consistency sampler it is RLCM."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "ddpo",
        "alignkit_ddpo.algorithm:DDPO",
        "Clipped policy gradient over stochastic steps; any black-box reward (RLCM on the lcm sampler)",
    )
