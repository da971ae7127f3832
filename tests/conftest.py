"""What several test files need: training runs, in this process or under torchrun, and a look at what they wrote."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
TINY = "--questions_per_step 8 --pool_trigger 8 --steps 6 --save_every 3 --eval_questions 0 --schedule constant".split()


@dataclass
class Result:
    """A finished run: its exit code, what it said, and its output folder."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        return self.lines("metrics.jsonl")

    @property
    def steps(self) -> list[dict]:
        """The metrics without step 0, which is the evaluation before."""
        return self.metrics[1:]

    @property
    def samples(self) -> list[dict]:
        return self.lines("samples.jsonl")

    @property
    def weights(self) -> dict:
        return load_file(self.folder / "final" / "model.safetensors")

    @property
    def errors(self) -> list[str]:
        """What is said on standard error by the program itself, not by its progress bar or torchrun."""
        return re.findall(r"(?:error|warning): [^\r\n]*", self.err)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def comparable(self) -> list[dict]:
        """The metrics but for what the clock and the machine say."""
        return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gb")} for line in self.metrics]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def launch():
    """launch(folder, *flags) -> Result of train.main in this process, as one rank, with TINY's settings before `flags`;
    `settings` may be a YAML file, which has to come first of all."""
    import train

    torch.set_num_threads(1)

    def ended(code):  # `os._exit` would end the tests too
        raise SystemExit(code)

    def main(folder, *flags, tiny=True, settings=()) -> Result:
        where = ["--output_dir", folder] if folder is not None else []
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        handler, out, err, code = signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(os, "_exit", ended)
            try:
                train.main([str(flag) for flag in (*settings, *TINY * tiny, *where, *flags)])
            except SystemExit as end:
                code = end.code or 0
            finally:
                signal.signal(signal.SIGTERM, handler)
                if dist.is_initialized():
                    dist.destroy_process_group()
                for name in RANK_VARIABLES:
                    os.environ.pop(name, None)
        return Result(code, out.getvalue(), err.getvalue(), Path(folder) if folder is not None else None)

    return main


class Torchrun(subprocess.Popen):
    """`torchrun train.py` with TINY's settings, in a session of its own, so that it can be killed with all its children."""

    def __init__(self, folder, *flags, ranks=2, script=None, elastic=(), tiny=True):
        self.folder = Path(folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *elastic,
                   script or ROOT / "train.py", *TINY * tiny, "--output_dir", folder, *flags]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        super().__init__([str(part) for part in command], cwd=ROOT, text=True, start_new_session=True,
                         env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def workers(self) -> list[int]:
        """Process ids of the ranks that live, in rank order."""
        found = []
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            found += [int(pid) for pid in children.read_text().split()]
        return found

    def kill_all(self) -> None:
        """As when the machine goes down: torchrun, ranks and graders at once. Each rank has a session of its own."""
        for group in (*self.workers(), self.pid):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.communicate()

    def result(self, timeout=240) -> Result:
        out, err = self.communicate(timeout=timeout)
        return Result(self.returncode, out, err, self.folder)


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(folder, *flags, ranks=2) -> a running Torchrun; whatever is still alive at the end is killed."""
    started = []

    def start(*arguments, **options) -> Torchrun:
        started.append(Torchrun(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill_all()
