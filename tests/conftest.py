"""What several test files need: training runs, in this process or under torchrun, and a look at what they wrote."""

import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import reward
from reward import Grader

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PATIENCE = 600  # seconds for a grading: runs are compared bit for bit, and a busy machine must not change a verdict
FEW = Path(tempfile.mkdtemp(prefix="scrpo_tests_")) / "few.jsonl"  # 400 problems; 6,000 golds take seconds to check
TINY = ["--train_data", FEW, *"--questions_per_step 8 --pool_trigger 8 --steps 6 --save_every 3".split(),
        *"--eval_questions 0 --schedule constant --grader_workers 1".split()]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def few():
    FEW.write_text("".join((ROOT / "toy" / "train.jsonl").read_text().splitlines(keepends=True)[:400]))
    yield
    shutil.rmtree(FEW.parent)


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
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gb")}
            for line in self.metrics
        ]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def launch():
    """launch(folder, *flags) -> Result of train.main in this process, as one rank, with TINY's settings before
    `flags`; `settings` may be a YAML file, which has to come first of all."""
    import train

    torch.set_num_threads(1)

    def ended(code):  # `os._exit` would end the tests too
        raise SystemExit(code)

    def main(folder, *flags, tiny=True, settings=()) -> Result:
        where = ["--output_dir", folder] if folder is not None else []
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(os, "_exit", ended)
            patch.setattr(reward, "START", PATIENCE)
            patch.setattr(train, "Grader", functools.partial(Grader, deadline=PATIENCE))
            try:
                train.main([str(flag) for flag in (*settings, *TINY * tiny, *where, *flags)])
            except SystemExit as end:
                code = end.code or 0
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
                for name in RANK_VARIABLES:
                    os.environ.pop(name, None)
        return Result(code, out.getvalue(), err.getvalue(), Path(folder) if folder is not None else None)

    return main


SERVER = (
    f"PATIENCE = {PATIENCE}"
    + """
import functools, json, os, sys, traceback
import matplotlib, reward, torch, train

matplotlib.use("Agg")
import matplotlib.pyplot  # now, so that not each run has to

reward.START, train.Grader = PATIENCE, functools.partial(reward.Grader, deadline=PATIENCE)

for line in sys.stdin:
    job, ranks, environment = json.loads(line), [], {}
    if not job["port"]:  # the store is the parent's, as under torchrun, and outlives the ranks
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for rank in range(job["ranks"]):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.setsid()
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=job["port"] or str(store.port), **environment)
            code = 1
            try:
                exec(job["patch"], {"train": train, "rank": rank, "os": os})
                train.main(job["flags"])
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps(ranks), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]), flush=True)
"""
)


class Ranks:
    """A run on several ranks, each a process of its own: as torchrun's, without the seconds that importing takes.

    A server imports everything once; each rank is forked from it, in a session of its own. `patch` is Python code that
    each rank runs first, and that sees `train`, `os` and its `rank`: faults at a chosen place. With `agent` off, the
    store that ranks meet at is rank 0's own.
    """

    server = None

    def __init__(self, folder, *flags, ranks=2, patch="", tiny=True, agent=True):
        if Ranks.server is None:
            Ranks.server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {"OMP_NUM_THREADS": "1"},
            )
        self.folder, self.log, self.codes = Path(folder), f"{folder}.log", None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = None if agent else str(free.getsockname()[1])
        flags = [str(flag) for flag in (*TINY * tiny, "--output_dir", folder, *flags)]
        job = {"ranks": ranks, "log": self.log, "port": port, "patch": patch, "flags": flags}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        self.pids = json.loads(self.server.stdout.readline())

    def said(self, rank=0, stream="out") -> str:
        path = Path(f"{self.log}.{rank}.{stream}")
        return path.read_text() if path.exists() else ""  # a rank that was forked a moment ago has not opened it yet

    def kill(self, *ranks, sent=signal.SIGKILL) -> None:
        """To these ranks, or to all; SIGKILL also to their graders, as when a machine goes down."""
        for rank in ranks or range(len(self.pids)):
            with suppress(ProcessLookupError):
                os.killpg(self.pids[rank], sent) if sent == signal.SIGKILL else os.kill(self.pids[rank], sent)

    def alive(self, rank) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def result(self) -> Result:
        """Waits for all ranks; `codes` has their exit codes, negative for a signal."""
        self.codes = self.codes or json.loads(self.server.stdout.readline())
        return Result(max(self.codes, key=abs), self.said(0), self.said(0, "err"), self.folder)


@pytest.fixture(scope="session")
def ranks():
    """ranks(folder, *flags, ranks=2, patch="") -> a running Ranks; wait for its result before the next one starts."""
    yield Ranks
    if Ranks.server:
        Ranks.server.stdin.close()
        Ranks.server.wait(60)


class Torchrun(subprocess.Popen):
    """`torchrun train.py` with TINY's settings, in a session of its own, to be killed with its children."""

    def __init__(self, folder, *flags, ranks=2, script=None, elastic=(), tiny=True):
        self.folder = Path(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, *elastic,
                   script or ROOT / "train.py", *TINY * tiny, "--output_dir", folder, *flags]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        super().__init__([str(part) for part in command], cwd=ROOT, text=True, start_new_session=True, env=environment,
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
