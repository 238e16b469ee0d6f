"""What a run file may import and send that the user did not name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.config.load import load
from alignkit.config.trust import disclosure, refuse
from alignkit.errors import ConfigError

FUNCTION = '[[reward]]\nname = "function"\ntarget = "my_rewards:f"\n'
HELD_OUT = '[evaluate]\nrewards = [{name = "function", target = "subprocess:call"}]\n'
REMOTE = '[[reward]]\nname = "remote"\nurl = "http://far.example:1"\ntoken_env = "{}"\n'
JUDGE = '[[reward]]\nname = "vlm_judge"\nmodel = "m"\nurl = "https://far.example/v1"\nkey_env = "HF_TOKEN"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a run file into the working folder, next to a module that must not be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("MY_SECRET", "HF_TOKEN", "ALIGNKIT_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    (tmp_path / "my_rewards.py").write_text("raise SystemExit('it was imported')")

    def written(text: str) -> Path:
        (tmp_path / "run.toml").write_text(text)
        return tmp_path / "run.toml"

    return written


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (FUNCTION, "reward.function.target"),
        ('[data]\nimages = "my_rewards:Images"\n', "data.images"),
        ('[data]\npairs = "os:_exit"\n', "data.pairs"),
        (HELD_OUT, "evaluate.rewards.function.target"),
    ],
)
def test_code_that_a_run_file_names_is_refused_unless_the_user_names_it_too(write: Write, text: str, key: str) -> None:
    file = write(text)
    with pytest.raises(ConfigError, match=rf"^{key}: the run file names .*--trust.*or name it yourself: --set {key}="):
        alignkit.load(file).check()
    refuse(load(file, trust=True))
    name = text.rpartition('"')[0].rpartition('"')[2]
    stated: dict[str, Any] = {key: name}
    refuse(load(file, stated))
    with pytest.raises(ConfigError, match="the run file names"):
        refuse(load(file, {"output": "other_module:f"}))


def test_installed_code_needs_no_trust(write: Write) -> None:
    refuse(load(write('[data]\nimages = "alignkit_shapes.data:Drawings"\n')))


@pytest.mark.parametrize(("text", "variable"), [(REMOTE.format("MY_SECRET"), "MY_SECRET"), (JUDGE, "HF_TOKEN")])
def test_a_token_goes_to_hosts_that_the_user_named(
    write: Write, text: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(text)
    url = text.partition('url = "')[2].partition('"')[0]
    key = f"reward.{'remote' if 'remote' in text else 'vlm_judge'}"
    with pytest.raises(ConfigError, match=rf"names {variable}, and {url} to send it to.*ALIGNKIT_HOSTS=far\.example"):
        refuse(load(file))
    with pytest.raises(ConfigError, match="to send it to"):
        refuse(load(file, {f"{key}.{'token' if 'remote' in text else 'key'}_env": variable}))
    refuse(load(file, {f"{key}.url": url}))
    refuse(load(file, trust=True))
    monkeypatch.setenv("ALIGNKIT_HOSTS", "near.example, far.example")
    refuse(load(file))
    monkeypatch.delenv("ALIGNKIT_HOSTS")
    monkeypatch.delenv(variable)  # there is nothing to send
    refuse(load(file))


def test_a_variable_of_alignkit_goes_anywhere_unless_hosts_are_named(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(REMOTE.format("ALIGNKIT_TOKEN"))
    refuse(load(file))
    monkeypatch.setenv("ALIGNKIT_HOSTS", "near.example")
    with pytest.raises(ConfigError, match="to send it to"):
        refuse(load(file))


def test_code_and_addresses_are_disclosed_with_their_place(write: Write) -> None:
    lines = disclosure(load(write(FUNCTION + REMOTE.format("MY_SECRET"))))
    assert lines == [
        f"reward.function.target: imports my_rewards:f from {Path('my_rewards.py').resolve()}",
        "reward.remote.token_env: sends prompts, images and the token in MY_SECRET to http://far.example:1",
    ]
