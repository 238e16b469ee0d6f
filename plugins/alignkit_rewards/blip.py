"""BLIP in its authors' layout (Li et al., 2201.12086): their architectures and weight names, mapped to transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignkit_rewards.published import Translated

_VISION = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"norm\.": "post_layernorm.",
}


def names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published weights under transformers' names, which differ for the vision tower."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("visual_encoder."):
            inner = name.removeprefix("visual_encoder.")
            rule = next((old for old in _VISION if re.match(old, inner)), None)
            out["vision_model." + (re.sub(f"^{rule}", _VISION[rule], inner) if rule else inner)] = value
        elif not name.endswith("embeddings.position_ids"):  # a buffer: 0, 1, 2, ...
            out[name] = value
    return out


def vqa(state: Mapping[str, Tensor]) -> Translated:
    """Return the weights of a visual question answering model under transformers' names, and no separate head."""
    return names(state), {}


def base() -> Any:
    """Return the BlipConfig with a ViT-B/16 at 480 pixels, as for visual question answering."""
    return _architecture(768, layers=12, heads=12, pixels=480)


def large() -> Any:
    """Return the BlipConfig with a ViT-L/16 at 224 pixels."""
    return _architecture(1024, layers=24, heads=16, pixels=224)


def _architecture(width: int, layers: int, heads: int, pixels: int) -> Any:
    """Return the authors' med_config.json and ViT as a BlipConfig; heads and epsilons differ from its defaults."""
    from transformers import BlipConfig

    return BlipConfig(
        text_config={"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                     "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
                     "encoder_hidden_size": width},
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                       "num_attention_heads": heads, "image_size": pixels, "patch_size": 16, "layer_norm_eps": 1e-6,
                       "hidden_act": "gelu"},
        image_text_hidden_size=256,
    )  # fmt: skip
