"""README's commands and its script of a first experiment, as written, with nothing but Python."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)


@pytest.mark.slow
def test_the_first_command_and_the_first_experiment(tmp_path):
    """In an empty virtual environment, without this one's variables."""
    first, experiment = BLOCKS[0], next(block for block in BLOCKS if "hard_questions.py" in block)
    assert re.search(r"<<'EOF'\n(.*?)^EOF", experiment, re.M | re.S)[1].count("\n") <= 12
    folder, ours = tmp_path / "scrpo", f"{sys.prefix}/bin"
    ignored = shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    kept = ("HOME", "LANG", "TMPDIR", "PIP_", "SSL_", "OMP_", "HTTP", "http", "NO_PROXY",
            "no_proxy")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment["PATH"] = ":".join(p for p in os.environ["PATH"].split(":") if p != ours)
    script = f"python3 -m venv .venv\nsource .venv/bin/activate\n{first}{experiment}"
    run = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "answered right" in run.stdout and "runs/eval/hard" in run.stdout
    pools = []
    for name in ("plain", "hard"):
        log = (folder / f"runs/{name}/metrics.jsonl").read_text()
        pools.append(re.findall(r'"pool_size": \d+', log))
        asked = int(re.findall(r'"questions": (\d+)', log)[-1])
        assert asked == int(re.search(r"runs ask (\d+) questions", README)[1])
    plain, hard = pools
    assert plain != hard  # the script's filter was in force
