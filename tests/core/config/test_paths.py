"""Paths in run files, and the spellings of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.config.bundles import find_bundle
from alignkit.config.load import load
from alignkit.errors import ConfigError


def test_paths_are_taken_from_the_files_folder_first(
    load_acme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for path in (tmp_path / "both.txt", elsewhere / "both.txt", elsewhere / "here.txt"):
        path.touch()
    config = load_acme(
        '[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\n[data]\nprompts = "both.txt"\n'
        'images = "acme.data:Drawings"\n[evaluate]\nprompts = "here.txt"\n'
    )
    assert config.data.prompts == str(tmp_path / "both.txt")
    assert config.evaluate.prompts == str(elsewhere / "here.txt")
    assert config.data.images == "acme.data:Drawings"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("shards/{00..03}.tar", "{root}/shards/{00..03}.tar"),
        ("shards/*.tar", "{root}/shards/*.tar"),
        ("s-*.tar", "{root}/s-*.tar"),
        ("other/*.tar", "{here}/other/*.tar"),
        ("shards", "{root}/shards"),
        ("datasets:acme/images:test[:10]", "datasets:acme/images:test[:10]"),
        ("datasets:images", "datasets:images"),
    ],
)
def test_patterns_of_shards_are_resolved_by_their_folder_and_names_of_data_sets_not_at_all(
    load_acme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, found: str
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_acme(f'[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\n[data]\nimages = "{given}"\n')
    expected = found.replace("{root}", str(tmp_path)).replace("{here}", str(tmp_path / "elsewhere"))
    assert config.data.images == expected


def test_a_model_folder_next_to_the_run_file_is_found(tiny_lcm: Path, tmp_path: Path) -> None:
    (tmp_path / "mymodel").symlink_to(tiny_lcm)
    (tmp_path / "run.toml").write_text('[model]\nname = "mymodel"\n', encoding="utf-8")
    config = load(tmp_path / "run.toml", {"algorithm.name": "ddpo", "reward": ["pixel_check"]})
    assert config.model.name == str(tiny_lcm.resolve()) and config.sampler.name == "lcm"


def test_a_model_has_more_than_one_spelling(acme: Any) -> None:
    assert find_bundle("acme-model", acme.registry()).path == "acme/model"


def test_a_folder_without_a_pipeline_is_refused(load_acme: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_acme(None, {"model.name": str(tmp_path)})
    assert str(caught.value) == (
        f"model.name: the folder {tmp_path} holds no diffusers pipeline (model_index.json is missing), "
        "and no policy serves it"
    )


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "a/b/c"])
def test_a_model_folder_that_is_missing_is_reported_at_once(load_acme: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_acme(None, {"model.name": name})
    assert str(caught.value) == f"model.name: there is no folder {name}, and a hub id has the form owner/name"


@pytest.mark.parametrize(
    "key", ["output", "data.prompts", "data.cache", "model.name", "model.adapter", "scoring.cache"]
)
@pytest.mark.parametrize(
    ("path", "fault"),
    [("a\0b", "no NUL"), ("a" * 300, "255 bytes at most"), ("a/" * 3000, "too long"), ("loop/x", "symbolic links")],
)
def test_a_text_that_can_be_no_path_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, path: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=f"{key}: found .*, which cannot be a path: .*{fault}") as caught:
        load(None, {key: path, "algorithm.name": "ddpo", "reward": ["jpeg_compressibility"]})
    assert len(str(caught.value).splitlines()) == 1
