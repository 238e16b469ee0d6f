"""Markdown extension that turns formulas into MathML while the site is built, so that no script has to do it later."""

from __future__ import annotations

import html
import re

import latex2mathml.converter
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
"""A formula as pymdownx.arithmatex leaves it: inline in a span, displayed in a div."""


class Formulas(Postprocessor):
    """Replace every formula by MathML."""

    def run(self, text: str) -> str:
        """Return the HTML with MathML in it. Raises ValueError for a command that the converter does not know."""
        return FORMULA.sub(_mathml, text)


def _mathml(match: re.Match[str]) -> str:
    displayed = match[1] == "div"
    latex = html.unescape(match[2]).strip()
    latex = re.sub(r"\\mathbb (\w)", r"\\mathbb{\1}", latex)  # without braces the converter leaves the letter as it is
    found = latex2mathml.converter.convert(latex, display="block" if displayed else "inline")
    if unknown := re.search(r"\\[A-Za-z|]+", found):
        raise ValueError(f"formula {latex!r}: {unknown[0]} cannot be turned into MathML; write it with other commands")
    return f'<div class="formula">{found}</div>' if displayed else found


class MathML(Extension):
    """Put `Formulas` after the postprocessor that restores HTML."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the postprocessor."""
        md.postprocessors.register(Formulas(md), "mathml", 5)


def makeExtension(**settings: object) -> MathML:
    """Make the extension, as Python-Markdown asks for it by the name of this module."""
    return MathML(**settings)
