from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.commands.curate import BLOCK, FaissIndex, TextEmbedding, TorchIndex, curate
from alignkit.commands.lint import lint, questions
from alignkit.config import load as config
from alignkit.data.prompt_sets import FOLDER, PROMPT_SETS, prompt_file
from alignkit.data.prompt_sets.build import build
from alignkit.data.prompts import read_examples
from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import Example
from alignkit_rewards.phrases import find_phrases
from alignkit_shapes.models import WEIGHTS


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
    assert "line 2" in findings[0].why and findings[1].why == "prompt 1 again"


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
    assert repeated.exit_code == 0 and "repeated prompt 2: a red cup\n  prompt 1 again\n" in repeated.stdout
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
    with pytest.raises(ConfigError, match="reward clip_score: asks no questions; it reads prompts as they are"):
        questions("a cat", "clip_score")
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read"):
        questions("missing.txt", "attribute_binding")


def test_the_command_prints_prompts_and_questions() -> None:
    assert run("phrases", "a blue cup").stdout == "a blue cup\n  is there a cup?\n  is the cup blue?\n"
    (one,) = json.loads(run("phrases", "a cat", "--json").stdout)
    assert one["prompt"] == "a cat" and one["questions"] == ["is there a cat?"] and one["refused"]


# curate


def angles(texts: Any) -> torch.Tensor:
    """Map a text, a number of degrees, to a point on the unit circle."""
    radians = torch.tensor([float(text.strip(" .")) for text in texts]).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def texts(*values: float | str) -> list[Example]:
    return [Example(str(value)) for value in values]


def test_the_kept_prompts_agree_with_a_case_worked_out_by_hand() -> None:
    # 1 - cos(20 degrees) is .0603, 1 - cos(30 degrees) .134.
    kept, dropped = curate(texts(0, 20, 30, "0 .", 55, 350, 30), angles, distance=0.1, search="torch")
    assert [example.text for example in kept] == ["0", "30"]
    assert [(d.prompt, d.near, d.repeated) for d in dropped] == [
        ("20", "0", False), ("0 .", "0", True), ("55", "30", False), ("350", "0", False), ("30", "30", True),
    ]  # fmt: skip
    assert dropped[0].distance == pytest.approx(0.0603, abs=1e-4)


def test_a_repetition_of_a_dropped_prompt_names_the_kept_one() -> None:
    _, dropped = curate(texts(0, 1, 1), angles, search="torch")
    assert [(d.near, d.repeated) for d in dropped] == [("0", False), ("0", True)]


def test_distance_0_drops_repetitions_alone_and_the_limit_ends_the_search() -> None:
    kept, _ = curate(texts(0, 1, 1, 2), angles, distance=0.0, search="torch")
    assert [example.text for example in kept] == ["0", "1", "2"]
    kept, dropped = curate(texts(0, 1, 90, 180, 270), angles, limit=2, search="torch")
    assert [example.text for example in kept] == ["0", "90"] and [d.prompt for d in dropped] == ["1"]


@pytest.fixture
def many() -> tuple[list[Example], Any]:
    """More prompts than fit into a block, with vectors in clusters."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, 16, generator=generator)
    count = 3 * BLOCK + 17
    chosen = torch.randint(40, (count,), generator=generator)
    vectors = centers[chosen] + torch.randn(count, 16, generator=generator) * 0.4
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return texts(*range(count)), lambda some: vectors[[int(text) for text in some]]


def test_it_equals_the_greedy_choice_pair_by_pair(many: Any) -> None:
    examples, embed = many
    vectors = embed([example.text for example in examples])
    expected: list[int] = []
    for i in range(len(examples)):
        if all(1 - float(vectors[i].double() @ vectors[j].double()) > 0.15 for j in expected):
            expected.append(i)
    kept, dropped = curate(examples, embed, 0.15, search="torch")
    assert [int(example.text) for example in kept] == expected
    assert BLOCK / 4 < len(kept) < len(examples) - BLOCK / 4 and len(kept) + len(dropped) == len(examples)


def test_faiss_gives_the_same(many: Any) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra")
    examples, embed = many
    assert curate(examples, embed, 0.15, search="faiss") == curate(examples, embed, 0.15, search="torch")
    ours, theirs = TorchIndex(), FaissIndex(16)
    vectors = embed([example.text for example in examples])
    for index in (ours, theirs):
        for block in vectors[:500].split(BLOCK):
            index.add(block)
    assert ours.nearest(vectors[500:]) == theirs.nearest(vectors[500:])


def test_a_missing_faiss_that_is_named_is_an_error_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"search: faiss is not installed; pip install 'alignkit\[faiss\]'"):
        curate(texts(0), angles, search="faiss")
    assert len(curate(texts(0, 1, 90), angles)[0]) == 2


def test_the_models_own_text_encoder_distinguishes_texts_whatever_the_batch() -> None:
    embed = TextEmbedding(model="shapes_lcm")
    words = ["a red circle", "A red circle", "a red square", "a red circle, a blue square and a green heart"]
    vectors = embed(words)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert vectors[0] @ vectors[1] > 0.9999 > 0.95 > vectors[0] @ vectors[2]
    for i, word in enumerate(words):
        torch.testing.assert_close(embed([word])[0], vectors[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_other_encoders_are_the_mean_of_their_tokens_and_clip_its_projection(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(WEIGHTS / "shapes_lcm" / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields: dict[str, Any] = {
        "bert": {**size, "vocab_size": len(words)},
        "t5": {"vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        "clip": {"text_config": {**size, "vocab_size": len(words), "eos_token_id": words.eos_token_id},
                 "vision_config": {**size, "image_size": 32, "patch_size": 16}, "projection_dim": 16},
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **fields)).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    vectors = TextEmbedding(str(tmp_path))(["a red circle", "a red circle and a blue square"])
    ids = words("a red circle", return_tensors="pt").input_ids
    with torch.no_grad():
        if kind == "clip":
            expected = model.text_projection(model.text_model(ids).pooler_output)[0]
        else:
            expected = (model.encoder if kind == "t5" else model)(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(vectors[0], expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_a_source_that_is_not_a_text_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder: '.*vae' cannot be used: .*; expected a hub id or a folder of a"):
        TextEmbedding(str(WEIGHTS / "shapes_lcm" / "vae"))


def test_the_command_writes_the_kept_prompts_with_their_metadata(tmp_path: Path) -> None:
    lines = ('{"text": "a red circle", "n": 1}', '{"text": "a red  circle"}', '{"text": "a cat"}')
    file = write(tmp_path / "p.jsonl", *lines)
    result = run("curate", file, "--out", str(tmp_path / "kept.jsonl"), "--json", "--search", "torch")
    report = json.loads(result.stdout)
    assert (report["read"], report["kept"], [d["repeated"] for d in report["dropped"]]) == (3, 2, [True])
    assert read_examples(tmp_path / "kept.jsonl") == [Example("a red circle", {"n": 1}), Example("a cat")]
    result = run("curate", "attributes", "--out", str(tmp_path / "kept.txt"), "--limit", "5")
    assert " of 300 prompts kept; 0 repeated, " in result.stdout and "not reached" in result.stdout
    assert "by the text encoder of shapes_lcm" in result.stdout
    assert "warning: shapes_lcm is the default model; name an --encoder that suits these prompts" in result.stdout
    file = write(tmp_path / "long.txt", "red " * 200 + "circle", "red " * 200 + "square")
    result = run("curate", file, "--out", str(tmp_path / "short.txt"), "--model", "shapes_lcm")
    assert "warning: 2 prompts are longer than the encoder reads" in result.stdout
    assert "default model" not in result.stdout
    assert len(read_examples(tmp_path / "kept.txt")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "there.txt"], "--out there.txt: exists already; choose another name"),
        (["--out", "kept.csv"], "--out kept.csv: expected a name that ends in .txt or .jsonl"),
        (["--out", "kept.txt"], "--out kept.txt: p.jsonl has metadata or texts of several lines"),
        (["--out", "kept.jsonl", "--distance", "2"], "distance: found 2.0, expected 0 or more and less than 2"),
        (["--out", "kept.jsonl", "--search", "hnsw"], "search: found 'hnsw', expected one of auto, faiss, torch"),
        (["--out", "kept.jsonl", "--encoder", "/nowhere"], "encoder: '/nowhere' cannot be used"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", '{"text": "a red circle", "n": 1}')
    write(tmp_path / "there.txt", "mine")
    result = run("curate", "p.jsonl", *arguments)
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert (tmp_path / "there.txt").read_text() == "mine\n" and not list(tmp_path.glob("kept*"))
