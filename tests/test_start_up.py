"""What the command line and the package load, and when."""

import ast
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gainstage


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(Path(gainstage.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inspect", "--help"], ["plan", "--help"], ["verify", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
        import sys
        from gainstage.cli import main
        main({arguments!r}, standalone_mode=False)
        print("heavy:", sorted({{"torch", "numpy", "rich", "scipy", "gainstage.api"}} & set(sys.modules)))
    """
    assert python(textwrap.dedent(code)).endswith("heavy: []\n")


def test_help_takes_three_tenths_of_a_second_of_the_processor():
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def spent():
        before = seconds()
        python("from gainstage.cli import main; main(['--help'], standalone_mode=False)")
        return seconds() - before

    assert min(spent() for _ in range(5)) < 0.3


def test_the_package_runs_as_a_module():
    environment = {**os.environ, "PYTHONPATH": str(Path(gainstage.__file__).parents[1])}
    command = [sys.executable, "-m", "gainstage", "--version"]
    assert gainstage.__version__ in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_public_names_are_the_same_for_type_checkers_and_at_run_time():
    tree = ast.parse(Path(gainstage.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: statement.module for statement in guarded.body for alias in statement.names}
    modules = {name for name, home in typed.items() if home == "gainstage"}
    assert all(getattr(gainstage, name).__name__ == f"gainstage.{name}" for name in modules)
    assert sorted(typed.keys() - modules) == gainstage.__all__
    for name, home in typed.items() - {(name, "gainstage") for name in modules}:
        assert getattr(gainstage, name) is getattr(sys.modules[home], name)


def test_importing_a_stage_does_not_hide_the_function_of_its_name():
    code = "import gainstage.plan, gainstage as gs, gainstage.apply, gainstage.verify; print(gs.plan.__name__, gs.apply.__name__)"
    assert python(code).split() == ["plan", "apply"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        _ = gainstage.initialise
