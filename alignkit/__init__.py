"""Reward alignment of few-step text-to-image diffusion models.

run = alignkit.load("run.toml", overrides={"algorithm.name": "lasro"})
for update in run.train():
    print(update.reward)
images = run.sample(["a red circle and a blue square"], steps=2)

The names below are the public ones, together with the modules `alignkit.testing`, `alignkit.rollout`,
`alignkit.advantage`, `alignkit.groups`, `alignkit.diffusion`, `alignkit.distillation` and `alignkit.errors`. Importing
these names does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignkit.hookspecs import Register, RegisterRecipe, hookimpl
from alignkit.interfaces import Algorithm, Context, ModelBundle, Policy, Regulariser, Reward, Sampler, Surrogate
from alignkit.records import Batch, Example, PolicyFacts, PolicySettings, Prediction, Prompt, Rows, Scores, Transition

if TYPE_CHECKING:
    from alignkit.commands.evaluate import evaluate
    from alignkit.commands.gallery import gallery
    from alignkit.config.schema import check_ranges
    from alignkit.rewards.functions import reward
    from alignkit.runs.run import Run, load
    from alignkit.training.update import Update

__all__ = [
    "Algorithm",
    "Batch",
    "Context",
    "Example",
    "ModelBundle",
    "Policy",
    "PolicyFacts",
    "PolicySettings",
    "Prediction",
    "Prompt",
    "Register",
    "RegisterRecipe",
    "Regulariser",
    "Reward",
    "Rows",
    "Run",
    "Sampler",
    "Scores",
    "Surrogate",
    "Transition",
    "Update",
    "__version__",
    "check_ranges",
    "evaluate",
    "gallery",
    "hookimpl",
    "load",
    "reward",
]
__version__ = "0.1.0"

_LAZY = {
    "Run": "alignkit.runs.run",
    "Update": "alignkit.training.update",
    "check_ranges": "alignkit.config.schema",
    "evaluate": "alignkit.commands.evaluate",
    "gallery": "alignkit.commands.gallery",
    "load": "alignkit.runs.run",
    "reward": "alignkit.rewards.functions",
}
"""Names whose modules are imported when they are used: most of them import torch, which plugins and the command line
must not wait for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
