"""Imports point one way, and what must stay light imports nothing heavy."""

import ast
from pathlib import Path

import pytest

from server import compiled

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "training", "server", "deploy")
FORBIDDEN = {
    "model": {"training", "server", "deploy"},
    "training": {"server", "deploy"},
    "server": {"training", "deploy"},
    "deploy": {"training"},
}
HEAVY = {"torch", "numpy", "asyncio", "threading", "concurrent", "fastapi", "pydantic"}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(file):
    """The top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    assert sources(package)
    for file in sources(package):
        assert not FORBIDDEN[package] & set(imported(file)), file


@pytest.mark.parametrize("name", ["scheduler", "jobs", "overload", "costs"])
def test_what_decides_knows_no_tensors_and_no_threads(name):
    assert not HEAVY & set(imported(ROOT / f"server/{name}.py"))


def test_only_what_speaks_http_imports_the_web_framework():
    assert not [f for p in ("model", "training") for f in sources(p) if "fastapi" in imported(f)]


def test_openvino_is_imported_only_where_it_can_tell_nobody():
    """Behind `server.compiled`, which keeps from it what it tells its makers with."""
    files = [f for p in PACKAGES for f in sources(p) if "openvino" in imported(f)]
    assert {f.name for f in files} == {"compiled.py", "compile.py"}
    assert "from server.compiled import" in (ROOT / "server/compile.py").read_text()
    assert compiled.sys.modules["openvino_telemetry"] is None


def test_no_file_is_a_drawer_for_everything():
    for package in (*PACKAGES, "tests"):
        for file in sources(package):
            assert file.stem not in {"utils", "util", "helpers", "misc", "common"}, file


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_says_in_one_sentence_what_it_is(package):
    for file in sources(package):
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert docstring, f"{file} has no docstring"
        assert docstring.split("\n\n")[0].endswith("."), file
