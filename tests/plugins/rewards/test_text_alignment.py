from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import RobertaForMaskedLM

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit_rewards.bertscore import TextEncoder, bertscore
from alignkit_rewards.text_alignment import REQUESTS, TextAlignment

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def captioner(
    tmp_path_factory: pytest.TempPathFactory, randomized: Callable[..., Any], byte_pairs: Any, vocabulary: str
) -> str:
    """A Florence-2 for images of 64 pixels: 2 x 2 positions and their mean, and the published decoding settings."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration, GenerationConfig

    words = byte_pairs(vocabulary, ["<image>"])
    config = Florence2Config(
        vision_config={"depths": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2),
                       "num_groups": (2, 2, 2, 2), "window_size": 4, "projection_dim": 32},
        text_config={"model_type": "bart", "vocab_size": len(words), "d_model": 32, "encoder_layers": 2,
                     "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256,
                     "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model: Any = randomized(Florence2ForConditionalGeneration(config))
    with torch.no_grad():  # so that the caption depends on the image
        for layer in model.model.language_model.decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(4)
    model.generation_config = GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_bos_token_id=0,
        forced_eos_token_id=2, num_beams=3, no_repeat_ngram_size=3, early_stopping=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("florence")
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def load(captioner: str, encoder: str) -> Callable[..., TextAlignment]:
    def make(**fields: Any) -> TextAlignment:
        small = {"captioner": captioner, "encoder": encoder, "layer": 2, "resolution": SIDE, "max_new_tokens": 12}
        reward = TextAlignment(**{**small, **fields})
        reward.load(CPU)
        return reward

    return make


def test_it_holds_the_contract(load: Any, holds_the_contract: Callable[[Reward], None]) -> None:
    holds_the_contract(load())


def test_an_image_is_captioned_once_when_scores_are_cached(
    load: Any, captioner: str, encoder: str, tmp_path: Path, is_scored_once: Callable[..., None]
) -> None:
    decoding = shutil.copytree(captioner, tmp_path / "decoding") / "generation_config.json"
    decoding.write_text(decoding.read_text().replace('"no_repeat_ngram_size": 3', '"no_repeat_ngram_size": 2'))
    other = shutil.copytree(encoder, tmp_path / "encoder")
    model: Any = RobertaForMaskedLM.from_pretrained(encoder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(other)
    fields: list[dict[str, Any]] = [
        {"task": "caption"}, {"resolution": 32}, {"num_beams": 1}, {"max_new_tokens": 11}, {"layer": 3},
        {"measure": "recall"}, {"reference": "a {}"}, {"baseline": 0.5}, {"precision": "bf16"},
        {"captioner": str(decoding.parent)}, {"encoder": str(other)},
    ]  # fmt: skip
    assert {name for one in fields for name in one} == {f.name for f in dataclasses.fields(TextAlignment)}
    is_scored_once(load, fields)
    same = shutil.copytree(captioner, tmp_path / "same")
    assert load(captioner=str(same)).fingerprint() == load().fingerprint()


def test_the_captions_equal_those_of_the_model_with_its_own_processor(
    load: Any, captioner: str, images: Tensor
) -> None:
    """The model gets one image at a time, prepared by transformers."""
    from transformers import AutoTokenizer, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    shown = CLIPImageProcessorPil(
        size=square, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    shown.image_seq_length = 5
    words = AutoTokenizer.from_pretrained(captioner)
    words.image_token, words.image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
    processor = Florence2Processor(shown, words)
    model = Florence2ForConditionalGeneration.from_pretrained(captioner).eval()
    expected = []
    for image in images:
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        inputs = processor(text="<DETAILED_CAPTION>", images=Image.fromarray(levels), return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=12, num_beams=3, do_sample=False)
        expected.append(words.decode(generated[0], skip_special_tokens=True).strip())
    found = load().captions(images)
    assert found == expected
    assert len(set(found)) == len(images)


def test_the_requests_equal_those_of_the_models_processor() -> None:
    import inspect

    from transformers import Florence2Processor

    source = inspect.getsource(Florence2Processor.__init__)
    for task, request in REQUESTS.items():
        assert f'"<{task.upper()}>": "{request}"' in source


def test_the_score_is_bertscore_of_caption_and_prompt(
    load: Any, encoder: str, images: Tensor, examples: list[Example]
) -> None:
    reward = load(measure="recall", reference="The image contains {}", baseline=0.5)
    network = TextEncoder("it", "encoder", encoder, 2)
    captions = reward.captions(images)
    expected = [
        [v.item() for v in bertscore(network([c]), network([f"The image contains {e.text}"]))]
        for c, e in zip(captions, examples, strict=True)
    ]
    scores = reward(images, examples)
    precision, recall, f1 = torch.tensor(expected).unbind(1)
    torch.testing.assert_close(scores.values, (recall - 0.5) / 0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.parts["precision"], precision, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.parts["recall"], recall, atol=1e-5, rtol=1e-5)
    again = load(reference="The image contains {}")(images, examples)
    torch.testing.assert_close(again.values, f1, atol=1e-5, rtol=1e-5)


def test_an_empty_caption_scores_zero_and_is_valid(
    load: Any, images: Tensor, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = load()
    captions = reward.captions(images)
    monkeypatch.setattr(reward, "captions", lambda shown: [captions[0], "", *captions[2:]])
    scores = reward(images, examples)
    assert scores.valid.all() and scores.values[1] == 0 and scores.values[0] > 0


def test_an_empty_prompt_is_refused_and_never_scored(load: Any, images: Tensor) -> None:
    reward = load()
    with pytest.raises(ConfigError, match="text_alignment: the prompt ' ' has no word"):
        reward.check([Example("a red circle"), Example(" ")])
    assert reward(images[:2], [Example("a red circle"), Example(" ")]).valid.tolist() == [True, False]


def test_a_long_prompt_is_truncated_and_reported_as_such(load: Any, images: Tensor) -> None:
    long = " ".join(["red"] * 200)
    scores = load()(images[:1].expand(3, -1, -1, -1), [Example(long), Example(long + " circle"), Example("a circle")])
    assert scores.parts["truncated"].tolist() == [1, 1, 0]
    assert load().tokens(Example(long)) == (80, 202) and load(reference="a {}").tokens(Example(long)) == (80, 203)
    torch.testing.assert_close(scores.values[0], scores.values[1])


@pytest.mark.parametrize("fields", [{"num_beams": 1}, {"task": "more_detailed_caption"}, {"resolution": 32}])
def test_the_fields_of_the_captioner_change_the_captions(load: Any, images: Tensor, fields: dict[str, Any]) -> None:
    assert load(**fields).captions(images) != load().captions(images)


def test_half_precision_keeps_the_comparison_in_float32(load: Any, images: Tensor, examples: list[Example]) -> None:
    half = load(precision="bf16")
    assert half._model.dtype == half._comparison._encoder.model.dtype == torch.bfloat16
    vectors = half._comparison._encoder([example.text for example in examples]).vectors
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]))
    assert half(images, examples).values.isfinite().all()


@pytest.mark.parametrize(("field", "value"), [("task", "poem"), ("measure", "f2"), ("precision", "int8")])
def test_an_invalid_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f'^{field}: found "{value}", expected ".*" or ".*"$'):
        TextAlignment(**{field: value})  # type: ignore[arg-type]


def test_a_reference_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_alignment: reference is 'the prompt', expected"):
        TextAlignment(reference="the prompt")


@pytest.mark.parametrize(
    ("field", "value"),
    [("resolution", 0), ("num_beams", 0), ("max_new_tokens", 0), ("layer", 0), ("baseline", 1.0)],
)
def test_a_field_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found {value}, expected"):
        TextAlignment(**{field: value})  # type: ignore[arg-type]


def test_a_missing_folder_or_another_model_is_refused(load: Any, encoder: str, tmp_path: Path) -> None:
    for field in ("captioner", "encoder"):
        with pytest.raises(ConfigError, match=f"there is no folder '/nowhere' to load the {field} from"):
            TextAlignment(**{field: "/nowhere"}).check([])
    with pytest.raises(ConfigError, match=r"text_alignment: the captioner .* is a roberta model"):
        load(captioner=encoder)


def test_it_is_registered_as_a_reward_without_a_gradient() -> None:
    cls = default_registry().get("reward", "text_alignment")
    assert cls is TextAlignment and not TextAlignment().differentiable
