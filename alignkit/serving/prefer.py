"""A run and a folder as the page on which a person chooses between two images: `alignkit prefer`."""

from __future__ import annotations

import io
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from alignkit.config.sections import ModelConfig
from alignkit.data.decode import to_uint8
from alignkit.errors import ConfigError
from alignkit.rollout import sample_images
from alignkit.serving.answers import Answers, Pair, digest
from alignkit.serving.chooser import Chooser

if TYPE_CHECKING:
    from alignkit.runs.run import Run

PORT = 8189


def open_prefer(
    run: Run,
    out: Path,
    *,
    count: int = 1,
    limit: int | None = None,
    seed: int = 0,
    before: bool = False,
    port: int = PORT,
    skipped: list[str] | None = None,
) -> Chooser:
    """Return a server for `count` pairs of each training prompt of a run, of which `out` may hold answers already.

    `limit` prompts are used, from the top, all of them once before the first comes again. Both images of a pair are the
    run's, from different noise; with `before`, the second is that of the model before training, from the same noise.
    Broken prompts are noted in `skipped` if that list is given. Loads no weights: `start` does. Raises ConfigError for
    settings that are invalid or not those of `out`.
    """
    if before and not (run.folder / "run.toml").is_file():
        raise ConfigError("--before: found a model, expected the folder of a run to compare with its start")
    sampler, examples = run.sampler(), run.prompts(skipped)
    if not examples:
        raise ConfigError("data.prompts: missing; name the prompts with --prompts")
    settings = {
        "model": run.name,
        "prompts": f"{len(examples)} prompts, {digest([[e.text, dict(e.metadata)] for e in examples])}",
        "steps": sampler.num_steps,
        "seed": seed,
        "before": before,
        "weights and other settings": digest([asdict(run.config.model), asdict(run.config.sampler), run.saved()]),
    }
    answers = Answers(out, settings, len(examples))
    plan = [Pair(prompt, copy) for copy in range(count) for prompt in range(len(examples[:limit]))]
    origin = {"seed": seed, "steps": sampler.num_steps, "model": run.name}
    command = train_command(run, out, before)
    return Chooser(port, answers, examples, plan, seed=seed, compares=before, origin=origin, command=command)


def start(server: Chooser, run: Run) -> None:
    """Load the model of the run that `server` was opened with, and begin to generate images."""
    policy, sampler = run.policy(), run.sampler()

    def generate(pair: Pair) -> tuple[bytes, bytes]:
        # One pair is one batch, so that its images do not depend on the pairs around it.
        text, place = server.examples[pair.prompt].text, 2 * (pair.copy * len(server.examples) + pair.prompt)
        seeds = [(server.seed, place), (server.seed, place + 1)]
        with policy.using(run.weights):
            images = sample_images(policy, sampler, [text, text], seeds)
        if server.compares:
            with policy.reference():
                # Two at a time as well: one alone is rounded in another way.
                images[1:] = sample_images(policy, sampler, [text, text], seeds)[:1]
        first, second = (_png(Image.fromarray(i)) for i in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return first, second

    server.generate(generate)


def train_command(run: Run, out: Path, before: bool = False) -> str:
    """Return the command that trains on the pairs in `out`, starting from the weights that made the images."""
    name, lora = run.config.model.name, run.folder / "pytorch_lora_weights.safetensors"
    words = ["alignkit", "train", "--algo", "diffusion_dpo"]
    words += ["--model", name] if name != ModelConfig().name else []
    if (run.folder / "run.toml").is_file() and lora.is_file() and not (before or run.config.model.adapter):
        words += ["--set", f"model.adapter={run.folder}"]
    return shlex.join([*words, "--set", f"data.pairs={out}"])


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
