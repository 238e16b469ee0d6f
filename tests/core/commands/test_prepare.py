"""Runs on image files: with a cache, prepared ahead of time, with broken data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import alignkit
from alignkit.cli.app import app
from alignkit.commands.evaluate import evaluate
from alignkit.commands.pairs import make_pairs
from alignkit.commands.prepare import prepare
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.models.encoder_cache import EncoderCache
from alignkit.runs.run import Run
from alignkit.training.checkpoint import latest
from run_fixtures import metrics

MakeRun = Callable[..., Run]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five captioned images, the third of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"image {name}")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:500])
    return folder


@pytest.fixture
def settings(images: Path) -> dict[str, Any]:
    return {"data.images": str(images), "data.on_error": "skip", "evaluate.every": 0}


def left(folder: Path) -> dict[str, bytes | list[Any]]:
    """Everything that a finished run writes, except for times, memory and the file that names its cache."""
    saved = latest(folder / "checkpoints")
    assert saved is not None
    files = [saved / "state.safetensors", *folder.glob("*.safetensors"), *folder.glob("samples/*.png")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files} | {"metrics": metrics(folder)}


def warnings(folder: Path) -> list[str]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["warning"] for record in records if "warning" in record]


def test_a_cache_changes_no_bit_of_a_run(tiny_run: MakeRun, settings: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_run("plain", settings)
    list(plain.train())
    cached = settings | {"data.cache": str(tmp_path / "cache")}
    cold = tiny_run("cold", cached)
    list(cold.train())
    assert left(cold.folder) == left(plain.folder)

    warm = tiny_run("warm", cached)
    before = sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors"))
    list(warm.train())
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) == before
    assert left(warm.folder) == left(plain.folder)


def test_a_run_names_what_it_skips_once_and_resumes_to_the_same_bits(
    tiny_run: MakeRun, settings: dict[str, Any], images: Path
) -> None:
    (images / "d.txt").unlink()
    settings |= {"train.updates": 6, "train.rows_per_update": 4}
    unbroken, broken = tiny_run("unbroken", settings), tiny_run("broken", settings)
    list(unbroken.train())
    shown = warnings(unbroken.folder)
    assert len(shown) == 2
    assert "1 skipped as broken" in shown[0] and "d.png: its caption d.txt" in shown[0]
    assert "skipped as broken" in shown[1] and "c.png" in shown[1]
    for update in broken.train():
        if update.step == 3:
            broken.stop()
    list(alignkit.load(resume=broken.folder).train())
    assert left(broken.folder) == left(unbroken.folder)


def test_a_resumed_run_names_what_is_missing_only_since(
    tiny_run: MakeRun, settings: dict[str, Any], images: Path
) -> None:
    run = tiny_run(overrides=settings)
    for _ in run.train():
        run.stop()
    (images / "e.txt").unlink()
    list(alignkit.load(resume=run.folder).train())
    assert any("e.png: its caption e.txt" in line for line in warnings(run.folder))


def test_a_run_that_refuses_broken_images_names_the_first(tiny_run: MakeRun, settings: dict[str, Any]) -> None:
    with pytest.raises(AlignkitError, match=r"c\.png cannot be read"):
        list(tiny_run(overrides=settings | {"data.on_error": "raise"}).train())


def test_broken_prompts_are_refused_by_check_or_named_by_the_run(
    tiny_run: MakeRun, settings: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "some.jsonl"
    prompts.write_text('{"text": "a red circle"}\n{"txet": "a blue square"}\n{"text": "a white ring"}')
    settings |= {"data.prompts": str(prompts), "train.updates": 1}
    with pytest.raises(ConfigError, match=r"some\.jsonl, line 2"):
        tiny_run(overrides=settings | {"data.on_error": "raise"}).check()
    run = tiny_run(overrides=settings)
    list(run.train())
    assert any("some.jsonl, line 2" in line for line in warnings(run.folder))
    assert {row.prompts for row in evaluate([run], [1])} == {"seen", "unseen"}
    (what,) = make_pairs(run, tmp_path / "pairs", count=2).skipped
    assert "some.jsonl, line 2" in what


def test_broken_held_out_prompts_are_refused_either_way(
    tiny_run: MakeRun, settings: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "held_out.jsonl"
    prompts.write_text('{"text": "a red circle"}\n{"txet": "a blue square"}')
    assert settings["data.on_error"] == "skip"
    with pytest.raises(ConfigError, match=r"held_out\.jsonl, line 2"):
        tiny_run(overrides=settings | {"evaluate.prompts": str(prompts)}).check()


def test_prepared_data_is_not_encoded_again(
    tiny_run: MakeRun, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = settings | {"data.cache": str(tmp_path / "cache")}
    prepared, notes = prepare(tiny_run(overrides=cached))
    found = {row.what: row for row in prepared}
    assert (found["images"].read, found["images"].encoded, found["images"].entries) == (4, 4, 4)
    assert (found["texts"].read, found["texts"].encoded) == (10, 10)  # of 5 prompts, 4 captions and no text
    for row in prepared:
        files = list(Path(row.folder).rglob("*.safetensors"))
        assert (len(files), sum(path.stat().st_size for path in files)) == (row.entries, row.bytes)
    assert "c.png" in notes[0] and notes[1] == "1 skipped as broken" and len(notes) == 2
    again, _ = prepare(tiny_run(overrides=cached))
    assert [(row.encoded, row.entries) for row in again] == [(0, 4), (0, 10)]

    made: list[str] = []
    get = EncoderCache.get
    monkeypatch.setattr(EncoderCache, "get", lambda self, *a: (get(self, *a), made.append(str(self.made)))[0])
    run = tiny_run(overrides=cached)
    list(run.train())
    assert made and set(made) == {"0"}
    plain = tiny_run("plain", settings)
    list(plain.train())
    assert left(run.folder) == left(plain.folder)


def test_both_images_of_a_pair_and_its_text_are_prepared(
    tiny_run: MakeRun, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": f"{a} or {b}", "winner": f"{a}.png", "loser": f"{b}.png"} for a, b in ("ab", "ac", "de")]
    (images / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "algorithm.name": "diffusion_dpo", "algorithm.flip": False, "data.pairs": str(images), "data.prompts": "",
        "data.images": "", "data.on_error": "skip", "data.cache": str(tmp_path / "cache"), "evaluate.prompts": "",
        "train.updates": 3,
    }  # fmt: skip
    prepared, notes = prepare(tiny_run(overrides=settings))
    assert [(row.what, row.read, row.encoded) for row in prepared] == [("images", 4, 4), ("texts", 3, 3)]
    assert "line 2 cannot be read (c.png: " in notes[0] and len(notes) == 2

    def unprepared(*_: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(DiffusersPolicy, "_encode_image", unprepared)
    monkeypatch.setattr(DiffusersPolicy, "_encode_text", unprepared)
    assert [update.step for update in tiny_run(overrides=settings).train()] == [1, 2, 3]


def test_an_interrupted_preparation_continues_where_it_stopped(
    tiny_run: MakeRun, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = settings | {"data.cache": str(tmp_path / "cache")}
    encode = DiffusersPolicy._encode_image
    done: list[int] = []

    def interrupted(self: DiffusersPolicy, image: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return encode(self, image)

    monkeypatch.setattr(DiffusersPolicy, "_encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny_run(overrides=cached))
    monkeypatch.setattr(DiffusersPolicy, "_encode_image", encode)
    prepared, _ = prepare(tiny_run(overrides=cached))
    assert (prepared[0].read, prepared[0].encoded) == (4, 2)


def test_an_endless_stream_is_not_prepared_and_a_note_reports_it(tiny_run: MakeRun, tmp_path: Path) -> None:
    prepared, notes = prepare(tiny_run(overrides={"data.cache": str(tmp_path / "cache")}))
    assert [row.what for row in prepared] == ["texts"]
    assert notes == [
        "data.images: alignkit_shapes.data:Drawings is an endless stream, so none of it is encoded ahead of time"
    ]


def test_without_a_cache_there_is_nothing_to_prepare(tiny_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: missing"):
        prepare(tiny_run())


def test_the_command_prints_what_it_encoded(tiny_lcm: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "run.toml").write_text(
        '[data]\nprompts = "p.txt"\n[[reward]]\nname = "pixel_check"\n[sampler]\nname = "lcm"\nnum_steps = 2\n'
        '[algorithm]\nname = "ddpo"\n'
    )
    line = ["prepare", str(tmp_path / "run.toml"), "--model", str(tiny_lcm), "--cache", str(tmp_path / "cache")]
    for new in (3, 0):
        result = CliRunner().invoke(app, [*line, "--json"])
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)
        assert (row["what"], row["read"], row["encoded"], row["entries"]) == ("texts", 3, new, 3)
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0 and str(tmp_path / "cache") in shown.stdout and "kB" in shown.stdout
