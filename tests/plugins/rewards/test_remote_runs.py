"""Runs with a reward served over HTTP: they insist on the same reward, and resume after the server was killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import alignkit
from alignkit.errors import ConfigError, TransientError
from alignkit.rewards.weighted import WeightedRewards
from alignkit.serving.server import open_server
from alignkit.testing.expect import differences
from alignkit.training import checkpoint
from servers import Odd, running, serving


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_rewards.endpoint.FIRST_WAIT", 0.01)
    monkeypatch.delenv("ALIGNKIT_TOKEN", raising=False)


def test_a_resumed_run_refuses_another_reward_than_it_began_with(tiny_run: Callable[..., Any]) -> None:
    few = {"evaluate.prompts": "", "train.updates": 2, "train.checkpoint_every": 1}
    with serving(Odd(), fingerprint="first") as server:
        port = server.server_address[1]
        run = tiny_run("held", {"reward": [{"name": "remote", "url": server.url}], **few})
        for _ in run.train():
            run.stop()
    saved = checkpoint.latest(run.folder / "checkpoints")
    assert saved is not None and saved.name == "000001"
    assert checkpoint.load(saved)["run"]["rewards"] == {
        "remote": f"served of alignkit {alignkit.__version__} with fingerprint first"
    }
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != "environment.json"}
    with serving(Odd(), fingerprint="second", port=port), pytest.raises(ConfigError) as caught:
        list(alignkit.load(resume=run.folder).train())
    assert str(caught.value) == (
        f"reward remote: found served of alignkit {alignkit.__version__} with fingerprint second, expected served of "
        f"alignkit {alignkit.__version__} with fingerprint first, as when {saved} was saved; serve that one, with "
        "the same settings and versions"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with serving(Odd(), fingerprint="first", port=port):
        assert [update.step for update in alignkit.load(resume=run.folder).train()] == [2]


def test_a_reward_that_no_longer_reports_its_identity_is_refused() -> None:
    rewards = WeightedRewards([("odd", 1.0, Odd())])
    rewards.check_identities({}, "it was saved")
    with pytest.raises(ConfigError, match=r"^reward odd: found a backend without identity, expected a, as when it"):
        rewards.check_identities({"odd": "a"}, "it was saved")


@contextmanager
def another_process(reward: str) -> Iterator[str]:
    """Start `alignkit serve`, yield its URL, and kill the process at the end."""
    command = [sys.executable, "-m", "alignkit", "serve", reward, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2].rstrip(",")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_whose_server_is_killed_stops_in_one_line_and_resumes_with_the_same_result(
    tiny_run: Callable[..., Any],
) -> None:
    few: dict[str, Any] = {"evaluate.prompts": "", "algorithm.name": "ddpo", "algorithm.samples": 2}
    for _ in (local := tiny_run("local", {"reward": ["jpeg_incompressibility"], **few})).train():
        pass
    with another_process("jpeg_incompressibility") as url:
        run = tiny_run("remote", {"reward": [{"name": "remote", "url": url, "retries": 1}], **few})
        updates = run.train()
        while next(updates).step < 3:
            pass
    with pytest.raises(TransientError, match=r"remote: no answer from .*/score in 2 tries") as caught:
        list(updates)
    assert "\n" not in str(caught.value)
    saved = checkpoint.latest(run.folder / "checkpoints")
    assert saved is not None and saved.name.endswith("3")
    with pytest.raises(TransientError, match=r"refused\); check that the server is up$"):
        list(alignkit.load(resume=run.folder).train())
    port = int(url.rpartition(":")[2])
    message = "found jpeg_compressibility of .*, expected jpeg_incompressibility of"
    with running(open_server("jpeg_compressibility", port=port)), pytest.raises(ConfigError, match=message):
        list(alignkit.load(resume=run.folder).train())
    with running(open_server("jpeg_incompressibility", port=port)):
        for _ in alignkit.load(resume=run.folder).train():
            pass
    states = []
    for folder in (local.folder, run.folder):
        newest = checkpoint.latest(folder / "checkpoints")
        assert newest is not None
        states.append(checkpoint.load(newest)["trainer"])
    assert not differences(states[0], states[1])
