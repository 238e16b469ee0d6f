"""The surrogate reward of LaSRO: the encoder half of a latent diffusion UNet with a scalar head."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit import Policy, Prompt, Surrogate
from alignkit.errors import ConfigError
from alignkit.models.pipelines import load_unet


class EncoderWithHead(nn.Module):
    """Down and mid blocks of a UNet with a head: latents (N, *S) and text features to a score (N,)."""

    def __init__(self, unet: UNet2DConditionModel, spatial: int, image_size: int) -> None:
        super().__init__()
        # Without its up blocks and output layers, the UNet's forward returns the output of the mid block.
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out, unet.conv_out = None, nn.Identity()
        self.unet = unet
        self.image_size = image_size
        channels = unet.config.block_out_channels[-1]
        layers: list[nn.Module] = []
        while spatial > 4 or not layers:
            layers += [
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
                nn.GroupNorm(gcd(32, channels), channels),
                nn.SiLU(),
            ]
            spatial //= 2
        score = nn.Linear(channels * spatial**2, 1)
        nn.init.zeros_(score.weight)  # every score starts at 0 and the pair loss at ln 2
        nn.init.zeros_(score.bias)
        self.head = nn.Sequential(*layers, nn.Flatten(), score)

    def forward(self, latents: Tensor, prompt: Prompt) -> Tensor:
        added = None
        if prompt.pooled is not None:
            edge = self.image_size
            ids = torch.tensor([edge, edge, 0, 0, edge, edge], device=latents.device, dtype=latents.dtype)
            added = {"text_embeds": prompt.pooled, "time_ids": ids.expand(len(latents), 6)}
        # Clean latents have time 0 of the network's schedule.
        encoded = self.unet(latents, 0, prompt.features, added_cond_kwargs=added, return_dict=False)[0]
        scores: Tensor = self.head(encoded)[:, 0]
        return scores


class PairwiseSurrogate(Surrogate):
    """A network that learns from pairs; its scores are log-odds up to a constant."""

    _network: Any

    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        """Return -log sigmoid(R(winner) - R(loser)), the mean over pairs (LaSRO, Eq. 10)."""
        twice = prompt.select(torch.arange(len(winner)).repeat(2))
        better, worse = self.score(torch.cat([winner, loser]), twice).chunk(2)
        return -F.logsigmoid(better - worse).mean()

    def module(self) -> nn.Module:
        network: nn.Module = self._network
        return network


@dataclass
class LatentUNet(PairwiseSurrogate):
    """Down and mid blocks of a pretrained latent UNet, all trained, and a head of strided convolutions (LaSRO, 5.1).

    The paper takes Segmind-Vega for SDXL-family generators. The backbone must have the latent space and the text
    features of the generator.
    """

    backbone: str = ""
    """A diffusers folder or hub id to take the `unet` from; empty: the generator's own."""

    def load(self, policy: Policy) -> None:
        source = self.backbone or policy.source
        try:
            unet = load_unet(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"surrogate.backbone: no UNet in {source!r} ({str(error).splitlines()[0]})") from error
        if unet.config.in_channels != policy.latent_shape[0]:
            raise ConfigError(
                f"surrogate.backbone: {source} reads {unet.config.in_channels} latent channels, the model has "
                f"{policy.latent_shape[0]}"
            )
        wide, reads = policy.encode([""]).features.shape[-1], unet.config.cross_attention_dim
        if isinstance(reads, int) and unet.config.encoder_hid_dim is None and reads != wide:
            raise ConfigError(
                f"surrogate.backbone: {source} reads text features of {reads} numbers, the model has {wide}"
            )
        spatial = policy.latent_shape[1] // 2 ** (len(unet.config.block_out_channels) - 1)
        self._network = EncoderWithHead(unet, spatial, policy.image_size).to(policy.device)
        self._network.requires_grad_(False).eval()

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        scores: Tensor = self._network(latents, prompt).float()
        return scores
