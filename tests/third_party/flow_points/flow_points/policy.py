"""A velocity network as a policy: no UNet, no VAE, no integer times."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignkit import Policy, PolicyFacts, PolicySettings, Prompt
from alignkit.diffusion import columns, to_clean
from alignkit.errors import ConfigError

INDEX, WEIGHTS = "flow_points.json", "flow_points.safetensors"
TEXT = 8
"""Numbers that stand for a text."""
TIMES = 50
BLOB = 0.4
"""Radius of a point in an image that reaches from -2 to 2."""


class Velocity(nn.Module):
    """(x, t, text) to the velocity noise - clean at x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(2 + 1 + TEXT, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        velocity: Tensor = self.out(self.hidden(torch.cat([x, t[:, None], text], dim=1)))
        return velocity


class FlowPoints(Policy):
    """Flow matching (Lipman et al. 2023) on points: x_t = (1 - t) clean + t noise with t in (0, 1]."""

    latent_shape = (2, 1, 1)
    image_size = 16

    def __init__(self, source: str, network: Velocity, settings: PolicySettings) -> None:
        self.source, self.device = source, torch.device(settings.device)
        self.guidance_scale = 1.0 if settings.guidance_scale is None else settings.guidance_scale
        self._network = network.to(self.device).requires_grad_(settings.trainable)
        self._start = copy.deepcopy(network).requires_grad_(False)
        self._initial = {name: p.detach().clone() for name, p in self.weights().items()}
        axis = torch.linspace(-2, 2, self.image_size, device=self.device)
        self._grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"))  # (2, H, W), the second axis upwards

    @classmethod
    def serves(cls, source: str) -> bool:
        return (Path(source) / INDEX).is_file()

    @classmethod
    def facts(cls, source: str, settings: PolicySettings) -> PolicyFacts:
        for name, expected in (("unet", ""), ("adapter", ""), ("prediction", ""), ("guidance_embedding", 0)):
            if getattr(settings, name) != expected:
                raise ConfigError(f"model.{name}: found {getattr(settings, name)!r}, expected none for flow_points")
        if settings.trainable and settings.lora_rank:
            raise ConfigError(f"model.lora_rank: found {settings.lora_rank}, expected 0; flow_points has no adapters")
        sampler = {"name": "ddim", "num_steps": 10, "eta": 0.0}
        return PolicyFacts(consistency=False, num_times=TIMES, defaults={"sampler": sampler})

    @classmethod
    def load(cls, source: str, settings: PolicySettings) -> FlowPoints:
        cls.facts(source, settings)  # raises ConfigError for settings that it cannot follow
        try:
            network = Velocity(json.loads((Path(source) / INDEX).read_text())["width"])
            network.load_state_dict(load_file(Path(source) / WEIGHTS))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"model: {source} cannot be loaded: {str(error).splitlines()[0]}") from error
        return cls(source, network, settings)

    def times(self) -> Tensor:
        return torch.arange(1, TIMES + 1) / TIMES

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def encode(self, texts: Sequence[str]) -> Prompt:
        distinct = list(dict.fromkeys(texts))
        table = torch.stack([_features_of(text) for text in distinct])[:, None]
        index = torch.tensor([distinct.index(text) for text in texts], device=self.device)
        return Prompt(table.to(self.device), index, text_table=tuple(distinct))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """The centre of brightness."""
        bright = images.mean(1)[:, None] + 1e-6
        centre: Tensor = (bright * self._grid).sum((2, 3)) / bright.sum((2, 3))
        return centre[:, :, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """A bright blob on black."""
        distance = (self._grid - latents.float()).square().sum(1)
        return (-distance / (2 * BLOB**2)).exp()[:, None].expand(-1, 3, -1, -1)

    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        with_text = self._clean(x, t, prompt.features[:, 0])
        scale = torch.full_like(t, self.guidance_scale) if guidance_scale is None else guidance_scale
        if bool((scale == 1).all()):
            return with_text
        without = self._clean(x, t, _features_of("").to(x.device).expand(len(x), -1))
        return without + columns(scale, x) * (with_text - without)

    def _clean(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        velocity = self._network(x.flatten(1).float(), t.float(), text).view_as(x)
        return to_clean("flow", velocity, x.float(), *self.schedule(t.float()))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the first layers' output for the centre, by the network before training."""
        points = self.encode_images(images).flatten(1)
        t, text = points.new_full((len(points), 1), float(self.times()[0])), points.new_zeros(len(points), TEXT)
        hidden: Tensor = self._start.hidden(torch.cat([points, t, text], dim=1))
        return hidden

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self._network.parameters() if p.requires_grad]

    def weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._network.named_parameters() if p.requires_grad}

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = self.weights()
        kept = {name: own[name].data for name in weights}
        try:
            for name, value in weights.items():
                own[name].data = value.to(self.device)
            yield
        finally:
            for name, value in kept.items():
                own[name].data = value

    @contextmanager
    def reference(self) -> Iterator[None]:
        with torch.no_grad(), self.using(self._initial):
            yield

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """A checkpoint like the one that was loaded."""
        state = {name: value.detach().cpu() for name, value in self._network.state_dict().items()}
        state |= {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        return save(folder, state)

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        """The trained part of such a checkpoint."""
        state = load_file(folder / WEIGHTS)
        return {name: state[name] for name in self.weights()}


def _features_of(text: str) -> Tensor:
    """(TEXT,) numbers in [-1, 1]; zeros for the empty text."""
    if not text:
        return torch.zeros(TEXT)
    return torch.rand(TEXT, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) * 2 - 1


def save(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint; returns the file with the weights."""
    (folder / INDEX).write_text(json.dumps({"width": len(state["out.weight"][0])}))
    save_file(dict(state), folder / WEIGHTS)
    return folder / WEIGHTS
