"""The embedded models, with the run settings that suit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.interfaces import ModelBundle

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"

_data: dict[str, Any] = {
    "data": {"prompts": str(FOLDER / "prompts" / "train.txt"), "pictures": "alignkit_shapes.data:Drawings"},
    "evaluate": {"prompts": str(FOLDER / "prompts" / "held_out.txt"), "rewards": ["shapes_reading"]},
    "reward": [{"name": "attribute_binding", "judge": str(WEIGHTS / "judge")}],
}


def shapes_lcm() -> ModelBundle:
    """The few-step model; guidance as it was distilled with."""
    guidance = {"w_min": 1.0, "w_max": 3.0}
    lasro = {
        "data": {"batch_size": 4},
        "algorithm": {
            **guidance,
            "samples": 6,
            "reference_samples": 2,
            "surrogate_steps": 3,
            "smoothing": 0.4,  # the shipped surrogate was taught with it
            "distillation_weight": 2.0,
        },
        "surrogate": {"init": str(WEIGHTS / "surrogate.safetensors")},
        "train": {"updates": 60, "checkpoint_every": 20, "ema_decay": 0.95},
        "evaluate": {"every": 30, "limit": 200, "steps": [1, 2]},
    }
    rg_lcd = {
        "algorithm": guidance,
        # Hard answers have no gradient. The proxy's own default is a tower for latents of 64 x 64; here they are 8 x 8.
        "reward": [{"name": "attribute_binding", "mode": "soft"}],
        "surrogate": {"name": "lrm", "patch": 1, "width": 128, "layers": 4, "heads": 4, "latent_groups": 3},
    }
    return ModelBundle(
        path=str(WEIGHTS / "shapes_lcm"),
        teacher=str(WEIGHTS / "shapes_teacher"),
        defaults={"model": {"guidance": 2.0}, "sampler": {"name": "lcm", "num_steps": 2}, **_data},
        algorithm_defaults={
            "lasro": lasro,
            "lcd": {"algorithm": guidance},
            "rg_lcd": rg_lcd,
            "gors_lcm": {"algorithm": guidance},
            "pso": {"algorithm": guidance},
            # Captions say what stands left of what.
            "diffusion_dpo": {"algorithm": {"flip": False}},
        },
    )


def shapes_teacher() -> ModelBundle:
    """The many-step model."""
    return ModelBundle(
        path=str(WEIGHTS / "shapes_teacher"),
        defaults={
            "model": {"guidance": 2.0},
            "sampler": {"name": "ddim", "num_steps": 25, "eta": 0.0},
            **_data,
            "evaluate": {**_data["evaluate"], "steps": [25]},
        },
    )
