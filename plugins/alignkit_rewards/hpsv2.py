"""Human Preference Score v2 (Wu et al., 2306.09341), versions 2.0 and 2.1, with classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit import Example, Scores
from alignkit_rewards.checkpoints import locate_file
from alignkit_rewards.clip import ClipReward
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from alignkit_rewards.published import converted

Version = Literal["v2.0", "v2.1"]
FILES: dict[Version, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@dataclass
class HPSv2(ClipReward):
    """Cosine of image and prompt in a CLIP ViT-H/14 trained on human rankings, about 0.25 to 0.35.

    Papers print it times 100. Values of v2.0 and v2.1 are not comparable. Part "truncated": 1 if the prompt has more
    tokens than CLIP reads (77).
    """

    checkpoint: str = ""
    """The published file, on disk or as owner/name/file on the hub, or a CLIPModel (hub id or folder). Empty: the
    published file of `version`, of xswu/HPSv2."""
    version: Version = "v2.1"
    """Version of the weights if the checkpoint is empty: SDPO trains with v2.0, RG-LCD with v2.1."""

    name: ClassVar[str] = "hpsv2"
    public_tokenizer: ClassVar[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1.0, 1.0)

    def folder(self) -> str:
        from transformers import CLIPModel

        source = self.checkpoint or f"xswu/HPSv2/{FILES[self.version]}"
        file = locate_file(self.name, "checkpoint", source)
        if file is None:
            return source
        return str(converted(self.name, file, CLIPModel, vit_h_14, lambda state: (from_open_clip(state), {})))

    def pixels(self, images: Tensor) -> Tensor:
        # The authors resize tensors, not 8-bit images, so there is no rounding between the passes.
        size = self._model.config.vision_config.image_size
        return normalize(resize_and_crop(images, size, levels=False), CLIP_MEAN, CLIP_STD)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        values, parts = self.cosine(images, examples)
        return Scores(values, torch.ones_like(values, dtype=torch.bool), parts)


def vit_h_14() -> Any:
    """Return the CLIPConfig of open_clip's ViT-H-14."""
    from transformers import CLIPConfig

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    return CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "vocab_size": 49408, "max_position_embeddings": 77,
                     "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1, "projection_dim": 1024},
        vision_config={**vision, "hidden_act": "gelu", "image_size": 224, "patch_size": 14, "projection_dim": 1024},
        projection_dim=1024,
    )  # fmt: skip


_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_OTHERS = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an open_clip CLIP with ViT towers under the names of transformers' CLIPModel.

    Unknown names are kept, so that the later comparison of names reports them.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":  # a buffer: the causal mask
            continue
        tower, found, rest = name.partition("transformer.resblocks.")
        if not found:
            projection = name in ("text_projection", "visual.proj")  # open_clip multiplies from the right
            out[_OTHERS.get(name, name)] = value.T if projection else value
            continue
        number, _, inner = rest.partition(".")
        layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = inner.removeprefix("attn.in_proj_")
            for which, part in zip("qkv", value.chunk(3), strict=True):
                out[f"{layer}self_attn.{which}_proj.{kind}"] = part
            continue
        known = next((old for old in _BLOCK if inner.startswith(old)), "")
        out[layer + (_BLOCK[known] + inner.removeprefix(known) if known else inner)] = value
    return out
