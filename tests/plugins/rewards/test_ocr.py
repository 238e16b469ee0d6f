from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit_rewards.ocr import AFTER_IMAGE, BEFORE_IMAGE, Ocr, edit_distance, similarity, target_text

CPU = torch.device("cpu")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
QUOTED = [Example('a sign "OPEN"'), Example('a cup that says "red tri"'), Example("x", {"target": "angle"}),
          Example("a shop “ima d”")]  # fmt: skip
NEARLY = [Example('a sign "triangle"'), Example('a cup that says "circle bob"'), Example("x", {"target": "assistant"}),
          Example("a shop “cab”")]  # fmt: skip
"""Prompts whose targets partly match the text that the small model generates."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, randomized: Callable[..., Any], byte_pairs: Any) -> str:
    """A GOT-OCR2 for images of 128 pixels, encoded as 2 x 2 tokens."""
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

    words = byte_pairs("a red circle OCR system user assistant image triangle", SPECIAL)
    config = GotOcr2Config(
        vision_config={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 128, "patch_size": 16, "window_size": 4, "global_attn_indexes": [1],
                       "mlp_dim": 64},
        text_config={"model_type": "qwen2", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        image_token_index=words.convert_tokens_to_ids("<imgpad>"),
    )  # fmt: skip
    model: Any = randomized(GotOcr2ForConditionalGeneration(config))
    with torch.no_grad():  # so that the generated text depends on the image
        model.model.multi_modal_projector.multimodal_projector.weight.mul_(20)
    path = tmp_path_factory.mktemp("got")
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def load(folder: str) -> Callable[..., Ocr]:
    def make(**fields: Any) -> Ocr:
        reward = Ocr(**{"checkpoint": folder, "max_new_tokens": 12, **fields})
        reward.load(CPU)
        return reward

    return make


def test_values_worked_out_by_hand() -> None:
    assert similarity("open", "We are OPEN\n24 h") == 1
    assert similarity("open", "o p\nEn") == 1
    assert similarity("open", "oben") == 0.75
    assert similarity("open", "") == 0
    assert similarity("open", "a whole page of other words") == 0
    assert similarity("hello", "helo!") == 1 - 2 / 5
    assert similarity("", "anything") == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_the_edit_distance_of_known_pairs(first: str, second: str, expected: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == expected


def test_the_edit_distance_is_the_recursive_definition() -> None:
    from functools import cache

    @cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    letters = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(letters.choice(list("abc"), letters.integers(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (Example('a sign "OPEN now" and a door "closed"'), "opennow"),
        (Example("a sign “Öffnen”"), "öffnen"),
        (Example('a sign "OPEN"', {"target": "Closed "}), "closed"),
        (Example("a sign that says OPEN"), ""),
        (Example('a sign ""'), ""),
        (Example('a 5" screen'), ""),
        (Example('a sign "OPEN"', {"target": ""}), ""),
    ],
)
def test_the_target_text_of_a_prompt(example: Example, expected: str) -> None:
    assert target_text(example) == expected


def test_it_holds_the_contract(load: Any, holds_the_contract: Callable[..., None]) -> None:
    holds_the_contract(load(), examples=NEARLY)


def test_an_image_is_read_once_when_scores_are_cached(
    load: Any, folder: str, tmp_path: Path, is_scored_once: Callable[..., None]
) -> None:
    from transformers import GotOcr2ForConditionalGeneration

    other = shutil.copytree(folder, tmp_path / "other")
    model: Any = GotOcr2ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(other)
    fields = [{"max_new_tokens": 11}, {"precision": "bf16"}, {"checkpoint": str(other)}]
    is_scored_once(load, fields, NEARLY)
    same = shutil.copytree(folder, tmp_path / "same")
    assert load(checkpoint=str(same)).fingerprint() == load().fingerprint()


def test_it_reads_the_same_text_as_the_model_with_its_own_processor(load: Any, folder: str, images: Tensor) -> None:
    """The model gets one image at a time, prepared by transformers."""
    from transformers import AutoTokenizer, GotOcr2ForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(size={"height": 128, "width": 128})
    words = AutoTokenizer.from_pretrained(folder)
    model = GotOcr2ForConditionalGeneration.from_pretrained(folder).eval()
    expected = []
    for image in images:
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        pixels = processor(Image.fromarray(levels), return_tensors="pt")["pixel_values"]
        ids = words(
            BEFORE_IMAGE + "<imgpad>" * 4 + AFTER_IMAGE, add_special_tokens=False, return_tensors="pt"
        ).input_ids
        generated = model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=12, do_sample=False,
            eos_token_id=[words.convert_tokens_to_ids("<|im_end|>"), 2], pad_token_id=1,
        )  # fmt: skip
        expected.append(words.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip())
    found = load().read(images)
    assert found == expected
    assert len(set(found)) > 1


def test_the_request_equals_that_of_the_models_processor(folder: str) -> None:
    from transformers import AutoTokenizer, GotOcr2Processor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2Processor(GotOcr2ImageProcessorPil(), AutoTokenizer.from_pretrained(folder))
    _, (text,), *_ = processor.prepare_inputs_layout(
        images=Image.new("RGB", (8, 8)), format=False, images_kwargs={"crop_to_patches": False}
    )
    assert text == BEFORE_IMAGE + "<imgpad>" + AFTER_IMAGE


def test_the_score_compares_the_recognised_text_with_the_target(
    load: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = load()
    monkeypatch.setattr(reward, "read", lambda shown: ["We are Open", "tri", "angel", ""])
    scores = reward(images, QUOTED)
    torch.testing.assert_close(scores.values, torch.tensor([1.0, 0.5, 0.6, 0.0]))
    assert scores.parts["found"].tolist() == [1, 0, 0, 0]
    assert scores.valid.all()


def test_a_prompt_without_target_text_is_refused_and_never_scored(load: Any, images: Tensor) -> None:
    reward = load()
    with pytest.raises(ConfigError, match="ocr: the prompt 'a door' asks for no text in the image; expected text in"):
        reward.check([QUOTED[0], Example("a door")])
    with pytest.raises(ConfigError, match="ocr: prompt 'a door': metadata target is 7, expected a string"):
        reward.check([Example("a door", {"target": 7})])
    assert reward(images[:2], [QUOTED[0], Example("a door")]).valid.tolist() == [True, False]


def test_a_tokenizer_without_the_models_special_tokens_is_refused(folder: str, tmp_path: Path, byte_pairs: Any) -> None:
    shutil.copytree(folder, tmp_path / "got")
    byte_pairs("a red circle").save_pretrained(tmp_path / "got")
    with pytest.raises(
        ConfigError, match=r"ocr: the tokenizer of .* lacks <\|im_end\|>; expected the tokenizer of a G"
    ):
        Ocr(checkpoint=str(tmp_path / "got")).load(CPU)


def test_another_kind_of_model_is_refused(clip_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"ocr: the checkpoint .* is a clip model; expected a hub id or a folder"):
        Ocr(checkpoint=clip_folder).load(CPU)


def test_a_field_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_new_tokens: found 0, expected 1 or more$"):
        Ocr(max_new_tokens=0)
    with pytest.raises(ValueError, match=r'^precision: found "int8", expected "auto" or "fp32" or "bf16" or "fp16"$'):
        Ocr(precision="int8")  # type: ignore[arg-type]
