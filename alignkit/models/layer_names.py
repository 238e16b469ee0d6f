"""Names of the layers of diffusers' UNet in other formats."""

from __future__ import annotations

import re
from collections.abc import Collection

from alignkit.models.weight_files import Shapes

_NETWORK = re.compile(r"(?:base_model_model_|lora_unet_|lycoris_|unet_|model_diffusion_model_|diffusion_model_)")


def layer_names(shapes: Shapes) -> dict[str, str]:
    """Return the linear and convolution layers of a UNet by their names with "_" for ".", in diffusers' form and in
    that of the original code (`input_blocks_4_1_...`), which files of kohya's scripts for SDXL have."""
    layers = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith("weight") and shape[1:]]
    names = {plain_name(layer): layer for layer in layers}
    names |= {plain.removesuffix("_0"): layer for plain, layer in names.items() if plain.endswith("to_out_0")}
    resnets = max((int(m[1]) for name in layers if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))), default=0)
    attended = {match[1] for name in layers if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    originals = {layer: original_name(layer, resnets + 1, attended) for layer in layers}
    return names | {plain_name(original): layer for layer, original in originals.items() if original}


def plain_name(name: str) -> str:
    """Return the name of a layer without the prefixes of formats, with "_" for "."."""
    name = name.replace(".processor.", ".").replace(".", "_")
    while match := _NETWORK.match(name):
        name = name[match.end() :]
    return name


_WITHIN = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "norm1": "in_layers.0", "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def original_name(layer: str, resnets: int, attended: Collection[str]) -> str:
    """Return the name in the original code of a layer of diffusers' UNet with `resnets` in each down block; `attended`
    are the numbers of the up blocks with attention. Empty for a layer that it does not have."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        return ""
    side, kind, place, rest = match[1], match[3], int(match[4]), match[5]
    block = int(match[2] or 0)
    rest = _WITHIN.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(resnets + 1) * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(resnets + 1) * block + resnets}.{2 if match[2] in attended else 1}.conv"
    number = (resnets + 1) * block + place + (side == "down_blocks")
    return f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"
