from __future__ import annotations

import json
import os
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignkit.cli.app import app

INIT = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("good", "mixed.parts:Good", "Keeps its promises")
        register("bad", "mixed.parts:Bad", "Looks at its neighbours")
        register("heavy", "mixed.parts:Heavy", "Wants a checkpoint")
        register("demanding", "mixed.parts:Demanding", "Has a field without a default")
        register("gone", "mixed.parts:Gone", "Is not there")

    @hookimpl
    def register_models(register):
        register("fine_model", "mixed.parts:FINE", "Suits")
        register("odd_model", "mixed.parts:ODD", "Brings an unknown key")

    @hookimpl
    def register_policies(register):
        register("lonely", "mixed.parts:Lonely", "Has no checkpoint")
        register("scaled", "mixed.parts:Scaled", "Shows images in another range")
"""
PARTS = """
    from dataclasses import dataclass

    from alignkit.errors import ConfigError
    from alignkit.interfaces import ModelBundle, Reward
    from alignkit.models.diffusers_policy import DiffusersPolicy

    FINE = ModelBundle("a/b", algorithm_defaults={"ddpo": {"algorithm": {"samples": 2}}})
    ODD = ModelBundle("a/b", defaults={"train": {"upbates": 3}})


    @dataclass
    class Good(Reward):
        differentiable = True
        scale: float = 1.0

        def __call__(self, images, examples):
            return self.scale * images.mean((1, 2, 3))


    class Bad(Reward):
        def __call__(self, images, examples):
            return images.mean((1, 2, 3)) - images.mean()


    @dataclass
    class Heavy(Reward):
        checkpoint: str = "owner/heavy"

        def load(self, device):
            if self.checkpoint != "here":
                raise ConfigError(f"heavy: {self.checkpoint} is not on this disk; set reward.heavy.checkpoint")

        def __call__(self, images, examples):
            return images.mean((1, 2, 3)).detach()


    @dataclass
    class Demanding(Reward):
        words: str

        def __call__(self, images, examples):
            return images.mean((1, 2, 3)).detach()


    class Lonely(DiffusersPolicy):
        @classmethod
        def serves(cls, source):
            return False


    class Scaled(DiffusersPolicy):
        @classmethod
        def serves(cls, source):
            return source != "a/b" and super().serves(source)

        def decode(self, latents):
            return 255 * super().decode(latents)
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))  # which the command sets


@pytest.fixture
def mixed(plugins: Any) -> None:
    plugins.install("mixed", INIT, version="3.1", parts=PARTS)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check-plugin", *arguments], prog_name="alignkit")


def test_every_component_gets_a_result_with_its_reason(mixed: None) -> None:
    result = run("mixed", "--json")
    assert result.exit_code == 1
    found = {row["name"]: (row["status"], row["detail"]) for row in json.loads(result.stdout)}
    assert {name: status for name, (status, _) in found.items()} == {
        "good": "passed", "bad": "failed", "heavy": "skipped", "demanding": "skipped", "gone": "failed",
        "fine_model": "passed", "odd_model": "failed", "lonely": "skipped", "scaled": "failed",
    }  # fmt: skip
    assert found["bad"][1].startswith("reward Bad: image 0 alone and in a batch of 4")
    assert found["heavy"][1] == "heavy: owner/heavy is not on this disk; set reward.heavy.checkpoint"
    assert found["demanding"][1] == "words has no default; set it with --set reward.demanding.words="
    assert "cannot be imported" in found["gone"][1]
    assert found["fine_model"][1] == "its settings under ddpo"
    assert "train.upbates" in found["odd_model"][1]
    assert found["lonely"][1].startswith("no checkpoint that it serves is on this disk; register a model whose path")
    assert found["scaled"][1].startswith("policy Scaled: decode: found pixels from")


def test_set_fills_in_a_missing_setting_and_the_table_shows_it(mixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = run("mixed", "--set", "reward.heavy.checkpoint=here", "--set", "reward.good.scale=2")
    assert "checkpoint = here" in result.stdout and "scale = 2.0" in result.stdout and "failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixt"], "no plugin 'mixt' is installed; did you mean mixed?"),
        (["mixed", "--set", "reward.heavy.checkpiont=x"], "unknown key; did you mean checkpoint?"),
        (["mixed", "--set", "reward.good.scale=much"], '--set reward.good.scale: found "much", expected number'),
        (["mixed", "--set", "train.updates=1"], "expected KIND.NAME.FIELD=VALUE"),
    ],
)
def test_an_unknown_plugin_or_setting_is_one_line(mixed: None, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_plugin_that_passes_exits_with_0(plugins: Any) -> None:
    init = INIT.split('        register("bad"')[0]
    plugins.install("mixed", init, parts=PARTS)
    assert run("mixed").exit_code == 0


def test_a_plugin_that_does_not_import_has_failed(plugins: Any) -> None:
    plugins.install("shaky", "import a_module_that_is_missing")
    result = run("shaky")
    assert result.exit_code == 1 and "a_module_that_is_missing" in " ".join(result.stdout.split())
