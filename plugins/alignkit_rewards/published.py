"""Read weight files in their authors' layout without executing pickled code, and convert them once."""

from __future__ import annotations

import hashlib
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
from alignkit.files import read_json
from alignkit_rewards.checkpoints import load_errors

Translated = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""The weights of the model under transformers' names, and those of a head that transformers does not have."""


def read_weights(reward: str, field: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name of a .safetensors file, or of a pickle with nothing but tensors (`weights_only`).

    Raises ConfigError for anything else.
    """
    wanted = "expected a weights file of safetensors or torch with named tensors"
    with load_errors(reward, field, str(path), wanted):
        found: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(reward, field, path, wanted)
    state: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(
            f"{reward}: the {field} {str(path)!r} holds no named tensors ({type(found).__name__}); {wanted}"
        )
    return tensors


def _unpickled(reward: str, field: str, path: Path, wanted: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # of any type: the unpickler interprets the bytes of a foreign file as instructions
        if "GLOBAL" in str(error):
            problem = "holds more than tensors and is not read, since that could execute code"
        else:
            problem = "is damaged or not a file of torch"
        raise ConfigError(f"{reward}: the {field} {str(path)!r} {problem}; {wanted}") from error


def converted(
    reward: str,
    file: Path,
    model_class: Any,
    official: Callable[[], Any],
    translate: Callable[[Mapping[str, Tensor]], Translated],
    absent: Sequence[str] = (),
) -> Path:
    """Convert `file` from its authors' layout into a folder in transformers' layout, and return the folder.

    The folder holds config.json, model.safetensors and, if there is a head, head.safetensors. It is made once, in
    alignkit's cache, keyed by the file's path, size and modification time. The architecture is that of a config.json
    next to `file` if it is for the same type of model, or else `official()`. Raises ConfigError unless the weights are
    exactly those of the model, with their shapes; names that begin with a prefix in `absent` may be missing.
    """
    status = file.resolve().stat()
    config_file = file.parent / "config.json"
    config_text = config_file.is_file() and config_file.read_bytes()
    parts = (reward, file.resolve(), status.st_size, status.st_mtime_ns, config_text)
    folder = cache() / f"{reward}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    config = official()
    if config_file.is_file():
        expectation = "expected the config.json of the model or its tokenizer, or no file"
        with load_errors(reward, "configuration", str(config_file), expectation):
            # The file may belong to a tokenizer in the same folder; then it describes another model.
            if read_json(config_file).get("model_type") == config.model_type:
                config = type(config).from_pretrained(file.parent)
    weights, head = translate(read_weights(reward, "checkpoint", file))
    with torch.device("meta"):
        expected = {name: value.shape for name, value in model_class(config).state_dict().items()}
    _compare(reward, file, {name: value.shape for name, value in weights.items()}, expected, absent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        config.save_pretrained(making)
        # Cloned, because safetensors refuses tensors that share memory.
        save_file(
            {k: v.clone().contiguous() for k, v in weights.items()}, making / "model.safetensors", {"format": "pt"}
        )
        if head:
            save_file(dict(head), making / "head.safetensors")
        try:
            making.rename(folder)
        except OSError:  # another process converted the file first
            shutil.rmtree(making)
            if not folder.is_dir():
                raise
    except OSError as error:
        raise ConfigError(
            f"{reward}: {file} cannot be converted into {folder.parent} ({error}); set ALIGNKIT_CACHE to a folder "
            "with enough space"
        ) from error
    return folder


def cache() -> Path:
    """Return the folder for converted weights, in the folder that ALIGNKIT_CACHE names or in ~/.cache/alignkit."""
    return Path(os.environ.get("ALIGNKIT_CACHE") or Path.home() / ".cache" / "alignkit") / "weights"


def _compare(
    reward: str, file: Path, found: Mapping[str, Any], expected: Mapping[str, Any], absent: Sequence[str]
) -> None:
    """Raise ConfigError, naming the first offending weight, unless names and shapes agree."""
    missing = [k for k in expected if k not in found and not k.startswith(tuple(absent))]
    missing = [k for k in missing if not k.endswith("position_ids")]
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [k for k in found if k in expected and found[k] != expected[k]]
    if missing:
        problem = f"lacks {missing[0]} (as transformers names it) and {len(missing) - 1} more"
    elif unexpected:
        problem = f"holds {unexpected[0]} and {len(unexpected) - 1} more weights that the model does not have"
    elif shapes:
        problem = f"has {shapes[0]} of shape {tuple(found[shapes[0]])}, expected {tuple(expected[shapes[0]])}"
    else:
        return
    raise ConfigError(
        f"{reward}: the checkpoint {file} {problem}; expected the published file, or its config.json next to it"
    )
