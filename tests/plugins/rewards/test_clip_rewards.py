from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit
from transformers import CLIPModel

from alignkit.commands.lint import lint
from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit_rewards.clip import ClipReward
from alignkit_rewards.clip_score import ClipScore
from alignkit_rewards.pickscore import PickScore
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, resize

CPU = torch.device("cpu")


def loaded(reward: ClipReward) -> ClipReward:
    reward.load(CPU)
    return reward


def cosines(folder: str, images: Tensor, texts: list[str]) -> Tensor:
    """Compute cosines with transformers' `get_*_features`, one pair at a time, texts padded to the limit."""
    from transformers import AutoTokenizer, CLIPModel

    model, words = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(c)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    out = []
    for image, text in zip(images, texts, strict=True):
        ids = words(text, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        pixels = (resize(image[None], 32, 32) - mean) / std
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        read = model.get_text_features(**ids).pooler_output
        out.append((unit(seen, dim=-1) * unit(read, dim=-1)).sum())
    return torch.stack(out).detach()


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_every_clip_reward_holds_the_contract(
    kind: type[ClipReward], clip_folder: str, holds_the_contract: Callable[[Reward], None]
) -> None:
    holds_the_contract(loaded(kind(checkpoint=clip_folder)))


def test_clip_score_is_the_cosine_that_transformers_gives(
    clip_folder: str, images: Tensor, examples: list[Example]
) -> None:
    texts = [example.text for example in examples]
    expected = cosines(clip_folder, images, texts)
    torch.testing.assert_close(loaded(ClipScore(checkpoint=clip_folder))(images, examples).values, expected)


def test_the_published_variants_of_clip_score(clip_folder: str, images: Tensor, examples: list[Example]) -> None:
    shown = torch.cat([images, 1 - images, images.flip(1), torch.zeros_like(images), torch.ones_like(images)])
    many = examples * 5
    prefixed = cosines(clip_folder, shown, ["a circle of " + example.text for example in many])
    assert (prefixed < 0).any() and (prefixed > 0).any()
    paper = loaded(ClipScore(checkpoint=clip_folder, scale=2.5, clamp=True, prefix="a circle of "))
    torch.testing.assert_close(paper(shown, many).values, 2.5 * prefixed.clamp(min=0))


def test_pickscore_is_the_cosine_times_the_learned_scale(
    clip_folder: str, images: Tensor, examples: list[Example]
) -> None:
    expected = cosines(clip_folder, images, [example.text for example in examples])
    cosine = loaded(PickScore(checkpoint=clip_folder, variant="cosine"))(images, examples).values
    torch.testing.assert_close(cosine, expected)
    logit = loaded(PickScore(checkpoint=clip_folder))(images, examples).values
    torch.testing.assert_close(logit, math.exp(2.6592) * expected, rtol=1e-4, atol=1e-5)  # CLIPConfig's initial value


def test_a_prompt_beyond_the_limit_is_reported_and_its_end_changes_nothing(clip_folder: str, images: Tensor) -> None:
    reward = loaded(ClipScore(checkpoint=clip_folder))
    texts = ["a red circle " * 40, "a red circle " * 40 + "and a blue square", "a red circle"]
    scores = reward(images[:1].expand(3, -1, -1, -1), [Example(text) for text in texts])
    assert scores.parts["truncated"].tolist() == [1.0, 1.0, 0.0]
    assert scores.values[0] == scores.values[1] != scores.values[2]


def test_lint_reports_how_many_tokens_are_read_and_how_many_were_found(clip_folder: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def whys(**fields: str) -> list[str]:
        given = {"checkpoint": clip_folder, **fields}
        return [
            f.why for f in lint(file, "clip_score", {f"reward.clip_score.{k}": v for k, v in given.items()}, True)[1]
        ]

    words = AutoTokenizer.from_pretrained(clip_folder)
    fits = next(text for text in ("red " * n for n in range(30, 0, -1)) if len(words(text).input_ids) == 24)
    long = fits + "circle"
    found = len(words(long).input_ids)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{fits}\n{long}\n")
    assert found > 24
    assert whys() == [f"clip_score: reads 24 tokens, found {found}; the end of the prompt is ignored"]
    both = [24 + 1, found + 1]
    assert [int(why.split("found ")[1].split(";")[0]) for why in whys(prefix="a ")] == both


def test_an_empty_prompt_has_a_score(clip_folder: str, images: Tensor) -> None:
    assert loaded(ClipScore(checkpoint=clip_folder))(images[:1], [Example("")]).values.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_applies_to_the_towers_only(
    precision: str, clip_folder: str, images: Tensor, examples: list[Example]
) -> None:
    reward = loaded(PickScore(checkpoint=clip_folder, precision=precision))  # type: ignore[arg-type]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert reward._model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == half
    published = CLIPModel.from_pretrained(clip_folder)
    for name in ("visual_projection", "text_projection"):
        assert torch.equal(getattr(reward._model, name).weight, getattr(published, name).weight)
    reward.load(torch.device("cpu"))  # loading again must not round once more
    assert torch.equal(reward._model.visual_projection.weight, published.visual_projection.weight)
    scores = reward(images, examples)
    assert scores.values.dtype == torch.float32
    assert scores.values.unique().numel() == len(examples)
    assert (scores.values.to(half).float() != scores.values).any(), "the values need more than half precision"
    full = loaded(PickScore(checkpoint=clip_folder, precision="fp32"))(images, examples).values
    torch.testing.assert_close(scores.values, full, rtol=0.05, atol=0.3)


def test_an_autocast_around_it_changes_nothing(clip_folder: str, images: Tensor, examples: list[Example]) -> None:
    from alignkit.rewards.weighted import WeightedRewards

    rewards = WeightedRewards([("it", 1.0, loaded(ClipScore(checkpoint=clip_folder)))])
    plain = rewards(images, examples).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rewards(images, examples).values, plain)


def test_a_checkpoint_in_half_precision_is_read_as_float32(clip_folder: str, tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = tmp_path / "half"
    shutil.copytree(clip_folder, folder)
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(folder)
    reward = loaded(ClipScore(checkpoint=str(folder)))
    assert {p.dtype for p in reward._model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert not reward._model.training


def test_loading_twice_keeps_the_model(clip_folder: str) -> None:
    reward = loaded(ClipScore(checkpoint=clip_folder))
    model = reward._model
    reward.load(CPU)
    assert reward._model is model


def test_a_missing_folder_is_reported_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip_score: there is no folder '.*gone' to load the checkpoint from"):
        ClipScore(checkpoint=str(tmp_path / "gone")).check([])


def test_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"pickscore: the checkpoint .* is a bert model; expected .* CLIPModel"):
        loaded(PickScore(checkpoint=str(tmp_path)))


def test_a_folder_without_tokenizer_takes_the_public_one_and_another_is_refused(
    clip_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(clip_folder) / name, folder)
    same = ClipScore(checkpoint=str(folder), tokenizer=clip_folder)
    loaded(same)
    with pytest.raises(ConfigError, match=r"tokenizer .* knows no words|cannot load the tokenizer"):
        loaded(ClipScore(checkpoint=str(folder), tokenizer=str(folder)))


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(clip_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    shutil.copytree(clip_folder, folder)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(clip_folder)
    words.add_tokens([f"word{i}" for i in range(9)])
    words.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"knows \d+ tokens and the model \d+"):
        loaded(ClipScore(checkpoint=str(folder)))


def test_the_defaults_are_the_public_checkpoints() -> None:
    assert ClipScore().checkpoint == "openai/clip-vit-large-patch14"
    assert PickScore().checkpoint == "yuvalkirstain/PickScore_v1"


@pytest.mark.parametrize(("kind", "field"), [(PickScore, "variant"), (ClipScore, "precision")])
def test_a_field_out_of_range_is_refused(kind: type[ClipReward], field: str) -> None:
    with pytest.raises(ValueError, match=f'^{field}: found "odd", expected ".*" or ".*"$'):
        kind(**{field: "odd"})


def test_a_missing_weight_is_named(clip_folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "less"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    with pytest.raises(ConfigError, match=r"lacks visual_projection.weight and 0 more"):
        loaded(ClipScore(checkpoint=str(folder)))


def test_a_weight_of_another_shape_is_named_and_a_surplus_weight_is_ignored(
    clip_folder: str, tmp_path: Path, images: Tensor, examples: list[Example]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    more, plain = (loaded(ClipScore(checkpoint=str(one)))(images, examples) for one in (folder, clip_folder))
    assert torch.equal(more.values, plain.values)
    weights["visual_projection.weight"] = torch.zeros(5, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"has visual_projection.weight of shape \(5, 32\), expected \(16, 32\); exp"):
        loaded(ClipScore(checkpoint=str(folder)))
