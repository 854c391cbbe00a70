"""Pages that say how to add something: a copy of the repository in which a page was followed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["docs", "kernels", "lmoe", "tests", "train_configs", "train.py", "run_train.sh"]
STEP = r"`([\w/]+\.py)`:\n\n```(python|diff)\n(.*?)^```"


def apply(diff: str, text: str) -> str:
    """Apply a diff in hunks that begin with @@; what a hunk names stands in the text once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(before) == 1, before
        text = text.replace(before, "".join(line[1:] for line in lines if line[0] in " +"))
    return text


def follow(page: Path, root: Path):
    """Copy the repository to root and do there what the page says: write or extend a file before
    each block of Python, apply each diff, and run the shell commands. Returns their outputs."""
    for name in [*NAMES, "pyproject.toml"]:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    text = page.read_text()
    for path, kind, block in re.findall(STEP, text, re.M | re.S):
        path = root / path
        before = path.read_text() + "\n\n" if path.exists() and kind == "python" else ""
        path.write_text(before + block if kind == "python" else apply(block, path.read_text()))
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHON": sys.executable}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"XDG_CACHE_HOME": str(root / "cache")}
    outputs = []
    for command in "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines():
        run = subprocess.run(
            ["bash", "-euc", command], cwd=root, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        outputs.append(run.stdout)
    return outputs
