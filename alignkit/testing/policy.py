"""Checks that hold for every policy."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignkit.interfaces import Policy
from alignkit.models.quiet import errors_only
from alignkit.records import PolicyFacts, PolicySettings, Prompt
from alignkit.testing.expect import about, all_finite, expect, global_rng_untouched, same
from alignkit.testing.world import ODD_PROMPTS, PROMPTS, coarse_images

COUNT = 3
"""Rows of the batches."""
NEARLY = 1e-3
"""Relative difference that rounding may make: an error of the predicted noise is amplified at the noisiest times."""


def check_policy(policy: Policy) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.interfaces.Policy` that is not kept.

    `policy` must be as it was loaded. If it is trained, its weights are changed and restored.
    """
    with about(f"policy {type(policy).__name__}"), errors_only(), torch.random.fork_rng():
        _facts(policy)
        _times_and_levels(policy)
        if policy.source:
            _known_before(type(policy).facts(policy.source, PolicySettings(trainable=False)), policy)
        with global_rng_untouched("while encoding, predicting and decoding"):
            prompt = _texts(policy)
            images = _images(policy)
            _decoding(policy, policy.encode_images(images))
            _features(policy, images)
            _predictions(policy, prompt)
        _parameters(policy, prompt)
        if policy.parameters():
            _other_weights(policy, prompt, images)


def _facts(policy: Policy) -> None:
    shape, size, source = policy.latent_shape, policy.image_size, policy.source
    expect(
        len(shape) == 3 and all(isinstance(edge, int) and edge > 0 for edge in shape),
        f"latent_shape: found {shape}, expected three whole numbers above 0",
    )
    expect(isinstance(size, int) and size > 0, f"image_size: found {size!r}, expected a whole number of pixels above 0")
    expect(isinstance(policy.device, torch.device), f"device: found {policy.device!r}, expected a torch.device")
    expect(math.isfinite(policy.guidance_scale), f"guidance_scale: found {policy.guidance_scale}, expected a number")
    for name in ("guidance_embedded", "consistency"):
        expect(isinstance(getattr(policy, name), bool), f"{name}: found {getattr(policy, name)!r}, expected a bool")
    expect(isinstance(source, str), f"source: found {source!r}, expected a folder or hub id, or an empty string")
    expect(not source or type(policy).serves(source), f"serves: found False for its own source {source}, expected True")
    with tempfile.TemporaryDirectory() as empty:
        for folder, what in ((empty, "an empty folder"), (f"{empty}/gone", "a missing folder")):
            expect(not type(policy).serves(folder), f"serves: found True for {what}, expected False")


def _known_before(facts: PolicyFacts, policy: Policy) -> None:
    """Check what was known before loading. `consistency` may be another under other settings."""
    expect(isinstance(facts, PolicyFacts), f"facts: found {type(facts).__name__}, expected alignkit.PolicyFacts")
    count = len(policy.times())
    expect(facts.num_times in (None, count), f"facts: found num_times = {facts.num_times}, expected {count} or None")
    expect(
        facts.consistency in (None, True, False), f"facts: found consistency = {facts.consistency!r}, expected a bool"
    )


def _times_and_levels(policy: Policy) -> None:
    times = policy.times()
    expect(times.dim() == 1 and len(times) > 1, f"times: found shape {tuple(times.shape)}, expected (T,) with T > 1")
    expect(times.device.type == "cpu", f"times: found them on {times.device}, expected the CPU")
    expect(bool((times.diff() > 0).all()), "times: found times that do not ascend, expected the least noise first")
    expect(torch.equal(times, policy.times()), "times: found others at a second call, expected the same")
    t = times.to(policy.device)
    alpha, sigma = policy.schedule(t)
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        found = f"{level.dtype} {tuple(level.shape)}"
        expect(found == f"torch.float32 ({len(t)},)", f"schedule: found {name} {found}, expected float32 ({len(t)},)")
        all_finite(level, f"schedule: {name}")
        low, high = float(level.min()), float(level.max())
        expect(low >= 0 and high <= 1, f"schedule: found {name} from {low:.4g} to {high:.4g}, expected 0 to 1")
    power = alpha**2 + sigma**2
    low, high = float(power.min()), float(power.max())
    expect(
        low >= 0.499 and high <= 1.001,
        f"schedule: found alpha^2 + sigma^2 from {low:.4g} to {high:.4g}, expected 1/2 to 1 (scale the latents)",
    )
    expect(float(sigma[0]) > 0, "schedule: found sigma 0 at the first time, expected a little noise at every time")
    expect(bool(alpha[0] > sigma[0]), "schedule: found more noise than image at the first time, expected the least")
    expect(float(sigma[-1]) > 0.95, f"schedule: found sigma {float(sigma[-1]):.4g} at the last time, expected nearly 1")
    expect(bool(((sigma / alpha).diff() > 0).all()), "schedule: found a sigma / alpha that does not rise with time")
    for turned, level in zip(policy.schedule(t.flip(0)), (alpha, sigma), strict=True):
        expect(torch.equal(turned, level.flip(0)), "schedule: found other levels when the times are in reverse order")


def _texts(policy: Policy) -> Prompt:
    texts = [*PROMPTS[:COUNT], PROMPTS[0], *ODD_PROMPTS]
    prompt = policy.encode(texts)
    distinct = len(set(texts))
    expect(len(prompt) == len(texts), f"encode: found {len(prompt)} rows for {len(texts)} texts")
    found = len(prompt.table), len(prompt.text_table)
    expect(
        found == (distinct, distinct),
        f"encode: found {found[0]} entries of features and {found[1]} texts for {distinct} distinct texts",
    )
    expect(prompt.texts == texts, "encode: found other texts in text_table, expected those of the rows")
    for name, features in _conditions(prompt):
        all_finite(features, f"encode: {name}")
        expect(not features.requires_grad, f"encode: found {name} with a gradient, expected none")
        expect(bool((features[0] != features[1]).any()), f"encode: found the same {name} for two texts")
    for i, text in enumerate(texts):
        for (name, together), (_, alone) in zip(_conditions(prompt), _conditions(policy.encode([text])), strict=True):
            same(alone, together[i : i + 1], f"encode: {name} of text {i} alone and in a batch", NEARLY)
    return prompt.select(torch.arange(COUNT))


def _conditions(prompt: Prompt) -> list[tuple[str, Tensor]]:
    return [("features", prompt.features), *([("pooled", prompt.pooled)] if prompt.pooled is not None else [])]


def _images(policy: Policy) -> Tensor:
    images = coarse_images(COUNT, policy.image_size, policy.image_size).to(policy.device)
    kept = images.clone()
    latents = policy.encode_images(images)
    _is_float32(latents, (COUNT, *policy.latent_shape), "encode_images")
    expect(torch.equal(images, kept), "encode_images changed the images, expected them unchanged")
    expect(not latents.requires_grad, "encode_images: found a gradient, expected none")
    expect(torch.equal(policy.encode_images(images), latents), "encode_images: the same call twice gave other latents")
    _rows_alone(latents, [policy.encode_images(images[i : i + 1]) for i in range(COUNT)], "encode_images")
    return images


def _decoding(policy: Policy, latents: Tensor) -> None:
    edge = policy.image_size
    for scale, what in ((1, "decode"), (1000, "decode of latents 1000 times as large")):
        with torch.no_grad():
            images = policy.decode(scale * latents)
        _is_float32(images, (COUNT, 3, edge, edge), what)
        low, high = float(images.min()), float(images.max())
        expect(low >= 0 and high <= 1, f"{what}: found pixels from {low:.4g} to {high:.4g}, expected 0 to 1")
    with torch.no_grad():
        together = policy.decode(latents)
        _rows_alone(together, [policy.decode(latents[i : i + 1]) for i in range(COUNT)], "decode")
    given = latents.clone().requires_grad_()
    images = policy.decode(given)
    expect(images.requires_grad, "decode has no gradient to the latents, expected one")
    (gradient,) = torch.autograd.grad((images[0] * _noise(images[:1], 1)).sum(), given, materialize_grads=True)
    all_finite(gradient, "the gradient of decode to the latents")
    expect(bool(gradient[0].any()), "decode has no gradient to the latents, expected one")
    expect(not gradient[1:].any(), "decode: one image has a gradient to the latent of another")


def _features(policy: Policy, images: Tensor) -> None:
    features = policy.features(images)
    _is_float32(features, (COUNT, *features.shape[1:2]), "features")
    expect(not features.requires_grad, "features: found a gradient, expected none")
    expect(bool((features[0] != features[1]).any()), "features: found the same for two images")
    _rows_alone(features, [policy.features(images[i : i + 1]) for i in range(COUNT)], "features")


def _predictions(policy: Policy, prompt: Prompt) -> None:
    x, t = _states(policy)
    kept = x.clone(), t.clone(), prompt.table.clone()
    with torch.no_grad():
        clean = policy.denoise(x, t, prompt)
        _is_float32(clean, tuple(x.shape), "denoise")
        expect(
            all(map(torch.equal, kept, (x, t, prompt.table))), "denoise changed its arguments, expected them unchanged"
        )
        expect(torch.equal(policy.denoise(x, t, prompt), clean), "denoise: the same call twice gave other latents")
        rows = [torch.tensor([i]) for i in range(COUNT)]
        _rows_alone(clean, [policy.denoise(x[i], t[i], prompt.select(i)) for i in rows], "denoise")
        at = [policy.denoise(x, t, prompt, torch.full_like(x[:, 0, 0, 0], scale)) for scale in (1.0, 2.0, 4.0)]
        own = policy.denoise(x, t, prompt, torch.full_like(x[:, 0, 0, 0], policy.guidance_scale))
        same(clean, own, "denoise without a guidance scale and at guidance_scale", NEARLY)
        if not policy.guidance_embedded:
            expected = at[0] + 3 * (at[1] - at[0])
            same(at[2], expected, "denoise at guidance scale 4 and the line through 1 and 2", NEARLY)
    given = x.clone().requires_grad_()
    found = policy.denoise(given, t, prompt)
    expect(found.requires_grad, "denoise has no gradient to the latents, expected one")
    (gradient,) = torch.autograd.grad((found[0] * _noise(found[:1], 2)).sum(), given, materialize_grads=True)
    all_finite(gradient, "the gradient of denoise to the latents")
    expect(bool(gradient[0].any()), "denoise has no gradient to the latents, expected one")
    expect(not gradient[1:].any(), "denoise: one row has a gradient to another")


def _parameters(policy: Policy, prompt: Prompt) -> None:
    parameters, weights = policy.parameters(), list(policy.weights().values())
    expect(
        len(parameters) == len(weights) and all(map(_is, parameters, weights)),
        "weights: found other tensors than parameters, or another order",
    )
    expect(list(map(id, policy.parameters())) == list(map(id, parameters)), "parameters: found others at a second call")
    for name, parameter in policy.weights().items():
        expect(parameter.dtype == torch.float32, f"parameters: found {name} in {parameter.dtype}, expected float32")
        expect(parameter.requires_grad, f"parameters: found {name} without requires_grad, expected it")
    if parameters:
        value = policy.denoise(*_states(policy), prompt).square().mean()
        expect(value.requires_grad, "denoise has no gradient to the parameters")
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        expect(any(bool(g.any()) for g in gradients), "denoise has no gradient to the parameters")


def _other_weights(policy: Policy, prompt: Prompt, images: Tensor) -> None:
    """Check `using`, `reference`, `features` and `export` before and after the weights have changed."""
    x, t = _states(policy)

    def predict() -> Tensor:
        with torch.no_grad():
            return policy.denoise(x, t, prompt)

    own, start, features = policy.weights(), predict(), policy.features(images)
    moved = {name: p.detach() + 0.05 * _noise(p, 10 + i) for i, (name, p) in enumerate(own.items())}
    with policy.reference():
        before = policy.denoise(x, t, prompt)
        expect(not before.requires_grad, "reference: found a prediction with a gradient, expected none")
    expect(torch.is_grad_enabled(), "reference: gradients are off after it, expected them on")
    same(before, start, "the prediction with and without reference, before training", NEARLY)
    with policy.using(moved):
        changed = predict()
        with policy.reference():
            same(predict(), before, "reference within using and the model before training", NEARLY)
        same(predict(), changed, "the prediction within using, before and after reference", NEARLY)
    expect(bool((changed != start).any()), "using: found the same prediction under other weights")
    same(predict(), start, "the prediction before and after using", NEARLY)
    with contextlib.suppress(_Interrupted), policy.using(moved):
        raise _Interrupted
    same(predict(), start, "the prediction before and after an error within using", NEARLY)
    expect(all(map(_is, policy.weights().values(), own.values())), "weights: found other tensors after using")
    with _trained(policy, moved):
        same(predict(), changed, "the prediction with parameters changed in place and with using", NEARLY)
        with policy.reference(), policy.reference():
            same(predict(), before, "reference after training and the model before training", NEARLY)
        same(predict(), changed, "the prediction before and after reference", NEARLY)
        same(policy.features(images), features, "features before and after training", NEARLY)
        _export(policy, moved)
        same(predict(), changed, "the prediction before and after export", NEARLY)


def _export(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Check that equal weights give equal files, other weights other files, and that the files are read back."""
    halved = {name: p / 2 for name, p in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        written = [_exported(policy, Path(folder) / str(i), w) for i, w in enumerate((weights, weights, halved))]
        found = policy.read_export(Path(folder) / "2")
    expect(written[0] == written[1], "export: found other files for equal weights")
    expect(written[0] != written[2], "export: found the same files for other weights")
    expect(found.keys() == weights.keys(), f"read_export: found weights {list(found)}, expected {list(weights)}")
    for name, value in found.items():
        same(value, halved[name], f"read_export: {name} and what export was given", NEARLY)


def _exported(policy: Policy, folder: Path, weights: dict[str, Tensor]) -> dict[str, bytes]:
    folder.mkdir()
    path = policy.export(folder, weights)
    expect(
        path.exists() and path.is_relative_to(folder), f"export: returned {path}, expected a path that it wrote there"
    )
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class _Interrupted(Exception):
    """An error within a context manager."""


@contextlib.contextmanager
def _trained(policy: Policy, weights: dict[str, Tensor]) -> Iterator[None]:
    """Change the parameters in place, as an optimizer does, and restore them."""
    own = policy.weights()
    kept = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(kept[name])


def _states(policy: Policy) -> tuple[Tensor, Tensor]:
    """Unit noise as latents (COUNT, *S), at the last, the middle and the first time."""
    times = policy.times()
    t = times[torch.tensor([len(times) - 1, len(times) // 2, 0])].to(policy.device)
    return _noise(torch.empty(COUNT, *policy.latent_shape, device=policy.device), 0), t


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _is_float32(found: Tensor, shape: tuple[int, ...], what: str) -> None:
    expect(tuple(found.shape) == shape, f"{what}: found shape {tuple(found.shape)}, expected {shape}")
    expect(found.dtype == torch.float32, f"{what}: found {found.dtype}, expected float32")
    all_finite(found, what)


def _rows_alone(together: Tensor, alone: Sequence[Tensor], what: str) -> None:
    for i, row in enumerate(alone):
        same(row, together[i : i + 1], f"{what}: row {i} alone and in a batch", NEARLY)


def _is(one: object, other: object) -> bool:
    return one is other
