"""The hooks through which a plugin registers its components.

A plugin's `__init__.py` imports the standard library and `alignkit`, nothing else, and registers strings, so that
listing a hundred plugins imports no network code:

    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("sharpness", "acme_rewards.sharpness:Sharpness", "Energy of the Laplacian")

`register(name, target, help)`: a snake_case name ("-" and "_" are the same), "module:Attribute", one line of help. A
recipe is a file, which has its line of help within: `register(name, path)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pluggy

hookspec = pluggy.HookspecMarker("alignkit")
hookimpl = pluggy.HookimplMarker("alignkit")


class Register(Protocol):
    """The function that a hook calls once for each component."""

    def __call__(self, name: str, target: str, help: str) -> None: ...


class RegisterRecipe(Protocol):
    """The function that `register_recipes` calls once for each recipe."""

    def __call__(self, name: str, path: Path) -> None: ...


@hookspec
def register_algorithms(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Algorithm`."""


@hookspec
def register_rewards(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Reward`."""


@hookspec
def register_samplers(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Sampler`."""


@hookspec
def register_surrogates(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Surrogate`."""


@hookspec
def register_regularisers(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Regulariser`."""


@hookspec
def register_models(register: Register) -> None:
    """Targets are an `alignkit.interfaces.ModelBundle` or a function without arguments that returns one."""


@hookspec
def register_policies(register: Register) -> None:
    """Targets are subclasses of `alignkit.interfaces.Policy`."""


@hookspec
def register_recipes(register: RegisterRecipe) -> None:
    """Paths are .toml files: run settings for one algorithm, which name it under [algorithm]; the first comment is the
    line of help."""


@hookspec
def register_commands(register: Register) -> None:
    """Targets are a function, whose parameters typer reads as arguments and options, or a `typer.Typer`."""
