"""Writes the generated parts of the docs: `python docs/generate.py`.

A part stands between `<!-- generated: WHAT NAME -->` and `<!-- end -->`, where WHAT is `help` (a command's --help;
"prompts/lint" is one of a group), `section` (a table of a section's keys), `fields` (a table of the fields of
"KIND/NAME"), `comparison` (a table of benchmarks/compare_methods.py: figure and trained reward), `details` (the rest of
it), `measured` (what those say of an algorithm), `eight_minutes` (the runs of benchmarks/eight_minutes.csv) or `readme`
(the README, for the first page of the site). The figures are files in docs/images. A test compares all of them.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from functools import partial
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
import compare_curves  # noqa: E402  (from the line above)
import compare_figures  # noqa: E402
import compare_report  # noqa: E402
from compare_tables import TABLES  # noqa: E402

IMAGES = DOCS / "images"
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


@functools.cache
def _results() -> dict[str, Any]:
    return compare_report.read(compare_report.RESULTS)


def _comparison(name: str) -> str:
    table = TABLES[name]
    figure = _shown(f"results/{name}", table.title)
    return f"{figure}\n{compare_report.values(_results(), table, 'trained')}".rstrip()


def _details(name: str) -> str:
    table = TABLES[name]
    parts = (compare_report.values(_results(), table, "pixel_check"), compare_report.training(_results(), table))
    return "\n".join(parts).rstrip()


def _measured(algorithm: str) -> str:
    figure = _shown(f"methods/{algorithm}", algorithm, "../") + "\n" if algorithm in _algorithms() else ""
    if compare_curves.of_algorithm(_results(), algorithm):
        figure += f"![{algorithm}: trained reward and pixel check over samples and minutes]"
        figure += f"(../images/methods/{algorithm}_curve.svg)\n\n"
    return figure + compare_report.measured(_results(), algorithm).rstrip()


def _eight_minutes(_: str) -> str:
    rows = [
        "| | steps | VQA model before | change, 95 % interval | pixel check before | change, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for line in compare_figures.eight_minutes():
        cells = [line["run"] if line["steps"] == "1" else "", line["steps"]]
        for what in ("vqa", "pixel"):
            cells.append(line[f"{what}_before"])
            cells.append("{} [{}, {}]".format(*(line[f"{what}_{part}"] for part in ("change", "low", "high"))))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([_shown("results/eight_minutes", "LaSRO and DRaFT, three seeds each"), *rows])


def _readme(_: str) -> str:
    """Return the README with links as docs/ needs them; what lies outside of docs/ is named and not linked."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    outside = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)[^)\s]*\)")
    return outside.sub(lambda m: m[0] if (DOCS / m[2]).exists() else m[1], text).rstrip()


def _shown(name: str, what: str, up: str = "") -> str:
    text = f"{what}: change of the trained reward and of the pixel check, with 95 % intervals"
    return f"![{text}]({up}images/{name}.svg)\n"


WRITERS = {
    "help": _help, "section": _section, "fields": _fields, "comparison": _comparison, "details": _details,
    "measured": _measured, "eight_minutes": _eight_minutes, "readme": _readme,
}  # fmt: skip


def _algorithms() -> list[str]:
    """Return the algorithms of which there are results."""
    names = dict.fromkeys(method.algorithm for table in TABLES.values() for method in table.methods.values())
    return list(names)


def figures() -> dict[str, Callable[[], str]]:
    """Return the functions that draw the figures, by the names of their files in docs/images without ending."""
    results, found = _results(), {}
    for name, table in TABLES.items():
        found[f"results/{name}"] = partial(compare_figures.draw, compare_figures.of_table(results, table), table.title)
    for name in _algorithms():
        found[f"methods/{name}"] = partial(compare_figures.draw, compare_figures.of_algorithm(results, name), name)
        if rows := compare_curves.of_algorithm(results, name):
            found[f"methods/{name}_curve"] = partial(compare_curves.draw, rows, name)
    eight = partial(compare_figures.draw, compare_figures.of_eight_minutes(), "Eight minutes of one core")
    return {**found, "results/eight_minutes": eight}


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        if (new := fill(old)) != old:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
    for name, draw in figures().items():
        file, drawn = IMAGES / f"{name}.svg", draw()
        if not file.exists() or file.read_text(encoding="utf-8") != drawn:
            file.parent.mkdir(exist_ok=True)
            file.write_text(drawn, encoding="utf-8")
            print(f"wrote {file}")
