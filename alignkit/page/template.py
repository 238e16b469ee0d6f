"""Jinja2 templates of HTML pages, which share a style, light and dark, and escape what they print."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.page import facts
from alignkit.page.curves import PREFIX

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
TEXT = 6_000
"""Characters of a text that are shown."""


@cache
def template(name: str) -> Template:
    """Return a template of the page about runs or of cells of notebooks by its name."""
    from markupsafe import Markup

    filters: dict[str, Callable[..., Any]] = {
        "svg": lambda svg, name: Markup(svg.replace(PREFIX, name)),
        "clip": clip,
        "number": facts.number,
        "spread": facts.spread,
    }
    return open_template(TEMPLATES / name, TEMPLATES / "script.js", filters, facts_of=facts)


def colours() -> dict[str, str]:
    """Return the colours of curves by name of the variable (c0 to c7): those of the light scheme."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--(c\d): (#\w{6});", style.partition("@media")[0]))


def clip(text: str, length: int = TEXT) -> str:
    """Shorten a text; of a long one, say by how much."""
    if len(text) <= length:
        return text
    return f"{text[:length]} ... ({len(text) - length:,} more characters)" if length > 300 else f"{text[:length]}..."


def open_template(file: Path, script: Path, filters: Mapping[str, Callable[..., Any]], **names: Any) -> Template:
    """Open the template `file`, which may include others of its folder, and knows these `names` and `filters`.

    It also knows `style`, the text of the shared style sheet, and `script`, that of the script with its `script_hash`,
    by which a content security policy allows it and no other.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = script.read_text(encoding="utf-8")
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "script": Markup(text),
        "script_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
        **names,
    }
    environment.filters |= filters
    return environment.get_template(file.name)
