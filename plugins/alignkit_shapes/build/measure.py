"""Stage 7: measure the numbers in `docs/shapes.md`."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alignkit import Example
from alignkit.data.decode import to_uint8
from alignkit.data.prompts import read_examples
from alignkit.rewards.weighted import quantize
from alignkit.rollout import sample_images
from alignkit.runs.run import open_run
from alignkit_rewards.attribute_binding import AttributeBinding, questions
from alignkit_rewards.phrases import phrases
from alignkit_shapes.build.questions import question
from alignkit_shapes.models import FOLDER, WEIGHTS
from alignkit_shapes.pixel_check import answers, find_regions
from alignkit_shapes.reward import PixelCheck, things_of
from alignkit_shapes.scenes import Scene, draw, sample_scene


def images_of(scenes: list[Scene]) -> Tensor:
    """Draw the scenes as float (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def accuracy_on_drawings(judge: AttributeBinding, scenes: int = 500, each: int = 6, seed: int = 4242) -> float:
    """Return the share of correct answers about new drawings."""
    rng = np.random.default_rng(seed)
    sampled = [sample_scene(rng) for _ in range(scenes)]
    pairs = [question(scene, rng) for scene in sampled for _ in range(each)]
    rows = torch.arange(scenes).repeat_interleave(each)
    logits = judge.yes_no_logits(images_of(sampled), rows, judge.encode([text for text, _ in pairs]))
    return float(((logits[:, 0] > logits[:, 1]) == torch.tensor([truth for _, truth in pairs])).float().mean())


@torch.no_grad()
def agreement(judge: AttributeBinding, images: Tensor, examples: list[Example]) -> float:
    """Return the share of the reward's questions on which VQA model and pixel check agree for these images."""
    by_image = [questions(phrases(example)) for example in examples]
    rows = torch.tensor([row for row, some in enumerate(by_image) for _ in some])
    logits = judge.yes_no_logits(images, rows, judge.encode([text for some in by_image for text, _ in some]))
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    checked = [answers(find_regions(p), things_of(e.text)) for p, e in zip(pixels, examples, strict=True)]
    truth = torch.tensor([answer for some in checked for answer in some])
    return float(((logits[:, 0] > logits[:, 1]) == truth).float().mean())


@torch.no_grad()
def sample_prompts(model: str, steps: int, examples: list[Example], seed: int = 1000) -> Tensor:
    """Sample one image per prompt, quantised to 8 bits like a file."""
    run = open_run(model)
    policy, sampler = run.policy(), run.sampler(steps)
    parts = []
    for start in range(0, len(examples), 50):
        part = examples[start : start + 50]
        seeds = [(seed, start + i) for i in range(len(part))]
        parts.append(sample_images(policy, sampler, [e.text for e in part], seeds))
    return quantize(torch.cat(parts))


def measure(limit: int = 200) -> None:
    """Print the VQA model's accuracy, and for each model and number of steps both rewards and their agreement."""
    examples = read_examples(FOLDER / "prompts" / "held_out.txt")[:limit]
    judge, pixel_check = AttributeBinding(judge=str(WEIGHTS / "judge")), PixelCheck()
    judge.load(torch.device("cpu"))
    console = Console(width=120)
    console.print(f"accuracy of the VQA model on 3000 questions about new drawings: {accuracy_on_drawings(judge):.4f}")
    columns = ("model", "steps", "VQA model", "pixel check", "exact", "agreement")
    table = Table(*columns, title=f"{len(examples)} held-out prompts")
    jobs = [("shapes_teacher", 25)] + [(m, k) for m in ("shapes_lcm", "shapes_turbo") for k in (1, 2, 4, 8)]
    for model, steps in jobs:
        images = sample_prompts(model, steps, examples)
        with torch.no_grad():
            binding, checked = judge(images, examples), pixel_check(images, examples)
        means = [binding.values.mean(), checked.values.mean(), checked.parts["exact"].mean()]
        table.add_row(
            model, str(steps), *(f"{float(m):.3f}" for m in means), f"{agreement(judge, images, examples):.3f}"
        )
    console.print(table)
