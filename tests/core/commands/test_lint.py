from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.commands.lint import lint, questions
from alignkit.config import load as config
from alignkit.data.prompt_sets import FOLDER, PROMPT_SETS, prompt_file
from alignkit.data.prompt_sets.build import build
from alignkit.data.prompts import read_examples
from alignkit.errors import AlignkitError, ConfigError
from alignkit_rewards.phrases import find_phrases


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prompts", *arguments], prog_name="alignkit")


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


# Sets


def test_the_sets_are_the_files_of_the_folder_and_those_of_templates_are_as_built() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == PROMPT_SETS.keys()
    for name, prompts in build().items():
        assert (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines() == prompts


def test_no_prompt_is_repeated_and_none_is_both_trained_on_and_held_out() -> None:
    for name in (name for name in PROMPT_SETS if not name.endswith("_held_out")):
        trained, held_out = ([e.text for e in read_examples(one)] for one in (name, f"{name}_held_out"))
        assert len({*trained, *held_out}) == len(trained) + len(held_out)
    assert len(read_examples("animals")) == 45


@pytest.mark.parametrize("name", ["attributes", "attributes_held_out"])
def test_phrases_of_the_attribute_sets_are_what_they_were_made_from(name: str) -> None:
    for example in read_examples(name):
        made = [part.split() for part in example.text.split(" and ")]
        found = [(phrase.head, list(phrase.attributes)) for phrase in find_phrases(example.text)]
        assert found == [(thing, [attribute]) for _, attribute, thing in made]


def test_a_run_file_names_a_set_and_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text('[data]\nprompts = "animals"\n[evaluate]\nprompts = "animals_held_out"\n', encoding="utf-8")
    found = config.load(file)
    assert found.data.prompts == str(FOLDER / "animals.txt")
    assert found.evaluate.prompts == str(FOLDER / "animals_held_out.txt")
    (tmp_path / "resolved").mkdir()
    (tmp_path / "resolved" / "run.toml").write_text(config.to_toml(found), encoding="utf-8")
    assert config.load(tmp_path / "resolved" / "run.toml") == found
    (tmp_path / "animals").write_text("a cat\n", encoding="utf-8")
    assert config.load(file).data.prompts == str(tmp_path / "animals")
    assert prompt_file("animals") == Path("animals")


def test_a_name_that_is_neither_file_nor_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="prompts: there is no file animls, and no prompt set animls; did you mean"):
        read_examples("animls")


# lint


def test_lint_reports_what_a_reward_rejects_before_any_weight_loads() -> None:
    count, findings = lint("animals", "attribute_binding")
    assert count == len(findings) == 45
    assert findings[3].number == 4 and findings[3].prompt == "monkey" and findings[3].problem == "unscorable"
    assert "attribute_binding: the prompt 'monkey' has no attribute to bind" in findings[3].why
    assert lint("attributes", "attribute_binding") == (300, [])


def test_lint_reports_broken_and_repeated_prompts(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", '{"text": "A red cup."}', '{"tex": 1}', '{"text": "a  red cup"}')
    count, findings = lint(file, "attribute_binding")
    assert count == 2
    assert [(f.problem, f.number, f.prompt) for f in findings] == [("broken", 0, ""), ("repeated", 2, "a  red cup")]
    assert "line 2" in findings[0].why and findings[1].why == "same text as prompt 1"


def test_with_load_words_that_the_reward_does_not_know_are_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a red circle and a blue square", "a red kite")
    assert lint(file, "attribute_binding") == (2, [])
    _, (finding,) = lint(file, "attribute_binding", load=True)
    assert (finding.problem, finding.prompt) == ("unscorable", "a red kite")


SHORT_SIGHTED = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("short_sighted", "short_sighted.reward:ShortSighted", "Reads three letters")
"""
SHORT_SIGHTED_REWARD = """
    import torch
    from alignkit.interfaces import Reward
    from alignkit.records import Scores


    class ShortSighted(Reward):
        def __call__(self, images, examples):
            values = images.mean((1, 2, 3))
            cut = torch.tensor([float(len(example.text) > 3) for example in examples])
            return Scores(values, torch.ones(len(values), dtype=torch.bool), {"truncated": cut})
"""


def test_with_load_prompts_that_the_reward_truncates_are_reported(tmp_path: Path, plugins: Any) -> None:
    plugins.install("short_sighted", SHORT_SIGHTED, reward=SHORT_SIGHTED_REWARD)
    _, (finding,) = lint(write(tmp_path / "p.txt", "cat", "catamaran"), "short_sighted", load=True)
    assert (finding.problem, finding.number, finding.prompt) == ("truncated", 2, "catamaran")
    assert finding.why == "short_sighted: does not read all of it; the end of the prompt is ignored"


def test_lint_blames_the_reward_and_no_prompt_for_its_own_settings() -> None:
    with pytest.raises(ConfigError, match="attribute_binding: there is no folder '/nowhere' to load the judge from"):
        lint("attributes", "attribute_binding", {"reward.attribute_binding.judge": "/nowhere"})
    with pytest.raises(AlignkitError, match="unknown reward 'attributebinding'"):
        lint("attributes", "attributebinding")


def test_the_command_exits_with_1_where_a_prompt_cannot_be_scored(tmp_path: Path) -> None:
    clean = run("lint", "attributes", "--reward", "attribute_binding")
    assert clean.exit_code == 0 and clean.stdout == "attributes: 300 prompts, 0 problems\n"
    repeated = run("lint", write(tmp_path / "p.txt", "a red cup", "a red cup"), "--reward", "attribute_binding")
    assert repeated.exit_code == 0 and "repeated prompt 2: a red cup\n  same text as prompt 1\n" in repeated.stdout
    refused = run("lint", "animals", "--reward", "ocr", "--json")
    assert refused.exit_code == 1
    report = json.loads(refused.stdout)
    assert report["prompts"] == 45 and report["findings"][0]["problem"] == "unscorable"


# phrases


def test_phrases_are_the_questions_of_the_reward(tmp_path: Path) -> None:
    (found,) = questions("a red chair and a cat", "attribute_binding")
    assert found.questions == ("is there a chair?", "is the chair red?", "is there a cat?") and not found.refused
    given = '{"text": "a tomato", "phrases": [{"head": "bench", "attributes": ["red"]}]}'
    (found,) = questions(write(tmp_path / "p.jsonl", given), "attribute_binding")
    assert found.questions == ("is there a bench?", "is the bench red?")
    (found,) = questions("a cat", "attribute_binding")
    assert found.questions == ("is there a cat?",) and "no attribute to bind" in found.refused
    (found,) = questions('a sign "OPEN"', "ocr")
    assert found.questions == ('does it say "open"?',)
    (found,) = questions("a cat", "vqa_score")
    assert found.questions == ('Does this figure show "a cat"? Please answer yes or no.',)


def test_a_reward_without_questions_is_an_error_and_a_missing_file_is_not_taken_as_a_prompt() -> None:
    with pytest.raises(ConfigError, match="reward clip_score: has no questions to show; it reads prompts as they are"):
        questions("a cat", "clip_score")
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read"):
        questions("missing.txt", "attribute_binding")


def test_the_command_prints_prompts_and_questions() -> None:
    assert run("phrases", "a blue cup").stdout == "a blue cup\n  is there a cup?\n  is the cup blue?\n"
    (one,) = json.loads(run("phrases", "a cat", "--json").stdout)
    assert one["prompt"] == "a cat" and one["questions"] == ["is there a cat?"] and one["refused"]


# The model


def test_prompts_longer_than_the_models_text_encoder_reads_are_found_without_weights(
    tmp_path: Path, tiny_lcm: Path
) -> None:
    file = write(tmp_path / "prompts.txt", "a red circle", "a red circle and " * 20 + "a blue square")
    for overrides, who, limit in (
        ({"model.name": str(tiny_lcm)}, f"model {tiny_lcm}", "24"),
        ({}, "Stable Diff", "77"),
    ):
        count, (finding,) = lint(file, "pixel_check", overrides)
        assert count == 2 and (finding.problem, finding.number) == ("truncated", 2)
        assert finding.why.startswith(who) and f"reads {limit} tokens, found 8" in finding.why


def test_marks_of_other_tools_are_found_and_named(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.txt", "a (red:1.3) circle", "a red circle <lora:ink:1>", "a __colour__ circle")
    found = run("lint", file, "--reward", "clip_score")
    assert found.exit_code == 0 and found.stdout.endswith("3 prompts, 3 problems\n")
    for line in (
        "'(red:1.3)' is a weight in other tools",
        "'<lora:ink:1>' is an adapter",
        "'__colour__' is a wildcard",
    ):
        assert line in found.stdout
