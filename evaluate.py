"""A model -> its accuracy on the benchmarks, with error bars and every judgement kept. (First version: functions.)"""

import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from error_pool import after_thinking, correction_prompt
from reward import final_answer, find_correction
from rollout import fits, render, sample_seed, solution_prompt


# ------------------------------------------------------------------------------------------------------- processes


def start_distributed(timeout_s=1800):
    """(rank, world, device) under torchrun or plain python.

    Alone, a HashStore serves: no port is opened, so any number of runs fit on a machine. Python objects travel
    over gloo, tensors on a GPU over NCCL.
    """
    alone = "RANK" not in os.environ
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)  # engines read them too
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s),
        **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
    )
    return dist.get_rank(), dist.get_world_size(), device


def gather(items):
    """All ranks' lists as one, in rank order, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def fail(message):
    """One line on rank 0, exit code 2 on all. To be called on every rank: one left behind would wait for the others."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def warn(message):
    """One line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- sampling


def askable(engine, tokenizer, problems, max_new_tokens):
    """Indices of the problems whose prompt and longest response fit into the engine's context; names the others."""
    lengths = [len(render(tokenizer, solution_prompt(p.problem))) for p in problems]
    fitting = [q for q, p in enumerate(problems)
               if fits(render(tokenizer, solution_prompt(p.problem)), max_new_tokens, engine.max_context)]
    if left_out := sorted(set(range(len(problems))) - set(fitting)):
        warn(f"{len(left_out)} of {len(problems)} problems left out, their prompt and {max_new_tokens} new tokens do not "
             f"fit {engine.max_context}: {', '.join(map(str, left_out[:5]))} ... (longest prompt: {max(lengths)})")
    return fitting


def respond(engine, tokenizer, turns, streams, k, seed, **sampling):
    """k responses to each user turn: [turns][k] of dicts. Randomness depends on (seed, stream, sample) alone."""
    prompts = [render(tokenizer, turn) for turn in turns]
    seeds = [[sample_seed(seed, 0, stream, i) for i in range(k)] for stream in streams]  # training's steps start at 1
    groups = engine.generate(prompts, k, seeds=seeds, **sampling) if prompts else []
    return [[{"sample": i, "seed": seeds[b][i], "prompt": tokenizer.decode(prompts[b]), "token_ids": o.token_ids,
              "response": o.text, "finished": o.finished} for i, o in enumerate(group)]
            for b, group in enumerate(groups)]


def sample_answers(engine, tokenizer, problems, grader, *, k, temperature, top_p, max_new_tokens, seed,
                   questions=None, progress=None):
    """k graded answers to each problem (Eq. 1), or to those with an index in `questions`: records, sorted, on every rank.

    Collective: question q is the work of rank q % world. Its samples are the same on any rank and in any batch.
    """
    if questions is None:
        questions = askable(engine, tokenizer, problems, max_new_tokens)
    mine = [q for q in questions if q % dist.get_world_size() == dist.get_rank()]
    groups = respond(engine, tokenizer, [solution_prompt(problems[q].problem) for q in mine], mine, k, seed,
                     temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, progress=progress)
    records = [{"question": q, **response, "answer": final_answer(response["response"]), "gold": problems[q].answer,
                "problem": problems[q].problem, "source": problems[q].source}
               for q, group in zip(mine, groups) for response in group]
    verdicts = grader.verdicts([r["response"] for r in records], [r["gold"] for r in records])
    records = gather([{**r, "verdict": verdict} for r, verdict in zip(records, verdicts)])
    return sorted(records, key=lambda r: (r["question"], r["sample"]))


def sample_corrections(engine, tokenizer, records, grader, *, k=1, temperature, top_p, max_new_tokens, seed, progress=None):
    """k graded corrections (Eqs. 10, 11) of each first answer in `records`: records, sorted, on every rank.

    Collective. A first answer that is unfinished, that is all thinking, or whose prompt does not fit is left out,
    as in training.
    """
    firsts = []
    for r in records:
        turn = correction_prompt(r["problem"], after_thinking(r["response"]))
        if r["finished"] and after_thinking(r["response"]) and fits(
                render(tokenizer, turn), max_new_tokens, engine.max_context):
            firsts.append((r, turn))
    mine = firsts[dist.get_rank()::dist.get_world_size()]
    streams = [r["question"] + 1_000_000_007 * (1 + r["sample"]) for r, _ in mine]  # apart from the answers' streams
    groups = respond(engine, tokenizer, [turn for _, turn in mine], streams, k, seed,
                     temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, progress=progress)
    corrections, solutions = [], []
    for (first, _), group in zip(mine, groups):
        for response in group:
            found = find_correction(response["token_ids"], tokenizer)
            solutions.append(found[2] if found else "")  # Eq. 11: without both sections nothing is right
            corrections.append({
                "question": first["question"], "first_sample": first["sample"], **response,
                "answer": final_answer(solutions[-1]), "gold": first["gold"], "well_formed": found is not None,
                "first_verdict": first["verdict"], "problem": first["problem"], "source": first["source"]})
    verdicts = grader.verdicts(solutions, [r["gold"] for r in corrections])
    corrections = gather([{**r, "verdict": verdict} for r, verdict in zip(corrections, verdicts)])
    return sorted(corrections, key=lambda r: (r["question"], r["first_sample"], r["sample"]))


# ------------------------------------------------------------------------------------------------------ statistics


def clustered_mean(questions, values):
    """(mean, standard error) of `values`, one per sample, if the questions were drawn and not the samples alone.

    Samples of one question are alike, so n values are not n observations: the residuals are summed within a question
    first. With k samples each this is the spread of the questions' means, std(ddof=1) / sqrt(questions).

    >>> [round(x, 4) for x in clustered_mean([0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0])]   # means 1, 0.5, 0
    [0.5, 0.2887]
    """
    values = np.asarray(values, dtype=float)
    _, cluster = np.unique(questions, return_inverse=True)
    mean = values.mean() if len(values) else np.nan
    residuals = np.bincount(cluster, values - mean)
    n = len(residuals)
    return mean, np.sqrt(n / (n - 1) * (residuals**2).sum()) / len(values) if n > 1 else np.nan


def accuracy(records):
    """(share right, its standard error) over questions and samples both."""
    return clustered_mean([r["question"] for r in records], [r["verdict"] == "right" for r in records])
