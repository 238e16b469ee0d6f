"""Find files of weights on this disk, and read their headers: names and shapes, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from alignkit.config.bundles import is_hub_id
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import read_json
from alignkit.models.hub import unreachable

SAFE, PICKLED = (".safetensors",), (".bin", ".ckpt", ".pt", ".pth")
ALLOW = (
    "these are pickled; set model.allow_pickle = true to read them with torch's unpickler of tensors alone, or take "
    ".safetensors files"
)
WHOLE = "model.diffusion_model."
"""Start of the names of a UNet's tensors in a checkpoint of one file."""
_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([A-Za-z]\w*))?(?:-\d{5}-of-\d{5})?(\.safetensors|\.bin)"
)
Shapes = Mapping[str, tuple[int, ...]]


def on_disk(source: str) -> Path | None:
    """Return the file or folder `source`, or the cached snapshot of a hub id; None if neither is on this disk."""
    if Path(source).exists():
        return Path(source)
    if not is_hub_id(source):
        return None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def locate_weights(key: str, source: str, allow_pickle: bool = False) -> tuple[str, str]:
    """Return the folder or hub id of weights, and the file in it ("" if none is named). A hub id is not looked up.

    Raises ConfigError, under the name `key`, for what can be neither.
    """
    path = Path(source)
    if path.is_file() and path.suffix in SAFE + PICKLED:
        if path.suffix in PICKLED and not allow_pickle:
            raise ConfigError(f"{key}: found {source}; {ALLOW}")
        return str(path.parent), path.name
    if path.is_dir():
        return source, ""
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+\.safetensors))?", source)
    if named is None or path.is_file() or named[1].endswith(SAFE + PICKLED):
        raise ConfigError(
            f"{key}: {source!r} is no folder, no .safetensors file and no hub id of the form owner/name or "
            "owner/name/file.safetensors"
        )
    return named[1], named[2] or ""


def find_file(source: str, file: str, usual: Sequence[str], allow_pickle: bool, fetch: bool) -> Path | None:
    """Return a file of weights in the folder or repository `source`: `file`, else the first of the `usual` that is
    there, else the only one there is.

    None if it is at a hub id and not on this disk; with `fetch` it is downloaded then. Raises ValueError where it
    cannot be found, and OSError where the download fails.
    """
    folder = on_disk(source)
    if folder is not None:
        names = [path.name for path in folder.iterdir() if path.is_file()]
        if file and (folder / file).is_file():
            return folder / file
        if not file and (Path(source).is_dir() or set(usual) & set(names)):
            return folder / _choose(names, usual, allow_pickle)
    if not fetch:
        return None
    for name in [file] if file else usual:
        with suppress(RemoteEntryNotFoundError):
            return Path(hf_hub_download(source, name))
    if file:
        raise ValueError(f"the repository holds no {file}")
    return Path(hf_hub_download(source, _choose(list_repo_files(source), usual, allow_pickle)))


def _choose(names: Iterable[str], usual: Sequence[str], allow_pickle: bool) -> str:
    endings = SAFE + PICKLED if allow_pickle else SAFE
    found = sorted(name for name in names if "/" not in name and name.endswith(SAFE + PICKLED))
    fit = [name for name in found if name.endswith(endings)]
    for name in usual:
        if name in fit:
            return name
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise ValueError(f"it holds {', '.join(fit)}; name one of these files")
    if found:
        raise ValueError(f"it holds {', '.join(found)}, and {ALLOW}")
    raise ValueError(f"it holds no {usual[0]} and no other .safetensors file")


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file, by name. Raises SafetensorError for a damaged file."""
    if file.suffix not in SAFE:
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(file).items()}
    with safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file, by name; a pickled file may hold nothing else. Raises ValueError for others."""
    if file.suffix in SAFE:
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is damaged or holds code
        raise ValueError(f"{file} cannot be unpickled as tensors ({str(error).splitlines()[0]})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected tensors by name")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def check_parts(folder: Path, names: Sequence[str], variant: str, allow_pickle: bool) -> str:
    """Return the variant to load of the networks in subfolders `names` of a pipeline: `variant`, else none where all
    have plain files, else the only one that completes them ("fp16").

    Raises ConfigError for files that are missing, pickled without `allow_pickle`, or listed as shards and not there.
    """
    found = {name: _variants(folder / name, allow_pickle) for name in names}
    there = sorted(set().union(*found.values()) - {""})
    if variant and variant not in there:
        raise ConfigError(
            f"model.variant: found {variant!r}, expected one that {folder} holds: {', '.join(there) or 'none'}"
        )
    fit = [one for one in ([variant] if variant else ["", *there]) if all({one, ""} & own for own in found.values())]
    if not fit:
        lacking = next(name for name, own in found.items() if not {variant, ""} & own)
        raise ConfigError(
            f"model: {folder / lacking} holds {', '.join(sorted(found[lacking]))} alone, which not all parts of "
            f"{folder} do ({', '.join(there)})"
        )
    if fit[0] != "" and not variant and len(fit) > 1:
        raise ConfigError(
            f"model.variant: missing; {folder} holds {', '.join(fit)} and no plain weights; set it to one"
        )
    for name in found:
        _check_shards(folder / name, fit[0])
    return fit[0]


def _variants(folder: Path, allow_pickle: bool) -> set[str]:
    """Return the variants of the weights of one network, "" the plain one. Raises ConfigError if it has none."""
    names = [match for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    found = {match[1] or "" for match in names if match[2] in SAFE or allow_pickle}
    if names and not found:
        raise ConfigError(f"model: {folder} holds {', '.join(sorted(match[0] for match in names))}; {ALLOW}")
    if not found:
        raise ConfigError(f"model: {folder} holds no weights, expected files as diffusers saves them")
    return found


def _check_shards(folder: Path, variant: str) -> None:
    """Raise ConfigError for a shard that is missing, and for a header that cannot be read."""
    for file in files_of(folder, variant):
        if file.suffix == ".json":
            listed = set(_json(file).get("weight_map", {}).values())
            if missing := sorted(name for name in listed if not (folder / name).is_file()):
                raise ConfigError(f"model: {file} lists {', '.join(missing)}, which {folder} does not hold")
        elif file.suffix in SAFE:
            with blamed_on("model", str(folder.parent), "a diffusers pipeline"):
                try:
                    read_shapes(file)
                except SafetensorError as error:
                    raise ValueError(f"{folder.name}/{file.name} is damaged ({error})") from error


def files_of(folder: Path, variant: str) -> list[Path]:
    """Return the files of one network, of a variant if there are such, else plain ones: weights, and their index."""
    names = [(path, match) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    weights = [path for path, match in names if match[1] == (variant or None)]
    if not weights and variant:
        return files_of(folder, "")
    safe = [path for path in weights if path.suffix in SAFE]
    ending = f"{'.safetensors' if safe else '.bin'}.index{'.' * bool(variant)}{variant}.json"
    return sorted([*(safe or weights), *folder.glob(f"*{ending}")])


def variant_in(source: str, part: str) -> str | None:
    """Return the variant of one network of a pipeline where it has no plain weights; None if it has, or is not here."""
    folder = on_disk(source)
    found = {m[1] or "" for path in (folder / part).glob("*") if (m := _NAME.fullmatch(path.name))} if folder else set()
    return None if not found or "" in found else sorted(found)[0]


def _json(file: Path) -> dict[str, Any]:
    with blamed_on("model", str(file), "JSON"):
        return dict(read_json(file))


@contextmanager
def blamed_on(key: str, source: str, what: str) -> Iterator[None]:
    """Turn any error while loading into a ConfigError of one line that names `key` and `source`."""
    try:
        yield
    except AlignkitError:
        raise
    except Exception as error:  # tensors of a stranger's file can break a library anywhere
        if unreachable(error):
            raise ConfigError(
                f"{key}: {source} is not on this disk, and the hub (https://huggingface.co) cannot be reached; connect "
                "this machine, or name a folder"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {source} cannot be loaded as {what}: {reason}") from error


def some(names: Iterable[str], most: int = 5) -> str:
    """Return names in one line: the first few, and the number of the others."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
