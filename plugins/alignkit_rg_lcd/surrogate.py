"""The latent proxy reward model of RG-LCD: a CLIP whose image tower reads latents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging

from alignkit import Policy, Prompt, Surrogate, check_ranges
from alignkit.errors import ConfigError
from alignkit.models.quiet import no_progress_bars
from alignkit.models.weight_files import variant_in


class TwoTowers(nn.Module):
    """A tower for latents (N, *S) and one for token ids (P, L); features (N, E) and (P, E) have unit length."""

    def __init__(self, text: CLIPTextModelWithProjection, latent: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.text, self.latent = text, latent
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.latent(latents).image_embeds, self.text(tokens).text_embeds
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)

    def groups(self) -> tuple[list[list[nn.Module]], list[list[nn.Module]]]:
        """Return the layers of latent and text tower, the last first, grouped as open_clip freezes them.

        The projection is a group, the last block with the norm after it another, each further block one more.
        """
        text, latent = self.text.text_model, self.latent.vision_model
        columns = [
            (self.latent.visual_projection, latent.post_layernorm, latent.encoder.layers),
            (self.text.text_projection, text.final_layer_norm, text.encoder.layers),
        ]
        towers = [[[out], [norm, blocks[-1]], *([b] for b in reversed(blocks[:-1]))] for out, norm, blocks in columns]
        return towers[0], towers[1]


@dataclass
class LRM(Surrogate):
    """The latent reward model R^L of RG-LCD (Li et al. 2024, arXiv 2403.11027, 4.2 and appendix A).

    The score is the cosine between features of a latent and of its text. The text tower is a pretrained one, the latent
    tower is a ViT trained from scratch with CLIP's contrastive loss; after that only the last layers of both learn.
    """

    text: str = ""
    """A CLIP to take the text tower from, a hub id or folder; empty: the generator's own text encoder, with a new
    projection that is learned in the pre-training. The paper has OpenCLIP's ViT-H-14, the encoder of its teacher."""
    width: Annotated[int, Ge(1)] = 512
    """Width of the latent tower. This and the next three are as in the released code, for latents of 64 x 64."""
    layers: Annotated[int, Ge(1)] = 12
    """Blocks of the latent tower."""
    heads: Annotated[int, Ge(1)] = 8
    """Attention heads of the latent tower."""
    patch: Annotated[int, Ge(1)] = 4
    """Edge of a patch of the latent; 64 x 64 latents are 256 patches."""
    latent_groups: Annotated[int, Ge(0)] = 2
    """Layers of the latent tower, from the last, that learn after the pre-training; the projection counts as one."""
    text_groups: Annotated[int, Ge(0)] = 5
    """The same for the text tower."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"heads: found {self.heads}, expected a divisor of width, which is {self.width}")

    def load(self, policy: Policy) -> None:
        channels, height, width = policy.latent_shape
        if height != width or height % self.patch:
            raise ConfigError(
                f"surrogate.patch: found {self.patch}, expected a divisor of the latent's edge; the model's latents "
                f"are {height} x {width}"
            )
        text, new = self._text_tower(policy.source)
        latent = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=self.width, intermediate_size=4 * self.width, projection_dim=text.config.projection_dim,
                num_hidden_layers=self.layers, num_attention_heads=self.heads, num_channels=channels,
                image_size=height, patch_size=self.patch, hidden_act="gelu",
            )
        )  # fmt: skip
        self._network = TwoTowers(text, latent).to(policy.device)
        self._network.requires_grad_(False).eval()
        (latent_groups, text_groups), projection = self._network.groups(), text.text_projection
        # CLIP's pre-training is for the latent tower; a text tower that was trained already stays as it is.
        self._pretrained = self._names([latent, *([projection] if new else [])])
        finetuned = latent_groups[: self.latent_groups] + text_groups[: self.text_groups]
        self._finetuned = self._names([module for group in finetuned for module in group])

    def _text_tower(self, generator: str) -> tuple[CLIPTextModelWithProjection, bool]:
        """Return the text tower, and whether its projection is new. Keeps the tokenizer."""
        source, folders = self.text or generator, ("", "") if self.text else ("tokenizer", "text_encoder")
        try:
            with no_progress_bars(), _silently():
                self._tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=folders[0])
                tower, info = CLIPTextModelWithProjection.from_pretrained(
                    source, subfolder=folders[1], output_loading_info=True, variant=variant_in(source, folders[1])
                )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"surrogate.text: no text tower of a CLIP in {source!r} ({reason})") from error
        missing = set(info["missing_keys"])
        if missing - {"text_projection.weight"}:
            raise ConfigError(f"surrogate.text: {source!r} lacks {sorted(missing)[0]}; expected a CLIP text tower")
        return tower.float(), bool(missing)

    def _names(self, modules: list[nn.Module]) -> set[str]:
        """Return the names of the parameters of `modules` and of the temperature, which always learns."""
        chosen = {id(p) for module in modules for p in module.parameters()} | {id(self._network.log_scale)}
        return {name for name, p in self._network.named_parameters() if id(p) in chosen}

    def _features(self, latents: Tensor, prompt: Prompt, learning: set[str] | None) -> tuple[Tensor, Tensor]:
        """Return the features of latents and of their texts, (N, E) both; only weights in `learning` get a gradient."""
        if not prompt.text_table:
            raise ValueError("lrm reads texts, and this prompt has none: Policy.encode must fill in text_table")
        used, place = prompt.index.unique(return_inverse=True)
        texts = [prompt.text_table[i] for i in used.tolist()]
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        network, given = self._network, (latents, tokens.to(latents.device))
        if learning is None:
            image, text = network(*given)
        else:
            frozen = {name: p.detach() for name, p in network.named_parameters() if name not in learning}
            image, text = torch.func.functional_call(network, frozen, given)
        return image, text[place]

    def scale(self) -> Tensor:
        """Return 1 / tau_L, which is learned; CLIP keeps it below 100."""
        return self._network.log_scale.clamp(max=math.log(100)).exp()

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """Return the cosine (N,), without the temperature, as the generator follows it."""
        image, text = self._features(latents, prompt, None)
        return (image * text).sum(1)

    def finetuning_score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """Return `score`, with gradient into the last layers alone."""
        image, text = self._features(latents, prompt, self._finetuned)
        return (image * text).sum(1)

    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        """Return -log of the winner's probability at temperature tau_L, for methods that train it on pairs."""
        twice = prompt.select(torch.arange(len(winner)).repeat(2))
        better, worse = self.finetuning_score(torch.cat([winner, loser]), twice).chunk(2)
        return -F.logsigmoid(self.scale() * (better - worse)).mean()

    def contrastive_loss(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """Return CLIP's loss over N captioned latents; equal captions share their probability."""
        image, text = self._features(latents, prompt, self._pretrained)
        logits = self.scale() * image @ text.T
        # By text: examples that differ in metadata alone have places of their own in the prompt's tables.
        number = {name: i for i, name in enumerate(dict.fromkeys(prompt.texts))}
        place = torch.tensor([number[name] for name in prompt.texts], device=latents.device)
        same = (place[:, None] == place[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def module(self) -> nn.Module:
        return self._network


@contextmanager
def _silently() -> Iterator[None]:
    """Silence the report on missing and unused weights of a checkpoint: both are expected here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
