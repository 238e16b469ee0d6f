"""Missing files are reported in one line that names the reward, the field and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit_rewards.checkpoints import check_local, load_model, load_tokenizer
from alignkit_rewards.published import read_weights

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
"""Every field of a reward that names weights, with the other fields that must be set to reach it."""


def made(name: str, field: str, fields: dict[str, Any], source: str, clip_folder: str) -> Any:
    given = {key: clip_folder if value == "CLIP" else value for key, value in fields.items()}
    return default_registry().get("reward", name)(**{**given, field: source})


@pytest.mark.parametrize(("name", "field", "fields"), SOURCES, ids=str)
def test_a_missing_path_is_reported_before_anything_loads(
    name: str, field: str, fields: dict[str, Any], clip_folder: str, tmp_path: Path
) -> None:
    reward = made(name, field, fields, f"{tmp_path}/gone", clip_folder)
    with pytest.raises(ConfigError) as caught:
        reward.check([Example('a red circle with the words "one two"')])
    message = str(caught.value)
    assert (
        message.startswith(f"{name}: ") and f"{tmp_path}/gone" in message and field in message and "\n" not in message
    )


READ_SECOND = {("aesthetic", "checkpoint"), ("text_alignment", "encoder")}
"""Fields that are read after another field, whose weights are missing too."""
FILES = {("aesthetic", "head"), ("image_reward", "checkpoint")}
"""Fields that need a published file; a repository is not enough."""


@pytest.mark.parametrize(("name", "field", "fields"), [s for s in SOURCES if s[:2] not in READ_SECOND], ids=str)
def test_a_failed_download_is_reported_in_one_line_with_field_repository_and_remedy(
    name: str, field: str, fields: dict[str, Any], clip_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reward = made(name, field, fields, "nobody/has_this", clip_folder)
    with pytest.raises(ConfigError) as caught:
        reward.load(torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "nobody/has_this" in message and "\n" not in message
    assert f"set reward.{name}.{field} to " in message
    assert ((name, field) in FILES) == ("https://huggingface.co/nobody/has_this" not in message)


DEFAULTS = {
    "aesthetic": ("head", "trl-lib/ddpo-aesthetic-predictor"),
    "attribute_binding": ("judge", "Salesforce/blip-vqa-capfilt-large"),
    "clip_score": ("checkpoint", "openai/clip-vit-large-patch14"),
    "hpsv2": ("checkpoint", "xswu/HPSv2"),
    "image_reward": ("checkpoint", "THUDM/ImageReward"),
    "ocr": ("checkpoint", "stepfun-ai/GOT-OCR-2.0-hf"),
    "pickscore": ("checkpoint", "yuvalkirstain/PickScore_v1"),
    "text_alignment": ("captioner", "florence-community/Florence-2-large"),
    "vlm_judge": ("encoder", "FacebookAI/roberta-large"),
    "vqa_score": ("checkpoint", "Qwen/Qwen2.5-VL-7B-Instruct"),
}
"""The field that each reward reads first, and the repository of its default."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_without_network_a_default_is_reported_with_its_page_and_where_to_put_its_files(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    field, repository = DEFAULTS[name]
    fields = {"mode": "caption", "model": "judge"} if name == "vlm_judge" else {}
    with pytest.raises(ConfigError) as caught:
        default_registry().get("reward", name)(**fields).load(torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(
        f"{name}: https://huggingface.co/{repository}, the {field}, could not be reached and is not cached; put its "
    )
    assert message.endswith(
        (f"into a folder and set reward.{name}.{field} to it", f"set reward.{name}.{field} to the path")
    )
    assert "\n" not in message and ("config.json, model.safetensors" in message) == ("folder" in message)


def test_a_tokenizer_that_cannot_be_fetched_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = r"put its files \(tokenizer_config\.json and tokenizer\.json or vocab\.\*\)"
    with pytest.raises(
        ConfigError, match=rf"nobody/has_this, the tokenizer, .*{files} into a folder and set reward\.it"
    ):
        load_tokenizer("it", "nobody/has_this", 9)
    with pytest.raises(ConfigError, match=rf"nobody/has_this, the tokenizer, .*{files} next to /here/weights\.pt$"):
        load_tokenizer("it", "nobody/has_this", 9, weights_file=Path("/here/weights.pt"))


def test_a_file_instead_of_a_folder_and_a_missing_file_are_reported_as_files(tmp_path: Path) -> None:
    from transformers import AutoModel

    (tmp_path / "notes.txt").write_text("a text")
    message = r"it: the encoder .*notes\.txt' is a file; expected a hub id or a folder that holds an AutoModel$"
    with pytest.raises(ConfigError, match=message):
        load_model("it", "encoder", str(tmp_path / "notes.txt"), AutoModel)
    with pytest.raises(ConfigError, match=r"it: the tokenizer .*notes\.txt' is a file; expected"):
        load_tokenizer("it", str(tmp_path / "notes.txt"), 9)
    with pytest.raises(ConfigError, match=r"it: there is no file '\./nope\.pt' to load the encoder from; correct"):
        check_local("it", "encoder", "./nope.pt")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a text", r"is damaged or not a file of torch"),
        (b"hello there", r"is damaged or not a file of torch"),
        (b"", r"is damaged or not a file of torch"),
        ([torch.ones(1)], r"holds no named tensors \(list\)"),
        ({"model": {"x": 1}}, r"holds no named tensors \(dict\)"),
        ({"model": Code()}, r"holds more than tensors and is not read, since that could execute code"),
    ],
    ids=["text", "another text", "nothing", "a list", "no tensors", "code"],
)
def test_a_file_without_weights_is_reported_in_one_line(
    content: object, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ConfigError, match=rf"^it: the head '.*weights\.pt' {why}; expected a weights file") as caught:
        read_weights("it", "head", file)
    assert "\n" not in str(caught.value) and not capsys.readouterr().out


def test_weights_are_read_from_the_dictionaries_that_authors_wrap_them_in(tmp_path: Path) -> None:
    for wrapped in (
        {"model": {"x": torch.ones(2)}},
        {"state_dict": {"x": torch.ones(2)}, "n": 3},
        {"x": torch.ones(2)},
    ):
        torch.save(wrapped, tmp_path / "weights.pt")
        assert {
            name: value.tolist() for name, value in read_weights("it", "head", tmp_path / "weights.pt").items()
        } == {"x": [1.0, 1.0]}


def test_every_reward_with_weights_is_covered() -> None:
    assert {name for name, _, _ in SOURCES} == DEFAULTS.keys()
    rows = [row.name for row in default_registry().components("reward") if row.plugin == "alignkit_rewards"]
    without = {"function", "jpeg_compressibility", "jpeg_incompressibility", "remote"}
    assert {name for name, _, _ in SOURCES} | without == set(rows)
