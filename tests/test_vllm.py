"""vLLM's engine, for real, on its CPU build: under torchrun with 1 and 2 ranks, beside a DistributedDataParallel trainer.

This file is also what torchrun starts: `worker` below runs in every rank, and writes what it found to a JSON file of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOY = str(ROOT / "toy")
PADDING = 37  # rows of the embedding that no token has

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: pip install -r requirements-vllm.txt (GPU) or requirements-vllm-cpu.txt",
                allow_module_level=True)  # fmt: skip


def environment():
    quiet = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_LOGGING_LEVEL": "ERROR"}
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in left_out} | quiet | {"PYTHONPATH": str(ROOT)}


def torchrun(ranks: int, script: str, *arguments, timeout=900, **variables):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*launcher, script, *map(str, arguments)], cwd=ROOT, env=environment() | variables, text=True,
                          capture_output=True, timeout=timeout)  # fmt: skip


def work(ranks: int, *arguments, timeout=900) -> list[dict]:
    """What each rank's `worker` reports, in rank order."""
    with tempfile.TemporaryDirectory() as folder:  # not printed: two ranks' lines may get into one another
        done = torchrun(ranks, __file__, *arguments, timeout=timeout, REPORTS=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One run with one rank and one with two, of a model with tied embeddings, padded beyond the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    model = AutoModelForCausalLM.from_pretrained(TOY)
    model.resize_token_embeddings(len(tokenizer) + PADDING)
    with torch.no_grad():  # likely ids, if they were not forbidden: the mean direction, and stronger
        embedding = model.get_input_embeddings().weight
        embedding[len(tokenizer) :] = 1.5 * embedding[tokenizer("Step 1").input_ids[-1]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer) + PADDING
    return {ranks: work(ranks, folder) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_and_trainer_agree_after_every_push(reports, ranks):
    for report in reports[ranks]:
        for when in ("loaded", "pushed", "pushed ten times"):
            assert report[when]["max"] <= 1e-3, (when, report)
            assert report[when]["greedy"] == 1.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_push_shows(reports, ranks):
    for report in reports[ranks]:
        assert report["not pushed"]["mean"] > 1e-2 and report["not pushed"]["max"] > 0.5


def test_a_sample_follows_from_its_seed_on_any_rank(reports):
    """Rank r of 2 had every second question, and so another batch."""
    (alone,), both = reports[1], reports[2]
    assert len({json.dumps(s) for group in alone["ids"] for s in group}) > len(alone["ids"])
    for b, group in enumerate(alone["ids"]):
        assert group == both[b % 2]["ids"][b // 2]
    assert not alone["other seeds"] and alone["again"] and all(report["again"] for report in both)


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_is_forbidden_and_endings_are_honest(reports, ranks):
    for report in reports[ranks]:
        assert report["padding mass"] > 0.01, "the test's padding should have been likely"
        assert report["highest id"] < report["tokenizer"]
        assert report["endings"] == {"finished has eos last": True, "cut off is full": True, "both occur": True}
        assert report["lengths agree"] and report["progress"] == report["samples"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_s_process_group_survives(reports, ranks):
    assert [report["sum of ranks + 1"] for report in reports[ranks]] == [sum(range(1, ranks + 1))] * ranks
    weights = [report["weights"] for report in reports[ranks]]
    assert weights == weights[:1] * ranks  # DDP kept the ranks alike through updates around the engine


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_in_the_engine_is_one_line_that_names_it(reports, ranks):
    for report in reports[ranks]:
        assert report["error"].startswith("vLLM engine: ") and "\n" not in report["error"]
        assert report["after the error"]["max"] <= 1e-3


def test_the_self_test_passes():
    done = torchrun(2, "rollout.py", "--selftest", "toy", "--rollout", "vllm")
    assert done.returncode == 0 and done.stdout.count("PASS") == 2, done.stdout + done.stderr[-3000:]


def test_the_self_test_without_torchrun():
    command = [sys.executable, "rollout.py", "--selftest", "toy", "--rollout", "vllm"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=900)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("PASS"), done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("how", ["out of memory", "killed"])
def test_an_engine_lost_in_mid_generation_ends_every_rank(how, tmp_path):
    """Training with two ranks; rank 1's engine fails, or dies with its process, at its 60th step of sampling."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""if __name__ == "__main__":
    import os, signal, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch, vllm.v1.engine.llm_engine as engine, train
    step, calls = engine.LLMEngine.step, []
    def failing(self):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 60:
            if {how == "killed"}:
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("out of memory, in the test")
        return step(self)
    engine.LLMEngine.step = failing
    train.main(sys.argv[1:])
""")
    flags = "--rollout vllm --max_context 512 --questions_per_step 4 --group_size 4 --steps 50 --eval_questions 0 --updates_per_rollout 1"
    done = torchrun(2, str(driver), *flags.split(), "--pool_trigger", 4, "--output_dir", tmp_path / "out", timeout=600)
    errors = re.findall(r"error: rank (\d), after step \d+: (.*)", done.stderr)  # may follow a progress bar's line
    assert done.returncode != 0, done.stderr[-3000:]
    if how == "killed":  # torchrun names it; rank 0 does unless torchrun's SIGTERM came first, while it was sampling
        assert "exitcode  : -9" in done.stderr and all(cause.startswith("lost rank 1") for _, cause in errors)
    else:  # the line may blame a rank that had not noticed yet, the rank's traceback has the cause
        assert errors, done.stderr[-3000:]
        cause = (tmp_path / "out" / "error_rank_1.txt").read_text()
        assert "RuntimeError: vLLM engine: OutOfMemoryError: out of memory, in the test\n" in cause


@pytest.mark.slow
def test_200_rollouts_with_pushes_in_flat_memory():
    (report,) = work(1, TOY, "memory", timeout=3000)
    early, late = report["resident"][40:60], report["resident"][180:]
    assert max(late) <= 1.05 * min(early), report["resident"][::20]
    assert report["max"] <= 1e-3


# ---------------------------------------------------------------------------------------------------- in each rank


def worker(folder: str, mode: str = "report") -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout import disagreement, load_problems, make_engine, render, sample_seed

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = make_engine("vllm", model, tokenizer, model_path=folder, max_context=256)
    policy = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    problems = load_problems(f"{TOY}/train.jsonl")
    mine = range(rank, 11, world)  # 6 questions on rank 0 of 2, 5 on rank 1
    prompts = [render(tokenizer, problems[b].problem) for b in mine]
    report = {"rank": rank, "tokenizer": len(tokenizer)}

    def sample(step=0, length=80, n=4, **options):
        seeds = [[sample_seed(0, step, b, i) for i in range(n)] for b in mine]
        return engine.generate(prompts, n, temperature=0.7, max_new_tokens=length, seeds=seeds, **options)

    def compare():
        mean, most, _ = disagreement(Cut(model, len(tokenizer)), prompts, sample(), 0.7)
        greedy = engine.generate(prompts, 1, temperature=0.0, max_new_tokens=60, seeds=[[0]] * len(prompts))
        return {"mean": mean, "max": most, "greedy": disagreement(Cut(model, len(tokenizer)), prompts, greedy, 1.0)[2]}

    def update():
        for p in prompts[:2]:
            policy(input_ids=torch.tensor([p]), labels=torch.tensor([p])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def push():
        engine.sleep()
        engine.wake()
        engine.update_weights(model)

    if mode == "memory":
        report["resident"] = []
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 1e-4
            update()
            push()
            sample(step, n=2)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            report["resident"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        report |= compare()
    else:
        report["loaded"] = compare()
        finished = []
        groups = sample(progress=finished.append)
        samples = [s for group in groups for s in group]
        report["ids"] = [[s.token_ids for s in group] for group in groups]
        report["again"] = [[s.token_ids for s in group] for group in sample()] == report["ids"]
        report["other seeds"] = [[s.token_ids for s in group] for group in sample(step=1)] == report["ids"]
        report |= {"progress": sum(finished), "samples": len(samples)}
        report["highest id"] = max(max(s.token_ids) for s in samples)
        first = torch.tensor([prompts[0] + samples[0].token_ids])
        with torch.no_grad():
            report["padding mass"] = model(first).logits.softmax(-1)[..., len(tokenizer) :].sum(-1).max().item()
        short = [s for group in sample(length=42) for s in group]
        eos = tokenizer.eos_token_id
        report["endings"] = {
            "finished has eos last": all((s.token_ids[-1] == eos) == s.finished for s in short),
            "cut off is full": all(s.finished or len(s.token_ids) == 42 for s in short),
            "both occur": {s.finished for s in short} == {True, False},
        }
        report["lengths agree"] = all(len(s.token_ids) == len(s.logprobs) for s in short)
        update()
        report["not pushed"] = compare()
        push()
        report["pushed"] = compare()
        for _ in range(10):
            update()
            push()
        report["pushed ten times"] = compare()
        try:
            engine.generate([[300] * 300], 1, temperature=1.0, max_new_tokens=5, seeds=[[0]])
        except RuntimeError as error:
            report["error"] = str(error)
        report["after the error"] = compare()
        number = torch.tensor(rank + 1)
        dist.all_reduce(number)
        report["sum of ranks + 1"] = number.item()
        report["weights"] = [w.double().sum().item() for w in model.parameters()]
    Path(os.environ["REPORTS"], f"{rank}.json").write_text(json.dumps(report))


class Cut:
    """The trainer's model without the padding of its embedding, whose mass the engine gives to the other ids."""

    def __init__(self, model, vocabulary):
        self.model, self.vocabulary, self.device = model, vocabulary, model.device

    def __call__(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits[..., : self.vocabulary]
        return out


if __name__ == "__main__":
    worker(*sys.argv[1:])
