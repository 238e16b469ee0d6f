"""`alignkit new`: the plugins it writes install, are listed, pass their own tests, train and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.commands.new import WRITABLE, new
from alignkit.errors import AlignkitError
from alignkit.interfaces import ModelBundle
from alignkit.registry import KINDS, default_registry
from method_checks import assert_a_stopped_run_ends_with_the_same_bits

NAMES = {
    "reward": "sharpness", "algorithm": "my_method", "sampler": "my_sampler", "surrogate": "my_surrogate",
    "model": "my_model",
}  # fmt: skip


@pytest.fixture
def projects(plugins: Any, tmp_path: Path) -> dict[str, Path]:
    """One generated distribution of each kind, installed."""
    made = {kind: new(kind, name, tmp_path / kind) for kind, name in NAMES.items()}
    for folder in made.values():
        plugins.install_project(folder)
    return made


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_written_component_is_found_by_its_name_with_its_distribution(projects: dict[str, Path], kind: str) -> None:
    name = NAMES[kind]
    row = default_registry().find(kind, name)
    assert (row.distribution, row.version) == (f"alignkit-{name.replace('_', '-')}", "0.1.0")
    assert row.target.startswith(f"alignkit_{name}.{kind}:")
    found = default_registry().get(kind, name)
    assert isinstance(found, ModelBundle) if kind == "model" else isinstance(found(), KINDS[kind])
    files = {str(path.relative_to(projects[kind])) for path in projects[kind].rglob("*.*") if path.is_file()}
    assert {"pyproject.toml", "README.md", f"tests/test_{name}.py"} < files
    assert not any("$" in (projects[kind] / file).read_text(encoding="utf-8") for file in files if "pyc" not in file)


@pytest.mark.slow
def test_each_passes_its_own_test_and_is_listed_in_a_process_of_its_own(
    plugins: Any, projects: dict[str, Path], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(plugins.path), *map(str, projects.values()), *sys.path])
    ours = {**os.environ, "PYTHONPATH": path}
    listed = subprocess.run(
        [sys.executable, "-m", "alignkit", "list", "--json"], env=ours, capture_output=True, check=True
    )
    assert set(NAMES.items()) < {(row["kind"], row["name"]) for row in json.loads(listed.stdout)}
    tests = [str(folder / "tests") for folder in projects.values()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *tests]
    done = subprocess.run(command, env=ours, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "15 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITABLE)
def test_each_passes_check_plugin_as_it_is_written(
    projects: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))  # which the command sets
    result = CliRunner().invoke(app, ["check-plugin", f"alignkit-{NAMES[kind].replace('_', '-')}", "--json"])
    rows = json.loads(result.stdout)
    assert [(row["kind"], row["name"], row["status"]) for row in rows] == [(kind, NAMES[kind], "passed")]
    assert result.exit_code == 0


@pytest.mark.slow
def test_a_distribution_installs_with_pip(tmp_path: Path) -> None:
    folder, target = new("reward", "glow", tmp_path / "alignkit-glow"), tmp_path / "site"
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--retries", "0"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(folder)]
    installed = subprocess.run(command, capture_output=True, text=True)
    if "hatchling" in installed.stderr.rpartition("ERROR: ")[2]:
        pytest.skip("what it is built with, hatchling, cannot be fetched here")
    assert installed.returncode == 0, installed.stderr
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), *sys.path])}
    listed = subprocess.run(
        [sys.executable, "-m", "alignkit", "list", "--json"], env=ours, cwd=tmp_path, capture_output=True, check=True
    )
    rows = {row["name"]: row for row in json.loads(listed.stdout) if row["kind"] == "reward"}
    assert rows["glow"]["distribution"] == "alignkit-glow" and not rows["glow"]["broken"]


def test_a_written_surrogate_trains_under_lasro(projects: dict[str, Path], tiny_run: Any) -> None:
    settings = {
        "algorithm.name": "lasro", "algorithm.samples": 4, "surrogate.name": "my_surrogate", "surrogate.width": 8,
        "reward": ["sharpness"], "train.updates": 1,
    }  # fmt: skip
    (update,) = tiny_run("taught", settings).train()
    assert update.metrics["surrogate_loss"] > 0 and update.metrics["reward"] > 0


def test_a_written_method_is_checked_trains_and_resumes(projects: dict[str, Path], tiny_run: Any) -> None:
    settings = {
        "algorithm.name": "my_method", "algorithm.samples": 3, "sampler.name": "my_sampler", "sampler.num_steps": 2,
        "reward": ["sharpness"], "train.updates": 2, "train.rows_per_update": 8,
    }  # fmt: skip
    tiny_run("checked", settings).check()
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, settings)


def test_an_error_of_a_plugin_during_training_has_a_note_with_its_origin(
    projects: dict[str, Path], tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = default_registry().get("algorithm", "my_method")
    monkeypatch.setattr(sys.modules[method.__module__], "over_batch", None)
    with pytest.raises(TypeError, match="not callable") as caught:
        list(tiny_run("broken", {"algorithm.name": "my_method", "train.updates": 1}).train())
    assert caught.value.__notes__ == [
        "This was raised in code of plugin alignkit_my_method of alignkit-my-method 0.1.0."
    ]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("judge", "sharpness", "new: found 'judge', expected one of reward, algorithm, sampler, surrogate, model"),
        ("reward", "Sharp ness", "new reward: found the name 'Sharp ness', expected snake_case, as my_reward"),
        ("reward", "2sharp", "expected snake_case"),
        ("reward", "sharp_", "expected snake_case"),
        ("reward", "reward", "found the name 'reward', which is the name of a kind; choose another name"),
        ("algorithm", "model", "found the name 'model', which is the name of a kind; choose another name"),
        ("reward", "sharp__ness", "expected snake_case"),
        ("sampler", "class", "expected snake_case"),
        ("reward", "clip-score", "new reward: clip_score exists already, from plugin alignkit_rewards of"),
        ("reward", "rewards", "the package alignkit_rewards is installed already; choose another name"),
    ],
)
def test_invalid_names_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignkitError) as caught:
        new(kind, name)
    assert message in str(caught.value) and list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, ["new", "reward", "sharpness"])
    assert first.exit_code == 0 and "alignkit-sharpness/pyproject.toml" in first.stdout
    (tmp_path / "alignkit-sharpness" / "README.md").write_text("mine", encoding="utf-8")
    again = CliRunner().invoke(app, ["new", "reward", "sharpness"])
    assert again.exit_code == 1 and "alignkit-sharpness exists already" in again.stderr
    assert again.stderr.count("\n") == 1
    assert (tmp_path / "alignkit-sharpness" / "README.md").read_text(encoding="utf-8") == "mine"


def test_a_name_of_the_interface_makes_a_class_of_another_name(tmp_path: Path) -> None:
    folder = new("reward", "scores", tmp_path / "new")
    assert "class ScoresReward(Reward):" in (folder / "alignkit_scores" / "reward.py").read_text(encoding="utf-8")
