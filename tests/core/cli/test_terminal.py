"""Output and errors on terminals that lack characters, and errors that quote strangers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ConfigError("the server \x1b[31m\u202ereports\x07 \ud800 größer"),
            "error: the server \\x1b[31m\\u202ereports\\x07 \\ud800 größer\n",
        ),
        (
            OSError(36, "File name too long", "long/name"),
            "error: long/name: file name too long; correct the path, or its permissions\n",
        ),
    ],
    ids=["control characters", "a path"],
)
def test_an_error_is_one_line_of_printable_text(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("alignkit.cli.plugins.default_registry", fail)
    result = CliRunner().invoke(app, ["list"])
    assert (result.exit_code, result.stderr) == (1, line)
    assert CliRunner().invoke(app, ["--debug", "list"]).exception is error


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_terminal_without_a_character_gets_its_number(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "alignkit", "prompts", "phrases", "a red \u03bb cup"]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith(b"a red \\u03bb cup") and not ended.stderr
