"""Mistakes in run files, and their messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.config.load import load
from alignkit.config.sections import ModelConfig
from alignkit.errors import AlignkitError, ConfigError

NAN, INF = float("nan"), float("inf")
MODEL = {"model.name": "acme_model", "algorithm.name": "acme_plain"}


def problems(load_acme: Any, text: str | None, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_acme(text, overrides)
    return str(caught.value).splitlines()


def test_every_mistake_is_reported_with_its_file_and_line(load_acme: Any) -> None:
    text = """
[model]
name = "acme_model"
lora_rnk = 4
[sampler]
num_steps = 0
[[reward]]
name = "acme_red"
[[reward]]
name = "acme_blue"
juge = "x"
[algorithm]
name = "acme_plain"
learning_rate = 1e-5
mode = "medium"
[train]
updates = -1
ema_decay = 1.0
precision = "fp8"
[evaluate]
steps = [1, "two"]
rewards = ["acme_rde"]
"""
    found = problems(load_acme, text, {"data.batch_size": "many"})
    expected = [
        "run.toml:4: model.lora_rnk: unknown key; did you mean lora_rank? (`alignkit show model` lists all)",
        "run.toml:6: sampler.num_steps: found 0, expected 1 or more",
        "run.toml:11: reward.juge: unknown key; did you mean judge? (`alignkit show acme_blue` lists all)",
        "run.toml:14: algorithm.learning_rate: unknown key; did you mean train.learning_rate? "
        "(`alignkit show acme_plain` lists all)",
        'run.toml:15: algorithm.mode: found "medium", expected "hard" or "soft"',
        "run.toml:17: train.updates: found -1, expected 0 or more",
        "run.toml:18: train.ema_decay: found 1.0, expected at least 0 and less than 1",
        'run.toml:19: train.precision: found "fp8", expected "no" or "bf16" or "fp16"',
        'run.toml:21: evaluate.steps: found [1, "two"], expected list of integer',
        "run.toml:22: evaluate.rewards.name: unknown reward 'acme_rde'; did you mean acme_red? "
        "(`alignkit list rewards` shows all)",
        'data.batch_size: found "many", expected integer',
    ]
    for line in expected:
        assert any(one.endswith(line) for one in found), line
    assert len(found) == len(expected)


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


def test_mistakes_in_a_regulariser_are_reported_with_their_line_or_the_model(acme: Any, load_acme: Any) -> None:
    text = '[model]\nname = "acme_model"\n[[regulariser]]\nname = "acme_push"\nfar = 3\n'
    (line,) = problems(load_acme, text, {"algorithm.name": "acme_plain"})
    assert line.endswith("run.toml:5: regulariser.far: found 3, expected true or false")
    acme.install(
        "odd",
        "from alignkit import hookimpl\n@hookimpl\ndef register_models(register): register('odd', 'odd.m:ODD', '')",
        m="from alignkit import ModelBundle as M\nODD = M('odd/odd', defaults={'sampler': {'name': 'acme_sampler'},"
        "'reward': ['acme_red'], 'regulariser': {'acme_pull': {'strength': 'x'}}})",
    )
    settings = {"model.name": "odd", "algorithm.name": "acme_plain"}
    assert load(None, settings, acme.registry()).regularisers == []
    with pytest.raises(ConfigError, match=r'^model odd: regulariser\.strength: found "x", expected number$'):
        load(None, settings | {"regulariser": ["acme_pull"]}, acme.registry())


def test_an_unknown_section_hides_no_other_mistake(load_acme: Any) -> None:
    text = 'sead = 1\n[trian]\nupdates = 3\n[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\nmode = 4\n'
    first, second, third = problems(load_acme, text)
    assert "run.toml:1: sead: unknown key; did you mean seed?" in first
    assert "trian: unknown section; did you mean train?" in second
    assert 'run.toml:8: algorithm.mode: found 4, expected "hard" or "soft"' in third


def test_what_suits_a_model_with_one_reward_holds_where_it_is_the_only_one(load_acme: Any) -> None:
    def found(*rewards: str, **changes: Any) -> tuple[float, int, float]:
        settings = {**MODEL, "algorithm.name": "acme_steps", "reward": list(rewards), **changes}
        config = load_acme(None, settings)
        return config.algorithm.fields["clip"], config.train.updates, config.train.learning_rate

    assert found("acme_red") == (0.8, 70, 5e-4)
    assert found("acme_blue") == found("acme_red", "acme_blue") == (0.9, 70, 1e-3)
    assert found("acme_red", **{"algorithm.clip": 0.5}) == (0.5, 70, 5e-4)


def test_a_run_file_may_begin_with_a_byte_order_mark(load_acme: Any) -> None:
    assert load_acme('\ufeffseed = 3\n[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\n').seed == 3


def test_several_bounds_of_one_section_are_reported_together(load_acme: Any) -> None:
    assert len(problems(load_acme, None, MODEL | {"train.updates": -1, "train.ema_decay": 2.0})) == 2


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


WATCHING = """
[model]
name = "acme_model"
[algorithm]
name = "acme_plain"
[[reward]]
name = "acme_red"
[evaluate]
rewards = ["acme_red", {name = "acme-blue", judge = "mine"}]
"""
TABLES = (
    WATCHING.rpartition("rewards =")[0]
    + """
[[evaluate.rewards]]
name = "acme_red"
[[evaluate.rewards]]
name = "acme_blue"
judge = "mine"
"""
)


@pytest.mark.parametrize("text", [WATCHING, TABLES])
def test_a_held_out_reward_has_fields_as_one_that_is_trained_on(load_acme: Any, text: str) -> None:
    assert load_acme(text).evaluate.held_out_rewards() == {"acme_red": {}, "acme_blue": {"judge": "mine"}}
    changed = load_acme(text, {"evaluate.rewards.acme_blue.judge": "other"})
    assert changed.evaluate.held_out_rewards()["acme_blue"] == {"judge": "other"}
    assert load_acme(text, {"evaluate.rewards": []}).evaluate.held_out_rewards() == {}
    assert load_acme(text, {"evaluate.rewards": ["acme_blue"]}).evaluate.held_out_rewards() == {
        "acme_blue": {"judge": "mine"}
    }
    alike = load_acme(text, {"reward": [{"name": "acme_blue", "judge": "mine"}], "evaluate.rewards": ["acme_blue"]})
    assert alike.evaluate.held_out_rewards() == {"acme_blue": {}}


def test_mistakes_in_a_held_out_reward_are_reported_with_their_line(load_acme: Any) -> None:
    end = "evaluate.rewards.judge: found 3, expected string"
    assert problems(load_acme, WATCHING.replace('"mine"', "3"))[0].endswith(f"run.toml:9: {end}")
    assert problems(load_acme, TABLES.replace('"mine"', "3"))[0].endswith(f"run.toml:14: {end}")
    lines = problems(load_acme, TABLES.replace("judge", "juge").replace('name = "acme_red"', 'name = "acme_rde"'))
    ends = ["run.toml:7: reward.name: unknown", "run.toml:11: evaluate.rewards.name: unknown reward 'acme_rde'",
            "run.toml:14: evaluate.rewards.juge: unknown key; did you mean judge?"]  # fmt: skip
    assert [end in line for end, line in zip(ends, lines, strict=True)] == [True] * 3


def test_a_run_without_sampler_says_how_to_name_one(load_acme: Any) -> None:
    lines = problems(load_acme, None, {"model.name": "acme_bare", "algorithm.name": "acme_plain"})
    assert [line.partition(";")[0] for line in lines] == ["sampler.name: missing"]


def test_an_unknown_model_is_answered_with_the_nearest(load_acme: Any) -> None:
    with pytest.raises(AlignkitError, match="unknown model 'acme_modle'; did you mean acme_model"):
        load_acme(None, {"model.name": "acme_modle"})


@pytest.mark.parametrize("text", ["[train", "seed = 1\nseed = 2", "seed = é\x00"])
def test_a_file_that_is_no_toml_is_one_line_with_the_place(load_acme: Any, text: str) -> None:
    (line,) = problems(load_acme, text)
    assert re.search(r"run\.toml: not valid TOML: .*\(at (line \d+|end of document)", line)


def test_a_missing_file_a_folder_and_bytes_are_each_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "bytes"):
        with pytest.raises(ConfigError, match=rf"{path}: (cannot be read|not UTF-8)[^\n]+$"):
            load(path)


def test_a_mistake_in_the_models_own_settings_names_the_model(acme: Any) -> None:
    acme.install(
        "odd",
        "from alignkit import hookimpl\n@hookimpl\ndef register_models(register): register('odd', 'odd.m:ODD', '')",
        m="from alignkit.interfaces import ModelBundle as M\nODD = M('odd/odd', defaults={'train': {'updates': 'x'}})",
    )
    with pytest.raises(ConfigError, match=r'^model odd: train\.updates: found "x", expected integer'):
        load(None, {"model.name": "odd", "algorithm.name": "acme_plain"}, acme.registry())


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
