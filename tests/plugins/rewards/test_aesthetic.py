from __future__ import annotations

import dataclasses
import shutil
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
from alignkit_rewards.aesthetic import Aesthetic
from alignkit_rewards.linear import fold


class Predictor(nn.Module):
    """The published v2 head, for vectors of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 1024, 128, 64, 16, 1]
        pairs = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        first, second, third, fourth, last = pairs
        drop = nn.Dropout
        self.layers = nn.Sequential(first, drop(0.2), second, drop(0.2), third, drop(0.1), fourth, last)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


@pytest.fixture
def head(tmp_path: Path) -> tuple[Predictor, str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Predictor(16).eval()
    for parameter in model.parameters():  # spread as widely as trained ones
        parameter.data *= 2
    torch.save(model.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    return model, str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")


def loaded(**fields: Any) -> Aesthetic:
    reward = Aesthetic(**fields)
    reward.load(torch.device("cpu"))
    return reward


def test_it_holds_the_contract(
    head: tuple[Predictor, str], clip_folder: str, holds_the_contract: Callable[[Reward], None]
) -> None:
    holds_the_contract(loaded(checkpoint=clip_folder, head=head[1]), within=0.1)  # its layers bend within a grey level


def test_the_folded_head_gives_what_the_layers_give(
    head: tuple[Predictor, str], clip_folder: str, images: Tensor, examples: list[Example]
) -> None:
    reward = loaded(checkpoint=clip_folder, head=head[1])
    expected = head[0](reward.image_features(images))[:, 0]
    torch.testing.assert_close(reward(images, examples), expected, atol=1e-5, rtol=1e-5)


def test_the_first_predictor_is_one_layer(
    clip_folder: str, images: Tensor, examples: list[Example], tmp_path: Path
) -> None:
    linear = nn.Linear(16, 1)
    torch.save(linear.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    reward = loaded(checkpoint=clip_folder, head=str(tmp_path / "sa_0_4_vit_l_14_linear.pth"))
    torch.testing.assert_close(reward(images, examples), linear(reward.image_features(images))[:, 0])


def test_the_prompt_does_not_matter(
    head: tuple[Predictor, str], clip_folder: str, images: Tensor, examples: list[Example]
) -> None:
    reward = loaded(checkpoint=clip_folder, head=head[1])
    assert torch.equal(reward(images, examples), reward(images, [Example("")] * len(examples)))


def test_it_has_no_tokenizer_and_needs_none(head: tuple[Predictor, str], clip_folder: str, tmp_path: Path) -> None:
    assert [field.name for field in dataclasses.fields(Aesthetic)] == ["checkpoint", "precision", "head"]
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(clip_folder) / name, tmp_path)
    loaded(checkpoint=str(tmp_path), head=head[1])


def test_a_fold_by_hand() -> None:
    layers = {"layers.0.weight": [[1, 2], [0, 1]], "layers.0.bias": [1, -1], "layers.3.weight": [[3, 4]]}
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in layers.items()}
    weight, bias = fold(tensors | {"layers.3.bias": torch.tensor([0.5])})
    assert weight.tolist() == [3.0, 10.0]  # 3 (x + 2 y + 1) + 4 (y - 1) + 0.5
    assert bias.item() == -0.5


def test_layers_are_taken_by_number_and_not_by_name() -> None:
    layers = {f"layers.{i}.weight": torch.full((1, 1), float(i)) for i in (2, 10)}
    layers |= {f"layers.{i}.bias": torch.full((1,), float(i)) for i in (2, 10)}
    weight, bias = fold(layers)
    assert (weight.item(), bias.item()) == (20.0, 30.0)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"norm.weight": torch.zeros(1, 1)}, r"norm\.weight is not the weight or bias"),
        ({"layers.0.weight": torch.zeros(1, 16)}, "lacks its weight or its bias"),
        ({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, "outputs 2 numbers, expected 1"),
    ],
)
def test_another_head_is_refused(state: dict[str, Tensor], message: str, clip_folder: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=f"aesthetic: the head .* is not one of LAION's heads: .*{message}"):
        loaded(checkpoint=clip_folder, head=str(tmp_path / "head.pth"))


def test_a_head_for_another_clip_is_refused(clip_folder: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=r"takes vectors of 768 numbers and the checkpoint .* produces 16"):
        loaded(checkpoint=clip_folder, head=str(tmp_path / "head.pth"))


def test_a_head_that_is_not_a_file_is_reported(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aesthetic: head is .*, expected a file, or owner/name/file on the hub"):
        loaded(checkpoint=clip_folder, head=str(tmp_path))
    with pytest.raises(ConfigError, match=r"aesthetic: there is no file .* to load the head from"):
        Aesthetic(head=str(tmp_path / "gone.pth")).check([])
