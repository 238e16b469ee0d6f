"""Load published checkpoints from disk or the hub, completely or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.models.encoder_cache import fingerprint, tokenizer_state
from alignkit.models.hub import unreachable
from alignkit.models.quiet import errors_only, no_progress_bars

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:safetensors|pt|pth|bin))")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_TOKENIZER_FILES_TEXT = "tokenizer_config.json and tokenizer.json or vocab.*"


def backbone_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of `precision` on `device`: "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def check_local(reward: str, field: str, source: str) -> None:
    """Raise ConfigError if `source` is written as a path and does not exist. A hub id is not looked up."""
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().exists():
        kind = "file" if Path(source).suffix in _SUFFIXES else "folder"
        raise ConfigError(f"{reward}: there is no {kind} {source!r} to load the {field} from; correct the path")


def local_folder(source: str) -> Path | None:
    """Return `source` as a folder on disk, or None if there is no such folder."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def locate_file(reward: str, field: str, source: str) -> Path | None:
    """Return the file that `source` names, on disk or (as owner/name/file) on the hub, downloading it if needed.

    Returns None if it names a folder or a repository. Raises ConfigError for a file that is not available.
    """
    check_local(reward, field, source)
    path = Path(source).expanduser()
    if path.exists():
        return path if path.is_file() else None
    named = _HUB_FILE.fullmatch(source)
    if named is None:
        return None
    from huggingface_hub import hf_hub_download

    remedy = f"put its file {named[2]} on this disk and set reward.{reward}.{field} to the path"
    wanted = f"expected a file of https://huggingface.co/{named[1]}; or {remedy}"
    with load_errors(reward, field, source, wanted), _hub_errors(reward, field, named[1], remedy):
        return Path(hf_hub_download(named[1], named[2]))


def load_model(
    reward: str,
    field: str,
    source: str,
    model_class: Any,
    absent: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a frozen `model_class` of transformers from a hub id or a folder.

    Raises ConfigError if a weight is missing or has another shape. `absent` lists prefixes of weight names that may be
    missing (those of an unused head).
    """
    from transformers import AutoConfig

    kind = model_class.__name__
    wanted = f"expected a hub id or a folder that holds {'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    remedy = (
        f"put its files (config.json, model.safetensors, those of its tokenizer) into a folder and set "
        f"reward.{reward}.{field} to it"
    )
    _check_folder(reward, field, source, wanted)
    errors = load_errors(reward, field, source, wanted)
    with errors, _hub_errors(reward, field, source, remedy), no_progress_bars():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        expected = getattr(model_class, "config_class", None)
        if expected is not None and not isinstance(config, expected):
            raise ConfigError(f"{reward}: the {field} {source!r} is a {config.model_type} model; {wanted}")
        with errors_only():  # hides transformers' table of weights; missing ones are reported below
            model, report = model_class.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))
    missing = [key for key in missing if not key.startswith(tuple(absent))]
    if missing:
        raise ConfigError(f"{reward}: the {field} {source!r} lacks {missing[0]} and {len(missing) - 1} more; {wanted}")
    for key, found, expected in sorted(report["mismatched_keys"]):
        shapes = f"of shape {tuple(found)}, expected {tuple(expected)}"
        raise ConfigError(f"{reward}: the {field} {source!r} has {key} {shapes}; {wanted}, or correct its config.json")
    return model.eval().requires_grad_(False)


def load_tokenizer(
    reward: str, source: str, vocabulary: int, field: str = "tokenizer", weights_file: Path | None = None
) -> Any:
    """Load the tokenizer at a hub id or in a folder, for a model of `vocabulary` tokens; `field` names it in messages.

    If a tokenizer on the hub cannot be downloaded, the ConfigError says to set that field, or to put the tokenizer's
    files next to `weights_file` if no field names the tokenizer.
    """
    from transformers import AutoTokenizer

    wanted = f"expected a hub id or a folder with the files of a tokenizer (reward.{reward}.{field})"
    place = f"next to {weights_file}" if weights_file else f"into a folder and set reward.{reward}.{field} to it"
    _check_folder(reward, "tokenizer", source, wanted)
    hub_errors = _hub_errors(reward, "tokenizer", source, f"put its files ({_TOKENIZER_FILES_TEXT}) {place}")
    with load_errors(reward, "tokenizer", source, wanted), hub_errors:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # If the files are missing, transformers may return a tokenizer that knows nothing but its special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ConfigError(f"{reward}: the tokenizer {source!r} knows no words; {wanted}")
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{reward}: the tokenizer {source!r} knows {len(tokenizer)} tokens and the model {vocabulary}; {wanted}"
        )
    return tokenizer


def state_of(model: Any, tokenizer: Any) -> str:
    """Return an identifier of a loaded network for a reward's fingerprint.

    It covers weights, configuration, decoding and tokenizer, precision and kind of device, and the versions of the
    libraries that run it.
    """
    decoding = model.generation_config.to_dict() if model.can_generate() else {}
    decoding.pop("transformers_version", None)  # the version that saved the checkpoint
    extra = json.dumps([decoding, tokenizer.clean_up_tokenization_spaces], sort_keys=True, default=str)
    state = fingerprint([model, tokenizer_state(tokenizer), extra])
    libraries = f"transformers {transformers.__version__} torch {torch.__version__}"
    return f"{state} {model.dtype} {model.device.type} {libraries}"


def tokenizer_source(given: str, checkpoint: str, public: str) -> str:
    """Return `given`, or else the folder of a local checkpoint if it holds a tokenizer, or else `public`."""
    folder = local_folder(checkpoint) or Path(checkpoint).expanduser().parent
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return given or (str(folder) if has_tokenizer else public)


@dataclass(frozen=True)
class Tokens:
    """N texts as the input of a text tower."""

    ids: Tensor
    """(N, L), padded at the end."""
    mask: Tensor
    """(N, L), 1 for tokens and 0 for padding."""
    truncated: Tensor
    """(N,) float32: 1 where the text was too long and its end was cut off."""


def count(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of `text`, special tokens included."""
    return len(tokenizer(text, verbose=False).input_ids)


def tokenize(tokenizer: Any, texts: Sequence[str], limit: int, device: torch.device) -> Tokens:
    """Tokenize `texts`, truncating each to `limit` tokens but keeping its final special token."""
    found = tokenizer(list(texts), verbose=False).input_ids
    cut = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in found]
    length = max(map(len, cut))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[*some, *[padding] * (length - len(some))] for some in cut], device=device)
    mask = torch.tensor([[1] * len(some) + [0] * (length - len(some)) for some in cut], device=device)
    truncated = torch.tensor([float(len(ids) > limit) for ids in found], device=device)
    return Tokens(ids, mask, truncated)


def _check_folder(reward: str, field: str, source: str, wanted: str) -> None:
    """Raise ConfigError for a path that does not exist or is a file."""
    check_local(reward, field, source)
    if Path(source).expanduser().is_file():
        raise ConfigError(f"{reward}: the {field} {source!r} is a file; {wanted}")


@contextmanager
def _hub_errors(reward: str, field: str, repository: str, remedy: str) -> Iterator[None]:
    """Raise a ConfigError with `remedy` if the hub is unreachable and the files read inside are not cached."""
    try:
        yield
    except Exception as error:
        if not unreachable(error) or local_folder(repository):
            raise
        raise ConfigError(
            f"{reward}: https://huggingface.co/{repository}, the {field}, could not be reached and is not cached; "
            f"{remedy}"
        ) from error


@contextmanager
def load_errors(reward: str, field: str, source: str, wanted: str) -> Iterator[None]:
    """Turn whatever transformers, torch, safetensors or the hub raise inside into a one-line ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(f"{reward}: cannot load the {field} {source!r}: {reason}; {wanted}") from error
