"""Fold heads of several linear layers without activations between them into one affine map."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def fold(layers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compose linear layers into one affine map from D numbers to 1: weight (D,) and bias (), float32.

    `layers` are named as in an nn.Sequential of Linear and Dropout ("layers.0.weight", ...) or as one nn.Linear
    ("weight", "bias"). Computed in float64. Raises ValueError for anything else.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in layers.items():
        named = re.fullmatch(r"(?:layers\.(\d+)\.)?(weight|bias)", name)
        if named is None:
            raise ValueError(f"{name} is not the weight or bias of a linear layer")
        found.setdefault(int(named[1] or 0), {})[named[2]] = value.double()
    if not found or any(layer.keys() != {"weight", "bias"} for layer in found.values()):
        raise ValueError("a linear layer lacks its weight or its bias")
    ordered = [found[number] for number in sorted(found)]
    weight, bias = ordered[0]["weight"], ordered[0]["bias"]
    for layer in ordered[1:]:
        weight, bias = layer["weight"] @ weight, layer["weight"] @ bias + layer["bias"]
    if weight.shape[0] != 1:
        raise ValueError(f"the last linear layer outputs {weight.shape[0]} numbers, expected 1")
    return weight[0].float(), bias[0].float()
