"""What MkDocs is told about this repository (a hook, see mkdocs.yml): pages outside docs/, their links, the navigation.

A page keeps the links that work on a code host. Here they are made to lead to the same file within the site. A linked
file that is no text of its own, such as a program, becomes a page that shows it, and a folder one that names its files.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS, PROJECT = "docs/", "project/"
FOLDERS = ("bench", "dashboards", "flags", "model", "runbooks")
LANGUAGES = {".py": "python", ".sql": "sql", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".json": "json"}

NOT_IN_NAV = InclusionLevel.NOT_IN_NAV

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
_FENCE = re.compile(r"^ *(```|~~~)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_LONG_NAME = re.compile(r"(?<=<code>)[^<]{17,}(?=</code>)")
_JOINT = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[_./=])(?=\w)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the texts outside docs/ and what any text links to; then fill the navigation's stars."""
    for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))]:
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, place_in_site(name), abs_src_path=str(path)))
    for page in list(files.documentation_pages()):
        for name in linked(page.content_string, path_of(page.src_uri)):
            uri = place_in_site(name)
            if files.get_file_from_path(uri) is None and (ROOT / name).exists():
                files.append(File.generated(config, uri, content=shown(ROOT / name), inclusion=NOT_IN_NAV))
    config.nav = filled(config.nav, list(files.documentation_pages()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 (MkDocs' own)
    """The text as MkDocs reads it."""
    here = page.file.src_uri

    def moved(link: str) -> str:
        if re.match(r"[a-z]+:", link):
            return link
        name = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(here)), link))
        return posixpath.relpath(place_in_site(name), posixpath.dirname(here) or ".")

    lines = told_apart(indented(markdown))
    return "\n".join(line if is_code else _LINK.sub(lambda found: moved(found[1]), line) for line, is_code in lines)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001 (MkDocs' own)
    """Long names in tables may be broken between their words. (Not before: the search would find the words alone.)"""
    return _CELL.sub(lambda cell: _LONG_NAME.sub(lambda name: _JOINT.sub("<wbr>", name[0]), cell[0]), output)


def on_post_build(config: MkDocsConfig) -> None:
    """The search's index as a script: read from a folder, a page loads no data."""
    index = Path(config.site_dir, "search", "search_index.json")
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")


def place_in_site(name: str) -> str:
    """Where a file of the repository stands in the site; an image or a style sheet of docs/ stays what it is."""
    if (ROOT / name / "README.md").is_file():
        name = f"{name}/README.md"
    if name.startswith(DOCS):
        return name.removeprefix(DOCS)
    page = name if name.endswith(".md") else f"{name}.md"
    return page if "/" in page else PROJECT + page


def path_of(uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    if uri.startswith(PROJECT):
        return uri.removeprefix(PROJECT)
    name = uri.removesuffix(".md")
    return name if (ROOT / name).exists() else uri if (ROOT / uri).is_file() else DOCS + uri


def linked(markdown: str, here: str) -> Iterator[str]:
    """The files of the repository that a text links to."""
    for line, is_code in told_apart(markdown.splitlines()):
        for link in () if is_code else _LINK.findall(line):
            if not re.match(r"[a-z]+:", link):
                yield posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def shown(path: Path) -> str:
    """A page that shows a file, or the names in a folder."""
    language = LANGUAGES.get(path.suffix, "text")
    unsearched = "---\nsearch:\n  exclude: true\n---\n"
    names = "".join(f"{one.name}\n" for one in sorted(path.iterdir())) if path.is_dir() else ""
    code = f"````{language}\n{names or path.read_text(encoding='utf-8')}````\n"
    return f"{unsearched}# {path.name}\n\n`{path.relative_to(ROOT)}`\n\n{code}"


def told_apart(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is of a block of code."""
    within = False
    for line in lines:
        fence = bool(_FENCE.match(line))
        yield line, within or fence
        within ^= fence


def indented(markdown: str) -> list[str]:
    """Lists as Python-Markdown wants them: an item's own lines four blanks in, a blank line before the first item."""
    lines, width, within, last = list[str](), 0, False, ""
    for line in markdown.splitlines():
        item = None if within else _ITEM.match(line)
        if item and not width and last.strip():
            lines.append("")
        if item:
            width = item.end()
        elif line.strip() and not line.startswith(" ") and not (width and last.strip()) and not within:
            width = 0
        belongs = width and line.startswith(" " * width)
        lines.append("    " + line[width:] if belongs else line)
        within ^= bool(_FENCE.match(line)) if belongs or not line.startswith(" ") else False
        last = line
    return lines


def filled(nav: Any, pages: list[File]) -> Any:
    """The navigation with its stars filled."""
    named = set(names_in(nav))

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {title: fill(inner) for title, inner in part.items()}
        if isinstance(part, list):
            return [one for item in part for one in (stars(item) if is_star(item) else [fill(item)])]
        return part

    def stars(pattern: str) -> list[str]:
        glob, _, kind = pattern.partition(" ")
        found = [page for page in pages if page.src_uri not in named and fnmatch(page.src_uri, glob)]
        found = [page for page in found if page.src_uri.count("/") == glob.count("/") or glob.endswith("/*")]
        return sorted(page.src_uri for page in found if f"Kind: {kind}" in page.content_string or not kind)

    return fill(nav)


def is_star(part: Any) -> bool:
    """Whether a part of the navigation stands for pages that it does not name."""
    return isinstance(part, str) and "*" in part


def names_in(nav: Any) -> Iterator[str]:
    """The pages that the navigation names."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from names_in(inner)
