"""A model -> its accuracy on the benchmarks, with error bars, and every completion and judgement kept.

    python evaluate.py                                                         # the toy on its own test, no GPU
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output eval/vanilla      # the paper's five benchmarks
    python evaluate.py --model runs/mine/final --benchmarks aime24 my/problems.jsonl --k 16 --self_correct
    python evaluate.py --regrade eval/vanilla/completions.jsonl                # no model: only the grader, again
    python evaluate.py --compare eval/vanilla eval/grpo eval/scrpo             # paired, beside the paper's figures

1. Problems. Benchmarks by name, from the hub or a folder of NAME.jsonl files, or any JSONL by its path, with one
   {"problem": ..., "answer": ...} a line.
2. Sampling. k samples of each question; question q is the work of rank q mod world. A sample's randomness is a
   function of (seed, question, sample) alone, so ranks, batches and interruptions change nothing.
3. Grading. The last \\boxed{} against the gold (Eq. 1). A grading that fails or runs out of time is "ungradable":
   it counts as wrong, and its share is printed.
4. Files, in --output: completions.jsonl, appended after every chunk of samples; state.json, which says how much of
   it is whole and under which settings; in the end summary.json, table.md and accuracy.png. Killed at any moment, the
   same command goes on and ends with the same bytes. (So on a CPU. On a GPU the last bits of a logit depend on the
   batch, so another number of ranks may turn a sample.)
5. Figures. avg@k, the mean over k samples and then over questions, is pass@1 with less noise than one sample has.
   SE is its standard error over questions and samples both: how good is the model at questions like these?
   Sampling SE is the part that another seed would change on these very questions; it shrinks with k.
   pass@k is the chance of at least one right among k, without bias.
6. --self_correct. Each finished first answer, wrong or right, goes back as a correction prompt (Eq. 10). How often are
   wrong answers put right (Eq. 11), and how often are right ones spoiled?
7. --compare. Differences between models on the same questions, which two separate error bars cannot show, with 95 %
   bootstrap intervals over questions.

Defaults are R1-Distill's protocol (2501.12948): temperature 0.6, top_p 0.95, 32,768 tokens, no system prompt, the
instruction in the user turn, 64 samples a question on the small benchmarks. Another length or k is another
measurement, so every setting is printed under the table and stored with it.
"""

import datetime
import fcntl
import hashlib
import json
import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from error_pool import after_thinking, correction_prompt
from reward import Grader, final_answer, find_correction
from rollout import INSTRUCTION, fits, load_problems, make_engine, render, sample_seed, solution_prompt

HERE = Path(__file__).resolve().parent
BENCHMARKS = {  # the paper's five: (hub id, samples a question). 64: R1-Distill's protocol; 4 on the larger ones: ours
    "aime24": ("HuggingFaceH4/aime_2024", 64),
    "amc23": ("math-ai/amc23", 64),
    "olympiad": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", 4),
    "math500": ("HuggingFaceH4/MATH-500", 4),
    "gsm8k": ("openai/gsm8k:main:test", 4),
}
OTHER_K = 4  # of a JSONL given by its path
PARTS = ("completions.jsonl", "corrections.jsonl")
PROMPT_ROOM = 8192  # tokens of context kept for the prompt, where the model has them
PAPER = (  # (method, AIME-2024, average of the five), arXiv 2511.06065; nothing else of its table is known here
    ("GRPO, 1.5B", "+3.4 over vanilla", "–"),
    ("DAPO, 1.5B", "+4.5 over vanilla", "–"),
    ("ScRPO, 1.5B", "+5.7 over vanilla", "64.8 (+6.0 over vanilla)"),
    ("ScRPO, 7B", "–", "77.8 (+3.2 over vanilla)"),
)


# ================================================================================================== 1. settings


def flag(default, text):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class EvalConfig:
    """What is measured, how, and where it is written."""

    model: str = flag(str(HERE / "toy"), "folder or hub id of a Hugging Face causal language model")
    benchmarks: list[str] = flag([], f"names ({', '.join(BENCHMARKS)}) or paths of JSONL files; none: these five, or "
                                     "the test.jsonl that lies in the model's folder, as in toy/")  # fmt: skip
    benchmarks_dir: Optional[str] = flag(None, "folder with NAME.jsonl for each name; none: names are fetched from the hub")
    k: int = flag(0, "samples a question; 0: 64 for aime24 and amc23, else 4, and 1 at temperature 0")
    temperature: float = flag(0.6, "of sampling, 0: greedy; 0.6 is R1-Distill's protocol")
    top_p: float = flag(0.95, "sample from the likeliest tokens that together have this probability; 0.95: R1-Distill")
    max_new_tokens: int = flag(0, "longest response; 0: R1-Distill's 32768, or half the context of a smaller model")
    seed: int = flag(0, "decides every sample, together with the question's and the sample's number")
    self_correct: bool = flag(False, "measure corrections of the first answers too; may be added when these are there")
    output: Optional[str] = flag(None, "folder of all that is written; none: eval/MODEL, FILE-regraded, or eval/A-vs-B")
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "engine; auto: vLLM if installed and there is a GPU")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "of the weights; auto: bf16 on a GPU, else fp32")
    memory_share: float = flag(0.7, "share of memory for sampling: vLLM's with its weights, or Transformers' cache")
    chunk_samples: int = flag(2048, "samples between two writes, over all ranks: what an interruption can cost")
    grader_workers: int = flag(2, "grading processes a rank")
    regrade: Optional[str] = flag(None, "JSONL to grade again; each line needs `response`, and `gold` or `answer`")
    compare: list[str] = flag([], "folders of finished evaluations; the first is the one that others are compared with")


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the text above as it stands, and every default."""


def parse(arguments):
    """The command line as an EvalConfig; what is wrong with it ends every rank with one line."""
    parser = HfArgumentParser(EvalConfig, allow_abbrev=False, description=__doc__, formatter_class=Help)
    parser.error = lambda message: fail(f"{message}; see evaluate.py --help")
    c, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    for wrong, message in (
        (unknown, f"unknown argument {' '.join(unknown[:1])}; see evaluate.py --help"),
        (c.k < 0, f"--k {c.k}: must be positive, or 0 for each benchmark's own"),
        (c.temperature < 0, f"--temperature {c.temperature}: must not be negative"),
        (c.temperature == 0 and c.k > 1, f"--k {c.k}: at --temperature 0 all samples are equal, use --k 1"),
        (not 0 < c.top_p <= 1, f"--top_p {c.top_p}: must be above 0 and at most 1"),
        (c.max_new_tokens < 0, f"--max_new_tokens {c.max_new_tokens}: must be positive, or 0 for the default"),
        (not 0 < c.memory_share < 1, f"--memory_share {c.memory_share}: must lie between 0 and 1"),
        (c.chunk_samples < 1, f"--chunk_samples {c.chunk_samples}: must be positive"),
        (c.grader_workers < 1, f"--grader_workers {c.grader_workers}: must be positive"),
        (c.regrade and c.compare, "--regrade and --compare are two jobs: give one of them"),
        (len(c.compare) == 1, "--compare needs two folders or more: the baseline, then what is compared with it"),
    ):  # fmt: skip
        if wrong:
            fail(message)
    return c


# ================================================================================================= 2. processes


def start_distributed(timeout_s=1800):
    """(rank, world, device) under torchrun or plain python. `timeout_s`: how long one rank may wait for another.

    Alone, a HashStore serves: no port is opened, so any number of runs fit on a machine. Python objects travel
    over gloo, tensors on a GPU over NCCL.
    """
    alone = "RANK" not in os.environ
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)  # vLLM reads them too
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s),
        **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
    )  # fmt: skip
    return dist.get_rank(), dist.get_world_size(), device


def gather(items):
    """All ranks' lists as one, in rank order, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def on_rank0(function, *arguments):
    """function(*arguments), run on rank 0 and returned on every rank; its error ends every rank with one line."""
    result = []
    if dist.get_rank() == 0:
        try:
            result = [function(*arguments)]
        except (ValueError, OSError) as error:
            result = [error]
    (result,) = gather(result)
    return fail(result) if isinstance(result, Exception) else result


def warn(message, kind="warning"):
    """One line, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{kind}: {message}", file=sys.stderr, flush=True)


def fail(message):
    """One line from rank 0, exit code 2 on all. Call it on every rank: one left behind would wait for the others."""
    warn(message, "error")
    raise SystemExit(2)


# ================================================================================================== 3. sampling


def askable(engine, tokenizer, problems, max_new_tokens):
    """Indices of the problems whose prompt and longest response fit into the context; warns about the others."""
    prompts = [render(tokenizer, solution_prompt(p.problem)) for p in problems]
    fitting = [q for q, prompt in enumerate(prompts) if fits(prompt, max_new_tokens, engine.max_context)]
    if len(fitting) < len(problems):
        left_out = sorted(set(range(len(problems))) - set(fitting))
        warn(f"{len(left_out)} of {len(problems)} problems are left out, prompt and {max_new_tokens} new tokens exceed the "
             f"context of {engine.max_context}: numbers {', '.join(map(str, left_out[:9]))}{' ...' * (len(left_out) > 9)}")
    return fitting


def respond(engine, tokenizer, turns, streams, k, seed, **sampling):
    """k responses to each user turn, [turns][k] dicts. Sample i of a turn depends on (seed, its stream, i) alone."""
    prompts = [render(tokenizer, turn) for turn in turns]
    seeds = [[sample_seed(seed, 0, stream, i) for i in range(k)] for stream in streams]  # training's steps start at 1
    groups = engine.generate(prompts, k, seeds=seeds, **sampling) if prompts else []
    return [[{"sample": i, "seed": seeds[b][i], "prompt": tokenizer.decode(prompts[b]), "token_ids": o.token_ids,
              "response": o.text, "finished": o.finished} for i, o in enumerate(group)]
            for b, group in enumerate(groups)]  # fmt: skip


def sample_answers(engine, tokenizer, problems, grader, *, k, temperature, top_p, max_new_tokens, seed,
                   questions=None, progress=None):  # fmt: skip
    """k graded answers to each problem (Eq. 1), or to those whose indices are `questions`: sorted, on every rank.

    Collective: question q is the work of rank q mod world.
    """
    if questions is None:
        questions = askable(engine, tokenizer, problems, max_new_tokens)
    mine = [q for q in questions if q % dist.get_world_size() == dist.get_rank()]
    groups = respond(engine, tokenizer, [solution_prompt(problems[q].problem) for q in mine], mine, k, seed,
                     temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, progress=progress)  # fmt: skip
    answers = [{"question": q, **response, "answer": final_answer(response["response"]), "gold": problems[q].answer,
                "problem": problems[q].problem, "source": problems[q].source}
               for q, group in zip(mine, groups) for response in group]  # fmt: skip
    verdicts = grader.verdicts([r["response"] for r in answers], [r["gold"] for r in answers])  # Eq. 1
    answers = gather([{**r, "verdict": verdict} for r, verdict in zip(answers, verdicts)])
    return sorted(answers, key=lambda r: (r["question"], r["sample"]))


def sample_corrections(engine, tokenizer, records, grader, *, k=1, temperature, top_p, max_new_tokens, seed, progress=None):
    """k graded corrections (Eqs. 10, 11) of each first answer in `records`: sorted, on every rank.

    Collective. As in training, only what follows </think> is shown to the model, and a first answer that is unfinished
    or whose prompt does not fit is left out.
    """
    firsts = []
    for r in records:
        turn = correction_prompt(r["problem"], after_thinking(r["response"]))  # Eq. 10
        if r["finished"] and after_thinking(r["response"]) and fits(
                render(tokenizer, turn), max_new_tokens, engine.max_context):  # fmt: skip
            firsts.append((r, turn))
    mine = firsts[dist.get_rank()::dist.get_world_size()]
    streams = [r["question"] + 1_000_000_007 * (1 + r["sample"]) for r, _ in mine]  # apart from the answers' own
    groups = respond(engine, tokenizer, [turn for _, turn in mine], streams, k, seed,
                     temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, progress=progress)  # fmt: skip
    corrections, solutions = [], []
    for (first, _), group in zip(mine, groups):
        for response in group:
            found = find_correction(response["token_ids"], tokenizer)
            solutions.append(found[2] if found else "")  # Eq. 11: without its sections a correction is wrong
            corrections.append({
                "question": first["question"], "first_sample": first["sample"], **response, "well_formed": found is not None,
                "answer": final_answer(solutions[-1]), "first_verdict": first["verdict"],
                **{name: first[name] for name in ("gold", "problem", "source")}})  # fmt: skip
    verdicts = grader.verdicts(solutions, [r["gold"] for r in corrections])  # Eq. 11
    corrections = gather([{**r, "verdict": verdict} for r, verdict in zip(corrections, verdicts)])
    return sorted(corrections, key=lambda r: (r["question"], r["first_sample"], r["sample"]))


# ================================================================================================ 4. statistics


def clustered_mean(questions, values):
    """(mean, standard error) of one value a sample, when the questions are a sample too; nan where there is none.

    Samples of a question are alike, so they are not so many observations: residuals are first summed within their
    question. With k samples of each it is the spread of the questions' means, std(ddof=1) / sqrt(questions), which
    already holds the noise of the k samples; nothing must be added for it.

    >>> [round(x, 4) for x in clustered_mean([0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0])]  # the questions' means: 1, 0.5, 0
    [0.5, 0.2887]
    """
    values = np.asarray(values, dtype=float)
    _, cluster = np.unique(questions, return_inverse=True)
    mean = values.mean() if len(values) else np.nan
    residuals = np.bincount(cluster, values - mean)
    n = len(residuals)
    return float(mean), float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / len(values)) if n > 1 else np.nan


def accuracy(records):
    """(share right, its standard error over questions and samples both)."""
    return clustered_mean([r["question"] for r in records], [r["verdict"] == "right" for r in records])


def sampling_error(groups):
    """Standard error from sampling alone of the mean over these very questions; nan if one has a single sample.

    A question's mean has variance p(1-p)/k, which (right/k)(1 - right/k)/(k-1) estimates without bias.

    >>> round(sampling_error([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]), 4)
    0.1179
    """
    if min(map(len, groups)) < 2:
        return np.nan
    return math.sqrt(sum(np.mean(g) * (1 - np.mean(g)) / (len(g) - 1) for g in groups)) / len(groups)


def pass_at_k(n, right, k):
    """Chance of at least one right among k, from `right` of n, without bias (Chen et al. 2021, 2107.03374, Eq. 1).

    Not 1 - (1 - right/n)**k, which is too low: it draws with replacement.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def bootstrap(differences, draws=10_000, seed=0):
    """[draws] means of `differences` [Q], the Q questions drawn anew with replacement each time."""
    n = len(differences)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws,Q] how often each is drawn
    return times @ np.asarray(differences) / n


def summarize(records):
    """The figures of one benchmark; nan where one sample or one question cannot tell, or a regraded file does not."""
    groups = defaultdict(list)
    for r in records:
        groups[r["question"]].append(r["verdict"] == "right")
    k = min(map(len, groups.values()))
    mean, error = accuracy(records)
    share = lambda name, value: np.mean([r[name] == value if name in r else np.nan for r in records])
    return {
        "questions": len(groups), "k": k, "accuracy": mean, "se": error, "se_sampling": sampling_error(list(groups.values())),
        "tokens": np.mean([r.get("tokens", np.nan) for r in records]),
        "truncated": share("finished", False), "ungradable": share("verdict", "ungradable"),
        **{f"pass@{j}": np.mean([pass_at_k(len(g), sum(g), j) for g in groups.values()])
           for j in sorted({2**i for i in range(k.bit_length())} | {k})},
    }  # fmt: skip


def summarize_corrections(corrections, answers):
    """Both directions: wrong first answers put right, right first answers spoiled."""
    wrong = [r for r in corrections if r["first_verdict"] != "right"]
    right = [r for r in corrections if r["first_verdict"] == "right"]
    (corrected, corrected_se), (kept, kept_se), (after, after_se) = map(accuracy, (wrong, right, corrections))
    well_formed = lambda part: clustered_mean([r["question"] for r in part], [r["well_formed"] for r in part])[0]
    return {
        "wrong": len(wrong), "corrected": corrected, "corrected_se": corrected_se, "well_formed_of_wrong": well_formed(wrong),
        "right": len(right), "spoiled": 1 - kept, "spoiled_se": kept_se, "well_formed_of_right": well_formed(right),
        "before": len(right) / max(1, len(corrections)), "after": after, "after_se": after_se,
        "left_out": len(answers) - len(corrections),
    }  # fmt: skip


# ===================================================================================================== 5. files


def write_json(path, value):
    """Whole or not at all: a kill leaves the old file or the new one. nan, which JSON has not, becomes null."""

    def plain(x):
        if isinstance(x, dict):
            return {name: plain(y) for name, y in x.items()}
        return [plain(y) for y in x] if isinstance(x, (list, tuple)) else None if x != x else x

    path.with_suffix(".tmp").write_text(json.dumps(plain(value), indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def open_output(folder, settings):
    """state.json of the folder: new, or as an evaluation with the same settings left it. On rank 0 only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock lasts until the process ends, however it ends.
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = "another evaluation is writing there" if isinstance(error, BlockingIOError) else error.strerror
        raise ValueError(f"--output {folder}: {reason}; name another folder") from None
    path, sizes = folder / "state.json", {part: (folder / part).stat().st_size for part in PARTS if (folder / part).exists()}
    if not path.exists():
        if sizes:
            raise ValueError(f"--output {folder} holds completions, but no state.json to continue from; name another folder")
        write_json(path, {"settings": settings} | {part: {"questions": 0, "bytes": 0} for part in PARTS})
    state = json.loads(path.read_text())
    for name in state["settings"] | settings:
        if (there := state["settings"].get(name)) != (here := settings.get(name)):
            raise ValueError(f"--output {folder} was begun with another {name}, {there!r}, not {here!r}; name another folder, "
                             "or continue with its own settings")  # fmt: skip
    for part in PARTS:
        if sizes.get(part, 0) < state[part]["bytes"]:
            raise ValueError(f"{folder / part} is shorter than state.json says; restore it, or name another --output")
    return state


def fill(folder, part, state, tasks, k, chunk_samples, sample):
    """Appends to the file `part` the records of all (benchmark, question) in `tasks`, on from where state.json says.

    sample(benchmark, questions, progress) -> records. Collective.
    """
    done, rank = state[part], dist.get_rank()
    count = lambda tasks: sum(k[name] for name, _ in tasks)
    if rank == 0:
        (folder / part).touch()
        os.truncate(folder / part, done["bytes"])  # what a killed run wrote but did not confirm
    with tqdm(total=count(tasks), initial=count(tasks[:done["questions"]]), desc=part.split(".")[0], unit="sample",
              mininterval=1, disable=rank > 0) as bar:  # fmt: skip
        while todo := tasks[done["questions"]:]:
            name = todo[0][0]
            questions = [q for other, q in todo[:max(1, chunk_samples // k[name])] if other == name]
            records = sample(name, questions, lambda n: bar.update(n * dist.get_world_size()))  # the other ranks: a guess
            done["questions"] += len(questions)
            bar.n = count(tasks[:done["questions"]])
            if rank == 0:
                with open(folder / part, "a") as file:
                    file.writelines(json.dumps({"benchmark": name, **r}) + "\n" for r in records)
                    file.flush()
                    os.fsync(file.fileno())
                done["bytes"] = (folder / part).stat().st_size
                write_json(folder / "state.json", state)
    gather([])  # nobody reads on before rank 0 has written


def read_records(path):
    """{benchmark: records}, without prompts, and of token ids only their number: it is what figures need."""
    records = defaultdict(list)
    with open(path) as lines:
        for record in map(json.loads, lines):
            record.pop("prompt", None)
            if "token_ids" in record:
                record["tokens"] = len(record.pop("token_ids"))
            records[record["benchmark"]].append(record)
    return records


def fingerprint(model):
    """Of a checkpoint's files: other weights under the same path are another model; a hub model's is its commit.

    Large files count by their size and 64 blocks: an optimizer step leaves no block as it was, and reading 15 GB takes
    longer than loading them.
    """
    if not Path(model.name_or_path).is_dir():
        return model.config._commit_hash
    digest = hashlib.sha256()
    for path in sorted(Path(model.name_or_path).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja"):
            digest.update(f"{path.name} {(size := path.stat().st_size)}".encode())
            with open(path, "rb") as file:
                for start in range(0, size, max(4096, size // 64)):
                    file.seek(start)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:12]


# ==================================================================================================== 6. report


def percent(value, error=np.nan):
    """
    >>> percent(0.4567), percent(0.4567, 0.0123), percent(np.nan)
    ('45.7', '45.7 ± 1.2', '–')
    """
    return f"{100 * value:.1f} ± {100 * error:.1f}".replace(" ± nan", "").replace("nan", "–")


def markdown(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def average(figures):
    """(mean, standard error) over benchmarks of (mean, standard error): each counts the same, as in the paper."""
    means, errors = zip(*figures)
    return float(np.mean(means)), math.hypot(*errors) / len(errors)


def report(folder, settings, corrections=False):
    """Writes summary.json, table.md and accuracy.png about the completions in `folder`, and prints the table."""
    answers = read_records(folder / PARTS[0])
    first = {name: summarize(records) for name, records in answers.items()}
    series = {"avg@k": {name: (f["accuracy"], f["se"]) for name, f in first.items()}}
    mean, error = average(series["avg@k"].values())
    summary = {"settings": settings, "benchmarks": first, "average": {"accuracy": mean, "se": error}}
    text = markdown(
        ["benchmark", "questions", "k", "avg@k ± SE (%)", "sampling SE", "pass@k", "tokens", "truncated (%)", "ungradable (%)"],
        [[name, str(f["questions"]), str(f["k"]), percent(f["accuracy"], f["se"]), percent(f["se_sampling"]),
          percent(f[f"pass@{f['k']}"]), f"{f['tokens']:.0f}".replace("nan", "–"), percent(f["truncated"]),
          percent(f["ungradable"])] for name, f in first.items()]
        + [["average", "", "", percent(mean, error), *[""] * 5]] * (len(first) > 1))  # fmt: skip
    if corrections:
        second = {n: summarize_corrections(r, answers[n]) for n, r in read_records(folder / PARTS[1]).items()}
        summary["self_correction"] = second
        series["after self-correction"] = {name: (f["after"], f["after_se"]) for name, f in second.items()}
        text += "\n" + markdown(
            ["self-correction", "wrong first", "put right (%)", "well-formed (%)", "right first", "spoiled (%)",
             "well-formed (%)", "right before (%)", "right after (%)", "left out"],
            [[name, str(f["wrong"]), percent(f["corrected"], f["corrected_se"]), percent(f["well_formed_of_wrong"]),
              str(f["right"]), percent(f["spoiled"], f["spoiled_se"]), percent(f["well_formed_of_right"]),
              percent(f["before"]), percent(f["after"], f["after_se"]), str(f["left_out"])]
             for name, f in second.items()])  # fmt: skip
    text += "\n" + "".join(f"- {name}: {value}\n" for name, value in settings.items())
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(text)
    draw(folder / "accuracy.png", series)
    print(f"{text}\nIn {folder}: {PARTS[0]}, summary.json, table.md, accuracy.png")


def draw(path, series):
    """Bars with error bars of one standard error; `series` is {label: {benchmark: (mean, standard error)}}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure, axes = plt.subplots(figsize=(max(5, 2 + 1.2 * len(names)), 4), layout="constrained")
    for i, (label, values) in enumerate(series.items()):
        places = [names.index(name) + 0.8 * ((i + 0.5) / len(series) - 0.5) for name in values]
        means, errors = 100 * np.nan_to_num(list(values.values())).T
        axes.bar(places, means, 0.8 / len(series), yerr=errors, capsize=3, label=label)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="right (%)", ylim=(0, 100))
    axes.legend(frameon=False).set_in_layout(False)  # or a long name would squeeze the bars out
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ============================================================================================ 7. the three jobs


def load_benchmarks(c):
    """{name: problems} of --benchmarks; ValueError, one line, for what is not there."""
    own = Path(c.model) / "test.jsonl"
    benchmarks = {}
    for item in c.benchmarks or ([str(own)] if own.exists() and not c.benchmarks_dir else BENCHMARKS):
        name = Path(item).name.removesuffix(".jsonl")
        if item.endswith(".jsonl"):
            source = item
        elif c.benchmarks_dir:
            source = str(Path(c.benchmarks_dir) / f"{item}.jsonl")
        elif item in BENCHMARKS:
            source = BENCHMARKS[item][0]
        else:
            raise ValueError(f"--benchmarks {item}: neither a path ending in .jsonl nor one of {', '.join(BENCHMARKS)}")
        if name in benchmarks:
            raise ValueError(f"--benchmarks {item}: another one is called {name} too; rename the file")
        benchmarks[name] = load_problems(source)
    return benchmarks


def load_model(c, device):
    """(model, tokenizer); ValueError, one line, if they are not there."""
    precision = c.precision if c.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    try:
        model = AutoModelForCausalLM.from_pretrained(c.model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        return model.to(device).eval(), AutoTokenizer.from_pretrained(c.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {c.model} is neither a checkpoint's folder nor a hub id that can be loaded: "
                         + " ".join(str(error).split())[:200]) from None  # fmt: skip


def evaluate(c):
    """Job 1, on every rank: sample, grade, report."""
    rank, _, device = start_distributed(timeout_s=24 * 3600)  # one rank's chunk of long answers may take hours more
    try:
        benchmarks = load_benchmarks(c)
        model, tokenizer = load_model(c, device)
    except ValueError as error:
        fail(error)
    context = model.config.max_position_embeddings
    length = c.max_new_tokens or min(32768, context // 2)
    engine = make_engine(c.rollout, model, tokenizer, model_path=c.model, seed=c.seed, memory_share=c.memory_share,
                         max_context=min(context, length + PROMPT_ROOM))  # fmt: skip
    asked = {name: askable(engine, tokenizer, problems, length) for name, problems in benchmarks.items()}
    for name in asked:
        if not asked[name]:
            fail(f"no problem of {name} leaves {length} tokens of a context of {engine.max_context}: lower --max_new_tokens")
    k = {name: c.k or (1 if c.temperature == 0 else BENCHMARKS.get(name, ("", OTHER_K))[1]) for name in benchmarks}
    settings = {"model": c.model, "weights": fingerprint(model)} | {
        name: f"{len(asked[name])} of {len(problems)} questions, k = {k[name]}, sha256 "
              + hashlib.sha256(repr([(p.problem, p.answer) for p in problems]).encode()).hexdigest()[:12] for name, problems in benchmarks.items()} | {
        "temperature": c.temperature, "top_p": c.top_p, "max_new_tokens": length, "seed": c.seed,
        "prompt": f"problem, newline, {INSTRUCTION!r}; {'the' if tokenizer.chat_template else 'no'} chat template; no system prompt",
        "engine": f"{engine.name}, {str(model.dtype).removeprefix('torch.')} on {device.type}",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "math-verify"))}  # fmt: skip
    folder = Path(c.output or f"eval/{Path(c.model).name}")
    state = on_rank0(open_output, folder, settings)
    tasks = [(name, q) for name in benchmarks for q in asked[name]]
    sampling = {"temperature": c.temperature, "top_p": c.top_p, "max_new_tokens": length, "seed": c.seed}

    with Grader(workers=c.grader_workers) as grader:
        for name, problems in benchmarks.items() if rank == 0 else ():
            if bad := grader.unparsable([p.answer for p in problems]):
                warn(f"{name}: {len(bad)} golds cannot be read as mathematics and are matched as text only, the first is "
                     f"{problems[bad[0]].answer[:60]!r}")  # fmt: skip
        fill(folder, PARTS[0], state, tasks, k, c.chunk_samples,
             lambda name, questions, progress: sample_answers(engine, tokenizer, benchmarks[name], grader, k=k[name],
                                                              questions=questions, progress=progress, **sampling))  # fmt: skip
        if c.self_correct:
            firsts = read_records(folder / PARTS[0])
            fill(folder, PARTS[1], state, tasks, k, c.chunk_samples,
                 lambda name, questions, progress: sample_corrections(
                     engine, tokenizer, [r for r in firsts[name] if r["question"] in questions], grader,
                     progress=progress, **sampling))  # fmt: skip
    if rank == 0:
        report(folder, settings, corrections=state[PARTS[1]]["questions"] == len(tasks))


def completions(path):
    """Lines of any JSONL with `response` and `gold` (or `answer`) as records; one line of error for what is none."""
    numbers = {}  # a question without a number is known by its text, or by its line
    with open(path) as lines:
        for n, line in enumerate(lines, 1):
            try:
                r = json.loads(line)
                gold = r["gold"] if "gold" in r else r["answer"]  # in our own files `answer` is what was found
                if not (isinstance(r["response"], str) and isinstance(gold, str)):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                fail(f"{path}, line {n}: a JSON object with the texts `response` and `gold` (or `answer`) is needed here")
            number = numbers.setdefault(r.get("problem", n), len(numbers))
            yield {"benchmark": path.stem, "question": number, **r, "gold": gold}


def regrade(c):
    """Job 2, in one process: a file's completions graded again, without a model, into another folder."""
    source = Path(c.regrade)
    folder = Path(c.output or f"{source.with_suffix('')}-regraded")
    if not source.is_file():
        fail(f"--regrade {source}: there is no such file; name a completions.jsonl")
    if (folder / PARTS[0]).exists():
        fail(f"--output {folder} holds {PARTS[0]} already, which would be lost: name another folder")
    # Eq. 11 in a file of corrections: one without its sections is wrong, whatever it has boxed.
    items = [(r["response"] if r.get("well_formed", True) else "", r["gold"]) for r in completions(source)]
    if not items:
        fail(f"--regrade {source}: the file is empty")
    verdicts, changes = [], Counter()
    with Grader(workers=c.grader_workers) as grader:
        for start in tqdm(range(0, len(items), 500), desc="grading", unit="500 completions"):
            verdicts += grader.verdicts(*zip(*items[start:start + 500]))  # Eq. 1
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "unfinished.tmp", "w") as file:
        for r, verdict in zip(completions(source), verdicts):
            changes[f"{r.get('verdict', verdict)} -> {verdict}"] += 1
            file.write(json.dumps({**r, "answer": final_answer(r["response"]), "verdict": verdict}) + "\n")
    os.replace(folder / "unfinished.tmp", folder / PARTS[0])
    state = source.with_name("state.json")
    report(folder, (json.loads(state.read_text())["settings"] if state.exists() else {})
           | {"regraded": str(source), "regraded with": f"math-verify {version('math-verify')}"})  # fmt: skip
    print("verdicts: " + ", ".join(f"{change} {n}" for change, n in sorted(changes.items())))


def question_means(folder):
    """({benchmark: {(problem, gold): share of its samples that are right}}, settings) of a finished evaluation."""
    if not (folder / "summary.json").is_file():
        fail(f"--compare {folder}: no summary.json there; name the folder of a finished evaluation, or finish it first")
    means = {}
    for name, records in read_records(folder / PARTS[0]).items():
        groups = defaultdict(list)
        for r in records:
            groups[r.get("problem", str(r["question"])), r["gold"]].append(r["verdict"] == "right")
        means[name] = {question: np.mean(group) for question, group in groups.items()}
    return means, json.loads((folder / "summary.json").read_text())["settings"]


def compare(c):
    """Job 3, in one process: paired differences from the first evaluation, and the paper's figures beside them."""
    runs, settings = zip(*(question_means(Path(folder)) for folder in c.compare))
    base, labels = c.compare[0], [str(Path(folder)) for folder in c.compare]
    shared = {name: sorted(set.intersection(*(set(run.get(name, ())) for run in runs))) for name in runs[0]}
    if not (shared := {name: questions for name, questions in shared.items() if questions}):
        fail(f"--compare {' '.join(c.compare)}: they have no question in common")
    scores = [{name: np.array([run[name][q] for q in shared[name]]) for name in shared} for run in runs]

    summary, rows, series = {"questions": {name: len(q) for name, q in shared.items()}, "runs": {}}, [], {}
    for label, run in zip(labels, scores):
        series[label] = {name: clustered_mean(range(len(x)), x) for name, x in run.items()}
        cells = series[label] | {"average": average(series[label].values())}
        rows.append([label, *(percent(*cell) for cell in cells.values())])
        summary["runs"][label] = {"accuracy": cells}
    for label, run in zip(labels[1:], scores[1:]):
        differences = {name: run[name] - scores[0][name] for name in shared}
        draws = {name: bootstrap(d, seed=i) for i, (name, d) in enumerate(differences.items())}
        means = {name: d.mean() for name, d in differences.items()}
        means["average"], draws["average"] = np.mean(list(means.values())), np.mean(list(draws.values()), axis=0)
        cells = {name: (means[name], *np.quantile(draws[name], (0.025, 0.975))) for name in means}
        rows.append([f"{label} − {labels[0]}", *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in cell))
                                                 for cell in cells.values())])  # fmt: skip
        summary["runs"][label]["difference"] = cells
    for method, aime, five in PAPER:  # never measured here, so never without saying so
        cells = {"aime24": aime, "average": five if set(BENCHMARKS) <= set(shared) else ""}
        rows.append([f"{method} (reported by the paper, not measured here)", *(cells.get(n, "") for n in [*shared, "average"])])
    text = markdown(["right (%) ± SE", *(f"{name}, {len(q)} questions" for name, q in shared.items()), "average"], rows)
    text += "\nDifferences in points, [95 % bootstrap interval over questions], on the questions that all have in common.\n"
    for name in dict.fromkeys(name for s in settings for name in s):
        if len(values := {str(s.get(name)) for s in settings}) > 1 and name not in ("model", "weights"):
            text += f"- not the same {name}: {'; '.join(sorted(values))}\n"
    folder = Path(c.output or "eval/" + "-vs-".join(Path(label).name for label in labels))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", summary | {"reported by the paper, not measured here": PAPER})
    (folder / "comparison.md").write_text(text)
    draw(folder / "comparison.png", series)
    print(f"{text}\nIn {folder}: comparison.md, comparison.json, comparison.png")


def main():
    c = parse(sys.argv[1:])
    if not (c.regrade or c.compare):
        evaluate(c)
    elif os.environ.get("RANK", "0") == "0":  # work for one process
        regrade(c) if c.regrade else compare(c)


if __name__ == "__main__":
    main()
