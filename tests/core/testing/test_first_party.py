"""Everything that ships with alignkit passes the checks of `alignkit.testing` for plugins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

import alignkit
from alignkit.data.images import open_images
from alignkit.data.preferences import open_pairs
from alignkit.errors import ConfigError
from alignkit.interfaces import Algorithm, Reward, Sampler
from alignkit.registry import default_registry
from alignkit.testing import (
    check_algorithm,
    check_images,
    check_model,
    check_pairs,
    check_regulariser,
    check_reward,
    check_sampler,
    check_surrogate,
    coarse_images,
    refusal,
)
from alignkit.testing.algorithm import tiny_trainer
from alignkit.testing.world import Form, TinyImages, TinyPairs
from alignkit_lasro.lasro import LaSRO
from alignkit_models import MODELS
from alignkit_rewards.attribute_binding import Mode, QuestionForm
from alignkit_shapes.models import WEIGHTS

TESTS = Path(__file__).parents[2]
OURS = [row for row in default_registry().components() if row.plugin.startswith("alignkit_")]

LRM = {"width": 32, "layers": 2, "heads": 2, "patch": 1}
"""Its own defaults are for latents of 64 x 64."""
SURROGATES: dict[str, dict[str, Any]] = {
    "lrm": LRM,
    "latent_clip": {"width": 32, "layers": 2, "heads": 2},
    "latent_blip": {"width": 32, "layers": 2, "heads": 2},
}
REWARDS: dict[str, list[dict[str, Any]]] = {
    "attribute_binding": [
        {"judge": str(WEIGHTS / "judge"), "mode": mode, "questions": questions}
        for mode in get_args(Mode)
        for questions in get_args(QuestionForm)
    ],
    "function": [{"target": "reward_fixtures:mean_of_pixels", "gradient": g} for g in (False, True)],
    "jpeg_compressibility": [{}],
    "jpeg_incompressibility": [{}],
    "pixel_check": [{}],
}
ELSEWHERE = {
    "aesthetic": "test_aesthetic.py",
    "clip_score": "test_clip_rewards.py",
    "hpsv2": "test_hpsv2.py",
    "image_reward": "test_image_reward.py",
    "ocr": "test_ocr.py",
    "pickscore": "test_clip_rewards.py",
    "remote": "test_remote.py",
    "text_alignment": "test_text_alignment.py",
    "vlm_judge": "test_vlm_judge.py",
    "vqa_score": "test_vqa_score.py",
}
"""Rewards that are checked in another file, where their small checkpoint or server is made."""
DISTILLED = {"gors_lcm", "lcd", "rg_lcd"}
"""Methods that are latent consistency distillation, which is for the sampler lcm alone."""
FEWER: dict[str, dict[str, Any]] = {
    "drpo": {"samples": 4, "positives": 2, "negatives": 2},
    "gors_lcm": {"samples": 3},
    "hybrid": {"samples": 4},
}
"""Fewer samples of each prompt than are meant for training: each is a row, and an update has four."""
ALGORITHMS = FEWER | {"drpo": FEWER["drpo"] | {"layers": ["down_blocks.0", "mid_block", "up_blocks.0"]}}
"""Fields for the tiny networks; drpo's own defaults name layers of larger ones."""
FEW_STEPS = {"lasro"}
"""Methods that refuse a sampler of many steps."""
SAMPLED: list[tuple[Form, str]] = [("lcm", "lcm"), ("teacher", "ddim")]
EMBEDDED: dict[str, Form] = {"shapes_lcm": "lcm", "shapes_turbo": "turbo", "shapes_teacher": "teacher"}


def names(kind: str) -> list[str]:
    return [row.name for row in OURS if row.kind == kind]


def get(kind: str, name: str, **fields: Any) -> Any:
    return default_registry().get(kind, name)(**fields)


@pytest.mark.parametrize("name", names("sampler"))
def test_samplers(name: str) -> None:
    check_sampler(get("sampler", name))


def test_ddim_without_randomness() -> None:
    check_sampler(get("sampler", "ddim", eta=0.0))


@pytest.mark.parametrize("name", names("surrogate"))
def test_surrogates(name: str) -> None:
    check_surrogate(get("surrogate", name, **SURROGATES.get(name, {})))


@pytest.mark.parametrize(("form", "steps"), SAMPLED)
@pytest.mark.parametrize("name", names("regulariser"))
def test_regularisers(name: str, form: Form, steps: str) -> None:
    sampler = get("sampler", steps, num_steps=2)
    if name == "lcd" and steps != "lcm":
        with pytest.raises(ConfigError, match=r"sampler\.name: found DDIM, expected lcm"):
            check_regulariser(get("regulariser", name), sampler, form=form)
    else:
        check_regulariser(get("regulariser", name), sampler, form=form)


@pytest.mark.parametrize("name", names("reward"))
def test_rewards(name: str) -> None:
    if name in ELSEWHERE:
        assert "holds_the_contract(" in (TESTS / "plugins" / "rewards" / ELSEWHERE[name]).read_text(encoding="utf-8")
        pytest.skip(f"checked with a small checkpoint or a server in tests/plugins/rewards/{ELSEWHERE[name]}")
    for fields in REWARDS[name]:
        reward: Reward = get("reward", name, **fields)
        check_reward(reward)


@pytest.mark.parametrize("name", names("model"))
def test_models(name: str) -> None:
    checked = check_model(name)
    embedded = {"alignkit_shapes.data:Drawings", "alignkit_shapes.data:DrawingPairs", "an image of 64 pixels"}
    assert embedded <= set(checked.split("; ")) if name.startswith("shapes_") else checked.startswith("its settings")


def test_sources_of_images_and_pairs(tmp_path: Path) -> None:
    for i, image in enumerate(coarse_images(5, 40, 56)):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}", encoding="utf-8")
    check_images(open_images(str(tmp_path), 32), 32)
    rows = [{"text": f"pair {i}", "winner": f"{i}.png", "loser": f"{(i + 1) % 5}.png"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    check_pairs(open_pairs(str(tmp_path), 32), 32)


def test_sources_that_the_checks_themselves_use() -> None:
    check_images(TinyImages(), 64)  # type: ignore[arg-type]
    check_pairs(TinyPairs(), 64)  # type: ignore[arg-type]


def trained(name: str, form: Form, steps: str, **fields: Any) -> None:
    algorithm: Algorithm[Any, Any] = get("algorithm", name, **ALGORITHMS.get(name, {}), **fields)
    sampler = get("sampler", steps, num_steps=2)
    reason = refusal(algorithm, sampler)
    assert bool(reason) == (name in DISTILLED and steps != "lcm" and not fields), reason
    if reason:
        assert "\n" not in reason and "expected" in reason
        return
    surrogate = get("surrogate", "lrm", **LRM) if name == "rg_lcd" else None
    check_algorithm(algorithm, sampler, form=form, surrogate=surrogate)


@pytest.mark.parametrize(("form", "steps"), SAMPLED)
@pytest.mark.parametrize("name", names("algorithm"))
def test_algorithms(name: str, form: Form, steps: str) -> None:
    trained(name, form, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    # `test_algorithms` tries the teacher's form and sampler, and the plugins' own tests that of turbo models.
    ["shapes_lcm", *(pytest.param(name, marks=pytest.mark.long) for name in ("shapes_turbo", "shapes_teacher"))],
)
@pytest.mark.parametrize("name", names("algorithm"))
def test_algorithms_with_what_an_embedded_model_brings(name: str, model: str) -> None:
    run = alignkit.load(None, {"model.name": model, "algorithm.name": name})
    algorithm, sampler, surrogate = run.algorithm(), run.sampler(), run.config.surrogate
    if reason := refusal(algorithm, sampler):  # tests/plugins/shapes/test_bundles.py lists them with the reasons
        assert name in DISTILLED | FEW_STEPS and model != "shapes_lcm", reason
        return
    algorithm = replace(algorithm, **FEWER.get(name, {}))
    if name == "lasro":
        algorithm = replace(algorithm, contrast=0.0)  # which takes two texts in a batch
    # Samplers of many steps are tried at three.
    check_algorithm(
        algorithm, replace(sampler, num_steps=min(3, sampler.num_steps)), form=EMBEDDED[model],
        surrogate=get("surrogate", surrogate.name, **surrogate.fields) if surrogate else None,
    )  # fmt: skip


def published(name: str) -> list[tuple[Form, Algorithm[Any, Any], Sampler]]:
    """Return the settings of the models of alignkit_models for a method, each once."""
    found: list[tuple[Form, Algorithm[Any, Any], Sampler]] = []
    for model in MODELS:
        settings = {
            "model.name": model,
            "algorithm.name": name,
            "reward": ["pixel_check"],
            "data.prompts": "animals",
        }
        run = alignkit.load(None, settings)
        algorithm, sampler = replace(run.algorithm(), **ALGORITHMS.get(name, {})), run.sampler()
        # Samplers of many steps are tried at three.
        short = replace(sampler, num_steps=min(3, sampler.num_steps))
        form: Form = "lcm" if sampler.consistency else "teacher" if model in ("sd_1_5", "sdxl") else "turbo"
        # tests/plugins/models/test_models.py lists them with the reasons.
        if refusal(algorithm, sampler):
            assert name in DISTILLED | FEW_STEPS and form != "lcm", (model, name)
        elif (form, algorithm, short) not in found:
            found.append((form, algorithm, short))
    return found


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("lasro", "the first"),
        *(pytest.param(name, "the first", marks=pytest.mark.long) for name in names("algorithm") if name != "lasro"),
        *(pytest.param(name, "the others", marks=pytest.mark.long) for name in names("algorithm")),
    ],
)
def test_algorithms_with_what_published_models_bring(name: str, which: str) -> None:
    found = published(name)
    assert found
    for form, algorithm, sampler in found[:1] if which == "the first" else found[1:]:
        if isinstance(algorithm, LaSRO):  # which has a weight for each step
            algorithm = replace(algorithm, step_weights=algorithm.step_weights[: sampler.num_steps])
        check_algorithm(algorithm, sampler, form=form)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pso", {"mode": "offline"}),
        ("rg_lcd", {"proxy": True}),
        ("ddpo", {"final_step": "renoise"}),
    ],
)
def test_other_forms_of_algorithms(name: str, fields: dict[str, Any]) -> None:
    trained(name, "lcm", "lcm", **fields)


@pytest.mark.parametrize(("form", "steps"), SAMPLED)
@pytest.mark.parametrize("name", names("algorithm"))
def test_a_round_moves_what_is_trained_and_nothing_else(name: str, form: Form, steps: str) -> None:
    algorithm = get("algorithm", name, **ALGORITHMS.get(name, {}))
    sampler = get("sampler", steps, num_steps=2)
    if reason := refusal(algorithm, sampler):
        assert name in DISTILLED and steps != "lcm", reason
        return
    torch.manual_seed(0)
    trainer = tiny_trainer(algorithm, sampler, form=form)
    policy, teacher, prompt = trainer.ctx.policy, trainer.ctx.teacher, trainer.ctx.policy.encode(["a red circle"])
    trained = {id(p) for p in policy.parameters()}
    pipes = [one.pipe for one in (policy, teacher) if one is not None]  # type: ignore[attr-defined]
    parts = [part for pipe in pipes for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
    frozen = [p for part in parts for p in part.parameters() if id(p) not in trained]
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))

    def reference() -> torch.Tensor:
        with policy.reference():
            return policy.denoise(x, torch.tensor([499]), prompt)

    before, start = [p.detach().clone() for p in frozen], reference()
    own = [p.detach().clone() for p in policy.parameters()]
    while trainer.ctx.update < 2:
        list(trainer.round())
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True)) and frozen
    assert torch.equal(reference(), start)
    assert not all(torch.equal(a, b) for a, b in zip(own, policy.parameters(), strict=True))
