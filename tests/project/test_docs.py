"""Commands in the docs can be run, listings in them are true, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.cli.options import overrides
from alignkit.commands.new import new
from alignkit.config import load as config
from alignkit.data.images import open_images
from alignkit.data.preferences import open_pairs
from alignkit.data.prompts import read_examples
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit.testing import check_reward
from docs_fixtures import generator

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAGS = ("algo", "reward", "model", "steps", "out", "seed", "assignments", "recipe")
SECTIONS = {
    "output",
    "seed",
    "model",
    "data",
    "sampler",
    "reward",
    "scoring",
    "surrogate",
    "algorithm",
    "regulariser",
    "train",
    "evaluate",
}


def blocks(page: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if found == language]


def command_lines() -> Iterator[tuple[str, str]]:
    """Every `alignkit ...` of a block, an example of --help or a run file's comment: where it stands, what it says."""
    sources = [(name, (ROOT / name).read_text(encoding="utf-8")) for name in NAMES]
    sources += [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in (ROOT / "examples").glob("*.toml")]
    for name, text in sources:
        for line in text.splitlines():
            if match := re.match(r"(?:#\s+|\s{2})?(alignkit (?!-)\S.*)$", line):
                yield name, re.split(r"\s{3,}|\s#", match[1])[0]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def parse(line: str) -> tuple[str, dict[str, Any]]:
    """Command and parameters of a command line. Raises what click raises for one that cannot be parsed."""
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line)[1:]
    names = []
    while hasattr(command, "commands"):
        names.append(arguments.pop(0))
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(names[-1], arguments).params


def test_there_are_command_lines_to_check() -> None:
    assert len(list(command_lines())) > 40


@pytest.mark.parametrize("line", sorted({line for _, line in command_lines()}))
def test_a_command_line_can_be_typed_as_printed(line: str) -> None:
    name, given = parse(line)
    if name == "score":
        default_registry().find("reward", given["reward"])
    invented = any(word in line for word in ("my/", "contrast", "--resume"))
    if name in ("train", "check") and not invented:
        file = given["file"] and ROOT / given["file"]
        if file and not file.is_relative_to(ROOT / "examples"):
            file = None  # the reader's own
        changes = overrides(*(given[key] for key in FLAGS))
        config.load(file, changes)


@pytest.mark.parametrize("page", NAMES)
def test_generated_parts_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert generator().fill(text) == text, "run `make docs`"


def test_every_command_and_section_is_on_its_page() -> None:
    group: Any = typer.main.get_command(app)
    cli = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    names = [*group.commands, *(f"prompts/{name}" for name in group.commands["prompts"].commands)]
    assert [name for name in names if f"<!-- generated: help {name} -->" not in cli] == []
    for page, part in (("results", "comparison"), ("results_appendix", "details")):
        results = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert [name for name in generator().TABLES if f"<!-- generated: {part} {name} -->" not in results] == []
    run_files = (ROOT / "docs" / "run_files.md").read_text(encoding="utf-8")
    assert [s for s in SECTIONS - {"output", "seed"} if f"<!-- generated: section {s} -->" not in run_files] == []


def test_every_algorithm_has_a_page_with_its_fields_and_what_was_measured() -> None:
    for row in default_registry().components("algorithm"):
        if row.plugin.startswith("alignkit_"):
            page = (ROOT / "docs" / "algorithms" / f"{row.name}.md").read_text(encoding="utf-8")
            assert f"<!-- generated: fields algorithm/{row.name} -->" in page
            assert f"<!-- generated: measured {row.name} -->" in page


def test_every_reward_has_a_page_with_its_fields_and_a_place_in_the_overview() -> None:
    overview = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "rewards").glob("*.md"))
    for row in default_registry().components("reward"):
        if row.plugin == "alignkit_rewards":
            assert f"<!-- generated: fields reward/{row.name} -->" in pages
            assert row.name in overview


def test_the_design_page_names_every_room_and_plugin() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = {p.name for p in (ROOT / "alignkit").glob("[!_]*.py")}
    folders = {f"{p.parent.name}/" for p in (ROOT / "alignkit").glob("*/__init__.py")}
    plugins = {p.name for p in (ROOT / "plugins").glob("alignkit_*")}
    named = set(re.findall(r"`([a-z]\w*\.py|[a-z]+/)`", design))
    named |= set(re.findall(r"^\| `(alignkit_\w+)`", design, re.MULTILINE))
    assert named == modules | folders | plugins


@pytest.mark.parametrize("page", NAMES)
def test_relative_links_resolve(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_run_files_of_examples_load(file: Path) -> None:
    assert config.load(file).output.startswith("runs/")


@pytest.mark.parametrize("page", NAMES)
def test_run_files_in_the_docs_load(page: str, tmp_path: Path) -> None:
    for index, body in enumerate(blocks(page, "toml")):
        if tomllib.loads(body).keys() <= SECTIONS:
            file = tmp_path / f"{index}.toml"
            file.write_text(body, encoding="utf-8")
            config.load(file)


@pytest.mark.parametrize("page", NAMES)
def test_python_in_the_docs_compiles(page: str) -> None:
    for body in blocks(page, "python"):
        compile(body, page, "exec")


@pytest.mark.parametrize("page", NAMES)
def test_a_value_shown_in_a_comment_is_what_the_line_above_gives(page: str) -> None:
    for body in blocks(page, "python"):
        *code, expression, shown = ["", *body.strip().splitlines()]
        if shown.startswith("# ["):
            scope: dict[str, Any] = {}
            exec("\n".join(code), scope)
            assert repr(eval(expression, scope)) == shown.removeprefix("# ")


def test_the_plugin_of_the_docs_passes_its_tests_and_trains(plugins: Any, tiny_run: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "writing_plugins.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"<!-- test: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL))
    folder = new("reward", "contrast", tmp_path / "alignkit-contrast")
    (folder / "alignkit_contrast" / "reward.py").write_text(parts["alignkit_contrast/reward.py"], encoding="utf-8")
    plugins.install_project(folder)
    for source in ((folder / "tests" / "test_contrast.py").read_text(encoding="utf-8"), parts["checks"]):
        scope: dict[str, Any] = {}
        exec(source, scope)
        for name in [name for name in scope if name.startswith("test_")]:
            scope[name]()
    reward = default_registry().get("reward", "contrast")(scale=2.0)
    images = torch.zeros(2, 3, 4, 4)
    images[1, :, :, 2:] = 1
    scores = reward(images, [Example("plain"), Example("half")])
    assert scores[0] == 0 and scores[1] == pytest.approx(2 * images[1].mean(0).std().item())
    run = tiny_run(overrides={"reward": ["contrast"], "reward.contrast.scale": 2.0, "train.updates": 1})
    (update,) = run.train()
    assert update.metrics["reward"] == update.metrics["reward/contrast"] > 0


def test_the_function_of_the_docs_is_a_reward(plugins: Any) -> None:
    text = (ROOT / "docs" / "writing_plugins.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "docs_function"}
    exec(dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))["function"], scope)
    check_reward(scope["redness"])
    assert [reward.name for reward in scope["run"].config.rewards] == ["redness"]


def test_the_recipe_of_the_docs_loads(plugins: Any) -> None:
    (body,) = [block for block in blocks("docs/run_files.md", "toml") if "recipe" in tomllib.loads(block)]
    (init,) = [block for block in blocks("docs/writing_plugins.md", "python") if "register_recipes" in block]
    init = init.replace('"recipes" / ', "")
    start = "from pathlib import Path\nfrom alignkit import hookimpl\n"
    plugins.install("acme_recipes", start + init, files={"acme_fast.toml": body})
    assert config.load(None, {"recipe": "acme_fast"}).data.batch_size == 4
    row = default_registry().find("recipe", "acme_fast")
    assert row.help == "lasro: Short runs on few prompts; this line is what `alignkit list recipes` shows"


def test_the_command_of_the_docs_runs(plugins: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "writing_plugins.md").read_text(encoding="utf-8")
    module = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))["command"]
    (init,) = [block for block in blocks("docs/writing_plugins.md", "python") if "register_commands" in block]
    plugins.install("acme_tools", f"from alignkit import hookimpl\n{init}", commands=module)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n{"step": 1, "warning": "odd"}\n{"step": 2, "reward": null}\n', encoding="utf-8"
    )
    assert CliRunner().invoke(app, ["acme-rewards", str(tmp_path)]).stdout == "     1  0.500\n"
    refused = CliRunner().invoke(app, ["acme-rewards", str(tmp_path / "gone")])
    assert refused.exit_code == 1 and "no metrics.jsonl here" in refused.stderr


def test_the_data_of_the_docs_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"<!-- test: (\w+\.jsonl) -->\n```json\n(.*?)```", text, re.DOTALL))
    for name, body in files.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    examples = read_examples(tmp_path / "prompts.jsonl")
    assert [len(example.metadata) for example in examples] == [1, 0]
    (tmp_path / "drawings").mkdir()
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / "drawings" / f"{number:04d}.png")
    _, captions = open_images(str(tmp_path / "images.jsonl"), 8).batch(0, 2, seed=0)
    assert {Example.of(caption).text for caption in captions} == {"a blue square", "a red circle"}
    assert open_pairs(str(tmp_path / "pairs.jsonl"), 8).batch(0, 1, seed=0).captions == ("a red circle",)


@pytest.mark.slow
def test_the_loop_of_ones_own_runs(tmp_path: Path) -> None:
    options = ["--updates", "1", "--prompts", "2", "--out", "lora"]
    subprocess.run([sys.executable, str(ROOT / "examples" / "own_loop.py"), *options], check=True, cwd=tmp_path)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
