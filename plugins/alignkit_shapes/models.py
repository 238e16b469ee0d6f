"""The embedded models, with the run settings that suit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit import ModelBundle

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"
WIDE = ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
"""Layers of a LoRA that covers convolutions as well as attention."""

MEASURED = 136
"""Held-out prompts that a run is measured on; the other 64 choose the weights that it exports."""

_data: dict[str, Any] = {
    "data": {
        "prompts": str(FOLDER / "prompts" / "train.txt"),
        "images": "alignkit_shapes.data:Drawings",
        "pairs": "alignkit_shapes.data:DrawingPairs",
    },
    "evaluate": {"prompts": str(FOLDER / "prompts" / "held_out.txt"), "rewards": ["pixel_check"]},
    "reward": [{"name": "attribute_binding", "judge": str(WEIGHTS / "judge")}],
}
# Hard answers have no gradient.
_soft: dict[str, Any] = {"reward": [{"name": "attribute_binding", "mode": "soft"}]}
# Captions name spatial relations such as "left of", so drawings are not mirrored.
_unflipped: dict[str, Any] = {"algorithm": {"flip": False}}


def _sampler(name: str, num_steps: int, read_at: list[int], **fields: Any) -> dict[str, Any]:
    """Return the settings of the training sampler, and the numbers of steps to evaluate at."""
    return {"sampler": {"name": name, "num_steps": num_steps, **fields}, "evaluate": {"steps": read_at}}


def _likelihoods(sampler: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the defaults of the methods that train on the likelihood of steps, with this sampler."""
    # The papers use few prompts, which recur. Here a reward is normalised by the four that its prompt gets in a round.
    own = {"min_count": 4}
    # The papers' clip ranges are for latents of 16384 numbers; with 256 numbers the mean varies eight times as much.
    clip = {"algorithm": {"clip_range": 1e-3, **own}}
    clipped = sampler | clip
    rebel = sampler | {"algorithm": own}
    return {"ddpo": clipped, "sdpo": clipped, "rebel": rebel, "d3po": sampler, "pso": sampler}


def _draft(sampler: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of DRaFT with this sampler."""
    # With gradients of one length and the pull to the model before training the learning rate can be high; it falls, so
    # that the noise of single updates averages out in the end.
    return {
        **_soft,
        "data": {"batch_size": 24},
        "algorithm": {"every_step": True, "unit_gradients": True},
        "regulariser": [{"name": "reference", "weight": 4.0}],
        "model": {"lora_targets": WIDE},
        "train": {
            "updates": 240, "rows_per_update": 48, "rows_per_pass": 48, "learning_rate": 1e-3, "schedule": "linear",
            "ema_decay": 0.9, "checkpoint_every": 40,
        },
        **sampler,
        "evaluate": {"every": 0, "limit": MEASURED, "samples": 3, **sampler["evaluate"]},
    }  # fmt: skip


def _hybrid(sampler: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the hybrid gradient with this sampler: DRaFT's, with groups of eight samples."""
    draft = _draft(sampler)
    return {
        **draft,
        "data": {"batch_size": 6},
        "algorithm": {"clip_range": 1e-3},  # as for the likelihoods of other methods
        # The reward counts in standard deviations of a group, which are about an eighth.
        "regulariser": [{"name": "reference", "weight": 8.0}],
        "train": {**draft["train"], "learning_rate": 4e-4, "schedule": "constant", "ema_decay": 0.95},
    }


# The UNet has two down blocks. Without pooling its maps, of 4 x 4 and 8 x 8, are as large as the pooled ones of
# SDXL-Turbo.
_drpo_features: dict[str, Any] = {"layers": ["down_blocks.0", "mid_block", "up_blocks.0"], "pool": 1}


def _drpo(num_steps: int, **train: Any) -> dict[str, Any]:
    """Return the settings of DrPO at this number of steps: each round, 6 prompts of 16 samples, is one update."""
    return {
        "data": {"batch_size": 6},
        "algorithm": _drpo_features,
        "model": {"lora_targets": WIDE},
        "train": {"rows_per_update": 6 * 16 * num_steps, "rows_per_pass": 48, "ema_decay": 0.95, **train},
    }


def shapes_lcm() -> ModelBundle:
    """Return the bundle of the few-step model, with the guidance scales that it was distilled with."""
    guidance = {"guidance_scale_min": 2.0, "guidance_scale_max": 4.0}
    # The paper's settings, with fewer samples and prompts in a round, since a round here takes seconds.
    lasro = {
        "data": {"batch_size": 8},
        "algorithm": {"samples": 6},
        "surrogate": {"name": "latent_unet", "warmup": 200},
        "train": {"learning_rate": 2e-4},
        "evaluate": {"every": 0, "limit": MEASURED, "samples": 3, "steps": [1, 2]},
    }
    rg_lcd = {
        "algorithm": guidance,
        **_soft,
        # The proxy's default is a tower for latents of 64 x 64; these are 8 x 8.
        "surrogate": {"name": "lrm", "patch": 1, "width": 128, "layers": 4, "heads": 4, "latent_groups": 3},
    }
    return ModelBundle(
        path=str(WEIGHTS / "shapes_lcm"),
        teacher=str(WEIGHTS / "shapes_teacher"),
        defaults={
            "model": {"guidance_scale": 3.0},
            "sampler": {"name": "lcm", "num_steps": 2},
            "regulariser": {"lcd": guidance},
            **_data,
        },
        algorithm_defaults={
            "lasro": lasro,
            "draft": _draft(_sampler("lcm", 2, [1, 2])),
            "hybrid": _hybrid(_sampler("lcm", 2, [1, 2])),
            "hybrid/attribute_binding": {"surrogate": {"init": str(WEIGHTS / "surrogate.safetensors"), "warmup": 0}},
            "lcd": {"algorithm": guidance},
            "rg_lcd": rg_lcd,
            "gors_lcm": {"algorithm": guidance},
            "drpo": _drpo(2, updates=30, learning_rate=1e-4),
            **_likelihoods(_sampler("lcm", 4, [1, 2, 4])),
            "diffusion_dpo": _unflipped,
        },
        recipes={"lasro": "lasro_shapes_any_reward", "lasro/attribute_binding": "lasro_shapes"},
    )


def shapes_turbo() -> ModelBundle:
    """Return the bundle of the few-step model that works like SD-Turbo.

    It is the teacher with a LoRA that makes it predict the noise in 1 to 8 trailing steps without guidance.
    """
    on_grid = {"algorithm": {**_unflipped["algorithm"], "grid_steps": 4, "zero_terminal_snr": True}}
    return ModelBundle(
        path=str(WEIGHTS / "shapes_teacher"),
        defaults={
            "model": {"adapter": str(WEIGHTS / "shapes_turbo"), "prediction": "epsilon", "guidance_scale": 1.0},
            "sampler": {"name": "euler_ancestral", "num_steps": 4, "eta": 0.0},
            **_data,
        },
        algorithm_defaults={
            **_likelihoods(_sampler("ddim", 8, [1, 2, 4, 8], eta=1.0)),
            "pso": _sampler("euler_ancestral", 4, [1, 2, 4], eta=1.0),
            "lasro": {
                **_sampler("renoise", 2, [1, 2, 4]),
                # Stage 1, as on `shapes_lcm`.
                "data": {"batch_size": 8},
                "algorithm": {"samples": 6},
                "surrogate": {"name": "latent_unet", "warmup": 200},
                "regulariser": [],
                "train": {"learning_rate": 3e-5},  # as in the bundles of other models that were distilled like this
            },
            "draft": _draft(_sampler("renoise", 2, [1, 2, 4])),
            "hybrid": _hybrid(_sampler("renoise", 2, [1, 2, 4])),
            "drpo": {
                **_sampler("renoise", 1, [1, 2]),
                **_drpo(1, updates=90, learning_rate=2e-4),
                # It takes back moves that other rounds do not repeat: DrPO's field never fades, and is mostly noise.
                "regulariser": [{"name": "reference", "weight": 1.0}],
            },
            "diffusion_dpo": on_grid,
        },
    )


def shapes_teacher() -> ModelBundle:
    """Return the bundle of the many-step model."""
    return ModelBundle(
        path=str(WEIGHTS / "shapes_teacher"),
        defaults={
            "model": {"guidance_scale": 3.0},
            "sampler": {"name": "ddim", "num_steps": 25, "eta": 0.0},
            **_data,
            "evaluate": {**_data["evaluate"], "steps": [25]},
        },
        algorithm_defaults={
            **_likelihoods(_sampler("ddim", 25, [25], eta=1.0)),
            "draft": _soft,
            "drpo": {"algorithm": _drpo_features},
            "hybrid": _soft | _sampler("ddim", 25, [25], eta=1.0),
            "diffusion_dpo": _unflipped,
        },
    )
