"""The documentation's site: `make docs` builds it without a warning, complete, and from no other host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("mkdocs.yml", "Makefile", "docs", "runbooks", "dashboards", "model", "bench", "flags", "examples")
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "embed": "src",
    "object": "data",
}


class Page(HTMLParser):
    """What a page loads, where its links lead, and the places in it that a link can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        found = {name: value or "" for name, value in attributes}
        self.places |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link":
            self.loads.append(found["href"])
        elif found.get(LOADED.get(tag, ""), ""):
            self.loads.append(found[LOADED[tag]])


def built(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`make docs`, with the tools of this interpreter, whatever stands in the environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(site.parent)}
    command = ["make", "-o", ".venv/.installed", "docs", f"BIN={Path(sys.executable).parent}", f"SITE={site}"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def copied(folder: Path) -> None:
    """What the site is made of, to be spoilt."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    for one in ROOT.glob("*.md"):
        shutil.copy(one, folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    made = built(ROOT, folder)
    assert made.returncode == 0, made.stderr
    assert "WARNING" not in made.stderr
    assert made.stdout == f"Site: {folder}/index.html\n"
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """All pages of the site."""
    return {path: Page(path) for path in site.rglob("*.html")}


def page_of(text: Path) -> str:
    """Where a text of the repository stands in the site."""
    parts = text.relative_to(ROOT).parts
    folder = "project/" if len(parts) == 1 else "" if parts[0] == "docs" else f"{parts[0]}/"
    return folder + ("index" if text.stem == "README" else text.stem) + ".html"


TEXTS = [
    *ROOT.glob("*.md"),
    *(
        text
        for folder in ("docs", "runbooks", "dashboards", "model", "bench", "flags")
        for text in (ROOT / folder).glob("*.md")
    ),
]


def test_every_text_is_a_page_with_its_title_and_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    in_navigation = set(pages[site / "index.html"].links)
    assert len(TEXTS) > 40
    for text in TEXTS:
        page = page_of(text)
        shown = (site / page).read_text(encoding="utf-8")
        title = re.search(r"^# (.+)$", text.read_text(encoding="utf-8"), re.MULTILINE)
        assert title, text
        heading = re.search(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", shown, re.DOTALL)
        assert heading, page
        assert re.sub(r"<[^>]+>|`", "", heading[1]).replace("&amp;", "&") == title[1].replace("`", ""), page
        assert page in in_navigation, page


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for loaded in page.loads:
            # The page for what is not found stands anywhere, so its addresses begin at the root of the site.
            base = site if path.name == "404.html" else path.parent
            assert not re.match(r"[a-z]+:|//", loaded), f"{path.name} loads {loaded}"
            assert (base / loaded.lstrip("/")).is_file(), f"{path.name} loads {loaded}, which is not there"
    for style in site.rglob("*.css"):
        for loaded in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s;]+)", style.read_text(encoding="utf-8")):
            assert not re.match(r"(?!data:)[a-z]+:|//", loaded), f"{style.name} loads {loaded}"
    for image in site.rglob("*.svg"):
        assert not re.search(r"(?:href|src)=[\"'](?!#)|<script|@import", image.read_text(encoding="utf-8")), image.name


def test_every_link_within_the_site_leads_to_a_page_and_a_place_in_it(pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            file, _, place = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if re.match(r"[a-z]+:", link):
                continue
            if target not in pages or (place and place not in pages[target].places):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_a_list_and_the_code_in_it_are_shown_as_on_a_code_host(site: Path) -> None:
    shown = (site / "dashboards" / "index.html").read_text(encoding="utf-8")
    steps = shown[shown.index('id="alerts-into-prometheus"') : shown.index('id="changing-them"')]
    assert steps.count("<ol>") == 1
    assert steps.count("<li>") == 3
    assert re.search(r"<li>(?:(?!</li>).)*promtool(?:(?!</li>).)*check(?:(?!</li>).)*</pre>", steps, re.DOTALL)


def test_a_long_name_in_a_table_may_break_and_is_found_by_the_search(site: Path) -> None:
    shown = (site / "metrics.html").read_text(encoding="utf-8")
    assert "walletmigrate_<wbr>flag_<wbr>age_<wbr>seconds</code></td>" in shown
    assert "<code>dual_write</code>" in shown
    assert "walletmigrate_flag_age_seconds" in (site / "search" / "search_index.json").read_text(encoding="utf-8")


def test_the_search_works_without_a_server(site: Path) -> None:
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    assert '<script src="assets/search.js"></script>' in (site / "index.html").read_text(encoding="utf-8")


def test_whatever_is_wrong_is_told_and_ends_the_build(tmp_path: Path) -> None:
    copied(tmp_path)
    (tmp_path / "runbooks" / "forgotten.md").write_text("# Neither alert nor procedure\n", encoding="utf-8")
    broken = "# Broken\n\n[a](../runbooks/gone.md) [b](commands.md#gone-too)\n\n![c](assets/gone.svg)\n"
    (tmp_path / "docs" / "broken.md").write_text(broken, encoding="utf-8")
    made = built(tmp_path, tmp_path / "site")
    assert made.returncode != 0
    for wrong in ("runbooks/forgotten.md", "runbooks/gone.md", "#gone-too", "assets/gone.svg"):
        assert re.search(rf"^WARNING(?:.*\n(?!INFO))*?.*{re.escape(wrong)}", made.stderr, re.MULTILINE), wrong


def test_a_page_that_nobody_put_into_the_navigation_is_taken_with_the_others(tmp_path: Path) -> None:
    copied(tmp_path)
    rules = "[rules](../dashboards/alerts/walletmigrate.rules.yml)"
    latest = f"# The latest\n\n[files](../examples/shop/) [boards](../dashboards/) {rules}\n"
    (tmp_path / "docs" / "latest.md").write_text(latest, encoding="utf-8")
    (tmp_path / "runbooks" / "latest.md").write_text("# Late\n\nKind: procedure.\n", encoding="utf-8")
    made = built(tmp_path, tmp_path / "site")
    assert made.returncode == 0, made.stderr
    assert {"latest.html", "runbooks/latest.html"} <= set(Page(tmp_path / "site" / "index.html").links)
    links = set(Page(tmp_path / "site" / "latest.html").links)
    assert {"examples/shop.html", "dashboards/index.html", "dashboards/alerts/walletmigrate.rules.yml.html"} <= links
