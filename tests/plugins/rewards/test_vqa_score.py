from __future__ import annotations

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
from alignkit_rewards.vqa_score import FAMILIES, VqaScore, fitting_size

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = "Yes No user assistant a red circle small white heart left blue Does this figure show".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ c.text }} {% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}<|im_start|> assistant"
)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, randomized: Callable[..., Any]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", additional_special_tokens=SPECIAL[2:]
    )
    words.chat_template = TEMPLATE
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
    if request.param == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    elif request.param == "qwen3_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64,
                   "deepstack_visual_indexes": [0]}  # fmt: skip
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 32,
                   "fullatt_block_indexes": [1]}  # fmt: skip
    config = AutoConfig.for_model(
        request.param,
        text_config={"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
                     "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0},
        vision_config=vision, image_token_id=6, vision_start_token_id=4, vision_end_token_id=5, video_token_id=5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    randomized(AutoModelForImageTextToText.from_config(config)).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def loaded(folder: str, **fields: Any) -> VqaScore:
    reward = VqaScore(checkpoint=folder, **fields)
    reward.load(CPU)
    return reward


def test_it_holds_the_contract(folder: str, holds_the_contract: Callable[..., None]) -> None:
    holds_the_contract(loaded(folder), within=0.15)  # enlarged: more of the step is rounded away


def test_it_equals_the_probability_of_the_answer_under_the_whole_model(
    folder: str, images: Tensor, examples: list[Example]
) -> None:
    """The reference is computed for one image at a time, with the family's image processor and the model's logits."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    reward = loaded(folder)
    mean, std, fewest = FAMILIES[reward._model.config.model_type]
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": fewest, "longest_edge": 12_845_056}, image_mean=mean, image_std=std
    )
    expected = []
    for image, example in zip(images, examples, strict=True):
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        seen = processor(images=[Image.fromarray(levels)], return_tensors="pt")
        _, height, width = seen["image_grid_thw"][0].tolist()
        question = f'Does this figure show "{example.text}"? Please answer yes or no.'
        shown = "<|vision_start|>" + "<|image_pad|>" * (height * width // 4) + "<|vision_end|>"
        text = f"<|im_start|> user {shown} {question} <|im_end|> <|im_start|> assistant"
        ids = reward._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        logits = reward._model(input_ids=ids, mm_token_type_ids=(ids == 6).int(), **seen).logits
        expected.append(logits[0, -1].softmax(-1)[len(SPECIAL) + WORDS.index("Yes")])
    values = reward(images, examples)
    torch.testing.assert_close(values, torch.stack(expected), atol=1e-5, rtol=1e-3)
    assert ((values > 0) & (values < 1)).all()


def test_sizes_equal_those_of_the_familys_processor(folder: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for size in [(512, 512), (1024, 1024), (48, 80), (30, 30), (500, 300), (7000, 4000)]:
        ours = fitting_size(*size, 28, 56 * 56, 12_845_056)
        assert ours == smart_resize(*size, factor=28, min_pixels=56 * 56, max_pixels=12_845_056)


def test_the_last_layer_stays_in_float32(folder: str, images: Tensor, examples: list[Example]) -> None:
    half = loaded(folder, precision="bf16")
    assert half._model.dtype == torch.bfloat16
    values = half(images, examples)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, loaded(folder)(images, examples), atol=0.02, rtol=0.3)


def test_a_prompt_with_the_models_special_tokens_is_refused(folder: str, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="has 2 places for an image, expected 1"):
        loaded(folder)(images[:1], [Example("a red <|image_pad|>")])


def test_an_answer_of_several_tokens_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="vqa_score: answer is 'a red', which is 2 tokens, expected 1"):
        loaded(folder, answer="a red")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vqa_score: cannot load the checkpoint"):
        loaded(str(tmp_path))


def test_an_invalid_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vqa_score: question is 'What is this\?', expected"):
        VqaScore(question="What is this?")
    with pytest.raises(ValueError, match=r'^precision: found "int8", expected "auto" or'):
        VqaScore(precision="int8")  # type: ignore[arg-type]


def test_a_field_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_pixels: found 9, expected 3136 or more$"):
        VqaScore(max_pixels=9)
