"""Tokenizer and text encoder: a CLIPTokenizer and a small CLIPTextModel."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from alignkit_shapes.scenes import COLORS, SHAPES

LENGTH = 24
WIDTH = 96
START, END = "<|startoftext|>", "<|endoftext|>"
OTHER_WORDS = [
    "a",
    "an",
    "and",
    "of",
    "left",
    "right",
    "above",
    "below",
    "the",
    "large",
    "small",
    ",",
    ".",
    "?",
    "star",
]
"""With "star", which the shipped weights were first trained with."""


def tokenizer() -> CLIPTokenizer:
    """Return a byte-pair tokenizer in which each word of the world is one token; other text is split into bytes."""
    words = [*OTHER_WORDS, *COLORS, *SHAPES]
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # Given in a fixed order, because equally frequent pairs are merged in that order; otherwise it depends on hashes.
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=letters, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(words, trainer)
    import json

    learned = json.loads(model.to_str())["model"]
    vocab: dict[str, int] = {}
    for token in [*letters, *learned["vocab"], START, END]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder of two layers, 96 wide; it is trained together with the teacher's UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH, hidden_act="gelu",
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
