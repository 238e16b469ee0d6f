"""Commands that plugins add through `register_commands`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.errors import PluginError
from alignkit.registry import OWN_COMMANDS, default_registry, normalise

INIT = """
    from alignkit import hookimpl

    @hookimpl
    def register_commands(register):
        register("{name}", "tool.commands:{target}", "A tool")
"""
GROUP = '''
    import typer

    app = typer.Typer(help="Count things.")
    NUMBER = 3


    @app.command()
    def up(to: int) -> None:
        """Count up."""
        typer.echo(" ".join(map(str, range(1, to + 1))))


    @app.command()
    def down(start: int) -> None:
        """Count down."""
        typer.echo(" ".join(map(str, range(start, 0, -1))))


    def unreadable(x: "Missing"): ...


    def undocumented(): typer.echo("done")


    def refuses():
        from alignkit.errors import AlignkitError

        raise AlignkitError("tool: found no hammer, expected one")
'''


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(arguments), prog_name="alignkit")


def add(plugins: Any, name: str, target: str) -> None:
    plugins.install("tool", INIT.format(name=name, target=target), commands=GROUP)


def test_a_plugin_adds_a_command_that_runs_by_either_spelling(acme: Any) -> None:
    for name in ("acme-greet", "acme_greet"):
        result = run(name, "Ada", "--times", "2")
        assert (result.exit_code, result.stdout) == (0, "Hello Ada\nHello Ada\n")
    result = run("acme-greet", "Ada", "--times", "0")
    assert result.exit_code == 2 and "Invalid value for '--times'" in result.stderr


def test_its_help_is_that_of_a_command_of_alignkit(acme: Any) -> None:
    for flag in ("-h", "--help"):
        stdout = run("acme-greet", flag).stdout
        assert stdout.startswith("Usage: alignkit acme-greet [OPTIONS]") and "How often." in stdout
        assert "\n  alignkit acme-greet Ada --times 2\n" in stdout


def test_it_is_listed_and_shown_with_its_origin(acme: Any) -> None:
    assert run("list", "commands").stdout == "commands\n  acme_greet  Greet somebody  (acme 2.5)\n"
    shown = run("show", "acme-greet").stdout
    assert "command acme_greet plugin acme of acme 2.5" in shown and "`alignkit acme_greet --help`" in shown


def test_the_help_of_alignkit_names_it_and_does_not_import_it(acme: Any) -> None:
    code = (
        "import sys; from alignkit.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print('acme.commands' in sys.modules, 'torch' in sys.modules, file=sys.stderr)"
    )
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join([str(acme.path), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, text=True, check=True)
    assert any(line.split() == ["acme-greet", "Greet", "somebody"] for line in result.stdout.splitlines())
    assert result.stderr.strip() == "False False"


def test_a_typer_app_becomes_a_group(plugins: Any) -> None:
    add(plugins, "count", "app")
    assert run("count", "up", "3").stdout == "1 2 3\n" and run("count", "down", "2").stdout == "2 1\n"
    assert "Count things." in run("count", "-h").stdout


def test_a_function_without_a_docstring_has_the_registered_line_as_help(plugins: Any) -> None:
    add(plugins, "quiet", "undocumented")
    assert "A tool" in run("quiet", "--help").stdout and run("quiet").stdout == "done\n"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("gone", "AttributeError"),
        ("NUMBER", "is neither a function nor a typer.Typer"),
        ("unreadable", "its parameters cannot be read by typer"),
        ("refuses", "tool: found no hammer, expected one"),
    ],
)
def test_a_command_that_cannot_run_is_one_line_and_leaves_the_others_alone(
    plugins: Any, target: str, reason: str
) -> None:
    add(plugins, "tool", target)
    result = run("tool")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: ") and reason in result.stderr
    assert target == "refuses" or "plugin tool of tool 1.0" in result.stderr
    assert run("--help").exit_code == run("list").exit_code == 0


def test_the_name_of_a_command_of_alignkit_is_refused(acme: Any) -> None:
    add(acme, "train", "app")
    assert "Train a model" in run("train", "--help").stdout
    listed = " ".join(run("list").stdout.split())
    assert "tool ValueError: command train is registered by alignkit itself; choose another name (tool 1.0)" in listed


def test_every_command_of_alignkit_is_known_to_the_registry() -> None:
    group: Any = typer.main.get_command(app)
    assert {normalise(name) for name in group.commands} == OWN_COMMANDS


def test_a_name_that_two_plugins_bring_is_refused_with_both_origins_and_the_help_still_works(acme: Any) -> None:
    add(acme, "acme-greet", "app")
    with pytest.raises(PluginError, match=r"acme_greet is \w+ by plugin acme of acme 2\.5 and by plugin tool"):
        default_registry()
    result = run("--help")
    assert result.exit_code == 0 and "evaluate" in result.stdout and "acme-greet" not in result.stdout
    assert result.stderr.startswith("error: command acme_greet is ") and result.stderr.count("\n") == 1
    assert run("acme-greet").exit_code == 1


def test_an_unknown_command_names_the_nearest_and_the_plugin_that_may_have_brought_it(acme: Any) -> None:
    result = run("trian")
    assert result.exit_code == 2 and "Did you mean 'train'?" in result.stderr and "warning" not in result.stderr
    acme.install("shaky", "import a_module_that_is_missing")
    default_registry.cache_clear()
    result = run("polish")
    assert result.exit_code == 2 and "No such command 'polish'" in result.stderr
    assert result.stderr.startswith("warning: plugin shaky of shaky 1.0 is broken: ModuleNotFoundError")


def test_check_plugin_imports_a_command_and_reads_its_parameters(plugins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))  # which the command sets
    add(plugins, "count", "app")
    result = run("check-plugin", "tool")
    assert result.exit_code == 0 and "passed" in result.stdout and "its --help" in result.stdout


def test_check_plugin_fails_a_command_that_does_not_import(plugins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    add(plugins, "count", "gone")
    result = run("check-plugin", "tool")
    assert result.exit_code == 1 and "AttributeError" in " ".join(result.stdout.split())
