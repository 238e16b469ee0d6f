"""Tiny untrained pipelines for images of 64 pixels, saved in the format of diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

    from alignkit.testing.world import Form


def tiny_text_config() -> CLIPTextConfig:
    """Return the config of a text encoder for the words of the embedded world."""
    from alignkit.testing.world import text_config
    from alignkit_shapes.build.text import tokenizer

    return text_config(tokenizer())


def _save(folder: Path, form: Form) -> Path:
    from alignkit.testing.world import save_pipeline
    from alignkit_shapes.build.text import tokenizer

    return save_pipeline(folder, form, tokenizer())


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a StableDiffusionPipeline: predicts the noise, DDIM schedule."""
    return _save(tmp_path_factory.mktemp("teacher"), "teacher")


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LatentConsistencyModelPipeline whose UNet embeds the guidance."""
    return _save(tmp_path_factory.mktemp("lcm"), "lcm")


@pytest.fixture(scope="session")
def read_pipelines(tiny_lcm: Path, tiny_teacher: Path) -> dict[str, Any]:
    """The two pipelines above by their folders, as they are loaded with default settings."""
    from alignkit.models.pipelines import Files, load_pipeline

    return {str(folder): load_pipeline(Files(str(folder))) for folder in (tiny_lcm, tiny_teacher)}


@pytest.fixture
def kept_pipelines(read_pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Policies with copies of the networks of the two pipelines, which is faster than to load them; the rest is shared,
    because they never change it."""
    from alignkit.models import diffusers_policy, pipelines

    def load(files: pipelines.Files, dtype: Any, guidance_embedding: int) -> Any:
        import torch

        pipe = read_pipelines.get(files.source)
        plain = pipelines.Files(files.source, prediction=files.prediction)
        if pipe is None or dtype is not torch.float32 or guidance_embedding or files != plain:
            return pipelines.load_pipeline(files, dtype, guidance_embedding)
        shared = pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler
        return copy.deepcopy(pipe, {id(part): part for part in shared})

    monkeypatch.setattr(diffusers_policy, "load_pipeline", load)
    yield
    for pipe in read_pipelines.values():
        pipe.vae.disable_gradient_checkpointing()


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves the tiny pipeline of a model family (families.py), once, and returns its folder."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        from families import save_family

        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_family(name, made[name])
        return made[name]

    return make
