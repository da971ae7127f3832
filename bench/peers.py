"""Whole GRPO training beside TRL 1.16's GRPOTrainer: same policy, questions, batch and threads.

    pip install -r bench/requirements.txt       # in an environment of its own: it adds TRL
    python bench/peers.py                       # 15 minutes on 2 idle cores; writes RESULTS.md
    python bench/peers.py --seeds 1 --steps 6   # a look

Each training is a fresh process; the sides take turns. Both grade by the same `reward.Grader`. A
step is one rollout with its updates, from the end of one step to the end of the next; the median of
a run counts, on the clock and in CPU time with the graders', which other work hardly changes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import psutil
from study import ROOT, markdown, write_section

sys.path.insert(0, str(ROOT))

QUESTIONS, SAMPLES, UPDATES, LONGEST, RATE = 32, 8, 2, 112, 5e-4
MICRO_BATCH = 32  # samples of a forward pass; ours: as many tokens as these have at their longest
PROMPT = 13  # tokens of the toy's longest prompt
EXPLAINED = """Equal: weights, the questions of each step, prompts, grading, advantages, clip range,
loss (`grpo`), learning rate, AdamW (no decay), gradient norm, fp32, samples of a forward pass. TRL
has no logging, saving or progress bar, and no gradient checkpointing. Not equal: random numbers;
TRL deals samples to the two updates at random, ours by question; TRL's AdamW is fused; ours skips
samples of advantage zero, and sorts them by length; TRL pads to the longest."""


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each side")
    parser.add_argument("--steps", type=int, default=24, help="rollouts of a training")
    parser.add_argument("--output", type=Path, default=ROOT / "bench", help="folder of RESULTS.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job, run = json.loads(options.child), {"ends": [], "cpu": [], "accuracy": []}
        {"ours": ours, "trl": trl}[job["side"]](job, run)
        return (Path(job["output"]) / "run.json").write_text(json.dumps(run))
    lines = []
    for threads in (1, 2):
        runs = {"ours": [], "trl": []}
        for seed in range(options.seeds):
            for side in ("ours", "trl") if seed % 2 == 0 else ("trl", "ours"):
                runs[side].append(training(side, threads, seed, options.steps))
        for clock, name in (("ends", "seconds"), ("cpu", "CPU seconds")):
            line, middle = {"measure": f"{name} a step, {threads} thread(s)"}, {}
            for side in runs:  # stamps[i] is the end of step i; the first two steps warm up
                t = [median(np.diff(run[clock])[2:]) for run in runs[side]]
                middle[side] = median(t)
                line[side] = f"{median(t):.2f} ({min(t):.2f} to {max(t):.2f})"
            lines.append(line | {"ours / trl": f"{middle['ours'] / middle['trl']:.2f}"})
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    note = f"`python bench/peers.py`, {options.seeds} seeds of {options.steps} steps; {versions}"
    text = f"{note}\n\n{markdown(pd.DataFrame(lines))}\n\n{EXPLAINED}"
    write_section(options.output / "RESULTS.md", "peers.py", text)


def training(side: str, threads: int, seed: int, steps: int) -> dict:
    """Runs one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"side": side, "seed": seed, "steps": steps, "output": folder, "threads": threads}
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
                       "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: {side} failed:\n{done.stderr[-3000:]}")
        run = json.loads((Path(folder) / "run.json").read_text())
    print(f"{side}: seed {seed}, {threads} thread(s), accuracy {run['accuracy'][-1]:.2f}")
    return run


# --------------------------------------------------------------------------- one training, inside


def stamp(run: dict) -> None:
    """When step 1 begins and when a step ends: the time, and the CPU time with the graders'."""
    me = psutil.Process()
    spent = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    run["ends"].append(time.monotonic())
    run["cpu"].append(sum(times.user + times.system for times in spent))


def ours(job: dict, run: dict) -> None:
    import train

    log = train.log

    def stamped(the_run, metrics, groups):  # once before step 1, then near the end of each step
        log(the_run, metrics, groups)
        stamp(run)
        run["accuracy"].append(metrics.get("accuracy"))

    train.log = stamped
    train.main([
        "--algorithm=grpo", "--rollout=transformers", f"--seed={job['seed']}",
        f"--steps={job['steps']}", f"--questions_per_step={QUESTIONS}", f"--group_size={SAMPLES}",
        f"--updates_per_rollout={UPDATES}", f"--max_new_tokens={LONGEST}", "--importance_cap=0",
        f"--learning_rate={RATE}", "--schedule=constant", f"--save_every={job['steps']}",
        f"--micro_batch_tokens={MICRO_BATCH * (PROMPT + LONGEST)}", "--eval_questions=0",
        f"--output_dir={job['output']}/run",
    ])  # fmt: skip


def trl(job: dict, run: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward import Grader
    from rollout import load_problems, solution_prompt
    from train import question_order

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            stamp(run)

        def on_step_end(self, args, state, control, **_):
            if state.global_step % UPDATES == 0:
                stamp(run)

    def reward(completions, answer, **_):
        verdicts = grader.verdicts([turns[0]["content"] for turns in completions], answer)
        rewards = [float(verdict == "right") for verdict in verdicts]
        run["accuracy"].append(sum(rewards) / len(rewards))
        return rewards

    problems = load_problems(str(ROOT / "toy" / "train.jsonl"))
    order = question_order(job["seed"], len(problems), 0, job["steps"] * QUESTIONS)
    chats = [[{"role": "user", "content": solution_prompt(problems[q].problem)}] for q in order]
    answers = [problems[q].answer for q in order]
    accumulate = QUESTIONS * SAMPLES // UPDATES // MICRO_BATCH
    config = GRPOConfig(
        output_dir=job["output"], use_cpu=True, bf16=False, gradient_checkpointing=False,
        seed=job["seed"], shuffle_dataset=False, max_steps=UPDATES * job["steps"],
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=accumulate,
        steps_per_generation=UPDATES * accumulate, num_generations=SAMPLES, loss_type="grpo",
        max_completion_length=LONGEST, temperature=1.0, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", beta=0.0, epsilon=0.2, max_grad_norm=1.0, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with Grader() as grader:
        GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(ROOT / "toy", dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(ROOT / "toy"), reward_funcs=reward,
            args=config, train_dataset=Dataset.from_dict({"prompt": chats, "answer": answers}),
            callbacks=[Clock()],
        ).train()  # fmt: skip


if __name__ == "__main__":
    main()
