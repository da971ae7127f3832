"""The README's page for newcomers, run as it is written: every command of it, with nothing but Python and git."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands() -> str:
    page = re.search(r"^## Your first own experiment\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S))


@pytest.mark.slow
def test_from_git_clone_to_an_own_experiment_in_under_30_minutes(tmp_path):
    """Without this virtual environment and its variables. What is cloned are the files as they are now, committed."""
    source, ours = tmp_path / "source", f"{sys.prefix}/bin"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*cache"))
    author = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in ("init -q", "add -A", "commit -qm now"):
        subprocess.run(["git", *command.split()], cwd=source, env={**os.environ, **author}, check=True)
    kept = ("HOME", "LANG", "TMPDIR", "PIP_", "SSL_", "OMP_", "HTTP", "http", "NO_PROXY", "no_proxy")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment["PATH"] = ":".join(part for part in os.environ["PATH"].split(":") if part != ours)
    environment["SCRPO"] = str(source)
    started = time.monotonic()
    run = subprocess.run(["bash", "-e", "-c", commands()], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert time.monotonic() - started < 30 * 60
    runs = tmp_path / "scrpo" / "runs"
    (comparison,) = runs.glob("eval/*-vs-*/comparison.json")
    assert {Path(name).name for name in json.loads(comparison.read_text())["difference"]} == {"hard", "strict"}
    pools = {name: [json.loads(line)["pool_size"] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("plain", "hard", "strict")}  # fmt: skip
    assert len({tuple(sizes) for sizes in pools.values()}) == 3  # filter and reward of the scripts were in force
