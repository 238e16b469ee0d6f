"""LaSRO: a learned latent-space surrogate of the reward, followed by its gradient."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "lasro",
        "alignkit_lasro.additions:ExtendedLaSRO",
        "Learned latent surrogate reward, followed by its gradient; any black-box reward",
    )


@hookimpl
def register_surrogates(register: Register) -> None:
    register(
        "latent_unet",
        "alignkit_lasro.surrogate:LatentUNet",
        "Down and mid blocks of a latent UNet with a convolutional head",
    )
    register(
        "latent_clip",
        "alignkit_lasro.vision_language:LatentCLIP",
        "A CLIP that reads latents instead of pixels, all of it trained on pairs",
    )
    register(
        "latent_blip",
        "alignkit_lasro.vision_language:LatentBLIP",
        "A BLIP that reads latents instead of pixels, whose text encoder attends to them",
    )
