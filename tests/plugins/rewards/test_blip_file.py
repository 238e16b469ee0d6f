"""A VQA model from the file that BLIP's authors publish, compared with a reimplementation of their network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import BlipForQuestionAnswering

from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit_rewards import blip
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize
from alignkit_shapes.build.judge import config, tokenizer
from blip_reference import Named, Text, Vision

CPU = torch.device("cpu")


class Predictions(nn.Module):
    def __init__(self, text: Any) -> None:
        super().__init__()
        width = text.hidden_size
        self.bias = nn.Parameter(torch.zeros(text.vocab_size))
        self.transform = Named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
        self.decoder = nn.Linear(width, text.vocab_size)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        transform: Any = self.transform
        out: Tensor = self.decoder(transform.LayerNorm(gelu(transform.dense(x))))
        return out


class Published(nn.Module):
    """The published network, with the names of its state dict."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        text, vision = config.text_config, config.vision_config
        self.visual_encoder, self.text_encoder = Vision(vision), Text(text, vision.hidden_size)
        decoder = Text(text, text.hidden_size)
        words: Any = decoder.embeddings
        predictions = Predictions(text)
        predictions.decoder.weight = words.word_embeddings.weight
        self.text_decoder = Named(bert=decoder, cls=Named(predictions=predictions))

    def forward(self, pixels: Tensor, ids: Tensor, first: int) -> Tensor:
        """Logits (1, words) of the answer's first token."""
        decoder: Any = self.text_decoder
        read = self.text_encoder(ids, self.visual_encoder(pixels))
        out: Tensor = decoder.cls.predictions(decoder.bert(torch.tensor([[first]]), read)[:, 0])
        return out


@pytest.fixture
def published(tmp_path: Path, randomized: Callable[[nn.Module], nn.Module]) -> tuple[Published, Path]:
    """A small network and its file in the authors' layout, next to its configuration and vocabulary."""
    words = tokenizer()
    architecture = config(len(words), words.convert_tokens_to_ids("[DEC]"))
    model = randomized(Published(architecture))
    assert isinstance(model, Published)
    folder = tmp_path / "published"
    architecture.save_pretrained(folder)
    words.save_pretrained(folder)
    torch.save({"model": model.state_dict()}, folder / "model_base_vqa_capfilt_large.pth")
    return model, folder / "model_base_vqa_capfilt_large.pth"


def loaded(file: Path) -> AttributeBinding:
    reward = AttributeBinding(judge=str(file), mode="soft")
    reward.load(CPU)
    return reward


def test_it_answers_as_the_published_network(
    published: tuple[Published, Path], images: Tensor, examples: list[Example]
) -> None:
    model, file = published
    reward = loaded(file)
    words, size = reward._tokenizer, reward._model.config.vision_config.image_size
    yes, no, enc, dec = words.convert_tokens_to_ids(["yes", "no", "[ENC]", "[DEC]"])
    pixels = normalize(resize(images, size, size), CLIP_MEAN, CLIP_STD)
    wanted = []
    for image, example in zip(pixels[:3], examples[:3], strict=True):
        each = []
        for question in reward.explain(example):
            ids = torch.tensor([[enc, *words(question).input_ids[1:]]])
            each.append(model(image[None], ids, dec)[0, [yes, no]].softmax(-1)[0])
        wanted.append(torch.stack(each).mean())
    values = reward(images[:3], examples[:3]).values
    torch.testing.assert_close(values, torch.stack(wanted).detach(), atol=1e-4, rtol=1e-4)
    assert values.std() > 1e-3


def test_the_published_layout_converts_without_remainder() -> None:
    architecture = blip.base()
    with torch.device("meta"):
        state = Published(architecture).state_dict()
        wanted = {k: v.shape for k, v in BlipForQuestionAnswering(architecture).state_dict().items()}
    found, head = blip.vqa(state)
    assert {k: v.shape for k, v in found.items()} == wanted and not head
    assert found["vision_model.embeddings.position_embedding"].shape == (1, 901, 768)


def test_a_caption_model_in_its_place_is_refused(published: tuple[Published, Path]) -> None:
    model, file = published
    torch.save({"model": {k: v for k, v in model.state_dict().items() if not k.startswith("text_encoder.")}}, file)
    with pytest.raises(ConfigError, match=r"attribute_binding: the checkpoint .* lacks text_encoder\.embeddings\.\w+"):
        loaded(file)


def test_the_configuration_of_a_tokenizer_next_to_the_file_is_not_used_for_the_model(
    published: tuple[Published, Path],
) -> None:
    _, file = published
    (file.parent / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"lacks vision_model\.encoder\.layers\.4"):
        loaded(file)


def test_an_unreadable_configuration_is_reported_in_one_line(published: tuple[Published, Path]) -> None:
    _, file = published
    (file.parent / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"attribute_binding: cannot load the configuration .*config\.json") as caught:
        loaded(file)
    assert "\n" not in str(caught.value)
