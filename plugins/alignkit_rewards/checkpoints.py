"""Published checkpoints: found on disk or on the hub, read without pickle, converted once, and never used in part."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.loading import no_progress_bars

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:safetensors|pt|pth|bin))")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def backbone_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What `precision` means on `device`: "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def check_precision(reward: str, precision: str) -> None:
    """Raise ConfigError for a precision that does not exist."""
    if precision not in ("auto", *_DTYPES):
        raise ConfigError(f"{reward}: precision is {precision!r}, expected one of auto, {', '.join(_DTYPES)}")


def check_local(reward: str, field: str, source: str) -> None:
    """Raise ConfigError for what is meant as a path and is none. A hub id is not looked up."""
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().exists():
        raise ConfigError(f"{reward}: there is no folder {source!r} to load the {field} from; correct the path")


def local_folder(source: str) -> Path | None:
    """`source` as a folder on disk, or None where it is none."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def locate_file(reward: str, field: str, source: str) -> Path | None:
    """The file that `source` names, on disk or (as owner/name/file) on the hub, fetched if it is not here yet.

    None where it names a folder or a repository. Raises ConfigError for a file that cannot be had.
    """
    check_local(reward, field, source)
    path = Path(source).expanduser()
    if path.exists():
        return path if path.is_file() else None
    named = _HUB_FILE.fullmatch(source)
    if named is None:
        return None
    from huggingface_hub import hf_hub_download

    wanted = (
        f"expected the file {named[2]} of https://huggingface.co/{named[1]}; where there is no network, put it on "
        f"this disk and set reward.{reward}.{field} to its path"
    )
    with _told(reward, field, source, wanted):
        return Path(hf_hub_download(named[1], named[2]))


def read_weights(reward: str, field: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle of tensors alone (torch's `weights_only`), by name.

    Raises ConfigError for anything else.
    """
    with _told(reward, field, str(path), "expected a file of weights, safetensors or torch's"):
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = found.get("state_dict", found.get("model", found))
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_model(
    reward: str,
    field: str,
    source: str,
    model_class: Any,
    absent: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A frozen `model_class` of transformers from a hub id or a folder, every weight of it read.

    `absent` are beginnings of names that may be missing (a head that is not used). Raises ConfigError otherwise.
    """
    from transformers import AutoConfig

    check_local(reward, field, source)
    wanted = f"expected a hub id or a folder that holds a {model_class.__name__}"
    with _told(reward, field, source, wanted), no_progress_bars():
        config = AutoConfig.from_pretrained(source)
        expected = getattr(model_class, "config_class", None)
        if expected is not None and not isinstance(config, expected):
            raise ConfigError(f"{reward}: the {field} {source!r} is a {config.model_type} model; {wanted}")
        model, report = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))
    missing = [key for key in missing if not key.startswith(tuple(absent))]
    if missing:
        raise ConfigError(f"{reward}: the {field} {source!r} lacks {missing[0]} and {len(missing) - 1} more; {wanted}")
    return model.eval().requires_grad_(False)


def load_tokenizer(reward: str, source: str, vocabulary: int, field: str = "tokenizer") -> Any:
    """The tokenizer at a hub id or in a folder, for a model that knows `vocabulary` tokens; `field` is what names it.

    Raises ConfigError.
    """
    from transformers import AutoTokenizer

    wanted = f"expected a hub id or a folder with the files of a tokenizer (reward.{reward}.{field})"
    check_local(reward, "tokenizer", source)
    with _told(reward, "tokenizer", source, wanted):
        tokenizer = AutoTokenizer.from_pretrained(source)
    # Where the files cannot be had, transformers may hand out a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ConfigError(f"{reward}: the tokenizer {source!r} knows no words; {wanted}")
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{reward}: the tokenizer {source!r} knows {len(tokenizer)} tokens and the model {vocabulary}; {wanted}"
        )
    return tokenizer


def tokenizer_source(given: str, checkpoint: str, public: str) -> str:
    """Where the tokenizer lies: as given, or with a local checkpoint that has one, or with the public one."""
    folder = local_folder(checkpoint) or Path(checkpoint).expanduser().parent
    beside = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return given or (str(folder) if beside else public)


@dataclass(frozen=True)
class Tokens:
    """N texts as a text tower takes them."""

    ids: Tensor
    """(N, L), padded behind."""
    mask: Tensor
    """(N, L), 1 where a token stands."""
    truncated: Tensor
    """(N,) float32: 1 where the text was too long and its end was left out."""


def tokenize(tokenizer: Any, texts: Sequence[str], limit: int, device: torch.device) -> Tokens:
    """`texts` in at most `limit` tokens each, the final special token kept."""
    found = tokenizer(list(texts), verbose=False).input_ids
    cut = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in found]
    length = max(map(len, cut))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[*some, *[padding] * (length - len(some))] for some in cut], device=device)
    mask = torch.tensor([[1] * len(some) + [0] * (length - len(some)) for some in cut], device=device)
    truncated = torch.tensor([float(len(ids) > limit) for ids in found], device=device)
    return Tokens(ids, mask, truncated)


Translated = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""The weights of the model, by transformers' names, and those of a head of ours."""


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
        with _told(reward, "configuration", str(beside), "expected that of the model or its tokenizer, or no file"):
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


@contextmanager
def _told(reward: str, field: str, source: str, wanted: str) -> Iterator[None]:
    """Whatever transformers, torch, safetensors and the hub raise inside becomes a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(f"{reward}: cannot load the {field} {source!r}: {reason}; {wanted}") from error
