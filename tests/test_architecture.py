"""The import contract of pyproject.toml holds, and would be seen to break."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint_imports(source: Path, configuration: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--config", str(configuration), "--no-cache", "--no-logo"],
        cwd=configuration.parent,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_imports_only_what_lies_below_it():
    result = lint_imports(ROOT / "src", ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.fixture
def copied_source(tmp_path):
    for file in (ROOT / "src").rglob("*.py"):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("plan/plan.py", "import gainstage.report", "Data flows one way"),
        ("graph/model.py", "import gainstage.plan", "Data flows one way"),
        ("signal/value.py", "import gainstage.graph", "The abstract value"),
        ("graph/model.py", "import rich", "Only the report"),
    ],
)
def test_a_forbidden_import_breaks_the_contract(copied_source, file, line, contract):
    path = copied_source / "gainstage" / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    result = lint_imports(copied_source, copied_source.parent / "pyproject.toml")
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(row.startswith(contract) and row.endswith("BROKEN") for row in result.stdout.splitlines()), result.stdout


def test_a_module_without_a_place_breaks_the_contract(copied_source):
    (copied_source / "gainstage" / "unplaced.py").write_text("", encoding="utf-8")
    result = lint_imports(copied_source, copied_source.parent / "pyproject.toml")
    assert result.returncode == 1
    assert "unplaced" in result.stdout
