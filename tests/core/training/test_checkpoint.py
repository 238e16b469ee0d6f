from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.files import write_file
from alignkit.training import checkpoint

SMALL_DISK = """
import resource, sys, torch
from pathlib import Path
from alignkit.training.checkpoint import save
from alignkit.errors import AlignkitError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1]), 2, {"weights": torch.zeros(100_000)}, keep=1)
except AlignkitError as error:
    print(error)
"""


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, structure and every bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        as_bytes = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (found, expected)]
        assert torch.equal(*as_bytes)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def load_latest(folder: Path) -> dict[str, Any]:
    path = checkpoint.latest(folder)
    assert path is not None
    return checkpoint.load(path)


def adamw_after_two_steps() -> torch.optim.AdamW:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for factor in (1.0, 2.0):
        (layer(torch.ones(1, 3)) * factor).sum().backward()
        optimizer.step()
    return optimizer


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state: dict[Any, Any] = {
        "bf16": torch.randn(3, 2, dtype=torch.bfloat16),
        "fp32": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42]),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "plain": [None, True, 3, 0.1, "text with \u2028 and \u00e9", 2**80, float("inf")],
        "nested": {"tuple": (1, [torch.ones(1)]), "dict": {"dict": {}, "tensor": "no tensor"}, "": []},
        1: "int key",
        True + 1: {None: 0, 0.5: 1},
    }
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 1, state)), state)


def test_an_optimizer_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    state = adamw_after_two_steps().state_dict()
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, state))
    assert_same(loaded, state)
    fresh = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    fresh.load_state_dict(loaded)
    assert_same(fresh.state_dict(), state)


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    state = {"base": base, "again": base, "tail": base[5:], "wide": base[:1].expand(3)}
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 1, state)), state)


def test_a_value_that_is_no_json_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.algorithm\.0: cannot be saved, found set"):
        checkpoint.save(tmp_path, 1, {"algorithm": [{1, 2}]})
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_checkpoints_up_to_this_one_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, {}, keep=0)
    checkpoint.save(tmp_path, 9, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003", "000009", "000010"]
    assert checkpoint.latest(tmp_path) == tmp_path / "000010"


def test_a_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 0, {"batches": 1})
    checkpoint.save(tmp_path, 0, {"batches": 2})
    assert load_latest(tmp_path) == {"batches": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["000000"]


def test_a_replacement_killed_between_its_renames_gives_the_first_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 0, {"batches": 1}).rename(tmp_path / ".000000.replaced")
    (tmp_path / ".000000.partial").mkdir()
    assert load_latest(tmp_path) == {"batches": 1}


def save_endlessly(folder: Path, step: int) -> None:
    for number in itertools.count(step):
        checkpoint.save(folder, number, {"step": number, "weights": torch.full((500_000,), float(number))}, keep=2)


def newest_step(folder: Path) -> int:
    return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=-1)


def test_a_run_killed_while_saving_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["alignkit.training.checkpoint"])
    rng = random.Random(0)
    last, leftovers = -1, 0
    for _ in range(8):
        process = server.Process(target=save_endlessly, args=(tmp_path, last + 1))
        process.start()
        while newest_step(tmp_path) <= last:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        last = newest_step(tmp_path)
        process.kill()
        process.join()
        process.close()
        leftovers += any(path.name.startswith(".") for path in tmp_path.iterdir())
        state = load_latest(tmp_path)
        assert state["step"] >= last
        assert bool((state["weights"] == state["step"]).all())
        last = state["step"]
    assert leftovers, "no kill hit a save, so this test has shown nothing"
    checkpoint.save(tmp_path, last + 1, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"{last + 1:06d}"]


def test_a_disk_that_refuses_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, {"weights": torch.ones(3)})
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "saving step 2 failed" in done.stdout and "File too large" in done.stdout
    assert f"{folder / '000001'} is intact" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["000001"]
    assert torch.equal(load_latest(folder)["weights"], torch.ones(3))


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(AlignkitError, match=r"saving step 1 failed .*; there is no earlier checkpoint"):
        checkpoint.save(tmp_path / "checkpoints", 1, {})


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STRUCTURE, checkpoint.MANIFEST])
def test_a_file_cut_short_is_named_with_the_checkpoint_to_go_back_to(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(9)})
    path = checkpoint.save(tmp_path, 2, {"x": torch.ones(9)})
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    expected = rf"000002/{name}: is (cut short|damaged).*delete .*000002 to resume from 000001"
    with pytest.raises(AlignkitError, match=expected):
        load_latest(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STRUCTURE, checkpoint.MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, 1, {})
    (path / name).unlink()
    with pytest.raises(AlignkitError, match=rf"000001/{name}: cannot be read .*no other is complete"):
        checkpoint.load(path)


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(9)})
    content = bytearray((path / checkpoint.TENSORS).read_bytes())
    content[-1] ^= 1
    (path / checkpoint.TENSORS).write_bytes(content)
    with pytest.raises(AlignkitError, match="was altered"):
        checkpoint.load(path)


def test_a_first_save_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    (tmp_path / ".000001.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_every_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def numbers() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.normal()), random.gauss(0, 1)

    before = checkpoint.rng_state()
    try:
        numbers()  # numpy and Python then hold half a pair of normal numbers
        path = checkpoint.save(tmp_path, 1, checkpoint.rng_state())
        expected = [numbers() for _ in range(3)]
        checkpoint.restore_rng(checkpoint.load(path))
        assert [numbers() for _ in range(3)] == expected
    finally:
        checkpoint.restore_rng(before)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", "one")
    write_file(tmp_path / "a.txt", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(AlignkitError, match=f"{path}: could not be written"):
            write_file(path, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        saved = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, keep=1)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o640}
