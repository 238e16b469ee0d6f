from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.registry import KINDS, default_registry, plural

OURS = [row for row in default_registry().components() if row.distribution == "alignkit"]


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(arguments), prog_name="alignkit")


def test_list_has_a_heading_for_each_kind_and_the_whole_help_of_each_entry_in_80_columns() -> None:
    lines = run("list").stdout.splitlines()
    headings = [plural(kind) for kind in KINDS if any(row.kind == kind for row in OURS)]
    assert [line for line in lines if not line.startswith("  ")] == headings
    heading = name = ""
    shown: dict[tuple[str, str], str] = {}
    for line in lines:
        if line in headings:
            heading = line
        elif line.startswith("   "):  # goes on
            shown[heading, name] += f" {line.strip()}"
        else:
            name, about = line.split(maxsplit=1)
            shown[heading, name] = about
    assert shown == {(plural(row.kind), row.name): row.help for row in OURS}
    assert max(map(len, lines)) <= 80 and lines == [line.rstrip() for line in lines]


def test_list_names_the_origin_of_what_alignkit_does_not_bring(acme: Any) -> None:
    result = run("list", "samplers")
    assert result.exit_code == 0
    heading, *lines = result.stdout.splitlines()
    assert heading == "samplers"
    (shown,) = [line for line in lines if "acme_sampler" in line]
    assert re.fullmatch(r"  acme_sampler +A sampler  \(acme 2\.5\)", shown)
    assert not any("alignkit" in line for line in lines) and "acme_red" not in result.stdout


def test_list_wraps_a_long_description_under_itself(plugins: Any) -> None:
    words = "Many words about a reward. " * 9
    init = f"""
        from alignkit import hookimpl

        @hookimpl
        def register_rewards(register):
            register("wordy", "wordy.parts:Wordy", {words!r})
    """
    plugins.install("wordy", init)
    lines = run("list").stdout.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("  wordy ")]
    indent = lines[first].index("Many")
    shown = lines[first : first + 7]
    assert len(lines[first]) > 60 and all(line[:indent].isspace() for line in shown[1:5])
    assert " ".join(line[indent:] for line in shown[:5]).startswith(f"{words} (wordy 1.0)")


def test_list_takes_a_kind_in_the_singular_and_in_the_plural(acme: Any) -> None:
    for kind in KINDS:
        result = run("list", kind)
        assert result.exit_code == 0 and result.stdout == run("list", plural(kind).upper()).stdout
        assert result.stdout.splitlines()[0] == plural(kind)


def test_list_reports_that_there_is_none_of_a_kind() -> None:
    result = run("list", "commands")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no commands\n")


def test_list_as_json_is_json(acme: Any) -> None:
    rows = json.loads(run("list", "reward", "--json").stdout)
    assert {"kind": "reward", "name": "acme_red"}.items() <= next(r for r in rows if r["name"] == "acme_red").items()


def test_list_shows_a_broken_plugin_with_its_whole_reason(acme: Any) -> None:
    acme.install("shaky", "import a_module_that_is_missing")
    result = run("list")
    assert result.exit_code == 0 and "acme_sampler" in result.stdout
    reason = result.stdout.partition("\nbroken plugins\n")[2]
    assert " ".join(reason.split()) == (
        "shaky ModuleNotFoundError: No module named 'a_module_that_is_missing' (shaky 1.0)"
    )


def test_list_of_an_unknown_kind_names_the_kinds() -> None:
    result = run("list", "sampelrs")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: list: found 'sampelrs'") and "did you mean samplers?" in result.stderr


def test_show_prints_paper_fields_defaults_and_docs(acme: Any) -> None:
    stdout = run("show", "acme-steps").stdout
    for part in ("acme 2.5", "rounds = 3  integer", "Rounds of each batch.", "clip = 0.2", 'mode = "hard"'):
        assert part in stdout
    assert "Acme et al. 2026" in run("show", "acme_plain").stdout


def test_show_prints_every_paragraph_of_a_docstring_and_the_whole_doc_of_a_field(plugins: Any) -> None:
    init = """
        from alignkit import hookimpl

        @hookimpl
        def register_samplers(register):
            register("long", "long.parts:Long", "Has much to say")
    """
    parts = '''
        from dataclasses import dataclass

        from alignkit import Sampler


        @dataclass
        class Long(Sampler):
            """First line.

            Second paragraph, of
            two lines.

            Additions, not in the paper: pace.
            """

            pace: float = 1.0
            """Speed of each step. Not in the paper: Acme's own addition, which makes
            long rollouts shorter."""

            def grid(self, policy): ...
            def transition(self, policy, x, k, prompt): ...
    '''
    plugins.install("long", init, parts=parts)
    stdout = run("show", "long").stdout
    for part in ("First line.\n", "\nSecond paragraph, of two lines.\n", "\nAdditions, not in the paper: pace.\n"):
        assert part in stdout
    doc = "Speed of each step. Not in the paper: Acme's own addition, which makes long rollouts shorter."
    assert doc in " ".join(stdout.split())


def test_show_as_json_has_every_field(acme: Any) -> None:
    (found,) = json.loads(run("show", "acme_steps", "--json").stdout)
    fields = {field["name"]: field for field in found["fields"]}
    assert fields["rounds"] == {"name": "rounds", "type": "integer", "default": "3", "doc": "Rounds of each batch."}


def test_show_knows_models_and_sections(acme: Any) -> None:
    assert "under acme_steps: algorithm.clip" in run("show", "acme_model").stdout
    assert "ema_decay = 0.99" in run("show", "train").stdout


def test_show_of_an_unknown_name_names_the_nearest(acme: Any) -> None:
    result = run("show", "acme_smapler")
    assert result.exit_code == 1 and "did you mean acme_sampler?" in result.stderr


def changed(*arguments: str) -> list[str]:
    """The lines after the heading about a model."""
    _, _, lines = run("show", *arguments, columns=120).stdout.partition(" changes:\n")
    return [line.rstrip() for line in lines.splitlines()]


def test_show_lists_what_the_default_model_changes_under_an_algorithm_its_own_fields_first() -> None:
    lines = changed("ddpo")
    assert lines[:2] == ["  clip_range = 0.001  (default 0.0001)", "  min_count = 4  (default 16)"]
    assert lines[-2:] == ['  sampler.name = "lcm"', "  sampler.num_steps = 4  (default 2)"]
    assert "shapes_lcm, the default model, changes:" in run("show", "ddpo").stdout


def test_show_states_the_reward_or_the_algorithms_that_a_setting_is_limited_to(acme: Any) -> None:
    assert changed("acme_steps", "--model", "acme_model") == [
        "  clip = 0.9  (default 0.2)",
        "  clip = 0.8  (default 0.2; with acme_red as the only reward)",
        "  train.updates = 70  (default 200)",
        "  train.learning_rate = 0.0005  (default 0.0001; with acme_red as the only reward)",
    ]
    assert changed("acme_sampler", "--model", "acme_model") == [
        "  num_steps = 3  (default 2)", "  pace = 0.5  (default 1.0)",
    ]  # fmt: skip
    assert changed("acme_blue", "--model", "acme_model") == ['  judge = "embedded"  (default "public")']
    assert changed("lcm") == ["  num_steps = 4  (default 2; under ddpo, sdpo, rebel, d3po, pso)"]


def test_show_states_the_recipes_that_a_model_takes_by_default() -> None:
    shown = run("show", "lasro", columns=120).stdout
    assert "takes, unless --recipe names another or paper:\n" in shown
    assert "  recipe lasro_shapes, not the paper's  (with attribute_binding as the only reward)" in shown
    assert 'under lasro with attribute_binding: recipe = "lasro_shapes"' in run("show", "shapes_lcm").stdout
    (found,) = json.loads(run("show", "lasro", "--json").stdout)
    assert {"name": "lasro_shapes", "where": "attribute_binding"} in found["model"]["recipes"]


def test_show_prints_what_a_recipe_is_for_and_its_file(acme: Any) -> None:
    shown = run("show", "acme-slow").stdout
    about = (
        "Settings that are not the paper's, for algorithm acme_steps on acme_model, with acme_red as the only reward."
    )
    assert about in " ".join(shown.split())
    assert acme.registry().get("recipe", "acme_slow").read_text().strip() in shown


def test_list_shows_the_algorithm_of_a_recipe_and_who_brings_it(acme: Any) -> None:
    (line,) = [line for line in run("list", "recipes").stdout.splitlines() if "acme_slow" in line]
    assert re.fullmatch(r"  acme_slow +acme_steps: Small steps.*  \(acme 2\.5\)", line)


def test_show_finds_the_surrogate_of_a_model_that_names_it_once() -> None:
    (found,) = json.loads(run("show", "latent_unet", "--json").stdout)
    settings = found["model"]["settings"]
    assert [(s["value"], s["where"]) for s in settings if s["key"] == "warmup"] == [
        ("200", ["lasro"]),
        ("0", ["hybrid with attribute_binding"]),
    ]


def test_show_states_that_a_chosen_model_changes_nothing(acme: Any) -> None:
    assert run("show", "acme_jump", "--model", "acme_model").stdout.endswith(
        "acme_model changes none of these settings.\n"
    )
    assert "changes" not in run("show", "acme_jump").stdout


def test_show_with_an_unknown_model_is_one_line() -> None:
    result = run("show", "lasro", "--model", "shapes_lmc")
    assert (result.exit_code, result.stdout) == (1, "") and "did you mean shapes_lcm?" in result.stderr
    assert result.stderr.count("\n") == 1


def test_show_works_where_the_default_model_is_left_out(acme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_DISABLE_PLUGINS", "alignkit_shapes")
    default_registry.cache_clear()
    result = run("show", "lasro")
    assert result.exit_code == 0 and "changes" not in result.stdout


def test_show_compares_the_regularisers_of_a_model_with_those_of_the_algorithm() -> None:
    for name, default in (("draft", "[]"), ("hybrid", "[]"), ("ddpo", None)):
        settings = {s["key"]: s for s in json.loads(run("show", name, "--json").stdout)[0]["model"]["settings"]}
        assert ("regulariser" in settings) == (default is not None)
        assert default is None or settings["regulariser"]["default"] == default
