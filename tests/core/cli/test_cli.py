from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import alignkit
from alignkit.cli.app import app
from alignkit.commands.evaluate import Evaluation, as_csv
from alignkit.config.sections import EvaluateConfig
from alignkit.errors import ConfigError
from alignkit.evaluation.rows import Row
from alignkit.runs.build import Parts

COMMANDS = ["list", "show", "check", "train", "sample", "score", "serve", "pairs", "evaluate", "gallery", "report"]
PROMPT_COMMANDS = ["prompts lint", "prompts phrases", "prompts curate"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="alignkit")


class FakeRun:
    """Stand in for alignkit.runs.run.Run, which other tests cover; count the calls of the command line."""

    folder = Path("runs/first")
    config = SimpleNamespace(
        algorithm=SimpleNamespace(name="acme"), model=SimpleNamespace(name="tiny"), train=SimpleNamespace(updates=3),
        rewards=[SimpleNamespace(name="shine"), SimpleNamespace(name="size")], evaluate=EvaluateConfig(),
    )  # fmt: skip
    departs = ""

    sends = signal.SIGINT

    def __init__(self, calls: list[Any], interrupts: int = 0) -> None:
        self.calls, self.interrupts, self.stopping = calls, interrupts, False

    def stop(self) -> None:
        self.stopping = True

    broken: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        return list(filter(None, [self.config.evaluate.unmeasured()]))

    def misread(self, texts: Any = None) -> list[str]:
        return []

    def departure(self) -> str:
        return self.departs

    description = Parts.description

    def disclosure(self) -> list[str]:
        return [f"imports {self.departs}"] if self.departs else []

    def check(self, servers: bool = True) -> list[str]:
        self.calls.append("check --servers" if servers else "check")
        return list(self.broken)

    def train(self, console: object = None, verbose: bool = False) -> Iterator[int]:
        self.calls.append(("train", console is not None, verbose))
        yield 1
        for _ in range(self.interrupts):
            signal.raise_signal(self.sends)
        self.calls.append("saved")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in place of alignkit.runs.run that records how it was called in `calls`."""
    module: Any = ModuleType("alignkit.runs.run")
    module.calls, module.interrupts, module.error = [], 0, None

    def load(
        path: Path | None = None, overrides: Any = None, resume: Path | None = None, trust: bool = False
    ) -> FakeRun:
        if module.error:
            raise module.error
        module.calls.append(("load", path, overrides, resume))
        return FakeRun(module.calls, module.interrupts)

    def score_batches(reward: str, folder: Path, prompts: Path, overrides: Any, device: str) -> Iterator[list[Any]]:
        module.calls.append(("score", reward, folder, prompts, overrides, device))
        parts = {"acme_red": 0.5, "acme_red/truncated": 0.0}
        for score, own, reason in ((0.5, parts, ""), (None, {}, "no answer")):
            yield [{"image": f"{score}.png", "prompt": "text", "score": score, "parts": own, "reason": reason}]

    def evaluate(
        runs: list[FakeRun], steps: Any, rewards: Any, seen: bool, console: Console, **more: Any
    ) -> Evaluation:
        assert console.stderr  # so that what is printed can be piped
        module.calls.append(("evaluate", len(runs), steps, rewards, seen))
        return Evaluation([Row("acme_red", 2, 64, 0.5, 0.75, 0.25, 0.125, 0.375)])

    def open_run(source: str, overrides: Any = None, trust: bool = False) -> FakeRun:
        module.opened = overrides
        return FakeRun(module.calls)

    module.load, module.open_run = load, open_run
    monkeypatch.setitem(sys.modules, "alignkit.runs.run", module)
    for name, attributes in (
        ("score", {"score_batches": score_batches}),
        ("evaluate", {"evaluate": evaluate, "as_csv": as_csv}),
    ):
        command: Any = ModuleType(f"alignkit.commands.{name}")
        vars(command).update(attributes)
        monkeypatch.setitem(sys.modules, command.__name__, command)
    return module


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [*COMMANDS, "prompts", *PROMPT_COMMANDS])
def test_every_help_teaches_with_an_example_on_a_line_of_its_own(command: str, flag: str) -> None:
    result = run(*command.split(), flag)
    assert result.exit_code == 0
    assert any(line.startswith(f"  alignkit {command} ") for line in result.stdout.splitlines())


def test_help_lists_the_commands_and_version_prints_the_version() -> None:
    assert all(command in run("-h").stdout for command in COMMANDS)
    assert run("--version").stdout == f"alignkit {alignkit.__version__}\n"


@pytest.mark.parametrize("group", [[], ["prompts"]])
def test_help_describes_every_command_in_a_line_of_80_columns_that_is_not_cut(group: list[str]) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*group, "--help"], terminal_width=80)
    commands = result.stdout.partition("\nCommands:\n")[2].splitlines()
    assert len(commands) >= 3 and all(re.fullmatch(r"  [a-z-]+ +[A-Z].*[^.]\.", line) for line in commands)


@pytest.mark.parametrize(
    "arguments",
    ["--help", "list", "list --json", "train --help", "prompts lint -h", "--version"],
)
def test_help_and_list_import_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys; from alignkit.cli import app\n"
        f"try: app({arguments.split()!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'peft', 'accelerate', 'PIL'} & sys.modules.keys()\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_flags_are_shorthands_for_keys(engine: Any) -> None:
    result = run(
        *(
            "train",
            "run.toml",
            "--algo",
            "sdpo",
            "--reward",
            "one",
            "--reward",
            "two=0.2",
            "--model",
            "m",
            "--steps",
            "4",
            "--recipe",
            "paper",
        ),
        *("--out", "here", "--seed", "3", "--set", "train.updates=7", "--set", "sampler.name=ddim", "--quiet"),
    )
    overrides = {
        "algorithm.name": "sdpo",
        "model.name": "m",
        "sampler.num_steps": 4,
        "recipe": "paper",
        "output": "here",
        "seed": 3,
        "reward": [{"name": "one"}, {"name": "two", "weight": 0.2}],
        "train.updates": 7,
        "sampler.name": "ddim",
    }
    assert (result.exit_code, result.stdout) == (0, "runs/first\n")
    assert engine.calls == [("load", Path("run.toml"), overrides, None), ("train", False, False), "saved"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "train: found no run file and no settings; name some, as in: alignkit train --algo lasro"),
        (["train", "--algo", ""], "algorithm.name: found an empty name on the command line"),
        (["train", "run.toml", "--model", ""], "model.name: found an empty name on the command line"),
        (["check", "run.toml", "--out", ""], "output: found an empty name on the command line"),
    ],
)
def test_commands_without_a_name_start_nothing(engine: Any, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {message}") and engine.calls == []


def test_train_shows_its_progress_and_resumes(engine: Any) -> None:
    assert run("train", "--resume", "runs/first", "--verbose").exit_code == 0
    assert engine.calls == [("load", None, {}, Path("runs/first")), ("train", True, True), "saved"]


@pytest.mark.parametrize(("interrupts", "saved"), [(1, True), (2, False)])
def test_an_interrupted_run_stops_after_its_update_or_at_once_and_prints_how_to_resume(
    engine: Any, interrupts: int, saved: bool
) -> None:
    engine.interrupts = interrupts
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    try:
        result = run("train", "run.toml")
        handler = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert (result.exit_code, "saved" in engine.calls) == (130, saved)
    assert result.stderr.endswith("stopped; resume with: alignkit train --resume runs/first\n")
    assert handler is signal.default_int_handler


def test_a_run_that_a_scheduler_ends_is_saved(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "sends", signal.SIGTERM)
    engine.interrupts = 1
    result = run("train", "run.toml")
    assert (result.exit_code, "saved" in engine.calls) == (143, True)
    assert result.stderr.endswith("stopped; resume with: alignkit train --resume runs/first\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_check_prints_one_line_where_all_is_well(engine: Any) -> None:
    assert run("check", "run.toml").stdout == "run.toml: no mistakes found (acme on tiny, shine and size, 3 updates)\n"
    assert engine.calls[-1] == "check"


def test_check_states_what_is_not_the_papers(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "departs", "recipe acme_slow, not the paper's")
    expected = (
        "imports recipe acme_slow, not the paper's\n"
        "run.toml: no mistakes found (acme on tiny, shine and size, 3 updates; recipe acme_slow, not the paper's)\n"
    )
    assert run("check", "run.toml").stdout == expected


def test_check_asks_no_server_unless_told_to(engine: Any) -> None:
    run("check", "run.toml")
    run("check", "run.toml", "--servers")
    assert [call for call in engine.calls if "check" in call] == ["check", "check --servers"]


def test_check_names_held_out_rewards_that_are_never_measured(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun.config, "evaluate", EvaluateConfig(rewards=["shine", {"name": "size"}]))
    assert "evaluate.rewards: not measured (shine, size), because evaluate.prompts" in run("check", "run.toml").stdout
    monkeypatch.setattr(FakeRun.config, "evaluate", EvaluateConfig(rewards=["shine"], prompts="p.txt"))
    assert "not measured" not in run("check", "run.toml").stdout


def test_check_names_what_will_be_skipped(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "broken", ("p.jsonl, line 3",))
    assert run("check", "run.toml").stdout.startswith("skipped as broken: p.jsonl, line 3\nrun.toml: no mistakes")


def test_each_mistake_is_a_line_and_the_exit_status_is_1(engine: Any) -> None:
    engine.error = ConfigError("a.b: first\nc.d: second")
    result = run("check", "run.toml")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: a.b: first\nerror: c.d: second\n")


def test_debug_leaves_the_error_its_traceback(engine: Any) -> None:
    engine.error = ConfigError("a.b: first")
    result = run("--debug", "check", "run.toml")
    assert (result.exit_code, result.exception) == (1, engine.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "updates"], "error: --set updates: expected key.path=value"),
        (["train", "--reward", "one=much"], "error: --reward one=much: found weight 'much'"),
        (["train", "--reward", "one=nan"], "error: --reward one=nan: found weight 'nan', expected NAME or NAME=NUMBER"),
        (["train", "--reward", "one=1e999"], "error: --reward one=1e999: found weight '1e999'"),
        (["evaluate", "runs/first", "--steps", "1,0"], "error: --steps 1,0: expected whole numbers of 1 or more"),
        (["sample", "m", "text", "--steps", "two"], "error: --steps two: expected whole numbers of 1 or more"),
    ],
)
def test_a_flag_that_cannot_be_read_is_one_line(engine: Any, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_score_prints_lines_or_json(engine: Any) -> None:
    arguments = ["score", "acme_red", "images", "--prompts", "p.txt", "--model", "m", "--set", "reward.acme_red.x=1"]
    heading, *lines = run(*arguments, "--device", "cpu").stdout.splitlines()
    assert heading == "     score  truncated  image  prompt"
    assert lines == ["    0.5000          0  0.5.png  text", "not scored             None.png  text  (no answer)"]
    changes = {"model.name": "m", "reward.acme_red.x": 1}
    assert engine.calls == [("score", "acme_red", Path("images"), Path("p.txt"), changes, "cpu")]
    assert [record["score"] for record in json.loads(run(*arguments, "--json").stdout)] == [0.5, None]
    assert engine.calls[-1][-1] == "auto"


def test_evaluate_prints_a_table_or_json_and_writes_csv_once(engine: Any, tmp_path: Path) -> None:
    assert "0.750" in run("evaluate", "runs/first").stdout
    assert engine.calls[-1] == ("evaluate", 1, None, (), True) and not engine.opened
    run("evaluate", "runs/first", "--set", 'evaluate.rewards=["acme_red", {name = "acme_blue", judge = "x"}]')
    assert engine.opened == {"evaluate.rewards": ["acme_red", {"name": "acme_blue", "judge": "x"}]}
    csv = tmp_path / "new" / "table.csv"
    arguments = ["runs/first", "runs/second", "--steps", "1,2", "--reward", "acme_blue", "--unseen"]
    (row,) = json.loads(run("evaluate", *arguments, "--json", "--csv", str(csv)).stdout)
    assert row["after"] == 0.75 and engine.calls[-1] == ("evaluate", 2, [1, 2], ["acme_blue"], False)
    headings, values = (line.split(",") for line in csv.read_text().splitlines())
    assert dict(zip(headings, values, strict=True))["after"] == "0.75"
    again = run("evaluate", "runs/first", "--csv", str(csv))
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_the_package_loads_lazily_and_has_nothing_else() -> None:
    assert "load" in dir(alignkit)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        alignkit.lode  # noqa: B018
