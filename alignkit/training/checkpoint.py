"""Checkpoints of a run, written whole or not at all, and the state of the global random generators.

A checkpoint is a folder `checkpoints/000100/` of three files: `state.safetensors` holds every tensor, `state.json` the
structure around them, `manifest.json` the size and SHA-256 of both. It is written under a temporary name, synced and
renamed, so whoever sees the final name sees all of it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.files import _sync, read_json, share

TENSORS, STRUCTURE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 0) -> Path:
    """Write `state` as `folder/<step>` and return that path.

    `state` is made of tensors, None, bool, int, float, str, and dicts, lists and tuples of them; dict keys are None,
    bool, int, float or str. Tensors that share memory come back apart. Of the checkpoints up to this one, the newest
    `keep` stay (0: all); the others go once this one is safe. An earlier checkpoint of the same step is replaced.
    Raises AlignkitError if writing fails, with every earlier checkpoint untouched.
    """
    target = folder / f"{step:06d}"
    partial = folder / f".{target.name}.partial"
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, "state", tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        partial.mkdir()
        save_file(_unshared(tensors), partial / TENSORS)
        (partial / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
        files = {name: _fingerprint(partial / name) for name in (TENSORS, STRUCTURE)}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        share(partial)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if target.exists():
            target.rename(folder / f".{target.name}.replaced")
        partial.rename(target)
        _sync(folder)
        earlier = [path for path in _checkpoints(folder) if int(path.name) < step]
        for path in earlier[: len(earlier) + 1 - keep] if keep else []:
            path.rename(folder / f".{path.name}.removed")
        _tidy(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        _restore_replaced(folder)
        good = _newest_complete(_checkpoints(folder))
        stands = f"{good} is intact: fix the cause and resume from it" if good else "there is no earlier checkpoint"
        raise AlignkitError(f"{folder}: saving step {step} failed ({error}); {stands}") from error
    return target


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`; None if none was finished yet."""
    if folder.is_dir():
        _restore_replaced(folder)
    return next(reversed(_checkpoints(folder)), None)


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, oldest first."""
    return [int(path.name) for path in _checkpoints(folder)]


def load(path: Path) -> dict[str, Any]:
    """Return what `save` was given, bit for bit, tensors on the CPU.

    Raises AlignkitError naming the file that is missing, cut short or altered, and the checkpoint to go back to.
    """
    if fault := _fault(path):
        good = _newest_complete([other for other in _checkpoints(path.parent) if other != path])
        remedy = f"delete {path} to resume from {good.name}" if good else "no other is complete, start the run again"
        raise AlignkitError(f"{fault}; {remedy}")
    structure = read_json(path / STRUCTURE)
    state: dict[str, Any] = _unpack(structure, load_file(path / TENSORS))
    return state


def rng_state() -> dict[str, Any]:
    """Return the states of the global generators of torch, numpy and Python, which third-party code may use."""
    numpy_state = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in numpy_state["state"].items()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy_state, "python": random.getstate()}


def restore_rng(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA generators as far as this machine has the devices."""
    torch.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
    inner = {k: np.array(v, dtype=np.uint32) if isinstance(v, list) else v for k, v in state["numpy"]["state"].items()}
    np.random.set_state({**state["numpy"], "state": inner})
    random.setstate(state["python"])


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; containers and tensors are objects with one tag, so no key or value is ambiguous."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)} {where}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            _pack_plain(key, f"{where} key")
        return {"dict": [[key, _pack(item, f"{where}.{key}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]}
    return _pack_plain(value, where)


def _pack_plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: cannot be saved, found {type(value).__name__}, expected tensors and plain JSON values")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, no two in one storage, as safetensors requires; copied only where needed."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        if flat.untyped_storage().data_ptr() in storages:
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        apart[name] = flat
    return apart


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fault(path: Path) -> str:
    """Explain what is wrong with a checkpoint; "" if nothing is."""
    try:
        files = read_json(path / MANIFEST)["files"]
        expected = {name: (files[name]["size"], files[name]["sha256"]) for name in (TENSORS, STRUCTURE)}
    except OSError as error:
        return f"{path / MANIFEST}: cannot be read ({error.strerror}), so this is no complete checkpoint"
    except (ValueError, KeyError, TypeError):
        return f"{path / MANIFEST}: is damaged"
    for name, (size, digest) in expected.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                change = "is cut short" if found < size else "has grown"
                return f"{path / name}: {change}, {found} bytes instead of {size}"
            if _fingerprint(path / name)["sha256"] != digest:
                return f"{path / name}: was altered, its SHA-256 is not the one in {MANIFEST}"
        except OSError as error:
            return f"{path / name}: cannot be read ({error.strerror})"
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints by step, oldest first."""
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def _newest_complete(checkpoints: list[Path]) -> Path | None:
    return next((path for path in reversed(checkpoints) if not _fault(path)), None)


def _restore_replaced(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    for path in folder.glob(".*.replaced"):
        if not (target := folder / path.name.split(".")[1]).exists():
            path.rename(target)


def _tidy(folder: Path) -> None:
    """Remove the remains of killed saves."""
    _restore_replaced(folder)
    for suffix in ("partial", "replaced", "removed"):
        for path in folder.glob(f".*.{suffix}"):
            shutil.rmtree(path)
