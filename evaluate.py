"""A model's accuracy on benchmarks, with standard errors; every completion is kept.

    python evaluate.py                                             # the toy on its own test, no GPU
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output runs/eval/vanilla
    python evaluate.py --model runs/mine/final --benchmarks aime24 own.jsonl --k 16 --self_correct
    python evaluate.py --compare runs/eval/vanilla runs/eval/mine

1. Sample k answers to each question, one or a few of every question a pass, which ends by writing
   completions/NAME.jsonl. A kill costs one pass; a larger k later adds only the missing samples.
2. With --self_correct, show the model each of its finished answers, right or wrong, in a correction
   prompt (Eq. 10), and write its corrections to completions/NAME.corrections.jsonl.
3. Grade these files (Eqs. 1, 11), and write graded.csv and summary.csv. So the same command on a
   finished folder grades it again, and loads no model.
4. --compare gives differences on the same questions, which comparing standard errors cannot.

Left out: pass@j for j < k, majority votes, a model as the judge, charts.
"""

import rollout  # before torch, whose import takes seconds: see rollout.PARENT

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import reward
from rollout import Group, Task, fail, flag

TOY = Path(__file__).resolve().parent / "toy"
BENCHMARKS = {  # the paper's five
    "aime24": "HuggingFaceH4/aime_2024",
    "amc23": "math-ai/amc23",
    "olympiad": "Hothan/OlympiadBench:OE_TO_maths_en_COMP",
    "math500": "HuggingFaceH4/MATH-500",
    "gsm8k": "openai/gsm8k:main:test",
}
K = {"aime24": 64, "amc23": 64}  # R1-Distill's protocol; 4 for all others [ours]
PASS_SAMPLES = 2048  # over all ranks [ours]: enough to keep 8 engines busy
AUTO = "bf16" if torch.cuda.is_available() else "fp32"


@dataclass
class EvalConfig:
    """A model's accuracy on benchmarks. The defaults are R1-Distill's protocol (2501.12948)."""

    model: Optional[str] = flag(None, "folder or hub id; unset: the toy, on its own test")
    benchmarks: Optional[list[str]] = flag(
        None, "aime24, amc23, olympiad, math500, gsm8k, files or hub datasets; unset: those five"
    )
    k: int = flag(0, "answers to each question; 0: 64 for aime24 and amc23, 4 for others")
    temperature: float = flag(0.6, "sampling temperature; at 0 there is one greedy answer")
    top_p: float = flag(0.95, "share of the probability that is sampled from")
    max_new_tokens: int = flag(0, "longest response; 0: 32768, or half of a shorter context")
    seed: int = flag(0, "all randomness is a function of (seed, question, sample)")
    self_correct: bool = flag(False, "measure corrections of the answers too, now or later")
    output: Optional[str] = flag(None, "folder of the results; unset: runs/eval/NAME_OF_MODEL")
    compare: Optional[list[str]] = flag(None, "folders of finished evaluations, baseline first")
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "sampling engine")
    precision: Literal["fp32", "bf16"] = flag(AUTO, "type of the weights (vLLM: dtype)")
    # Transformers' copy of the weights lies outside this share: a 7B model in bf16, 15 GB, leaves
    # vLLM at most 0.6 of a 40 GB card. With 0.55, its own copy and activations leave 5 GB of cache.
    memory_share: float = flag(0.55, "vLLM's share of each GPU (its gpu_memory_utilization)")

    def answers(self, name: str) -> int:
        """k of this benchmark."""
        return self.k or K.get(name, 4)

    def file(self, name: str) -> Path:
        """Where this benchmark's completions are."""
        return Path(self.output, "completions", f"{name}.jsonl")


def evaluate(config: EvalConfig, rank: int, device: torch.device) -> None:
    """On every rank: samples what is missing. Rank 0 then grades and reports."""
    engine = None
    try:
        tokenizer, tasks, max_context, settings = prepare(config)
        remaining = partial(remaining_passes, config, tokenizer, tasks, max_context)
        if any(remaining()):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
            model, _ = rollout.load_policy(config.model, dtype, device)
            engine = rollout.make_engine(
                config.rollout, model, tokenizer, model_path=config.model,
                max_context=max_context, memory_share=config.memory_share,
            )
            settings["engine"] = f"{engine.name}, {config.precision} on {device.type}"
        lock = rollout.lock_folder(Path(config.output), settings)
    except (OSError, ValueError) as error:
        fail(error)
    for file, asked, numbers, span in remaining():
        groups = rollout.sample_groups(
            engine, tokenizer, None, asked, numbers, span=span, seed=config.seed,
            temperature=config.temperature, top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
        )
        if rank == 0:
            write(file, read(file) + records(groups, numbers))
        rollout.barrier()  # now the other ranks find it too
    if rank == 0:
        report(config, tasks, settings)
    lock.close()
    if engine:
        engine.close()


def prepare(config: EvalConfig):
    """(tokenizer, {benchmark: tasks}, longest sequence, settings). Loads no model."""
    if min(config.k, config.temperature, config.max_new_tokens) < 0 or not 0 < config.top_p <= 1:
        raise ValueError("--k, --temperature, --max_new_tokens are at least 0, --top_p in (0, 1]")
    if config.model is None and config.benchmarks:
        raise ValueError("--model is missing: name the model to evaluate on --benchmarks")
    if config.model is None:
        config.model = str(TOY)
        config.benchmarks = [str(TOY / "test.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    limit = rollout.context_limit(AutoConfig.from_pretrained(config.model), tokenizer)
    config.max_new_tokens = config.max_new_tokens or min(32768, limit // 2)
    if config.temperature == 0:
        config.k = 1
    # A correction's prompt holds a question, here of 2,048 tokens [ours], and a response. It does
    # not depend on the benchmarks asked: adding one must not change which problems fit.
    max_context = min(limit, 2 * (config.max_new_tokens + 2048))
    if config.output is None:
        config.output = f"runs/eval/{Path(config.model).name}"
    config.output = str(rollout.output_folder(config.output))
    names = ("model", "temperature", "top_p", "max_new_tokens", "seed")
    settings = {name: getattr(config, name) for name in names}
    # By content: what is behind a name may change, and a chat template may write the date.
    settings["weights"] = rollout.weights_digest(config.model)
    prompt = rollout.render(tokenizer, rollout.solution_prompt("PROBLEM"))
    settings["prompt"] = tokenizer.decode(prompt)
    tasks = {}
    for source in config.benchmarks or BENCHMARKS:
        name = Path(source).stem
        if name in tasks:
            raise ValueError(f"--benchmarks {source}: a second {name}; rename the file")
        asked = rollout.load_tasks(tokenizer, BENCHMARKS.get(source, source))
        settings[f"problems of {name}"] = rollout.digest(asked)
        tasks[name] = rollout.fitting(asked, config.max_new_tokens, max_context, name)
    return tokenizer, tasks, max_context, settings


def remaining_passes(config: EvalConfig, tokenizer, tasks: dict[str, list[Task]], max_context: int):
    """Yields the passes whose samples are in no file yet: (file, tasks, sample numbers, span).

    A generator, because corrections can be listed only when their answers have been written.
    """
    for name, asked in tasks.items():
        file = config.file(name)
        k = config.answers(name)
        width = 1 + PASS_SAMPLES // len(asked)  # answers to each question in a pass
        drawn = len(read(file)) // len(asked)
        for start in range(drawn, k, width):
            yield file, asked, range(start, min(start + width, k)), None
        if config.self_correct:
            answers = [row for row in read(file) if row["sample"] < k]
            todo = correction_tasks(tokenizer, answers, config.max_new_tokens, max_context)
            file = config.file(f"{name}.corrections")
            for start in range(len(read(file)), len(todo), PASS_SAMPLES):
                yield file, todo[start : start + PASS_SAMPLES], range(1), "sections"


def correction_tasks(tokenizer, answers: list[dict], max_new_tokens, max_context) -> list[Task]:
    """Correction tasks (Eq. 10) for those of these `records` that are finished and that fit."""
    tasks = []
    for row in answers:
        shown = reward.after_thinking(row["response"])
        if not row["finished"] or not shown:
            continue
        task = rollout.correction_task(
            tokenizer, row["problem"], row["gold"], shown, row["question"], corrects=row["sample"]
        )
        if rollout.fits(task.prompt, max_new_tokens, max_context):
            tasks.append(task)
    return tasks


def records(groups: list[Group], numbers=range(1)) -> list[dict]:
    """What is kept of samples number `numbers`: all of the first, then all of the next, so that the
    order does not depend on a pass's width. A correction has the number of its answer."""
    rows = []
    for i, number in enumerate(numbers):
        for group in groups:
            sample = group.samples[i]
            rows.append({
                "question": group.question,
                "sample": number if group.corrects is None else group.corrects,
                "problem": group.problem, "gold": group.answer, "response": sample.text,
                "solution": sample.solution,  # of a correction: what Eq. 11 grades
                "finished": sample.finished, "tokens": len(sample.token_ids),
            })
    return rows


def read(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; none if the file is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in open(path)]


def write(path: Path, rows: list[dict]) -> None:
    """Writes JSON lines, all or nothing: after a kill the file is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def accuracy(groups: list[Group]) -> tuple[float, float]:
    """(share right, its standard error) of graded groups, one for each question; nan for none.

    The samples of a question are not independent: their mean is one observation.
    """
    means = pandas.Series([np.mean(group.rewards) for group in groups], dtype=float)
    return float(means.mean()), float(means.sem())


def report(config: EvalConfig, names, settings: dict) -> None:
    """Grades the files up to k; writes graded.csv and the table, and prints it, in per cent."""
    rows = []
    for name in names:
        k = config.answers(name)
        for file in (config.file(name), config.file(f"{name}.corrections")):
            rows += [{"benchmark": name} | row for row in read(file) if row["sample"] < k]
    frame = pandas.DataFrame(rows)
    texts = frame.solution.fillna(frame.response)
    with reward.Grader(os.cpu_count()) as grader:  # Eqs. 1, 11
        frame["verdict"] = grader.verdicts(list(texts), list(frame.gold), list(frame.problem))
    frame["right"] = frame.verdict == "right"
    # An answer's row comes before that of its correction. A wrong answer whose correction is right
    # was repaired; a right answer whose correction is wrong was spoiled.
    answer_right = frame.groupby(["benchmark", "question", "sample"]).right.transform("first")
    frame["kind"] = np.where(answer_right, "corrections of right", "corrections of wrong")
    frame.loc[frame.solution.isna(), "kind"] = "answers"
    kept = frame.drop(columns=["response", "solution"])
    kept.to_csv(Path(config.output, "graded.csv"), index=False)
    frame["ungradable"] = frame.verdict == "ungradable"
    samples = frame.groupby(["benchmark", "kind"])
    questions = frame.groupby(["benchmark", "kind", "question"]).right.agg(["mean", "any"])
    means = questions.groupby(["benchmark", "kind"])  # each question counts the same
    table = pandas.DataFrame({
        "avg@k": 100 * means["mean"].mean(),
        "SE": 100 * means["mean"].sem(),  # as in `accuracy`
        # With k drawn, Chen et al.'s unbiased estimator (2107.03374) is whether any is right.
        "pass@k": 100 * means["any"].mean(),
        "tokens": samples.tokens.mean(),
        "cut off": 100 - 100 * samples.finished.mean(),
        "ungradable": 100 * samples.ungradable.mean(),
        "questions": means.size(),
        "samples": samples.size(),
    })
    table.to_csv(Path(config.output, "summary.csv"))
    print(table.to_string(float_format="%.1f"))
    for name, value in settings.items():
        print(f"{name}: {value!r}")
    print(f"{config.output} has all of it")


def compare(folders: list[str]) -> None:
    """Prints each folder's difference to the first, on the problems that all of them answered."""
    right = {}
    for folder in folders:
        file = Path(folder, "graded.csv")
        if not file.exists():
            fail(f"--compare: there is no {file}; evaluate that model first")
        frame = pandas.read_csv(file, keep_default_na=False).query("kind == 'answers'")
        right[folder] = 100 * frame.groupby(["benchmark", "problem"]).right.mean()
    common = pandas.DataFrame(right).dropna()
    if common.empty:
        fail("--compare: there is no problem that all of them answered")
    rng = np.random.default_rng(0)
    for name, shares in common.groupby("benchmark"):
        count = len(shares)
        paired = shares.sub(shares[folders[0]], axis=0)
        # A bootstrap resample is represented by how often each problem occurs in it.
        resamples = rng.multinomial(count, np.full(count, 1 / count), size=10_000)
        means = resamples @ paired / count
        table = pandas.DataFrame({
            "right (%)": shares.mean(),
            "difference": paired.mean(),
            "from": means.quantile(0.025),
            "to": means.quantile(0.975),
        })
        print(f"{name}, {count} problems: difference to the baseline {folders[0]}, 95 % bootstrap")
        print(table.to_string(float_format="%.1f"))


def main(arguments=None) -> None:
    """May be called any number of times in a process."""
    rank, _, device = rollout.start_distributed()
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
