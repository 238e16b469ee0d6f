"""Mistakes in flags and --set, and in keys of earlier versions, and their messages."""

from __future__ import annotations

import re
from typing import Any

import pytest

from alignkit.config.load import load
from alignkit.config.sections import ModelConfig
from alignkit.errors import ConfigError
from plugin_fixtures import problems

NAN, INF = float("nan"), float("inf")
MODEL = {"model.name": "acme_model", "algorithm.name": "acme_plain"}


WIDTH = '0, or with prediction = "consistency" and lora_rank = 0 an even number from 4 on'


def test_the_width_of_an_input_for_the_guidance_has_a_least() -> None:
    student = {"prediction": "consistency", "lora_rank": 0}
    assert ModelConfig(guidance_embedding=4, **student).guidance_embedding == 4
    for width in (-4, 2, 5):
        with pytest.raises(ValueError, match="from 4 on"):
            ModelConfig(guidance_embedding=width, **student)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.updates", -1, "0 or more"),
        ("train.rows_per_update", 0, "1 or more"),
        ("train.learning_rate", 0.0, "more than 0"),
        ("train.learning_rate", NAN, "number"),
        ("train.learning_rate", INF, "more than 0, and finite"),
        ("train.weight_decay", INF, "0 or more, and finite"),
        ("train.max_grad_norm", NAN, "number"),
        ("model.guidance_scale", -INF, "a finite number"),
        ("scoring.retry_seconds", INF, "0 or more, and finite"),
        ("algorithm.clip", NAN, "number"),
        ("train.ema_decay", 1.0, "at least 0 and less than 1"),
        ("data.batch_size", 0, "1 or more"),
        ("model.lora_rank", -1, "0 or more"),
        ("model.guidance_embedding", 256, WIDTH),
        ("train.warmup", -1, "0 or more"),
        ("train.warmup", 201, "0 to updates, which is 70"),
        ("train.schedule", "step", '"constant" or "linear" or "cosine"'),
        ("evaluate.steps", [], "list of integer, not empty, each 1 or more"),
        ("evaluate.steps", [1, 0], "list of integer, not empty, each 1 or more"),
        ("train.ema_decay", -0.5, "at least 0 and less than 1"),
        ("scoring.statistics_decay", 0.0, "more than 0 and at most 1"),
        ("algorithm.limit", 9, "at least 1 and at most 8"),
        ("sampler.num_steps", 0, "1 or more"),
        ("surrogate.warmup", -2, "0 or more"),
        ("algorithm.clip", -1, "more than 0"),
        ("train.updates", True, "integer"),
        ("train.updates", 1.5, "integer"),
        ("train.trackers", ["mlflow"], 'list of "tensorboard" or "wandb"'),
        ("seed", "one", "integer"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(load_acme: Any, key: str, value: object, expected: str) -> None:
    (line,) = problems(load_acme, None, MODEL | {"algorithm.name": "acme_steps", key: value})
    assert line.startswith(f"{key}: found ") and line.endswith(f", expected {expected}")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight", NAN, "number"),
        ("weight", INF, "a finite number"),
        ("at_least", NAN, 'number or "start"'),
        ("at_least", -INF, "a finite number"),
    ],
)
def test_a_rewards_share_and_floor_are_finite(load_acme: Any, field: str, value: float, expected: str) -> None:
    rewards = [{"name": "acme_red", field: value}, "acme_blue"]
    settings = {**MODEL, "algorithm.name": "acme_steps", "scoring.combine": "normalised", "reward": rewards}
    assert problems(load_acme, None, settings) == [f"reward.{field}: found {value}, expected {expected}"]


def test_a_norm_that_clips_nothing_may_be_infinite(load_acme: Any) -> None:
    config = load_acme("[train]\nmax_grad_norm = inf\n", {**MODEL, "algorithm.name": "acme_steps"})
    assert config.train.max_grad_norm == INF


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"algorithm.name": "acme_stps"}, "algorithm.name: unknown algorithm 'acme_stps'; did you mean acme_steps?"),
        ({"sampler.name": "acme_red"}, "sampler.name: unknown sampler 'acme_red' (there is a reward of this name)"),
        ({"reward": ["acme_rad"]}, "reward.name: unknown reward 'acme_rad'; did you mean acme_red?"),
        ({"reward": ["acme_red", "acme_red"]}, "reward.name: acme_red is listed twice"),
        ({"reward": "acme_red"}, "reward: expected [[reward]] tables, each with a name"),
        ({"reward.acme_red.weight": 1}, "reward.acme_red: not one of this run's rewards (acme_blue)"),
        ({"surrogate.warmup": 1}, "surrogate: algorithm acme_plain uses none"),
        ({"trian.updates": 1}, "trian: unknown section; did you mean train?"),
        ({"seed": -1}, "seed: found -1, expected 0 or more"),
        (
            {"algorithm.name": "ACME_plain2"},
            "algorithm.name: unknown algorithm 'ACME_plain2'; did you mean acme_plain?",
        ),
        ({"sampler.name": "acme_s"}, "sampler.name: unknown sampler 'acme_s'; did you mean acme_sampler?"),
        ({"updates": 1}, "updates: expected section.key"),
        ({"train.updates": None}, "train.updates: found None"),
        (
            {"evaluate.rewards": ["acme_rad"]},
            "evaluate.rewards.name: unknown reward 'acme_rad'; did you mean acme_red?",
        ),
        (
            {"evaluate.rewards": [{"name": "acme_blue", "juge": "x"}], "reward": ["acme_red"]},
            "evaluate.rewards.juge: unknown key; did you mean judge? (`alignkit show acme_blue` lists all)",
        ),
        (
            {"evaluate.rewards": [{"name": "acme_blue", "judge": 3}], "reward": ["acme_red"]},
            "evaluate.rewards.judge: found 3, expected string",
        ),
        ({"evaluate.rewards": [{"name": "acme_red", "weight": 1.0}]}, "evaluate.rewards.weight: unknown key"),
        ({"evaluate.rewards": [{"judge": "x"}]}, "evaluate.rewards: expected a list of names or of tables with a name"),
        ({"evaluate.rewards": "acme_red"}, "evaluate.rewards: expected a list of names or of tables with a name"),
        ({"evaluate.rewards": ["acme_red", {"name": "acme-red"}]}, "evaluate.rewards.name: acme_red is listed twice"),
        ({"evaluate.rewards.acme_red.judge": "x"}, "evaluate.rewards.acme_red: not in evaluate.rewards (which is emp"),
        (
            {"evaluate.rewards": [{"name": "acme_blue", "judge": "other"}]},
            "evaluate.rewards.name: acme_blue is trained on with other settings, and a run has it once; leave",
        ),
        ({"algorithm.pace": 1.0}, "algorithm.pace: unknown key; did you mean sampler.pace?"),
        ({"regulariser": ["acme_pul"]}, "regulariser.name: unknown regulariser 'acme_pul'; did you mean acme_pull?"),
        (
            {"regulariser": ["acme_pull", "acme_pull"]},
            "regulariser.name: acme_pull is listed twice; add up the weights",
        ),
        ({"regulariser": "acme_pull"}, "regulariser: expected [[regulariser]] tables, each with a name"),
        ({"regulariser.acme_pull.weight": 1}, "regulariser.acme_pull: not one of this run's regularisers (which is"),
        (
            {"regulariser": [{"name": "acme_pull", "strenth": 1}]},
            "regulariser.strenth: unknown key; did you mean strength? (`alignkit show acme_pull` lists all)",
        ),
        (
            {"regulariser": ["acme_pull"], "regulariser.acme_pull.strength": "x"},
            'regulariser.strength: found "x", expected number',
        ),
        (
            {"regulariser": [{"name": "acme_pull", "weight": -1}]},
            "regulariser.weight: found -1, expected 0 or more",
        ),
        (
            {"regulariser": ["acme_push"], "algorithm.far": True},
            "algorithm.far: unknown key; did you mean regulariser.acme_push.far?",
        ),
    ],
)
def test_a_wrong_override_is_one_clear_line(load_acme: Any, overrides: dict[str, Any], message: str) -> None:
    (line,) = problems(load_acme, None, MODEL | overrides)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [
        ("data.pictures", "images", "data.images"),
        ("data.broken", "skip", 'data.on_error, "raise" or "skip"'),
        ("scoring.broken", "skip", 'scoring.on_error, "raise" or "skip"'),
        ("model.guidance", 2.0, "model.guidance_scale, whose value is one more"),
        (
            "algorithm.w_min",
            2.0,
            "guidance_scale_min, under regulariser.lcd for lasro, ddpo and pso, whose value",
        ),
        (
            "algorithm.w_max",
            2.0,
            "guidance_scale_max, under regulariser.lcd for lasro, ddpo and pso, whose value",
        ),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_the_new_one(key: str, value: object, now: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(key)}: was renamed; write {re.escape(now)}"):
        load(None, {key: value})


@pytest.mark.parametrize(("key", "name"), [("distillation_weight", "lcd"), ("reference_weight", "reference")])
def test_a_weight_that_became_a_regulariser_is_refused_with_its_table(key: str, name: str) -> None:
    message = (
        rf'algorithm\.{key}: was renamed; write a table \[\[regulariser\]\] with name = "{name}" and weight = \.\.\.$'
    )
    with pytest.raises(ConfigError, match=message):
        load(None, {"algorithm.name": "rebel", f"algorithm.{key}": 1.0})


def test_a_reward_of_an_earlier_version_is_refused_with_its_new_name() -> None:
    with pytest.raises(ConfigError, match="reward 'shapes_reading' was renamed; use pixel_check"):
        load(None, {"reward": ["shapes_reading"]})
