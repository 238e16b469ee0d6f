"""BLIP's network, written down after the published one: the same names, shapes and mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)


class VisionBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, config.num_attention_heads), Mlp(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(gelu(self.mlp.fc1(self.norm2(x))))


class Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class Vision(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2 + 1, width))
        self.patch_embed = Patches(width, patch)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class Named(nn.Module):
    """Modules by name."""

    def __init__(self, /, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def text_layer(width: int, inner: int, seen: int) -> nn.Module:
    def output(size: int) -> nn.Module:
        return Named(dense=nn.Linear(size, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def attention(size: int) -> nn.Module:
        parts = {"query": nn.Linear(width, width), "key": nn.Linear(size, width), "value": nn.Linear(size, width)}
        return Named(self=Named(**parts), output=output(width))

    return Named(
        attention=attention(width),
        crossattention=attention(seen),
        intermediate=Named(dense=nn.Linear(width, inner)),
        output=output(inner),
    )


class Text(nn.Module):
    def __init__(self, config: Any, seen: int) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.embeddings = Named(
            word_embeddings=nn.Embedding(config.vocab_size, width),
            position_embeddings=nn.Embedding(config.max_position_embeddings, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        layers = [text_layer(width, config.intermediate_size, seen) for _ in range(config.num_hidden_layers)]
        self.encoder = Named(layer=nn.ModuleList(layers))

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        table: Any = self.embeddings
        x = table.LayerNorm(table.word_embeddings(ids) + table.position_embeddings(torch.arange(ids.shape[1])))

        def attended(part: Any, x: Tensor, other: Tensor) -> Tensor:
            q, k, v = part.self.query(x), part.self.key(other), part.self.value(other)
            out: Tensor = part.output.LayerNorm(part.output.dense(attend(q, k, v, self.heads)) + x)
            return out

        encoder: Any = self.encoder
        for layer in encoder.layer:
            x = attended(layer.attention, x, x)
            x = attended(layer.crossattention, x, seen)
            x = layer.output.LayerNorm(layer.output.dense(gelu(layer.intermediate.dense(x))) + x)
        return x
