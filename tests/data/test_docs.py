"""The commands of docs/data.md run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.M | re.S
)


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    assert len(BLOCKS) == 4
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "outputs"):
            (tmp_path / entry.name).symlink_to(entry)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "PYTHON": sys.executable}
    for kind, text in BLOCKS:
        command = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-c", text]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, f"{text}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
