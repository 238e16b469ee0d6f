"""Published models by name, with the run settings that suit them, and the policy that loads diffusers pipelines.

Nothing is downloaded before a run loads a model.
"""

from __future__ import annotations

from alignkit import Register, hookimpl

MODELS = {
    "sd_turbo": "SD-Turbo, 512 px, 1 to 4 steps",
    "sdxl_turbo": "SDXL-Turbo, 512 px, 1 to 4 steps",
    "sdxl_lightning": "SDXL-Lightning, the UNet of 4 steps, 1024 px",
    "lcm_dreamshaper": "LCM Dreamshaper v7, 768 px, guidance embedded, 1 to 8 steps",
    "sdxl_lcm": "LCM of SDXL, 1024 px, guidance embedded, 1 to 8 steps",
    "ssd_1b_lcm": "LCM of SSD-1B, 1024 px, guidance embedded, 1 to 8 steps",
    "sd_1_5_lcm_lora": "Stable Diffusion 1.5 with LCM-LoRA, 512 px, 2 to 8 steps",
    "sdxl_lcm_lora": "SDXL with LCM-LoRA, 1024 px, 2 to 8 steps",
    "sd_1_5": "Stable Diffusion 1.5, 512 px, many steps",
    "sdxl": "SDXL base 1.0, 1024 px, many steps",
}


@hookimpl
def register_models(register: Register) -> None:
    for name, summary in MODELS.items():
        register(name, f"alignkit_models.models:{name}", summary)


@hookimpl
def register_policies(register: Register) -> None:
    register(
        "diffusers",
        "alignkit.models.diffusers_policy:DiffusersPolicy",
        "Diffusers pipelines with a UNet: Stable Diffusion, SDXL, and what was distilled from them",
    )
