"""The surrogates that are a CLIP or a BLIP on latents: their scores, their initial weights, their refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPModel

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import Prompt
from alignkit_lasro.vision_language import LatentBLIP, LatentCLIP, VisionLanguage
from alignkit_shapes.build.text import tokenizer
from alignkit_shapes.models import WEIGHTS
from model_fixtures import tiny_text_config

TEXTS = ["a red circle", "a blue square and a green star", "a red circle"]
SMALL: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2}
JUDGE = WEIGHTS / "judge"
"""A BLIP for questions, on images of 64 pixels in patches of 8."""
KINDS = [LatentCLIP, LatentBLIP]


@pytest.fixture(scope="module")
def policy(tiny_lcm: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_lcm), trainable=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP for images of 32 pixels in patches of 8."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(3)
    CLIPModel(
        CLIPConfig(text_config=tiny_text_config().to_dict(), vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def loaded(made: VisionLanguage, policy: DiffusersPolicy) -> Any:
    torch.manual_seed(0)
    made.load(policy)
    return made


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def opinionated(surrogate: VisionLanguage) -> None:
    """A head that starts at zero gets weights."""
    if isinstance(surrogate, LatentBLIP):
        with torch.no_grad():
            surrogate.module().itm_head.weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, operator]


def test_the_clip_scores_by_cosine_at_its_temperature(policy: DiffusersPolicy) -> None:
    surrogate, prompt = loaded(LatentCLIP(**SMALL), policy), policy.encode(TEXTS)
    network, words = surrogate.module(), tokenizer()
    with torch.no_grad():
        image = network.visual_projection(network.vision_model(latents()).pooler_output)
        expected = []
        for text, one in zip(TEXTS, image, strict=True):
            tokens = words([text], return_tensors="pt").input_ids
            feature = network.text_projection(network.text_model(tokens).pooler_output)[0]
            expected.append(math.exp(network.logit_scale) * cosine_similarity(one, feature, dim=0))
        found = surrogate.score(latents(), prompt)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4) and float(found.std()) > 1e-3


def test_a_new_clip_reads_with_the_text_encoder_of_the_generator(policy: DiffusersPolicy) -> None:
    network = loaded(LatentCLIP(**SMALL), policy).module()
    own = {name.removeprefix("text_model."): p for name, p in policy.pipe.text_encoder.state_dict().items()}
    for name, value in network.text_model.state_dict().items():
        same = own[name.removeprefix("text_model.")]
        assert torch.equal(value, same) and value.data_ptr() != same.data_ptr()


def test_before_training_the_blip_scores_everything_0(policy: DiffusersPolicy) -> None:
    surrogate, prompt = loaded(LatentBLIP(**SMALL), policy), policy.encode(TEXTS)
    assert surrogate.score(latents(), prompt).tolist() == [0.0, 0.0, 0.0]
    assert float(surrogate.loss(latents(0), latents(1), prompt)) == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_latent_and_on_its_own_text(policy: DiffusersPolicy, kind: type[VisionLanguage]) -> None:
    surrogate = loaded(kind(**SMALL), policy)
    opinionated(surrogate)
    x = latents().requires_grad_()
    scores = surrogate.score(x, policy.encode(TEXTS))
    scores.sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(1) > 0).all())
    scores = scores.detach()
    other = surrogate.score(latents(), policy.encode([TEXTS[1], TEXTS[1], TEXTS[0]]))
    assert torch.allclose(scores[1:], other[1:], atol=1e-5) and abs(float(scores[0] - other[0])) > 1e-4
    moved = surrogate.score(latents(1), policy.encode(TEXTS))
    assert bool(((moved - scores).abs() > 1e-4).all())


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_learns_from_pairs(policy: DiffusersPolicy, kind: type[VisionLanguage]) -> None:
    surrogate = loaded(kind(**SMALL), policy)
    opinionated(surrogate)
    network = surrogate.module()
    assert not any(p.requires_grad for p in network.parameters())
    network.requires_grad_(True)
    surrogate.loss(latents(0), latents(1), policy.encode(TEXTS)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_clip_from_disk_keeps_all_but_the_embedding_of_patches(policy: DiffusersPolicy, clip: Path) -> None:
    network = loaded(LatentCLIP(backbone=str(clip)), policy).module()
    kept = CLIPModel.from_pretrained(clip).state_dict()
    found = network.state_dict()
    assert found.keys() == kept.keys()
    changed = [
        name for name in kept if found[name].shape != kept[name].shape or not torch.equal(found[name], kept[name])
    ]
    assert changed == ["vision_model.embeddings.patch_embedding.weight"]
    assert found[changed[0]].shape == (48, 4, 1, 1)


@pytest.mark.parametrize("patch", [0, 2, 4])
def test_a_checkpoint_for_images_reads_latents_in_any_number_of_patches(
    policy: DiffusersPolicy, clip: Path, patch: int
) -> None:
    for made in (LatentCLIP(backbone=str(clip), patch=patch), LatentBLIP(backbone=str(JUDGE), patch=patch)):
        surrogate = loaded(made, policy)
        opinionated(surrogate)
        scores = surrogate.score(latents(), policy.encode(TEXTS))
        assert scores.shape == (3,) and bool(scores.isfinite().all()) and float(scores.std()) > 1e-5
        seen = surrogate.module().vision_model(latents(), interpolate_pos_encoding=True).last_hidden_state
        assert seen.shape[1] == (8 // (patch or 1)) ** 2 + 1


def test_a_blip_for_questions_lends_both_of_its_encoders(policy: DiffusersPolicy) -> None:
    from safetensors.torch import load_file

    found, kept = (
        loaded(LatentBLIP(backbone=str(JUDGE)), policy).module().state_dict(),
        load_file(JUDGE / "model.safetensors"),
    )
    shared = [name for name in found if name in kept and "patch_embedding" not in name]
    assert any(n.startswith("text_encoder.") for n in shared) and any(n.startswith("vision_model.") for n in shared)
    assert all(torch.equal(found[name], kept[name].float()) for name in shared)
    assert {n for n in found if n not in kept} == {"itm_head.weight", "itm_head.bias"}


def test_what_makes_no_surrogate_is_refused(policy: DiffusersPolicy, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"surrogate\.backbone: .* LatentCLIP \(found a model of type blip, expected clip\)"
    ):
        LatentCLIP(backbone=str(JUDGE)).load(policy)
    with pytest.raises(
        ConfigError, match=r"surrogate\.backbone: .* LatentBLIP \(found a model of type clip, expected blip\)"
    ):
        LatentBLIP(backbone=str(clip)).load(policy)
    with pytest.raises(ConfigError, match=r"surrogate\.backbone"):
        LatentBLIP(backbone=str(tmp_path)).load(policy)
    with pytest.raises(ConfigError, match=r"surrogate\.patch: found 3, expected a divisor .* 8 x 8"):
        LatentCLIP(patch=3, **SMALL).load(policy)
    with pytest.raises(ValueError, match="heads: found 5, expected a divisor of width"):
        LatentCLIP(width=32, heads=5)
    with pytest.raises(ValueError, match="layers: found 0"):
        LatentBLIP(layers=0)


def test_a_prompt_without_texts_is_refused(policy: DiffusersPolicy) -> None:
    surrogate, prompt = loaded(LatentCLIP(**SMALL), policy), policy.encode(TEXTS)
    with pytest.raises(ValueError, match="text_table"):
        surrogate.score(latents(), Prompt(prompt.table, prompt.index))
