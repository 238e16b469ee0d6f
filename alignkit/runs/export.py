"""Export a trained run for other tools: LoRA files, a merged pipeline, a model card, a repository on the hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from httpx2 import HTTPError
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alignkit.config.bundles import find_bundle
from alignkit.config.sections import ModelConfig
from alignkit.errors import AlignkitError
from alignkit.files import share, write_file
from alignkit.interfaces import Policy
from alignkit.models.lora_files import note, read_lora, scaled, write_kohya, write_lora, write_peft
from alignkit.models.pipelines import LORA_FILE, Files, is_pipeline, load_pipeline
from alignkit.models.quiet import errors_only, no_progress_bars
from alignkit.page.record import read_record
from alignkit.runs.build import Parts
from alignkit.runs.card import model_card
from alignkit.runs.points import exported
from alignkit.training import checkpoint as checkpoints

Format = Literal["diffusers", "peft", "kohya", "comfyui", "merged"]
Weights = Literal["", "average", "last", "best"]


def export(
    parts: Parts,
    folder: Path,
    policy: Callable[[], Policy],
    out: str | Path = "",
    format: Format = "diffusers",
    *,
    weights: Weights = "",
    checkpoint: int | None = None,
    scale: float = 1.0,
) -> Path:
    """Write the trained weights of the run in `folder` into the folder `out`, with a model card, and return that.

    `format` is "diffusers" (a LoRA file; after full fine-tuning the UNet), "peft" (an adapter folder), "kohya" or
    "comfyui" (a LoRA file that kohya's scripts, ComfyUI, A1111 and Forge load), or "merged" (a whole pipeline, the
    weights merged into it). `weights` are those that the run exports itself if empty, else the "average", the "last"
    or the "best" of its points; `checkpoint` is the update of a checkpoint or a point, by default the last checkpoint.
    A `scale` of 0.5 halves the effect of a LoRA.

    `parts` are those of the run, and `policy` loads its model. `out` is `RUN/export/FORMAT` by default, and must be new
    or empty. Raises AlignkitError for what a run does not have.
    """
    for name, found, known in (("format", format, get_args(Format)), ("weights", weights, get_args(Weights))):
        if found not in known:
            raise AlignkitError(f"export: found {name} {found!r}, expected one of {', '.join(filter(None, known))}")
    lora = bool(parts.config.model.lora_rank)
    if not lora and (format not in ("diffusers", "merged") or scale != 1.0):
        raise AlignkitError(
            f"export: {folder} trained all weights (model.lora_rank = 0), which gives no LoRA to scale or convert; "
            "use --format diffusers or merged"
        )
    source = _source(folder, checkpoint)
    target = Path(out) if str(out) else folder / "export" / format
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise AlignkitError(f"export: {target} exists already; choose another folder with --out")
    with _new_folder(target) as partial, tempfile.TemporaryDirectory() as scratch:
        file = _own_export(policy, source, weights, Path(scratch))
        metadata = parts.metadata(parts.prompts([]))
        if lora:
            note(file, metadata)
        if format == "merged":
            _merge(parts.config.model, file, scale, partial)
        elif not lora:
            shutil.move(file, partial / file.name)
        else:
            _write_lora(file, format, scale, partial)
        grids = sorted((folder / "samples").glob("*.png"))
        if grids:
            shutil.copy(grids[-1], partial / "samples.png")
        card = model_card(read_record(folder), metadata, format, scale, bool(grids))
        write_file(partial / "README.md", card)
    return target


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub, into a private repository that is made if it is new; return its address.

    Raises AlignkitError, in one line, if the hub refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights trained with alignkit")
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AlignkitError(
            f"--push {repository}: {reason}; the files are in {folder}. Log in with: hf auth login"
        ) from error
    return str(address)


def _source(run: Path, update: int | None) -> Path:
    """Return the folder of the checkpoint or point of an update, by default of the last checkpoint."""
    folders = [run / "checkpoints", run / "points"]
    found = {folder: checkpoints.steps(folder) for folder in folders}
    if update is None:
        if not found[folders[0]]:
            raise AlignkitError(f"export: {run} has no checkpoint; train it with alignkit train --resume {run}")
        return folders[0] / f"{found[folders[0]][-1]:06d}"
    for folder, updates in found.items():
        if update in updates and (update or folder.name == "checkpoints"):
            return folder / f"{update:06d}"
    known = sorted({one for updates in found.values() for one in updates if one})
    raise AlignkitError(f"export: found --checkpoint {update}, expected one of {', '.join(map(str, known)) or 'none'}")


def _own_export(policy: Callable[[], Policy], source: Path, weights: Weights, scratch: Path) -> Path:
    """Write the chosen weights as the policy exports them, or use those of a point, and return where they are."""
    if source.parent.name == "points":
        if weights not in ("", "average"):
            raise AlignkitError(f"export: the point {source} keeps the average, found weights {weights!r}")
        for name in (LORA_FILE, "unet"):
            if (source / name).exists():
                copy = shutil.copytree if (source / name).is_dir() else shutil.copy
                return Path(copy(source / name, scratch / name))
        raise AlignkitError(
            f"export: {source} keeps no weights; choose a checkpoint: {source.parents[1] / 'checkpoints'}"
        )
    state = checkpoints.load(source)
    if weights == "best" and state["run"]["points"]["best"] is None:
        raise AlignkitError(f"export: {source.parents[1]} has no best point; use --weights average or last")
    chosen: Mapping[str, Tensor] = {
        "": exported(state),
        "average": state["trainer"]["average"],
        "last": state["trainer"]["policy"],
        "best": state["run"]["points"]["best"],
    }[weights]
    return policy().export(scratch, chosen)


def _write_lora(file: Path, format: Format, scale: float, folder: Path) -> None:
    tensors, metadata = read_lora(file)
    metadata |= {"alignkit.scale": f"{scale:g}"} if scale != 1.0 else {}
    tensors = scaled(tensors, scale)
    if format == "peft":
        write_peft(folder, tensors, metadata)
    elif format == "diffusers":
        write_lora(folder / LORA_FILE, tensors, metadata)
    else:
        write_kohya(folder, tensors, metadata)


def _merge(model: ModelConfig, file: Path, scale: float, folder: Path) -> None:
    """Write the pipeline of a run with its weights, in `file`, in the UNet."""
    source = find_bundle(model.name).path
    if not is_pipeline(source):
        raise AlignkitError(f"export: {source} is no diffusers pipeline, so there is none to merge into")
    files = Files(source, model.unet, model.adapter, model.variant, model.config, model.allow_pickle, model.prediction)
    pipe = load_pipeline(files, guidance_embedding=model.guidance_embedding)
    if model.lora_rank:
        with errors_only():
            pipe.load_lora_weights(file.parent, weight_name=file.name)
            pipe.fuse_lora(lora_scale=scale)
            pipe.unload_lora_weights()
    else:
        pipe.unet.load_state_dict(load_file(file / "diffusion_pytorch_model.safetensors"))
    with no_progress_bars():
        pipe.save_pretrained(folder)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under another name, which becomes `target` once all is written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        share(partial)
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise AlignkitError(f"export: {target} could not be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
