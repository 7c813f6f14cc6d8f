"""What the documents say is true: their code runs, prints what they show, and their links lead somewhere.

Every block of a page that is marked as python is executed, all of a page in one namespace. If a block marked as output
follows, it is what must be printed.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import plainconv

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


class Block(NamedTuple):
    line: int
    code: str
    printed: str | None  # what must be printed; None if the page does not say


def blocks(text: str) -> list[Block]:
    fences = [(fence[1], text.count("\n", 0, fence.start(2)), fence[2]) for fence in FENCE.finditer(text)]
    found = []
    for (kind, line, body), (next_kind, _, next_body) in zip(fences, [*fences, ("", 0, "")][1:], strict=True):
        if kind == "python":
            found.append(Block(line, body, next_body if next_kind == "output" else None))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)  # lines as in the page
        if block.printed is not None:
            assert printed.getvalue() == block.printed, f"{page.name}, the block before line {block.line}"


def test_blocks_are_found_and_a_wrong_output_is_seen():
    text = "a\n```python\nprint(1)\n```\n\n```output\n2\n```\n```text\n```\n```python\nx = 1\n```\n"
    assert blocks(text) == [Block(2, "print(1)\n", "2\n"), Block(11, "x = 1\n", None)]


def test_every_algorithm_has_a_page_and_every_page_an_algorithm():
    pages = {page.stem for page in (ROOT / "docs" / "algorithms").glob("*.md")} - {"README"}
    assert pages == set(plainconv.algorithms())


@pytest.mark.parametrize("name", plainconv.algorithms())
def test_an_algorithms_page_says_what_every_page_must(name):
    text = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (.*)$", text, re.MULTILINE))
    assert headings >= {"The three directions", "Cost", "Error", "When it wins, when it loses", "Refuses", "NaN"}
    assert all(direction in text for direction in ("FORWARD", "GRAD_INPUT", "GRAD_WEIGHT"))
    assert f'algorithm="{name}"' in text
    assert f"({name}.md)" in (ROOT / "docs" / "algorithms" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in (first or second for first, second in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{page.name} links to {link}, outside of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}, and there is no such heading"


def anchors(page: Path) -> set[str]:
    """The names that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
