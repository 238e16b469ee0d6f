"""The surrogate reward: pair loss and network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import Prompt
from alignkit_lasro.surrogate import LatentUNet

TEXTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def policy(tiny_lcm: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_lcm), trainable=False)


@pytest.fixture
def surrogate(policy: DiffusersPolicy) -> LatentUNet:
    torch.manual_seed(0)
    made = LatentUNet()
    made.load(policy)
    return made


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Given(LatentUNet):
    """Scores are the mean of the latents, plus a constant."""

    constant = 0.0

    def score(self, latents: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return latents.flatten(1).mean(1) + self.constant


def test_before_training_every_score_is_zero_and_the_loss_is_ln_2(
    surrogate: LatentUNet, policy: DiffusersPolicy
) -> None:
    prompt = policy.encode(TEXTS)
    assert surrogate.score(latents(), prompt).tolist() == [0.0, 0.0, 0.0]
    assert float(surrogate.loss(latents(0), latents(1), prompt)) == pytest.approx(math.log(2), abs=1e-7)


def test_the_pair_loss_is_golden_and_a_constant_changes_neither_it_nor_its_gradient(policy: DiffusersPolicy) -> None:
    prompt, found = policy.encode(TEXTS), []
    for constant in (0.0, 3.0):
        surrogate = Given()
        surrogate.constant = constant
        winner = torch.full((3, 4, 8, 8), 0.75, requires_grad=True)
        loss = surrogate.loss(winner, torch.full((3, 4, 8, 8), 0.25), prompt)
        loss.backward()
        assert winner.grad is not None
        found.append((loss.detach(), winner.grad))
    assert float(found[0][0]) == pytest.approx(0.47407698, abs=1e-6)
    assert torch.allclose(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], rtol=1e-4)


def test_scores_depend_on_latents_and_text_once_the_head_is_set(surrogate: LatentUNet, policy: DiffusersPolicy) -> None:
    head = surrogate.module().head[-1]
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = latents().requires_grad_()
    scores = surrogate.score(x, policy.encode(TEXTS))
    scores.sum().backward()
    assert x.grad is not None and bool((x.grad.flatten(1).abs().sum(1) > 0).all())
    others = surrogate.score(latents(), policy.encode(TEXTS[::-1]))
    assert torch.allclose(scores[1], others[1], atol=1e-5)
    with torch.no_grad():
        swapped = surrogate.score(latents(), policy.encode([TEXTS[1], TEXTS[0], TEXTS[1]]))
    assert not torch.allclose(scores, swapped, atol=1e-4)


def test_members_of_a_pair_are_scored_under_their_own_text(surrogate: LatentUNet, policy: DiffusersPolicy) -> None:
    with torch.no_grad():
        surrogate.module().head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    prompt, winner, loser = policy.encode(TEXTS), latents(0), latents(1)
    margins = surrogate.score(winner, prompt) - surrogate.score(loser, prompt)
    expected = torch.nn.functional.softplus(-margins).mean()
    assert torch.allclose(surrogate.loss(winner, loser, prompt), expected, rtol=1e-4)


def test_the_network_is_the_encoder_half_and_starts_frozen(surrogate: LatentUNet) -> None:
    names = list(surrogate.module().state_dict())
    assert any(name.startswith("unet.down_blocks") for name in names)
    assert any(name.startswith("unet.mid_block") for name in names)
    assert not any("up_blocks" in name or "conv_out" in name for name in names)
    assert not any(p.requires_grad for p in surrogate.module().parameters())


def test_the_backbone_is_a_copy_of_the_models_own(surrogate: LatentUNet, policy: DiffusersPolicy) -> None:
    own = policy.unet.state_dict()
    for name, value in surrogate.module().unet.state_dict().items():
        assert torch.equal(value, own[name]) and value.data_ptr() != own[name].data_ptr()


def test_a_backbone_that_is_none_is_refused(policy: DiffusersPolicy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"surrogate\.backbone"):
        LatentUNet(backbone=str(tmp_path)).load(policy)
