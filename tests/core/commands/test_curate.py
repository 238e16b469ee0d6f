"""`alignkit prompts curate`: the kept prompts, the search, the text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.commands.curate import BLOCK, FaissIndex, TextEmbedding, TorchIndex, curate
from alignkit.data.prompts import read_examples
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit_shapes.models import WEIGHTS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prompts", *arguments], prog_name="alignkit")


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


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
