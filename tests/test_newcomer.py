"""The README's page for newcomers, run as it is written: every command of it, on a machine with nothing but Python."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands() -> str:
    page = re.search(r"^## Your first own experiment\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S))


@pytest.mark.slow
def test_from_git_clone_to_an_own_experiment_in_under_30_minutes(tmp_path):
    """In a home of its own, without this environment's Python. What is cloned is what is committed."""
    keep = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_")) or "proxy" in name.lower()}
    path = ":".join(p for p in os.environ["PATH"].split(":") if p != f"{os.environ.get('VIRTUAL_ENV')}/bin")
    git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    environment = {**keep, **git, "PATH": path, "HOME": os.environ["HOME"], "SCRPO": str(ROOT)}
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
