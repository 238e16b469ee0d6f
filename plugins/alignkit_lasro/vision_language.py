"""The surrogates of LaSRO's ablation (a): a CLIP and a BLIP that read latents instead of pixels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from alignkit import Policy, Prompt, check_ranges
from alignkit.errors import ConfigError
from alignkit.models.quiet import errors_only, no_progress_bars
from alignkit.models.weight_files import variant_in
from alignkit_lasro.surrogate import PairwiseSurrogate

GRID = 16
"""Patches along an edge, as many as ViT-L/14 has for 224 pixels."""


@dataclass
class VisionLanguage(PairwiseSurrogate):
    """The common part of both: a checkpoint or a new network, with a patch embedding for latents."""

    backbone: str = ""
    """A checkpoint to start from, a hub id or folder; its embedding of patches is replaced by a new one. Empty: a new
    network of the sizes below."""
    width: Annotated[int, Ge(1)] = 256
    """Width of a new network."""
    layers: Annotated[int, Ge(1)] = 6
    """Blocks of a new network."""
    heads: Annotated[int, Ge(1)] = 4
    """Attention heads of a new network."""
    patch: Annotated[int, Ge(0)] = 0
    """Edge of a patch of the latent; 0: a sixteenth of the latent's edge, and at least 1."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"heads: found {self.heads}, expected a divisor of width, which is {self.width}")

    def load(self, policy: Policy) -> None:
        channels, height, width = policy.latent_shape
        patch = self.patch or max(1, height // GRID)
        if height % patch or width % patch:
            raise ConfigError(
                f"surrogate.patch: found {patch}, expected a divisor of the latent's edge; the model's latents are "
                f"{height} x {width}"
            )
        source = self.backbone or policy.source
        try:
            with no_progress_bars(), errors_only():
                network = self._pretrained(source) if self.backbone else self._new(source, height, patch)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"surrogate.backbone: {source!r} does not serve {type(self).__name__} ({reason})"
            ) from error
        embeddings = network.vision_model.embeddings
        embeddings.patch_embedding = nn.Conv2d(
            channels, embeddings.embed_dim, patch, stride=patch, bias=embeddings.patch_embedding.bias is not None
        )
        embeddings.patch_size = patch  # the position embeddings are interpolated by it
        self._network = network.float().to(policy.device)
        self._network.requires_grad_(False).eval()

    @abstractmethod
    def _pretrained(self, source: str) -> Any:
        """Return the checkpoint `source`, and keep its tokenizer. Raises OSError or ValueError."""

    @abstractmethod
    def _new(self, generator: str, edge: int, patch: int) -> Any:
        """Return a network for latents of this edge that uses the tokenizer of the generator."""

    def _whole(self, cls: Any, source: str, new: tuple[str, ...] = ()) -> Any:
        """Return a checkpoint as the class `cls`; only weights with names that begin with `new` may be missing."""
        # Without the argument, transformers asks on the terminal whether to run code that comes with the checkpoint.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        found, expected = config.model_type, cls.config_class.model_type
        if found != expected:
            raise ValueError(f"found a model of type {found}, expected {expected}")
        self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        network, info = cls.from_pretrained(source, output_loading_info=True)
        missing = sorted(name for name in info["missing_keys"] if not name.startswith(new))
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        return network

    def _vision(self, edge: int, patch: int) -> dict[str, int]:
        """Return the config of a new image tower."""
        return {**self._sizes(), "image_size": edge, "patch_size": patch, "intermediate_size": 4 * self.width}

    def _sizes(self) -> dict[str, int]:
        return {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads}

    def _tokens(self, prompt: Prompt, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tokens of the distinct texts, and the place of each row's text among them, (N,)."""
        if not prompt.text_table:
            raise ValueError("a surrogate that reads texts needs them: Policy.encode must fill in text_table")
        used, place = prompt.index.unique(return_inverse=True)
        found = self._tokenizer(
            [prompt.text_table[i] for i in used.tolist()], padding=True, truncation=True, return_tensors="pt",
            max_length=self._network.config.text_config.max_position_embeddings,
        )  # fmt: skip
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}, place


@dataclass
class LatentCLIP(VisionLanguage):
    """Two towers: the score is the cosine between features of a latent and of its text, at the learned temperature.

    The paper has CLIP-ViT-L/14 (openai/clip-vit-large-patch14). A new network has the generator's own text encoder with
    a new projection. Unlike the proxy of RG-LCD (`lrm`), all of it learns from pairs, and scores are log-odds.
    """

    def _pretrained(self, source: str) -> Any:
        return self._whole(CLIPModel, source)

    def _new(self, generator: str, edge: int, patch: int) -> Any:
        self._tokenizer = CLIPTokenizer.from_pretrained(generator, subfolder="tokenizer")
        tower = CLIPTextModelWithProjection.from_pretrained(
            generator, subfolder="text_encoder", variant=variant_in(generator, "text_encoder")
        )
        config = CLIPConfig(
            text_config=tower.config.to_dict(), vision_config=self._vision(edge, patch), projection_dim=self.width
        )
        network = CLIPModel(config)
        network.text_model.load_state_dict(tower.text_model.state_dict())
        return network

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        tokens, place = self._tokens(prompt, latents.device)
        found = self._network(**tokens, pixel_values=latents, interpolate_pos_encoding=True)
        scores: Tensor = found.logits_per_image.gather(1, place[:, None])[:, 0].float()
        return scores


@dataclass
class LatentBLIP(VisionLanguage):
    """One score from a text encoder that attends to the tokens of the latent.

    The paper has a BLIP with a ViT-L that was fine-tuned for questions (as Salesforce/blip-vqa-capfilt-large). A new
    network reads the generator's tokens with a text encoder of its own.
    """

    def _pretrained(self, source: str) -> Any:
        # A BLIP for questions has no head for matching; every checkpoint gets a new one here.
        return self._scoring(
            self._whole(BlipForImageTextRetrieval, source, ("itm_head.", "vision_proj.", "text_proj."))
        )

    def _new(self, generator: str, edge: int, patch: int) -> Any:
        self._tokenizer = words = CLIPTokenizer.from_pretrained(generator, subfolder="tokenizer")
        text = {
            **self._sizes(), "intermediate_size": 4 * self.width, "vocab_size": len(words),
            "max_position_embeddings": words.model_max_length, "pad_token_id": words.pad_token_id,
            "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "sep_token_id": words.eos_token_id,
        }  # fmt: skip
        return self._scoring(
            BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=self._vision(edge, patch)))
        )

    @staticmethod
    def _scoring(network: Any) -> Any:
        """Replace the heads for matching and contrast by one for a score, 0 before training."""
        network.vision_proj = network.text_proj = nn.Identity()
        network.itm_head = nn.Linear(network.itm_head.in_features, 1)
        nn.init.zeros_(network.itm_head.weight)
        nn.init.zeros_(network.itm_head.bias)
        return network

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        tokens, place = self._tokens(prompt, latents.device)
        seen = self._network.vision_model(latents, interpolate_pos_encoding=True).last_hidden_state
        words = {name: column[place] for name, column in tokens.items()}
        read = self._network.text_encoder(**words, encoder_hidden_states=seen).last_hidden_state
        scores: Tensor = self._network.itm_head(read[:, 0])[:, 0].float()
        return scores
