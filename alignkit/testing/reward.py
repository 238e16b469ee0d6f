"""Check of rewards."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.models.quiet import errors_only
from alignkit.records import Example, Scores
from alignkit.rewards.weighted import WeightedRewards, quantize
from alignkit.testing.expect import about, all_finite, expect, global_rng_untouched, same
from alignkit.testing.world import ODD_PROMPTS, PROMPTS, coarse_images

ODD_SIZES = (48, 80), (33, 31)
"""Height and width, in pixels, of images that are not square."""


def check_reward(
    reward: Reward,
    images: Tensor | None = None,
    examples: Sequence[Example] | None = None,
    *,
    device: torch.device | str = "cpu",
    within: float = 0.05,
) -> None:
    """Check `reward` against `alignkit.Reward`; raise AssertionError, in one line, for the first failure.

    It scores `images` (N, 3, H, W) float32 in [0, 1] with N `examples`, N at least 2; by default four images of 64
    pixels and prompts of coloured shapes. `within` is the tolerated difference between the gradient and finite
    differences of one grey level, relative to the largest. A ConfigError is raised as it is: a checkpoint, an extra or
    a setting is missing, or the reward rejects these examples.
    """
    if images is None:
        images = coarse_images(len(examples) if examples else len(PROMPTS))
    given = [Example(text) for text in PROMPTS] if examples is None else list(examples)
    if len(given) != len(images) or len(given) < 2:
        raise ValueError(f"check_reward: found {len(images)} images and {len(given)} examples, expected 2 or more each")
    images = images.to(device)
    with about(f"reward {type(reward).__name__}"), errors_only(), torch.random.fork_rng():
        reward.check(given)
        reward.load(torch.device(device))
        reward.load(torch.device(device))
        scoring, mark = WeightedRewards([("it", 1.0, reward)]), reward.fingerprint()
        whole = _scores_alone_are_scores_together(scoring, reward, images, given)
        again = reward.fingerprint()
        expect(
            again == mark, f"fingerprint(): found {again!r} after two calls, {mark!r} before; cached scores are lost"
        )
        _the_bounds_hold(reward, whole)
        for grey in (0.0, 1.0):
            _the_bounds_hold(reward, _score(scoring, torch.full_like(images[:1], grey), given[:1]).values)
        _odd_prompts(scoring, reward, images[:1])
        _odd_sizes(scoring, given[:2], images.device)
        _the_gradient_is_true(scoring, reward, images, given, within)


def _score(scoring: WeightedRewards, images: Tensor, examples: Sequence[Example]) -> Scores:
    with torch.no_grad():
        return scoring(images, examples)


def _scores_alone_are_scores_together(
    scoring: WeightedRewards, reward: Reward, images: Tensor, examples: list[Example]
) -> Tensor:
    given = copy.deepcopy(examples)
    with global_rng_untouched("while scoring"):
        scores = _score(scoring, images, examples)
    whole = scores.values
    # Called directly, because `scoring` passes copies.
    images = quantize(images)
    handed, listed = images.clone(), list(examples)
    with torch.no_grad():
        reward(handed, listed)
    expect(torch.equal(handed, images), "the images passed in were changed, expected them unchanged")
    expect(listed == given, "the examples passed in were changed, expected them unchanged")
    if not reward.deterministic:
        return whole
    again = _score(scoring, images, examples).values
    expect(
        torch.equal(again.nan_to_num(), whole.nan_to_num()),
        "the same call twice: found other scores, expected the same, or deterministic = False",
    )
    count = len(examples)
    for i in range(count):
        alone = _score(scoring, images[i : i + 1], examples[i : i + 1])
        same(alone.values, whole[i : i + 1], f"image {i} alone and in a batch of {count}")
        known = bool(scores.valid.all())
        expect(
            not known or alone.parts.keys() == scores.parts.keys(),
            f"image {i} alone has the parts {', '.join(alone.parts)}, in a batch {', '.join(scores.parts)}",
        )
        for part in alone.parts.keys() & scores.parts.keys():
            what = f"the part {part.removeprefix('it/')!r} of image {i} alone and in a batch of {count}"
            same(alone.parts[part], scores.parts[part][i : i + 1], what)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    order = order if order != sorted(order) else order[::-1]
    mixed = _score(scoring, images[order], [examples[i] for i in order]).values
    same(mixed, whole[order], f"the batch in the order {order}")
    tied = _score(scoring, images[[0, 1, 0]], [examples[0], examples[1], examples[0]]).values
    same(tied[2:], tied[:1], "the same image and prompt twice in a batch")
    return whole


def _the_bounds_hold(reward: Reward, values: Tensor) -> None:
    low, high = reward.bounds
    for value in values[~values.isnan()].tolist():
        inside = (low is None or value >= low - 1e-6) and (high is None or value <= high + 1e-6)
        expect(inside, f"found a score of {value:.4g}, expected it within bounds = ({low}, {high})")


def _odd_prompts(scoring: WeightedRewards, reward: Reward, image: Tensor) -> None:
    """Check that unusual prompts, if accepted, are scored or marked invalid, and change no other score."""
    accepted: list[Example] = []
    for text in ODD_PROMPTS:
        try:
            reward.check([Example(text)])
        except ConfigError as error:
            expect("\n" not in str(error), f"the error about the prompt {text[:30]!r} has several lines, expected one")
            continue
        accepted.append(Example(text))
    if not accepted:
        return
    together = _score(scoring, image.expand(len(accepted), -1, -1, -1), accepted).values
    for i, example in enumerate(accepted):
        alone = _score(scoring, image, [example]).values
        if reward.deterministic:
            same(together[i : i + 1], alone, f"the prompt {example.text[:30]!r} alone and in a batch")


def _odd_sizes(scoring: WeightedRewards, examples: Sequence[Example], device: torch.device) -> None:
    """Check that images that are not square are scored, or rejected with a ConfigError of one line."""
    for height, width in ODD_SIZES:
        with about(f"images of {height} x {width} pixels (a size that cannot be scored is a ConfigError)"):
            try:
                _score(scoring, coarse_images(2, height, width, seed=1).to(device), examples)
            except ConfigError as error:
                expect("\n" not in str(error), "the error has several lines, expected one")


def _the_gradient_is_true(
    scoring: WeightedRewards, reward: Reward, images: Tensor, examples: Sequence[Example], within: float
) -> None:
    pixels = images.clone().requires_grad_()
    scores = scoring(pixels, examples)
    followed = scores.values.requires_grad
    expect(
        followed == reward.differentiable,
        f"differentiable = {reward.differentiable}, but the scores {'have' if followed else 'lack'} a gradient to the "
        "pixels" + ("; detach them" if followed else ""),
    )
    if not followed:
        return
    used = scores.valid
    scores.values[used].sum().backward()
    assert pixels.grad is not None
    gradient = pixels.grad
    all_finite(gradient, "the gradient to the pixels")
    still = [i for i in used.nonzero().flatten().tolist() if not gradient[i].any()]
    expect(
        not still, f"the gradient of image {still[0] if still else 0} is 0 everywhere, expected some pixel to matter"
    )
    one = images.clone().requires_grad_()
    (values := scoring(one, examples).values)[int(used.nonzero()[0])].backward()
    assert one.grad is not None
    others = one.grad[torch.arange(len(values)) != int(used.nonzero()[0])]
    expect(not others.any(), "the score of one image has a gradient to another, expected each to stand alone")
    # Finite differences of one grey level along the sign of the gradient, where both stay inside [0, 1]: a reward sees
    # 8-bit images and may round like them. With all values a steep reward may leave its linear range, with few the
    # change of a flat one may vanish in rounding, so three shares are tried; a wrong gradient agrees with none.
    inside = ((images > 2 / 255) & (images < 253 / 255)).all(1, keepdim=True)
    strength = (gradient.abs() * inside).flatten(1)
    noise = 1e-6 * float(scores.values.detach()[used].abs().max())
    problem: AssertionError | None = None
    for left_out in (0.0, 0.9, 0.99):
        strongest = (strength >= strength.quantile(left_out, dim=1, keepdim=True)).view_as(gradient)
        step = gradient.sign() / 255 * inside * strongest
        rise = (_score(scoring, images + step, examples).values - _score(scoring, images - step, examples).values)[used]
        expected = 2 * (gradient * step).flatten(1).sum(1)[used]
        try:
            return same(rise, expected, "the gradient against finite differences", within, max(noise, 1e-6))
        except AssertionError as error:
            problem = problem or error
    assert problem is not None
    raise problem
