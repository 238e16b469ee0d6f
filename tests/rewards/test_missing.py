"""What is not there is told in one line that names the reward, the field and what would mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.interfaces import Example
from alignkit.registry import default_registry

SOURCES = [
    ("aesthetic", "checkpoint", {}),
    ("aesthetic", "head", {"checkpoint": "CLIP"}),
    ("attribute_binding", "judge", {}),
    ("clip_score", "checkpoint", {}),
    ("clip_score", "tokenizer", {"checkpoint": "CLIP"}),
    ("hpsv2", "checkpoint", {}),
    ("image_reward", "checkpoint", {}),
    ("ocr", "checkpoint", {}),
    ("pickscore", "checkpoint", {}),
    ("text_alignment", "captioner", {}),
    ("text_alignment", "encoder", {}),
    ("vlm_judge", "encoder", {"mode": "caption", "model": "judge"}),
    ("vqa_score", "checkpoint", {}),
]
"""Every field of a reward that names weights, with what else has to be set to come that far."""


def made(name: str, field: str, fields: dict[str, Any], source: str, clip_folder: str) -> Any:
    given = {key: clip_folder if value == "CLIP" else value for key, value in fields.items()}
    return default_registry().get("reward", name)(**{**given, field: source})


@pytest.mark.parametrize(("name", "field", "fields"), SOURCES, ids=str)
def test_a_path_that_is_not_there_is_told_before_anything_loads(
    name: str, field: str, fields: dict[str, Any], clip_folder: str, tmp_path: Path
) -> None:
    reward = made(name, field, fields, f"{tmp_path}/gone", clip_folder)
    with pytest.raises(ConfigError) as caught:
        reward.check([Example('a red circle with the words "one two"')])
    told = str(caught.value)
    assert told.startswith(f"{name}: ") and f"{tmp_path}/gone" in told and field in told and "\n" not in told


READ_SECOND = {("aesthetic", "checkpoint"), ("text_alignment", "encoder")}
"""Where another field's weights, which are as little there, are read before."""


@pytest.mark.parametrize(("name", "field", "fields"), [s for s in SOURCES if s[:2] not in READ_SECOND], ids=str)
def test_weights_that_cannot_be_fetched_are_told_in_one_line_with_what_was_expected(
    name: str, field: str, fields: dict[str, Any], clip_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reward = made(name, field, fields, "nobody/has_this", clip_folder)
    with pytest.raises(ConfigError) as caught:
        reward.load(torch.device("cpu"))
    told = str(caught.value)
    assert told.startswith(f"{name}: ") and "nobody/has_this" in told and "expected" in told and "\n" not in told


def test_every_reward_on_weights_is_here() -> None:
    rows = [row.name for row in default_registry().components("reward") if row.plugin == "alignkit_rewards"]
    without = {"function", "jpeg_compressibility", "jpeg_incompressibility", "remote"}
    assert {name for name, _, _ in SOURCES} | without == set(rows)
