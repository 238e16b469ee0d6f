"""The model card of exported weights: what was trained, on what, what it gained, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from alignkit import __version__
from alignkit.config.bundles import is_hub_id
from alignkit.evaluation.rows import TOTAL
from alignkit.page.facts import label, number, spread, steps_text
from alignkit.page.record import Record

SNIPPETS = {
    "diffusers": """import torch
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained({base})
pipe.load_lora_weights("path/to/this/folder")
image = pipe({prompt}, num_inference_steps={steps}).images[0]""",
    "peft": """from diffusers import AutoPipelineForText2Image
from peft import PeftModel

pipe = AutoPipelineForText2Image.from_pretrained({base})
pipe.unet = PeftModel.from_pretrained(pipe.unet, "path/to/this/folder")
image = pipe({prompt}, num_inference_steps={steps}).images[0]""",
    "merged": """from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("path/to/this/folder")
image = pipe({prompt}, num_inference_steps={steps}).images[0]""",
}
"""Python that samples an image, by format."""
FILE = "Put `lora.safetensors` into the LoRA folder of ComfyUI, A1111 or Forge, and load it over {base} with {steps}."


def model_card(record: Record, metadata: Mapping[str, str], format: str, scale: float, images: bool) -> str:
    """Return a README.md in the hub's format: metadata, a before / after table, images, and how to use the files."""
    base = metadata["alignkit.base_model"]
    method = str(record.section("algorithm").get("name", "unknown"))
    steps = int(record.section("sampler").get("num_steps", 1))
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft" if format == "peft" else "diffusers",
        pipeline_tag="text-to-image",
        tags=["alignkit", "reward-alignment", method, *([] if format == "merged" else ["lora"])],
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {record.name}",
        "",
        *_summary(record, metadata, base, method, scale),
        "",
    ]
    lines += [*_table(record), ""]
    if images:
        lines += ["![The same prompts and noise before and after training](samples.png)", ""]
    lines += ["## Use", "", *_use(format, base, steps), ""]
    lines += [
        "## Licence",
        "",
        f"These weights change {_code(base)}: the licence of that model holds for them. State it as `license` at the "
        "top before you publish them.",
        "",
        f"Made with alignkit {__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _summary(record: Record, metadata: Mapping[str, str], base: str, method: str, scale: float) -> Iterator[str]:
    how = f"{method} ({record.departure})" if record.departure else method
    rewards = metadata.get("alignkit.rewards", "no reward")
    length = f"{record.last} updates, seed {metadata['alignkit.seed']}"
    yield f"{_code(base)} aligned with {_code(rewards)} by {_code(how)}: {length}."
    if scale != 1.0:
        yield f"The effect is scaled by {scale:g}."


def _table(record: Record) -> Iterator[str]:
    """Yield the rewards before and after training as a table, without parts of rewards."""
    only = label(record, TOTAL)  # the only reward equals the total
    rows = [row for row in record.compared if row.difference is not None and "/" not in row.reward]
    rows = [row for row in rows if row.reward != only]
    if not rows:
        return
    yield "| reward | steps | before | after | change, 95 % interval |"
    yield "|---|---|---|---|---|"
    for row in rows:
        name = label(record, row.reward) + (", held out" if row.held_out else "")
        change = f"{number(row.difference, signed=True)} {spread(row.low, row.high, signed=True)}".strip()
        cells = [_plain(name), steps_text(row.num_steps), number(row.before), number(row.after), change]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"Means over {rows[0].count} prompts that were not trained on ({record.source})."


def _use(format: str, base: str, steps: int) -> Iterator[str]:
    if format not in SNIPPETS:
        yield FILE.format(base=_code(base), steps=steps_text(steps))
        return
    yield "```python"
    source = base if is_hub_id(base) else f"path/to/{Path(base).name}"
    yield SNIPPETS[format].format(base=repr(source), prompt=repr("a red circle and a blue square"), steps=steps)
    yield "```"


def _code(text: str) -> str:
    """Return a text in one line as code in Markdown, whatever it holds."""
    return f"`{_plain(text).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    return re.sub(r"[\s|<>]+", " ", text)
