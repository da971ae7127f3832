"""Training runs, in this process, on several ranks or under torchrun, and a look at them."""

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
from rollout import start_distributed

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy"
PATIENCE = 600  # seconds for a verdict: a busy machine must not change one where runs are compared
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(THREADS))
# Where fewer instructions are allowed than the CPU has, bf16 attention asks for those [torch 2.13].
LIMITED = 'torch.backends.cuda.enable_flash_sdp("ATEN_CPU_CAPABILITY" not in os.environ)'
exec(LIMITED)
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = {name: value for name, value in os.environ.items() if name not in RANK}
ALONE["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
# 400 problems, because each run renders all of them. Small steps that soon visit stage 2.
FEW = Path(tempfile.mkdtemp(prefix="scrpo_tests_")) / "few.jsonl"
FEW.write_text("".join((TOY / "train.jsonl").read_text().splitlines(keepends=True)[:400]))
TINY = (f"{ROOT}/configs/toy.yaml --train_data {FEW} --questions_per_step 4 --group_size 4 --pool_trigger 4 --steps 6 "
        "--save_every 3 --eval_questions 0 --schedule constant").split()  # fmt: skip


@dataclass
class Result:
    """A finished run: its exit code, what it said, and its output folder."""

    code: int
    out: str
    err: str
    folder: Path

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def metrics(self) -> list[dict]:
        return self.lines("metrics.jsonl")

    @property
    def steps(self) -> list[dict]:
        """The metrics without step 0, which is the evaluation before."""
        return self.metrics[1:]

    @property
    def samples(self) -> list[dict]:
        """All of them, at TINY's size."""
        return self.lines("samples.jsonl")

    @property
    def weights(self) -> dict:
        return load_file(self.folder / "final" / "model.safetensors")

    @property
    def errors(self) -> list[str]:
        """What the program says on standard error, not its progress bar or torchrun."""
        return re.findall(r"(?:error|warning): [^\r\n]*", self.err)

    def comparable(self) -> list[dict]:
        """The metrics but for what the clock and the machine say."""
        machine = ("seconds", "tokens_per_second", "peak_memory_gb")
        return [{k: v for k, v in line.items() if k not in machine} for line in self.metrics]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Patient(reward.Grader):
    """One for all runs of this process: a context that does not end it."""

    def __exit__(self, *exception):
        pass


@pytest.fixture(scope="session")
def launch():
    """launch(folder, *flags) -> Result of train.main in this process, as one rank."""
    import train

    reward.START, grader = PATIENCE, Patient(workers=1, deadline=PATIENCE)

    def run(folder, *flags, first=TINY) -> Result:
        where = ["--output_dir", folder] if folder is not None else []
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(reward, "Grader", lambda: grader)
            for name in RANK:
                patch.delenv(name, raising=False)
            try:
                train.main([str(flag) for flag in (*first, *where, *flags)])
            except SystemExit as end:
                code = end.code or 0
        return Result(code, out.getvalue(), err.getvalue(), folder)

    yield run
    grader.close()


@pytest.fixture
def alone(monkeypatch):
    """A process group of one, as train.py's own."""
    for name in RANK:
        monkeypatch.delenv(name, raising=False)
    start_distributed()
    yield
    torch.distributed.destroy_process_group()


SERVER = f"""
import json, os, sys, traceback
import matplotlib.pyplot, reward, torch, train  # now, so that not each run has to
{LIMITED}
"""
SERVER += """

class Marks:  # no worker processes: the toy's answers are whole numbers
    __enter__, __exit__ = lambda self: self, lambda self, *exception: None
    def verdicts(self, responses, golds, problems=None):
        answers = [reward.final_answer(response) or "-" for response in responses]
        right = [a.isdigit() and int(a) == int(gold) for a, gold in zip(answers, golds)]
        return ["right" if r else "wrong" for r in right]

reward.Grader = Marks
for line in sys.stdin:
    job, pids, codes = json.loads(line), [], {}
    # The store is the parent's, as under torchrun.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(job["ranks"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream)
                os.ftruncate(stream, 0)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                              TORCHELASTIC_USE_AGENT_STORE="True")
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
    print(json.dumps(pids), flush=True)
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - set(codes) if codes[pid] else ():
            os.kill(other, 15)  # torchrun ends all when one fails
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


class Ranks:
    """ranks(folder, *flags, ranks=2, patch="") -> a run on several ranks, one at a time.

    As torchrun's, without the seconds that importing takes: each is forked from a server that has
    imported everything. `patch` is code that each rank runs first: faults at a chosen place.
    """

    server = None

    def __init__(self, folder, *flags, ranks=2, patch=""):
        if Ranks.server is None:
            Ranks.server = start([sys.executable, "-c", SERVER])
        self.folder, self.log, self.codes = folder, f"{folder}.log", None
        flags = [str(flag) for flag in (*TINY, "--output_dir", folder, *flags)]
        job = {"ranks": ranks, "log": self.log, "patch": patch, "flags": flags}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        self.pids = json.loads(self.server.stdout.readline())

    def said(self, rank=0, stream="out") -> str:
        path = Path(f"{self.log}.{rank}.{stream}")
        return path.read_text() if path.exists() else ""  # a moment after the fork it is not

    def kill(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def alive(self) -> bool:
        with suppress(OSError):
            return " Z " not in Path(f"/proc/{self.pids[0]}/stat").read_text()
        return False

    def result(self) -> Result:
        """Waits for all ranks; `codes` has their exit codes, negative for a signal."""
        self.codes = self.codes or json.loads(self.server.stdout.readline())
        code = next((code for code in self.codes if code), 0)
        return Result(code, self.said(), self.said(0, "err"), self.folder)


@pytest.fixture(scope="session")
def ranks():
    yield Ranks
    if Ranks.server:
        Ranks.server.communicate()


def start(command, **streams) -> subprocess.Popen:
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) | streams
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=ALONE, **streams)


@pytest.fixture
def torchrun():
    """torchrun(folder, *flags) -> torchrun, running; it ends at the latest here."""
    started = []

    def run(folder, *flags, nodes="--standalone --nproc_per_node=2", breaks=""):
        script = folder.with_suffix(".py")
        script.write_text(f"import os, torch, train\n{LIMITED}\n{breaks}\ntrain.main()")
        command = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), script, *TINY]
        both = dict(stderr=subprocess.PIPE)
        started.append(start([*command, "--output_dir", folder, *flags], **both))
        return started[-1]

    yield run
    for process in started:
        process.terminate()
        process.communicate(timeout=60)
