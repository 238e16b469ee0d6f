"""Mistakes in run files, and their messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.config.load import load
from alignkit.errors import AlignkitError, ConfigError
from plugin_fixtures import problems

MODEL = {"model.name": "acme_model", "algorithm.name": "acme_plain"}


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
