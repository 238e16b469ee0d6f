"""Every method on every embedded model: `check` accepts the defaults, or refuses them with this reason."""

from __future__ import annotations

from typing import Any

import pytest

import alignkit
from alignkit.errors import ConfigError
from alignkit.registry import default_registry
from alignkit.runs.build import Parts
from alignkit_shapes.models import WEIGHTS

NOT_LCM = r"sampler\.name: found \w+, expected lcm: only a latent consistency model has this distillation loss"
FINE = ""

WITH_DEFAULTS = {
    ("ddpo", "shapes_lcm"): FINE,
    ("ddpo", "shapes_turbo"): FINE,
    ("ddpo", "shapes_teacher"): FINE,
    ("sdpo", "shapes_lcm"): FINE,
    ("sdpo", "shapes_turbo"): FINE,
    ("sdpo", "shapes_teacher"): FINE,
    ("rebel", "shapes_lcm"): FINE,
    ("rebel", "shapes_turbo"): FINE,
    ("rebel", "shapes_teacher"): FINE,
    ("d3po", "shapes_lcm"): FINE,
    ("d3po", "shapes_turbo"): FINE,
    ("d3po", "shapes_teacher"): FINE,
    ("pso", "shapes_lcm"): FINE,
    ("pso", "shapes_turbo"): FINE,
    ("pso", "shapes_teacher"): FINE,
    ("diffusion_dpo", "shapes_lcm"): FINE,
    ("diffusion_dpo", "shapes_turbo"): FINE,
    ("diffusion_dpo", "shapes_teacher"): FINE,
    ("lasro", "shapes_lcm"): FINE,
    ("lasro", "shapes_turbo"): FINE,
    (
        "lasro",
        "shapes_teacher",
    ): "sampler.name: found DDIM, expected lcm: .* of many steps becomes one with lcd",
    ("draft", "shapes_lcm"): FINE,
    ("draft", "shapes_turbo"): FINE,
    ("draft", "shapes_teacher"): FINE,
    ("hybrid", "shapes_lcm"): FINE,
    ("hybrid", "shapes_turbo"): FINE,
    ("hybrid", "shapes_teacher"): FINE,
    ("gors_lcm", "shapes_lcm"): FINE,
    ("gors_lcm", "shapes_turbo"): NOT_LCM,
    ("gors_lcm", "shapes_teacher"): NOT_LCM,
    ("rg_lcd", "shapes_lcm"): FINE,
    ("rg_lcd", "shapes_turbo"): NOT_LCM,
    ("rg_lcd", "shapes_teacher"): NOT_LCM,
    ("lcd", "shapes_lcm"): FINE,
    ("lcd", "shapes_turbo"): NOT_LCM,
    ("lcd", "shapes_teacher"): NOT_LCM,
    ("drpo", "shapes_lcm"): FINE,
    ("drpo", "shapes_turbo"): FINE,
    ("drpo", "shapes_teacher"): FINE,
}
NO_LIKELIHOOD = r"sampler: every step of lcm is deterministic with num_steps = 1.*likelihood of stochastic steps"
ONE_STEP: dict[str, Any] = {"sampler.num_steps": 1}
TEACHER = str(WEIGHTS / "shapes_teacher")
AS_LCM: dict[str, Any] = {"sampler.name": "lcm", "sampler.num_steps": 2, "model.teacher": TEACHER}
NO_LCM = r"sampler\.name: found lcm, which is for latent consistency models, and shapes_\w+ is none .* use renoise"
WITH_SETTINGS = [
    *(("shapes_lcm", name, ONE_STEP, NO_LIKELIHOOD) for name in ("ddpo", "sdpo", "rebel", "d3po", "pso")),
    ("shapes_turbo", "ddpo", {"sampler.eta": 0.0}, r"every step of ddim is deterministic .*eta = 0.0.*raise"),
    ("shapes_turbo", "pso", ONE_STEP, r"every step of euler_ancestral is deterministic with num_steps = 1"),
    ("shapes_turbo", "lasro", {"regulariser": ["lcd"]}, NOT_LCM),
    ("shapes_turbo", "ddpo", {"regulariser": ["lcd"]}, NOT_LCM),
    ("shapes_turbo", "pso", {"regulariser": ["lcd"]}, NOT_LCM),
    ("shapes_lcm", "rg_lcd", {"reward.attribute_binding.mode": "hard"}, r"follows the gradient of a reward, and attri"),
    ("shapes_lcm", "rg_lcd", {"reward": ["pixel_check"]}, r"follows the gradient of a reward, and pixel_check"),
    ("shapes_lcm", "rg_lcd", {"reward": ["pixel_check"], "algorithm.proxy": True}, FINE),
    ("shapes_turbo", "draft", {"reward": ["pixel_check"]}, r"algorithm draft follows the gradient .* pixel_check has"),
    (
        "shapes_turbo",
        "hybrid",
        {"reward": ["pixel_check"]},
        r"algorithm hybrid follows the gradient .* pixel_check has",
    ),
    ("shapes_lcm", "hybrid", {"reward": ["pixel_check"], "algorithm.gradient_of": "surrogate"}, FINE),
    (
        "shapes_turbo",
        "hybrid",
        {"sampler.name": "euler_ancestral", "sampler.eta": 0.0},
        r"sampler: found 0 stochastic of",
    ),
    ("shapes_lcm", "draft", {**ONE_STEP, "algorithm.every_step": False}, FINE),
    ("shapes_lcm", "pso", {"algorithm.mode": "offline"}, FINE),
    ("shapes_turbo", "pso", {"algorithm.mode": "offline"}, FINE),
    ("shapes_lcm", "diffusion_dpo", {"data.pairs": ""}, r"data\.pairs: missing"),
    ("shapes_lcm", "gors_lcm", ONE_STEP, FINE),
    *(("shapes_turbo", name, AS_LCM, NO_LCM) for name in ("lcd", "rg_lcd", "gors_lcm", "ddpo", "lasro")),
    ("shapes_teacher", "lcd", AS_LCM, NO_LCM),
    ("shapes_teacher", "lcd", {**AS_LCM, "model.prediction": "consistency"}, FINE),
    ("shapes_lcm", "lcd", {"data.prompts": ""}, FINE),
    ("shapes_lcm", "lcd", {"data.images": "nowhere"}, r"data\.images: found '.*nowhere', expected a folder"),
    ("shapes_lcm", "lasro", {"data.prompts": ""}, r"data\.prompts: missing"),
]


def check(model: str, algorithm: str, changes: dict[str, Any], reason: str) -> None:
    """Run `alignkit check --algo ALGORITHM --model MODEL --reward attribute_binding --set ...` from Python."""
    settings = {"model.name": model, "algorithm.name": algorithm, "reward": ["attribute_binding"]}
    run = alignkit.load(None, settings | changes)
    if not reason:
        assert run.check() == []
        return
    with pytest.raises(ConfigError, match=reason) as error:
        run.check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("algorithm", "model"), WITH_DEFAULTS)
def test_a_method_accepts_the_defaults_of_the_model_or_is_refused_with_the_reason(algorithm: str, model: str) -> None:
    check(model, algorithm, {}, WITH_DEFAULTS[algorithm, model])


@pytest.mark.parametrize(("model", "algorithm", "changes", "reason"), WITH_SETTINGS)
def test_an_impossible_combination_is_refused_with_the_reason(
    model: str, algorithm: str, changes: dict[str, Any], reason: str
) -> None:
    check(model, algorithm, changes, reason)


def test_every_method_has_a_line_for_every_embedded_model() -> None:
    methods = {r.name for r in default_registry().components("algorithm") if r.plugin.startswith("alignkit_")}
    models = {r.name for r in default_registry().components("model") if r.plugin == "alignkit_shapes"}
    assert set(WITH_DEFAULTS) == {(method, model) for method in methods for model in models}


def test_lasro_on_the_few_step_model_has_a_recipe_for_every_reward_and_without_it_no_additions() -> None:
    def run(reward: str, **changes: Any) -> alignkit.Run:
        return alignkit.load(
            None, {"algorithm.name": "lasro", "model.name": "shapes_lcm", "reward": [reward], **changes}
        )

    binding, other = run("attribute_binding"), run("jpeg_compressibility")
    assert binding.departure() == "recipe lasro_shapes, not the paper's"
    assert binding.config.surrogate is not None
    assert binding.config.surrogate.init == str((WEIGHTS / "surrogate.safetensors").resolve())
    assert other.departure() == "recipe lasro_shapes_any_reward, not the paper's"
    assert other.config.algorithm.fields["contrast"] == 0 and other.warnings() == []
    paper = run("attribute_binding", recipe="paper")
    paper.check()
    assert paper.departure() == "" and paper.warnings() == []
    assert [regulariser.name for regulariser in paper.config.regularisers] == ["lcd"]
    assert paper.config.evaluate == binding.config.evaluate


@pytest.mark.parametrize("algorithm", ["lasro", "draft", "hybrid"])
def test_the_weights_that_are_exported_are_not_chosen_on_the_prompts_of_the_table(algorithm: str) -> None:
    for model in ("shapes_lcm", "shapes_turbo") if algorithm != "lasro" else ("shapes_lcm",):
        parts = Parts(alignkit.load(None, {"algorithm.name": algorithm, "model.name": model}).config)
        table, chosen = ({e.text for e in some} for some in (parts.held_out(), parts.point_examples()))
        assert len(table) == 136 and len(chosen) == 64 and not table & chosen
