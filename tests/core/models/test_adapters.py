"""Weights next to a pipeline: adapters that are merged, trained or exported, and files that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import save_file

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.runs.run import Run
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from families import TEXTS, assert_parity, lcm_lora, plain, tiny_unet

# diffusers' Euler schedulers hand tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_training_reaches_the_adapter_of_an_sdxl_model(tiny_family: Any) -> None:
    policy = DiffusersPolicy(str(tiny_family("sdxl_turbo")), lora_rank=2)
    prompt = policy.encode(TEXTS)
    assert prompt.pooled is not None and prompt.pooled.shape == (2, 16) and prompt.features.shape[-1] == 64
    for parameter in policy.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    policy.denoise(torch.ones(2, *policy.latent_shape), torch.tensor([999, 499]), prompt).square().mean().backward()
    assert policy.parameters() and all(bool((p.grad != 0).any()) for p in policy.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in policy.parameters())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # peft, of any second adapter
def test_a_merged_adapter_belongs_to_the_reference_and_what_is_exported_goes_on_top(
    tiny_family: Any, tmp_path: Path
) -> None:
    (tmp_path / "lcm").mkdir()
    (tmp_path / "run").mkdir()
    given = {"adapter": str(lcm_lora(tmp_path / "lcm")), "prediction": "consistency"}
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(tiny_family("sd_1_5")), **given, lora_rank=2)  # type: ignore[arg-type]
    merged = DiffusersPolicy(str(tiny_family("sd_1_5")), **given, trainable=False)  # type: ignore[arg-type]
    bare = DiffusersPolicy(str(tiny_family("sd_1_5")), prediction="consistency", trainable=False)
    assert policy.weights() and all("lora" in name for name in policy.weights())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        x, t = torch.ones(2, *policy.latent_shape), torch.tensor([999, 499])
        before = merged.denoise(x, t, merged.encode(TEXTS))
        with policy.reference():
            assert torch.allclose(policy.denoise(x, t, policy.encode(TEXTS)), before, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(policy.denoise(x, t, policy.encode(TEXTS)), before, rtol=1e-2, atol=1e-2)
        assert not torch.allclose(bare.denoise(x, t, bare.encode(TEXTS)), before, rtol=1e-2, atol=1e-2)
    policy.export(tmp_path / "run", policy.weights())
    pipe = plain(tiny_family("sd_1_5"))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path / "lcm", adapter_name="lcm")
    pipe.load_lora_weights(tmp_path / "run", adapter_name="run")
    pipe.set_adapters(["lcm", "run"])
    assert_parity(policy, LCM(2), pipe, 1.0)


@pytest.mark.parametrize("name", ["sdxl_turbo", "sd_turbo", "lcm_dreamshaper"])
def test_what_a_run_exports_loads_in_plain_diffusers(tiny_family: Any, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(tiny_family(name)), lora_rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    policy.export(tmp_path, policy.weights())
    pipe = plain(tiny_family(name))
    pipe.load_lora_weights(tmp_path)
    sampler = LCM(2) if name.startswith("lcm") else EulerAncestral(2, eta=float(name == "sdxl_turbo"))
    assert_parity(policy, sampler, pipe, policy.guidance_scale if name.startswith("lcm") else 0.0)
    again = DiffusersPolicy(str(tiny_family(name)), adapter=str(tmp_path), trainable=False)
    x, t = torch.ones(2, *policy.latent_shape), torch.tensor([999, 499])
    with torch.no_grad():
        expected = policy.denoise(x, t, policy.encode(TEXTS))
        assert torch.allclose(again.denoise(x, t, again.encode(TEXTS)), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("key", ["unet", "adapter"])
@pytest.mark.parametrize("source", ["./nothing", "nothing", "a/b/c", "owner/weights.safetensors"])
def test_weights_that_can_be_nowhere_are_refused_before_anything_loads(
    tiny_run: Callable[..., Run], key: str, source: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key}: .* is no folder, no \.safetensors file and no hub id"):
        tiny_run(overrides={f"model.{key}": source}).check()


def test_weights_that_do_not_fit_are_a_single_clear_line(tiny_family: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(tiny_unet("sdxl").state_dict(), other)
    for field, source in (("unet", other), ("adapter", other), ("unet", tmp_path), ("adapter", tmp_path)):
        with pytest.raises(ConfigError, match=rf"model\.{field}: .*(cannot be loaded as|is no)") as caught:
            DiffusersPolicy(str(tiny_family("sd_1_5")), **{field: str(source)})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_an_adapter_without_the_unet_is_refused_and_what_is_merged_is_quiet(
    tiny_family: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match=r"model\.adapter: .* cannot be loaded as a LoRA for"):
        DiffusersPolicy(str(tiny_family("sd_1_5")), adapter=str(tmp_path / "text.safetensors"))
    capfd.readouterr()
    DiffusersPolicy(str(tiny_family("sd_1_5")), adapter=str(lcm_lora(tmp_path)), trainable=False)
    assert "LoRA" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "tensors", [{"lora_A": torch.tensor(1.0), "lora_B": torch.tensor(1.0)}, {"lora_A": torch.ones(0, 4)}]
)
def test_tensors_of_no_adapter_are_a_single_clear_line(
    tiny_family: Any, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    save_file({f"{layer}.{name}.weight": tensor for name, tensor in tensors.items()}, tmp_path / "scalar.safetensors")
    with pytest.raises(
        ConfigError, match=r"^model\.adapter: .*scalar\.safetensors cannot be loaded as a LoRA"
    ) as caught:
        DiffusersPolicy(str(tiny_family("sd_1_5")), adapter=str(tmp_path / "scalar.safetensors"), trainable=False)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of diffusers
def test_a_hub_that_cannot_be_reached_is_no_missing_file(tiny_family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given: dict[str, Any]
    for key in ("adapter", "unet"):
        given = {key: "nobody/nothing", "trainable": False}
        with pytest.raises(
            ConfigError, match=rf"^model\.{key}: nobody/nothing is not on this disk, and the hub .* reached"
        ):
            DiffusersPolicy(str(tiny_family("sd_1_5")), **given)
