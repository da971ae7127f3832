"""A model -> its accuracy on benchmarks, with error bars, and every completion kept.

    python evaluate.py                                             # the toy on its own test, no GPU
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output runs/eval/vanilla
    python evaluate.py --model runs/mine/final --benchmarks aime24 own.jsonl --k 16 --self_correct
    python evaluate.py --compare runs/eval/vanilla runs/eval/mine  # and the paper's figures

1. Draw k answers to each question, some of every question a pass. A pass ends in
   completions/NAME.jsonl: a kill costs one, and a larger k later draws only what is missing.
2. --self_correct: give each finished answer, right or wrong, back as a correction prompt (Eq. 10).
   What comes of it goes to completions/NAME.corrections.jsonl.
3. Grade what these files hold (Eqs. 1, 11), and write graded.csv, summary.json, table.md and
   accuracy.png. So the same command on a finished folder grades it again, and loads no model.
4. --compare: differences on the same questions, which two separate error bars cannot show.

Left out: error bars of sampling alone, pass@j below k, majority votes, a model as the judge.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from error_pool import after_thinking, correction_prompt
from reward import Grader, final_answer
from rollout import (
    Task, ask, claim, fail, fits, fitting, gather, load_policy, load_problems, make_engine,
    needed_context, render, sample_groups, solution_prompt, start_distributed,
)  # fmt: skip

BENCHMARKS = {  # the paper's five: (source, k). 64: R1-Distill's protocol; 4: ours
    "aime24": ("HuggingFaceH4/aime_2024", 64),
    "amc23": ("math-ai/amc23", 64),
    "olympiad": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", 4),
    "math500": ("HuggingFaceH4/MATH-500", 4),
    "gsm8k": ("openai/gsm8k:main:test", 4),
}
PASS = 2048  # samples of a pass, at least, over all ranks [ours]: enough to keep 8 engines busy
PAPER = {  # arXiv 2511.06065, in points over vanilla
    "GRPO 1.5B": {"aime24": "+3.4"},
    "DAPO 1.5B": {"aime24": "+4.5"},
    "ScRPO 1.5B": {"aime24": "+5.7", "average": "+6.0 to 64.8, of all five"},
    "ScRPO 7B": {"average": "+3.2 to 77.8, of all five"},
}


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class EvalConfig:
    """A model -> its accuracy. The defaults are R1-Distill's protocol (2501.12948)."""

    model: str = flag(str(Path(__file__).parent / "toy"), "folder, or id on the hub")
    benchmarks: Optional[list[str]] = flag(
        None, f"of {', '.join(BENCHMARKS)}, or files, or id:config:split of the hub; "
        "default: the model's own test.jsonl, as in toy/, or all five"
    )  # fmt: skip
    k: int = flag(0, "answers a question; 0: 64 for aime24 and amc23, else 4")
    temperature: float = flag(0.6, "of sampling; 0: the likeliest token, and k is 1")
    top_p: float = flag(0.95, "sample from the likeliest tokens that hold this probability")
    max_new_tokens: int = flag(0, "longest response; 0: 32768, at most half of the context")
    seed: int = flag(0, "decides every sample, with its question and its number")
    self_correct: bool = flag(False, "measure corrections of the answers too, now or later")
    output: Optional[str] = flag(None, "folder; default: in runs/eval/")
    compare: Optional[list[str]] = flag(None, "folders of finished evaluations, the baseline first")
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "the engine")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "of the weights; auto: bf16 on a GPU")
    memory_share: float = flag(0.7, "of the device's memory, for the engine")

    def __post_init__(self):
        if min(self.k, self.temperature, self.max_new_tokens) < 0:
            raise ValueError("--k, --temperature and --max_new_tokens must not be negative")
        if not (0 < self.top_p <= 1 and 0 < self.memory_share <= 1):
            raise ValueError("--top_p and --memory_share must be above 0 and at most 1")

    def answers(self, name: str) -> int:
        """k of this benchmark."""
        return 1 if self.temperature == 0 else self.k or BENCHMARKS.get(name, ("", 4))[1]

    def file(self, name: str) -> Path:
        return Path(self.output, "completions", f"{name}.jsonl")


# ------------------------------------------------------------------------------------------ samples


def evaluate(config, rank, device) -> None:
    """On every rank: draws what is missing. Rank 0 then grades and reports."""
    try:
        tokenizer, tasks, max_context, settings = prepare(config)
        passes, engine = missing(config, tokenizer, tasks, max_context), None
        upcoming = next(passes, None)
        if upcoming:
            automatic = "bf16" if device.type == "cuda" else "fp32"
            precision = automatic if config.precision == "auto" else config.precision
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            model, _ = load_policy(config.model, dtype, device)
            engine = make_engine(
                config.rollout, model, tokenizer, model_path=config.model, max_context=max_context,
                memory_share=config.memory_share,
            )  # fmt: skip
            settings["engine"] = f"{engine.name}, {precision} on {device.type}"
        lock = claim(Path(config.output), settings)
    except (OSError, ValueError) as error:
        fail(error)
    how = {name: settings[name] for name in ("seed", "temperature", "top_p", "max_new_tokens")}
    while upcoming:
        file, asked, numbers, span = upcoming
        groups = sample_groups(engine, tokenizer, None, asked, numbers, span=span, **how)
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
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoConfig.from_pretrained(config.model)
    limit = getattr(model, "max_position_embeddings", None) or tokenizer.model_max_length
    config.max_new_tokens = config.max_new_tokens or min(32768, limit // 2)
    config.output = config.output or f"runs/eval/{Path(config.model).name}"
    names = ("model", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: getattr(config, name) for name in names}
    # By content, not by name: what stands behind a path may change, a template may write the date.
    settings["weights"] = fingerprint(config.model) or getattr(model, "_commit_hash", None)
    settings["prompt"] = tokenizer.decode(render(tokenizer, solution_prompt("PROBLEM")))
    own, tasks = Path(config.model, "test.jsonl"), {}
    for source in config.benchmarks or ([str(own)] if own.exists() else BENCHMARKS):
        name = Path(source).stem
        if name in tasks:
            raise ValueError(f"--benchmarks {source}: a second {name}; rename the file")
        problems = load_problems(BENCHMARKS.get(source, (source,))[0])
        content = repr([(p.problem, p.answer) for p in problems]).encode()
        settings[f"problems of {name}"] = hashlib.sha256(content).hexdigest()[:12]
        asked = [ask(tokenizer, problem, q) for q, problem in enumerate(problems)]
        tasks[name] = fitting(asked, config.max_new_tokens, limit, name)
    longest = max(len(task.prompt) for asked in tasks.values() for task in asked)
    words = len(render(tokenizer, correction_prompt("", "")))
    return tokenizer, tasks, needed_context(longest, words, config.max_new_tokens, limit), settings


def missing(config, tokenizer, tasks: dict, max_context):
    """Yields the passes that are not in the files yet: (file, tasks, sample numbers, span)."""
    for name, asked in tasks.items():
        k, width = config.answers(name), math.ceil(PASS / len(asked))
        for first in range(len(read(config.file(name))) // len(asked), k, width):
            yield config.file(name), asked, range(first, min(first + width, k)), None
        if config.self_correct:
            answers = [row for row in read(config.file(name)) if row["sample"] < k]
            corrected = config.file(f"{name}.corrections")
            there = {(row["question"], row["sample"]) for row in read(corrected)}
            todo = correction_tasks(tokenizer, answers, config.max_new_tokens, max_context)
            todo = [task for task in todo if (task.question, task.corrects) not in there]
            for first in range(0, len(todo), PASS):
                yield corrected, todo[first : first + PASS], range(1), "sections"


def correction_tasks(tokenizer, answers, max_new_tokens, max_context) -> list[Task]:
    """x' of Eq. 10 for each of these `records` that is finished and fits, in order.

    As in training, the model is shown only what follows its thinking.
    """
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


def fingerprint(model: str) -> str:
    """Of a checkpoint's files; empty for a model on the hub."""
    kept = (".safetensors", ".bin", ".json")
    files = sorted(file for file in Path(model).glob("*") if file.suffix in kept)
    digests = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files]
    return "".join(digests) and hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------ figures


def standard_error(frame) -> float:
    """Of the mean of `right`, over questions and samples both; nan for less than two questions.

    Samples of a question are alike, so residuals are first summed within it. With k samples of each
    this is std(ddof=1) / sqrt(questions) of the questions' means, which hold the samples' noise.
    """
    residuals = (frame.right - frame.right.mean()).groupby(frame.question).sum()
    n = len(residuals)
    return math.sqrt(n / (n - 1) * (residuals**2).sum()) / len(frame) if n > 1 else math.nan


def accuracy(groups) -> tuple[float, float]:
    """(share of samples that are right, its standard error) of graded groups; nan for none."""
    right = [(group.question, reward) for group in groups for reward in group.rewards]
    frame = pandas.DataFrame(right, columns=["question", "right"]).astype(float)
    return float(frame.right.mean()), standard_error(frame)


def graded(grader, file, k) -> pandas.DataFrame:
    """The samples of a file that are numbered below k, and their verdicts."""
    rows = [row for row in read(file) if row["sample"] < k]
    texts = [row["response"] if row["solution"] is None else row["solution"] for row in rows]
    verdicts = grader.verdicts(texts, [row["gold"] for row in rows])  # Eqs. 1, 11
    for row, text, verdict in zip(rows, texts, verdicts):
        row |= {"answer": final_answer(text), "verdict": verdict, "right": verdict == "right"}
    return pandas.DataFrame(rows)


def figures(frame) -> dict:
    """A row of the table; shares in per cent."""
    return {
        "questions": frame.question.nunique(),
        "k": frame["sample"].nunique(),
        "samples": len(frame),
        "avg@k": 100 * frame.right.mean(),
        "SE": 100 * standard_error(frame),
        # Of k drawn, Chen et al.'s unbiased estimator (2107.03374) is: any right?
        "pass@k": 100 * frame.groupby("question").right.any().mean(),
        "tokens": frame.tokens.mean(),
        "cut off": 100 - 100 * frame.finished.mean(),
        "ungradable": 100 * (frame.verdict == "ungradable").mean(),
    }


def report(config, names) -> None:
    """Grades; writes and prints the table."""
    folder, parts = Path(config.output), {}
    with Grader(os.cpu_count()) as grader:
        for name in names:
            k = config.answers(name)
            answers = parts[name] = graded(grader, config.file(name), k)
            if config.self_correct and answers.finished.any():  # both directions
                corrections = graded(grader, config.file(f"{name}.corrections"), k)
                first = answers[["question", "sample"]].assign(was=answers.right)
                corrections = corrections.merge(first, on=["question", "sample"])
                right = corrections[corrections.was]
                parts[f"{name}: wrong put right"] = corrections[~corrections.was]
                parts[f"{name}: right spoiled"] = right.assign(right=~right.right)
    everything = pandas.concat(parts, names=["of"]).drop(columns=["response", "solution"])
    everything.to_csv(folder / "graded.csv")
    rows = {name: figures(part) for name, part in parts.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    figure = Figure()
    style = dict(capsize=4, ylim=(0, 100), ylabel="%")
    table["avg@k"].plot.bar(ax=figure.subplots(), yerr=table.SE, **style)
    figure.savefig(folder / "accuracy.png", bbox_inches="tight")
    if len(names) > 1:  # all benchmarks count the same, as in the paper
        of = table.loc[list(names)]
        table.loc["average", ["avg@k", "SE"]] = of["avg@k"].mean(), math.hypot(*of.SE) / len(of)
    write(folder / "summary.json", [json.loads(table.to_json(orient="index"))])
    text = f"```\n{table.to_string(float_format='%.1f', na_rep='')}\n```\n"
    settings = json.loads((folder / "settings.json").read_text())
    text += "".join(f"- {name}: {value!r}\n" for name, value in settings.items())
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\nin {folder}: completions/, graded.csv, summary.json, table.md, accuracy.png")


def compare(config) -> None:
    """Each folder beside the first, on the problems that all of them answered."""
    right = {}
    for folder in config.compare:
        frame = pandas.read_csv(Path(folder, "graded.csv"), keep_default_na=False)
        frame = frame[~frame.of.str.endswith(("put right", "spoiled"))]
        right[folder] = 100 * frame.groupby(["of", "problem"]).right.mean()
    right = pandas.DataFrame(right).dropna()
    if right.empty:
        raise ValueError("--compare: there is no problem that all of them answered")
    rng, means, draws, table = np.random.default_rng(0), {}, {}, {}
    for name, part in right.groupby("of"):
        Q = len(part)
        times = rng.multinomial(Q, np.full(Q, 1 / Q), size=10_000)  # each is drawn [draws,Q]
        means[name], draws[name] = part.mean().values, times @ part.values / Q  # [draws,folders]
    means["average"] = np.mean([*means.values()], axis=0)
    draws["average"] = np.mean([*draws.values()], axis=0)
    for name, mean in means.items():
        low, high = np.quantile(draws[name] - draws[name][:, :1], (0.025, 0.975), axis=0)
        table[name] = [f"{mean[m]:.1f}, {mean[m] - mean[0]:+.1f} [{low[m]:+.1f}, {high[m]:+.1f}]"
                       for m in range(len(mean))]  # fmt: skip
    table = pandas.DataFrame(table, index=config.compare)
    if set(means) & set(BENCHMARKS):
        paper = pandas.DataFrame(PAPER).T.reindex(columns=table.columns).dropna(how="all")
        mark = ", reported by the paper, not measured here"
        table = pandas.concat([table, paper.add_suffix(mark, axis=0)])
    text = f"```\n{table.to_string(na_rep='')}\n```\n"
    text += "Right (%), difference [95 % bootstrap interval over questions]\n"
    folder = Path(config.output or "runs/eval/" + "-vs-".join(Path(f).name for f in config.compare))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    print(text)


def main(arguments=None) -> None:
    """May be called any number of times in a process."""
    disable_progress_bar()  # of Hugging Face's loading
    rank, _, device = start_distributed()
    parser = HfArgumentParser(EvalConfig, allow_abbrev=False, description=EvalConfig.__doc__)
    parser.error = fail  # else every rank prints the usage
    try:
        try:
            (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
            if config.compare and rank == 0:
                compare(config)
        except (OSError, ValueError) as error:
            fail(error)
        if not config.compare:
            evaluate(config, rank, device)
    finally:
        if dist.is_initialized():  # vLLM destroys it too
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
