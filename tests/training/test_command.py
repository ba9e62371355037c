"""What the command line says on machines that are not as it would have them."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # each process imports torch anew


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "training", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_machine_without_a_compiler_is_one_sentence(folder, tmp_path):
    words = ["--data", folder, "--out", tmp_path / "run", "--device", "cpu", "--compile"]
    words += ["--architecture", "resnet10", "--width", 8, "--size", 16, "--batch-size", 16]
    cache = str(tmp_path / "cache")  # where nothing was compiled before
    done = run("train", *words, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the network cannot be compiled (InvalidCxxCompiler: ")
    assert last.endswith("; leave --compile out")
