"""Writes the generated parts of the docs: `python docs/generate.py`.

A part stands between `<!-- generated: WHAT NAME -->` and `<!-- end -->`, where WHAT is `help` (a command's --help;
"prompts/lint" is one of a group), `section` (a table of a section's keys), `fields` (a table of the fields of
"KIND/NAME"), `comparison` (a table of benchmarks/compare_methods.py) or `measured` (what those say of an algorithm). A
test compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.config import reference as describe
from alignkit.config.schema import describe as type_words
from alignkit.config.sections import TOP, RunConfig
from alignkit.registry import default_registry

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "benchmarks"))
import compare_report  # noqa: E402  (from the line above)
from compare_tables import TABLES  # noqa: E402

PART = re.compile(r"(<!-- generated: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """`text` with every generated part as it should be."""
    return PART.sub(lambda m: f"{m[1]}{WRITERS[m[2]](m[3])}\n{m[4]}", text)


def _help(command: str) -> str:
    result = CliRunner().invoke(
        app, [*command.replace("/", " ").split(), "--help"], prog_name="alignkit", terminal_width=100
    )
    lines = (line.rstrip() for line in result.output.strip().splitlines())
    return "```text\n" + "\n".join(lines) + "\n```"


def _section(name: str) -> str:
    if name == "top":
        own = [field for field in describe.class_fields(RunConfig) if field["name"] in TOP]
        return _table([{**field, "type": type_words(TOP[field["name"]])} for field in own])
    (section,) = describe.section(name)
    return _table(section["fields"])


def _fields(component: str) -> str:
    kind, _, name = component.partition("/")
    registry = default_registry()
    return _table(describe.component(registry, registry.find(kind, name))["fields"])


def _table(fields: list[dict[str, Any]]) -> str:
    """Name, type, default and meaning of each field."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "required" if field["default"] is None else field["default"]
        default = default if default in ("required", "left out") else f"`{default}`"
        doc = field["doc"].replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{field['name']}` | {field['type']} | {default} | {doc} |")
    return "\n".join(rows)


def _comparison(table: str) -> str:
    return compare_report.render(compare_report.read(compare_report.RESULTS), TABLES[table]).rstrip()


def _measured(algorithm: str) -> str:
    return compare_report.measured(compare_report.read(compare_report.RESULTS), algorithm).rstrip()


WRITERS = {
    "help": _help, "section": _section, "fields": _fields, "comparison": _comparison, "measured": _measured,
}  # fmt: skip

if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        if (new := fill(old)) != old:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
