"""ImageReward compared with a reimplementation of the published network: same names, shapes and mathematics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit_rewards import blip
from alignkit_rewards.image_reward import ImageReward, translate
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, resize
from blip_reference import Text, Vision

CPU = torch.device("cpu")
THINGS = ["a", "red", "blue", "white", "small", "circle", "square", "heart", "and", "left", "of"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *THINGS]


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
    """A small network and its file in the authors' layout, next to its configuration and vocabulary."""
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

    config = blip.large()
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


def test_a_prompt_beyond_the_limit_is_reported(published: tuple[Published, Path], images: Tensor) -> None:
    long = [Example("a red circle " * 20), Example("a red circle " * 20 + "and a blue square"), Example("a heart")]
    shown = images[:1].expand(3, -1, -1, -1)
    scores = loaded(published[1])(shown, long)
    assert scores.parts["truncated"].tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(scores.values[0], scores.values[1])
    limits, lengths = zip(*map(loaded(published[1]).tokens, long), strict=True)
    assert set(limits) == {35} and lengths[1] > lengths[0] > 35 > lengths[2]
    assert loaded(published[1], max_tokens=64)(shown, long).parts["truncated"].tolist() == [0.0, 1.0, 0.0]


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
    with pytest.raises(ConfigError, match=r"holds vision_model\.odd and 0 more weights that the model does not have"):
        loaded(file)


def test_a_folder_of_another_model_is_refused(clip_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"has no head\.safetensors; expected ImageReward\.pt"):
        loaded(Path(clip_folder))


@pytest.mark.parametrize("max_tokens", [2, 513])
def test_a_limit_out_of_range_is_refused(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"^max_tokens: found {max_tokens}, expected at least 3 and at most 512$"):
        ImageReward(max_tokens=max_tokens)
