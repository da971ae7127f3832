"""A model -> its accuracy on the benchmarks, with error bars, and every completion and judgement kept.

    python evaluate.py                                                    # the toy on its own test, no GPU
    torchrun --standalone --nproc_per_node=8 evaluate.py \\
        --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output runs/eval/vanilla    # the paper's benchmarks
    python evaluate.py --model runs/mine/final --benchmarks aime24 my/own.jsonl --k 16 --self_correct
    python evaluate.py --regrade runs/eval/vanilla/completions.jsonl      # no model: only the grader, again
    python evaluate.py --compare runs/eval/vanilla runs/eval/scrpo        # paired, beside the paper's figures

1. Problems. Benchmarks by name, from the hub or a folder of NAME.jsonl files, or any JSONL by its path, with
   one {"problem": ..., "answer": ...} a line.
2. Sampling. k samples of each question; question q is the work of rank q mod world. A sample's randomness is a
   function of (seed, question, sample) alone, so ranks, batches and interruptions change nothing.
3. Grading. The last \\boxed{} against the gold (Eq. 1). What cannot be graded, or not in time, is "ungradable":
   it counts as wrong, and its share is printed.
4. Files, in --output: completions.jsonl, appended after every chunk of samples; state.json, which says how much
   of it is whole and under which settings; in the end summary.json, table.md and accuracy.png. Killed at any
   moment, the same command goes on and ends with the same bytes. (On a CPU. On a GPU the last bits of a logit
   depend on the batch, so another number of ranks, or vLLM's scheduling, may turn a sample.)
5. Figures. avg@k, the mean over k samples and then over questions, is pass@1 with less noise than one sample
   has. SE is its standard error over questions and samples both: how good is the model at questions like these?
   Sampling SE is the part that another seed would change on these very questions; it shrinks with k.
   pass@k is the chance of at least one right among k, without bias.
6. --self_correct. Each finished first answer, wrong or right, goes back as a correction prompt (Eq. 10). How
   often are wrong answers put right (Eq. 11), and how often are right ones spoiled?
7. --compare. Differences between models on the same questions, which two separate error bars cannot show, with
   95 % bootstrap intervals over questions.

Defaults are R1-Distill's protocol (2501.12948): temperature 0.6, top_p 0.95, 32,768 tokens, no system prompt,
the instruction in the user turn, 64 samples a question on the small benchmarks. Another length or k is another
measurement, so every setting is printed under the table and stored with it.
"""

import datetime
import fcntl
import hashlib
import json
import math
import os
import sys
import time
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
from transformers.utils.logging import disable_progress_bar

from error_pool import after_thinking, correction_prompt
from reward import Grader, final_answer, find_correction
from rollout import INSTRUCTION, fits, load_problems, make_engine, render, sample_seed, solution_prompt

HERE = Path(__file__).resolve().parent
BENCHMARKS = {  # the paper's five: (hub id, samples a question). 64: R1-Distill's protocol; 4: ours
    "aime24": ("HuggingFaceH4/aime_2024", 64),
    "amc23": ("math-ai/amc23", 64),
    "olympiad": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP", 4),
    "math500": ("HuggingFaceH4/MATH-500", 4),
    "gsm8k": ("openai/gsm8k:main:test", 4),
}
OTHER_K = 4  # of a JSONL given by its path
PROMPT_ROOM = 8192  # tokens of context kept for the prompt, where the model has them
ANSWERS, CORRECTIONS = "completions.jsonl", "corrections.jsonl"
PAPER = (  # arXiv 2511.06065: method, AIME-2024, average of the five; what is empty is not known here
    ("GRPO 1.5B", "+3.4 over vanilla", ""),
    ("DAPO 1.5B", "+4.5 over vanilla", ""),
    ("ScRPO 1.5B", "+5.7 over vanilla", "all five: 64.8, +6.0 over vanilla"),
    ("ScRPO 7B", "", "all five: 77.8, +3.2 over vanilla"),
)


# ================================================================================================ 1. settings


def flag(default, text):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class EvalConfig:
    """What is measured, how, and where it is written."""

    model: str = flag(str(HERE / "toy"), "folder or hub id of a Hugging Face causal language model")
    benchmarks: list[str] = flag([], f"names ({', '.join(BENCHMARKS)}) or paths of JSONL files; none: "
                                     "these five, or the test.jsonl in the model's own folder, as in toy/")
    benchmarks_dir: Optional[str] = flag(None, "folder with NAME.jsonl for each name; none: from the hub")
    k: int = flag(0, "samples a question; 0: 64 for aime24 and amc23, else 4, and 1 at temperature 0")
    temperature: float = flag(0.6, "of sampling, 0: greedy; 0.6: R1-Distill")
    top_p: float = flag(0.95, "sample from the likeliest tokens that hold this probability; 0.95: R1-Distill")
    max_new_tokens: int = flag(0, "longest response; 0: R1-Distill's 32768, or half of a shorter context")
    seed: int = flag(0, "decides every sample, together with the question's and the sample's number")
    self_correct: bool = flag(False, "measure corrections of the first answers too, now or later")
    output: Optional[str] = flag(None, "folder; none: runs/eval/MODEL, FILE-regraded or runs/eval/A-vs-B")
    rollout: Literal["auto", "vllm", "transformers"] = flag("auto", "auto: vLLM if installed, on a GPU")
    precision: Literal["auto", "fp32", "bf16"] = flag("auto", "of weights; auto: bf16 on a GPU, else fp32")
    memory_share: float = flag(0.7, "of the device, for vLLM with its weights, or for Transformers' cache")
    chunk_samples: int = flag(2048, "samples between two writes, over all ranks; what an interruption costs")
    grader_workers: int = flag(2, "grading processes a rank")
    regrade: Optional[str] = flag(None, "JSONL to grade again; needs `response`, and `gold` or `answer`")
    compare: list[str] = flag([], "folders of finished evaluations; the first is the baseline of the others")


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the text at the top of this file as it stands, and every default."""


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
        (c.max_new_tokens < 0, f"--max_new_tokens {c.max_new_tokens}: must not be negative"),
        (not 0 < c.memory_share < 1, f"--memory_share {c.memory_share}: must lie between 0 and 1"),
        (c.chunk_samples < 1, f"--chunk_samples {c.chunk_samples}: must be positive"),
        (c.grader_workers < 1, f"--grader_workers {c.grader_workers}: must be positive"),
        (c.regrade and c.compare, "--regrade and --compare are two jobs: give one of them"),
        (len(c.compare) == 1, "--compare needs two folders or more, the baseline first"),
    ):
        if wrong:
            fail(message)
    return c


# =============================================================================================== 2. processes


def start_distributed(timeout_s=1800):
    """(rank, world, device) under torchrun or plain python. `timeout_s`: how long a rank may wait for another.

    Alone, a HashStore serves: no port is opened, so any number of runs fit on a machine. Python objects
    travel over gloo, tensors on a GPU over NCCL.
    """
    alone = "RANK" not in os.environ
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)  # vLLM reads them too
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    if alone:
        store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # not on several nodes: their restart counts may differ
            # torchrun keeps one store over its restarts, with stale addresses in it: a name for each start
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, store=store,
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
    )
    return dist.get_rank(), dist.get_world_size(), device


def gather(items):
    """All ranks' lists as one, in rank order, on every rank."""
    if dist.get_world_size() == 1:  # gloo's threads would copy it, and two pools of OpenMP threads slow each other down
        return list(items)
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def warn(message, kind="warning"):
    """One line, from rank 0 only, above its progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"{kind}: {message}", file=sys.stderr)


def fail(message, alone=False):
    """One line from rank 0, exit code 2 on all. Every rank must call it: one left behind would wait.

    `alone`: it may be this rank's own error. The others are ended by torchrun, and it speaks itself if rank 0 does not.
    """
    warn(message, "error")
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(3 if alone else 1)  # with the first process that ends torchrun ends all: rank 0 speaks before that
        if alone:
            print(f"error: rank {rank}: {message}", file=sys.stderr, flush=True)
            os._exit(2)  # no destructor, which might wait for the others
    raise SystemExit(2)


# ================================================================================================ 3. sampling


def askable(engine, tokenizer, problems, max_new_tokens, source):
    """Indices of the problems whose prompt and longest response fit the context; ValueError if none of them does.

    The others are named and counted in one line; `source` says where they come from.
    """
    prompts = [render(tokenizer, solution_prompt(p.problem)) for p in problems]
    fitting = [q for q, prompt in enumerate(prompts) if fits(prompt, max_new_tokens, engine.max_context)]
    room = f"the context of {engine.max_context} tokens with --max_new_tokens {max_new_tokens}"
    if problems and not fitting:
        raise ValueError(f"{source}: no prompt fits {room}; lower --max_new_tokens, or raise the context")
    if left_out := sorted(set(range(len(problems))) - set(fitting)):
        warn(f"{source}: {len(left_out)} of {len(problems)} problems do not fit {room} and are left out; by number: "
             f"{', '.join(map(str, left_out[:9]))}{', ...' * (len(left_out) > 9)}; the first: "
             f"{problems[left_out[0]].problem[:60]!r}")
    return fitting


def check_golds(grader, problems, source):
    """One line, from rank 0, about golds that only a response of the same letters could match."""
    bad = grader.unparsable([p.answer for p in problems]) if dist.get_rank() == 0 else []
    if bad:
        places = ", ".join(f"{q} ({problems[q].answer[:30]!r})" for q in bad[:9])
        warn(f"{source}: {len(bad)} answers cannot be read as mathematics, and only a response with the same letters is "
             f"right; by number: {places}{', ...' * (len(bad) > 9)}")


def respond(engine, tokenizer, prompts, streams, k, seed, **sampling):
    """k responses to each prompt, [prompts][k] dicts. Sample i depends on (seed, its prompt's stream, i) alone."""
    seeds = [[sample_seed(seed, 0, stream, i) for i in range(k)] for stream in streams]  # 0: no training step
    groups = engine.generate(prompts, k, seeds=seeds, **sampling) if prompts else []
    return [[{"sample": i, "seed": seeds[b][i], "prompt": tokenizer.decode(prompts[b]),
              "token_ids": o.token_ids, "response": o.text, "finished": o.finished} for i, o in enumerate(group)]
            for b, group in enumerate(groups)]


def sample_answers(engine, tokenizer, problems, grader, *, k, seed, questions=None, **sampling):
    """k graded answers to each problem (Eq. 1), or only to those numbered in `questions`: sorted, on every rank.

    Collective: question q is the work of rank q mod world. `sampling`: temperature, top_p, max_new_tokens
    and, where one wants it, progress, which is told how many samples of this rank have just ended.
    """
    asked = range(len(problems)) if questions is None else questions
    mine = [q for q in asked if q % dist.get_world_size() == dist.get_rank()]
    prompts = [render(tokenizer, solution_prompt(problems[q].problem)) for q in mine]
    answers = [{"question": q, **response, "answer": final_answer(response["response"]),
                "gold": problems[q].answer, "problem": problems[q].problem, "source": problems[q].source}
               for q, group in zip(mine, respond(engine, tokenizer, prompts, mine, k, seed, **sampling))
               for response in group]
    verdicts = grader.verdicts([r["response"] for r in answers], [r["gold"] for r in answers])  # Eq. 1
    answers = gather([{**r, "verdict": verdict} for r, verdict in zip(answers, verdicts)])
    return sorted(answers, key=lambda r: (r["question"], r["sample"]))


def sample_corrections(engine, tokenizer, records, grader, *, k=1, seed, **sampling):
    """k graded corrections (Eqs. 10, 11) of each first answer in `records`: sorted, on every rank.

    Collective. As in training, the model is shown only what follows </think>, and a first answer that is
    unfinished or whose prompt does not fit is left out.
    """
    tasks = []
    for r in records:
        shown = after_thinking(r["response"])
        prompt = render(tokenizer, correction_prompt(r["problem"], shown))  # Eq. 10
        room = fits(prompt, sampling["max_new_tokens"], engine.max_context)
        tasks += [(r, prompt)] if r["finished"] and shown and room else []
    mine = tasks[dist.get_rank()::dist.get_world_size()]
    streams = [r["question"] + 1_000_000_007 * (1 + r["sample"]) for r, _ in mine]  # not the answers'
    groups = respond(engine, tokenizer, [prompt for _, prompt in mine], streams, k, seed, **sampling)
    corrections, solutions = [], []
    for (first, _), group in zip(mine, groups):
        for response in group:
            closed = after_thinking(response["response"])  # a template's own <think> is not among the ids
            found = find_correction(response["token_ids"], tokenizer) if closed else None
            solutions.append(found[2] if found else "")  # Eq. 11: without its sections a correction is wrong
            corrections.append({
                "question": first["question"], "first_sample": first["sample"], **response,
                "solution": solutions[-1], "answer": final_answer(solutions[-1]), "well_formed": found is not None,
                "first_verdict": first["verdict"],
                **{name: first[name] for name in ("gold", "problem", "source")},
            })
    verdicts = grader.verdicts(solutions, [r["gold"] for r in corrections])  # Eq. 11
    corrections = gather([{**r, "verdict": verdict} for r, verdict in zip(corrections, verdicts)])
    return sorted(corrections, key=lambda r: (r["question"], r["first_sample"], r["sample"]))


# ============================================================================================== 4. statistics


def clustered_mean(questions, values):
    """(mean, standard error) of one value a sample, the questions being a sample too; nan where there is none.

    Samples of a question are alike, so they are not so many observations: residuals are first summed within
    their question. With k samples of each it is the spread of the questions' means, std(ddof=1) / sqrt(questions),
    which already holds the noise of the k samples; nothing must be added for it.

    >>> [round(x, 4) for x in clustered_mean([0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0])]  # questions: 1, 0.5, 0
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
    """Standard error that sampling alone gives the mean over these very questions; nan if one has one sample.

    A question's mean has variance p(1-p)/k, which (right/k)(1 - right/k)/(k-1) estimates without bias.

    >>> round(sampling_error([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]), 4)
    0.1179
    """
    if min(map(len, groups)) < 2:
        return np.nan
    return math.sqrt(sum(np.mean(g) * (1 - np.mean(g)) / (len(g) - 1) for g in groups)) / len(groups)


def pass_at_k(n, right, k):
    """Chance of at least one right among k, from `right` of n, without bias (Chen et al. 2021, 2107.03374).

    Not 1 - (1 - right/n)**k, which is too low: it draws with replacement.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def bootstrap(differences, draws=10_000, seed=0):
    """[draws] means of `differences` [Q], the Q questions drawn anew with replacement each time."""
    n = len(differences)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws,Q]
    return times @ np.asarray(differences) / n


def average(figures):
    """(mean, standard error) over benchmarks of (mean, standard error): all count the same, as in the paper."""
    means, errors = zip(*figures)
    return float(np.mean(means)), math.hypot(*errors) / len(errors)


def summarize(records):
    """The figures of one benchmark; nan for what one sample, one question or a regraded file cannot tell."""
    groups = defaultdict(list)
    for r in records:
        groups[r["question"]].append(r["verdict"] == "right")
    k = min(map(len, groups.values()))
    mean, error = accuracy(records)
    share = lambda name, value: np.mean([r[name] == value if name in r else np.nan for r in records])
    return {
        "questions": len(groups), "k": k,
        "accuracy": mean, "se": error, "se_sampling": sampling_error(list(groups.values())),
        "tokens": np.mean([r.get("tokens", np.nan) for r in records]),
        "truncated": share("finished", False), "ungradable": share("verdict", "ungradable"),
        **{f"pass@{j}": np.mean([pass_at_k(len(g), sum(g), j) for g in groups.values()])
           for j in sorted({2**i for i in range(k.bit_length())} | {k})},
    }


def summarize_corrections(corrections, answers):
    """Both directions: wrong first answers put right, right first answers spoiled."""
    wrong = [r for r in corrections if r["first_verdict"] != "right"]
    right = [r for r in corrections if r["first_verdict"] == "right"]
    (corrected, corrected_se), (kept, kept_se), (after, after_se) = map(accuracy, (wrong, right, corrections))
    well_formed = lambda part: sum(r["well_formed"] for r in part) / len(part) if part else np.nan
    return {
        "wrong": len(wrong), "corrected": corrected, "corrected_se": corrected_se,
        "well_formed_of_wrong": well_formed(wrong),
        "right": len(right), "spoiled": 1 - kept, "spoiled_se": kept_se,
        "well_formed_of_right": well_formed(right),
        "before": len(right) / max(1, len(corrections)), "after": after, "after_se": after_se,
        "left_out": len(answers) - len(corrections),
    }


# =================================================================================================== 5. files


def write_json(path, value):
    """Whole or not at all: a kill leaves the old file or the new. nan, which JSON has not, becomes null."""

    def plain(x):
        if isinstance(x, dict):
            return {name: plain(y) for name, y in x.items()}
        return [plain(y) for y in x] if isinstance(x, (list, tuple)) else None if x != x else x

    path.with_suffix(".tmp").write_text(json.dumps(plain(value), indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def lock(folder):
    """Keeps other processes out of a folder as long as the file that it returns is open. BlockingIOError: one is in it."""
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # some file systems have no locks, and have to do without
    return file


def open_output(folder, settings):
    """(state, None) of the folder, new or left by an evaluation with the same settings, or (None, what is wrong).

    state = {"settings", and for each file of completions how many "questions" and "bytes" are whole}. The
    folder is locked, and the lock never given back: it lasts until the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder)
        os.dup(file.fileno())  # never closed
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        reason = "another evaluation is writing there" if busy else error.strerror
        return None, f"--output {folder}: {reason}; name another folder"
    size = lambda name: (folder / name).stat().st_size if (folder / name).exists() else 0
    if not (folder / "state.json").exists():
        if size(ANSWERS) or size(CORRECTIONS):
            return None, f"--output {folder} holds completions without a state.json; name another folder"
        nothing = {"questions": 0, "bytes": 0}
        write_json(folder / "state.json", {"settings": settings, ANSWERS: nothing, CORRECTIONS: nothing})
    state = json.loads((folder / "state.json").read_text())
    for name in state["settings"] | settings:
        if (there := state["settings"].get(name)) != (here := settings.get(name)):
            return None, (f"--output {folder} was begun with another {name}, {there!r}, not {here!r}; "
                          "name another folder, or go on with its own settings")
    for name in (ANSWERS, CORRECTIONS):
        if size(name) < state[name]["bytes"]:
            return None, f"{folder / name} is shorter than state.json says; name another --output"
    return state, None


def fill(folder, name, state, tasks, k, chunk_samples, sample):
    """Appends the records of all (benchmark, question) in `tasks` to a file, from where state.json says it ends.

    sample(benchmark, questions, progress) -> records. Collective; rank 0 writes.
    """
    done, rank = state[name], dist.get_rank()
    count = lambda tasks: sum(k[benchmark] for benchmark, _ in tasks)
    if rank == 0:
        (folder / name).touch()
        os.truncate(folder / name, done["bytes"])  # what a killed run wrote but did not confirm
    with tqdm(total=count(tasks), initial=count(tasks[:done["questions"]]), desc=name.removesuffix(".jsonl"),
              unit="sample", mininterval=1, disable=rank > 0) as bar:
        while todo := tasks[done["questions"]:]:
            benchmark = todo[0][0]
            questions = [q for b, q in todo[:max(1, chunk_samples // k[benchmark])] if b == benchmark]
            # Other ranks' progress is not known before the gather: rank 0 takes its own for theirs.
            records = sample(benchmark, questions, lambda n: bar.update(n * dist.get_world_size()))
            done["questions"] += len(questions)
            bar.n = count(tasks[:done["questions"]])
            if rank == 0:
                with open(folder / name, "a") as file:
                    file.writelines(json.dumps({"benchmark": benchmark, **r}) + "\n" for r in records)
                    file.flush()
                    os.fsync(file.fileno())
                done["bytes"] = (folder / name).stat().st_size
                write_json(folder / "state.json", state)
    gather([])  # nobody reads on before rank 0 has written


def read_records(path):
    """{benchmark: records}, without prompts, and of token ids only their number: figures need no more."""
    records = defaultdict(list)
    with open(path) as lines:
        for record in map(json.loads, lines):
            record.pop("prompt", None)
            if "token_ids" in record:
                record["tokens"] = len(record.pop("token_ids"))
            records[record["benchmark"]].append(record)
    return records


def fingerprint(model):
    """Of a checkpoint's files: other weights under the same path are another model. Of a hub model: its commit.

    A large file counts by its size and 64 blocks of 4 kB: training leaves none of them as it was, and reading
    all of 15 GB would take as long as loading the model.
    """
    if not Path(model.name_or_path).is_dir():
        return model.config._commit_hash
    digest = hashlib.sha256()
    for path in sorted(Path(model.name_or_path).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for start in range(0, size, max(4096, size // 64)):
                    file.seek(start)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:12]


# ================================================================================================== 6. report


def percent(value, error=np.nan):
    """
    >>> percent(0.4567), percent(0.4567, 0.0123), percent(np.nan)
    ('45.7', '45.7 ± 1.2', '–')
    """
    return f"{100 * value:.1f} ± {100 * error:.1f}".replace(" ± nan", "").replace("nan", "–")


def markdown(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def report(folder, settings, corrections=False):
    """Writes summary.json, table.md and accuracy.png about the completions in `folder`, and prints the table."""
    answers = read_records(folder / ANSWERS)
    first = {name: summarize(records) for name, records in answers.items()}
    series = {"avg@k": {name: (f["accuracy"], f["se"]) for name, f in first.items()}}
    mean, error = average(series["avg@k"].values())
    summary = {"settings": settings, "benchmarks": first, "average": {"accuracy": mean, "se": error}}
    rows = [[name, str(f["questions"]), str(f["k"]), percent(f["accuracy"], f["se"]),
             percent(f["se_sampling"]), percent(f[f"pass@{f['k']}"]), f"{f['tokens']:.0f}".replace("nan", "–"),
             percent(f["truncated"]), percent(f["ungradable"])] for name, f in first.items()]
    rows += [["average", "", "", percent(mean, error), "", "", "", "", ""]] * (len(rows) > 1)
    text = markdown(["benchmark", "questions", "k", "avg@k ± SE (%)", "sampling SE", "pass@k", "tokens",
                     "truncated (%)", "ungradable (%)"], rows)
    if corrections:
        records = read_records(folder / CORRECTIONS)
        second = {name: summarize_corrections(records[name], answers[name]) for name in answers}
        series["after self-correction"] = {name: (f["after"], f["after_se"]) for name, f in second.items()}
        summary["self_correction"] = second
        rows = [[name, str(f["wrong"]), percent(f["corrected"], f["corrected_se"]),
                 percent(f["well_formed_of_wrong"]), str(f["right"]), percent(f["spoiled"], f["spoiled_se"]),
                 percent(f["well_formed_of_right"]), percent(f["before"]), percent(f["after"], f["after_se"]),
                 str(f["left_out"])] for name, f in second.items()]
        text += "\n" + markdown(["self-correction", "wrong first", "put right (%)", "well-formed (%)",
                                 "right first", "spoiled (%)", "well-formed (%)", "right before (%)",
                                 "right after (%)", "left out"], rows)
    text += "\n" + "".join(f"- {name}: {value}\n" for name, value in settings.items())
    write_json(folder / "summary.json", summary)
    (folder / "table.md").write_text(text)
    print(f"{text}\nIn {folder}: {ANSWERS}, summary.json, table.md, accuracy.png")
    draw(folder / "accuracy.png", series)


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


# ========================================================================================== 7. the three jobs


def load_benchmarks(c):
    """{name: problems} of --benchmarks; ValueError, one line, for what is not there."""
    own, benchmarks = Path(c.model) / "test.jsonl", {}
    for item in c.benchmarks or ([str(own)] if own.exists() and not c.benchmarks_dir else BENCHMARKS):
        name = Path(item).name.removesuffix(".jsonl")
        if item.endswith(".jsonl"):
            source = item
        elif c.benchmarks_dir:
            source = str(Path(c.benchmarks_dir) / f"{item}.jsonl")
        elif item in BENCHMARKS:
            source = BENCHMARKS[item][0]
        else:
            raise ValueError(f"--benchmarks {item}: no path of a .jsonl and none of {', '.join(BENCHMARKS)}")
        if name in benchmarks:
            raise ValueError(f"--benchmarks {item}: another one is called {name} too; rename the file")
        benchmarks[name] = load_problems(source)
    return benchmarks


def load_policy(source, dtype, device):
    """(model in eval mode, tokenizer) from a folder or the hub; ValueError, one line, if it is neither. train's too."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval(), tokenizer
    except Exception as error:  # OSError, ValueError, SafetensorError: loaders have no common class
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"--model {source}: no model can be loaded from there ({first[:200]}); name a folder or a hub "
                         "id") from error


def load_model(c, device):
    """(model, tokenizer, engine, longest response); ValueError, one line, if the checkpoint is none."""
    precision = c.precision if c.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    disable_progress_bar()
    model, tokenizer = load_policy(c.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], device)
    context = model.config.max_position_embeddings
    length = c.max_new_tokens or min(32768, context // 2)
    engine = make_engine(c.rollout, model, tokenizer, model_path=c.model, seed=c.seed,
                         memory_share=c.memory_share, max_context=min(context, length + PROMPT_ROOM))
    return model, tokenizer, engine, length


def evaluate(c):
    """Job 1, on every rank: sample, grade, report."""
    rank, _, device = start_distributed(timeout_s=24 * 3600)  # long answers keep a rank busy for hours
    try:
        benchmarks = load_benchmarks(c)
        model, tokenizer, engine, length = load_model(c, device)
        asked = {name: askable(engine, tokenizer, problems, length, name) for name, problems in benchmarks.items()}
    except (ValueError, RuntimeError) as error:
        fail(" ".join(str(error).split())[:500], alone=True)  # one GPU of many may be full
    own_k = lambda name: 1 if c.temperature == 0 else BENCHMARKS.get(name, ("", OTHER_K))[1]
    k = {name: c.k or own_k(name) for name in benchmarks}
    sampling = {"temperature": c.temperature, "top_p": c.top_p, "max_new_tokens": length, "seed": c.seed}
    settings = {"model": c.model, "weights": fingerprint(model)}
    for name, problems in benchmarks.items():
        digest = hashlib.sha256(repr([(p.problem, p.answer) for p in problems]).encode()).hexdigest()[:12]
        settings[name] = f"{len(asked[name])} of {len(problems)} questions ({digest}), k = {k[name]}"
    versions = {name: version(name) for name in ("torch", "transformers", "math-verify")}
    if engine.name == "vllm":
        versions["vllm"] = sys.modules["vllm"].__version__  # its CPU build is a package of another name
    settings |= sampling | {
        "prompt": f"problem, newline, {INSTRUCTION!r}, in the chat template, no system prompt"
                  if tokenizer.chat_template else f"problem, newline, {INSTRUCTION!r}, newline",
        "engine": f"{engine.name}, {model.dtype} on {device.type}",
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
    }
    folder = Path(c.output or f"runs/eval/{Path(c.model).name}")
    ((state, wrong),) = gather([open_output(folder, settings)] if rank == 0 else [])
    if wrong:
        fail(wrong)
    tasks = [(name, q) for name in benchmarks for q in asked[name]]

    with Grader(workers=c.grader_workers) as grader:
        try:
            for name, problems in benchmarks.items():
                check_golds(grader, problems, name)
        except RuntimeError as error:  # the first to need a grading worker
            fail(str(error), alone=True)

        def answer(name, questions, progress):
            return sample_answers(engine, tokenizer, benchmarks[name], grader, k=k[name], questions=questions,
                                  progress=progress, **sampling)

        def correct(name, questions, progress):
            records = [r for r in first[name] if r["question"] in questions]
            return sample_corrections(engine, tokenizer, records, grader, progress=progress, **sampling)

        fill(folder, ANSWERS, state, tasks, k, c.chunk_samples, answer)
        if c.self_correct:
            first = read_records(folder / ANSWERS)
            fill(folder, CORRECTIONS, state, tasks, k, c.chunk_samples, correct)
    if rank == 0:
        report(folder, settings, corrections=state[CORRECTIONS]["questions"] == len(tasks))


def completions(path):
    """Records of a JSONL with `response` and `gold` (or `answer`); a line that is none ends it with one line."""
    numbers = {}  # a question without a number is known by its text, or else by its line
    with open(path) as lines:
        for n, line in enumerate(lines, 1):
            try:
                r = json.loads(line)
                gold = r["gold"] if "gold" in r else r["answer"]  # our `answer` is what was found
                if not (isinstance(r["response"], str) and isinstance(gold, str)):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                fail(f"{path}, line {n}: must be a JSON object with texts `response` and `gold` (or `answer`)")
            number = numbers.setdefault(r.get("problem", n), len(numbers))
            yield {"benchmark": path.stem, "question": number, **r, "gold": gold}


def regrade(c):
    """Job 2, in one process: a file's completions graded again, without a model, into another folder."""
    source = Path(c.regrade)
    folder = Path(c.output or f"{source.with_suffix('')}-regraded")
    if not source.is_file():
        fail(f"--regrade {source}: there is no such file; name a {ANSWERS}")
    if (folder / ANSWERS).exists():
        fail(f"--output {folder} holds {ANSWERS} already, which would be lost; name another folder")
    # Eq. 11 in a file of corrections, which alone have `well_formed`, else Eq. 1.
    graded = lambda r: (r.get("solution", r["response"]) if r["well_formed"] else "") if "well_formed" in r else r["response"]
    items = [(graded(r), r["gold"]) for r in completions(source)]
    if not items:
        fail(f"--regrade {source}: the file is empty; name a {ANSWERS}")
    verdicts, changes = [], Counter()
    with Grader(workers=c.grader_workers) as grader:
        for start in tqdm(range(0, len(items), 500), desc="grading", unit="500 completions"):
            verdicts += grader.verdicts(*zip(*items[start:start + 500]))  # Eq. 1
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "unfinished.tmp", "w") as file:
        for r, verdict in zip(completions(source), verdicts):
            changes[f"{r.get('verdict', verdict)} -> {verdict}"] += 1
            file.write(json.dumps({**r, "answer": final_answer(graded(r)), "verdict": verdict}) + "\n")
    os.replace(folder / "unfinished.tmp", folder / ANSWERS)
    state = source.with_name("state.json")
    settings = json.loads(state.read_text())["settings"] if state.exists() else {}
    settings |= {"regraded": str(source), "regraded with": f"math-verify {version('math-verify')}"}
    report(folder, settings)
    print("verdicts: " + ", ".join(f"{change}: {n}" for change, n in sorted(changes.items())))


def question_means(folder):
    """({benchmark: {(problem, gold): share of samples that are right}}, settings) of a finished evaluation."""
    if not (folder / "summary.json").is_file():
        fail(f"--compare {folder}: no summary.json there; finish that evaluation, or name another")
    means = {}
    for name, records in read_records(folder / ANSWERS).items():
        groups = defaultdict(list)
        for r in records:
            groups[r.get("problem", str(r["question"])), r["gold"]].append(r["verdict"] == "right")
        means[name] = {question: np.mean(group) for question, group in groups.items()}
    return means, json.loads((folder / "summary.json").read_text())["settings"]


def compare(c):
    """Job 3, in one process: paired differences from the first evaluation, the paper's figures beside them."""
    labels = [str(Path(folder)) for folder in c.compare]
    runs, settings = zip(*(question_means(Path(folder)) for folder in c.compare))
    shared = {name: sorted(set.intersection(*(set(run.get(name, ())) for run in runs))) for name in runs[0]}
    if not (shared := {name: questions for name, questions in shared.items() if questions}):
        fail(f"--compare {' '.join(labels)}: no question in common; evaluate them on the same benchmarks")
    scores = [{name: np.array([run[name][q] for q in shared[name]]) for name in shared} for run in runs]

    rows, series, differences = [], {}, {}
    for label, run in zip(labels, scores):
        series[label] = {name: clustered_mean(range(len(x)), x) for name, x in run.items()}
        rows.append([label, *(percent(*cell) for cell in series[label].values()),
                     percent(*average(series[label].values()))])
    for label, run in zip(labels[1:], scores[1:]):
        points = {name: run[name] - scores[0][name] for name in shared}
        draws = [bootstrap(d, seed=i) for i, d in enumerate(points.values())]
        means = [d.mean() for d in points.values()]
        cells = [(mean, *np.quantile(draw, (0.025, 0.975)))
                 for mean, draw in zip([*means, np.mean(means)], [*draws, np.mean(draws, axis=0)])]
        differences[label] = dict(zip([*shared, "average"], cells))
        rows.append([f"{label} − {labels[0]}", *(f"{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                                                 for d, low, high in cells)])
    for method, aime, five in PAPER if set(shared) & set(BENCHMARKS) else ():  # never without saying whose figures they are
        cells = [aime if name == "aime24" else "" for name in shared] + [five]
        rows += [[f"{method}, reported by the paper, not measured here", *cells]] * any(cells)
    header = [f"{name}, {len(questions)} questions" for name, questions in shared.items()]
    text = markdown(["right (%) ± SE", *header, "average"], rows)
    text += "\nDifferences in points, [95 % bootstrap interval over questions], on the questions in common.\n"
    for name in dict.fromkeys(name for s in settings for name in s if name not in ("model", "weights")):
        if len(values := {str(s.get(name)) for s in settings}) > 1:
            text += f"- not the same {name}: {'; '.join(sorted(values))}\n"

    folder = Path(c.output or "runs/eval/" + "-vs-".join(Path(label).name for label in labels))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", {
        "questions": {name: len(questions) for name, questions in shared.items()}, "accuracy": series,
        "difference": differences, "reported by the paper, not measured here": PAPER})
    (folder / "comparison.md").write_text(text)
    print(f"{text}\nIn {folder}: comparison.md, comparison.json, comparison.png")
    draw(folder / "comparison.png", series)


def main():
    c = parse(sys.argv[1:])
    if not (c.regrade or c.compare):
        evaluate(c)
    elif os.environ.get("RANK", "0") == "0":  # work for one process
        regrade(c) if c.regrade else compare(c)


if __name__ == "__main__":
    main()
