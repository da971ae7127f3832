"""A real language model through the whole method: word problems, warm start, GRPO against ScRPO.

    python bench/real_model.py                              # all of it, SmolLM2-135M-Instruct
    python bench/real_model.py table --model FOLDER         # parts 1 and 2 only
    python bench/real_model.py --methods grpo scrpo --seeds 0 1 2 --jobs 3
    python bench/real_model.py report                       # from the results that are there

As it comes, a small model boxes no answer and writes neither section of a correction, so neither
stage would learn anything. Hence, each in --work, and skipped where its result is there:

1. warm     Supervised learning on solutions and corrections of word problems (word_problems.py). In
            its first half the wrong solutions are made; in the second most are the model's own,
            drawn after the first, so that it learns to correct the mistakes that it makes.
2. table    Before any RL: has it the form, is there room to learn, can it correct at all?
            --largest_number and --largest_factor make the problems harder or easier.
3. rates    GRPO at each of --rates, at a seed of its own. The one that answers most training
            questions in its last quarter serves all methods; held-out problems choose nothing.
4. runs     train.py, as it is, for each method and seed. The final policies answer the same
            held-out problems with the same random numbers, and are then deleted, 2 GB each.
5. report   report.md and curves.png. Intervals are over problems, paired, as all policies had the
            same; the spread over seeds stands beside them, which no interval over problems covers.

No training question is asked twice in a run of default length, so accuracy *while training* is that
of unseen problems and costs nothing: train.py's own evaluation is off.

Of one laptop core the warm start takes an hour, a run one or two. On a GPU add --jobs 8 --samples 4
--pool_questions 512: runs share it well, each being busy with launching small kernels.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.real_model_report import (RATE_SEED, best_rate, report, result_file,  # noqa: E402
                                     table_before, write_whole)
from bench.word_problems import correction_text, make_mistake, make_stories, solution_text  # noqa
from error_pool import ErrorPool, correction_prompt  # noqa: E402  the prompts of training itself
from loss import token_logprobs  # noqa: E402
from reward import Grader, final_answer, find_correction  # noqa: E402
from rollout import load_problems, make_engine, render, sample_seed, solution_prompt  # noqa: E402

CORRECTIONS, BATCH = 0.45, 8  # their share of the demonstrations; demonstrations an update
GROUP = 8  # samples a question, in training and where the errors that enter the pool are measured
# What samples are drawn for: the second argument of `sample_seed`, so that no two share a stream.
OWN_MISTAKES, ANSWERS, GROUPS, OF_OWN, OF_POOL, OF_FIXED = range(6)
METHODS = {  # flags of train.py, and how many times --steps
    "grpo": ("--algorithm grpo", 1),
    "scrpo": ("--algorithm scrpo", 1),  # equal samples
    "scrpo_longer": ("--algorithm scrpo", 1.5),  # about equal stage-1 questions
    # Its stage 1 only fills the pool, here with more errors a question, so that most steps train.
    "stage2": ("--algorithm scrpo --train_stages 2 --errors_per_question 4", 1),
}
TRAIN = (f"--group_size {GROUP} --questions_per_step 8 --pool_trigger 8 --updates_per_rollout 1 "
         "--schedule cosine --rollout transformers --precision fp32 --micro_batch_tokens 2048 "
         "--eval_questions 0 --save_every 1000000")


def write_rows(path: Path, rows: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# ================================================================================== 1. warm start


def load_policy(source):
    """(model, tokenizer, engine), in fp32: engine and loss then agree on a log-probability."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    return model, tokenizer, make_engine("transformers", model, tokenizer, model_path=str(source),
                                          max_context=model.config.max_position_embeddings)


def ask(policy, turns: list[str], n: int, purpose: int, args) -> list:
    """n samples of each user turn at T = 1. Their random streams depend on the seed, the purpose
    and their place alone, so two policies differ by their weights only."""
    model, tokenizer, engine = policy
    prompts = [render(tokenizer, turn) for turn in turns]
    rows = 256 if model.device.type == "cuda" else 32  # in flight: some 4 GB of cache, or 0.5
    samples, step = [], max(1, rows // n)
    with tqdm(total=len(prompts) * n, desc="sampling", unit="sample") as bar:
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            seeds = [[sample_seed(args.seed, purpose, start + b, i) for i in range(n)]
                     for b in range(len(part))]
            samples += engine.generate(part, n, temperature=1.0, top_p=1.0, seeds=seeds,
                                       max_new_tokens=args.max_new_tokens)
            bar.update(len(part) * n)
    return samples


def demonstrations(args, half: int, stories: list, policy) -> list[dict]:
    """[{user, response}] of one half of the warm start, kept as a file to be read. In the second
    half a wrong solution is what the policy answers by now, or made where it answers right."""
    path, rng = args.work / f"demonstrations_{half + 1}.jsonl", random.Random(f"{args.seed} {half}")
    if path.exists():
        return [json.loads(line) for line in path.read_text().splitlines()]
    corrected = stories[: round(CORRECTIONS * len(stories))]
    wrong = [make_mistake(story, rng) for story in corrected]
    if half == 1:
        turns = [solution_prompt(story.problem) for story in corrected]
        answers = ask(policy, turns, 1, OWN_MISTAKES, args)
        wrong = [made if final_answer(own.text) == story.answer or not own.finished else own.text
                 for story, made, (own,) in zip(corrected, wrong, answers)]
    rows = [(correction_prompt(s.problem, text), correction_text(s, text))
            for s, text in zip(corrected, wrong)]
    rows += [(solution_prompt(s.problem), solution_text(s.solve(), s.answer))
             for s in stories[len(corrected) :]]
    rows = [{"user": turn, "response": response} for turn, response in rows]
    write_rows(path, rows)
    return rows


def make_batches(rows: list[dict], tokenizer, rng) -> list[list[tuple]]:
    """Batches of (prompt ids, response ids): sorted by length before they are cut, so that little
    is padded, and shuffled then, so that solutions and corrections take turns."""
    pairs = []
    for row in rows:
        response = tokenizer(row["response"], add_special_tokens=False).input_ids
        pairs.append((render(tokenizer, row["user"]), response + [tokenizer.eos_token_id]))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    rng.shuffle(batches)
    return batches


def supervised_loss(model, batch: list[tuple]) -> torch.Tensor:
    """Mean of -log pi over responses' tokens, by training's own function: no logits of prompts."""
    sequences = [torch.tensor(prompt + response) for prompt, response in batch]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention = torch.arange(int(lengths.max())) < lengths[:, None]  # [S,L]
    first = torch.tensor([len(prompt) for prompt, _ in batch])
    ids, attention, first = (tensor.to(model.device) for tensor in
                             (pad_sequence(sequences, True), attention.long(), first))
    logp, _ = token_logprobs(model, ids, attention, first, 1.0, 1024)  # [S,T], 0 past the end
    return -logp.sum() / sum(len(response) for _, response in batch)


def warm_start(args, stories: list) -> None:
    """Both halves under one AdamW, whose rate falls linearly to 0. A kill costs ten minutes."""
    part, saved, log, before = args.work / "warm.part", args.work / "warm.pt", [], 0
    policy = model, tokenizer, _ = load_policy(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    if saved.exists():
        log, weights, moments = torch.load(saved, map_location="cpu", weights_only=True)
        model.load_state_dict(weights), optimizer.load_state_dict(moments)
    total, last_saved = 2 * -(-len(stories) // 2 // BATCH), time.monotonic()
    bar = tqdm(total=total, initial=len(log), desc="warm start", unit="update")
    for half in range(2):
        rows = demonstrations(args, half, stories[half::2], policy)
        batches = make_batches(rows, tokenizer, random.Random(f"{args.seed} batches {half}"))
        for batch in batches[max(0, len(log) - before) :]:
            started = time.process_time()
            loss = supervised_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = args.warm_learning_rate * (1 - len(log) / total)
            optimizer.step()
            optimizer.zero_grad()
            log.append([loss.item(), time.process_time() - started])
            bar.set_postfix(loss=f"{log[-1][0]:.3f}")
            bar.update()
            if time.monotonic() - last_saved > 600:
                torch.save([log, model.state_dict(), optimizer.state_dict()], f"{saved}.part")
                os.replace(f"{saved}.part", saved)
                last_saved = time.monotonic()
        before += len(batches)
    bar.close()
    losses, seconds = zip(*log)
    figures = {"losses": losses, "cpu_minutes": sum(seconds) / 60}
    write_whole(args.work / "warm.json", json.dumps(figures))
    model.save_pretrained(part), tokenizer.save_pretrained(part)
    part.rename(args.work / "warm")
    saved.unlink(missing_ok=True)


# ================================================================================= 2. measurement


def correct(policy, problems, texts: list[str], purpose: int, grader, args) -> dict:
    """One correction of each text: is it right, has it both sections? (Eq. 11)"""
    turns = [correction_prompt(p.problem, text) for p, text in zip(problems, texts)]
    samples = [row[0] for row in ask(policy, turns, 1, purpose, args)]
    found = [find_correction(s.token_ids, policy[1], "sections") for s in samples]
    solutions = [correction[2] if correction else "" for correction in found]
    verdicts = grader.verdicts(solutions, [p.answer for p in problems])
    return {"right": [int(verdict == "right") for verdict in verdicts],
            "formed": [int(correction is not None) for correction in found],
            "text": [sample.text for sample in samples]}


def answer(policy, problems, n: int, purpose: int, grader, args) -> tuple[list, np.ndarray]:
    """n answers to each problem, and whether they are right [J,n]."""
    samples = ask(policy, [solution_prompt(p.problem) for p in problems], n, purpose, args)
    golds = [p.answer for p in problems for _ in range(n)]
    verdicts = grader.verdicts([s.text for row in samples for s in row], golds)
    return samples, np.reshape([int(verdict == "right") for verdict in verdicts], (-1, n))


def measure(args, folder: Path, before=None) -> dict:
    """--samples answers to each held-out problem, and a correction of the first, right or wrong.
    Before RL also of errors that would enter the pool; after it, of those wrong before."""
    policy, problems = load_policy(folder), load_problems(str(args.work / "held_out.jsonl"))
    with Grader(workers=2) as grader:
        samples, right = answer(policy, problems, args.samples, ANSWERS, grader, args)
        first = [row[0] for row in samples]
        result = {
            "right": right.tolist(), "text": [s.text for s in first],
            "boxed": float(np.mean([final_answer(s.text) is not None for r in samples for s in r])),
            "error": [int(s.finished and not marks[0]) for s, marks in zip(first, right)],
            "own": correct(policy, problems, [s.text for s in first], OF_OWN, grader, args),
        }
        if before:
            wrong = np.flatnonzero(before["error"]).tolist()
            again = correct(policy, [problems[j] for j in wrong],
                            [before["text"][j] for j in wrong], OF_FIXED, grader, args)
            result["fixed"] = dict(zip(wrong, again["right"]))
        else:  # by training's own pool, Eqs. 7 and 8
            pool = ErrorPool(min_variance=0.15)
            some = problems[: args.pool_questions]
            groups, marks = answer(policy, some, GROUP, GROUPS, grader, args)
            for p, row, rewards in zip(some, groups, marks):
                texts, finished = [s.text for s in row], [s.finished for s in row]
                pool.add(p.problem, p.answer, texts, rewards, finished)
            kept = pool.take(len(pool))
            texts = [error.response for error in kept]
            result["pool"] = correct(policy, kept, texts, OF_POOL, grader, args)
    return result


def before_rl(args) -> dict:
    """The warm start's measurement, and 20 of its corrections for a human to judge."""
    path = args.work / "before.json"
    if not path.exists():
        result = measure(args, args.work / "warm")
        problems, pages = load_problems(str(args.work / "held_out.jsonl")), []
        for j in np.flatnonzero(result["error"])[:20]:
            verdict = "right" if result["own"]["right"][j] else "wrong"
            pages += [f"**{problems[j].problem}** ({problems[j].answer}; corrected: {verdict})\n",
                      f"```\n{result['text'][j]}\n\n{result['own']['text'][j]}\n```\n"]
        write_whole(args.work / "analyses.md", "\n".join(pages))
        write_whole(path, json.dumps(result))
    return json.loads(path.read_text())


# =================================================================================== 3, 4. the runs


def run_one(args, method: str, rate: str, seed: int) -> None:
    """train.py, then the measurement of what it made. Its numbers stay, and 20 corrections."""
    file, (flags, times) = result_file(args.work, method, rate, seed), METHODS[method]
    folder = file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    command = [
        sys.executable, ROOT / "train.py", *shlex.split(f"{TRAIN} {flags} {args.train_flags}"),
        "--model", args.work / "warm", "--train_data", args.work / "training.jsonl",
        "--steps", round(args.steps * times), "--learning_rate", rate, "--seed", seed,
        "--max_new_tokens", args.max_new_tokens, "--output_dir", folder,
    ]
    with file.with_suffix(".log").open("w") as log:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log)
    result = measure(args, folder / "final", before_rl(args))
    result |= {"text": None, "own": result["own"] | {"text": result["own"]["text"][:20]}}
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    result["curve"] = [row for row in rows if row["step"]]
    write_whole(file, json.dumps(result))
    shutil.rmtree(folder)


def run_all(args, jobs: list[tuple]) -> None:
    """--jobs at a time, each in a fresh process. One that fails is named, and the others go on; the
    same command does it again."""
    jobs = [job for job in jobs if not result_file(args.work, *job).exists()]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    if args.jobs > 1:
        os.environ["TQDM_DISABLE"] = "1"  # theirs: bars of several processes overwrite each other
    how = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(args.jobs, **how) as pool, tqdm(total=len(jobs), unit="run") as bar:
        futures = {pool.submit(run_one, args, *job): job for job in jobs}
        for future in as_completed(futures):
            if error := future.exception():
                log = result_file(args.work, *futures[future]).with_suffix(".log")
                tqdm.write(f"error: {log.stem} failed ({error}); see {log}", file=sys.stderr)
            bar.update()


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, parts = parser.add_argument, ("table", "rates", "runs", "report")
    flag("part", nargs="?", default="runs", choices=parts, help="up to which; default: all")
    flag("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id")
    flag("--work", type=Path, default=ROOT / "runs" / "real_model", help="everything goes here")
    flag("--seed", type=int, default=0, help="of problems, demonstrations and measurements")
    flag("--demonstrations", type=int, default=2400, help="of the warm start")
    flag("--warm_learning_rate", type=float, default=1e-4, help="of its AdamW; falls to 0")
    flag("--training", type=int, default=2000, help="training problems")
    flag("--held_out", type=int, default=512, help="held-out problems")
    flag("--largest_number", type=int, default=60, help="in a problem")
    flag("--largest_factor", type=int, default=9, help="in a problem")
    flag("--max_new_tokens", type=int, default=144, help="solutions take 50, corrections 120")
    flag("--samples", type=int, default=1, help="answers to each held-out problem")
    flag("--pool_questions", type=int, default=128, help="for what would enter the pool")
    flag("--rates", nargs="+", default=["1e-5", "3e-5", "1e-4"], help="one: part 3 is left out")
    flag("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    flag("--steps", type=int, default=40, help="of a run")
    flag("--jobs", type=int, default=1, help="runs at the same time")
    flag("--train_flags", default="", help="more flags of train.py; of two the last one counts")
    return parser.parse_args(arguments)


def keep_settings(args) -> None:
    """What is there is used again, so all in --work must have been made by the same settings."""
    free = ("part", "work", "rates", "methods", "seeds", "jobs")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    path = args.work / "settings.json"
    if path.exists() and settings != json.loads(path.read_text()):
        sys.exit(f"error: {path} has other settings; put them back, or name another --work")
    write_whole(path, json.dumps(settings))


def main(arguments=None) -> None:
    args = parse(arguments)
    disable_progress_bar()  # of Hugging Face's loading
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    keep_settings(args)
    if not (args.work / "warm").exists():
        counts = {name: getattr(args, name) for name in ("held_out", "training", "demonstrations")}
        sets = make_stories(args.seed, counts, args.largest_number, args.largest_factor)
        for name in ("held_out", "training"):
            rows = [{"problem": s.problem, "answer": s.answer} for s in sets[name]]
            write_rows(args.work / f"{name}.jsonl", rows)
        warm_start(args, sets["demonstrations"])
    print(table_before(before_rl(args)))
    if args.part in ("rates", "runs") and len(args.rates) > 1:
        run_all(args, [("grpo", rate, RATE_SEED) for rate in args.rates])
    if args.part == "runs":
        rate = best_rate(args.work, args.rates)
        run_all(args, [(method, rate, seed) for seed in args.seeds for method in args.methods])
    if args.part != "table":
        print(report(args.work, args.rates, list(METHODS), args.seeds))


if __name__ == "__main__":
    main()
