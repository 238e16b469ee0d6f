"""A world small enough for checks: untrained pipelines for images of 64 pixels, prompts, images, pairs, rewards."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from alignkit.config.bundles import find_policy
from alignkit.interfaces import Policy, Reward
from alignkit.records import Example, PolicySettings, PreferencePairs, Scores

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTokenizer

Form = Literal["lcm", "teacher", "turbo"]
"""A latent consistency model whose network embeds the guidance; a model that predicts the noise, with guidance; and one
that predicts the noise without guidance, on the schedule of SD-Turbo."""
FORMS: tuple[Form, ...] = ("lcm", "teacher")
"""Forms that samplers are tried on."""

SIZE = 64
PROMPTS = [
    "a red circle",
    "a blue square and a green star",
    "a white ring left of a black heart",
    "an orange diamond",
]
ODD_PROMPTS = ["", "ein großer Kürbis 🎃 auf blauem Grund", "a red circle and a blue square, " * 20]
"""An empty prompt, one beyond ASCII, and one far longer than any text encoder reads."""


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a token for every byte and none for words."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=32)


def text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """A text encoder of two layers for these words."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id, projection_dim=16,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def tiny_vae(**config: Any) -> AutoencoderKL:
    """Latents of 4 x 8 x 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, sample_size=SIZE, **config,
    )  # fmt: skip


def save_pipeline(folder: Path, form: Form, words: CLIPTokenizer | None = None) -> Path:
    """Write an untrained pipeline of this form, always the same, in diffusers' format; its texts are read by `words`
    (`byte_tokenizer` if left out)."""
    import diffusers
    from transformers import CLIPTextModel

    from alignkit.models.quiet import no_progress_bars

    words = words or byte_tokenizer()
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if form == "lcm":
        pipeline, scheduler = diffusers.LatentConsistencyModelPipeline, diffusers.LCMScheduler(**schedule)
    else:
        pipeline = diffusers.StableDiffusionPipeline
        trailing = {**schedule, "timestep_spacing": "trailing", "steps_offset": 1}
        if form == "turbo":
            scheduler = diffusers.EulerDiscreteScheduler(**trailing)
        else:
            scheduler = diffusers.DDIMScheduler(**trailing, clip_sample=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(text_config(words))
        vae = tiny_vae()
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2, time_cond_proj_dim=32 if form == "lcm" else None,
        )  # fmt: skip
    with no_progress_bars():
        pipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder


@functools.cache
def tiny_pipeline(form: Form = "lcm") -> Path:
    """The folder of an untrained pipeline, there until the process ends."""
    return save_pipeline(Path(_home().name) / form, form)


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="alignkit-testing-")


def tiny_policy(form: Form = "lcm", trainable: bool = True) -> Policy:
    """A policy on an untrained pipeline: latents of 4 x 8 x 8, images of 64 pixels. Its network is new at each call."""
    policy = _policy(form, trainable)
    pipe = policy.pipe  # type: ignore[attr-defined]
    frozen = pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler
    return copy.deepcopy(policy, {id(part): part for part in frozen})


@functools.cache
def _policy(form: Form, trainable: bool) -> Policy:
    source = str(tiny_pipeline(form))
    guidance_scale = 2.0 if form == "teacher" and trainable else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = PolicySettings(lora_rank=4, trainable=trainable, guidance_scale=guidance_scale)
        return find_policy(source, "diffusers").load(source, settings)


def coarse_images(count: int = 4, height: int = SIZE, width: int = SIZE, seed: int = 0) -> Tensor:
    """(count, 3, height, width) of large random patches, as 8-bit files hold them."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=(height, width)) * 255).round() / 255


class TinyImages:
    """Captioned images, as `alignkit.data.sources.Images` hands them out."""

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Return items that depend on seed and position alone."""
        images = [coarse_images(1, seed=1000 * seed + start + i)[0] for i in range(size)]
        return torch.stack(images), [PROMPTS[(start + i) % len(PROMPTS)] for i in range(size)]


class TinyPairs:
    """Preference pairs, as `alignkit.data.sources.Preferences` hands them out: the brighter image is preferred."""

    notes: Sequence[str] = ()

    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        """Return items that depend on seed and position alone."""
        images, captions = TinyImages().batch(start, size, seed)
        return PreferencePairs((images + 1) / 2, images / 2, tuple(captions))


class Brightness(Reward):
    """The mean of all pixels."""

    differentiable = True

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        return images.mean((1, 2, 3))


class Tied(Brightness):
    """Score every image 1."""

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return images.mean((1, 2, 3)) * 0 + 1


class PartlyInvalid(Brightness):
    """The brightness of the first, third, ... image; the others cannot be scored."""

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        return Scores(images.mean((1, 2, 3)), torch.arange(len(images)) % 2 == 0)


class Unscored(Brightness):
    """Fail to score any image."""

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        return Scores(images.mean((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool))
