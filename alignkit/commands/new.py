"""A plugin to begin with: a complete distribution, written from templates."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from alignkit import interfaces
from alignkit.errors import AlignkitError
from alignkit.registry import default_registry, nearest, normalise

TRAIN = {
    "reward": "alignkit train --algo lasro --reward {name}",
    "algorithm": "alignkit train --algo {name} --reward attribute_binding",
    "sampler": "alignkit train --algo ddpo --reward attribute_binding --set sampler.name={name}",
}
"""What can be written, and how it is trained with."""
SUMMARIES = {
    "reward": "How much neighbouring pixels differ",
    "algorithm": "Policy gradient with a baseline",
    "sampler": "Clean prediction, then old and fresh noise",
}


def new(kind: str, name: str, folder: Path | None = None) -> Path:
    """Write a distribution that brings a reward, an algorithm or a sampler of this name; returns its folder.

    `folder` is by default "alignkit-NAME" in the working directory. Raises AlignkitError for a name that is taken or
    none of Python, and for a folder that is there.
    """
    if kind not in TRAIN:
        raise AlignkitError(f"new: found {kind!r}, expected one of {', '.join(TRAIN)}{nearest(kind, TRAIN)}")
    name = normalise(name)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise AlignkitError(f"new {kind}: found the name {name!r}, expected snake_case, as my_{kind}")
    if name in ("reward", "algorithm", "sampler"):  # "reward" is the sum of all in what a run tells
        raise AlignkitError(f"new {kind}: found the name {name!r}, which is that of its kind; choose another name")
    if taken := [row for row in default_registry().components(kind) if row.name == name and not row.broken]:
        raise AlignkitError(f"new {kind}: {name} is there already, from {taken[0].origin}; choose another name")
    package = f"alignkit_{name}"
    if importlib.util.find_spec(package) is not None:
        raise AlignkitError(f"new {kind}: the package {package} is installed already; choose another name")
    distribution = package.replace("_", "-")
    folder = Path(distribution) if folder is None else folder
    if folder.exists():
        raise AlignkitError(f"new {kind}: {folder} is there already; choose another name, or another folder with --out")
    cls = "".join(part.capitalize() for part in name.split("_"))
    if hasattr(interfaces, cls) or cls in ("Tensor", "Steps"):
        cls += kind.capitalize()
    values = {
        "kind": kind, "name": name, "package": package, "distribution": distribution, "cls": cls,
        "summary": SUMMARIES[kind], "train": TRAIN[kind].format(name=name),
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
