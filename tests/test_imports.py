"""Data flows one way through the packages; what must start fast imports nothing slow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_packages_import_only_from_packages_before_them() -> None:
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["mmtrain", "mmtrain.cli", "mmtrain.config", "mmtrain.verbs"])
def test_what_must_start_fast_imports_nothing_slow(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str([n for n in ('torch', 'hydra', 'numpy', 'faiss') if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"
