"""A diffusers pipeline as a Policy: its samples are those of diffusers, and what is not trained stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rollout import sample
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from families import save_family

TEXTS = ["a red circle", "a blue square and a green cross"]


def disturb(policy: DiffusersPolicy, scale: float = 0.2, seed: int = 1) -> None:
    """Random steps away from the start, as training would take."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def predict(policy: DiffusersPolicy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.denoise(x, torch.tensor([999, 499]), policy.encode(TEXTS))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 8])
def test_lcm_samples_equal_those_of_plain_diffusers_on_the_same_noise(tiny_lcm: Path, num_steps: int) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False, guidance_scale=3.5)
    pipe = DiffusionPipeline.from_pretrained(tiny_lcm, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    initial = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(7))
    expected = pipe(
        TEXTS, num_inference_steps=num_steps, guidance_scale=3.5, latents=initial, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    # The scheduler samples one latent a step from the generator, and none at the last.
    generator = torch.Generator().manual_seed(3)
    noises = torch.stack([initial, *(torch.randn(initial.shape, generator=generator) for _ in range(num_steps))], 1)
    with torch.no_grad():
        images = policy.decode(sample(policy, LCM(num_steps), policy.encode(TEXTS), noises))
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-3
    assert expected.std() > 0.01  # images, not a plain ground


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_deterministic_ddim_samples_equal_those_of_plain_diffusers(tiny_teacher: Path, guidance_scale: float) -> None:
    policy = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=guidance_scale)
    pipe = DiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.register_to_config(set_alpha_to_one=False)
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.alphas_cumprod[0]
    initial = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(7))
    expected = pipe(
        TEXTS, num_inference_steps=5, guidance_scale=guidance_scale, latents=initial, output_type="latent"
    ).images  # fmt: skip
    noises = initial[:, None].expand(-1, 6, *initial.shape[1:])
    latents = sample(policy, DDIM(5, eta=0.0), policy.encode(TEXTS), noises)
    assert torch.allclose(latents, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_without_gradient_a_few_rows_at_a_time_go_through_the_network_and_nothing_changes(
    tiny_lcm: Path, tiny_teacher: Path, guidance_scale: float | None
) -> None:
    folder = tiny_lcm if guidance_scale is None else tiny_teacher
    policy = DiffusersPolicy(str(folder), lora_rank=4, guidance_scale=guidance_scale)
    x = torch.randn(7, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t, prompt = torch.tensor([999, 499, 19, 259, 779, 39, 99]), policy.encode([*TEXTS, "a white ring", *TEXTS, *TEXTS])
    w = torch.arange(7) / 2
    seen: list[int] = []
    policy.unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    with torch.no_grad():
        whole = [policy.denoise(x, t, prompt), policy.denoise(x, t, prompt, w)]
        policy.rows_per_pass = 3
        del seen[:]
        parts = [policy.denoise(x, t, prompt), policy.denoise(x, t, prompt, w)]
        passes = 1 if guidance_scale is None else 2  # with text and without
        assert seen == [passes * rows for rows in (3, 3, 1)] * 2
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    del seen[:]
    assert policy.denoise(x, t, prompt).requires_grad and seen == [7 * passes]


def test_a_guidance_that_is_embedded_changes_the_prediction(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    assert policy.guidance_scale == 8.5
    x, t, prompt = torch.ones(2, *policy.latent_shape), torch.tensor([999, 999]), policy.encode(TEXTS)
    with torch.no_grad():
        default = policy.denoise(x, t, prompt)
        assert torch.equal(default, policy.denoise(x, t, prompt, torch.full((2,), 8.5)))
        assert not torch.allclose(default, policy.denoise(x, t, prompt, torch.full((2,), 2.0)))


def test_without_an_embedding_guidance_is_linear_in_two_passes(tiny_teacher: Path) -> None:
    policy = DiffusersPolicy(str(tiny_teacher), trainable=False)
    assert policy.guidance_scale == 1
    x, t = torch.ones(2, *policy.latent_shape), torch.tensor([999, 499])
    with torch.no_grad():
        conditional = policy.denoise(x, t, policy.encode(TEXTS))
        null = policy.denoise(x, t, policy.encode(["", ""]))
        guided = policy.denoise(x, t, policy.encode(TEXTS), torch.tensor([1.0, 4.0]))
    expected = conditional + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1) * (conditional - null)
    assert torch.allclose(guided, expected, atol=1e-3)


def test_at_time_zero_a_consistency_model_returns_its_input(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(policy.denoise(x, torch.zeros(2, dtype=torch.long), policy.encode(TEXTS)), x)


def test_equal_texts_share_a_row_of_the_table(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    prompt = policy.encode([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]])
    assert prompt.texts == [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    assert prompt.table.shape[0] == 2 and prompt.index.tolist() == [0, 1, 0, 0]
    assert torch.equal(prompt.features[2], prompt.features[0])
    assert torch.allclose(prompt.features[1], policy.encode([TEXTS[1]]).features[0], atol=1e-6)


def test_images_and_latents_have_the_shapes_and_ranges_that_are_promised(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    latents = policy.encode_images(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert latents.shape == (2, *policy.latent_shape) and policy.latent_shape == (4, 8, 8)
    images = policy.decode((1000 * latents).requires_grad_())
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and images.requires_grad
    assert bool(((images >= 0) & (images <= 1)).all())


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_reference_predicts_as_before_training(tiny_lcm: Path, lora_rank: int) -> None:
    torch.manual_seed(0)
    untrained = predict(DiffusersPolicy(str(tiny_lcm), trainable=False))
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=lora_rank)
    assert torch.equal(predict(policy), untrained)
    disturb(policy)
    trained = predict(policy)
    assert not torch.allclose(trained, untrained)
    with policy.reference():
        assert torch.equal(predict(policy), untrained)
    assert torch.equal(predict(policy), trained)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_an_exception_inside_using_or_reference_leaves_the_trained_weights_in_place(
    tiny_lcm: Path, lora_rank: int
) -> None:
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=lora_rank)
    disturb(policy)
    trained = predict(policy)
    zeros = {name: torch.zeros_like(value) for name, value in policy.weights().items()}
    for context in (policy.using(zeros), policy.reference()):
        with pytest.raises(KeyboardInterrupt), context:
            assert not torch.equal(predict(policy), trained)
            raise KeyboardInterrupt
        assert torch.equal(predict(policy), trained)
        assert all(p.requires_grad for p in policy.parameters())


def test_using_leaves_the_given_tensors_and_the_parameters_themselves_alone(tiny_lcm: Path) -> None:
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    parameters = policy.parameters()
    average = {name: torch.full_like(value, 0.1) for name, value in policy.weights().items()}
    with policy.using(average):
        disturbed = predict(policy)
        assert all(a is b for a, b in zip(policy.parameters(), parameters, strict=True))
    assert not torch.equal(predict(policy), disturbed)
    assert all(bool((value == 0.1).all()) for value in average.values())


def test_only_the_adapter_is_trained_with_lora_and_the_whole_unet_without(tiny_lcm: Path) -> None:
    adapted = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    assert all("lora" in name for name in adapted.weights()) and adapted.weights()
    whole = DiffusersPolicy(str(tiny_lcm), lora_rank=0)
    assert len(whole.parameters()) == len(list(whole.unet.parameters()))
    for policy in (adapted, whole):
        assert list(map(id, policy.weights().values())) == list(map(id, policy.parameters()))
        assert not any(p.requires_grad for p in [*policy.vae.parameters(), *policy.pipe.text_encoder.parameters()])


def test_the_gradient_reaches_what_is_trained_and_nothing_else(tiny_lcm: Path) -> None:
    torch.manual_seed(0)
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    disturb(policy)
    x = torch.ones(2, *policy.latent_shape)
    policy.denoise(x, torch.tensor([999, 499]), policy.encode(TEXTS)).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in policy.parameters())
    parts = (policy.unet, policy.vae, policy.pipe.text_encoder)
    frozen = [p for part in parts for p in part.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("form", ["lcm", "sdxl"])
def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(
    form: str, tiny_lcm: Path, tmp_path: Path
) -> None:
    source, found = tiny_lcm, []
    if form == "sdxl":
        source = tmp_path
        save_family("sdxl_turbo", source)
    for again in (False, True):
        torch.manual_seed(0)  # for the adapter
        policy = DiffusersPolicy(str(source), gradient_checkpointing=again)
        disturb(policy)
        begun: list[torch.nn.Module] = []
        for layer in (policy.unet.up_blocks[1].resnets[0], policy.vae.decoder.up_blocks[0].resnets[0]):
            layer.register_forward_pre_hook(lambda layer, _, begun=begun: begun.append(layer))
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
        clean = policy.denoise(x, torch.tensor([999, 499]), policy.encode(TEXTS))
        images = policy.decode(clean)
        with policy.reference():  # the adapter is off and on again before the way back
            policy.denoise(x, torch.tensor([999, 499]), policy.encode(TEXTS))
        count = len(begun)
        images.square().mean().backward()
        assert len(begun) == count + 2 * again
        found.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(found[1], found[0])
    assert any(bool(gradient.any()) for gradient in found[0])


def test_weights_in_half_precision_are_trained_and_run_in_float32(tiny_lcm: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(tiny_lcm, dtype=torch.float16).save_pretrained(tmp_path)
    policy = DiffusersPolicy(str(tmp_path), lora_rank=4)
    parts = (policy.unet, policy.vae, policy.pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_lora_targets_that_name_no_layer_are_refused(tiny_lcm: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora_targets"):
        DiffusersPolicy(str(tiny_lcm), lora_targets=["nowhere"])


def test_a_whole_unet_is_exported_as_diffusers_reads_it(tiny_lcm: Path, tmp_path: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=0)
    average = {name: value.detach() + 0.01 for name, value in policy.weights().items()}
    policy.export(tmp_path, average)
    read = dict(UNet2DConditionModel.from_pretrained(tmp_path / "unet").named_parameters())
    assert read.keys() == average.keys()
    assert all(torch.equal(read[name], average[name]) for name in average)


def test_a_folder_that_is_no_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_index\.json is missing"):
        DiffusersPolicy(str(tmp_path))
    with pytest.raises(ConfigError, match="no folder and no hub id"):
        DiffusersPolicy(str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json is not a readable pipeline index"):
        DiffusersPolicy(str(tmp_path))


def test_weights_that_are_cut_short_are_a_single_clear_line(tiny_lcm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lcm, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded as a diffusers pipeline") as caught:
        DiffusersPolicy(str(folder))
    assert "\n" not in str(caught.value)


def test_a_reference_within_a_reference_ends_with_the_outer_one(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm))
    before = predict(policy)
    disturb(policy)
    after = predict(policy)
    with policy.reference():
        with policy.reference():
            pass
        assert torch.equal(predict(policy), before)
    assert torch.equal(predict(policy), after) and not torch.equal(after, before)


def test_feature_maps_are_outputs_of_named_blocks_of_the_network_as_it_is(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    names = ["up_blocks.0", "mid_block", "down_blocks.1"]
    x, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([100, 100]), policy.encode(TEXTS)

    def maps() -> list[torch.Tensor]:
        with torch.no_grad():
            return policy.feature_maps(x, t, prompt, names)

    start = maps()
    assert [tuple(m.shape) for m in start] == [(2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 4, 4)]
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = policy.unet.up_blocks[0].register_forward_hook(lambda module, given, output: seen.append(output))
        policy.denoise(x, t, prompt, torch.ones(2))
        hook.remove()
    assert torch.equal(seen[0], start[0])
    policy.rows_per_pass = 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps(), start, strict=True))
    disturb(policy)
    assert not torch.allclose(maps()[0], start[0], atol=1e-2)
    with policy.reference(), torch.enable_grad():
        latents = x.clone().requires_grad_()
        found = policy.feature_maps(latents, t, prompt, names)
        (slope,) = torch.autograd.grad(found[0][0].sum(), latents)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, start, strict=True))
    assert bool(slope[0].any()) and not bool(slope[1].any())
    with pytest.raises(
        ConfigError, match=r"^layers: found conv_in, expected some of down_blocks\.0, .*, up_blocks\.1$"
    ):
        policy.feature_maps(x, t, prompt, ["mid_block", "conv_in"])
