"""Small checkpoints of the published classes, with random weights spread widely enough that scores differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.cache import ScoreCache
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards
from alignkit.testing import check_reward
from alignkit_shapes.models import WEIGHTS

TEXTS = [
    "a red circle",
    "a small white heart, an orange square and a black triangle",
    "a red circle left of a blue square",
    "ein großer Kürbis 🎃",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIPModel for images of 32 pixels and texts of 24 tokens, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    # The shipped tokenizer: newly learned byte pairs may come in another order, and tests need cosines of both signs.
    words = CLIPTokenizer.from_pretrained(WEIGHTS / "shapes_teacher" / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 24, "hidden_act": "gelu",
                     "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
                     "pad_token_id": words.pad_token_id, "projection_dim": 16},
        vision_config={**size, "image_size": 32, "patch_size": 8, "hidden_act": "gelu", "projection_dim": 16},
        projection_dim=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    _randomized(CLIPModel(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def byte_pairs() -> Callable[..., Any]:
    """Return a factory of byte-pair tokenizers like BART's and RoBERTa's, in which each of `words` is one token.

    `special` are additional special tokens. Texts become <s> ... </s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(words: str, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
        first = ["<s>", "<pad>", "</s>", "<unk>"]
        vocabulary = {token: i for i, token in enumerate([*first, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        merges: dict[tuple[str, str], None] = {}
        for word in [blank + plain for blank in ("Ġ", "") for plain in dict.fromkeys(words.split())]:
            for end in range(1, len(word)):
                merges[word[:end], word[end]] = None
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
        inner = Tokenizer(models.BPE(vocabulary, list(merges)))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
            cls_token="<s>", sep_token="</s>", additional_special_tokens=list(special),
        )  # fmt: skip

    return make


Randomized = Callable[[torch.nn.Module], torch.nn.Module]


@pytest.fixture(scope="session")
def randomized() -> Randomized:
    """Return a function that randomises all weights of a model, always in the same way."""
    return _randomized


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif parameter.dim() and not name.endswith("weight"):  # CLIP's class embedding
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def vocabulary() -> str:
    """Words that are one token each."""
    return (
        "a red circle small white heart an orange square and black triangle left of blue the is in image Describe shown"
    )


@pytest.fixture(scope="session")
def encoder(
    tmp_path_factory: pytest.TempPathFactory, randomized: Callable[..., Any], byte_pairs: Any, vocabulary: str
) -> str:
    """A RoBERTa of three layers for BERTScore."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    words = byte_pairs(vocabulary)
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=82, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("roberta")
    randomized(RobertaForMaskedLM(config)).save_pretrained(path)  # as published: with an unused head, without pooler
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Four coarse images (4, 3, 48, 48), as 8-bit files hold them."""
    coarse = torch.rand(len(TEXTS), 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=48) * 255).round() / 255


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return [Example(text) for text in TEXTS]


@pytest.fixture
def is_scored_once(
    images: Tensor, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Check that a second, identical reward with the same score cache never calls its model, unless `fields` differ."""

    def check(load: Callable[..., Any], fields: Sequence[dict[str, Any]], examples: list[Example] = examples) -> None:
        cache = ScoreCache(tmp_path / "scores.sqlite")

        def scored(**given: Any) -> tuple[Scores, int]:
            reward, calls = load(**given), []
            generate = reward._model.generate
            monkeypatch.setattr(reward._model, "generate", lambda **k: calls.append(1) or generate(**k))
            rewards = WeightedRewards([("it", 1.0, reward)], scoring=Scoring(cache=cache))
            rewards.load(torch.device("cpu"))
            return rewards(images, examples), len(calls)

        (first, once), (again, never) = scored(), scored()
        assert once == 1 and never == 0 and again.valid.all()
        assert torch.equal(first.values, again.values)
        assert first.parts.keys() == again.parts.keys()
        for other in fields:
            assert scored(**other)[1] == 1, other
        cache.close()

    return check


@pytest.fixture
def holds_the_contract(images: Tensor, examples: list[Example], tmp_path: Path) -> Callable[..., None]:
    """Check the contract of every reward, that images score differently, and that a PNG file scores like its tensor."""

    def check(reward: Reward, within: float = 0.05, examples: list[Example] = examples) -> None:
        check_reward(reward, images, examples, within=within)
        weighted = WeightedRewards([("it", 1.0, reward)])
        whole = weighted(images, examples).values.detach()
        assert whole.std() > 1e-4
        file = tmp_path / "image.png"
        levels = (images[1] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(file)
        again = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None].float() / 255
        torch.testing.assert_close(weighted(again, examples[1:2]).values[0].detach(), whole[1], atol=1e-5, rtol=1e-5)

    return check
