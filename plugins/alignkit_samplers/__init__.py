"""Samplers: the steps from noise to an image."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_samplers(register: Register) -> None:
    register(
        "lcm",
        "alignkit_samplers.lcm:LCM",
        "Predict the clean latent, noise it again to the next level (latent consistency)",
    )
    register("ddim", "alignkit_samplers.ddim:DDIM", "DDIM with eta; eta = 1 makes every step stochastic")
    register(
        "euler_ancestral",
        "alignkit_samplers.euler_ancestral:EulerAncestral",
        "Euler's method with ancestral noise (SDXL-Turbo); eta = 0 is plain Euler (SD-Turbo, SDXL-Lightning)",
    )
    register(
        "renoise",
        "alignkit_samplers.renoise:Renoise",
        "Predict the clean latent, noise it again to the next level, for distilled models that are no LCM",
    )
