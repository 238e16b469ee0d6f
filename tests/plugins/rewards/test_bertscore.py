"""BERTScore compared with a pairwise computation and with values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from alignkit.errors import ConfigError
from alignkit_rewards.bertscore import Embedded, TextEncoder, bertscore

CPU = torch.device("cpu")
WORDS = "a red circle small white heart an orange square and black triangle left of blue the is in"
CANDIDATES = ["a small red circle", "the heart is white", "a", "a blue square left of a red circle and a heart"]
REFERENCES = ["a red circle", "a small white heart, an orange square and a black triangle", "the Kürbis 🎃", "a circle"]


@pytest.fixture(scope="module", params=["roberta", "bert", "deberta"])
def folder(
    request: Any, tmp_path_factory: pytest.TempPathFactory, randomized: Callable[..., Any], byte_pairs: Any
) -> str:
    """An encoder with four layers and 40 token positions."""
    from transformers import AutoConfig, AutoModel

    words = byte_pairs(WORDS)
    further = {}
    if request.param == "deberta":
        further = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 40}
    config = AutoConfig.for_model(
        request.param, vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=42, pad_token_id=1, bos_token_id=0, eos_token_id=2, **further,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    randomized(AutoModel.from_config(config)).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def embedded(vectors: list[list[float]], length: int) -> Embedded:
    """Return one text whose first and last vectors are the start and end tokens, padded to `length`."""
    rows = torch.nn.functional.normalize(torch.tensor(vectors), dim=-1)
    matchable = torch.arange(length) < len(rows)
    counted = matchable & (torch.arange(length) > 0) & (torch.arange(length) < len(rows) - 1)
    padded = torch.cat([rows, torch.ones(length - len(rows), rows.shape[1])])
    return Embedded(padded[None], matchable[None], counted[None], torch.zeros(1))


def test_values_worked_out_by_hand() -> None:
    ends = [-1.0, 0.0]
    candidate = embedded([ends, [1.0, 0.0], [3.0, 4.0], ends], 6)
    reference = embedded([ends, [0.0, 1.0], [-0.0, -1.0], [1.0, 0.0], ends], 7)
    precision, recall, f1 = bertscore(candidate, reference)
    # Candidate: (1, 0) matches itself and (.6, .8) matches (0, 1) with .8. Reference: (0, 1) matches (.6, .8) with .8,
    # (0, -1) matches the start and end tokens with 0, which may be matched, and (1, 0) matches itself.
    assert precision.item() == pytest.approx(0.9)
    assert recall.item() == pytest.approx((0.8 + 0.0 + 1.0) / 3)
    assert f1.item() == pytest.approx(2 * 0.9 * 0.6 / 1.5)


def test_an_empty_candidate_or_reference_scores_zero() -> None:
    empty, full = embedded([[1.0, 0.0], [1.0, 0.0]], 4), embedded([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 5)
    assert [value.item() for value in bertscore(empty, full)] == [0, 0, 0]
    assert [value.item() for value in bertscore(full, empty)] == [0, 0, 0]


def test_f1_is_zero_where_a_part_is_negative() -> None:
    one = embedded([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 3)
    other = embedded([[-1.0, -1.0], [-1.0, 0.0], [-1.0, -1.0]], 3)
    precision, recall, f1 = bertscore(one, other)
    assert precision < 0 and recall < 0 and f1 == 0


def test_it_is_the_mean_of_the_best_cosines_of_each_pair_alone(folder: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = TextEncoder("it", "encoder", folder, layer=3)
    found = bertscore(encoder(CANDIDATES), encoder(REFERENCES))
    model, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def vectors(text: str) -> Tensor:
        before = " " if model.config.model_type == "roberta" else ""
        ids = words(before + text, return_tensors="pt").input_ids
        output = model(ids, output_hidden_states=True)
        hidden: Tensor = output.hidden_states[3][0]
        return hidden

    for i, (candidate, reference) in enumerate(zip(CANDIDATES, REFERENCES, strict=True)):
        c, r = vectors(candidate), vectors(reference)
        cosine = torch.tensor([[cosine_similarity(x, y, dim=0) for y in r] for x in c])
        precision, recall = cosine[1:-1].max(1).values.mean(), cosine[:, 1:-1].max(0).values.mean()
        expected = torch.stack([precision, recall, 2 * precision * recall / (precision + recall)])
        torch.testing.assert_close(torch.stack([value[i] for value in found]), expected, atol=1e-5, rtol=1e-5)


def test_a_text_matches_itself_and_swapping_the_two_swaps_precision_and_recall(folder: str) -> None:
    encoder = TextEncoder("it", "encoder", folder, layer=2)
    candidates, references = encoder(CANDIDATES), encoder(REFERENCES)
    for value in bertscore(references, references):
        torch.testing.assert_close(value, torch.ones(4), atol=1e-5, rtol=0)
    (p, r, f), (q, s, g) = bertscore(candidates, references), bertscore(references, candidates)
    torch.testing.assert_close((p, r, f), (s, q, g))
    assert (p - r).abs().max() > 1e-3


def test_roberta_tokenizes_the_first_word_like_any_other(folder: str) -> None:
    encoder = TextEncoder("it", "encoder", folder, layer=2)
    first = encoder.tokenizer(encoder._prefix + "red").input_ids[1]
    inner = encoder.tokenizer("a red").input_ids[2]
    assert (first == inner) == (encoder.model.config.model_type == "roberta")


def test_a_long_text_is_truncated_and_reported_as_such(folder: str) -> None:
    encoder = TextEncoder("it", "encoder", folder, layer=2)
    assert encoder.limit == (40 if encoder.model.config.model_type == "roberta" else 42)
    words = ["a"] * (encoder.limit - 2)
    fits, longer, other = encoder([" ".join(words), " ".join([*words, "red"]), " ".join([*words, "blue"])]).vectors
    truncated = encoder([" ".join(words), " ".join([*words, "red"])]).truncated
    assert truncated.tolist() == [0, 1]
    torch.testing.assert_close(fits, longer)
    torch.testing.assert_close(longer, other)


def test_surrounding_blanks_change_nothing_and_an_empty_text_has_no_tokens(folder: str) -> None:
    encoder = TextEncoder("it", "encoder", folder, layer=2)
    found = encoder(["a red circle", "  a red circle\n", " ", ""])
    assert torch.equal(found.vectors[0], found.vectors[1])
    assert found.counted.sum(1).tolist() == [3, 3, 0, 0]


def test_a_missing_layer_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"it: layer is 17, but the encoder .* has 4 layers"):
        TextEncoder("it", "encoder", folder, layer=17)


def test_another_kind_of_model_is_refused(tmp_path: Path, clip_folder: str) -> None:
    with pytest.raises(
        ConfigError, match=r"it: the encoder .* is a clip model, expected an encoder with a list of lay"
    ):
        TextEncoder("it", "encoder", clip_folder, layer=1)
