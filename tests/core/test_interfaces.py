"""The records that pass between the parts: tables of rows, and the normal distribution of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from alignkit import diffusion
from alignkit.records import Prompt, Rows, Transition


@dataclass(frozen=True)
class Table(Rows):
    values: Tensor
    prompt: Prompt
    extra: Tensor | None = None


def table(count: int = 7) -> Table:
    index, features = torch.arange(count) % 3, torch.arange(3.0)
    texts = Prompt(features.view(3, 1, 1), index, features.view(3, 1), text_table=("a", "b", "c"))
    return Table(torch.arange(count) * 10, texts)


def test_selecting_rows_keeps_their_columns_together_and_the_texts_stored_once() -> None:
    rows = table().select(torch.tensor([5, 0, 5]))
    assert rows.values.tolist() == [50, 0, 50] and rows.prompt.index.tolist() == [2, 0, 2] and rows.extra is None
    assert rows.prompt.table.shape == (3, 1, 1)
    assert rows.prompt.features.flatten().tolist() == [2, 0, 2]
    assert rows.prompt.pooled is not None and rows.prompt.pooled.flatten().tolist() == [2, 0, 2]
    assert rows.prompt.texts == ["c", "a", "c"] and rows.prompt.text_table == ("a", "b", "c")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_parts_of_a_split_are_the_rows_in_order(size: int) -> None:
    parts = list(table().split(size))
    assert torch.cat([p.values for p in parts]).tolist() == table().values.tolist()
    assert torch.cat([p.prompt.index for p in parts]).tolist() == table().prompt.index.tolist()
    assert all(len(p) == len(p.prompt) == size for p in parts[:-1]) and 1 <= len(parts[-1]) <= size


@pytest.mark.parametrize(("count", "sizes"), [(64, [32, 32]), (63, [32, 31]), (33, [33]), (80, [40, 40]), (5, [5])])
def test_an_even_split_leaves_no_small_remainder(count: int, sizes: list[int]) -> None:
    parts = list(table(count).even_split(32))
    assert [len(p) for p in parts] == sizes
    assert torch.cat([p.values for p in parts]).tolist() == table(count).values.tolist()


def test_shuffling_is_a_permutation_that_the_generator_alone_decides() -> None:
    first = table(50).shuffled(torch.Generator().manual_seed(3))
    again = table(50).shuffled(torch.Generator().manual_seed(3))
    assert first.values.tolist() == again.values.tolist() != table(50).values.tolist()
    assert sorted(first.values.tolist()) == table(50).values.tolist()
    assert first.prompt.index.tolist() == (first.values // 10 % 3).tolist()


def test_rows_move_between_devices_with_all_their_columns() -> None:
    moved = table().to("meta")
    assert {moved.values.device.type, moved.prompt.table.device.type, moved.prompt.index.device.type} == {"meta"}
    assert moved.prompt.pooled_table is not None and moved.prompt.pooled_table.device.type == "meta"
    assert moved.prompt.text_table == table().prompt.text_table


SD = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
X, EPS, X_NEXT = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.2, 0.3]]), torch.tensor([[0.1, -0.4]])


def at(t: int) -> tuple[Tensor, Tensor]:
    return SD[[t]].sqrt(), (1 - SD[[t]]).sqrt()


def test_the_log_probability_of_a_ddim_step_is_golden() -> None:
    alpha, sigma = at(749)
    alpha_next, sigma_next = at(499)
    eps = EPS.clone().requires_grad_()
    clean = diffusion.to_clean("epsilon", eps, X, alpha, sigma)
    std = diffusion.ddim_std(alpha, sigma, alpha_next, sigma_next, 1.0)
    mean = alpha_next * clean + (sigma_next**2 - std**2).sqrt() * diffusion.to_noise(clean, X, alpha, sigma)
    step = Transition(mean, std, clean)
    assert clean.tolist()[0] == pytest.approx([1.28487536, -5.42696245], rel=1e-5)
    assert mean.tolist()[0] == pytest.approx([0.74422394, -2.75895159], rel=1e-5)
    density = step.log_prob(X_NEXT)
    assert density.tolist() == pytest.approx([-3.12393530], rel=1e-5)
    (gradient,) = torch.autograd.grad(density.sum(), eps)
    expected = -1.81500554 * (X_NEXT - mean.detach()) / (0.78073336**2 * 2)
    assert torch.allclose(gradient, expected, rtol=1e-4)


def test_the_log_probability_of_a_consistency_step_is_golden() -> None:
    clean = diffusion.to_clean("epsilon", EPS, X, *at(999))
    alpha_next, sigma_next = at(499)
    assert clean.tolist()[0] == pytest.approx([4.40148013, -19.03321289], rel=1e-5)
    density = Transition(alpha_next * clean, sigma_next, clean).log_prob(X_NEXT)
    assert density.tolist() == pytest.approx([-34.55360635], rel=1e-5)


def transition(count: int = 3, requires_grad: bool = False) -> tuple[Transition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 4, 8, 8, generator=generator, requires_grad=requires_grad)
    std = torch.linspace(0.1, 0.9, count)
    return Transition(mean, std, mean), torch.randn(count, 4, 8, 8, generator=generator)


def test_the_sum_is_the_mean_times_the_number_of_latent_dimensions_and_the_true_density() -> None:
    step, x_next = transition()
    assert torch.allclose(step.log_prob(x_next, "sum"), 256 * step.log_prob(x_next), rtol=1e-5)
    true = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1)).log_prob(x_next).flatten(1).sum(1)
    assert torch.allclose(step.log_prob(x_next, "sum"), true, rtol=1e-5)


def test_the_gradient_of_the_log_probability_is_the_closed_form_and_reaches_the_mean_alone() -> None:
    step, x_next = transition(requires_grad=True)
    x_next = x_next.requires_grad_()
    step.log_prob(x_next).sum().backward()
    expected = (x_next - step.mean) / (step.std.view(-1, 1, 1, 1) ** 2 * 256)
    assert step.mean.grad is not None and torch.allclose(step.mean.grad, expected.detach(), rtol=1e-4, atol=1e-8)
    assert x_next.grad is None


def test_samples_have_on_average_the_log_probability_of_their_own_distribution() -> None:
    mean, std = torch.zeros(2, 4, 64, 64), torch.tensor([0.03, 0.9])
    step = Transition(mean, std, mean)
    sampled = step.sample(torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    expected = [-0.5 - math.log(s) - 0.5 * math.log(2 * math.pi) for s in (0.03, 0.9)]
    assert step.log_prob(sampled).tolist() == pytest.approx(expected, abs=5 * math.sqrt(0.5 / mean[0].numel()))


def test_half_precision_latents_get_a_log_probability_in_float32() -> None:
    step, x_next = transition()
    half = Transition(step.mean.half(), step.std.half(), step.clean.half()).log_prob(x_next.half())
    assert half.dtype == torch.float32
    assert torch.allclose(half, step.log_prob(x_next), rtol=1e-2)


def test_a_deterministic_step_has_no_log_probability() -> None:
    step, x_next = transition()
    still = Transition(step.mean, torch.tensor([0.1, 0.0, 0.9]), step.clean)
    assert torch.equal(still.sample(x_next)[1], step.mean[1])
    with pytest.raises(ValueError, match="deterministic"):
        still.log_prob(x_next)
