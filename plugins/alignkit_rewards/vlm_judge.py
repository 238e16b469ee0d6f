"""A vision language model as the judge, behind any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, ...).

Four ways to ask: yes or no, read off the probabilities of the first token (as VQAScore does, Lin et al. 2404.01291,
but against no); a rubric, answered in JSON; VIEScore (Ku et al. 2312.14867); and for a caption, which is compared with
the prompt by BERTScore (as DDPO did with LLaVA, Black et al. 2305.13301). The wording is ours throughout.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit_rewards.answers import Unusable, content, first_choice, first_object, grades, scores, viescore, yes_and_no
from alignkit_rewards.bertscore import Comparison, Measure
from alignkit_rewards.checkpoints import Precision
from alignkit_rewards.endpoint import Connection, Endpoint, as_png

Mode = Literal["yes_no", "rubric", "viescore", "caption"]

RUBRIC = (
    'This image was drawn for the prompt "{prompt}". Judge each of these with a whole number from {low} (worst) to '
    "{high} (best):\n{criteria}\n"
    'Answer with one JSON object and nothing else: "reasoning", one sentence, then each name above with its number.'
)
CONSISTENCY = (
    'This image was drawn for the prompt "{prompt}". How well does it show what the prompt says, every thing, '
    "attribute, number and relation of it? Judge with a number from 0 (it has nothing to do with the prompt) to 10 (it "
    'shows all of it).\nAnswer with one JSON object and nothing else: "reasoning", one sentence, then "score", a list '
    "of this one number."
)
QUALITY = (
    "This image was drawn by a program. Judge two things with a number from 0 to 10 each: how natural it looks in "
    "layout, light, shadow and distance (0 not at all, 10 entirely), and how free it is of artifacts such as "
    "distortion, blur, seams, odd bodies or parts that do not fit together (0 full of them, 10 none).\nAnswer with one "
    'JSON object and nothing else: "reasoning", one sentence, then "score", a list of these two numbers.'
)
AGAIN = "That was not what was asked for. Answer with the JSON object alone: no other text, every number in its range."

_TOP = 20
"""The most tokens whose probability OpenAI tells; vLLM's default limit too."""
_CAPTION = 256
"""Tokens of a caption, as text_alignment allows it by default."""


@dataclass
class VlmJudge(Reward):
    """What a vision language model behind an OpenAI-compatible endpoint says of image and prompt. An answer that
    cannot be read makes the image invalid, never a number."""

    url: str = "http://127.0.0.1:8000/v1"
    """The endpoint, up to what stands before /chat/completions."""
    model: str = ""
    """The model's name there; required."""
    mode: Mode = "yes_no"
    """yes_no: the probability of yes against no as the first token, in [0, 1]; rubric: the mean over `criteria`, scaled
    to [0, 1]; viescore: the root of semantic consistency times perceptual quality, in [0, 10]; caption: BERTScore of
    what the model says about the image against the prompt, at most 1."""
    question: str = 'Does this image show "{}"? Answer with one word, yes or no.'
    """What mode yes_no asks; {} stands for the prompt."""
    criteria: dict[str, str] = field(
        default_factory=lambda: {
            "alignment": "does it show every thing of the prompt, each with its attributes, number and place?",
            "quality": "is it well made, whole and free of artifacts?",
        }
    )
    """What mode rubric judges: a name for each, and what is asked."""
    scale: tuple[int, int] = (1, 5)
    """The lowest and the highest number of mode rubric."""
    request: str = "Say in one sentence what this image shows."
    """What mode caption asks; the model is not told the prompt."""
    encoder: str = "FacebookAI/roberta-large"
    """Mode caption: hub id or local folder of the model behind BERTScore, as for text_alignment; it runs here."""
    layer: int = 17
    """Mode caption: the layer that is compared."""
    measure: Measure = "f1"
    """Mode caption: f1, precision (is what the caption says in the prompt?) or recall (the reverse; DDPO)."""
    reference: str = "{}"
    """Mode caption: what the caption is compared with; {} stands for the prompt. DDPO: "The image contains {}"."""
    baseline: float = 0.0
    """Mode caption: b of (score - b) / (1 - b), which spreads the values."""
    precision: Precision = "auto"
    """Mode caption: of the encoder; auto is bf16 on CUDA and fp32 elsewhere."""
    structured: bool = True
    """Whether the endpoint holds the model to the JSON schema of the answer; set it to false for one that cannot."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of each request, as {chat_template_kwargs = {enable_thinking = false}}; they win."""
    key_env: str = "ALIGNKIT_JUDGE_KEY"
    """The environment variable with the endpoint's key; nothing is sent if it is not set."""
    concurrency: int = 8
    """Images judged at once."""
    timeout: float = 60.0
    """Seconds to wait for an answer, and after which a request is not tried again."""
    retries: int = 2
    """Further tries of one request, with longer and longer waits between; after them the whole batch is asked again, as
    `[scoring]` says (retries, retry_limit), before the run stops."""
    give_up_after: int = 16
    """The run stops when so many images in a row got no answer that can be read."""

    deterministic: ClassVar[bool] = False  # batching moves the last digits, and what is served may change
    slow: ClassVar[bool] = True
    name: ClassVar[str] = "vlm_judge"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"vlm_judge: mode is {self.mode!r}, expected one of {', '.join(get_args(Mode))}")
        if "{}" not in self.question:
            raise ConfigError(f"vlm_judge: question is {self.question!r}, expected a text with {{}} for the prompt")
        if not self.criteria or not all(name.isidentifier() and name != "reasoning" for name in self.criteria):
            raise ConfigError(
                f"vlm_judge: criteria are {', '.join(map(repr, self.criteria)) or 'empty'}; expected one name or more, "
                'each a single word, and none "reasoning"'
            )
        if self.scale[0] >= self.scale[1]:
            raise ConfigError(f"vlm_judge: scale is {list(self.scale)}, expected the lowest number and a higher one")
        if self.give_up_after < 1:
            raise ConfigError(f"vlm_judge: give_up_after is {self.give_up_after}, expected 1 or more")
        low, high = None if self.mode == "caption" else 0.0, 10.0 if self.mode == "viescore" else 1.0
        self.bounds = (low, high)  # type: ignore[misc]  # the mode decides
        self._comparison = Comparison(
            self.name, self.encoder, self.layer, self.measure, self.reference, self.baseline, self.precision
        )
        self._endpoint = Endpoint(
            self.name, self.url, "key_env", self.key_env, self.concurrency, self.timeout, self.retries
        )
        self._in_vain = 0
        """Images since the last one with a usable answer."""

    def check(self, examples: Iterable[Example]) -> None:
        """Ask the endpoint for its models, where it lists them: one that is not there is found before weights load."""
        if not self.model:
            raise ConfigError("vlm_judge: model is missing; set reward.vlm_judge.model to its name at the endpoint")
        if self.mode == "caption":
            self._comparison.check(examples)
        with self._endpoint.connect() as connection:
            answer = connection.ask("GET", "/models")
        listed = answer.body.get("data") if answer.status == 200 and isinstance(answer.body, dict) else None
        names = [str(one.get("id")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if names and self.model not in names:
            shown = ", ".join(names[:10])
            raise ConfigError(f"vlm_judge: {self.url} has no model {self.model!r}; it lists {shown}")

    def load(self, device: torch.device) -> None:
        if self.mode == "caption":
            self._comparison.load(device)

    def tokens(self, example: Example) -> tuple[int, int] | None:
        return self._comparison.tokens(example) if self.mode == "caption" else None

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        urls = ["data:image/png;base64," + base64.b64encode(file).decode() for file in as_png(images)]
        asked = list(zip(urls, (example.text for example in examples), strict=True))
        with self._endpoint.connect() as connection:
            judged = connection.map(lambda one: self._judge(connection, *one), asked)
        for found in judged:
            self._in_vain = self._in_vain + 1 if isinstance(found, Unusable) else 0
            if self._in_vain >= self.give_up_after:
                raise AlignkitError(
                    f"vlm_judge: {self.model} at {self.url} gave no usable answer for {self._in_vain} images in a "
                    f"row (the last: {found}); choose another mode or model, or raise give_up_after"
                )
        valid = torch.tensor([not isinstance(found, Unusable) for found in judged])
        reasons = [str(found) if isinstance(found, Unusable) else "" for found in judged]
        if self.mode == "caption":
            captions = [found if isinstance(found, str) else "" for found in judged]
            compared = self._comparison(captions, examples)
            return replace(compared, valid=compared.valid & valid.to(compared.valid.device), reasons=reasons)
        numbers = [found if isinstance(found, tuple) else (math.nan, {}) for found in judged]
        names = dict.fromkeys(name for _, parts in numbers for name in parts)
        return Scores(
            torch.tensor([value for value, _ in numbers], dtype=torch.float32),
            valid,
            {name: torch.tensor([parts.get(name, math.nan) for _, parts in numbers]) for name in names},
            reasons,
        )

    def _judge(self, connection: Connection, image: str, text: str) -> tuple[float, dict[str, float]] | str | Unusable:
        """The value of one image and its parts, or its caption; or why there is none."""
        try:
            if self.mode == "caption":
                return self._caption(connection, image)
            if self.mode == "yes_no":
                return self._yes_no(connection, image, text)
            if self.mode == "rubric":
                return self._rubric(connection, image, text)
            return self._viescore(connection, image, text)
        except Unusable as reason:
            return reason

    def _yes_no(self, connection: Connection, image: str, text: str) -> tuple[float, dict[str, float]]:
        options = {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        choice = self._complete(connection, _about(image, self.question.replace("{}", text)), options)
        yes, no = yes_and_no(choice)
        return yes / (yes + no), {"yes_or_no": yes + no}

    def _rubric(self, connection: Connection, image: str, text: str) -> tuple[float, dict[str, float]]:
        low, high = self.scale
        listed = "\n".join(f"- {name}: {meaning}" for name, meaning in self.criteria.items())
        question = RUBRIC.format(prompt=text, low=low, high=high, criteria=listed)
        properties = {name: {"type": "number"} for name in self.criteria}
        parts = self._json(
            connection, image, question, properties, lambda found: grades(found, self.criteria, low, high)
        )
        return sum((value - low) / (high - low) for value in parts.values()) / len(parts), parts

    def _viescore(self, connection: Connection, image: str, text: str) -> tuple[float, dict[str, float]]:
        properties = {"score": {"type": "array", "items": {"type": "number"}}}
        question = CONSISTENCY.format(prompt=text)
        consistency = self._json(connection, image, question, properties, lambda found: scores(found, 1))
        quality = self._json(connection, image, QUALITY, properties, lambda found: scores(found, 2))
        value, semantic, perceptual = viescore(consistency, quality)
        return value, {"semantic_consistency": semantic, "perceptual_quality": perceptual}

    def _caption(self, connection: Connection, image: str) -> str:
        options = {"max_completion_tokens": _CAPTION}
        caption = content(self._complete(connection, _about(image, self.request), options)).strip()
        if not caption:
            raise Unusable("the caption is empty")
        return caption

    def _json(self, connection: Connection, image: str, question: str, properties: dict[str, Any], read: Any) -> Any:
        """What `read` makes of the object that the model answers with, asked a second time if it cannot be read."""
        schema = {
            "type": "object",
            "properties": {"reasoning": {"type": "string"}, **properties},
            "required": ["reasoning", *properties],
            "additionalProperties": False,
        }
        options: dict[str, Any] = {"max_completion_tokens": 512}
        if self.structured:
            named = {"name": "judgement", "strict": True, "schema": schema}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        messages = _about(image, question)
        said = content(self._complete(connection, messages, options))
        try:
            return read(first_object(said))
        except Unusable:
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": AGAIN}]
            return read(first_object(content(self._complete(connection, messages, options))))

    def _complete(self, connection: Connection, messages: list[Any], options: dict[str, Any]) -> Mapping[str, Any]:
        """The model's answer: the first choice. Raises Unusable where there is none."""
        body = {"model": self.model, "messages": messages, "temperature": 0, **options, **self.extra}
        answer = connection.ask("POST", "/chat/completions", body)
        if answer.status == 404:
            raise ConfigError(
                f"vlm_judge: {self.url} has no model {self.model!r}, or no chat completions (status 404: "
                f"{answer.reason}); correct model or url"
            )
        return first_choice(answer)


def _about(url: str, question: str) -> list[Any]:
    """One message: the image, then the question."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
