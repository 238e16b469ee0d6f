"""The latent proxy reward model: its score, its losses, and which of its layers learn from which."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import Example
from alignkit.rollout import encode_examples
from alignkit_rg_lcd.preference import margins, preference_loss
from alignkit_rg_lcd.surrogate import LRM

TEXTS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def policy(tiny_lcm: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_lcm), trainable=False)


def made(policy: DiffusersPolicy, **fields: Any) -> LRM:
    torch.manual_seed(0)
    lrm = LRM(**{"width": 16, "layers": 3, "heads": 2, "patch": 2, **fields})
    lrm.load(policy)
    return lrm


@pytest.fixture
def lrm(policy: DiffusersPolicy) -> LRM:
    return made(policy)


def latents(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def learned(lrm: LRM, loss: Callable[[], Tensor]) -> set[str]:
    """The weights that an optimizer step on the loss changes, with all of them offered to it."""
    module = lrm.module().requires_grad_(True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    loss().backward()
    optimizer.step()
    module.requires_grad_(False)
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_the_score_is_a_cosine_and_its_gradient_reaches_the_latents(lrm: LRM, policy: DiffusersPolicy) -> None:
    x = latents().requires_grad_()
    scores = lrm.score(x, policy.encode(TEXTS))
    scores.sum().backward()
    assert scores.shape == (3,) and bool((scores.abs() <= 1).all())
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(1) > 0).all())
    assert all(p.grad is None for p in lrm.module().parameters())


def test_each_latent_is_scored_under_its_own_text_however_rows_are_ordered(lrm: LRM, policy: DiffusersPolicy) -> None:
    prompt, order = policy.encode(TEXTS), torch.tensor([2, 0, 1, 0])
    scores = lrm.score(latents(), prompt)
    assert torch.allclose(lrm.score(latents()[order], prompt.select(order)), scores[order], atol=1e-5)
    alone = torch.cat([lrm.score(latents()[[i]], policy.encode([TEXTS[i]])) for i in range(3)])
    assert torch.allclose(alone, scores, atol=1e-5)
    assert not torch.allclose(lrm.score(latents(), policy.encode(TEXTS[::-1])), scores, atol=1e-4)


def test_the_temperature_starts_as_that_of_clip_and_stays_below_100(lrm: LRM) -> None:
    assert float(lrm.scale()) == pytest.approx(1 / 0.07)
    lrm._network.log_scale.data.fill_(9.0)
    assert float(lrm.scale()) == pytest.approx(100)


def test_after_the_pre_training_only_the_last_layers_of_both_towers_learn(lrm: LRM, policy: DiffusersPolicy) -> None:
    prompt, weights = policy.encode(TEXTS), torch.tensor([1.0, -2.0, 3.0])
    changed = learned(lrm, lambda: lrm.scale() * (weights * lrm.finetuning_score(latents(), prompt)).sum())
    every = {name for name, _ in lrm.module().named_parameters()}
    last = {n for n in every if n.startswith("latent.") and ("projection" in n or "post_layer" in n or "layers.2" in n)}
    # Five groups of the tiny text tower, which has two blocks, are all of it but the embeddings.
    text = {n for n in every if n.startswith("text.") and "embedding" not in n}
    assert text | last < every
    # A shift of all keys leaves attention as it is, so their bias has a gradient that is zero but for rounding.
    assert changed | {n for n in text | last if "k_proj.bias" in n} == text | last | {"log_scale"}


def test_how_many_layers_learn_is_chosen_for_each_tower(policy: DiffusersPolicy) -> None:
    lrm = made(policy, latent_groups=1, text_groups=0)
    assert lrm._finetuned == {"latent.visual_projection.weight", "log_scale"}
    assert any("text_projection" in n for n in made(policy, latent_groups=0, text_groups=1)._finetuned)
    everything = {name for name, _ in lrm.module().named_parameters()}
    frozen = everything - made(policy, latent_groups=99, text_groups=99)._finetuned
    assert frozen and all("embedding" in n or "pre_layrnorm" in n for n in frozen)


def test_the_pre_training_trains_the_latent_tower_and_leaves_the_text_tower_as_it_is(
    lrm: LRM, policy: DiffusersPolicy
) -> None:
    changed = learned(lrm, lambda: lrm.contrastive_loss(latents(), policy.encode(TEXTS)))
    assert any("latent.vision_model.embeddings" in n for n in changed)
    assert {n for n in changed if n.startswith("text.")} == {"text.text_projection.weight"}


def test_the_contrastive_loss_is_that_of_clip(lrm: LRM, policy: DiffusersPolicy) -> None:
    prompt = policy.encode(TEXTS)
    every = prompt.select(torch.arange(3).repeat(3))
    cosines = lrm.score(latents().repeat_interleave(3, 0), every).view(3, 3)  # latent i under text j
    logits = cosines / 0.07
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert torch.allclose(lrm.contrastive_loss(latents(), prompt), expected, rtol=1e-4)


def test_equal_captions_are_not_contrasted(lrm: LRM, policy: DiffusersPolicy) -> None:
    """Among equal captions none can be recognised, so the loss has no gradient."""
    prompt, x = policy.encode(TEXTS[:1] * 3), latents()[:1].repeat(3, 1, 1, 1).requires_grad_()
    loss = lrm.contrastive_loss(x, prompt)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-5


def test_captions_that_differ_in_metadata_alone_count_as_equal(lrm: LRM, policy: DiffusersPolicy) -> None:
    signs = [Example(TEXTS[0], {"target": "OPEN"}), Example(TEXTS[0], {"target": "EXIT"}), Example(TEXTS[1])]
    prompt = encode_examples(policy, signs)
    assert len(prompt.index.unique()) == 3
    expected = lrm.contrastive_loss(latents(), policy.encode([sign.text for sign in signs]))
    assert torch.equal(lrm.contrastive_loss(latents(), prompt), expected)


def test_the_pair_loss_starts_near_ln_2_and_falls_for_a_better_winner(lrm: LRM, policy: DiffusersPolicy) -> None:
    prompt = policy.encode(TEXTS)
    assert float(lrm.loss(latents(), latents(), prompt)) == pytest.approx(math.log(2), abs=1e-6)
    scores = [lrm.score(latents(seed), prompt) for seed in (0, 1)]
    expected = torch.nn.functional.softplus(-(scores[0] - scores[1]) / 0.07).mean()
    assert torch.allclose(lrm.loss(latents(0), latents(1), prompt), expected, rtol=1e-4)


def test_it_learns_to_prefer_what_a_black_box_prefers_and_then_leads_there(policy: DiffusersPolicy) -> None:
    """The expert is the mean of the first channel; it never gives a gradient."""
    lrm = made(policy, latent_groups=99)
    generator = torch.Generator().manual_seed(0)
    prompt = policy.encode(["a red circle"] * 24)

    def triples() -> tuple[Tensor, Tensor]:
        latents = torch.randn(8, 3, 4, 8, 8, generator=generator)
        latents[:, :, 0] += torch.randn(8, 3, 1, 1, generator=generator)
        return latents, margins(latents[:, :, 0].mean((2, 3)))

    module = lrm.module().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(60):
        latents, expert = triples()
        scores = lrm.finetuning_score(latents.flatten(0, 1), prompt).view(8, 3)
        preference_loss(lrm.scale() * margins(scores), expert / 0.2, "forward").backward()
        optimizer.step()
        optimizer.zero_grad()
    module.requires_grad_(False)
    latents, expert = triples()
    x = latents.flatten(0, 1).requires_grad_()
    scores = lrm.score(x, prompt)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    right = margins(scores.detach().view(8, 3)).sign() == expert.sign()
    assert right.float().mean() > 0.8
    assert (gradient[:, 0].mean((1, 2)) > 0).float().mean() > 0.8


def test_the_text_tower_is_a_copy_of_the_generators_own(lrm: LRM, policy: DiffusersPolicy) -> None:
    found = dict(lrm._network.text.text_model.named_parameters())
    own = dict(policy.pipe.text_encoder.named_parameters())
    pairs = [(found[name], own[name if name in own else f"text_model.{name}"]) for name in found]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_another_text_tower_brings_its_projection_which_then_is_left_as_it_is(
    policy: DiffusersPolicy, tmp_path: Path
) -> None:
    words: CLIPTokenizer = policy.pipe.tokenizer
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, projection_dim=24,
    )  # fmt: skip
    tower = CLIPTextModelWithProjection(config)
    tower.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    lrm = made(policy, text=str(tmp_path))
    assert torch.equal(lrm._network.text.text_projection.weight, tower.text_projection.weight)
    changed = learned(lrm, lambda: lrm.contrastive_loss(latents(), policy.encode(TEXTS)))
    assert changed and not any(n.startswith("text.") for n in changed)


def test_what_makes_no_proxy_is_refused(policy: DiffusersPolicy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"surrogate\.patch: found 3"):
        made(policy, patch=3)
    with pytest.raises(ConfigError, match=r"surrogate\.text"):
        made(policy, text=str(tmp_path))
    for fields in ({"heads": 3}, {"layers": 0}, {"latent_groups": -1}):
        with pytest.raises(ValueError, match="expected"):
            LRM(**{"width": 16, **fields})


def test_a_prompt_without_texts_is_refused(lrm: LRM, policy: DiffusersPolicy) -> None:
    with pytest.raises(ValueError, match="text_table"):
        lrm.score(latents(), replace(policy.encode(TEXTS), text_table=()))
