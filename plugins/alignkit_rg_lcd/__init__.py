"""RG-LCD: latent consistency distillation that also follows a reward, directly or through a latent proxy of it."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "rg_lcd",
        "alignkit_rg_lcd.algorithm:RGLCD",
        "Reward-guided latent consistency distillation: a differentiable reward, or any through a latent proxy",
    )


@hookimpl
def register_surrogates(register: Register) -> None:
    register(
        "lrm",
        "alignkit_rg_lcd.surrogate:LRM",
        "Latent proxy reward model: a CLIP that reads latents instead of pixels",
    )
