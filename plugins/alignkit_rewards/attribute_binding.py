"""Attribute binding: does the image show every thing of the prompt, each with its own attributes?

Two kinds of yes/no questions for each noun phrase, asked of a BLIP visual question answering model: the attribute
binding score of LaSRO ("Reward fine-tuning two-step diffusion models via learning differentiable latent-space surrogate
reward"). The wording is ours: the paper prints none. T2I-CompBench multiplies probabilities instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit_rewards import blip
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    check_precision,
    load_model,
    load_tokenizer,
    locate_file,
    state_of,
    tokenizer_source,
)
from alignkit_rewards.phrases import BEHIND, MATERIALS, Phrase, phrases
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize
from alignkit_rewards.published import converted

DEFAULT_JUDGE = "Salesforce/blip-vqa-capfilt-large"
Mode = Literal["hard", "soft", "product"]
Asked = Literal["separately", "by_phrase"]
VERSION = 2
"""Goes up when a score can change: another wording of a question, another way to find phrases."""
_MAX_TOKENS = 35
"""As the model was trained (BLIP's `max_length` for questions)."""


@dataclass
class AttributeBinding(Reward):
    """Mean answer to "is there a chair?" and "is the chair red?" over the noun phrases of the prompt, in [0, 1].

    Parts: "exists" and "attributes", the means over either kind of question. A prompt in which no thing has an
    attribute cannot be scored, nor one with a word that the judge does not know or a question of more tokens than it
    reads (35); these are invalid.
    """

    judge: str = ""
    """Hub id or local folder of a BlipForQuestionAnswering and its tokenizer, or the file that BLIP's authors publish
    (model_base_vqa_capfilt_large.pth), which sees 480 pixels. Empty stands for Salesforce/blip-vqa-capfilt-large."""
    mode: Mode = "hard"
    """hard: yes is 1, no is 0, averaged (LaSRO); soft: the probability of yes against no, averaged; product: these
    probabilities multiplied (as T2I-CompBench does). Soft and product have a gradient."""
    questions: Asked = "separately"
    """separately: "is there a chair?", "is the chair red?" (LaSRO); by_phrase: "a red chair?" alone, whose product over
    the phrases is T2I-CompBench's score."""
    precision: Precision = "fp32"
    """The judge's precision: auto is bf16 on CUDA and fp32 elsewhere. Its last layer is always float32."""
    questions_per_pass: int = 256
    """Questions answered together, a memory choice."""

    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"attribute_binding: mode is {self.mode!r}, expected one of {', '.join(get_args(Mode))}")
        if self.questions not in get_args(Asked):
            expected = ", ".join(get_args(Asked))
            raise ConfigError(f"attribute_binding: questions is {self.questions!r}, expected one of {expected}")
        check_precision("attribute_binding", self.precision)
        if self.questions_per_pass < 1:
            raise ConfigError(f"attribute_binding: questions_per_pass is {self.questions_per_pass}, expected 1 or more")
        self.differentiable = self.mode != "hard"  # type: ignore[misc]  # the mode decides, not the class
        self._model: Any = None
        self._tokenizer: Any = None
        self._choice: list[int] = []

    def check(self, examples: Iterable[Example]) -> None:
        check_local("attribute_binding", "judge", self.judge)
        for example in examples:
            if self.questions == "by_phrase":  # which asks about things without attributes as well
                if not phrases(example):
                    raise ConfigError(
                        f"attribute_binding: the prompt {example.text!r} names no thing to ask about; expected one, as "
                        '"a chair" (or "phrases" in its metadata); change the prompt or leave it out'
                    )
            elif not any(phrase.attributes for phrase in phrases(example)):
                raise ConfigError(
                    f"attribute_binding: the prompt {example.text!r} has no attribute to bind; expected a thing with "
                    'an attribute, as "a red chair" (or "phrases" in its metadata); change the prompt or leave it out'
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
        # Not rounded on the way, and no longer the same numbers as the word embeddings, where the checkpoint ties them.
        last = self._model.text_decoder.cls.predictions.decoder
        weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
        self._model.to(device, backbone_dtype(self.precision, device))
        last.weight, last.bias = (Parameter(value.to(device), requires_grad=False) for value in (weight, bias))

    def ask(self, images: Tensor, rows: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits (Q, 2) of yes and no to the questions `ids` (see `encode`) about the images `rows` (Q,)."""
        size = self._model.config.vision_config.image_size
        pixels = normalize(resize(images, size, size), CLIP_MEAN, CLIP_STD).to(self._model.vision_model.dtype)
        features = self._model.vision_model(pixel_values=pixels).last_hidden_state
        return answers(self._model, self._choice, features, rows, ids, self.questions_per_pass)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of questions, as `ask` takes them."""
        return encode(self._model, self._tokenizer, texts)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        asked = [self._questions(example) for example in examples]
        texts = [text for some in asked for text, _ in some]
        ids = self.encode(texts)
        flat = [(row, not about) for row, some in enumerate(asked) for _, about in some]
        rows, exists = torch.tensor(flat, device=images.device, dtype=torch.long).reshape(-1, 2).unbind(1)
        exists = exists.bool()

        logits = self.ask(images, rows, [some[:_MAX_TOKENS] for some in ids])
        yes = (logits[:, 0] > logits[:, 1]).float() if self.mode == "hard" else logits.softmax(-1)[:, 0]

        def mean(chosen: Tensor) -> Tensor:
            total = yes.new_zeros(len(examples)).index_add(0, rows[chosen], yes[chosen])
            return total / torch.bincount(rows[chosen], minlength=len(examples))  # 0 / 0 is NaN: there was no question

        if self.mode == "product":
            values = torch.stack([yes[rows == row].prod() for row in range(len(examples))])
        else:
            values = mean(torch.ones_like(exists))
        bound = {row for row, first in flat if not first or self.questions == "by_phrase"}
        reasons = ["" if row in bound else "the prompt has no attribute to bind" for row in range(len(examples))]
        for (row, _), text, some in zip(flat, texts, ids, strict=True):
            if self._tokenizer.unk_token_id in some:
                reasons[row] = reasons[row] or f"the judge does not know every word of {text!r}"
            elif len(some) > _MAX_TOKENS:
                reasons[row] = reasons[row] or f"a question has {len(some)} tokens, the judge reads {_MAX_TOKENS}"
        valid = torch.tensor([not reason for reason in reasons], device=images.device)
        return Scores(values, valid, {"exists": mean(exists), "attributes": mean(~exists)}, reasons)


def questions(things: Sequence[Phrase]) -> list[tuple[str, bool]]:
    """The questions about each phrase in turn, and whether they ask for an attribute."""
    out = []
    for thing in things:
        be, article = ("are", "") if thing.plural else ("is", "an " if _takes_an(thing.head) else "a ")
        out.append((f"{be} there {article}{thing.head}?", False))
        for word in thing.attributes:
            what = f"made of {MATERIALS[word]}" if word in MATERIALS else word
            out.append((f"{be} the {thing.head} {what}?", True))
    return out


def phrase_questions(things: Sequence[Phrase]) -> list[tuple[str, bool]]:
    """T2I-CompBench's question about each phrase: the phrase itself, which asks for an attribute if it has one."""
    out = []
    for thing in things:
        behind = [attribute for attribute in thing.attributes if attribute.startswith(BEHIND)]
        before = [attribute for attribute in thing.attributes if attribute not in behind]
        words = " ".join([*before, thing.head, *behind])
        article = "" if thing.plural else "an " if _takes_an(words) else "a "
        out.append((f"{article}{words}?", bool(thing.attributes)))
    return out


def _takes_an(word: str) -> bool:
    """Whether the word begins with a vowel as it is spoken."""
    if word.startswith(("uni", "use", "ute", "uku", "eu", "one")):
        return False
    return word.startswith(("a", "e", "i", "o", "u", "hour", "heir", "honest"))


def load_judge(judge: str) -> tuple[Any, Any]:
    """A frozen float32 BlipForQuestionAnswering and its BertTokenizer. Raises ConfigError if there is no such thing."""
    from transformers import BlipForQuestionAnswering

    file = locate_file("attribute_binding", "judge", judge)
    folder, words = judge, judge
    if file is not None:
        folder = str(converted("attribute_binding", file, BlipForQuestionAnswering, blip.base, blip.vqa))
        words = tokenizer_source("", str(file), "google-bert/bert-base-uncased")
    model = load_model("attribute_binding", "judge", folder, BlipForQuestionAnswering)
    vocabulary = model.config.text_config.vocab_size
    return model, load_tokenizer("attribute_binding", words, vocabulary, "judge", beside=file)


def yes_no(tokenizer: Any) -> list[int]:
    """The ids of yes and no. Raises ConfigError unless each is one token."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no")]
    if any(len(some) != 1 or some[0] == tokenizer.unk_token_id for some in ids):
        raise ConfigError(
            f"attribute_binding: the judge's tokenizer turns yes and no into {ids}, expected one token each"
        )
    return [some[0] for some in ids]


def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each question, unpadded, with [ENC] in the place of [CLS]: so BLIP was trained.

    BLIP appends [DEC] and then [ENC] to BERT's vocabulary; the tokenizers on the hub know neither.
    """
    first = tokenizer.get_vocab().get("[ENC]", model.decoder_start_token_id + 1)
    found = tokenizer(list(texts), verbose=False).input_ids if texts else []
    return [[first, *ids[1:]] for ids in found]


def answers(
    model: Any, choice: Sequence[int], features: Tensor, rows: Tensor, ids: Sequence[Sequence[int]], per_pass: int = 256
) -> Tensor:
    """Logits of the tokens `choice` at the decoder's first step, float32 (Q, len(choice)).

    `features` (N, L, D) are the vision tower's tokens, `rows` (Q,) says about which image each of the Q questions
    `ids` asks. Questions of one length go together, unpadded: BLIP's cross-attention ignores the padding mask.
    """
    order: list[int] = []
    logits = [features.new_zeros(0, len(choice), dtype=torch.float32)]
    for length in sorted({len(some) for some in ids}):
        bucket = [k for k, some in enumerate(ids) if len(some) == length]
        order += bucket
        for start in range(0, len(bucket), per_pass):
            part = bucket[start : start + per_pass]
            tokens = torch.tensor([ids[k] for k in part], device=features.device)
            read = model.text_encoder(input_ids=tokens, encoder_hidden_states=features[rows[part]]).last_hidden_state
            begin = torch.full((len(part), 1), model.decoder_start_token_id, device=features.device)
            said = model.text_decoder.bert(begin, encoder_hidden_states=read, use_cache=False, is_decoder=True)
            head = model.text_decoder.cls.predictions
            last = head.transform(said.last_hidden_state[:, 0])
            # Of the last layer no more than the rows in question, in float32.
            weight, bias = head.decoder.weight[choice].float(), head.decoder.bias[choice].float()
            logits.append(last.float() @ weight.T + bias)
    back = torch.tensor(order, device=features.device, dtype=torch.long).argsort()
    return torch.cat(logits)[back]
