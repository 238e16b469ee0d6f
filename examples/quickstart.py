"""Train, watch the reward, sample images: the Python API in one page.

python examples/quickstart.py
"""

from __future__ import annotations

from pathlib import Path

import alignkit

run = alignkit.load(Path(__file__).with_name("first.toml"), overrides={"output": "runs/quickstart"})

for update in run.train():  # a generator: break at any time, and resume later
    print(f"update {update.step}: reward {update.reward:.3f}")

for index, image in enumerate(run.sample(["a red circle and a blue square", "a green heart"], steps=2)):
    image.save(run.folder / f"image{index}.png")
print(f"images and pytorch_lora_weights.safetensors are in {run.folder}")
