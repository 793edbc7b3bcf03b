"""Links, paths, and Python code of the README and the pages beside it, in docs/, and of results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/README.md")])
INCOMPLETE = ["your_own.md"]  # whose code runs in tests/runner/test_new_baseline.py
FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Return the anchors of a page's headings: lowercase, hyphens for spaces, no punctuation, as on GitHub and in mkdocs."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """Yield the relative links that lead to no file or heading, and the paths in code to no page of results or of docs."""
    text = FENCED.sub("", page.read_text())
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link
    yield from (path for path in re.findall(r"`((?:results|docs)/[\w/.]+)`", text) if not (ROOT / path).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_or_heading(page):
    assert list(broken(page)) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One's heading\n```\n# no heading\n```\n")
    links = ["other.md", "other.md#ones-heading", "other.md#no-heading", "#here", "none.md", "https://example.com/none"]
    (tmp_path / "page.md").write_text(
        " ".join(f"[x]({link})" for link in links) + " `results/none.md` `results/method/README.md`"
    )
    assert list(broken(tmp_path / "page.md")) == ["other.md#no-heading", "#here", "none.md", "results/none.md"]


def test_pages_of_docs_link_only_to_pages_of_the_site():
    links = [re.findall(r"\]\((\.\.[^)]*)\)", page.read_text()) for page in ROOT.glob("docs/*.md")]
    assert [link for found in links for link in found] == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text() and page.name not in INCOMPLETE],
    ids=lambda page: page.name,
)
def test_python_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(code, names)
