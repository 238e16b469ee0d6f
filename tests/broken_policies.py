"""Policies that each break one promise of the contract: (name, members of a subclass of FlowPoints, message)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit import PolicyFacts

Members = Callable[[Any], dict[str, Any]]
CASES: list[tuple[str, Members, str]] = [
    ("flat_latents", lambda base: {"latent_shape": (2,)},
     "latent_shape: found .*, expected three whole numbers above 0"),
    ("no_pixels", lambda base: {"image_size": 0},
     "image_size: found 0, expected a whole number of pixels above 0"),
    ("says_yes", lambda base: {"consistency": "yes"},
     "consistency: found 'yes', expected a bool"),
    ("serves_nothing", lambda base: {"serves": classmethod(lambda cls, source: False)},
     "serves: found False for its own source .*, expected True"),
    ("serves_everything", lambda base: {"serves": classmethod(lambda cls, source: True)},
     "serves: found True for an empty folder, expected False"),
    ("no_facts", lambda base: {"facts": classmethod(lambda cls, source, settings: {})},
     "facts: found dict, expected alignkit.PolicyFacts"),
    ("other_times", lambda base: {"facts": classmethod(lambda cls, source, settings: PolicyFacts(num_times=1000))},
     "facts: found num_times = 1000, expected 50 or None"),
    ("says_perhaps", lambda base: {"facts": classmethod(lambda cls, source, settings: PolicyFacts("perhaps"))},
     "facts: found consistency = 'perhaps', expected a bool"),
    ("noise_first", lambda base: {"times": lambda self: base.times(self).flip(0)},
     "times: found times that do not ascend, expected the least noise first"),
    ("one_time", lambda base: {"times": lambda self: base.times(self)[-1:]},
     r"times: found shape \(1,\), expected \(T,\) with T > 1"),
    (
        "double_levels",
        lambda base: {"schedule": lambda self, t: tuple(level.double() for level in base.schedule(self, t))},
        "schedule: found alpha torch.float64",
    ),
    ("exploding_variance", lambda base: {"schedule": lambda self, t: (torch.ones_like(t), 10 * t)},
     "schedule: found sigma from 0.2 to 10, expected 0 to 1"),
    ("no_decay", lambda base: {"schedule": lambda self, t: (torch.ones_like(t), t)},
     r"schedule: found alpha\^2 \+ sigma\^2 from 1 to 2, expected 1/2 to 1 \(scale the latents\)"),
    ("no_noise", lambda base: {"times": lambda self: torch.arange(51) / 50},
     "schedule: found sigma 0 at the first time"),
    ("too_little_noise", lambda base: {"times": lambda self: base.times(self)[:45]},
     "schedule: found sigma 0.9 at the last time, expected nearly 1"),
    ("forgets_texts", lambda base: {"encode": lambda self, texts: replace(base.encode(self, texts), text_table=())},
     "encode: found 6 entries of features and 0 texts for 6 distinct texts"),
    ("scales_in_place", lambda base: {"encode_images": lambda self, x: base.encode_images(self, x.mul_(2).sub_(1))},
     "encode_images changed the images"),
    ("flattens", lambda base: {"encode_images": lambda self, x: base.encode_images(self, x).flatten(1)},
     r"encode_images: found shape \(3, 2\), expected \(3, 2, 1, 1\)"),
    ("other_range", lambda base: {"decode": lambda self, x: 2 * base.decode(self, x) - 1},
     "decode: found pixels from .* to 2, expected 0 to 1|decode: found pixels from -1 to .*, expected 0 to 1"),
    ("half_pixels", lambda base: {"decode": lambda self, x: base.decode(self, x).half()},
     "decode: found torch.float16, expected float32"),
    ("detached_pixels", lambda base: {"decode": lambda self, x: base.decode(self, x).detach()},
     "decode has no gradient to the latents, expected one"),
    ("blind", lambda base: {"features": lambda self, images: 0 * base.features(self, images)},
     "features: found the same for two images"),
    (
        "stochastic",
        lambda base: {"denoise": lambda self, x, *rest: base.denoise(self, x + torch.randn_like(x), *rest)},
        "denoise: the same call twice gave other latents|.* the global random generator of torch was used",
    ),
    (
        "in_place",
        lambda base: {
            "denoise": lambda self, x, *rest: base.denoise(self, x.add_(1) if not x.requires_grad else x, *rest)
        },
        "denoise changed its arguments",
    ),
    (
        "one_time_for_all",
        lambda base: {"denoise": lambda self, x, t, *rest: base.denoise(self, x, t[:1].expand(len(t)), *rest)},
        "denoise: row . alone and in a batch",
    ),
    ("detached", lambda base: {"denoise": lambda self, x, *rest: base.denoise(self, x.detach(), *rest)},
     "denoise has no gradient to the latents, expected one"),
    ("other_order", lambda base: {"weights": lambda self: dict(reversed(base.weights(self).items()))},
     "weights: found other tensors than parameters, or another order"),
    (
        "copies",
        lambda base: {"weights": lambda self: {name: p.detach().clone() for name, p in base.weights(self).items()}},
        "weights: found other tensors than parameters, or another order",
    ),
    ("ignores_weights", lambda base: {"using": lambda self, weights: base.using(self, {})},
     "using: found the same prediction under other weights"),
    ("reference_with_gradient", lambda base: {"reference": lambda self: self.using(self._initial)},
     "reference: found a prediction with a gradient, expected none"),
    ("reference_to_the_present", lambda base: {"reference": lambda self: torch.no_grad()},
     "reference within using and the model before training"),
    ("writes_elsewhere", lambda base: {"export": lambda self, folder, weights: folder / "nothing"},
     "export: returned .*, expected a path that it wrote there"),
    (
        "exports_the_start",
        lambda base: {"export": lambda self, folder, weights: base.export(self, folder, self._initial)},
        "export: found the same files for other weights",
    ),
]  # fmt: skip


def case(message: str) -> Callable[[Members], Members]:
    """Register a function from a policy class to the members of a broken subclass."""

    def add(members: Members) -> Members:
        CASES.append((members.__name__, members, message))
        return members

    return add


@case("schedule: found a sigma / alpha that does not rise with time")
def wavering_levels(base: Any) -> dict[str, Any]:
    def schedule(self: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        middle = torch.where((t - 0.5).abs() < 0.021, torch.full_like(t, 0.5), t)
        return 1 - middle, middle

    return {"schedule": schedule}


@case("encode: found 7 entries of features and 7 texts for 6 distinct texts")
def encodes_twice(base: Any) -> dict[str, Any]:
    def encode(self: Any, texts: Any) -> Any:
        prompt = base.encode(self, texts)
        rows = torch.arange(len(texts))
        return replace(prompt, table=prompt.features, index=rows, text_table=tuple(texts))

    return {"encode": encode}


@case("encode: features of text 0 alone and in a batch")
def mixes_texts(base: Any) -> dict[str, Any]:
    def encode(self: Any, texts: Any) -> Any:
        prompt = base.encode(self, texts)
        return replace(prompt, table=prompt.table + prompt.table.mean(0))

    return {"encode": encode}


@case("encode: found the same features for two texts")
def deaf(base: Any) -> dict[str, Any]:
    def encode(self: Any, texts: Any) -> Any:
        prompt = base.encode(self, texts)
        return replace(prompt, table=0 * prompt.table)

    return {"encode": encode}


@case("encode_images: the same call twice gave other latents")
def random_latents(base: Any) -> dict[str, Any]:
    calls = torch.Generator().manual_seed(0)
    return {"encode_images": lambda self, x: base.encode_images(self, x) + torch.rand(1, generator=calls)}


@case("decode: row 0 alone and in a batch")
def normalised_pixels(base: Any) -> dict[str, Any]:
    def decode(self: Any, latents: Tensor) -> Tensor:
        images = base.decode(self, latents)
        scaled: Tensor = images / (1 + images.sum())
        return scaled

    return {"decode": decode}


@case("features: found a gradient, expected none")
def features_with_gradient(base: Any) -> dict[str, Any]:
    def features(self: Any, images: Tensor) -> Tensor:
        found: Tensor = base.features(self, images) * self.parameters()[0].sum()
        return found

    return {"features": features}


@case("features before and after training")
def features_of_the_trained(base: Any) -> dict[str, Any]:
    def features(self: Any, images: Tensor) -> Tensor:
        own: Tensor = base.features(self, images) + self.parameters()[0].detach().sum()
        return own

    return {"features": features}


@case("denoise without a guidance scale and at guidance_scale")
def other_default(base: Any) -> dict[str, Any]:
    def denoise(self: Any, x: Tensor, t: Tensor, prompt: Any, guidance_scale: Tensor | None = None) -> Any:
        return base.denoise(self, x, t, prompt, torch.full_like(t, 5.0) if guidance_scale is None else guidance_scale)

    return {"denoise": denoise}


@case("denoise at guidance scale 4 and the line through 1 and 2")
def guidance_of_the_paper(base: Any) -> dict[str, Any]:
    def denoise(self: Any, x: Tensor, t: Tensor, prompt: Any, guidance_scale: Tensor | None = None) -> Any:
        return base.denoise(self, x, t, prompt, None if guidance_scale is None else guidance_scale**2)

    return {"denoise": denoise}


@case("denoise has no gradient to the parameters")
def frozen(base: Any) -> dict[str, Any]:
    def denoise(self: Any, x: Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            return base.denoise(self, x, *rest) + 0 * x

    return {"denoise": lambda self, x, *rest: denoise(self, x, *rest) + 0.1 * x}


@case("the prediction before and after using")
def keeps_weights(base: Any) -> dict[str, Any]:
    @contextmanager
    def using(self: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
        for name, value in weights.items():
            base.weights(self)[name].data = value
        yield

    return {"using": using, "reference": lambda self: _reference(self, base)}


@case("the prediction before and after an error within using")
def restores_without_errors_alone(base: Any) -> dict[str, Any]:
    @contextmanager
    def using(self: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = base.weights(self)
        kept = {name: own[name].data for name in weights}
        for name, value in weights.items():
            own[name].data = value
        yield
        for name, value in kept.items():
            own[name].data = value

    return {"using": using}


@contextmanager
def _reference(self: Any, base: Any) -> Iterator[None]:
    with torch.no_grad(), base.using(self, self._initial):
        yield


@case("the prediction with and without reference, before training")
def reference_to_nothing(base: Any) -> dict[str, Any]:
    @contextmanager
    def reference(self: Any) -> Iterator[None]:
        with torch.no_grad(), self.using({name: 0 * p for name, p in self._initial.items()}):
            yield

    return {"reference": reference}


@case("read_export: found weights .*, expected ")
def reads_a_part(base: Any) -> dict[str, Any]:
    def read_export(self: Any, folder: Path) -> dict[str, torch.Tensor]:
        return dict(list(base.read_export(self, folder).items())[1:])

    return {"read_export": read_export}


@case("read_export: .* and what export was given")
def reads_the_start(base: Any) -> dict[str, Any]:
    def read_export(self: Any, folder: Path) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.weights().items()}

    return {"read_export": read_export}


@case("export: found other files for equal weights")
def stamps_files(base: Any) -> dict[str, Any]:
    def export(self: Any, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        (folder / "stamp").write_text(folder.name)
        path: Path = base.export(self, folder, weights)
        return path

    return {"export": export}
