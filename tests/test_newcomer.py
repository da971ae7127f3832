"""README's commands and its script of a first experiment, as they are written, with nothing but Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
def test_the_first_command_and_the_first_experiment(tmp_path):
    """In an empty virtual environment, without this one's variables."""
    first, experiment = BLOCKS[0], next(block for block in BLOCKS if "hard_questions.py" in block)
    assert len(re.search(r"<<'EOF'\n(.*?)^EOF", experiment, re.M | re.S)[1].splitlines()) <= 12
    folder, ours = tmp_path / "scrpo", f"{sys.prefix}/bin"
    ignored = shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    kept = ("HOME", "LANG", "TMPDIR", "PIP_", "SSL_", "OMP_", "HTTP", "http", "NO_PROXY", "no_proxy")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment["PATH"] = ":".join(p for p in os.environ["PATH"].split(":") if p != ours)
    script = f"python3 -m venv .venv\nsource .venv/bin/activate\n{first}{experiment}"
    run = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "answered right" in run.stdout and "runs/eval/hard" in run.stdout
    pools = [[m.split('"pool_size": ')[1].split(",")[0] for m in open(folder / f"runs/{name}/metrics.jsonl")]
             for name in ("plain", "hard")]  # fmt: skip
    assert pools[0] != pools[1]  # the script's filter was in force
