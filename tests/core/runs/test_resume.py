"""Runs resume after whatever ended them, bit for bit, and two of them share nothing."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alignkit
from alignkit.config.load import to_toml
from alignkit.errors import PluginError
from alignkit.models.pipelines import LORA_FILE
from alignkit.runs.run import Run
from alignkit.testing.expect import leaves
from alignkit.training import checkpoint
from run_fixtures import assert_same, assert_same_but_surroundings, files, final_state, metrics

MakeRun = Callable[..., Run]


def stop_after(run: Run, updates: int) -> None:
    for update in run.train():
        if update.step == updates:
            run.stop()


def leave_after(run: Run, updates: int) -> None:
    for update in run.train():
        if update.step == updates:
            break


@pytest.mark.parametrize("end", [stop_after, leave_after])
def test_a_run_that_is_stopped_or_left_has_its_weights_and_ends_with_the_same_bits(
    tiny_run: MakeRun, end: Callable[[Run, int], None]
) -> None:
    overrides = {"train.updates": 5, "evaluate.every": 2, "train.keep_checkpoints": 3}
    unbroken, broken = tiny_run("unbroken", overrides), tiny_run("broken", overrides)
    assert [u.step for u in unbroken.train()] == [1, 2, 3, 4, 5]
    end(broken, 3)
    average = checkpoint.load(broken.folder / "checkpoints" / "000003")["trainer"]["average"]
    exported = load_file(broken.folder / LORA_FILE)
    assert leaves(sorted(t.flatten().tolist() for t in exported.values())) == leaves(
        sorted(t.flatten().tolist() for t in average.values())
    )
    resumed = alignkit.load(resume=broken.folder)
    resumed.sample(["a red circle"])  # to look at the state in between is no reason to lose it
    assert [u.step for u in resumed.train()] == [4, 5]
    assert_same(unbroken.folder, broken.folder)


def test_a_run_that_an_error_of_the_caller_ends_is_saved(tiny_run: MakeRun) -> None:
    run = tiny_run()
    updates = run.train()
    with pytest.raises(ZeroDivisionError):
        for update in updates:
            1 / (update.step - 2)
    updates.close()  # as Python does once nobody holds the generator
    assert checkpoint.latest(run.folder / "checkpoints") == run.folder / "checkpoints" / "000002"
    assert (run.folder / LORA_FILE).is_file()


def test_full_fine_tuning_resumes_with_the_same_bits_and_is_exported_whole(tiny_run: MakeRun) -> None:
    overrides = {"model.lora_rank": 0, "train.updates": 2, "train.checkpoint_every": 1}
    unbroken, broken = tiny_run("unbroken", overrides), tiny_run("broken", overrides)
    list(unbroken.train())
    stop_after(broken, 1)
    list(alignkit.load(resume=broken.folder).train())
    assert_same(unbroken.folder, broken.folder)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (unbroken.folder / "unet" / name).read_bytes() == (broken.folder / "unet" / name).read_bytes()


def test_two_runs_in_one_process_do_not_influence_each_other(tiny_run: MakeRun) -> None:
    other = {"seed": 5, "train.learning_rate": 1e-2, "sampler.num_steps": 1, "algorithm.step_weights": [1.0]}
    alone = [tiny_run("a"), tiny_run("b", other)]
    for run in alone:
        list(run.train())
    together = [tiny_run("c"), tiny_run("d", other)]
    for _ in itertools.zip_longest(*(run.train() for run in together)):
        torch.rand(1)  # nor do random numbers of the surroundings matter
    for one, same in zip(alone, together, strict=True):
        assert_same_but_surroundings(one.folder, same.folder)


def test_the_same_run_twice_gives_the_same_bits_and_stays_as_it_is_when_it_is_resumed_at_its_end(
    tiny_run: MakeRun,
) -> None:
    runs = [tiny_run("a"), tiny_run("b")]
    for run in runs:
        list(run.train())
    assert_same(runs[0].folder, runs[1].folder)
    finished = runs[0].folder
    before = (metrics(finished), leaves(final_state(finished)), files(finished))
    assert list(alignkit.load(resume=finished).train()) == []
    assert (metrics(finished), leaves(final_state(finished)), files(finished)) == before


def test_another_seed_gives_other_bits(tiny_run: MakeRun) -> None:
    settings = {"algorithm.name": "ddpo", "algorithm.samples": 2, "train.updates": 1, "evaluate.prompts": ""}
    runs = [tiny_run(f"seed {seed}", settings | {"seed": seed}) for seed in (0, 1)]
    for run in runs:
        list(run.train())
    assert files(runs[0].folder) != files(runs[1].folder)


FAULTY = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        for name in ("Raises", "Nan", "Wide"):
            register(name.lower(), f"faulty.rewards:{name}", "Breaks at the ninth call")
"""

FAULTY_REWARDS = """
    import torch
    from alignkit.interfaces import Reward


    class Faulty(Reward):
        calls = 0

        def __call__(self, images, examples):
            self.calls += 1
            values = images.mean((1, 2, 3))
            return values if self.calls < 9 else self.fault(values)


    class Raises(Faulty):
        def fault(self, values):
            raise RuntimeError("no server today\\nat all")


    class Nan(Faulty):
        def fault(self, values):
            return values * torch.nan


    class Wide(Faulty):
        def fault(self, values):
            return values[:, None]
"""


@pytest.mark.parametrize(
    ("reward", "message"), [("raises", "no server today"), ("nan", "finite"), ("wide", r"shape \(6, 1\)")]
)
def test_a_reward_that_breaks_is_named_in_one_line_and_the_run_is_saved_where_it_stood(
    tiny_run: MakeRun, plugins: Any, reward: str, message: str
) -> None:
    plugins.install("faulty", FAULTY, rewards=FAULTY_REWARDS)
    run = tiny_run(overrides={"reward": [reward], "evaluate.prompts": "", "train.updates": 9})
    with pytest.raises(PluginError, match=message) as caught:
        list(run.train())
    assert f"'{reward}'" in str(caught.value) and "\n" not in str(caught.value)
    saved = checkpoint.latest(run.folder / "checkpoints")
    assert saved is not None and saved.name == "000003"
    assert checkpoint.load(saved)["trainer"]["update"] == 3
    assert f"resume with: alignkit train --resume {run.folder}" in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tiny_run: MakeRun, plugins: Any) -> None:
    overrides = {"train.updates": 8, "train.checkpoint_every": 1}
    unbroken, broken = tiny_run("unbroken", overrides), tiny_run("broken", overrides)
    list(unbroken.train())
    settings = broken.folder.parent / "broken.toml"
    settings.write_text(to_toml(broken.config))
    code = (
        f"import sys; sys.path.insert(0, {str(plugins.path)!r}); import torch; torch.set_num_threads("
        f"{torch.get_num_threads()}); import alignkit; list(alignkit.load({str(settings)!r}).train())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while not (broken.folder / "checkpoints" / "000003").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (broken.folder / LORA_FILE).is_file()  # of the last checkpoint
    steps = [u.step for u in alignkit.load(resume=broken.folder).train()]
    assert steps[0] >= 4 and steps[-1] == 8
    # Two processes start with different global generators of Python and NumPy; alignkit uses neither.
    assert_same_but_surroundings(unbroken.folder, broken.folder)
