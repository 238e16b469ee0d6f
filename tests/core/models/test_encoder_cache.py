"""Encodings are found again, to the bit, and only by the encoder that made them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.models import diffusers_policy
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.models.encoder_cache import EncoderCache, content_of, fingerprint, tokenizer_state

TEXTS = ["a red circle", "a blue square and a green cross", "", "a red circle"]


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def never() -> dict[str, Tensor]:
    raise AssertionError("encoded although it is there")


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_entry_comes_back_to_the_bit(tmp_path: Path) -> None:
    made = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor([-0.0, float("nan")])}
    cache = EncoderCache(tmp_path)
    first, second = cache.get("e", "0123", lambda: made), EncoderCache(tmp_path).get("e", "0123", never)
    for name, tensor in made.items():
        for found in (first[name], second[name]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert cache.made == 1 and cache.size("e") == (1, entries(tmp_path)[0].stat().st_size)


def test_another_encoder_or_another_content_finds_nothing(tmp_path: Path) -> None:
    cache = EncoderCache(tmp_path)
    values = {
        key: cache.get(*key, lambda i=i: {"x": torch.tensor([i])})
        for i, key in enumerate((("e", "ab"), ("f", "ab"), ("e", "ac")))
    }
    assert [int(found["x"]) for found in values.values()] == [0, 1, 2] and cache.made == 3


def test_without_a_cache_the_texts_that_were_used_last_stay_encoded(
    tiny_lcm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    encoded: list[str] = []
    encode = policy._encode_text
    monkeypatch.setattr(policy, "_encode_text", lambda text: encoded.append(text) or encode(text))
    first = policy.encode(["a", "b", "c", "a"])
    again = policy.encode(["c", "a", "b"])
    assert encoded == ["a", "b", "c"]
    assert torch.equal(first.features, again.select(torch.tensor([1, 2, 0, 1])).features)
    # Room for three, of which b was used last and c first.
    monkeypatch.setattr(diffusers_policy, "REMEMBERED", 3 * first.features[0].nbytes)
    policy.encode(["d"])
    policy.encode(["b", "a", "d"])
    assert encoded == ["a", "b", "c", "d"]
    policy.encode(["c"])
    assert encoded == ["a", "b", "c", "d", "c"]


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_a_damaged_entry_is_made_again(tmp_path: Path, kept: int) -> None:
    cache = EncoderCache(tmp_path)
    cache.get("e", "ab", lambda: {"x": torch.arange(10.0)})
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert torch.equal(cache.get("e", "ab", lambda: {"x": torch.arange(10.0)})["x"], torch.arange(10.0))
    assert path.read_bytes() == whole and cache.made == 2


def test_many_writers_of_the_same_entries_leave_each_of_them_whole(tmp_path: Path) -> None:
    def work(_: int) -> list[Tensor]:
        cache = EncoderCache(tmp_path)
        return [cache.get("e", f"{i:02d}", lambda i=i: {"x": torch.full((5000,), float(i))})["x"] for i in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(8)):
            assert all(bool((tensor == i).all()) for i, tensor in enumerate(found))
    assert [float(load_file(path)["x"][0]) for path in entries(tmp_path)] == list(range(20))


def test_a_disk_that_refuses_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AlignkitError, match="could not be written") as caught:
        EncoderCache(tmp_path / "cache").get("e", "ab", lambda: {"x": torch.zeros(1)})
    assert "\n" not in str(caught.value)


def test_contents_are_distinguished_by_every_value_shape_and_type() -> None:
    x = torch.zeros(2, 8)
    different = [x, x.view(8, 2), x.half(), torch.zeros(2, 4, dtype=torch.float64), -x, x + 1e-30, "", "0", "a", "a "]
    assert len({content_of(value) for value in different}) == len(different)
    assert content_of(x) == content_of(torch.zeros(8, 2).T) and content_of("café") == content_of("caf\u00e9")


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def change_config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_encoder_is_known_by_what_it_computes_and_not_by_where_it_lies(tiny_lcm: Path, tmp_path: Path) -> None:
    here = DiffusersPolicy(str(tiny_lcm)).encoders
    assert DiffusersPolicy(str(copy_of(tiny_lcm, tmp_path / "same")), lora_rank=0).encoders == here
    weights = copy_of(tiny_lcm, tmp_path / "weights")
    change_weight(weights / "vae" / "diffusion_pytorch_model.safetensors")
    changed = DiffusersPolicy(str(weights)).encoders
    assert changed["images"] != here["images"] and changed["texts"] == here["texts"]
    config = copy_of(tiny_lcm, tmp_path / "config")
    change_config(config / "vae" / "config.json", scaling_factor=0.5)
    change_config(config / "text_encoder" / "config.json", hidden_act="gelu")
    changed = DiffusersPolicy(str(config)).encoders
    assert changed["images"] != here["images"] and changed["texts"] != here["texts"]
    half = DiffusersPolicy(str(tiny_lcm), dtype=torch.bfloat16).encoders
    assert half["images"] != here["images"] and half["texts"] != here["texts"]


def test_a_tokenizer_is_known_by_its_vocabulary_and_not_by_what_it_read(tiny_lcm: Path) -> None:
    policy, other = DiffusersPolicy(str(tiny_lcm)), DiffusersPolicy(str(tiny_lcm))
    policy.encode(TEXTS)
    words = policy.pipe.tokenizer
    words("a red circle", truncation=True, max_length=5, padding="max_length")
    assert tokenizer_state(words) == tokenizer_state(other.pipe.tokenizer) and policy.encoders == other.encoders
    words.add_tokens(["mauve"])
    assert tokenizer_state(words) != tokenizer_state(other.pipe.tokenizer)
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_what_is_cached_is_what_is_encoded(tiny_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DiffusersPolicy(str(tiny_lcm))
    expected, latents = plain.encode(TEXTS), plain.encode_images(images())
    cold, warm = (DiffusersPolicy(str(tiny_lcm), cache=EncoderCache(tmp_path)) for _ in range(2))
    for policy in (cold, warm):
        found = policy.encode(TEXTS)
        assert found.text_table == expected.text_table and torch.equal(found.index, expected.index)
        assert torch.equal(found.table, expected.table) and found.pooled_table is None
        assert torch.equal(policy.encode_images(images()), latents)
        monkeypatch.setattr(warm.vae, "encode", never)
        monkeypatch.setattr(warm.pipe, "encode_prompt", never)
    assert cold.cache is not None and cold.cache.made == 3 + 3
    assert {path.parent.parent.name for path in entries(tmp_path)} == set(cold.encoders.values())


def test_an_encoding_depends_neither_on_its_neighbours_nor_on_the_precision_around_it(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm))
    together, latents = policy.encode(TEXTS), policy.encode_images(images(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for i, text in enumerate(TEXTS):
            assert torch.equal(policy.encode([text]).features[0], together.features[i])
        for i, image in enumerate(images(5)):
            assert torch.equal(policy.encode_images(image[None])[0], latents[i])


def test_images_that_are_sampled_for_a_measurement_are_not_kept(tiny_lcm: Path, tmp_path: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), cache=EncoderCache(tmp_path))
    policy.features(images())
    assert policy.cache is not None and policy.cache.size(policy.encoders["images"])[0] == 0
