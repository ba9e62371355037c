"""What the command line says on machines, and of names, that are not as it would have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.bundles import write_bundle, write_noisy_images

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


def test_a_name_that_is_no_utf_8_is_printed_with_codes(tmp_path):
    data, bundle = write_noisy_images(tmp_path / "data", 40), write_bundle(tmp_path / "bundle")
    broken = Path(os.fsdecode(os.fsencode(data) + b"/dark/caf\xe9.png"))
    broken.write_bytes(b"broken")
    done = run("calibrate", bundle, "--data", data, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert r"skipped 1 files; the first: " in done.stdout and r"caf\udce9.png: " in done.stdout


def test_a_machine_without_a_compiler_is_one_sentence(folder, tmp_path):
    words = ["--data", folder, "--out", tmp_path / "run", "--device", "cpu", "--compile"]
    words += ["--architecture", "resnet10", "--width", 8, "--size", 16, "--batch-size", 16]
    cache = str(tmp_path / "cache")  # where nothing was compiled before
    done = run("train", *words, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the network cannot be compiled (No working C++ compiler ")
    assert last.endswith("; leave --compile out")
