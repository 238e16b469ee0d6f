"""Attribute binding: check with a VQA model that the image shows every object of the prompt with its own attributes.

A BLIP visual question answering model answers two kinds of yes/no questions about each noun phrase: the attribute
binding score of LaSRO ("Reward fine-tuning two-step diffusion models via learning differentiable latent-space surrogate
reward"). The paper does not print its questions, so the wording here is our own. T2I-CompBench multiplies the
probabilities instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import Parameter

from alignkit import Example, Reward, Scores, check_ranges
from alignkit.errors import ConfigError
from alignkit_rewards import blip
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    load_model,
    load_tokenizer,
    locate_file,
    state_of,
    tokenizer_source,
)
from alignkit_rewards.phrases import MATERIALS, TRAILING, Phrase, phrases
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize
from alignkit_rewards.published import converted

DEFAULT_JUDGE = "Salesforce/blip-vqa-capfilt-large"
Mode = Literal["hard", "soft", "product"]
QuestionForm = Literal["separately", "by_phrase"]
VERSION = 2
"""Increment with every change that can change a score: the wording of a question, or how phrases are found."""
_MAX_TOKENS = 35
"""Longest question that the model was trained on (BLIP's `max_length` for questions)."""


@dataclass
class AttributeBinding(Reward):
    """Mean answer to "is there a chair?" and "is the chair red?" over the noun phrases of the prompt, in [0, 1].

    Parts: "exists" and "attributes", the means over the two kinds of questions. An image is invalid if no object of
    its prompt has an attribute, if a question has a word that the VQA model does not know, or if a question is longer
    than the model reads (35 tokens).
    """

    judge: str = ""
    """Hub id or local folder of a BlipForQuestionAnswering and its tokenizer, or the file that BLIP's authors publish
    (model_base_vqa_capfilt_large.pth), which takes images of 480 pixels. Empty: Salesforce/blip-vqa-capfilt-large."""
    mode: Mode = "hard"
    """hard: yes is 1, no is 0, averaged (LaSRO); soft: the probability of yes against no, averaged; product: these
    probabilities multiplied (as T2I-CompBench does). Soft and product have a gradient."""
    questions: QuestionForm = "separately"
    """separately: "is there a chair?", "is the chair red?" (LaSRO); by_phrase: only "a red chair?", whose product over
    the phrases is T2I-CompBench's score."""
    precision: Precision = "fp32"
    """Precision of the VQA model: auto is bf16 on CUDA and fp32 elsewhere. Its last layer is always float32."""
    questions_per_pass: Annotated[int, Ge(1)] = 256
    """Questions answered in one forward pass. More needs more memory."""

    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._model: Any = None
        self._tokenizer: Any = None
        self._choice: list[int] = []

    @property
    def differentiable(self) -> bool:
        return self.mode != "hard"

    def check(self, examples: Iterable[Example]) -> None:
        check_local("attribute_binding", "judge", self.judge)
        for example in examples:
            if self.questions == "by_phrase":  # these questions also cover objects without attributes
                if not phrases(example):
                    raise ConfigError(
                        f"attribute_binding: the prompt {example.text!r} names no object to ask about; expected one, "
                        'such as "a chair" (or "phrases" in its metadata); change the prompt or leave it out'
                    )
            elif not any(phrase.attributes for phrase in phrases(example)):
                raise ConfigError(
                    f"attribute_binding: the prompt {example.text!r} has no attribute to bind; expected an object with "
                    'an attribute, such as "a red chair" (or "phrases" in its metadata); change the prompt or leave it '
                    "out"
                )

    def fingerprint(self) -> str:
        return f"attribute_binding {VERSION} {self.mode} {self.questions} {state_of(self._model, self._tokenizer)}"

    def explain(self, example: Example) -> list[str]:
        return [question for question, _ in self._questions(example)]

    def _questions(self, example: Example) -> list[tuple[str, bool]]:
        return (questions if self.questions == "separately" else phrase_questions)(phrases(example))

    def load(self, device: torch.device) -> None:
        if self._model is None:
            self._model, self._tokenizer = load_judge(self.judge or DEFAULT_JUDGE)
            self._choice = yes_no(self._tokenizer)
        # Copied before the model changes its precision, so the last layer is not rounded. The copy also separates it
        # from the word embeddings, which some checkpoints tie to it.
        last = self._model.text_decoder.cls.predictions.decoder
        weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
        self._model.to(device, backbone_dtype(self.precision, device))
        last.weight, last.bias = (Parameter(value.to(device), requires_grad=False) for value in (weight, bias))

    def yes_no_logits(self, images: Tensor, rows: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return logits (Q, 2) of yes and no to the questions `ids` (see `encode`) about the images `rows` (Q,)."""
        size = self._model.config.vision_config.image_size
        pixels = normalize(resize(images, size, size), CLIP_MEAN, CLIP_STD).to(self._model.vision_model.dtype)
        features = self._model.vision_model(pixel_values=pixels).last_hidden_state
        return answer_logits(self._model, self._choice, features, rows, ids, self.questions_per_pass)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of questions, as `yes_no_logits` takes them."""
        return encode(self._model, self._tokenizer, texts)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        by_image = [self._questions(example) for example in examples]
        texts = [text for some in by_image for text, _ in some]
        ids = self.encode(texts)
        flat = [(row, not about_attribute) for row, some in enumerate(by_image) for _, about_attribute in some]
        rows, exists = torch.tensor(flat, device=images.device, dtype=torch.long).reshape(-1, 2).unbind(1)
        exists = exists.bool()

        logits = self.yes_no_logits(images, rows, [some[:_MAX_TOKENS] for some in ids])
        yes = (logits[:, 0] > logits[:, 1]).float() if self.mode == "hard" else logits.softmax(-1)[:, 0]

        def mean(chosen: Tensor) -> Tensor:
            total = yes.new_zeros(len(examples)).index_add(0, rows[chosen], yes[chosen])
            return total / torch.bincount(rows[chosen], minlength=len(examples))  # NaN (0 / 0) without questions

        if self.mode == "product":
            values = torch.stack([yes[rows == row].prod() for row in range(len(examples))])
        else:
            values = mean(torch.ones_like(exists))
        scorable = {row for row, about_existence in flat if not about_existence or self.questions == "by_phrase"}
        reasons = ["" if row in scorable else "the prompt has no attribute to bind" for row in range(len(examples))]
        for (row, _), text, some in zip(flat, texts, ids, strict=True):
            if self._tokenizer.unk_token_id in some:
                reasons[row] = reasons[row] or f"the VQA model does not know every word of {text!r}"
            elif len(some) > _MAX_TOKENS:
                reasons[row] = reasons[row] or f"a question has {len(some)} tokens, the VQA model reads {_MAX_TOKENS}"
        valid = torch.tensor([not reason for reason in reasons], device=images.device)
        return Scores(values, valid, {"exists": mean(exists), "attributes": mean(~exists)}, reasons)


def questions(things: Sequence[Phrase]) -> list[tuple[str, bool]]:
    """Return the questions about each phrase in turn, each with whether it asks about an attribute."""
    out = []
    for thing in things:
        be, article = ("are", "") if thing.plural else ("is", "an " if _takes_an(thing.head) else "a ")
        out.append((f"{be} there {article}{thing.head}?", False))
        for word in thing.attributes:
            what = f"made of {MATERIALS[word]}" if word in MATERIALS else word
            out.append((f"{be} the {thing.head} {what}?", True))
    return out


def phrase_questions(things: Sequence[Phrase]) -> list[tuple[str, bool]]:
    """Return T2I-CompBench's question about each phrase, the phrase itself, and whether it has attributes."""
    out = []
    for thing in things:
        after = [attribute for attribute in thing.attributes if attribute.startswith(TRAILING)]
        before = [attribute for attribute in thing.attributes if attribute not in after]
        words = " ".join([*before, thing.head, *after])
        article = "" if thing.plural else "an " if _takes_an(words) else "a "
        out.append((f"{article}{words}?", bool(thing.attributes)))
    return out


def _takes_an(word: str) -> bool:
    """Whether the word begins with a vowel sound."""
    if word.startswith(("uni", "use", "ute", "uku", "eu", "one")):
        return False
    return word.startswith(("a", "e", "i", "o", "u", "hour", "heir", "honest"))


def load_judge(judge: str) -> tuple[Any, Any]:
    """Load a frozen float32 BlipForQuestionAnswering and its BertTokenizer. Raises ConfigError if that fails."""
    from transformers import BlipForQuestionAnswering

    file = locate_file("attribute_binding", "judge", judge)
    folder, words = judge, judge
    if file is not None:
        folder = str(converted("attribute_binding", file, BlipForQuestionAnswering, blip.base, blip.vqa))
        words = tokenizer_source("", str(file), "google-bert/bert-base-uncased")
    model = load_model("attribute_binding", "judge", folder, BlipForQuestionAnswering)
    vocabulary = model.config.text_config.vocab_size
    return model, load_tokenizer("attribute_binding", words, vocabulary, "judge", weights_file=file)


def yes_no(tokenizer: Any) -> list[int]:
    """Return the token ids of yes and no. Raises ConfigError unless each is a single token."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no")]
    if any(len(some) != 1 or some[0] == tokenizer.unk_token_id for some in ids):
        raise ConfigError(
            f"attribute_binding: the VQA model's tokenizer turns yes and no into {ids}, expected one token each"
        )
    return [some[0] for some in ids]


def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each question, unpadded, with [ENC] instead of [CLS], as in BLIP's training.

    BLIP appends [DEC] and then [ENC] to BERT's vocabulary; the tokenizers on the hub contain neither.
    """
    first = tokenizer.get_vocab().get("[ENC]", model.decoder_start_token_id + 1)
    found = tokenizer(list(texts), verbose=False).input_ids if texts else []
    return [[first, *ids[1:]] for ids in found]


def answer_logits(
    model: Any, choice: Sequence[int], features: Tensor, rows: Tensor, ids: Sequence[Sequence[int]], per_pass: int = 256
) -> Tensor:
    """Return the logits of the tokens `choice` at the decoder's first step, float32 (Q, len(choice)).

    `features` (N, L, D) are the vision tower's tokens; `rows` (Q,) gives the image that each of the Q questions `ids`
    is about. Questions of equal length share a batch, unpadded: BLIP's cross-attention ignores the padding mask.
    """
    order: list[int] = []
    logits = [features.new_zeros(0, len(choice), dtype=torch.float32)]
    for length in sorted({len(some) for some in ids}):
        bucket = [k for k, some in enumerate(ids) if len(some) == length]
        order += bucket
        for start in range(0, len(bucket), per_pass):
            part = bucket[start : start + per_pass]
            tokens = torch.tensor([ids[k] for k in part], device=features.device)
            encoded = model.text_encoder(input_ids=tokens, encoder_hidden_states=features[rows[part]]).last_hidden_state
            begin = torch.full((len(part), 1), model.decoder_start_token_id, device=features.device)
            decoded = model.text_decoder.bert(begin, encoder_hidden_states=encoded, use_cache=False, is_decoder=True)
            head = model.text_decoder.cls.predictions
            last = head.transform(decoded.last_hidden_state[:, 0])
            # Only the rows of `choice` of the last layer are needed; they are applied in float32.
            weight, bias = head.decoder.weight[choice].float(), head.decoder.bias[choice].float()
            logits.append(last.float() @ weight.T + bias)
    inverse = torch.tensor(order, device=features.device, dtype=torch.long).argsort()
    return torch.cat(logits)[inverse]
