"""Tiny models of every family that is served: plain diffusers and the policy sample the same from the same noise."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.models.encoder_cache import EncoderCache
from alignkit.registry import default_registry
from alignkit_preference.diffusion_dpo import DiffusionDPO
from alignkit_preference.noised import LatentPairs, NoisedPairs, errors
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from families import SMALL, TEXTS, UNETS, assert_parity, lcm_lora, plain, tiny_unet

# diffusers' Euler schedulers hand tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [4, 10])
@pytest.mark.parametrize("name", ["sd_1_5", "sdxl"])
def test_stable_diffusion_samples_with_many_stochastic_steps(
    tiny_family: Any, name: str, num_steps: int, guidance_scale: float
) -> None:
    pipe = plain(tiny_family(name))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as the policy-gradient papers do
    policy = DiffusersPolicy(str(tiny_family(name)), trainable=False, guidance_scale=guidance_scale)
    assert_parity(policy, DDIM(num_steps, eta=1.0, spacing="leading"), pipe, guidance_scale, eta=1.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_stable_diffusion_2_predicts_the_velocity(tiny_family: Any, guidance_scale: float) -> None:
    policy = DiffusersPolicy(str(tiny_family("sd_2_1")), trainable=False, guidance_scale=guidance_scale)
    assert_parity(policy, DDIM(5, eta=0.0, spacing="leading"), plain(tiny_family("sd_2_1")), guidance_scale)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_sd_turbo_takes_euler_steps(tiny_family: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(tiny_family("sd_turbo")), trainable=False)
    assert policy.guidance_scale == 1
    assert_parity(policy, EulerAncestral(num_steps, eta=0.0), plain(tiny_family("sd_turbo")), 0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_sd_turbo_takes_ddim_steps_with_noise_as_sdpo_trains_it(tiny_family: Any, num_steps: int) -> None:
    pipe = plain(tiny_family("sd_turbo"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    policy = DiffusersPolicy(str(tiny_family("sd_turbo")), trainable=False)
    assert_parity(policy, DDIM(num_steps, eta=1.0), pipe, 1.0, eta=1.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_sdxl_turbo_takes_ancestral_steps(tiny_family: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(tiny_family("sdxl_turbo")), trainable=False)
    assert_parity(policy, EulerAncestral(num_steps), plain(tiny_family("sdxl_turbo")), 0.0)


def test_guidance_of_sdxl_leads_away_from_zeros_and_not_from_the_empty_text(tiny_family: Any) -> None:
    policy = DiffusersPolicy(str(tiny_family("sdxl")), trainable=False, guidance_scale=5.0)
    assert_parity(policy, EulerAncestral(4, eta=0.0, spacing="leading"), plain(tiny_family("sdxl")), 5.0)


@pytest.mark.parametrize(("num_steps", "prediction"), [(4, ""), (1, "sample")])
def test_sdxl_lightning_is_a_unet_file_in_the_pipeline_of_sdxl(
    tiny_family: Any, tmp_path: Path, num_steps: int, prediction: str
) -> None:
    torch.manual_seed(5)
    unet = UNet2DConditionModel(**SMALL | UNETS["sdxl"])
    file = tmp_path / f"sdxl_lightning_{num_steps}step_unet.safetensors"
    save_file(unet.state_dict(), file)
    pipe = plain(tiny_family("sdxl"), unet=unet)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", prediction_type=prediction or "epsilon"
    )
    policy = DiffusersPolicy(str(tiny_family("sdxl")), unet=str(file), prediction=prediction, trainable=False)
    assert_parity(policy, EulerAncestral(num_steps, eta=0.0), pipe, 0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_full_lcm_embeds_its_guidance(tiny_family: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(tiny_family("lcm_dreamshaper")), trainable=False, guidance_scale=8.0)
    assert_parity(policy, LCM(num_steps), plain(tiny_family("lcm_dreamshaper")), 8.0)


@pytest.mark.parametrize("name", ["lcm_sdxl", "lcm_ssd_1b"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_an_lcm_of_the_sdxl_family_is_a_unet_folder_in_its_pipeline(
    tiny_family: Any, tmp_path: Path, name: str, num_steps: int
) -> None:
    tiny_unet(name).save_pretrained(tmp_path)
    pipe = plain(tiny_family("sdxl"), unet=UNet2DConditionModel.from_pretrained(tmp_path))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    policy = DiffusersPolicy(
        str(tiny_family("sdxl")), unet=str(tmp_path), prediction="consistency", trainable=False, guidance_scale=8.0
    )
    assert_parity(policy, LCM(num_steps), pipe, 8.0)
    x, zero = torch.ones(2, *policy.latent_shape), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(policy.denoise(x, zero, policy.encode(TEXTS)), x)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("name", ["sd_1_5", "sdxl"])
def test_lcm_lora_turns_a_plain_pipeline_into_an_lcm(
    tiny_family: Any, tmp_path: Path, name: str, num_steps: int, guidance_scale: float
) -> None:
    folder = lcm_lora(tmp_path, name)
    pipe = plain(tiny_family(name))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(folder)
    policy = DiffusersPolicy(
        str(tiny_family(name)), adapter=str(folder), prediction="consistency", trainable=False,
        guidance_scale=guidance_scale,
    )  # fmt: skip
    assert_parity(policy, LCM(num_steps), pipe, guidance_scale)


@pytest.mark.parametrize("name", ["sd_1_5", "sd_turbo", "sdxl", "sdxl_turbo"])
def test_a_preference_on_each_family_follows_from_the_errors_of_the_plain_unet(tiny_family: Any, name: str) -> None:
    policy = DiffusersPolicy(
        str(tiny_family(name)), lora_rank=2, guidance_scale=5.0 if name in ("sd_1_5", "sdxl") else None
    )
    pipe, turbo = plain(tiny_family(name)), name.endswith("turbo")
    winner, loser, noise = torch.randn(3, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999, 249])
    rows = NoisedPairs(LatentPairs(winner, loser, policy.encode(TEXTS)), noise, t)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=turbo)
    embedded = pipe.encode_prompt(TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": embedded[2], "time_ids": sizes} if "sdxl" in name else None
    with torch.no_grad():
        found = errors(rows, policy, zero_terminal_snr=turbo)
        for member, clean in enumerate((winner, loser)):
            x = scheduler.add_noise(clean, noise, t)
            output = pipe.unet(x, t, embedded[0], added_cond_kwargs=added, return_dict=False)[0]
            assert torch.allclose(found[:, member], (output - noise).pow(2).mean([1, 2, 3]), rtol=1e-3)
    ctx = SimpleNamespace(policy=policy)
    loss, _ = DiffusionDPO(zero_terminal_snr=turbo).loss(rows, ctx)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in policy.unet.parameters() if not p.requires_grad)


def test_a_cache_keeps_both_encoders_of_an_sdxl_model(tiny_family: Any, tmp_path: Path) -> None:
    folder = str(tiny_family("sdxl_turbo"))
    expected = DiffusersPolicy(folder).encode(TEXTS)
    cold, warm = (DiffusersPolicy(folder, cache=EncoderCache(tmp_path)) for _ in range(2))
    for policy in (cold, warm):
        found = policy.encode(TEXTS)
        assert torch.equal(found.table, expected.table)
        assert found.pooled_table is not None and expected.pooled_table is not None
        assert torch.equal(found.pooled_table, expected.pooled_table)
    assert warm.cache is not None and warm.cache.made == 0
    with torch.no_grad():
        next(warm.pipe.text_encoder_2.parameters()).view(-1)[0] += 1
    del warm.encoders
    assert warm.encoders["texts"] != cold.encoders["texts"] and warm.encoders["images"] == cold.encoders["images"]


@pytest.mark.parametrize("form", ["lcm", "turbo"])
@pytest.mark.parametrize("algorithm", sorted(r.name for r in default_registry().components("algorithm")))
def test_every_method_learns_on_the_sdxl_family_with_its_two_text_encoders(
    tiny_run: Any, tiny_family: Any, tmp_path: Path, algorithm: str, form: str
) -> None:
    settings: dict[str, Any] = {
        "algorithm.name": algorithm, "data.pairs": "alignkit_shapes.data:DrawingPairs", "train.updates": 2,
        "evaluate.prompts": "", "evaluate.steps": [2],
    }  # fmt: skip
    if form == "lcm":
        tiny_unet("lcm_sdxl").save_pretrained(tmp_path / "unet")
        settings |= {
            "model.name": str(tiny_family("sdxl")), "model.teacher": str(tiny_family("sdxl")),
            "model.guidance_scale": 8.0,
            "model.unet": str(tmp_path / "unet"), "model.prediction": "consistency",
        }  # fmt: skip
    else:
        settings |= {"model.name": str(tiny_family("sdxl_turbo")), "sampler.name": "euler_ancestral"}
        settings |= {"regulariser": []} if algorithm == "lasro" else {}
    if algorithm == "drpo":
        settings["algorithm.layers"] = ["down_blocks.0", "mid_block", "up_blocks.0"]
    run = tiny_run(overrides=settings)
    if form == "turbo" and algorithm in ("gors_lcm", "lcd", "rg_lcd"):
        with pytest.raises(ConfigError, match="only a latent consistency model has this distillation loss"):
            run.check()
        return
    found = list(run.train())
    assert [u.step for u in found if u.step] == [1, 2] and all(u.metrics["grad_norm"] > 0 for u in found if u.step)
