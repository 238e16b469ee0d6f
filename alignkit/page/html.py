"""Jinja2 templates of HTML pages that share a style, light and dark, and escape what they print."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"


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
