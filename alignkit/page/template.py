"""The templates of the page about runs and of cells of notebooks, with their filters."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from alignkit.page import facts
from alignkit.page.curves import PREFIX
from alignkit.page.html import TEMPLATES, open_template

if TYPE_CHECKING:
    from jinja2 import Template

TEXT = 6_000
"""Characters of a text that are shown."""


@cache
def template(name: str) -> Template:
    """Return the template of this name, which escapes everything that is put into it."""
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
