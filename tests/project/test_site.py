"""The site of the docs builds without warnings, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))
COUNTED = ("h1", "h2", "h3", "ul", "ol", "li", "table", "tr", "pre")

pytest.importorskip("zensical", reason="zensical, of the extra docs, is not installed")


class Page(HTMLParser):
    """Anchors, links, and what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.loaded += [found["src"]] if "src" in found else []
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(found["href"])


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site whose zensical.toml lies in `folder`, as `make site` does."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "docs"), "NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", folder)
    done = build(folder)
    assert (done.returncode, done.stderr.strip()) == (0, "No issues found"), done.stdout + done.stderr
    return folder / "site"


def built(site: Path, page: str) -> Path:
    return site / page.removesuffix("index.md").replace(".md", "/") / "index.html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def broken(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Yield every link of a page to a file or an anchor that the site does not have."""
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            if re.match(r"\w+:", link) or path.name == "404.html":  # which is served at any depth
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / unquote(target)).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and unquote(anchor) not in pages[file].anchors):
                yield f"{path.relative_to(site.resolve())}: {link}"


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    navigation = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(navigation) == PAGES
    assert [page for page in PAGES if not built(site, page).is_file()] == []
    assert not list(site.rglob("*.py")) and (site / "search.json").is_file()


def test_every_link_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert list(broken(site, pages)) == []
    page = Page('<a href="#gone"></a><a href="../gone/"></a><img src="gone.svg">')
    assert len(list(broken(site, {built(site, "results.md").resolve(): page}))) == 3


def test_the_site_loads_nothing_from_elsewhere(pages: dict[Path, Page]) -> None:
    assert {link for page in pages.values() for link in page.loaded if re.match(r"\w+:|//", link)} == set()


def test_pages_have_the_lists_and_tables_that_their_sources_have_elsewhere(site: Path) -> None:
    # Lists in lists, and tables in lists, need four blanks here and two by CommonMark, which takes four as well.
    commonmark = MarkdownIt("commonmark").enable("table")
    tag = re.compile(rf"<({'|'.join(COUNTED)})[ >]")
    for page in PAGES:
        source = commonmark.render((ROOT / "docs" / page).read_text(encoding="utf-8"))
        article = built(site, page).read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]
        assert Counter(tag.findall(article)) == Counter(tag.findall(source)), page


def test_formulas_are_mathml(site: Path) -> None:
    text = built(site, "algorithms/lasro.md").read_text(encoding="utf-8")
    assert text.count("<math") > 20 and "arithmatex" not in text and "&#x1D53C;" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [("[gone](gone.md)", "page does not exist"), ("[gone](#gone)", "anchor"), (r"$\undefined x$", "cannot be turned")],
)
def test_a_mistake_ends_the_build(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "docs" / "stylesheets").mkdir(parents=True)
    (tmp_path / "docs" / "stylesheets" / "site.css").touch()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n", encoding="utf-8")
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    config = re.sub(r"^nav = \[.*?^\]", 'nav = ["index.md"]', config, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "zensical.toml").write_text(config, encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode != 0 and message in done.stdout + done.stderr
