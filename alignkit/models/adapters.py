"""Adapters as people have them: LoRA, DoRA, LoHa and LoKr, under the names of diffusers, peft, kohya's scripts and
LyCORIS. They are read by layers of the UNet, and merged by peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoHaModel, LoKrConfig, LoKrModel, LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from alignkit.files import parse_json, read_json
from alignkit.models.layer_names import layer_names, plain_name
from alignkit.models.lora_files import DIFFUSERS, UNET
from alignkit.models.weight_files import SAFE, Shapes, find_file, read_shapes, read_tensors, some

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of a LoRA file in diffusers and in a run folder."""
CONFIG = "adapter_config.json"
USUAL = LORA_FILE, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin"

_LORA = {
    "lora_down.weight": "lora_A", "lora.down.weight": "lora_A", "lora_A.weight": "lora_A",
    "lora_up.weight": "lora_B", "lora.up.weight": "lora_B", "lora_B.weight": "lora_B", "lora_mid.weight": "lora_mid",
    "dora_scale": "lora_magnitude_vector", "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector", "alpha": "alpha",
}  # fmt: skip
_LOHA = [f"hada_{one}" for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
_LOKR = [f"lokr_{one}" for one in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
_PARTS = _LORA | {name: name for name in [*_LOHA, *_LOKR]}
_KEY = re.compile(rf"(.+?)[._]({'|'.join(sorted(map(re.escape, _PARTS), key=len, reverse=True))})")
_OTHERS = re.compile(r"(?:base_model[._]model[._])?(?:lora_te|lora_prior_te|text_encoder|te[12]?[._]|bundle_emb)")
"""Begin of the keys of text encoders and embeddings, which are not used here."""


@dataclass
class Layer:
    """The part of an adapter for one layer, its tensors by their names in peft."""

    kind: str
    """lora, dora, loha or lokr."""
    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    """The delta is scaled by alpha / rank."""


@dataclass
class Adapter:
    """An adapter of a UNet, by the names of its layers."""

    layers: dict[str, Layer] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    """Keys of text encoders and embeddings."""

    def note(self) -> str:
        """Return a line about keys that are not used; empty where all are."""
        return f"{len(self.unused)} tensors are not the UNet's and are not used: {some(self.unused)}" * bool(
            self.unused
        )


def open_adapter(
    source: str, file: str, shapes: Shapes, *, allow_pickle: bool = False, weights: bool
) -> Adapter | None:
    """Read the adapter in a folder or at a hub id for the UNet with tensors of these shapes, by name.

    Without `weights`, tensors of safetensors files are on the device "meta", and None is returned for a hub id that is
    not on this disk. Raises ValueError, with the keys, for layers that the UNet does not have or that do not fit it.
    """
    found = find_file(source, file, USUAL, allow_pickle, fetch=weights)
    if found is None:
        return None
    tensors, metadata = _read(found, weights)
    settings = _settings(found, metadata)
    return _by_layers(tensors, settings, shapes)


def _read(file: Path, weights: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata; without `weights` only alphas have values."""
    if file.suffix not in SAFE:
        return read_tensors(file), {}
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
        if weights:
            return {name: opened.get_tensor(name).float() for name in opened.keys()}, metadata  # noqa: SIM118
        alphas = {name: opened.get_tensor(name) for name in opened.keys() if name.endswith("alpha")}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in read_shapes(file).items()} | alphas, metadata


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that peft keeps next to a file, or diffusers in it; empty if there are none."""
    if (config := file.parent / CONFIG).is_file() and file.name.startswith("adapter_model"):
        settings: dict[str, Any] = read_json(config)
        if settings.get("peft_type") not in ("LORA", "LOHA", "LOKR"):
            raise ValueError(f"{CONFIG} is of type {settings.get('peft_type')}, expected LORA, LOHA or LOKR")
        return settings
    flat = parse_json(metadata.get(DIFFUSERS, "{}"))
    return {name.removeprefix(UNET): value for name, value in flat.items() if name.startswith(UNET)}


def _by_layers(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], shapes: Shapes) -> Adapter:
    names = layer_names(shapes)
    found: dict[str, dict[str, Tensor]] = {}
    adapter = Adapter()
    unread, unknown = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(re.sub(r"\.default(?=\.weight$|$)", "", key))
        layer = names.get(plain_name(match[1])) if match else None
        if _OTHERS.match(key):
            adapter.unused.append(key)
        elif match is None:
            unread.append(key)
        elif layer is None:
            unknown.append(key)
        else:
            found.setdefault(layer, {})[_PARTS[match[2]]] = tensor
    if unread:
        raise ValueError(f"{len(unread)} tensors are of a kind that is not read here: {some(unread)}")
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(tensors)} tensors are for layers that the UNet does not have: {some(unknown)}"
        )
    if not found:
        raise ValueError(f"it names no layer of the UNet: {some(tensors)}")
    misfits = []
    for name, parts in found.items():
        try:
            adapter.layers[name] = _layer(name, parts, settings, shapes[f"{name}.weight"])
        except (RuntimeError, KeyError) as error:
            missing = f"{error.args[0]} is missing" if isinstance(error, KeyError) else ""
            sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items() if tensor.dim())
            misfits.append(f"{name} {shapes[f'{name}.weight']} from {sizes}{' where ' * bool(missing)}{missing}")
    if misfits:
        raise ValueError(f"{len(misfits)} layers of the UNet have other shapes: {some(misfits)}")
    return adapter


def _layer(name: str, parts: dict[str, Tensor], settings: Mapping[str, Any], weight: tuple[int, ...]) -> Layer:
    """Return the tensors in peft's shapes. Raises KeyError for a missing one, RuntimeError for one of another size."""
    alpha = float(parts["alpha"].float().reshape(-1)[0]) if "alpha" in parts else None
    tensors = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    kernel = weight[2:]
    if any(part in _LOHA for part in tensors):
        kind, rank = "loha", len(tensors["hada_w1_b"])
        for one in "12":
            a, b = tensors[f"hada_w{one}_a"], tensors[f"hada_w{one}_b"]
            shape = [*(reversed(a.shape) if f"hada_t{one}" in tensors else a.shape), *b.shape]
            rest = weight[1] if f"hada_t{one}" in tensors else math.prod(weight[1:])
            _same(shape, [weight[0], rank, rank, rest])
    elif any(part in _LOKR for part in tensors):
        kind = "lokr"
        split = [b for b in (tensors.get("lokr_w1_b"), tensors.get("lokr_w2_b")) if b is not None]
        # Of two whole factors LyCORIS scales nothing.
        rank, alpha = (len(split[-1]), alpha) if split else (1, 1.0)
        sizes = [_factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2")]
        _same([one * two for one, two in zip(*sizes, strict=True)], [weight[0], math.prod(weight[1:])])
    else:
        down, up = tensors["lora_A"], tensors["lora_B"]
        rank, kind = up.shape[1], "dora" if "lora_magnitude_vector" in tensors else "lora"
        if (middle := tensors.pop("lora_mid", None)) is not None:  # the kernel stands between the two
            down = torch.einsum("rskl,si->rikl", middle, down.flatten(1))
        tensors["lora_A"] = down.reshape(rank, *weight[1:])
        tensors["lora_B"] = up.reshape(weight[0], rank, *(1 for _ in kernel))
        if kind == "dora":
            scale = tensors["lora_magnitude_vector"]
            _same([len(scale)], weight[:1])  # of rows; one of columns is another method
            tensors["lora_magnitude_vector"] = scale.reshape((1, -1, *(1 for _ in kernel)) if kernel else (-1,))
    return Layer(kind, tensors, rank, _alpha(name, settings, rank) if alpha is None else alpha)


def _factor(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return rows and columns of a factor of a Kronecker product."""
    if name in tensors:
        return len(tensors[name]), math.prod(tensors[name].shape[1:])
    a, b, middle = tensors[f"{name}_a"], tensors[f"{name}_b"], tensors.get(name.replace("w", "t"))
    if middle is None:
        _same([a.shape[1]], [b.shape[0]])
        return a.shape[0], b.shape[1]
    return a.shape[1], b.shape[1] * math.prod(middle.shape[2:])


def _same(found: Any, expected: Any) -> None:
    if list(found) != list(expected):
        raise RuntimeError(f"found {found}, expected {expected}")


def _alpha(name: str, settings: Mapping[str, Any], rank: int) -> float:
    """Return the alpha of a layer by the settings of peft; without any the delta is not scaled."""
    plain = settings.get("lora_alpha", settings.get("alpha", rank))
    patterns = settings.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, name), plain))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def merge(network: Any, adapter: Adapter) -> None:
    """Add the adapter to the weights of a UNet. Raises ValueError where peft would scale a layer otherwise."""
    with torch.random.fork_rng(devices=[]):  # peft initialises layers at random before they get their values
        _merge(network, adapter)
    network.requires_grad_(False)


def _merge(network: Any, adapter: Adapter) -> None:
    for kind in dict.fromkeys(layer.kind for layer in adapter.layers.values()):
        layers = {name: layer for name, layer in adapter.layers.items() if layer.kind == kind}
        whole = {f"^{re.escape(name)}": layer for name, layer in layers.items()}
        alphas = {name: layer.alpha for name, layer in whole.items()}
        common = {"r": 1, "target_modules": list(layers), "alpha_pattern": alphas}
        common["rank_pattern"] = {name: layer.rank for name, layer in whole.items()}
        if kind in ("lora", "dora"):
            model = LoraModel(network, LoraConfig(lora_alpha=1, use_dora=kind == "dora", **common), "default")
        elif kind == "loha":
            model = LoHaModel(network, LoHaConfig(alpha=1, **common), "default")
        else:
            model = LoKrModel(network, LoKrConfig(alpha=1, **common), "default")
        changed = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
        for name, module in changed.items():
            layer = layers[name]
            for part, value in _slots(module):
                if part in layer.tensors:
                    _put(value, layer.tensors[part], module.get_base_layer().weight)
                elif "default" in value:
                    del value["default"]
            expected = layer.alpha / layer.rank
            if not math.isclose(module.scaling["default"], expected, rel_tol=1e-6):
                raise ValueError(f"peft scales {name} by {module.scaling['default']}, the file by {expected}")
        if missing := layers.keys() - changed.keys():
            raise ValueError(f"peft leaves out {some(sorted(missing))}")
        model.merge_and_unload()
        vars(network).pop("peft_config", None)


def _slots(module: BaseTunerLayer) -> Iterator[tuple[str, Any]]:
    for part in sorted(set(_PARTS.values()) - {"alpha", "lora_mid"}):
        if hasattr(module, part):
            yield part, getattr(module, part)


def _put(slot: Any, tensor: Tensor, like: Tensor) -> None:
    """Put a tensor of the file into the parameter, or the small layer, that peft made for it."""
    value = torch.nn.Parameter(tensor.to(like.device, like.dtype).contiguous(), requires_grad=False)
    if isinstance(slot, torch.nn.ParameterDict):
        slot["default"] = value
    else:
        if slot["default"].weight.shape != value.shape:
            raise ValueError(f"peft makes {tuple(slot['default'].weight.shape)}, the file has {tuple(value.shape)}")
        slot["default"].weight = value
