"""Every family of models that is served, as a tiny pipeline of the same classes under the real scheduler's config.

Weights are random and pictures have 64 pixels; the classes, the ways through them and the scheduler configs are those
of the checkpoints. Each is drawn twice, by plain diffusers and through the policy, from the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alignkit.cache import EncoderCache
from alignkit.diffusers_policy import DiffusersPolicy
from alignkit.errors import ConfigError
from alignkit.interfaces import Sampler
from alignkit.rollout import sample
from alignkit.run import Run
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from alignkit_shapes.build.text import tokenizer

# diffusers' Euler schedulers hand tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXTS = ["a red circle", "a blue square and a green star"]

COMMON = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "trained_betas": None,
}  # fmt: skip
TURBO = {
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    # huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, scheduler/scheduler_config.json; the others likewise.
    "sd_1_5": COMMON | {
        "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    },
    # stabilityai/stable-diffusion-2-1
    "sd_2_1": COMMON | {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1,
    },
    # stabilityai/sd-turbo
    "sd_turbo": COMMON | TURBO | {
        "_class_name": "EulerDiscreteScheduler", "sigma_max": None, "sigma_min": None, "timestep_type": "discrete",
        "use_karras_sigmas": False,
    },
    # stabilityai/sdxl-turbo
    "sdxl_turbo": COMMON | TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"},
    # stabilityai/stable-diffusion-xl-base-1.0, and segmind/SSD-1B
    "sdxl": COMMON | TURBO | {
        "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": False,
    },
    # SimianLuo/LCM_Dreamshaper_v7
    "lcm_dreamshaper": COMMON | {
        "_class_name": "LCMScheduler", "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False,
        "timestep_spacing": "leading",
    },
}  # fmt: skip

SMALL = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd_1_5": {"attention_head_dim": 2, "cross_attention_dim": 32},
    # SD 2 and SD-Turbo name the number of heads for each block and project linearly.
    "sd_2_1": {"attention_head_dim": (2, 4), "cross_attention_dim": 32, "use_linear_projection": True},
    "lcm_dreamshaper": {"attention_head_dim": 2, "cross_attention_dim": 32, "time_cond_proj_dim": 32},
    # Two text encoders side by side, the second one's pooled features and six numbers about the picture.
    "sdxl": {
        "attention_head_dim": (2, 4), "cross_attention_dim": 64, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}  # fmt: skip
UNETS["sd_turbo"], UNETS["sdxl_turbo"] = UNETS["sd_2_1"], UNETS["sdxl"]
UNETS["lcm_sdxl"] = UNETS["sdxl"] | {"time_cond_proj_dim": 32}
# SSD-1B is pruned: uneven depths of its transformers, and none in the middle.
UNETS["lcm_ssd_1b"] = UNETS["lcm_sdxl"] | {
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ((2, 1), (1, 1)),
}


def tiny_unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**SMALL | UNETS[name])


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a name, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_tiny(name, made[name])
        return made[name]

    return make


def save_tiny(name: str, folder: Path) -> None:
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id, projection_dim=16,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    parts: dict[str, Any] = {"text_encoder": CLIPTextModel(config), "tokenizer": words, "unet": tiny_unet(name)}
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, sample_size=64,
        scaling_factor=0.13025 if "sdxl" in name else 0.18215,
    )  # fmt: skip
    scheduler = SCHEDULERS[name]
    parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    if "sdxl" in name:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": words}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        lcm = name.startswith("lcm")
        cls = diffusers.LatentConsistencyModelPipeline if lcm else diffusers.StableDiffusionPipeline
        pipe = cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def plain(folder: Path, **parts: Any) -> Any:
    """The pipeline as anybody would load it."""
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_parity(policy: DiffusersPolicy, sampler: Sampler, pipe: Any, guidance_scale: float, **call: Any) -> None:
    """`pipe` and the policy draw the same latents, and decode them to the same pictures."""
    initial = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(3)
    noises = [initial, *(torch.randn(initial.shape, generator=generator) for _ in range(sampler.num_steps))]

    def drawn(output_type: str) -> torch.Tensor:
        images: torch.Tensor = pipe(
            TEXTS, num_inference_steps=sampler.num_steps, guidance_scale=guidance_scale, latents=initial.clone(),
            generator=torch.Generator().manual_seed(3), output_type=output_type, height=64, width=64, **call,
        ).images  # fmt: skip
        return images

    expected = drawn("latent")
    found = sample(policy, sampler, policy.encode(TEXTS), torch.stack(noises, dim=1))
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found[0], found[1], atol=1e-2 * float(expected.abs().max()))
    with torch.no_grad():
        assert (policy.decode(found) - drawn("pt")).abs().max() < 5e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [4, 10])
def test_stable_diffusion_1_walks_many_steps_with_noise(build: Any, num_steps: int, guidance_scale: float) -> None:
    pipe = plain(build("sd_1_5"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as the policy-gradient papers do
    policy = DiffusersPolicy(str(build("sd_1_5")), trainable=False, guidance=guidance_scale - 1)
    assert_parity(policy, DDIM(num_steps, eta=1.0, spacing="leading"), pipe, guidance_scale, eta=1.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_stable_diffusion_2_predicts_the_velocity(build: Any, guidance_scale: float) -> None:
    policy = DiffusersPolicy(str(build("sd_2_1")), trainable=False, guidance=guidance_scale - 1)
    assert_parity(policy, DDIM(5, eta=0.0, spacing="leading"), plain(build("sd_2_1")), guidance_scale)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_sd_turbo_takes_euler_steps(build: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(build("sd_turbo")), trainable=False)
    assert policy.guidance == 0
    assert_parity(policy, EulerAncestral(num_steps, eta=0.0), plain(build("sd_turbo")), 0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_sdxl_turbo_takes_ancestral_steps(build: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(build("sdxl_turbo")), trainable=False)
    assert_parity(policy, EulerAncestral(num_steps), plain(build("sdxl_turbo")), 0.0)


def test_guidance_of_sdxl_leads_away_from_zeros_and_not_from_the_empty_text(build: Any) -> None:
    policy = DiffusersPolicy(str(build("sdxl")), trainable=False, guidance=4.0)
    assert_parity(policy, EulerAncestral(4, eta=0.0, spacing="leading"), plain(build("sdxl")), 5.0)


@pytest.mark.parametrize(("num_steps", "prediction"), [(4, ""), (1, "sample")])
def test_sdxl_lightning_is_a_unet_file_in_the_pipeline_of_sdxl(
    build: Any, tmp_path: Path, num_steps: int, prediction: str
) -> None:
    torch.manual_seed(5)
    unet = UNet2DConditionModel(**SMALL | UNETS["sdxl"])
    file = tmp_path / f"sdxl_lightning_{num_steps}step_unet.safetensors"
    save_file(unet.state_dict(), file)
    pipe = plain(build("sdxl"), unet=unet)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", prediction_type=prediction or "epsilon"
    )
    policy = DiffusersPolicy(str(build("sdxl")), unet=str(file), prediction=prediction, trainable=False)
    assert_parity(policy, EulerAncestral(num_steps, eta=0.0), pipe, 0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_a_full_lcm_embeds_its_guidance(build: Any, num_steps: int) -> None:
    policy = DiffusersPolicy(str(build("lcm_dreamshaper")), trainable=False, guidance=7.0)
    assert_parity(policy, LCM(num_steps), plain(build("lcm_dreamshaper")), 8.0)


@pytest.mark.parametrize("name", ["lcm_sdxl", "lcm_ssd_1b"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_an_lcm_of_the_sdxl_family_is_a_unet_folder_in_its_pipeline(
    build: Any, tmp_path: Path, name: str, num_steps: int
) -> None:
    tiny_unet(name).save_pretrained(tmp_path)
    pipe = plain(build("sdxl"), unet=UNet2DConditionModel.from_pretrained(tmp_path))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    policy = DiffusersPolicy(
        str(build("sdxl")), unet=str(tmp_path), prediction="consistency", trainable=False, guidance=7.0
    )
    assert_parity(policy, LCM(num_steps), pipe, 8.0)
    x, zero = torch.ones(2, *policy.latent_shape), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(policy.denoise(x, zero, policy.encode(TEXTS)), x)


def lcm_lora(folder: Path) -> Path:
    """A LoRA in the form of the published ones: kohya's names, an alpha that is not the rank."""
    unet = tiny_unet("sd_1_5")
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    tensors = {}
    generator = torch.Generator().manual_seed(2)
    for name, value in unet.named_parameters():
        if ".lora_" in name:
            module, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
            key = "lora_unet_" + module.replace(".", "_")
            kind = {"A": "down", "B": "up"}[kind]
            tensors[f"{key}.lora_{kind}.weight"] = 0.3 * torch.randn(value.shape, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_lcm_lora_turns_a_plain_pipeline_into_an_lcm(
    build: Any, tmp_path: Path, num_steps: int, guidance_scale: float
) -> None:
    folder = lcm_lora(tmp_path)
    pipe = plain(build("sd_1_5"))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(folder)
    policy = DiffusersPolicy(
        str(build("sd_1_5")), adapter=str(folder), prediction="consistency", trainable=False,
        guidance=guidance_scale - 1,
    )  # fmt: skip
    assert_parity(policy, LCM(num_steps), pipe, guidance_scale)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # peft, of any second adapter
def test_a_merged_adapter_belongs_to_the_reference_and_what_is_exported_goes_on_top(build: Any, tmp_path: Path) -> None:
    (tmp_path / "lcm").mkdir()
    (tmp_path / "run").mkdir()
    given = {"adapter": str(lcm_lora(tmp_path / "lcm")), "prediction": "consistency"}
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(build("sd_1_5")), **given, lora_rank=2)  # type: ignore[arg-type]
    merged = DiffusersPolicy(str(build("sd_1_5")), **given, trainable=False)  # type: ignore[arg-type]
    bare = DiffusersPolicy(str(build("sd_1_5")), prediction="consistency", trainable=False)
    assert policy.weights() and all("lora" in name for name in policy.weights())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        x, t = torch.ones(2, *policy.latent_shape), torch.tensor([999, 499])
        before = merged.denoise(x, t, merged.encode(TEXTS))
        with policy.reference():
            assert torch.allclose(policy.denoise(x, t, policy.encode(TEXTS)), before, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(policy.denoise(x, t, policy.encode(TEXTS)), before, rtol=1e-2, atol=1e-2)
        assert not torch.allclose(bare.denoise(x, t, bare.encode(TEXTS)), before, rtol=1e-2, atol=1e-2)
    policy.export(tmp_path / "run", policy.weights())
    pipe = plain(build("sd_1_5"))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path / "lcm", adapter_name="lcm")
    pipe.load_lora_weights(tmp_path / "run", adapter_name="run")
    pipe.set_adapters(["lcm", "run"])
    assert_parity(policy, LCM(2), pipe, 1.0)


@pytest.mark.parametrize("name", ["sdxl_turbo", "sd_turbo", "lcm_dreamshaper"])
def test_what_a_run_exports_loads_in_plain_diffusers(build: Any, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(build(name)), lora_rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    policy.export(tmp_path, policy.weights())
    pipe = plain(build(name))
    pipe.load_lora_weights(tmp_path)
    sampler = LCM(2) if name.startswith("lcm") else EulerAncestral(2, eta=float(name == "sdxl_turbo"))
    assert_parity(policy, sampler, pipe, policy.guidance + 1 if name.startswith("lcm") else 0.0)
    again = DiffusersPolicy(str(build(name)), adapter=str(tmp_path), trainable=False)
    x, t = torch.ones(2, *policy.latent_shape), torch.tensor([999, 499])
    with torch.no_grad():
        expected = policy.denoise(x, t, policy.encode(TEXTS))
        assert torch.allclose(again.denoise(x, t, again.encode(TEXTS)), expected, rtol=1e-3, atol=1e-2)


def test_training_reaches_the_adapter_of_an_sdxl_model(build: Any) -> None:
    policy = DiffusersPolicy(str(build("sdxl_turbo")), lora_rank=2)
    prompt = policy.encode(TEXTS)
    assert prompt.pooled is not None and prompt.pooled.shape == (2, 16) and prompt.features.shape[-1] == 64
    for parameter in policy.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    policy.denoise(torch.ones(2, *policy.latent_shape), torch.tensor([999, 499]), prompt).square().mean().backward()
    assert policy.parameters() and all(bool((p.grad != 0).any()) for p in policy.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in policy.parameters())


def test_a_cache_keeps_both_encoders_of_an_sdxl_model(build: Any, tmp_path: Path) -> None:
    folder = str(build("sdxl_turbo"))
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
    assert warm.encoders["texts"] != cold.encoders["texts"] and warm.encoders["pictures"] == cold.encoders["pictures"]


@pytest.mark.parametrize("key", ["unet", "adapter"])
@pytest.mark.parametrize("source", ["./nothing", "nothing", "a/b/c", "owner/weights.safetensors"])
def test_weights_that_can_be_nowhere_are_refused_before_anything_loads(
    tiny_run: Callable[..., Run], key: str, source: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}: .* is no folder, no \.safetensors file and no hub id"):
        tiny_run(overrides={f"model.{key}": source}).check()


def test_weights_that_do_not_fit_are_a_single_clear_line(build: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(tiny_unet("sdxl").state_dict(), other)
    for field, source in (("unet", other), ("adapter", other), ("unet", tmp_path), ("adapter", tmp_path)):
        with pytest.raises(ConfigError, match=rf"model\.{field}: .* cannot be loaded as") as caught:
            DiffusersPolicy(str(build("sd_1_5")), **{field: str(source)})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_an_adapter_without_the_unet_is_refused_and_what_is_merged_is_quiet(
    build: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match=r"model\.adapter: .* cannot be loaded as a LoRA for"):
        DiffusersPolicy(str(build("sd_1_5")), adapter=str(tmp_path / "text.safetensors"))
    capfd.readouterr()
    DiffusersPolicy(str(build("sd_1_5")), adapter=str(lcm_lora(tmp_path)), trainable=False)
    assert "LoRA" not in "".join(capfd.readouterr())
