"""Code in the documentation runs, its figures are those of the benchmarks, its links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("docs", "docs.build"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from docs import build

    return build


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page)], ids=lambda page: page.name)
def test_code_runs_as_it_stands(page):
    namespace = {"__name__": page.stem}
    for code in code_blocks(page):
        exec(compile(code, str(page), "exec"), namespace)  # noqa: S102  (our own documentation)


def test_the_example_of_the_readme_is_short():
    (code,) = code_blocks(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12


def test_generated_blocks_are_up_to_date(build):
    assert [page.name for page in build.stale()] == [], "run: python -m docs.build"


def test_a_changed_figure_is_noticed(build):
    page = "<!-- begin:policies -->\nby hand\n<!-- end:policies -->"
    assert "by hand" not in build.built(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
