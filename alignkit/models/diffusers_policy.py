"""A diffusers pipeline with a UNet as a `Policy`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import LCMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alignkit import diffusion
from alignkit.errors import ConfigError
from alignkit.interfaces import Policy
from alignkit.models.encoder_cache import content_of, fingerprint, tokenizer_state
from alignkit.models.latents import Latents
from alignkit.models.lora_files import DIFFUSERS, UNET, write_lora
from alignkit.models.modules import exchanged, outputs_of, precision_of
from alignkit.models.pipelines import (
    LORA_FILE,
    Files,
    check_pipeline,
    is_pipeline,
    load_pipeline,
    noise_levels,
    scheduler_of,
)
from alignkit.models.prompts import token_counter
from alignkit.records import EncodingCache, PolicyFacts, PolicySettings, Prompt

V = TypeVar("V", str, Tensor)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""The LoRA targets of diffusers' own training scripts."""
REMEMBERED = 1 << 30
"""Bytes of encoded texts to keep in memory: about 4500 texts of Stable Diffusion, 1700 of SDXL."""


class DiffusersPolicy(Policy):
    """A text-to-image pipeline with a UNet: Stable Diffusion, SDXL, their latent consistency and turbo forms.

    What differs between them is read from the pipeline: prediction type and noise levels from the scheduler's config,
    consistency boundary scalings if that is an LCMScheduler, a guidance embedding if the UNet has one, and the features
    of the empty prompt from the pipeline's config. `prediction` overrides the scheduler where a LoRA or a distilled
    UNet changed what the network predicts.
    """

    def __init__(
        self,
        source: str,
        *,
        unet: str = "",
        adapter: str = "",
        variant: str = "",
        config: str = "",
        allow_pickle: bool = False,
        prediction: str = "",
        guidance_embedding: int = 0,
        lora_rank: int = 16,
        lora_targets: Sequence[str] = (),
        trainable: bool = True,
        guidance_scale: float | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        cache: EncodingCache | None = None,
        gradient_checkpointing: bool = False,
        rows_per_pass: int = 0,
    ) -> None:
        """Load the pipeline at `source` with the settings of `alignkit.records.PolicySettings`."""
        self.source, self.cache, self.rows_per_pass = source, cache, rows_per_pass
        self.device = torch.device(device)
        files = Files(source, unet, adapter, variant, config, allow_pickle, prediction)
        pipe = load_pipeline(files, dtype or torch.float32, guidance_embedding)
        self.pipe = pipe.to(self.device)
        self.unet = self.pipe.unet.requires_grad_(False).eval()
        self.vae = self.pipe.vae.requires_grad_(False).eval()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(self.pipe, name, None)) is not None:
                encoder.requires_grad_(False).eval()
        self._latents = Latents(self.pipe)
        schedule = self.pipe.scheduler.config
        self._prediction: str = schedule.prediction_type if prediction in ("", "consistency") else prediction
        self._alphas = noise_levels(schedule).to(self.device)
        is_lcm = isinstance(self.pipe.scheduler, LCMScheduler)
        self.consistency = prediction == "consistency" or (not prediction and is_lcm)
        self._scaling: float | None = schedule.get("timestep_scaling", 10.0) if self.consistency else None
        self._embed_dim: int | None = self.unet.config.time_cond_proj_dim
        self.guidance_embedded = self._embed_dim is not None
        if guidance_scale is None:
            guidance_scale = 8.5 if self._embed_dim else 1.0
        # As in diffusers, two passes are made above 1 alone; model cards of turbo models write 0 for the one pass.
        self.guidance_scale = guidance_scale if self._embed_dim else max(guidance_scale, 1.0)
        edge = self.unet.config.sample_size
        self.latent_shape = (self.unet.config.in_channels, edge, edge)
        self.image_size = edge * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.lora = self._add_lora(lora_rank, lora_targets) if trainable and lora_rank else None
        if trainable:
            for parameter in self.unet.parameters() if self.lora is None else []:
                parameter.requires_grad_(True)
        # Kept, because each search goes through all layers.
        self._trained = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        for parameter in self._trained.values():
            parameter.data = parameter.data.float()
        # The reference of a LoRA is the network with the adapter off; a full fine-tuning must keep its initial weights.
        full = trainable and self.lora is None
        self._start = {name: p.detach().cpu().clone() for name, p in self.weights().items()} if full else None
        self._plain = False  # whether the adapter is off
        self._null: Prompt | None = None
        self._texts: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def serves(cls, source: str) -> bool:
        """Whether `source` is a folder whose `model_index.json` lists a UNet, a VAE and a scheduler, a file with a
        whole checkpoint, or a hub id."""
        try:
            return is_pipeline(source)
        except ConfigError:  # an index that cannot be read
            return False

    @classmethod
    def facts(cls, source: str, settings: PolicySettings) -> PolicyFacts:
        """Read the pipeline's scheduler; of a hub id that is not on this disk only the settings are known."""
        scheduler, config = scheduler_of(source, settings.config)
        is_lcm = scheduler == "LCMScheduler" if scheduler else None
        return PolicyFacts(
            consistency=settings.prediction == "consistency" if settings.prediction else is_lcm,
            num_times=len(noise_levels(config)) if config else None,
            defaults={"sampler": {"name": "lcm"}} if is_lcm else {},
            count_tokens=token_counter(source, settings.config),
        )

    @classmethod
    def check(cls, source: str, settings: PolicySettings) -> list[str]:
        names = ("unet", "adapter", "variant", "config", "allow_pickle", "prediction")
        return check_pipeline(Files(source, **{name: getattr(settings, name) for name in names}))

    @classmethod
    def load(cls, source: str, settings: PolicySettings) -> DiffusersPolicy:
        return cls(source, **vars(settings))

    def _add_lora(self, rank: int, targets: Sequence[str]) -> LoraConfig:
        lora = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets or ATTENTION)
        )
        try:
            self.unet.add_adapter(lora)
        except ValueError as error:
            raise ConfigError(f"model.lora_targets: {list(targets)} name no layers of the UNet ({error})") from error
        return lora

    # Texts and images are encoded one at a time, in the precision that the encoders were loaded in, so that a result
    # depends neither on the others in its batch nor on whether it comes from the cache.

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Prompt:
        distinct = list(dict.fromkeys(texts))
        encoded = [self._cached("texts", text, self._encode_text) for text in distinct]
        columns = {name: torch.cat([one[name] for one in encoded]).float() for name in encoded[0]}
        places = {text: place for place, text in enumerate(distinct)}
        index = torch.tensor([places[text] for text in texts], device=self.device)
        return Prompt(columns["features"], index, columns.get("pooled"), text_table=tuple(distinct))

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        encoded = self.pipe.encode_prompt(
            prompt=[text], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"features": encoded[0], "pooled": encoded[2]} if len(encoded) == 4 else {"features": encoded[0]}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the mode of the VAE's posterior, which needs no random numbers."""
        return torch.cat([self._cached("images", image, self._encode_image)["latents"] for image in images])

    def _encode_image(self, image: Tensor) -> dict[str, Tensor]:
        return {"latents": self._latents.encode(image[None])}

    def _cached(self, kind: str, value: V, encode: Callable[[V], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Encode a text or image, or take it from the cache if there is one; on the device."""
        with torch.autocast(self.device.type, enabled=False):
            if self.cache is None:
                found = encode(value) if isinstance(value, Tensor) else self._remembered(value)
            else:
                found = self.cache.get(self.encoders[kind], content_of(value), lambda: encode(value))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _remembered(self, text: str) -> dict[str, Tensor]:
        """Encode a text, on the CPU. The last `REMEMBERED` bytes are kept, because rounds repeat the same texts."""
        found = self._texts.pop(text, None)
        if found is None:
            found = {name: tensor.cpu() for name, tensor in self._encode_text(text).items()}
            each = sum(tensor.nbytes for tensor in found.values())  # all texts are padded to one length
            while self._texts and each * (len(self._texts) + 1) > REMEMBERED:
                del self._texts[next(iter(self._texts))]
        self._texts[text] = found
        return found

    @cached_property
    def encoders(self) -> dict[str, str]:
        """Names of the encoders of "texts" and "images" in the cache: equal only if they compute the same."""
        here = [type(self.pipe).__name__, self.device.type]  # a GPU rounds differently from a CPU
        tokenizers, networks = (
            [part for name in (kind, f"{kind}_2") if (part := getattr(self.pipe, name, None)) is not None]
            for kind in ("tokenizer", "text_encoder")
        )
        return {
            "texts": "texts-" + fingerprint([*here, *map(tokenizer_state, tokenizers), *networks]),
            "images": "images-" + fingerprint([*here, self.vae]),
        }

    def decode(self, latents: Tensor) -> Tensor:
        return self._latents.decode(latents)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the mean over space of the UNet's middle block, or of its last down block if it has none, (N, D).

        It reads the encoded images at the time of least noise, with the empty prompt.
        """
        latents = torch.cat([self._encode_image(image)["latents"] for image in images])  # generated images: no cache
        empty = self._without_text(len(latents))
        t, w = self.times()[:1].expand(len(latents)).to(self.device), torch.zeros(len(latents), device=self.device)
        deepest = self.unet.down_blocks[-1] if self.unet.mid_block is None else self.unet.mid_block
        with self.reference(), outputs_of(deepest) as found:
            self._predict(latents, t, empty.features, empty.pooled, w)
        return found[0].float().mean((2, 3))

    def feature_maps(self, x: Tensor, t: Tensor, prompt: Prompt, layers: Sequence[str]) -> list[Tensor]:
        """Return the outputs of blocks of the UNet."""
        size = self.rows_per_pass
        if 0 < size < len(x) and not torch.is_grad_enabled():
            rows = torch.arange(len(x), device=x.device).split(size)
            parts = [self.feature_maps(x[i], t[i], prompt.select(i), layers) for i in rows]
            return [torch.cat(maps) for maps in zip(*parts, strict=True)]
        blocks = self._blocks()
        if unknown := [name for name in layers if name not in blocks]:
            raise ConfigError(f"layers: found {', '.join(unknown)}, expected some of {', '.join(blocks)}")
        with ExitStack() as stack:
            found = [stack.enter_context(outputs_of(blocks[name])) for name in layers]
            self._predict(x, t, prompt.features, prompt.pooled, torch.zeros(len(x), device=x.device))
        return [maps[0].float() for maps in found]

    def _blocks(self) -> dict[str, torch.nn.Module]:
        """Return the down, middle and up blocks by their names in the UNet."""
        middle = {} if self.unet.mid_block is None else {"mid_block": self.unet.mid_block}
        down, up = (
            {f"{name}.{i}": block for i, block in enumerate(getattr(self.unet, name))}
            for name in ("down_blocks", "up_blocks")
        )
        return down | middle | up

    # the network

    def times(self) -> Tensor:
        return torch.arange(len(self._alphas))

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self._alphas[t]
        return level.sqrt(), (1 - level).sqrt()

    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        size = self.rows_per_pass
        if 0 < size < len(x) and not torch.is_grad_enabled():  # with gradient, the trainer splits the rows
            parts = torch.arange(len(x), device=x.device).split(size)
            scales = [None if guidance_scale is None else guidance_scale[i] for i in parts]
            return torch.cat(
                [self.denoise(x[i], t[i], prompt.select(i), v) for i, v in zip(parts, scales, strict=True)]
            )
        if guidance_scale is None:
            guidance_scale = torch.full((len(x),), self.guidance_scale, device=x.device)
        guidance = guidance_scale - 1  # w of the LCM paper, which embeddings take too
        if self._embed_dim or not bool(guidance.any()):
            return self._predict(x, t, prompt.features, prompt.pooled, guidance)
        null = self._without_text(len(x))
        pooled = None if prompt.pooled is None or null.pooled is None else torch.cat([prompt.pooled, null.pooled])
        features = torch.cat([prompt.features, null.features])
        with_text, without = self._predict(torch.cat([x, x]), torch.cat([t, t]), features, pooled, None).chunk(2)
        return with_text + diffusion.columns(guidance, x) * (with_text - without)

    def _without_text(self, count: int) -> Prompt:
        """Return the unconditional prompt: the empty text, or zeros for a pipeline that was trained so (SDXL)."""
        if self._null is None:
            null = self.encode([""])
            if self.pipe.config.get("force_zeros_for_empty_prompt"):
                pooled = None if null.pooled_table is None else torch.zeros_like(null.pooled_table)
                null = replace(null, table=torch.zeros_like(null.table), pooled_table=pooled)
            self._null = null
        return self._null.select(torch.zeros(count, dtype=torch.long))

    def _predict(self, x: Tensor, t: Tensor, features: Tensor, pooled: Tensor | None, w: Tensor | None) -> Tensor:
        dtype = precision_of(self.unet)
        embedded = (
            None if w is None or not self._embed_dim else diffusion.guidance_embedding(w, self._embed_dim).to(dtype)
        )
        added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": self._time_ids(len(x), dtype)}
        output = self.unet(
            x.to(dtype), t, features.to(dtype), timestep_cond=embedded, added_cond_kwargs=added, return_dict=False
        )[0].float()
        alpha, sigma = self.schedule(t)
        clean = diffusion.to_clean(self._prediction, output, x.float(), alpha, sigma)
        if self._scaling is None:
            return clean
        c_skip, c_out = diffusion.boundary_scalings(t, self._scaling)
        return diffusion.columns(c_skip, x) * x.float() + diffusion.columns(c_out, x) * clean

    def _time_ids(self, count: int, dtype: torch.dtype) -> Tensor:
        edge = self.image_size
        return torch.tensor([edge, edge, 0, 0, edge, edge], device=self.device, dtype=dtype).expand(count, 6)

    # training

    def weights(self) -> dict[str, Tensor]:
        return dict(self._trained)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._trained.values())

    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return exchanged(self.weights(), weights)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with torch.no_grad():
            if self._start is not None:
                with self.using(self._start):
                    yield
            elif self.lora is None or self._plain:
                yield
            else:
                self.unet.disable_adapters()
                self._plain = True
                try:
                    yield
                finally:
                    self.unet.enable_adapters()
                    self._plain = False

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write a LoRA file for plain diffusers, or the folder of the UNet after a full fine-tuning."""
        with self.using(weights):
            if self.lora is None:
                self.unet.save_pretrained(folder / "unet")
                return folder / "unet"
            layers = {
                name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(self.unet).items()
            }
        lora = self.lora
        settings = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules or ())}
        write_lora(
            folder / LORA_FILE,
            {f"{UNET}{name}": value for name, value in layers.items()},
            {"format": "pt", DIFFUSERS: json.dumps({f"{UNET}{name}": value for name, value in settings.items()})},
        )
        return folder / LORA_FILE

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        file = folder / (LORA_FILE if self.lora is not None else "unet/diffusion_pytorch_model.safetensors")
        try:
            found = load_file(file, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from error
        names = self.weights()
        if self.lora is not None:
            # peft puts the name of its adapter before the last part: "lora_A.default.weight" is "lora_A.weight".
            exported = {name: UNET + name.replace(".default.", ".") for name in names}
        else:
            exported = {name: name for name in names}
        if missing := [key for key in exported.values() if key not in found]:
            raise ConfigError(f"{file}: has no {missing[0]}; expected what a run of this model exports")
        return {name: found[key].to(names[name].dtype) for name, key in exported.items()}
