"""Links in the documentation lead somewhere, and files of the repository that are mentioned anywhere exist.

A page with a date in its name is a record: what it mentions may have moved since, its links must still lead somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = ("app", "benchmarks", "cluster", "constraints", "deployments", "docs", "scripts", "standins", "tests")
TEXT = {".md", ".py", ".sh", ".toml", ".txt", ".yaml", "Dockerfile", "Makefile"}
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
MENTION = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w/.-]++(?!\\)")
"""A path from the root of the repository; not in a test's regular expression."""
NAME = re.compile(r"(?<![\w./*-])[\w-]+\.(?:md|py|sh)(?![\w/])")
"""A file that is mentioned without its folder."""
RECORD = re.compile(r"\d{4}-\d{2}-\d{2}")


def files() -> Iterator[Path]:
    for path in (*REPOSITORY.glob("*"), *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*"))):
        if path.is_file() and (path.suffix or path.name) in TEXT:
            yield path


FILES = {str(path.relative_to(REPOSITORY)): path for path in sorted(files())}
PAGES = [name for name in FILES if name.endswith(".md")]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(mention: str) -> bool:
    """Whether it is there, begins the name of what is there (docs/decisions/0009), or ends with a PLACEHOLDER."""
    path = REPOSITORY / mention.rstrip(".-/")
    return path.exists() or path.name.isupper() or any(path.parent.glob(f"{path.name}-*"))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = FILES[name]
    for target, anchor in LINK.findall(page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("name", [name for name in FILES if not RECORD.search(name)])
def test_files_that_are_mentioned_exist(name: str) -> None:
    mentions = set(MENTION.findall(FILES[name].read_text()))
    assert [mention for mention in sorted(mentions) if not exists(mention)] == []


@pytest.mark.parametrize(
    "name", [n for n in FILES if n.endswith((".md", ".py")) and not n.startswith("tests/") and not RECORD.search(n)]
)
def test_files_that_are_mentioned_without_their_folder_exist(name: str) -> None:
    names = {path.name for path in FILES.values()}
    assert set(NAME.findall(FILES[name].read_text())) - names == set()
