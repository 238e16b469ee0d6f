"""The bundles. Each setting is that of the paper or code named next to it; settings that no source states keep the
defaults of the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from alignkit import ModelBundle

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

Settings = dict[str, Any]

# These cost memory alone, and are cautious: raise them on large devices.
_of_512: Settings = {"train": {"rows_per_pass": 8}, "evaluate": {"batch_size": 8}}
_of_1024: Settings = {"train": {"rows_per_pass": 2}, "evaluate": {"batch_size": 2}}


def _with(*layers: Settings) -> Settings:
    """Merge the sections of all layers; later ones win, key by key, a list or a named sampler as a whole."""
    merged: Settings = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, list):
                merged[section] = values
            else:
                merged[section] = {**({} if "name" in values else merged.get(section, {})), **values}
    return merged


def _sampler(name: str, num_steps: int, **fields: Any) -> Settings:
    return {"sampler": {"name": name, "num_steps": num_steps, **fields}}


def _train(learning_rate: float, weight_decay: float = 0.0, **fields: Any) -> Settings:
    return {"train": {"learning_rate": learning_rate, "weight_decay": weight_decay, **fields}}


def _round(prompts: int, rows: int, updates: int = 0, **fields: Any) -> Settings:
    """Return prompts of a round, rows of an update and fields of the method; with `updates`, also the run's length,
    with ten checkpoints and ten evaluations."""
    tenth: Settings = {}
    if updates:
        tenth = {"train": {"updates": updates, "checkpoint_every": updates // 10}}
        tenth["evaluate"] = {"every": updates // 10}
    return _with({"data": {"batch_size": prompts}, "train": {"rows_per_update": rows}, "algorithm": fields}, tenth)


# Methods

# LaSRO (2411.15247) trains two steps; a model that was distilled by a discriminator has no distillation loss, and is
# noised again in full so that y depends on the policy through its clean latent alone. The paper states that the
# learning rate is smaller then, but not by how much.
# Algorithm 1 comes before Algorithm 2. The paper trains the surrogate of Image Reward for 30 000 updates, and goes on
# from there for 2000 more for attribute binding; `surrogate.init` skips it.
_stage_1: Settings = {"surrogate": {"warmup": 2000}}
_lasro_lcm = _with(_sampler("lcm", 2), _stage_1)
_lasro_turbo_loss: Settings = _with(_stage_1, {"regulariser": [], "train": {"learning_rate": 3e-5}})
_lasro_turbo = _with(_sampler("renoise", 2), _lasro_turbo_loss)
_vega: Settings = {"surrogate": {"name": "latent_unet", "backbone": "segmind/Segmind-Vega"}}
# The policy-gradient methods of RLCM (2404.03673, its code for the aesthetic reward): 8 steps, Adam without decay, LoRA
# of rank 8. A round of 8 prompts (on each GPU; the number of GPUs is not stated) is one update: for each prompt a
# trajectory with 7 stochastic steps, or a pair of trajectories. DDPO clips advantages at 10; REBEL clips no gradient.
_rlcm = _with(
    _sampler("lcm", 8), _train(1e-4, max_grad_norm=5.0), {"model": {"lora_rank": 8}},
    {"evaluate": {"steps": [1, 2, 4, 8]}},
)  # fmt: skip
_rlcm_ddpo = _with(_rlcm, _round(8, 8 * 7, updates=1000, samples=1, advantage_clip=10.0))
# For the rewards of file size: 4 prompts, all of them in one update.
_rlcm_size: Settings = {
    "data": {"batch_size": 4},
    "train": {"rows_per_update": 4 * 7},
    "algorithm": {"buffer_size": 16},
}
_unclipped: Settings = {"train": {"max_grad_norm": float("inf")}}
_rlcm_rebel = _with(_rlcm, _round(8, 8, updates=1000, pairs=1), _unclipped)
# SDPO on consistency models (2411.11727, 4.4) has RLCM's sampler and REBEL's rates and batches.
_rlcm_sdpo = _with(_rlcm, _round(8, 8, pairs=1), _unclipped)
# SDPO (2411.11727, Table 2 and its code, for the aesthetic reward) trains 50 steps and is evaluated at few, like the
# methods it is compared with. 128 pairs a round, in two updates of each step.
_of_50_steps = _with(
    _sampler("ddim", 50, eta=1.0), _train(1e-4, 1e-4), {"model": {"lora_rank": 4}},
    {"evaluate": {"steps": [1, 2, 4, 8, 50]}},
)  # fmt: skip
_sdpo = _with(_of_50_steps, _round(128, 64, updates=10_000, pairs=1))
# For other rewards: ImageReward and HPSv2 take all pairs of a step at once.
_sdpo_of_people = _train(5e-5, 1e-4, rows_per_update=128)
_sdpo_rewards = {
    "sdpo/image_reward": _sdpo_of_people,
    "sdpo/hpsv2": _sdpo_of_people,
    "sdpo/pickscore": _train(6e-5, 1e-4),
}
# PSO (2410.03190, its code for SDXL-Turbo): 16 pairs a round, 8 an update, each with 3 stochastic steps.
_pso = _with(
    _sampler("euler_ancestral", 4, eta=1.0), _train(1e-5, 1e-6), {"model": {"lora_rank": 32}},
    _round(16, 8 * 3, pairs=1),
)  # fmt: skip
# As in LaSRO's comparison with PSO (2411.15247, appendix D): two steps, of which the first is stochastic.
_pso_lcm = _with(_pso, _sampler("lcm", 2), _round(16, 8, pairs=1))
# GORS-LCM (the same appendix) samples with two steps.
_gors_lcm = _sampler("lcm", 2)
# DRaFT (2309.17400) trains an adapter with rates from 1e-4 to 4e-4; the lowest, since few-step models are easily moved
# too far. The gradient through the decoder takes more memory than that through the UNet.
_draft: Settings = {"train": {"learning_rate": 1e-4, "gradient_checkpointing": True}}
# The hybrid gradient has no source for these models: DRaFT's settings, with groups of 8 samples.
_hybrid = _with(_draft, {"data": {"batch_size": 4}})
_hybrid_turbo = _with(_hybrid, _sampler("euler_ancestral", 4, eta=1.0))
# Latent consistency distillation (diffusers' script for LCM-LoRA).
_lcd = _with(_train(1e-4, 1e-2), {"model": {"lora_rank": 64}})
# RG-LCD (2403.11027, its code): the whole UNet, small steps; the proxy's rate is the one after its pre-training.
_rg_lcd = _with(
    _train(1e-6, updates=10_000, rows_per_update=40, ema_decay=0.95, checkpoint_every=1000),
    {"model": {"lora_rank": 0}, "surrogate": {"learning_rate": 3.3e-6, "weight_decay": 0.0}},
)
# RG-LCD's scores are cosines, without the scale that pickscore learned. ImageReward is capped at 2.
_rg_lcd_rewards: dict[str, Settings] = {
    "rg_lcd/clip_score": {"algorithm": {"beta": 5.0}},
    "rg_lcd/pickscore": {"algorithm": {"beta": 5.0}, "reward": [{"name": "pickscore", "variant": "cosine"}]},
    "rg_lcd/image_reward": {"algorithm": {"reward_cap": 2.0}},
}
# DrPO (2606.02521, its code for SDXL-Turbo on four GPUs): one step, 32 prompts of 16 samples in an update. No settings
# are published for SD-Turbo; ours are those of SDXL-Turbo. Two steps of a consistency model are ours too.
_drpo_rates = _with(_train(1e-5, 1e-2, precision="bf16"), _round(32, 32 * 16, updates=5000))
_drpo = _with(_sampler("euler_ancestral", 1), _drpo_rates)
_drpo_lcm = _with(_sampler("lcm", 2), _drpo_rates, {"train": {"rows_per_update": 2 * 32 * 16}})
# Diffusion-DPO (2311.12908, its code): the whole UNet, 2000 updates of 2048 pairs; the rate rises over 500 of them, for
# SDXL over 200.
_dpo = _with(_train(2.05e-5, 1e-2, updates=2000, rows_per_update=2048, warmup=500), {"model": {"lora_rank": 0}})
_dpo_of_sdxl = _with(_dpo, {"train": {"warmup": 200}})
# Diffusion-DPO's launcher for SDXL-Turbo.
_dpo_turbo: Settings = {"algorithm": {"grid_steps": 4, "zero_terminal_snr": True}}


def _lcm_methods(*extra: Settings) -> dict[str, Settings]:
    return {
        "lasro": _with(_lasro_lcm, *extra),
        "ddpo": _rlcm_ddpo,
        "ddpo/jpeg_compressibility": _rlcm_size,
        "ddpo/jpeg_incompressibility": _rlcm_size,
        "rebel": _rlcm_rebel,
        "sdpo": _rlcm_sdpo,
        "pso": _pso_lcm,
        "gors_lcm": _gors_lcm,
        "draft": _draft,
        "hybrid": _hybrid,
        "drpo": _drpo_lcm,
        "rg_lcd": _rg_lcd,
        **_rg_lcd_rewards,
        "lcd": _lcd,
    }


def _with_likelihoods(sampler: Settings) -> dict[str, Settings]:
    """Return settings of the methods that learn from likelihoods, for a model whose usual sampler is deterministic.

    They name a stochastic sampler only: no source has rates and batches for these models."""
    return dict.fromkeys(("ddpo", "sdpo", "rebel", "d3po", "pso"), sampler)


# Models distilled by a discriminator: epsilon, trailing times, no guidance, and no teacher to distil from.
_turbo: Settings = {"model": {"prediction": "epsilon", "guidance_scale": 1.0}}


def sd_turbo() -> ModelBundle:
    return ModelBundle(
        path="stabilityai/sd-turbo",
        defaults=_with(_of_512, _sampler("euler_ancestral", 4, eta=0.0), _turbo),
        algorithm_defaults={
            "lasro": _lasro_turbo,
            "sdpo": _sdpo,
            **_sdpo_rewards,
            "ddpo": _of_50_steps,
            "rebel": _of_50_steps,
            "d3po": _of_50_steps,
            "pso": _pso,
            "draft": _draft,
            "hybrid": _hybrid_turbo,
            "drpo": _drpo,
            "diffusion_dpo": _with(_dpo, _dpo_turbo),
        },
    )


def sdxl_turbo() -> ModelBundle:
    return ModelBundle(
        path="stabilityai/sdxl-turbo",
        defaults=_with(_of_512, _sampler("euler_ancestral", 4), _turbo),
        algorithm_defaults={
            "lasro": _with(_lasro_turbo, _vega),
            "pso": _pso,
            "draft": _draft,
            "hybrid": _hybrid_turbo,
            "drpo": _drpo,
            "sdpo": _sdpo,
            **_sdpo_rewards,
            "diffusion_dpo": _with(_dpo_of_sdxl, _dpo_turbo),
        },
    )


def sdxl_lightning() -> ModelBundle:
    """Return the bundle of the UNet for 4 steps; for another number set model.unet and sampler.num_steps."""
    unet = {"unet": "ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors", **_turbo["model"]}
    four = {"algorithm": {"step_weights": [1.0, 1.0, 1.0, 1.0]}}
    return ModelBundle(
        path=SDXL,
        defaults=_with(_of_1024, _sampler("euler_ancestral", 4, eta=0.0), {"model": unet, "evaluate": {"steps": [4]}}),
        algorithm_defaults=_with_likelihoods(_sampler("euler_ancestral", 4, eta=1.0))
        | {
            "lasro": _with(_sampler("renoise", 4), _lasro_turbo_loss, four, _vega),
            "pso": _pso,
            "draft": _draft,
            "hybrid": _hybrid_turbo,
            # No source has this; the model was trained at the times of its four steps.
            "diffusion_dpo": {"algorithm": {"grid_steps": 4}},
        },
    )


# Latent consistency models. diffusers' script for SDXL samples w from 3, a guidance_scale of 4.

_lcd_of_sdxl = {"lcd": _with(_lcd, {"algorithm": {"guidance_scale_min": 4.0}})}


def lcm_dreamshaper() -> ModelBundle:
    return ModelBundle(
        path="SimianLuo/LCM_Dreamshaper_v7",
        teacher="Lykon/dreamshaper-7",
        defaults=_with(_of_512, _sampler("lcm", 4), {"model": {"guidance_scale": 8.0}}),
        algorithm_defaults=_lcm_methods(),
    )


def sdxl_lcm() -> ModelBundle:
    return _sdxl_lcm(SDXL, "latent-consistency/lcm-sdxl")


def ssd_1b_lcm() -> ModelBundle:
    """Return the bundle of the model in LaSRO's tables, as far as it is published."""
    return _sdxl_lcm("segmind/SSD-1B", "latent-consistency/lcm-ssd-1b")


def _sdxl_lcm(path: str, unet: str) -> ModelBundle:
    model = {"unet": unet, "prediction": "consistency", "guidance_scale": 8.0}
    return ModelBundle(
        path=path,
        teacher=path,
        defaults=_with(_of_1024, _sampler("lcm", 4), {"model": model}),
        algorithm_defaults=_lcm_methods(_vega) | _lcd_of_sdxl,
    )


def sd_1_5_lcm_lora() -> ModelBundle:
    return _lcm_lora(SD, "latent-consistency/lcm-lora-sdv1-5", _of_512)


def sdxl_lcm_lora() -> ModelBundle:
    bundle = _lcm_lora(SDXL, "latent-consistency/lcm-lora-sdxl", _of_1024, _vega)
    return replace(bundle, algorithm_defaults={**bundle.algorithm_defaults, **_lcd_of_sdxl})


def _lcm_lora(path: str, adapter: str, memory: Settings, *lasro: Settings) -> ModelBundle:
    # Guidance is in the weights: the card asks for a guidance_scale between 1 and 2, or none.
    model = {"adapter": adapter, "prediction": "consistency", "guidance_scale": 1.0}
    return ModelBundle(
        path=path,
        teacher=path,
        defaults=_with(memory, _sampler("lcm", 4), {"model": model}),
        algorithm_defaults=_lcm_methods(*lasro),
    )


# Models of many steps.


def sd_1_5() -> ModelBundle:
    """Return the bundle with the samplers of DDPO and D3PO: 50 and 20 stochastic steps, guidance_scale 5.

    DDPO (its code for eight GPUs and compressibility): 256 trajectories a round, 64 an update, all steps of each; for
    the aesthetic reward 128 an update, and more kept rewards of each prompt. D3PO (its code): 20 pairs a round, an
    update on all steps of each pair."""
    sampler = _sampler("ddim", 50, eta=1.0, spacing="leading")
    return ModelBundle(
        path=SD,
        defaults=_with(_of_512, sampler, {"model": {"guidance_scale": 5.0}, "evaluate": {"steps": [20, 50]}}),
        algorithm_defaults={
            "ddpo": _with(
                _train(3e-4, 1e-4),
                {"model": {"lora_rank": 4}},
                _round(256, 64 * 50, updates=400, samples=1, buffer_size=16, min_count=16),
            ),
            "ddpo/aesthetic": {"train": {"rows_per_update": 128 * 50}, "algorithm": {"buffer_size": 32}},
            "d3po": _with(
                _train(3e-5, 1e-4),
                {"sampler": {"num_steps": 20}, "model": {"lora_rank": 4}},
                _round(20, 20, updates=8000, pairs=1),
            ),
            "draft": _draft,
            "hybrid": _hybrid,
            "diffusion_dpo": _dpo,
        },
    )


def sdxl() -> ModelBundle:
    sampler = _sampler("euler_ancestral", 30, eta=0.0, spacing="leading")
    stochastic = _sampler("ddim", 50, eta=1.0, spacing="leading")
    return ModelBundle(
        path=SDXL,
        defaults=_with(_of_1024, sampler, {"model": {"guidance_scale": 5.0}, "evaluate": {"steps": [30]}}),
        algorithm_defaults=_with_likelihoods(stochastic)
        | {"draft": _draft, "hybrid": _with(_hybrid, stochastic), "diffusion_dpo": _dpo_of_sdxl},
    )
