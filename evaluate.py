"""A model -> its accuracy on benchmarks, with error bars, and every completion kept.

    python evaluate.py                                             # the toy on its own test, no GPU
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output runs/eval/vanilla
    python evaluate.py --model runs/mine/final --benchmarks aime24 own.jsonl --k 16 --self_correct
    python evaluate.py --compare runs/eval/vanilla runs/eval/mine

1. Draw k answers to each question, some of every question a pass. A pass ends in
   completions/NAME.jsonl: a kill costs one, and a larger k later draws only what is missing.
2. --self_correct: give each finished answer, right or wrong, back as a correction prompt (Eq. 10);
   what comes of it goes to completions/NAME.corrections.jsonl.
3. Grade what these files hold (Eqs. 1, 11): graded.csv, summary.json. So the same command on a
   finished folder grades it again, and loads no model.
4. --compare: differences on the same questions, which two separate error bars cannot show.

Left out: pass@j below k, majority votes, a model as the judge, charts.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from error_pool import correction_prompt
from reward import Grader, after_thinking
from rollout import (
    Task, lock_folder as claim, digest, fail, fits, fitting, flag, gather, load_policy, load_problems, make_engine,
    render, sample_groups, solution_prompt, solution_task, start_distributed,
)  # fmt: skip

BENCHMARKS = {  # the paper's five: (source, k). 64: R1-Distill's protocol; 4: ours
    "aime24": ("HuggingFaceH4/aime_2024", 64),
    "amc23": ("math-ai/amc23", 64),
    "olympiad": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", 4),
    "math500": ("HuggingFaceH4/MATH-500", 4),
    "gsm8k": ("openai/gsm8k:main:test", 4),
}
WEIGHTS = ("*.safetensors", "*.bin", "*.json")  # what makes a checkpoint what it is
AUTO = "bf16" if torch.cuda.is_available() else "fp32"
PASS = 2048  # samples of a pass, at least, over all ranks [ours]: enough to keep 8 engines busy


@dataclass
class EvalConfig:
    """A model -> its accuracy. The defaults are R1-Distill's protocol (2501.12948)."""

    model: str = flag(str(Path(__file__).parent / "toy"), "folder, or id on the hub")
    benchmarks: Optional[list[str]] = flag(None, "as aime24, file, or hub dataset; default: all")
    k: int = flag(0, "answers a question; 0: 64 for aime24 and amc23, else 4")
    temperature: float = flag(0.6, "of sampling; 0: the likeliest token, and k is 1")
    top_p: float = flag(0.95, "sample from the likeliest tokens that hold this probability")
    max_new_tokens: int = flag(0, "longest response; 0: 32768, at most half of the context")
    seed: int = flag(0, "decides every sample, with its question and its number")
    self_correct: bool = flag(False, "measure corrections of the answers too, now or later")
    output: Optional[str] = flag(None, "folder; default: in runs/eval/")
    compare: Optional[list[str]] = flag(None, "folders of finished evaluations, the baseline first")
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "the engine")
    precision: Literal["fp32", "bf16"] = flag(AUTO, "of the weights; default: bf16 on a GPU")
    memory_share: float = flag(0.7, "of the device's memory, for the engine")

    def answers(self, name: str) -> int:  # k of this benchmark
        return 1 if self.temperature == 0 else self.k or BENCHMARKS.get(name, ("", 4))[1]

    def file(self, name: str) -> Path:
        return Path(self.output, "completions", f"{name}.jsonl")


def evaluate(config, rank, device) -> None:
    """On every rank: draws what is missing. Rank 0 then grades and reports."""
    engine = None
    try:
        tokenizer, tasks, max_context, settings = prepare(config)
        passes = missing(config, tokenizer, tasks, max_context)
        upcoming = next(passes, None)
        if upcoming:
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            model, _ = load_policy(config.model, dtype, device)
            room = dict(max_context=max_context, memory_share=config.memory_share)
            engine = make_engine(config.rollout, model, tokenizer, model_path=config.model, **room)
            settings["engine"] = f"{engine.name}, {config.precision} on {device.type}"
        lock = claim(Path(config.output), settings)
    except (OSError, ValueError) as error:
        fail(error)
    names = ("seed", "temperature", "top_p", "max_new_tokens")
    sampling = {name: settings[name] for name in names}
    while upcoming:
        file, asked, numbers, span = upcoming
        groups = sample_groups(engine, tokenizer, None, asked, numbers, span=span, **sampling)
        if rank == 0:
            write(file, read(file) + records(groups, numbers))
        gather([])  # from here on every rank finds it there
        upcoming = next(passes, None)
    if rank == 0:
        report(config, tasks)
    lock.close()
    if engine:
        engine.close()


def prepare(config):
    """(tokenizer, {benchmark: tasks}, longest sequence, settings). Loads no model."""
    if min(config.k, config.temperature, config.max_new_tokens) < 0 or not 0 < config.top_p <= 1:
        raise ValueError("--k, --temperature, --max_new_tokens are at least 0, --top_p in (0, 1]")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoConfig.from_pretrained(config.model)
    limit = getattr(model, "max_position_embeddings", None) or tokenizer.model_max_length
    config.max_new_tokens = config.max_new_tokens or min(32768, limit // 2)
    # Of a correction: question, wrong response, another. Whatever other benchmarks there are.
    max_context = min(limit, 2 * (config.max_new_tokens + 2048))
    config.output = config.output or f"runs/eval/{Path(config.model).name}"
    names = ("model", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: getattr(config, name) for name in names}
    # By content, not by name: what stands behind a path may change, a template may write the date.
    files = [file for kind in WEIGHTS for file in sorted(Path(config.model).glob(kind))]
    digests = [hashlib.file_digest(f.open("rb"), "sha256").hexdigest()[:12] for f in files]
    settings["weights"] = digests or getattr(model, "_commit_hash", None)
    settings["prompt"] = tokenizer.decode(render(tokenizer, solution_prompt("PROBLEM")))
    own, tasks = Path(config.model, "test.jsonl"), {}
    for source in config.benchmarks or ([str(own)] if own.exists() else BENCHMARKS):
        name = Path(source).stem
        if name in tasks:
            raise ValueError(f"--benchmarks {source}: a second {name}; rename the file")
        problems = load_problems(BENCHMARKS.get(source, (source,))[0])
        settings[f"problems of {name}"] = digest(problems)
        asked = [solution_task(tokenizer, problem, q) for q, problem in enumerate(problems)]
        tasks[name] = fitting(asked, config.max_new_tokens, max_context, name)
    return tokenizer, tasks, max_context, settings


def missing(config, tokenizer, tasks: dict, max_context):
    """Yields the passes that are not in the files yet: (file, tasks, sample numbers, span)."""
    for name, asked in tasks.items():
        file, corrected = config.file(name), config.file(f"{name}.corrections")
        k, width = config.answers(name), 1 + PASS // len(asked)
        for first in range(len(read(file)) // len(asked), k, width):
            yield file, asked, range(first, min(first + width, k)), None
        if config.self_correct:
            answers = [row for row in read(file) if row["sample"] < k]
            todo = correction_tasks(tokenizer, answers, config.max_new_tokens, max_context)
            for first in range(len(read(corrected)), len(todo), PASS):
                yield corrected, todo[first : first + PASS], range(1), "sections"


def correction_tasks(tokenizer, answers, max_new_tokens, max_context) -> list[Task]:
    """x' of Eq. 10 for these `records`, if finished and fitting. It shows what follows thinking."""
    tasks = []
    for row in answers:
        shown = after_thinking(row["response"])
        prompt = render(tokenizer, correction_prompt(row["problem"], shown))  # Eq. 10
        if row["finished"] and shown and fits(prompt, max_new_tokens, max_context):
            tasks.append(Task(row["problem"], row["gold"], prompt, row["question"], row["sample"]))
    return tasks


def records(groups, numbers=range(1)) -> list[dict]:
    """What is kept of samples number `numbers`. A correction bears the number of what it corrects.

    All of the first number, then all of the next: the file does not depend on a pass's width.
    """
    return [
        {"question": g.question, "sample": number if g.corrects is None else g.corrects,
         "problem": g.problem, "gold": g.answer, "response": g.samples[i].text,
         "solution": None if g.corrects is None else g.graded[i],  # what Eq. 11 grades
         "finished": g.samples[i].finished, "tokens": len(g.samples[i].token_ids)}
        for i, number in enumerate(numbers) for g in groups
    ]  # fmt: skip


def read(path) -> list[dict]:
    return [json.loads(line) for line in open(path)] if path.exists() else []


def write(path, rows) -> None:
    """Whole or not at all: a kill leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".tmp").replace(path)


def accuracy(groups) -> tuple[float, float]:
    """(share right, its standard error) of graded groups, a question each; nan for none.

    Samples of a question are alike: their mean is one observation. It holds the samples' noise, so
    the error is over questions and samples both.
    """
    means = pandas.Series([np.mean(group.rewards) for group in groups], dtype=float)
    return float(means.mean()), float(means.sem())


def report(config, names) -> None:
    """Grades what the files hold, up to k; writes and prints the table, shares in per cent."""
    rows, folder = [], Path(config.output)
    for name in names:
        k = config.answers(name)
        for file in (config.file(name), config.file(f"{name}.corrections")):
            rows += [row | {"of": name} for row in read(file) if row["sample"] < k]
    frame = pandas.DataFrame(rows)
    texts = frame.solution.fillna(frame.response)
    with Grader(os.cpu_count()) as grader:
        frame["verdict"] = grader.verdicts(list(texts), list(frame.gold))  # Eqs. 1, 11
    right, corrects = frame.verdict == "right", frame.solution.notna()
    # An answer stands before its correction. Where it was right, the harm is what counts.
    was_right = right.groupby([frame.of, frame.question, frame["sample"]]).transform("first")
    frame["kind"] = np.where(was_right, "right spoiled", "wrong put right")
    frame.loc[~corrects, "kind"] = "answers"
    frame["right"] = right ^ (corrects & was_right)
    frame.drop(columns=["response", "solution"]).to_csv(folder / "graded.csv", index=False)

    frame["avg@k"] = 100 * frame.right
    frame["cut off"] = 100 * ~frame.finished
    frame["ungradable"] = 100 * (frame.verdict == "ungradable")
    columns = ["avg@k", "tokens", "cut off", "ungradable"]
    questions = frame.groupby(["of", "kind", "question"])[columns].mean()
    # Of k drawn, Chen et al.'s unbiased estimator (2107.03374) is: any right?
    questions.insert(1, "pass@k", 100 * (questions["avg@k"] > 0))
    parts = questions.groupby(["of", "kind"])
    table = parts.mean()  # each question counts the same
    table.insert(1, "SE", parts["avg@k"].sem())  # as in `accuracy`
    table["questions"] = parts.size()
    table["samples"] = frame.groupby(["of", "kind"]).size()
    table.reset_index().to_json(folder / "summary.json", orient="records")
    settings = (folder / "settings.json").read_text()
    print(table.to_string(float_format="%.1f"), settings, f"{folder} has all of it", sep="\n")


def compare(folders: list[str]) -> None:
    """Each folder beside the first, on the problems that all of them answered."""
    right = {}
    for folder in folders:
        file = Path(folder, "graded.csv")
        if not file.exists():
            fail(f"--compare: there is no {file}; evaluate that model first")
        frame = pandas.read_csv(file, keep_default_na=False).query("kind == 'answers'")
        right[folder] = 100 * frame.groupby(["of", "problem"]).right.mean()
    right = pandas.DataFrame(right).dropna()
    if right.empty:
        fail("--compare: there is no problem that all of them answered")
    rng = np.random.default_rng(0)
    for name, part in right.groupby("of"):
        print(f"{name}: right (%), difference [95 % bootstrap interval over {len(part)} problems]")
        for folder in folders:
            paired = part[folder] - part[folders[0]]
            drawn = rng.choice(paired, (10_000, len(paired))).mean(1)
            low, high = np.quantile(drawn, (0.025, 0.975))
            interval = f"{paired.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
            print(f"{part[folder].mean():8.1f}  {interval:22}  {folder}")


def main(arguments=None) -> None:
    """May be called any number of times in a process."""
    rank, _, device = start_distributed()
    parser = HfArgumentParser(EvalConfig, allow_abbrev=False, description=EvalConfig.__doc__)
    parser.error = lambda message: fail(f"{message}; see --help")  # else all ranks print the usage
    try:
        config = EvalConfig(**vars(parser.parse_args(arguments)))
        if not config.compare:
            evaluate(config, rank, device)
        elif rank == 0:
            compare(config.compare)
    finally:
        if dist.is_initialized():  # vLLM destroys it too
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
