"""Write a plugin to start from: a complete distribution, filled in from templates."""

from __future__ import annotations

import importlib.util
import keyword
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import alignkit
from alignkit.errors import AlignkitError
from alignkit.registry import KINDS, default_registry, nearest, normalise


@dataclass(frozen=True)
class _Kind:
    """One kind of component that can be written."""

    summary: str
    """One line of help on the example that the template holds."""
    train: str
    """Options of a training command that uses it."""
    about: str = "its fields are its settings, and `alignkit show` prints their docstrings"
    """A hint on reading the module."""


WRITABLE = {
    "reward": _Kind("How much neighbouring pixels differ", "--algo lasro --reward {name}"),
    "algorithm": _Kind("Policy gradient with a baseline", "--algo {name} --reward attribute_binding"),
    "sampler": _Kind(
        "Clean prediction, then old and fresh noise",
        "--algo ddpo --reward attribute_binding --set sampler.name={name}",
    ),
    "surrogate": _Kind(
        "Two convolutions on the latent and the text features",
        "--algo lasro --reward attribute_binding --set surrogate.name={name}",
    ),
    "model": _Kind(
        "A latent consistency model of the hub, 4 steps",
        "--algo ddpo --reward attribute_binding --model {name}",
        "a checkpoint and the run settings that suit it, which `alignkit show` prints",
    ),
}
_TAKEN = {"BUNDLE", "F", "Network", "Steps", "Tensor"}
"""Names that the templates use, next to those of alignkit."""


def new(kind: str, name: str, folder: Path | None = None) -> Path:
    """Write a distribution that brings a component of this kind and name; return its folder.

    `kind` is one of `WRITABLE`. `folder` is by default "alignkit-NAME" in the working directory. Raises AlignkitError
    for a name that is taken or is not a Python identifier, and for a folder that exists.
    """
    if kind not in WRITABLE:
        raise AlignkitError(f"new: found {kind!r}, expected one of {', '.join(WRITABLE)}{nearest(kind, WRITABLE)}")
    name = normalise(name)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise AlignkitError(f"new {kind}: found the name {name!r}, expected snake_case, as my_{kind}")
    if name in KINDS:  # in the metrics of a run "reward" is the sum of all rewards
        raise AlignkitError(f"new {kind}: found the name {name!r}, which is the name of a kind; choose another name")
    if taken := [row for row in default_registry().components(kind) if row.name == name and not row.broken]:
        raise AlignkitError(f"new {kind}: {name} exists already, from {taken[0].origin}; choose another name")
    package = f"alignkit_{name}"
    if importlib.util.find_spec(package) is not None:
        raise AlignkitError(f"new {kind}: the package {package} is installed already; choose another name")
    distribution = package.replace("_", "-")
    folder = Path(distribution) if folder is None else folder
    if folder.exists():
        raise AlignkitError(f"new {kind}: {folder} exists already; choose another name, or another folder with --out")
    what = WRITABLE[kind]
    values = {
        "kind": kind, "name": name, "package": package, "distribution": distribution, "cls": _class_name(kind, name),
        "summary": what.summary, "about": what.about, "train": f"alignkit train {what.train.format(name=name)}",
    }  # fmt: skip
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/__init__.py": "__init__.py",
        f"{package}/{kind}.py": f"{kind}.py",
        f"tests/test_{name}.py": f"test_{kind}.py",
    }
    try:
        for path, template in templates.items():
            text = (files("alignkit.commands") / "templates" / f"{template}.template").read_text(encoding="utf-8")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(Template(text).substitute(values), encoding="utf-8")
    except OSError as error:
        raise AlignkitError(f"new {kind}: {folder} cannot be written ({error.strerror})") from error
    return folder


def _class_name(kind: str, name: str) -> str:
    """CamelCase, with the kind appended where the template has the name already; a model is a constant."""
    if kind == "model":
        return "BUNDLE"
    cls = "".join(part.capitalize() for part in name.split("_"))
    return f"{cls}{kind.capitalize()}" if cls in {*alignkit.__all__, *_TAKEN} else cls
