"""Checkpoints as people have them: read, or refused in one line before any weight loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.models.pipelines import load_unet
from alignkit.records import PolicySettings
from alignkit.runs.run import Run
from families import TEXTS, plain
from field_fixtures import UNET, as_one_file, copied, edit, rewrite, shard, weights_of

# diffusers' Euler schedulers hand tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULER = "scheduler/scheduler_config.json"


def scheduler(name: str, **config: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SCHEDULER).write_text(json.dumps({"_class_name": name, "num_train_timesteps": 1000, **config}))
        edit(folder / "model_index.json", scheduler=["diffusers", name])

    return change


def part(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, **values)


def index(**values: Any) -> Callable[[Path], None]:
    return part("model_index.json", **values)


def unet(**values: Any) -> Callable[[Path], None]:
    return part("unet/config.json", **values)


def vae(**values: Any) -> Callable[[Path], None]:
    return part("vae/config.json", **values)


def without(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        for file in sorted(folder.glob(name)):
            file.unlink()

    return change


def pickled(folder: Path) -> None:
    rewrite(folder / UNET, lambda t: t, folder / "unet/diffusion_pytorch_model.bin")


def cut(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:900])


def unsharded(folder: Path) -> None:
    shard(folder)
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


UNFIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "edm": (scheduler("EDMEulerScheduler", sigma_data=0.5), "scheduler EDMEulerScheduler adds noise without betas"),
    "flow": (scheduler("FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler adds noise along"),
    "flow_sigmas": (scheduler("UniPCMultistepScheduler", use_flow_sigmas=True), "adds noise along a flow"),
    "shift": (scheduler("CogVideoXDDIMScheduler"), "scheduler CogVideoXDDIMScheduler adds noise by shifted betas"),
    "continuous": (scheduler("EulerDiscreteScheduler", timestep_type="continuous"), "adds noise by shifted betas"),
    "no_scheduler": (scheduler("OurScheduler"), "scheduler OurScheduler is none of diffusers'"),
    "prediction": (part(SCHEDULER, prediction_type="noise"), "has prediction_type 'noise', expected one of epsilon"),
    "betas": (part(SCHEDULER, beta_schedule="ours"), "gives no noise levels .ours is not implemented"),
    "inpaint": (unet(in_channels=9), "unet takes 9 channels, of an inpainting model, expected 4"),
    "variance": (unet(out_channels=8), "unet returns 8 channels, expected 4"),
    "classes": (unet(class_embed_type="timestep"), "class_embed_type = 'timestep', an input beyond"),
    "image": (unet(addition_embed_type="image"), "has addition_embed_type = 'image', expected none"),
    "wide": (unet(sample_size=[8, 16]), r"has sample_size = \[8, 16\], expected the edge of square"),
    "text": (unet(cross_attention_dim=64), "reads text features of 64 numbers, the text encoders"),
    "deeper": (unet(layers_per_block=2), "cannot be loaded as a UNet .*: it lacks: down_blocks.*more"),
    "unet_kind": (index(unet=["diffusers", "UNet2DModel"]), "unet is a UNet2DModel, expected a UNet2DConditionModel"),
    "vae_kind": (index(vae=["diffusers", "VQModel"]), "vae is an VQModel, expected an AutoencoderKL or an Au"),
    "vae_channels": (vae(latent_channels=16), "unet takes 4 channels, expected 16"),
    "vae_pixels": (vae(in_channels=1), r"vae reads and writes \(1, 3\) channels of pixels"),
    "vae_mean": (vae(latents_mean=[0.0]), "vae has 1 values of latents_mean, expected one for"),
    "pipeline": (index(_class_name="DDPMPipeline"), "is a DDPMPipeline, expected a text-to-image pipeline"),
    "no_words": (index(tokenizer=[None, None]), "has no tokenizer for its text_encoder"),
    "words": (part("text_encoder/config.json", vocab_size=10), "tokenizer makes .*, text_encoder knows 10"),
    "length": (part("tokenizer/tokenizer_config.json", model_max_length=99), "tokenizer has model_max_length 99, t"),
    "no_text": (index(text_encoder=[None, None]), "has the parts of no text encoder, expected text_en"),
    "no_config": (without("vae/config.json"), "there is no .*vae/config.json, the config of a part"),
    "no_json": (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json is not a readable"),
    "no_tokenizer": (without("tokenizer/*"), "there are no files in .*tokenizer, expected a CLIPTokenizer"),
    "no_weights": (without("vae/*.safetensors"), "vae holds no weights, expected files as diffusers saves them"),
    "shards": (unsharded, "lists diffusion_pytorch_model-00002-of-00002.safetensors, which .*unet does not hold"),
    "pickled": (pickled, r"unet holds diffusion_pytorch_model\.bin; these are pickled; set model\.allow"),
    "cut": (cut, r"diffusers pipeline: unet/diffusion_pytorch_model\.safetensors is damaged"),
    "shape": (
        lambda folder: rewrite(folder / UNET, lambda t: t | {"conv_in.bias": torch.zeros(3)}),
        r"it has tensors of other shapes: conv_in\.bias \(3,\) in the place of \(16,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_checkpoint_is_one_line_before_any_weight_loads(tiny_teacher: Path, tmp_path: Path, kind: str) -> None:
    change, message = UNFIT[kind]
    folder = copied(tiny_teacher, tmp_path)
    change(folder)
    for open_ in (lambda: DiffusersPolicy.check(str(folder), PolicySettings()), lambda: DiffusersPolicy(str(folder))):
        with pytest.raises(ConfigError, match=f"^model: .*{message}") as caught:
            open_()
        assert "\n" not in str(caught.value)


def test_check_finds_what_would_end_the_run_and_names_what_is_not_used(
    tiny_run: Callable[..., Run], tiny_teacher: Path, tiny_lcm: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_teacher, tmp_path)
    scheduler("FlowMatchEulerDiscreteScheduler")(folder)
    command = ["check", "--algo", "ddpo", "--reward", "jpeg_compressibility", "--set", "evaluate.steps=[2]", "--model"]
    found = CliRunner().invoke(app, [*command, str(folder)])
    assert found.exit_code == 1 and found.stderr.startswith(f"error: model: {folder}: scheduler FlowMatch")
    with pytest.raises(ConfigError, match="FlowMatch"):
        tiny_run(overrides={"model.teacher": str(folder), "algorithm.name": "lcd"}).check()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    used = {f"unet.{layer}.lora_A.weight": torch.zeros(2, 32), f"unet.{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(used | {"lora_te_q_proj.alpha": torch.ones(1)}, tmp_path / "style.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.3) circle\n" + "a red circle and " * 20 + "a square\n", encoding="utf-8")
    more = [f"data.prompts={prompts}", f"model.adapter={tmp_path / 'style.safetensors'}"]
    found = CliRunner().invoke(app, [*command, str(tiny_lcm), *(word for one in more for word in ("--set", one))])
    noted = [line for line in found.stdout.splitlines() if line.startswith("warning: ")]
    assert found.exit_code == 0 and len(noted) == 3
    assert noted[0].endswith("1 tensors are not the UNet's and are not used: lora_te_q_proj.alpha")
    assert "1 of 2 are longer than the 24 tokens that" in noted[1] and "the first is '(red:1.3)'" in noted[2]


@pytest.mark.parametrize("message", ["ema.decay", "conv_in.weight", "conv_out.bias"])
def test_a_unet_file_is_compared_with_the_unet_before_it_is_loaded(
    tiny_teacher: Path, tmp_path: Path, message: str
) -> None:
    file = rewrite(copied(tiny_teacher, tmp_path) / UNET, {
        "ema.decay": lambda t: t | {"ema.decay": torch.ones(1)},
        "conv_in.weight": lambda t: {name: value for name, value in t.items() if name != "conv_in.weight"},
        "conv_out.bias": lambda t: t | {"conv_out.bias": torch.zeros(5)},
    }[message])  # fmt: skip
    for open_ in (
        lambda s: DiffusersPolicy.check(s, PolicySettings(unet=str(file))),
        lambda s: DiffusersPolicy(s, unet=str(file)),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.unet: .* cannot be loaded as the UNet of .*: {message}"):
            open_(str(tiny_teacher))


# Read


def predictions(policy: DiffusersPolicy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.decode(policy.denoise(x, torch.tensor([999, 499]), policy.encode(TEXTS)))


def half(folder: Path) -> None:
    for file in weights_of(folder):
        halved = lambda t: {n: v.half() if v.is_floating_point() else v for n, v in t.items()}  # noqa: E731
        rewrite(file, halved, file.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize(
    ("change", "settings", "tolerance"),
    [(shard, {}, 0.0), (half, {}, 0.02), (half, {"variant": "fp16"}, 0.02), (pickled, {"allow_pickle": True}, 0.0)],
    ids=["shards", "fp16", "variant", "pickled"],
)
def test_weights_in_other_files_are_the_same_model(
    tiny_teacher: Path, tmp_path: Path, change: Callable[[Path], None], settings: Any, tolerance: float
) -> None:
    folder = copied(tiny_teacher, tmp_path)
    change(folder)
    assert DiffusersPolicy.check(str(folder), PolicySettings(**settings)) == []
    expected = predictions(DiffusersPolicy(str(tiny_teacher), trainable=False))
    found = predictions(DiffusersPolicy(str(folder), trainable=False, **settings))
    assert (found - expected).abs().max() <= tolerance
    if not settings:
        load_unet(str(folder))  # as surrogates do
    with pytest.raises(ConfigError, match=r"^model\.variant: found 'x', expected one that"):
        DiffusersPolicy.check(str(folder), PolicySettings(**settings | {"variant": "x"}))


def test_of_several_variants_one_must_be_named(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = copied(tiny_teacher, tmp_path)
    half(folder)
    for file in sorted(folder.glob("*/*.fp16.safetensors")):
        file.with_name(file.name.replace("fp16", "bf16")).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"^model\.variant: missing; .* holds bf16, fp16 and no plain weights"):
        DiffusersPolicy.check(str(folder), PolicySettings())
    assert DiffusersPolicy.check(str(folder), PolicySettings(variant="bf16")) == []


def test_a_whole_checkpoint_in_one_file_is_the_same_model(tiny_teacher: Path, tmp_path: Path) -> None:
    file, configs = str(as_one_file(tiny_teacher, tmp_path / "model.safetensors")), str(tiny_teacher)
    settings = PolicySettings(config=configs)
    assert DiffusersPolicy.serves(file) and DiffusersPolicy.check(file, settings) == []
    assert DiffusersPolicy.facts(file, settings).num_times == 1000
    expected = predictions(DiffusersPolicy(configs, trainable=False))
    assert torch.allclose(predictions(DiffusersPolicy(file, config=configs, trainable=False)), expected, atol=1e-4)


def test_a_file_without_configs_says_what_it_takes(
    tiny_teacher: Path, tiny_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(as_one_file(tiny_teacher, tmp_path / "model.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"those of stable-diffusion-v1-5/.* are not on this disk.*set model\.config to"
    ):
        DiffusersPolicy(file)
    with pytest.raises(ConfigError, match=r"its time_embedding\.cond_proj has the shape None, expected \(16, 32\)"):
        DiffusersPolicy(file, config=str(tiny_lcm))
    with pytest.raises(ConfigError, match=r"^model\.config: '.*' is no folder with a diffusers pipeline and no hub id"):
        DiffusersPolicy(file, config=str(tmp_path / "gone"))
    bare = rewrite(Path(file), lambda t: {"conv_in.weight": torch.zeros(1)})
    found = CliRunner().invoke(app, ["sample", str(bare), "a cat"])
    assert found.exit_code == 1 and "no policy serves the file" in found.stderr


def test_taesd_encodes_decodes_and_measures(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = copied(tiny_teacher, tmp_path)
    without("vae/*")(folder)
    blocks = (1,) * 4
    AutoencoderTiny(num_encoder_blocks=blocks, num_decoder_blocks=blocks).save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    policy = DiffusersPolicy(str(folder), lora_rank=2, gradient_checkpointing=True)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = policy.encode_images(images)
    with torch.no_grad():
        assert torch.equal(latents[:1], plain(folder).vae.encode(2 * images[:1] - 1).latents)
    assert latents.shape == (2, *policy.latent_shape) and policy.features(images).shape == (2, 32)
    x = torch.zeros(1, *policy.latent_shape)
    policy.decode(policy.denoise(x, torch.tensor([499]), policy.encode(["a cat"]))).mean().backward()
    assert any(bool((p.grad != 0).any()) for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["sdxl", "sd_1_5"])
def test_means_and_deviations_of_latents_are_read_where_diffusers_reads_them(
    tiny_family: Any, tmp_path: Path, name: str
) -> None:
    folder = copied(tiny_family(name), tmp_path)
    edit(folder / "vae/config.json", latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[2.0, 3.0, 0.5, 4.0])
    policy, pipe = DiffusersPolicy(str(folder), trainable=False), plain(folder)
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", "height": 64, "width": 64}
    made = pipe("a cat", latents=latents, generator=torch.Generator().manual_seed(0), **call).images
    call["output_type"] = "pt"
    expected = pipe("a cat", latents=latents, generator=torch.Generator().manual_seed(0), **call).images
    with torch.no_grad():
        assert torch.allclose(policy.decode(made), expected, atol=1e-4)
        mode = pipe.vae.encode(VaeImageProcessor.normalize(expected)).latent_dist.mode()
    scaled = mode * pipe.vae.config.scaling_factor
    if isinstance(pipe, StableDiffusionXLPipeline):
        mean, std = (torch.tensor(pipe.vae.config[f"latents_{one}"]).view(1, 4, 1, 1) for one in ("mean", "std"))
        scaled = (mode - mean) * pipe.vae.config.scaling_factor / std
    assert torch.allclose(policy.encode_images(expected), scaled, atol=1e-4)
