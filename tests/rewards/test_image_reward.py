"""ImageReward against its network, written down here after the published one: same names, shapes and mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from alignkit.errors import ConfigError
from alignkit.interfaces import Example, Reward
from alignkit_rewards.image_reward import ImageReward, blip_large, translate
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, resize

CPU = torch.device("cpu")
THINGS = ["a", "red", "blue", "white", "small", "circle", "square", "heart", "and", "left", "of"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *THINGS]


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


class Blip(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        text, vision, width = config.text_config, config.vision_config, config.image_text_hidden_size
        self.visual_encoder, self.text_encoder = Vision(vision), Text(text, vision.hidden_size)
        self.vision_proj = nn.Linear(vision.hidden_size, width)
        self.text_proj = nn.Linear(text.hidden_size, width)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 1024, 128, 64, 16, 1]
        first, second, third, fourth, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
        drop = nn.Dropout
        self.layers = nn.Sequential(first, drop(0.2), second, drop(0.2), third, drop(0.1), fourth, last)


class Published(nn.Module):
    """The published network, with the names of its state dict."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.blip, self.mlp = Blip(config), Head(config.text_config.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        read = self.blip.text_encoder(ids, self.blip.visual_encoder(pixels))
        raw = self.mlp.layers(read[:, 0])[:, 0]
        out: Tensor = (raw - 0.16717362830052426) / 1.0333394966054072
        return out


@pytest.fixture
def published(tmp_path: Path, randomized: Callable[[nn.Module], nn.Module]) -> tuple[Published, Path]:
    """A small network and its file, as the authors publish theirs, with configuration and vocabulary beside."""
    from transformers import BertTokenizer, BlipConfig

    config = BlipConfig(
        text_config={"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 64, "layer_norm_eps": 1e-12,
                     "encoder_hidden_size": 24, "bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0},
        vision_config={"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
        image_text_hidden_size=16,
    )  # fmt: skip
    model = randomized(Published(config))
    assert isinstance(model, Published)
    folder = tmp_path / "published"
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return model, folder / "ImageReward.pt"


def loaded(file: Path, **fields: Any) -> ImageReward:
    reward = ImageReward(checkpoint=str(file), **fields)
    reward.load(CPU)
    return reward


def expected(model: Published, images: Tensor, reward: ImageReward, examples: list[Example]) -> Tensor:
    mean, std = (torch.tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    pixels = (resize(images, 32, 32) - mean) / std
    ids = [torch.tensor([reward._tokenizer(example.text).input_ids]) for example in examples]
    return torch.cat([model(one[None], some) for one, some in zip(pixels, ids, strict=True)]).detach()


def test_it_is_what_the_published_network_gives(
    published: tuple[Published, Path], images: Tensor, examples: list[Example]
) -> None:
    reward = loaded(published[1])
    values = reward(images, examples).values
    torch.testing.assert_close(values, expected(published[0], images, reward, examples), atol=1e-4, rtol=1e-4)
    assert values.std() > 0.01


def test_it_holds_the_contract(published: tuple[Published, Path], holds_the_contract: Callable[[Reward], None]) -> None:
    holds_the_contract(loaded(published[1]))


def test_without_normalization_it_is_the_raw_value(
    published: tuple[Published, Path], images: Tensor, examples: list[Example]
) -> None:
    raw = loaded(published[1], normalized=False)(images, examples).values
    usual = loaded(published[1])(images, examples).values
    torch.testing.assert_close(raw, usual * 1.0333394966054072 + 0.16717362830052426)


def test_the_published_layout_converts_without_remainder() -> None:
    from transformers import BlipForImageTextRetrieval

    config = blip_large()
    with torch.device("meta"):
        state = Published(config).state_dict()
        wanted = {k: v.shape for k, v in BlipForImageTextRetrieval(config).state_dict().items()}
    assert (
        sum(v.numel() for k, v in state.items() if not k.endswith("position_ids")) == 446_665_953
    )  # 1.79 GB in float32, as the published file
    model, head = translate(state)
    assert wanted.keys() - model.keys() <= {"itm_head.weight", "itm_head.bias", "text_encoder.embeddings.position_ids"}
    assert {k: wanted[k] for k in model} == {k: v.shape for k, v in model.items()}
    assert (head["weight"].shape, head["bias"].shape) == ((768,), ())


def test_a_converted_folder_is_a_checkpoint_itself(
    published: tuple[Published, Path], images: Tensor, examples: list[Example], tmp_path: Path
) -> None:
    before = loaded(published[1])(images, examples).values
    (folder,) = (tmp_path / "cache" / "weights").iterdir()
    again = loaded(folder, tokenizer=str(published[1].parent))
    assert torch.equal(again(images, examples).values, before)


def test_a_prompt_beyond_the_limit_is_told(published: tuple[Published, Path], images: Tensor) -> None:
    long = [Example("a red circle " * 20), Example("a red circle " * 20 + "and a blue square"), Example("a heart")]
    pictures = images[:1].expand(3, -1, -1, -1)
    scores = loaded(published[1])(pictures, long)
    assert scores.parts["truncated"].tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(scores.values[0], scores.values[1])
    assert loaded(published[1], max_tokens=64)(pictures, long).parts["truncated"].tolist() == [0.0, 1.0, 0.0]


def test_the_head_stays_in_float32(published: tuple[Published, Path], images: Tensor, examples: list[Example]) -> None:
    reward = loaded(published[1], precision="bf16")
    assert {p.dtype for p in reward._model.parameters()} == {torch.bfloat16}
    scores = reward(images, examples).values
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, loaded(published[1])(images, examples).values, atol=0.1, rtol=0.1)


def test_a_file_without_the_head_is_refused(published: tuple[Published, Path]) -> None:
    model, file = published
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("mlp.")}, file)
    with pytest.raises(ConfigError, match=r"image_reward: the head of the checkpoint \(mlp\.\*\) is not the published"):
        loaded(file)


def test_a_weight_of_another_name_is_refused(published: tuple[Published, Path]) -> None:
    model, file = published
    state = model.state_dict()
    state["blip.visual_encoder.odd"] = torch.zeros(1)
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"holds vision_model\.odd and 0 more that the model has not"):
        loaded(file)


def test_a_folder_of_another_model_is_refused(clip_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"has no head\.safetensors; expected ImageReward\.pt"):
        loaded(Path(clip_folder))


@pytest.mark.parametrize("max_tokens", [2, 513])
def test_a_limit_out_of_range_is_refused(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"image_reward: max_tokens is {max_tokens}, expected 3 to 512"):
        ImageReward(max_tokens=max_tokens)
