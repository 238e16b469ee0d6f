"""Files of weights as their authors publish them: read without pickle, and converted once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit_rewards.checkpoints import told

Translated = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""The weights of the model, by transformers' names, and those of a head of ours."""


def read_weights(reward: str, field: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle of tensors alone (torch's `weights_only`), by name.

    Raises ConfigError for anything else.
    """
    wanted = "expected a file of weights, safetensors or torch's, with tensors by name"
    with told(reward, field, str(path), wanted):
        found: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(reward, field, path, wanted)
    state: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(
            f"{reward}: the {field} {str(path)!r} holds no tensor by name ({type(found).__name__}); {wanted}"
        )
    return tensors


def _unpickled(reward: str, field: str, path: Path, wanted: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # any kind: the bytes of another file are read as instructions
        what = (
            "holds more than tensors, which is not read" if "GLOBAL" in str(error) else "is damaged, or none of torch"
        )
        raise ConfigError(f"{reward}: the {field} {str(path)!r} {what}; {wanted}") from error


def converted(
    reward: str,
    file: Path,
    model_class: Any,
    official: Callable[[], Any],
    translate: Callable[[Mapping[str, Tensor]], Translated],
    absent: Sequence[str] = (),
) -> Path:
    """A folder in transformers' layout with what `file` holds in its authors': config.json, model.safetensors and
    head.safetensors where there is a head. Made once, in alignkit's cache, and found again by path, size and time.

    The architecture is that of a config.json of the same kind of model beside `file`, or else `official()`. Raises
    ConfigError unless every weight of the model is there with its shape (but for names that begin as `absent` does),
    and nothing else.
    """
    status = file.resolve().stat()
    beside = file.parent / "config.json"
    parts = (reward, file.resolve(), status.st_size, status.st_mtime_ns, beside.is_file() and beside.read_text())
    folder = cache() / f"{reward}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    config = official()
    # That of a tokenizer, which may lie there too, is another model's.
    if beside.is_file():
        with told(reward, "configuration", str(beside), "expected that of the model or its tokenizer, or no file"):
            if json.loads(beside.read_text()).get("model_type") == config.model_type:
                config = type(config).from_pretrained(file.parent)
    weights, head = translate(read_weights(reward, "checkpoint", file))
    with torch.device("meta"):
        expected = {name: value.shape for name, value in model_class(config).state_dict().items()}
    _compare(reward, file, {name: value.shape for name, value in weights.items()}, expected, absent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        config.save_pretrained(making)
        # Separate memory each: safetensors refuses views of one tensor.
        save_file(
            {k: v.clone().contiguous() for k, v in weights.items()}, making / "model.safetensors", {"format": "pt"}
        )
        if head:
            save_file(dict(head), making / "head.safetensors")
        try:
            making.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(making)
            if not folder.is_dir():
                raise
    except OSError as error:
        raise ConfigError(
            f"{reward}: {file} cannot be converted into {folder.parent} ({error}); set ALIGNKIT_CACHE to a folder "
            "with room for it"
        ) from error
    return folder


def cache() -> Path:
    """Where converted weights are kept: the folder that ALIGNKIT_CACHE names, or ~/.cache/alignkit."""
    return Path(os.environ.get("ALIGNKIT_CACHE") or Path.home() / ".cache" / "alignkit") / "weights"


def _compare(
    reward: str, file: Path, found: Mapping[str, Any], expected: Mapping[str, Any], absent: Sequence[str]
) -> None:
    """Raise ConfigError, naming the first weight, unless names and shapes agree."""
    missing = [k for k in expected if k not in found and not k.startswith(tuple(absent))]
    missing = [k for k in missing if not k.endswith("position_ids")]
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [k for k in found if k in expected and found[k] != expected[k]]
    if missing:
        wrong = f"lacks {missing[0]} (as transformers names it) and {len(missing) - 1} more"
    elif unexpected:
        wrong = f"holds {unexpected[0]} and {len(unexpected) - 1} more that the model has not"
    elif shapes:
        wrong = f"has {shapes[0]} of shape {tuple(found[shapes[0]])}, expected {tuple(expected[shapes[0]])}"
    else:
        return
    raise ConfigError(
        f"{reward}: the checkpoint {file} {wrong}; expected the published file, or its config.json beside"
    )
