"""Checks that hold for every registered model."""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from alignkit.config import load as config
from alignkit.config.bundles import find_policy
from alignkit.data.sources import Images, Preferences, open_class
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import ModelBundle
from alignkit.models.quiet import errors_only
from alignkit.records import PolicyFacts, PolicySettings
from alignkit.registry import default_registry
from alignkit.rollout import sample_images
from alignkit.runs.build import Parts
from alignkit.testing.data import check_images, check_pairs
from alignkit.testing.expect import about, expect

T = TypeVar("T")


def check_model(name: str) -> str:
    """Raise AssertionError, in one line, for the first promise of a registered model (`ModelBundle`) that is not kept.

    Its settings make a valid run under every algorithm (and reward) that it has settings for, and loading the run file
    written from them gives the same run. A pipeline on this disk generates an image with one step, and sources of
    images and pairs that the settings name as "package.module:Class" are checked at its size. Returns a summary.
    """
    with about(f"model {name}"), errors_only(), torch.random.fork_rng():
        bundle: ModelBundle = default_registry().get("model", name)
        for source in (bundle.path, bundle.teacher or bundle.path):
            try:
                find_policy(source, str(bundle.defaults.get("model", {}).get("policy", "")))
            except AlignkitError as error:
                raise AssertionError(error) from error
        before = copy.deepcopy(bundle)
        keys = [*bundle.algorithm_defaults, *bundle.recipes]
        known = {row.name for row in default_registry().components("algorithm")}
        algorithms = sorted(known & {key.partition("/")[0] for key in keys})
        algorithms = algorithms or [config.DEFAULT_ALGORITHM]
        runs = [_settings(bundle, name, algorithm) for algorithm in algorithms]
        for algorithm, _, reward in (key.partition("/") for key in dict.fromkeys(keys)):
            if reward and algorithm in known:
                _settings(bundle, name, algorithm, reward)
        expect(before == bundle, "its settings were changed by loading a run")
        checked = [f"its settings under {', '.join(algorithms)}"]
        if Path(bundle.path).is_dir():
            checked += _loaded(runs[0])
        return "; ".join(checked)


def _settings(bundle: ModelBundle, name: str, algorithm: str, reward: str = "") -> config.RunConfig:
    chosen: dict[str, Any] = {"model.name": name, "algorithm.name": algorithm} | (
        {"reward": [reward]} if reward else {}
    )
    under = algorithm + (f" with {reward}" if reward else "")
    if not any("sampler" in layer for layer in (bundle.defaults, bundle.algorithm_defaults.get(algorithm, {}))):
        # The user has to choose one.
        chosen["sampler.name"] = "lcm" if _facts(bundle).consistency else "renoise"
    try:
        run = config.load(None, chosen)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.toml"
            file.write_text(config.to_toml(run), encoding="utf-8")
            expect(
                config.load(file) == run,
                f"under {under}: loading the run file that was written gives another run, expected the same",
            )
    except ConfigError as error:
        raise AssertionError(f"under {under}: {error}") from error
    return run


def _facts(bundle: ModelBundle) -> PolicyFacts:
    policy = find_policy(bundle.path, str(bundle.defaults.get("model", {}).get("policy", "")))
    return policy.facts(bundle.path, PolicySettings(trainable=False))


def _loaded(run: config.RunConfig) -> list[str]:
    """Load the pipeline, generate an image, and read its training data; return what was checked."""
    parts = Parts(run)
    policy, sampler = parts.load_policy(), parts.sampler(1)
    size = policy.image_size
    image = sample_images(policy, replace(sampler, num_steps=1), ["a red circle"], [(0, 0)])
    shape = tuple(image.shape)
    expect(shape == (1, 3, size, size), f"an image of one step: found shape {shape}, expected (1, 3, {size}, {size})")
    expect(bool(image.isfinite().all()), "an image of one step: found values that are not finite")
    checked = [f"an image of {size} pixels"]
    if _is_class(source := run.data.images):
        check_images(_opened("data.images", source, size, Images), size)  # type: ignore[type-abstract]
        checked.append(source)
    if _is_class(source := run.data.pairs):
        check_pairs(_opened("data.pairs", source, size, Preferences), size)  # type: ignore[type-abstract]
        checked.append(source)
    return checked


def _opened(key: str, source: str, size: int, base: type[T]) -> T:
    try:
        return open_class(source, size, base, key, "none")
    except ConfigError as error:
        raise AssertionError(
            f"{key}: {source!r} gives no source at {size} pixels: {error.__cause__ or error}"
        ) from error


def _is_class(source: str) -> bool:
    """Whether it has the form "package.module:Class"; "datasets:NAME" is a data set."""
    return re.fullmatch(r"(?!datasets:)[A-Za-z_][\w.]*:\w+", source) is not None
