"""Whole GRPO training beside TRL 1.16's GRPOTrainer: the same policy, questions, batch, seeds and threads, on a CPU.

    pip install -r bench/requirements.txt       # adds TRL, in its own virtual environment
    python bench/peers.py --write               # about 15 minutes on 2 idle cores; prints a table and puts it in RESULTS.md
    python bench/peers.py --seeds 1 --steps 6   # a look

Each training is a fresh process, the two sides take turns, and which goes first alternates. Both grade by the same
`reward.Grader`, a worker pool around math-verify, so only the trainers differ.

seconds  a step is one rollout with its updates: from the end of one step to the end of the next, everything included.
         The toy, `--seeds` runs of `--steps` steps; the median of each run without its first two steps. On the clock,
         and of CPU time (trainer and graders), which a busy machine hardly changes.
80 %     seconds of training until three steps in a row have answered 80 % of their training questions on average.
memory   the toy with VOCABULARY embedding rows, those beyond the tokenizer practically never sampled. Proportional
         set size (PSS) of the process and all its children, grading workers too, read from /proc every few
         milliseconds: the peak up to the end of the last step, less what was there when step 1 began.
lines    of the package's own modules that such a process has imported when it ends; TRL's come without the
         Trainer of Transformers that it is built on, ours with reward.py, which grades for both.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QUESTIONS, SAMPLES, UPDATES, LONGEST, RATE = 32, 8, 2, 112, 5e-4
MICRO_BATCH = 32  # samples of a forward and backward pass; ours: as many tokens as these have at their longest
VOCABULARY, MEMORY_STEPS = 32_768, 1  # the first step's second update has all that later ones have
PROMPT = 13  # tokens of the toy's longest prompt
NOT_EQUAL = """\
Equal: weights, the questions of each step and their order, prompts, grading, advantages, clip range, loss (`grpo`),
learning rate, AdamW (no decay), gradient norm, fp32, samples of a forward pass. TRL has no logging, saving or progress bar, and
no gradient checkpointing, which would cost it time; ours logs as always. Not equal, and left as each side has it:

- random numbers, so the samples differ after the first token;
- TRL deals samples to the two updates at random, ours by question; expected gradients are the same;
- TRL's optimizer is its default, the fused AdamW, ours the plain one;
- ours does not run samples whose advantage is zero, and sorts samples by length; TRL pads all to the longest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each side and thread count")
    parser.add_argument("--steps", type=int, default=24, help="rollouts of a training")
    parser.add_argument("--only", choices=["time", "memory"], help="half of it")
    parser.add_argument("--launcher", default="", help="command put before each training, such as `taskset -c 0,1`")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child))
    if find_spec("trl") is None:
        print("error: TRL is not installed; pip install -r bench/requirements.txt", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        rows = [] if options.only == "memory" else time_rows(options, Path(folder))
        rows += [] if options.only == "time" else memory_rows(options, Path(folder))
    table = "\n".join(["| measure | must be | ours | TRL | ours / TRL |", "| --- | --- | --- | --- | --- |", *rows])
    print(table)
    if options.write:
        write_results(table)


def write_results(table: str) -> None:
    """Replaces this script's section of RESULTS.md."""
    from importlib.metadata import version

    begin, end = "<!-- peers.py: begin -->", "<!-- peers.py: end -->"
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    command = shlex.join(["python", "bench/peers.py", *sys.argv[1:]])
    text = f"## peers.py\n\n`{command}`, {os.cpu_count()} cores; {versions}\n\n{table}\n\n{NOT_EQUAL}"
    path = ROOT / "bench" / "RESULTS.md"
    before, _, rest = (path.read_text() if path.exists() else "# Measured\n\n").partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2] or chr(10)}")


# ------------------------------------------------------------------------------------------------ rows of the table


def time_rows(options, folder: Path) -> list[str]:
    rows, lines = [], {}
    for threads, limit in ((1, 0.6), (2, 0.8)):
        clock, cpu, until = ({"ours": [], "trl": []} for _ in range(3))
        for seed in range(options.seeds):
            for side in turns(seed):
                run = training(side, ROOT / "toy", threads, seed, options.steps, options.launcher, folder)
                clock[side].append(seconds_a_step(run["ends"]))
                cpu[side].append(seconds_a_step(run["cpu"]))
                until[side].append(seconds_until(0.8, run))
                lines[side] = run["lines"]
        on = f"{threads} thread{'s' * (threads > 1)}"
        rows.append(row(f"seconds a step, {on}", f"at most {limit}", clock, "{:.2f}"))
        rows.append(row(f"CPU seconds a step, {on}", "-", cpu, "{:.2f}"))
        rows.append(row(f"seconds to 80 %, {on}", "-", until, "{:.1f}"))
    return [*rows, f"| lines of code | - | {lines['ours']:,} | {lines['trl']:,} | {lines['ours'] / lines['trl']:.2f} |"]


def turns(seed: int) -> tuple[str, str]:
    return ("ours", "trl") if seed % 2 == 0 else ("trl", "ours")


def seconds_a_step(stamps: list[float]) -> float:
    """Of step 3 and later: stamps[i] is the end of step i."""
    return median(b - a for a, b in zip(stamps[2:], stamps[3:]))


def seconds_until(share: float, run: dict) -> float | None:
    """Until the mean accuracy of three steps in a row has reached it; None if it never does."""
    for step in range(3, len(run["ends"])):
        if sum(run["accuracy"][step - 3 : step]) / 3 >= share:
            return run["ends"][step] - run["ends"][0]


def memory_rows(options, folder: Path) -> list[str]:
    model, peaks = enlarged(folder / "enlarged"), {"ours": [], "trl": []}
    for seed in range(options.seeds):
        for side in turns(seed):
            run = training(side, model, 1, seed, MEMORY_STEPS, options.launcher, folder, watch=True)
            before = [size for at, size in run["memory"] if at <= run["ends"][0]][-1]
            peaks[side].append((max(size for at, size in run["memory"] if at <= run["ends"][-1]) - before) / 2**20)
    return [row(f"peak memory above step 1's start, MiB, vocabulary {VOCABULARY:,}", "at most 0.6", peaks, "{:.0f}")]


def row(name: str, limit: str, sides: dict, form: str) -> str:
    """Medians of the runs, with the least and the most, and the ratio of the medians."""
    cells, middle = [], {}
    for side in ("ours", "trl"):
        values = sides[side]
        if None in values:
            cells.append(f"not reached by {values.count(None)} of {len(values)}")
        else:
            middle[side] = median(values)
            cells.append(f"{form} ({form} to {form})".format(middle[side], min(values), max(values)))
    ratio = f"{middle['ours'] / middle['trl']:.2f}" if len(middle) == 2 else "-"
    return f"| {name} | {limit} | {' | '.join(cells)} | {ratio} |"


# ----------------------------------------------------------------------------------------------- one training, outside


def training(side, model, threads, seed, steps, launcher, folder, watch=False) -> dict:
    """Runs one side in a process of its own. Times are of the monotonic clock, which all processes share."""
    questions = folder / f"questions_{seed}_{steps}.jsonl"
    if not questions.exists():
        questions.write_text("\n".join(questions_in_order(seed, steps)))
    job = dict(side=side, model=str(model), seed=seed, steps=steps, questions=str(questions))
    job |= dict(output=tempfile.mkdtemp(dir=folder), threads=threads)
    command = [*shlex.split(launcher), sys.executable, __file__, "--child", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
                   "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with open(Path(job["output"]) / "log", "w+") as log:
        process, memory = subprocess.Popen(command, stdout=log, stderr=log, env=environment), []
        while watch and process.poll() is None:
            memory.append((time.monotonic(), tree_memory(process.pid)))
            time.sleep(0.005)
        if process.wait():
            log.seek(0)
            sys.exit(f"error: {side} failed:\n{log.read()[-3000:]}")
    run = json.loads((Path(job["output"]) / "run.json").read_text())
    spent = run["ends"][-1] - run["ends"][0]
    print(f"{side}: seed {seed}, {threads} thread(s), {steps} steps, {spent:.0f} s, accuracy {run['accuracy'][-1]:.2f}", file=sys.stderr)
    return {**run, "memory": memory}


def questions_in_order(seed: int, steps: int) -> list[str]:
    """The training questions in the order in which train.py asks them."""
    from train import question_order

    lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines()
    return [lines[q] for q in question_order(seed, len(lines), 0, steps * QUESTIONS)]


def tree_memory(pid: int) -> int:
    """PSS of a process and all that it has started, in bytes."""
    try:
        size, *_ = re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        return 1024 * int(size) + sum(map(tree_memory, children(pid)))
    except (OSError, ValueError):  # it has ended
        return 0


def children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def enlarged(folder: Path) -> Path:
    """The toy with more rows in its (tied) embedding. Each new one is the vector whose logit is nearest to -20 after
    every token of the training data, so it is as good as never sampled, and responses keep their length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout import load_problems, render, solution_prompt

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "toy", dtype=torch.float32)
    problems = load_problems(str(ROOT / "toy" / "train.jsonl"))[:64]
    prompts = torch.tensor([render(tokenizer, solution_prompt(p.problem)) for p in problems])
    with torch.no_grad():
        texts = model.generate(prompts, max_new_tokens=48)
        hidden = model.base_model(input_ids=texts).last_hidden_state.flatten(0, 1)
        new = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), -20.0)).solution[:, 0]
        old = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.get_input_embeddings().weight[old:] = new
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ one training, inside


def child(job: dict) -> None:
    """Trains, and writes run.json: when step 1 began, when each step ended, its accuracy, and the lines imported."""
    import torch

    torch.set_num_threads(job["threads"])
    run = {"ends": [], "cpu": [], "accuracy": []}
    {"ours": ours, "trl": trl}[job["side"]](job, run)
    package = "trl" if job["side"] == "trl" else ROOT
    files = {module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)
             and (name.split(".")[0] == package or Path(module.__file__).parent == package)}  # fmt: skip
    run["lines"] = sum(len(Path(file).read_text().splitlines()) for file in files)
    (Path(job["output"]) / "run.json").write_text(json.dumps(run))


def stamp(run: dict) -> None:
    """When step 1 begins, and when each step has ended: the time, and the CPU time of this process and its workers."""
    run["ends"].append(time.monotonic())
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children(os.getpid())]
    ticks = sum(int(f[11]) + int(f[12]) for f in fields)
    run["cpu"].append(time.process_time() + ticks / os.sysconf("SC_CLK_TCK"))


def ours(job: dict, run: dict) -> None:
    import train

    record = train.record

    def stamped(the_run, metrics, groups):  # once before step 1, then near the end of each step
        record(the_run, metrics, groups)
        stamp(run)
        if metrics["step"] > 0:
            run["accuracy"].append(metrics["accuracy"])

    train.record = stamped
    train.main([
        f"--model={job['model']}", "--algorithm=grpo", "--rollout=transformers", f"--seed={job['seed']}", f"--steps={job['steps']}",
        f"--questions_per_step={QUESTIONS}", f"--group_size={SAMPLES}", f"--updates_per_rollout={UPDATES}",
        f"--max_new_tokens={LONGEST}", f"--learning_rate={RATE}", "--schedule=constant", "--beta=0", "--clip_low=0.2",
        "--clip_high=0.2", "--reduction=grpo", "--importance_cap=0", f"--micro_batch_tokens={MICRO_BATCH * (PROMPT + LONGEST)}",
        "--eval_questions=0", f"--save_every={job['steps']}", f"--output_dir={job['output']}/run",
    ])  # fmt: skip


def trl(job: dict, run: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward import Grader
    from rollout import INSTRUCTION

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            stamp(run)

        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:
                stamp(run)

    grader = Grader()

    def reward(completions, answer, **_):
        rewards = grader.grade([turns[0]["content"] for turns in completions], answer)
        run["accuracy"].append(sum(rewards) / len(rewards))
        return rewards

    problems = [json.loads(line) for line in Path(job["questions"]).read_text().splitlines()]
    data = Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"{p['problem']}\n{INSTRUCTION}"}], "answer": p["answer"]} for p in problems
    ])  # fmt: skip
    accumulate = QUESTIONS * SAMPLES // UPDATES // MICRO_BATCH
    config = GRPOConfig(
        output_dir=job["output"], use_cpu=True, bf16=False, gradient_checkpointing=False, seed=job["seed"], shuffle_dataset=False,
        max_steps=UPDATES * job["steps"], per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=accumulate,
        steps_per_generation=UPDATES * accumulate, num_generations=SAMPLES, max_completion_length=LONGEST, temperature=1.0,
        learning_rate=RATE, lr_scheduler_type="constant", beta=0.0, epsilon=0.2, loss_type="grpo", max_grad_norm=1.0, weight_decay=0.0,
        report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), reward_funcs=reward, args=config, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Clock()],
    )  # fmt: skip
    with grader:
        trainer.train()


if __name__ == "__main__":
    main()
