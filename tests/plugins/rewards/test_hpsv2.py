"""HPSv2 compared with a reimplementation of open_clip's network: same names, shapes and mathematics."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.functional import normalize as unit

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit_rewards.hpsv2 import FILES, HPSv2, from_open_clip, vit_h_14
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with the names of its state dict, including `attn_mask`, which older versions saved."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text, vision, out = config.text_config, config.vision_config, config.projection_dim
        self.visual = Visual(vision.image_size, vision.patch_size, vision.hidden_size, vision.num_attention_heads,
                             vision.num_hidden_layers, out)  # fmt: skip
        self.transformer = Transformer(text.hidden_size, text.num_attention_heads, text.num_hidden_layers)
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(text.max_position_embeddings, text.hidden_size))
        self.ln_final = nn.LayerNorm(text.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(text.hidden_size, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        length = text.max_position_embeddings
        self.register_buffer("attn_mask", torch.full((length, length), float("-inf")).triu(1))

    def encode_text(self, ids: Tensor, ends: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), ends] @ self.text_projection


@pytest.fixture
def published(clip_folder: str, tmp_path: Path, randomized: Callable[[nn.Module], nn.Module]) -> tuple[OpenClip, Path]:
    """A small network and its file in the authors' layout, next to its configuration."""
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(clip_folder)
    model = randomized(OpenClip(config))
    folder = tmp_path / "published"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").unlink()
    file = folder / FILES["v2.1"]
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, file)
    assert isinstance(model, OpenClip)
    return model, file


def loaded(checkpoint: Path | str, **fields: Any) -> HPSv2:
    reward = HPSv2(checkpoint=str(checkpoint), **fields)
    reward.load(CPU)
    return reward


def test_it_is_the_cosine_that_the_published_network_gives(
    published: tuple[OpenClip, Path], images: Tensor, examples: list[Example]
) -> None:
    model, file = published
    reward = loaded(file)
    pixels = interpolate(images, size=(32, 32), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    expected = []
    for image, example in zip((pixels - mean) / std, examples, strict=True):
        ids = reward._tokenizer(example.text).input_ids
        padded = torch.tensor([ids + [0] * (24 - len(ids))])  # open_clip pads with 0
        text = model.encode_text(padded, torch.tensor([len(ids) - 1]))
        expected.append((unit(model.visual(image[None]), dim=-1) * unit(text, dim=-1)).sum())
    scores = reward(images, examples)
    torch.testing.assert_close(scores.values, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert scores.values.std() > 0.01


def test_it_holds_the_contract(published: tuple[OpenClip, Path], holds_the_contract: Callable[[Reward], None]) -> None:
    holds_the_contract(loaded(published[1]))


def test_the_published_layout_of_vit_h_14_converts_without_remainder() -> None:
    from transformers import CLIPModel

    config = vit_h_14()
    with torch.device("meta"):
        found = from_open_clip(OpenClip(config).state_dict())
        expected = CLIPModel(config).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert sum(v.numel() for v in found.values()) == 986_109_441  # ViT-H-14 in open_clip's tables


def test_the_file_is_converted_once_and_then_read_as_safetensors(
    published: tuple[OpenClip, Path], images: Tensor, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = loaded(published[1])(images, examples).values
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(loaded(published[1])(images, examples).values, before)


def test_a_converted_folder_is_a_checkpoint_itself(
    published: tuple[OpenClip, Path], images: Tensor, examples: list[Example], tmp_path: Path, clip_folder: str
) -> None:
    before = loaded(published[1])(images, examples).values
    (folder,) = (tmp_path / "cache" / "weights").iterdir()
    assert torch.equal(loaded(folder, tokenizer=clip_folder)(images, examples).values, before)


def test_safetensors_in_the_published_layout_are_read_too(
    published: tuple[OpenClip, Path], images: Tensor, examples: list[Example]
) -> None:
    from safetensors.torch import save_file

    model, file = published
    save_file(model.state_dict(), file.with_suffix(".safetensors"))
    after = loaded(file.with_suffix(".safetensors"))(images, examples).values
    torch.testing.assert_close(after, loaded(file)(images, examples).values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.proj"), r"lacks visual_projection\.weight .* and 0 more"),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            "holds extra and 0 more weights that the model does not have",
        ),
        (lambda state: state.update(logit_scale=torch.zeros(2)), r"has logit_scale of shape \(2,\), expected \(\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    published: tuple[OpenClip, Path], change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model, file = published
    state = dict(model.state_dict())
    change(state)
    torch.save({"state_dict": state}, file)
    with pytest.raises(ConfigError, match=f"hpsv2: the checkpoint .* {message}"):
        loaded(file)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a pickle was run')",)


def test_a_pickle_with_code_in_it_is_refused(published: tuple[OpenClip, Path]) -> None:
    torch.save({"state_dict": {"a": Harmful()}}, published[1])
    with pytest.raises(ConfigError, match=r"hpsv2: the checkpoint .* holds more than tensors") as caught:
        loaded(published[1])
    assert "\n" not in str(caught.value)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r'^version: found "3", expected "v2\.0" or "v2\.1"$'):
        HPSv2(version="3")  # type: ignore[arg-type]
