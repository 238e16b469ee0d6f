"""The bundles of published models make whole run files, and load nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignkit.config.bundles import find_bundle
from alignkit.config.load import load, to_toml
from alignkit.records import PolicyFacts
from alignkit.registry import default_registry
from alignkit.runs.build import Parts
from alignkit.runs.run import open_run
from alignkit.testing import refusal
from alignkit_models import MODELS

INSTALLED = {row.name for row in default_registry().components("algorithm")}
PAIRS = [(model, name) for model in MODELS for name in find_bundle(model).algorithm_defaults if name in INSTALLED]


def run(prompts: Path, model: str, algorithm: str = "lasro", **changes: Any) -> Parts:
    settings = {"model.name": model, "algorithm.name": algorithm, "reward": ["pixel_check"]}
    return Parts(load(None, settings | {"data.prompts": str(prompts)} | changes))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("model", "algorithm"), PAIRS)
def test_the_settings_of_a_bundle_for_a_method_are_accepted_by_it(prompts: Path, model: str, algorithm: str) -> None:
    made = run(prompts, model, algorithm)
    made.algorithm().check(made.sampler(), PolicyFacts())
    for steps in made.config.evaluate.steps:
        made.sampler(steps)


DISTILLED = {"gors_lcm", "rg_lcd", "lcd"}
"""Methods with the loss of latent consistency distillation, which no other model has."""
OURS = sorted(r.name for r in default_registry().components("algorithm") if r.plugin.startswith("alignkit_"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("algorithm", OURS)
def test_every_method_starts_on_every_model_for_which_it_makes_sense(prompts: Path, model: str, algorithm: str) -> None:
    made = run(prompts, model, algorithm)
    reason = refusal(made.algorithm(), made.sampler())
    if algorithm in DISTILLED and made.config.sampler.name != "lcm":
        assert reason.startswith("sampler.name: found") and "\n" not in reason
        assert "only a latent consistency model has this distillation loss" in reason
    elif algorithm == "lasro" and model in ("sd_1_5", "sdxl"):
        assert reason  # it trains the few steps of a distilled model
    else:
        assert not reason
    if not reason and "teacher" in made.algorithm().needs:
        assert made.teacher_source()


@pytest.mark.parametrize(
    ("model", "algorithm", "reward", "section", "key", "value"),
    [
        ("lcm_dreamshaper", "rg_lcd", "hpsv2", "algorithm", "beta", 1.0),
        ("lcm_dreamshaper", "rg_lcd", "clip_score", "algorithm", "beta", 5.0),
        ("sdxl_lcm", "rg_lcd", "pickscore", "algorithm", "beta", 5.0),
        ("sdxl_lcm", "rg_lcd", "image_reward", "algorithm", "reward_cap", 2.0),
        ("lcm_dreamshaper", "ddpo", "aesthetic", "data", "batch_size", 8),
        ("lcm_dreamshaper", "ddpo", "jpeg_compressibility", "data", "batch_size", 4),
        ("sd_turbo", "sdpo", "aesthetic", "train", "learning_rate", 1e-4),
        ("sd_turbo", "sdpo", "pickscore", "train", "learning_rate", 6e-5),
        ("sdxl_turbo", "sdpo", "hpsv2", "train", "rows_per_update", 128),
        ("sd_1_5", "ddpo", "aesthetic", "algorithm", "buffer_size", 32),
        ("sd_1_5", "ddpo", "jpeg_compressibility", "algorithm", "buffer_size", 16),
    ],
)
def test_a_method_has_the_settings_that_its_paper_has_for_the_reward(
    prompts: Path, model: str, algorithm: str, reward: str, section: str, key: str, value: float
) -> None:
    config = run(prompts, model, algorithm, reward=[reward]).config
    found = getattr(config, section)
    if (algorithm, reward) == ("rg_lcd", "pickscore"):  # whose beta is that of cosines
        assert config.rewards[0].fields["variant"] == "cosine"
    assert (found.fields[key] if section == "algorithm" else getattr(found, key)) == value


@pytest.mark.parametrize("algorithm", ["sdpo", "rebel", "rg_lcd"])
@pytest.mark.parametrize("model", ["sd_turbo", "ssd_1b_lcm"])
def test_the_settings_of_a_method_survive_their_own_run_file(
    prompts: Path, tmp_path: Path, model: str, algorithm: str
) -> None:
    config = run(prompts, model, algorithm).config
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file) == config


@pytest.mark.parametrize("model", MODELS)
def test_a_bundle_resolves_to_a_run_file_that_loads_as_the_same_run(prompts: Path, tmp_path: Path, model: str) -> None:
    config = run(prompts, model, "lcd").config
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file) == config


def test_the_settings_of_the_papers_arrive(prompts: Path) -> None:
    turbo = run(prompts, "sd_turbo")
    assert turbo.config.sampler.name == "renoise" and turbo.sampler().num_steps == 2
    assert not turbo.config.regularisers and "teacher" not in turbo.algorithm().needs
    assert run(prompts, "sd_turbo", "lcd").config.sampler.fields["eta"] == 0
    lightning = run(prompts, "sdxl_lightning")
    assert lightning.config.model.unet.startswith("ByteDance/SDXL-Lightning/")
    assert lightning.sampler().num_steps == len(lightning.config.algorithm.fields["step_weights"]) == 4
    pruned = run(prompts, "ssd_1b_lcm").config
    assert (
        pruned.model.guidance_scale == 8 and pruned.model.prediction == "consistency" and pruned.model.lora_rank == 16
    )
    assert pruned.surrogate is not None and pruned.surrogate.fields["backbone"] == "segmind/Segmind-Vega"
    sdpo = run(prompts, "sd_turbo", "sdpo").config  # Table 2
    assert (sdpo.sampler.name, sdpo.sampler.fields["num_steps"], sdpo.sampler.fields["eta"]) == ("ddim", 50, 1)
    assert (sdpo.data.batch_size, sdpo.algorithm.fields["pairs"], sdpo.train.rows_per_update) == (128, 1, 64)
    assert (sdpo.train.updates, sdpo.train.learning_rate, sdpo.train.weight_decay) == (100 * 100, 1e-4, 1e-4)
    rlcm, rebel, paired = (run(prompts, "lcm_dreamshaper", name).config for name in ("ddpo", "rebel", "sdpo"))
    assert paired.train.max_grad_norm == float("inf") and paired.train.rows_per_update == 8
    assert run(prompts, "sd_turbo", "diffusion_dpo").config.train.warmup == 500
    assert run(prompts, "sdxl", "diffusion_dpo").config.train.warmup == 200
    assert (rlcm.sampler.fields["num_steps"], rlcm.model.guidance_scale, rlcm.model.lora_rank) == (8, 8, 8)
    assert rlcm.algorithm.fields["advantage_clip"] == 10 and rlcm.train.max_grad_norm == 5
    # All of a round is one update: trajectories of seven steps with a likelihood, or pairs.
    assert rlcm.train.rows_per_update == rlcm.data.batch_size * rlcm.algorithm.fields["samples"] * 7
    assert rebel.train.rows_per_update == rebel.data.batch_size * rebel.algorithm.fields["pairs"]
    assert rebel.train.max_grad_norm == float("inf")
    drpo = run(prompts, "sdxl_turbo", "drpo").config
    assert drpo.train.rows_per_update == drpo.data.batch_size * drpo.algorithm.fields["samples"] == 512
    assert drpo.sampler.fields["num_steps"] == 1 and drpo.model.lora_rank == 16 and drpo.train.precision == "bf16"
    gors, pso = (run(prompts, "ssd_1b_lcm", name).config for name in ("gors_lcm", "pso"))
    assert gors.sampler.fields["num_steps"] == pso.sampler.fields["num_steps"] == 2
    turbo_pso = run(prompts, "sdxl_turbo", "pso").config
    assert turbo_pso.train.rows_per_update == 8 * 3 and turbo_pso.train.learning_rate == 1e-5
    proxy = run(prompts, "lcm_dreamshaper", "rg_lcd", **{"algorithm.proxy": True}).config
    assert proxy.surrogate is not None and proxy.surrogate.learning_rate == 3.3e-6 and proxy.train.learning_rate == 1e-6
    assert run(prompts, "sdxl_lcm", "lcd").config.algorithm.fields["guidance_scale_min"] == 4
    d3po, ddpo = (run(prompts, "sd_1_5", name).config for name in ("d3po", "ddpo"))
    assert d3po.sampler.fields["num_steps"] == 20 == d3po.train.rows_per_update and d3po.train.learning_rate == 3e-5
    assert ddpo.data.batch_size == 256 and ddpo.train.rows_per_update == 64 * 50 and ddpo.model.guidance_scale == 5
    lora = run(prompts, "sdxl_lcm_lora").config
    assert lora.model.adapter == "latent-consistency/lcm-lora-sdxl" and lora.model.guidance_scale == 1


def test_the_settings_of_the_user_win_over_those_of_the_bundle(prompts: Path) -> None:
    changes = {"sampler.num_steps": 1, "algorithm.step_weights": [1.0], "train.rows_per_pass": 3}
    made = run(prompts, "ssd_1b_lcm", **changes)
    assert made.sampler().num_steps == 1 and made.config.train.rows_per_pass == 3
    other = run(prompts, "ssd_1b_lcm", **{"model.unet": "owner/another"})
    assert other.config.model.unet == "owner/another" and other.config.model.prediction == "consistency"


@pytest.mark.parametrize("model", ["sd_turbo", "sdxl_turbo", "lcm_dreamshaper", "sd_1_5", "sdxl"])
def test_the_hub_id_of_a_whole_pipeline_brings_the_settings_of_its_name(model: str) -> None:
    bundle = find_bundle(model)
    assert not {"unet", "adapter"} & bundle.defaults["model"].keys()
    assert find_bundle(bundle.path) == bundle
    assert find_bundle("owner/another").defaults == {}


def test_a_model_that_only_generates_has_its_own_sampler_and_not_that_of_the_default_algorithm() -> None:
    changes = {"reward": ["pixel_check"], "data.prompts": "none.txt"}
    assert load(None, {"model.name": "sd_turbo", **changes}).sampler.name == "renoise"  # lasro's
    own = open_run("sd_turbo", changes).config.sampler
    assert own.name == "euler_ancestral" and own.fields["eta"] == 0 and own.fields["num_steps"] == 4
    assert open_run("sd_turbo", {**changes, "sampler.name": "ddim"}).config.sampler.fields["eta"] == 1
    assert open_run("sd_turbo", {**changes, "algorithm.name": "lasro"}).config.sampler.name == "renoise"


def test_naming_a_model_imports_no_torch_and_no_diffusers() -> None:
    code = (
        "import sys; from alignkit.config.load import find_bundle; from alignkit_models import MODELS;"
        "[find_bundle(name) for name in MODELS]; print({'torch', 'diffusers', 'huggingface_hub'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
