"""What several test files need: runs in this process, on several ranks or under torchrun, and a
look at what they wrote."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reward

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"
PATIENCE = 600  # seconds for a verdict: a busy machine must not change one where runs are compared
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
torch.set_num_threads(THREADS)
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ALONE |= {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
PIPES = dict(text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
# 400 problems, because each run renders all of them. Small steps that soon visit stage 2.
FEW = Path(tempfile.mkdtemp(prefix="scrpo_tests_")) / "few.jsonl"
FEW.write_text("".join((TOY / "train.jsonl").read_text().splitlines(keepends=True)[:400]))
TINY = f"--train_data {FEW} --questions_per_step 4 --group_size 4 --pool_trigger 4 --steps 6 " \
       "--save_every 3 --eval_questions 0 --schedule constant"  # fmt: skip


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
        """All of them, at TINY's size: 16 a step."""
        return self.lines("samples.jsonl")

    @property
    def weights(self) -> dict:
        return load_file(self.folder / "final" / "model.safetensors")

    @property
    def errors(self) -> list[str]:
        """What the program says on standard error, not its progress bar or torchrun."""
        return re.findall(r"(?:error|warning): [^\r\n]*", self.err)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def comparable(self) -> list[dict]:
        """The metrics but for what the clock and the machine say."""
        machine = ("seconds", "tokens_per_second", "peak_memory_gb")
        return [{k: v for k, v in line.items() if k not in machine} for line in self.metrics]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def patient():
    """A grader for all runs of this process; a context that does not end it."""

    class Patient(reward.Grader):
        def __exit__(self, *exception):
            pass

    reward.START = PATIENCE
    grader = Patient(workers=1, deadline=PATIENCE)
    yield grader
    grader.close()


@pytest.fixture(scope="session")
def launch(patient):
    """launch(folder, *flags) -> Result of train.main in this process, as one rank, with TINY's
    settings before `flags`; `settings` may be a YAML file, which has to come first of all."""
    import train

    def run(folder, *flags, tiny=TINY, settings=()) -> Result:
        where = ["--output_dir", folder] if folder is not None else []
        flags = [str(flag) for flag in (*settings, *tiny.split(), *where, *flags)]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(train, "Grader", lambda: patient)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                patch.delenv(name, raising=False)
            try:
                train.main(flags)
            except SystemExit as end:
                code = end.code or 0
        return Result(code, out.getvalue(), err.getvalue(), folder and Path(folder))

    return run


SERVER = """
import json, os, sys, traceback
import matplotlib.pyplot, reward, torch, train  # now, so that not each run has to

class Marks:  # no worker processes: the toy's answers are whole numbers
    __enter__, __exit__ = lambda self: self, lambda self, *exception: None
    def verdicts(self, responses, golds):
        answers = [reward.final_answer(response) or "-" for response in responses]
        right = [a.isdigit() and int(a) == int(gold) for a, gold in zip(answers, golds)]
        return ["right" if r else "wrong" for r in right]

train.Grader = Marks
for line in sys.stdin:
    job, ranks = json.loads(line), []
    # The store is the parent's, as under torchrun.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(job["ranks"]):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.setsid()
            for stream, name in ((1, "out"), (2, "err")):
                log = os.open(f"{job['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, stream)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                              TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
            code = 1
            try:
                exec(job["patch"], {"train": train, "rank": rank, "os": os, "flags": job["flags"]})
                train.main(job["flags"])
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps(ranks), flush=True)
    codes = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(ranks) - set(codes) if codes[pid] else ():
            os.kill(other, 15)  # torchrun ends all when one fails
    print(json.dumps([codes[pid] for pid in ranks]), flush=True)
"""


class Ranks:
    """A run on several ranks, each a process in a session of its own: as torchrun's, without the
    seconds that importing takes, for each is forked from a server that has imported everything.

    `patch` is Python code that each rank runs first, and that sees `train`, `os`, `flags` and its
    `rank`: faults at a chosen place.
    """

    server = None

    def __init__(self, folder, *flags, ranks=2, patch="", tiny=TINY):
        if Ranks.server is None:
            command = [sys.executable, "-c", SERVER]
            Ranks.server = subprocess.Popen(command, cwd=ROOT, env=ALONE, **PIPES)
        self.folder, self.log, self.codes = Path(folder), f"{folder}.log", None
        flags = [str(flag) for flag in (*tiny.split(), "--output_dir", folder, *flags)]
        job = {"ranks": ranks, "log": self.log, "patch": patch, "flags": flags}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        self.pids = json.loads(self.server.stdout.readline())

    def said(self, rank=0, stream="out") -> str:
        path = Path(f"{self.log}.{rank}.{stream}")
        return path.read_text() if path.exists() else ""  # a moment after the fork it is not there

    def kill(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def alive(self, rank) -> bool:
        with suppress(OSError):
            status = Path(f"/proc/{self.pids[rank]}/stat").read_text()
            return status.rpartition(")")[2].split()[0] != "Z"
        return False

    def result(self) -> Result:
        """Waits for all ranks; `codes` has their exit codes, negative for a signal."""
        self.codes = self.codes or json.loads(self.server.stdout.readline())
        code = next((code for code in self.codes if code), 0)
        return Result(code, self.said(0), self.said(0, "err"), self.folder)


@pytest.fixture(scope="session")
def ranks():
    """ranks(folder, *flags, ranks=2, patch="") -> a running Ranks, one at a time."""
    yield Ranks
    if Ranks.server:
        Ranks.server.stdin.close()
        Ranks.server.wait(60)


@pytest.fixture
def torchrun():
    """torchrun(folder, *flags) -> a running torchrun, which ends at the latest here."""
    started = []

    def start(folder, *flags, nodes="--standalone --nproc_per_node=2", script=ROOT / "train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), script,
                   *TINY.split(), "--output_dir", folder, *flags]  # fmt: skip
        command, both = [str(part) for part in command], dict(stderr=subprocess.PIPE, **PIPES)
        started.append(subprocess.Popen(command, cwd=ROOT, env=ALONE, **both))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def children(pid) -> list[int]:
    """The processes that this one has started and that live, oldest first."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(child) for of_thread in lists for child in of_thread)
