"""The policy class that serves a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.config.bundles import MANY_STEPS, find_bundle, find_policy, is_checkpoint
from alignkit.errors import AlignkitError, ConfigError, PluginError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import PolicyFacts, PolicySettings
from alignkit.registry import default_registry
from alignkit.testing.world import Form, tiny_pipeline

RIVAL = """
    from alignkit import hookimpl

    @hookimpl
    def register_policies(register):
        register("rival", "rival.{module}:Rival", "A policy that serves everything")
"""
SERVES_ALL = """
    from alignkit.models.diffusers_policy import DiffusersPolicy

    class Rival(DiffusersPolicy):
        @classmethod
        def serves(cls, source):
            {body}
"""


def rival(plugins: Any, body: str = "return True", module: str = "policy") -> None:
    plugins.install("rival", RIVAL.format(module=module), policy=SERVES_ALL.format(body=body))


def pipeline(folder: Path, **parts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    index = {"_class_name": "StableDiffusion3Pipeline"} | parts
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_diffusers_pipelines_with_a_unet_and_hub_ids_are_served_by_the_core(tiny_lcm: Path, tmp_path: Path) -> None:
    for source in (str(tiny_lcm), "owner/name"):
        assert find_policy(source) is DiffusersPolicy is find_policy(source, "diffusers")
    assert is_checkpoint(tiny_lcm) and not is_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("gone", None, "'.*gone' is no folder and no hub id of the form owner/name$"),
        ("empty", None, r"the folder .*empty holds no diffusers pipeline \(model_index.json is missing\)"),
        ("flow", {"transformer": ["d", "T"]}, "no policy serves .*flow, a StableDiffusion3Pipeline; expected"),
        ("null", {"unet": [None] * 2, "vae": ["d", "V"], "scheduler": ["d", "S"]}, ".* with a UNet, a VAE and a"),
    ],
)
def test_a_checkpoint_that_no_policy_serves_is_one_line(tmp_path: Path, name: str, parts: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    if parts is not None:
        pipeline(tmp_path / name, **parts)
    with pytest.raises(ConfigError, match=f"^model.teacher: {message}") as caught:
        find_policy(str(tmp_path / name), key="model.teacher")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "consistency", "sampler"), [("lcm", True, {"name": "lcm"}), ("teacher", False, MANY_STEPS["sampler"])]
)
def test_a_folder_is_a_model_with_the_sampler_that_its_policy_suggests(
    form: Form, consistency: bool, sampler: dict[str, Any]
) -> None:
    source = str(tiny_pipeline(form))
    facts = DiffusersPolicy.facts(source, PolicySettings())
    assert (facts.consistency, facts.num_times) == (consistency, 1000)
    bundle = find_bundle(source)
    assert bundle.path == source and bundle.defaults == {"sampler": sampler}


def test_of_a_hub_id_no_more_is_known_than_the_settings_say() -> None:
    assert DiffusersPolicy.facts("owner/name", PolicySettings()) == PolicyFacts()
    assert DiffusersPolicy.facts("owner/name", PolicySettings(prediction="consistency")).consistency is True
    assert DiffusersPolicy.facts("owner/name", PolicySettings(prediction="epsilon")).consistency is False


def test_settings_that_the_policy_refuses_are_found_before_weights_load(tiny_lcm: Path, tmp_path: Path) -> None:
    for name in ("unet", "adapter"):
        with pytest.raises(ConfigError, match=rf"^model\.{name}: 'a b' is no folder, no \.safetensors file and no hub"):
            DiffusersPolicy.check(str(tiny_lcm), PolicySettings(**{name: "a b"}))
    folder = pipeline(tmp_path / "bare", unet=["d", "U"], vae=["d", "V"], scheduler=["d", "LCMScheduler"])
    with pytest.raises(ConfigError, match=r"^model: .*bare cannot be loaded as a diffusers pipeline: .*scheduler"):
        find_bundle(str(folder))


def test_an_index_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model: .*model_index\.json is not a readable pipeline index") as caught:
        find_policy(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_of_two_that_serve_a_checkpoint_the_user_chooses(plugins: Any, tiny_lcm: Path) -> None:
    rival(plugins)
    with pytest.raises(ConfigError, match=rf"^model\.policy: diffusers and rival both serve {tiny_lcm}; set"):
        find_policy(str(tiny_lcm))
    assert find_policy(str(tiny_lcm), "diffusers") is DiffusersPolicy
    assert find_policy(str(tiny_lcm), "rival") is default_registry().get("policy", "rival")


def test_a_folder_that_a_plugin_alone_serves_is_a_model(plugins: Any, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(ConfigError, match="no policy serves it"):
        find_bundle(str(tmp_path / "own"))
    rival(plugins, "return source.endswith('own')")
    default_registry.cache_clear()
    with pytest.raises(ConfigError, match="own"):  # it inherits the facts of diffusers pipelines
        find_bundle(str(tmp_path / "own"))
    assert find_policy(str(tmp_path / "own")).__name__ == "Rival"


@pytest.mark.parametrize(("body", "module"), [("raise OSError('no disk')", "policy"), ("return True", "gone")])
def test_a_broken_policy_spares_the_models_of_others_and_is_named_where_none_serves(
    plugins: Any, tiny_lcm: Path, tmp_path: Path, body: str, module: str
) -> None:
    rival(plugins, body, module)
    assert find_policy(str(tiny_lcm)) is DiffusersPolicy
    with pytest.raises(ConfigError, match=r"; policy rival .*plugin rival of rival 1\.0.*(no disk|cannot be imported)"):
        find_policy(str(tmp_path))


def test_an_unknown_policy_is_answered_with_the_nearest(tiny_lcm: Path, plugins: Any) -> None:
    with pytest.raises(AlignkitError, match=r"unknown policy 'difusers'; did you mean diffusers\? \(`alignkit list"):
        find_policy(str(tiny_lcm), "difusers")
    plugins.install("rival", RIVAL.format(module="policy"), policy="class Rival: ...")
    default_registry.cache_clear()
    with pytest.raises(PluginError, match=r"policy rival .* is not an alignkit.interfaces.Policy"):
        find_policy(str(tiny_lcm), "rival")
    with pytest.raises(ConfigError, match="'nowhere' is no folder and no hub id"):
        find_policy("nowhere", "rival")
