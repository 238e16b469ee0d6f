from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import alignkit
from alignkit.errors import AlignkitError, ConfigError, TransientError
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit.testing.expect import differences
from alignkit.training import checkpoint
from alignkit_rewards.bertscore import TextEncoder, bertscore
from alignkit_rewards.vlm_judge import Mode, VlmJudge
from servers import Endpoint, brightness, running

CPU = torch.device("cpu")
DDPO = {"evaluate.prompts": "", "algorithm.name": "ddpo", "algorithm.samples": 2}
"""Settings of a short run."""
Say = Callable[[float, str], Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_rewards.endpoint.FIRST_WAIT", 0.01)
    monkeypatch.delenv("ALIGNKIT_JUDGE_KEY", raising=False)


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """Return a function that starts endpoints; they stop after the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(say: Say, **settings: Any) -> Endpoint:
            server = Endpoint(say, **settings)
            stack.enter_context(running(server))
            return server

        yield start


def judge(server: Endpoint, **fields: Any) -> VlmJudge:
    reward = VlmJudge(url=server.url, model="judge", **fields)
    reward.check_server([])
    reward.load(CPU)
    return reward


def logit(p: float) -> dict[str, float]:
    """Return the token log-probabilities of a model with P(yes) = .9 p, P(no) = .9 (1 - p) and .1 for another word."""
    p = min(max(p, 1e-9), 1 - 1e-9)  # black and white images have 0 and 1
    return {" Yes": math.log(0.7 * p), "yes": math.log(0.2 * p), "No": math.log(0.9 * (1 - p)), "It": math.log(0.1)}


def by_brightness(mode: str) -> Say:
    if mode == "yes_no":
        return lambda light, _: logit(light)
    if mode == "rubric":
        return lambda light, _: json.dumps({"reasoning": "-", "alignment": 1 + 4 * light, "quality": 5 - 4 * light**2})
    return lambda light, question: json.dumps(
        {"reasoning": "-", "score": [10 * light] if "prompt" in question else [10 - light, 5 + light]}
    )


EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "yes_no": lambda light: light,
    "rubric": lambda light: (light + 1 - light**2) / 2,
    "viescore": lambda light: (10 * light * (5 + light)).sqrt(),
}


@pytest.mark.parametrize("mode", list(EXPECTED))
def test_it_holds_the_contract(
    mode: Any, endpoint: Callable[..., Endpoint], holds_the_contract: Callable[..., None]
) -> None:
    reward = judge(endpoint(by_brightness(mode)), mode=mode)
    assert not reward.differentiable and not reward.deterministic
    holds_the_contract(reward)


@pytest.mark.parametrize("mode", list(EXPECTED))
def test_the_value_follows_the_formula(
    mode: Any, images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    reward = judge(endpoint(by_brightness(mode)), mode=mode)
    found = reward(images, examples)
    light = brightness(images)
    torch.testing.assert_close(found.values, EXPECTED[mode](light).float())
    parts = {
        "yes_no": {"yes_or_no": torch.full((4,), 0.9)},
        "rubric": {"alignment": 1 + 4 * light, "quality": 5 - 4 * light**2},
        "viescore": {"semantic_consistency": 10 * light, "perceptual_quality": 5 + light},
    }[mode]
    assert set(found.parts) == set(parts)
    for name, values in parts.items():
        torch.testing.assert_close(found.parts[name], values.float())
    low, high = reward.bounds
    assert low == 0 and high is not None and bool(((found.values >= low) & (found.values <= high)).all())


CAPTIONS = ["a red circle", "a small white heart and a black triangle", "a blue square", "an orange heart"]


def captioned(light: float, request: str) -> str:
    """Return one of the captions, depending on the image only."""
    return CAPTIONS[int(light * 4000) % 4]


@pytest.fixture
def small(encoder: str) -> dict[str, Any]:
    """The fields of mode caption with a small encoder."""
    return {"mode": "caption", "encoder": encoder, "layer": 2}


def test_captions_hold_the_contract(
    endpoint: Callable[..., Endpoint], holds_the_contract: Callable[..., None], small: dict[str, Any]
) -> None:
    holds_the_contract(judge(endpoint(captioned), **small))


def test_a_caption_is_compared_with_the_prompt_by_bertscore(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint], encoder: str, small: dict[str, Any]
) -> None:
    server = endpoint(captioned)
    network = TextEncoder("it", "encoder", encoder, 2)
    captions = [captioned(light, "") for light in brightness(images).tolist()]
    assert len(set(captions)) > 1
    expected = [
        [v.item() for v in bertscore(network([c]), network([f"The image contains {e.text}"]))]
        for c, e in zip(captions, examples, strict=True)
    ]
    precision, recall, f1 = torch.tensor(expected).unbind(1)
    found = judge(server, reference="The image contains {}", measure="recall", baseline=0.5, **small)(images, examples)
    torch.testing.assert_close(found.values, (recall - 0.5) / 0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.parts["precision"], precision, atol=1e-5, rtol=1e-5)
    found = judge(server, reference="The image contains {}", **small)(images, examples)
    torch.testing.assert_close(found.values, f1, atol=1e-5, rtol=1e-5)
    requests = [one["messages"][0]["content"][1]["text"] for one in server.requests]
    assert set(requests) == {"Say in one sentence what this image shows."}


def test_an_image_without_a_caption_is_invalid(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint], small: dict[str, Any]
) -> None:
    darkest = brightness(images).min().item()
    server = endpoint(lambda light, request: " \n" if light < darkest + 1e-4 else captioned(light, request))
    scores = judge(server, **small)(images, examples)
    assert scores.valid.tolist() == (brightness(images) > darkest).tolist()
    assert set(scores.reasons) == {"", "the caption is empty"}
    whole = judge(endpoint(captioned), **small)(images, examples)
    torch.testing.assert_close(scores.values[scores.valid], whole.values[scores.valid])


def test_an_empty_prompt_is_refused_in_mode_caption(endpoint: Callable[..., Endpoint], small: dict[str, Any]) -> None:
    server = endpoint(captioned)
    judge(server).check([Example(" ")])
    with pytest.raises(ConfigError, match="vlm_judge: the prompt ' ' has no word to compare a caption with"):
        judge(server, **small).check([Example(" ")])


def test_the_requests_that_are_sent(images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]) -> None:
    server = endpoint(by_brightness("yes_no"))
    judge(server, question="Is it {} or {}?", extra={"temperature": 0.5, "seed": 3})(images[:1], [Example("a {} cat")])
    (body,) = server.requests
    assert body["messages"][0]["content"][1]["text"] == "Is it a {} cat or a {} cat?"
    wanted = {"model": "judge", "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 0.5}
    assert {**body, **wanted, "seed": 3} == body

    server = endpoint(lambda *_: '{"style": 3}')
    text = Example('a "sign" in {braces}')
    found = judge(server, mode="rubric", criteria={"style": "is it a woodcut?"}, scale=(1, 5))(images[:1], [text])
    assert found.values.tolist() == [0.5]
    (body,) = server.requests
    question = body["messages"][0]["content"][1]["text"]
    assert text.text in question and "- style: is it a woodcut?" in question and "1 (worst) to 5 (best)" in question
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reasoning", "style"] and body["temperature"] == 0
    judge(server, mode="rubric", criteria={"style": "?"}, structured=False)(images[:1], [text])
    assert "response_format" not in server.requests[-1]

    server = endpoint(by_brightness("viescore"))
    judge(server, mode="viescore")(images[:1], [text])
    first, second = (body["messages"][0]["content"][1]["text"] for body in server.requests)
    assert text.text in first and text.text not in second


def test_an_answer_that_cannot_be_parsed_is_requested_once_more(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    server = endpoint(lambda *_: "It is lovely." if len(server.requests) == 1 else '{"alignment": 5, "quality": 3}')
    found = judge(server, mode="rubric")(images[:1], examples[:1])
    assert found.valid.tolist() == [True] and found.values.tolist() == [0.75]
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and server.requests[1]["messages"][1]["content"] == "It is lovely."
    assert "JSON object alone" in server.requests[1]["messages"][2]["content"]

    silent = endpoint(lambda *_: "It is lovely.")
    assert judge(silent, mode="rubric")(images[:1], examples[:1]).valid.tolist() == [False]
    assert len(silent.requests) == 2


@pytest.mark.parametrize("mode", list(EXPECTED))
def test_one_image_without_an_answer_is_invalid_and_the_others_count(
    mode: Any, images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    darkest = int(brightness(images).argmin())
    usual = by_brightness(mode)
    least = float(brightness(images).min()) + 1e-6

    def say(light: float, question: str) -> Any:
        if light > least:
            return usual(light, question)
        return {"Sorry": -0.1} if mode == "yes_no" else (400, "content policy")

    server = endpoint(say)
    found = judge(server, mode=mode)(images, examples)
    assert found.valid.tolist() == [i != darkest for i in range(4)]
    why = (
        "the answer begins with neither yes nor no, but with 'sorry'" if mode == "yes_no" else "status 400: content pol"
    )
    assert [reason.startswith(why) if reason else None for reason in found.reasons] == [
        True if i == darkest else None for i in range(4)
    ]
    kept = found.valid
    torch.testing.assert_close(found.values[kept], EXPECTED[mode](brightness(images)).float()[kept])


@pytest.mark.parametrize(
    ("say", "why"),
    [
        ({"The": -0.1}, "begins with neither yes nor no, but with 'the'"),
        ("yes", "the answer has no log-probabilities"),
        ((400, "this model takes no images"), "status 400: this model takes no images"),
    ],
)
def test_a_model_without_usable_answers_stops_the_run_in_one_line(
    say: Any, why: str, images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    reward = judge(endpoint(lambda *_: say), give_up_after=6)
    assert not reward(images, examples).valid.any()
    with pytest.raises(AlignkitError, match=f"no usable answer for 6 images in a row .the last: .*{why}") as caught:
        reward(images, examples)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, TransientError)


def test_a_usable_answer_resets_the_count(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    brightest = float(brightness(images).max()) - 1e-6
    reward = judge(endpoint(lambda light, _: logit(light) if light > brightest else {"?": 0.0}), give_up_after=4)
    for _ in range(5):
        assert reward(images, examples).valid.sum() == 1


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_concurrency_are_open_at_once(
    concurrency: int, images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    server = endpoint(by_brightness("yes_no"), slow=0.1)
    found = judge(server, concurrency=concurrency)(images.repeat(3, 1, 1, 1), examples * 3)
    assert server.most_at_once == concurrency and len(server.requests) == 12
    torch.testing.assert_close(found.values, brightness(images).float().repeat(3))


def test_a_busy_endpoint_is_retried_a_few_times(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    server = endpoint(lambda light, _: (429, "slow down") if len(server.requests) < 3 else logit(light))
    assert judge(server)(images[:1], examples[:1]).valid.all() and len(server.requests) == 3
    server.requests.clear()
    server.respond = lambda *_: (503, "overloaded")
    with pytest.raises(TransientError, match=r"/chat/completions in 3 tries \(status 503: overloaded\)"):
        judge(server, retries=2)(images[:1], examples[:1])
    assert len(server.requests) == 3


def test_the_key_is_sent_and_never_shown(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    server = endpoint(lambda light, _: logit(light))
    judge(server)(images[:1], examples[:1])
    assert "Authorization" not in server.headers[-1]  # no key is sent to an arbitrary server
    judge(server, key_env="OPENAI_API_KEY")(images[:1], examples[:1])
    assert server.headers[-1]["Authorization"] == "Bearer sk-mine"
    server.respond = lambda *_: (401, "Incorrect API key provided: sk-mine")
    with pytest.raises(ConfigError, match=r"the one in the environment variable OPENAI_API_KEY .*\*\*\*") as caught:
        judge(server, key_env="OPENAI_API_KEY")(images[:1], examples[:1])
    assert "sk-mine" not in str(caught.value)


def test_an_unknown_model_is_reported_before_weights_load(
    images: Tensor, examples: list[Example], endpoint: Callable[..., Endpoint]
) -> None:
    server = endpoint(by_brightness("yes_no"))
    with pytest.raises(ConfigError, match=r"has no model 'jugde', expected one of judge, other"):
        VlmJudge(url=server.url, model="jugde").check_server([])
    with pytest.raises(ConfigError, match=r"vlm_judge: model is missing; set reward.vlm_judge.model"):
        VlmJudge(url=server.url).check([])
    with pytest.raises(ConfigError, match=r"no model 'jugde', or no chat completions \(status 404: The model `jugde`"):
        VlmJudge(url=server.url, model="jugde")(images[:1], examples[:1])
    server.models = None  # not every endpoint lists them
    assert judge(server)(images[:1], examples[:1]).valid.all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reference", "an image", "reference is 'an image', expected a text with {} for the prompt"),
        ("question", "Is it nice?", "question is 'Is it nice\\?', expected a text with {} for the prompt"),
        ("criteria", {}, "criteria are empty"),
        ("criteria", {"reasoning": "x"}, "criteria are 'reasoning'"),
        ("criteria", {"two words": "x"}, "criteria are 'two words'"),
        ("scale", (5, 1), r"scale is \[5, 1\], expected a lower and a higher number"),
        ("url", "ws://x", "url is 'ws://x'"),
    ],
)
def test_an_invalid_field_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"vlm_judge: {message}"):
        VlmJudge(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "maybe", 'mode: found "maybe", expected "yes_no" or "rubric" or "viescore" or "caption"'),
        ("measure", "bleu", 'measure: found "bleu", expected "f1" or "precision" or "recall"'),
        ("layer", 0, "layer: found 0, expected 1 or more"),
        ("baseline", 1.0, "baseline: found 1.0, expected less than 1"),
        ("give_up_after", 0, "give_up_after: found 0, expected 1 or more"),
        ("concurrency", 0, "concurrency: found 0, expected 1 or more"),
        ("timeout", 0.0, "timeout: found 0.0, expected more than 0"),
        ("timeout", math.inf, "timeout: found inf, expected more than 0, and finite"),
        ("retries", -1, "retries: found -1, expected 0 or more"),
    ],
)
def test_a_field_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        VlmJudge(**{field: value})  # type: ignore[arg-type]


def test_a_run_skips_unscored_images_and_logs_their_share(
    tiny_run: Callable[..., Any], endpoint: Callable[..., Endpoint]
) -> None:
    count = [0]

    def say(light: float, question: str) -> Any:
        with server.lock:
            count[0] += 1
            return {"Hm": 0.0} if count[0] % 4 == 0 else logit(light)

    server = endpoint(say)
    settings = {"name": "vlm_judge", "url": server.url, "model": "judge", "concurrency": 1}
    run = tiny_run("judged", {"reward": [settings], "train.updates": 2, **DDPO})
    updates = list(run.train())
    assert all(0 < update.metrics["unscored"] < 1 and math.isfinite(update.reward) for update in updates)


def test_its_summary_names_every_mode() -> None:
    (row,) = [row for row in default_registry().named("vlm_judge") if row.kind == "reward"]
    named = {"yes_no": "yes or no", "rubric": "rubric", "viescore": "VIEScore", "caption": "caption"}
    assert named.keys() == set(get_args(Mode)) and all(word in row.help for word in named.values())


def test_a_run_that_stops_for_unusable_answers_is_saved_and_resumes_with_the_same_result(
    tiny_run: Callable[..., Any], endpoint: Callable[..., Endpoint]
) -> None:
    server = endpoint(lambda light, _: logit(light))
    judged = {"name": "vlm_judge", "url": server.url, "model": "judge", "concurrency": 1, "give_up_after": 2}
    settings = {"reward": [judged], "train.updates": 3, **DDPO}
    whole, broken = (tiny_run(name, settings) for name in ("whole", "broken"))
    list(whole.train())
    half = len(server.requests) // 2 - 1  # the two images after it belong to one round
    server.requests.clear()
    server.respond = lambda light, _: (
        logit(light) if len(server.requests) <= half else "I would rather talk about ships"
    )
    with pytest.raises(AlignkitError, match=r"no usable answer for 2 images in a row.*; resume with: alignkit train"):
        list(broken.train())
    assert checkpoint.latest(broken.folder / "checkpoints") is not None
    server.respond = lambda light, _: logit(light)
    list(alignkit.load(resume=broken.folder).train())
    ends = [checkpoint.load(checkpoint.latest(run.folder / "checkpoints"))["trainer"] for run in (whole, broken)]
    assert ends[0]["update"] == 3 and not differences(*ends)
