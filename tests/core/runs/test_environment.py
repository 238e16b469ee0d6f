from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from alignkit.runs.folder import environment


def test_it_names_versions_and_hardware_as_json() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]


def test_it_names_the_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "a.txt").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert environment()["git"] == commit
    (tmp_path / "a.txt").write_text("two")
    assert environment()["git"] == f"{commit}-dirty"
