"""Published checkpoints: found on disk or on the hub, and never used in part."""

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
from alignkit.models.quiet import errors_only, no_progress_bars

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:safetensors|pt|pth|bin))")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_OF_A_TOKENIZER = "tokenizer_config.json and tokenizer.json or vocab.*"


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
        kind = "file" if Path(source).suffix in _SUFFIXES else "folder"
        raise ConfigError(f"{reward}: there is no {kind} {source!r} to load the {field} from; correct the path")


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

    remedy = f"put its file {named[2]} on this disk and set reward.{reward}.{field} to the path"
    wanted = f"expected a file of https://huggingface.co/{named[1]}; or {remedy}"
    with told(reward, field, source, wanted), _on_hub(reward, field, named[1], remedy):
        return Path(hf_hub_download(named[1], named[2]))


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

    kind = model_class.__name__
    wanted = f"expected a hub id or a folder that holds {'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    remedy = (
        f"put its files (config.json, model.safetensors, those of its tokenizer) into a folder and set "
        f"reward.{reward}.{field} to it"
    )
    _no_file(reward, field, source, wanted)
    with told(reward, field, source, wanted), _on_hub(reward, field, source, remedy), no_progress_bars():
        config = AutoConfig.from_pretrained(source)
        expected = getattr(model_class, "config_class", None)
        if expected is not None and not isinstance(config, expected):
            raise ConfigError(f"{reward}: the {field} {source!r} is a {config.model_type} model; {wanted}")
        with errors_only():  # its table of names; what matters of it is told below
            model, report = model_class.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    missing = sorted(k for k in report["missing_keys"] if not k.endswith("position_ids"))
    missing = [key for key in missing if not key.startswith(tuple(absent))]
    if missing:
        raise ConfigError(f"{reward}: the {field} {source!r} lacks {missing[0]} and {len(missing) - 1} more; {wanted}")
    for key, found, expected in sorted(report["mismatched_keys"]):
        shapes = f"of shape {tuple(found)}, expected {tuple(expected)}"
        raise ConfigError(f"{reward}: the {field} {source!r} has {key} {shapes}; {wanted}, or mend its config.json")
    return model.eval().requires_grad_(False)


def load_tokenizer(
    reward: str, source: str, vocabulary: int, field: str = "tokenizer", beside: Path | None = None
) -> Any:
    """The tokenizer at a hub id or in a folder, for a model that knows `vocabulary` tokens; `field` is what names it.

    Raises ConfigError, which tells to set that field, or to put the files `beside` that one where no field does.
    """
    from transformers import AutoTokenizer

    wanted = f"expected a hub id or a folder with the files of a tokenizer (reward.{reward}.{field})"
    put = f"beside {beside}" if beside else f"into a folder and set reward.{reward}.{field} to it"
    _no_file(reward, "tokenizer", source, wanted)
    on_hub = _on_hub(reward, "tokenizer", source, f"put its files ({_OF_A_TOKENIZER}) {put}")
    with told(reward, "tokenizer", source, wanted), on_hub:
        tokenizer = AutoTokenizer.from_pretrained(source)
    # Where the files cannot be had, transformers may hand out a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ConfigError(f"{reward}: the tokenizer {source!r} knows no words; {wanted}")
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{reward}: the tokenizer {source!r} knows {len(tokenizer)} tokens and the model {vocabulary}; {wanted}"
        )
    return tokenizer


def state_of(model: Any, tokenizer: Any) -> str:
    """What tells a loaded network from others, for the fingerprint of a reward: weights, configuration, decoding and
    tokenizer, precision and kind of device, and the versions of the libraries that run it."""
    decoding = model.generation_config.to_dict() if model.can_generate() else {}
    decoding.pop("transformers_version", None)  # of whoever saved it
    read = json.dumps([decoding, tokenizer.clean_up_tokenization_spaces], sort_keys=True, default=str)
    state = fingerprint([model, tokenizer_state(tokenizer), read])
    libraries = f"transformers {transformers.__version__} torch {torch.__version__}"
    return f"{state} {model.dtype} {model.device.type} {libraries}"


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


def count(tokenizer: Any, text: str) -> int:
    """Tokens of `text`, the special ones counted."""
    return len(tokenizer(text, verbose=False).input_ids)


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


def _no_file(reward: str, field: str, source: str, wanted: str) -> None:
    """Raise ConfigError for a path that leads nowhere, or to a file."""
    check_local(reward, field, source)
    if Path(source).expanduser().is_file():
        raise ConfigError(f"{reward}: the {field} {source!r} is a file; {wanted}")


@contextmanager
def _on_hub(reward: str, field: str, repository: str, remedy: str) -> Iterator[None]:
    """Raise ConfigError, which tells the remedy, where the hub is away and its cache lacks what is read inside."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind and not isinstance(behind, LocalEntryNotFoundError):
            behind = behind.__cause__ or behind.__context__
        if behind is None or local_folder(repository):
            raise
        raise ConfigError(
            f"{reward}: https://huggingface.co/{repository}, the {field}, could not be reached and is in no cache; "
            f"{remedy}"
        ) from error


@contextmanager
def told(reward: str, field: str, source: str, wanted: str) -> Iterator[None]:
    """Whatever transformers, torch, safetensors and the hub raise inside becomes a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(f"{reward}: cannot load the {field} {source!r}: {reason}; {wanted}") from error
