"""train.py: every step is the method's, from samples to gradient; what is exact is exact; what it
writes, promises and refuses. In float64 where that makes it sharp; nothing hinges on the last bit of
a float32 sum."""

import hashlib
import json
import re
import signal
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from math import exp
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from conftest import FEW, ROOT, TOY, same_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import train
from error_pool import ErrorPool, after_thinking, correction_prompt
from reward import final_answer
from rollout import Problem, Sample, TransformersEngine, solution_prompt, start_distributed

START = load_file(TOY / "model.safetensors")
TOKENIZER = AutoTokenizer.from_pretrained(TOY)


@pytest.fixture
def alone(monkeypatch):
    """A process group of one, as train.py's own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    start_distributed()
    yield
    dist.destroy_process_group()


def spy(patch, owner, name):
    """A list that gets (arguments, keywords, result) of every call from now on."""
    calls, original = [], getattr(owner, name)

    def watched(*arguments, **keywords):
        calls.append((arguments, keywords, original(*arguments, **keywords)))
        return calls[-1][2]

    patch.setattr(owner, name, watched)
    return calls


# ------------------------------------------------- one step, from samples to gradient, by the oracle
#
# A scripted engine answers; trial_and_error or self_correction, make_examples and update do the rest
# on 1, 2 and 3 ranks and with micro-batches of any size. What each optimizer step finds in the
# gradients, and the metrics, is compared with tests/oracle.py, one unpadded sequence at a time.

QUESTIONS = [Problem(f"What is {b} + 1?", f"{b + 1}", "") for b in range(4)]
RIGHT = {1: {0, 3, 4, 5, 7, 8}, 2: {1, 2, 6, 9}}  # places of 12 that are right; group 1 of stage 1 all
COMMON = ("--questions_per_step 4 --group_size 3 --pool_trigger 4 --min_variance 0 --temperature 0.7 "
          "--max_new_tokens 44 --importance_cap 1.3 --seed 3")  # fmt: skip
CASES = {  # stage, flags, and which are right where that is not RIGHT
    "grpo": (1, "--reduction grpo --updates_per_rollout 1"),
    "four updates, two without a gradient": (1, "--reduction grpo --updates_per_rollout 4"),
    "dapo with a KL": (1, "--reduction dapo --beta 0.1 --clip_high 0.28 --updates_per_rollout 1"),
    "dr_grpo": (1, "--reduction dr_grpo --scale none --beta 0.1 --updates_per_rollout 2"),
    "overlong": (1, "--algorithm dapo --dynamic_sampling 1 --overlong_cache 30 --clip_low 0.1"),
    "no cap": (1, "--importance_cap 0 --updates_per_rollout 1"),
    "corrections, grpo with a KL": (2, "--beta 0.1 --updates_per_rollout 1"),
    "corrections, dapo": (2, "--reduction dapo --updates_per_rollout 2"),
    "corrections, dr_grpo": (2, "--reduction dr_grpo --updates_per_rollout 1 --scale none"),
    "all before the solution": (2, "--analysis_span prefix --updates_per_rollout 2"),
    "failed ones too": (2, "--success_conditioned false --reduction dapo --updates_per_rollout 1"),
    "the whole response": (2, "--credit response --updates_per_rollout 1"),
    "all of all": (2, "--credit response --success_conditioned false --updates_per_rollout 1"),
    "a rank without a sample": (2, "--beta 0.1 --updates_per_rollout 1", {6}),
    "nothing left": (2, "--beta 0.1 --updates_per_rollout 1", set()),
}
BUDGETS = (1, 900, 100_000)  # micro-batches of one sequence, of a few, of all of a rank


def scripted(stage, j, right):
    """Sample j of 12: (ids, span of its analysis, log mu). 0 and 1 share an analysis; 8 has the
    right answer, but no sections; 10 is cut off."""
    rng = np.random.default_rng((stage, 0 if j == 1 else j))
    letters = "".join(rng.choice(list("abcdef "), rng.integers(2, 25)))
    answer, head = f"\\boxed{{{j // 3 + 1 if right or j == 8 else 0}}}", f"Analysis:\n{letters}\n"
    text = f"{head}Corrected Solution:{answer}" if stage == 2 and j != 8 else letters + answer
    ids = TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id] * (j != 10)
    span = (1, len(TOKENIZER(head).input_ids)) if stage == 2 and j != 8 else None
    return ids, span, np.float32(-rng.uniform(4, 7, len(ids))).tolist()


class Script:
    """An engine that says what it is told to: sample i of question b is number 3 b + i."""

    max_context = 10_000

    def __init__(self, stage, right):
        self.rows = [scripted(stage, j, j in right) for j in range(12)]

    def generate(self, prompts, n, *, seeds, temperature, **_):
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        asked = [next(b for b in range(4) if QUESTIONS[b].problem in text) for text in texts]
        assert n == 3 and temperature == 0.7 and [len(row) for row in seeds] == [3] * len(prompts)
        return [[self.sample(3 * b + i) for i in range(3)] for b in asked]

    def sample(self, j):
        ids, _, log_mu = self.rows[j]
        return Sample(ids, log_mu, TOKENIZER.decode(ids).removesuffix("<|end|>"), j != 10)


class Letters:
    """A grader that compares letters."""

    def verdicts(self, texts, golds):
        return ["right" if final_answer(t) == g else "wrong" for t, g in zip(texts, golds, strict=True)]


@lru_cache
def settings(case):
    return train.parse(f"{COMMON} {CASES[case][1]}".split())


def scripted_step(case):
    """(groups, examples, metrics) of a step of stage 1 or 2, as train.py makes them."""
    stage, _, *right = CASES[case]
    run = SimpleNamespace(
        config=settings(case), state=train.State(), problems=QUESTIONS, tokenizer=TOKENIZER,
        engine=Script(stage, *right or [RIGHT[stage]]), grader=Letters(), pool=ErrorPool(4, 0),
    )  # fmt: skip
    for q in QUESTIONS if stage == 2 else ():
        run.pool.add(q.problem, q.answer, ["wrong"], [0.0], [True])
    made = (train.trial_and_error if stage == 1 else train.self_correction)(run, 1)
    assert (run.state.samples, len(run.pool)) == (12, 3 if stage == 1 else 0)  # 8 and 11; 10: cut off
    return made


def tiny_model(seed):
    return deepcopy(fresh_model(seed))


@lru_cache
def fresh_model(seed):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=276, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0,
        tie_word_embeddings=True,
    ))  # fmt: skip
    for parameter in model.parameters():  # as they begin, the logits are nearly uniform
        parameter.data.mul_(6 if parameter.dim() == 2 else 1)
    return model.double().eval()


def exact_norm(self, x):
    """Qwen3's RMSNorm without its detour through float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class PlainDescent:
    """Keeps what DDP left in the parameters, then takes a plain step."""

    bf16 = False

    def __init__(self, model):
        self.parameters, self.steps = dict(model.named_parameters()), []

    def accumulate(self):
        pass

    @torch.no_grad()
    def step(self, rate):
        assert rate == 5e-4
        self.steps.append({name: p.grad.clone() for name, p in self.parameters.items()})
        for p in self.parameters.values():
            p -= p.grad
            p.grad = None
        return 2.0


def on_ranks(rank, folder):
    """Of three processes this one; takes part in runs of 1, 2 and 3 ranks, writes what it got."""
    Qwen3RMSNorm.forward = exact_norm
    for world in range(rank + 1, 4):
        store = f"file://{folder}/store_{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        for k, case in enumerate(CASES):
            groups, examples, made = scripted_step(case)
            for budget in BUDGETS:
                config = replace(settings(case), micro_batch_tokens=budget)
                model, reference = tiny_model(0), train.Policy(tiny_model(1), 0.7, 5)
                policy = torch.nn.parallel.DistributedDataParallel(train.Policy(model, 0.7, 5))
                optimizer, reference = PlainDescent(model), reference if config.beta else None
                metrics = train.update(policy, reference, optimizer, config, 1, groups, examples)
                kept = (groups, examples, made, optimizer.steps, metrics)
                torch.save(kept, f"{folder}/{k}_{world}_{rank}_{budget}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def split(ranks, tmp_path_factory):
    """split(case) -> [(groups, examples, metrics, gradients of each step, metrics of the update)]."""
    folder = tmp_path_factory.mktemp("split")
    patch = f"import test_train; test_train.on_ranks(rank, {str(folder)!r}); raise SystemExit(0)"
    job = ranks(folder / "run", ranks=3, patch=patch)
    assert job.result().code == 0, [job.said(rank, "err") for rank in range(3)]

    def of(case):
        files = sorted(folder.glob(f"{list(CASES).index(case)}_*.pt"))
        return [torch.load(file, weights_only=False) for file in files]

    return of


def log_probabilities(model, config, samples):
    """For each sample log pi of each of its tokens, and the entropies, one sequence at a time."""
    rows, entropies = [], []
    for g, s in samples:
        ids = torch.tensor([g.prompt + s.token_ids])
        logits = model(ids).logits[0, len(g.prompt) - 1 : -1] / config.temperature
        log_p = logits.log_softmax(-1)
        rows.append(log_p.gather(1, ids[0, len(g.prompt) :, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return rows, entropies


def expected(case, groups, examples):
    """(gradients of each optimizer step, metrics) by the oracle, plain descent in between."""
    (stage, _, *right), config, model = CASES[case], settings(case), tiny_model(0)
    samples = [(g, s) for g in groups for s in g.samples]
    js = [3 * QUESTIONS.index(Problem(g.problem, g.answer, "")) + i for g in groups for i in range(3)]
    right = [j in (right or [RIGHT[stage]])[0] for j in js]
    lengths = [len(s.token_ids) for _, s in samples]
    spans = [scripted(stage, j, False)[1] for j in js]
    if config.credit == "response":
        spans = [(0, n) for n in lengths]
    if config.analysis_span == "prefix":
        spans = [span and (0, span[1]) for span in spans]
    shaped = [r + (oracle.overlong(n, 44, 30) if "overlong" in case else 0)
              for r, n in zip(right, lengths)]  # fmt: skip
    advantages = [a for b in range(0, 12, 3) for a in oracle.advantages(shaped[b : b + 3], config.scale)]
    assert [e.advantage for e in examples] == pytest.approx(advantages, abs=2e-6)
    advantages = [e.advantage for e in examples]  # to their last bit in float32
    with torch.no_grad():
        old = [row.tolist() for row in log_probabilities(model, config, samples)[0]]
        ref = [row.tolist() for row in log_probabilities(tiny_model(1), config, samples)[0]]
    mu, cap = [s.logprobs for _, s in samples], config.importance_cap
    weights = [[oracle.token_weight(o, m, cap) if cap else 1.0 for o, m in zip(*x)] for x in zip(old, mu)]
    knobs = dict(clip_low=config.clip_low, clip_high=config.clip_high, beta=config.beta,
                 reduction=config.reduction, longest=44)  # fmt: skip
    steps, losses, seen = [], [], Counter()
    for u in range(config.updates_per_rollout):
        part = range(u * 12 // config.updates_per_rollout, (u + 1) * 12 // config.updates_per_rollout)
        rows, entropies = log_probabilities(model, config, samples)
        columns = ([row.tolist() for row in rows], old, ref, advantages, weights)
        columns = [[column[j] for j in part] for column in columns]
        mine, masks = [spans[j] for j in part], [[1] * lengths[j] for j in part]
        if stage == 1:
            J, gradient, _ = oracle.stage_one(*columns, **knobs)
        else:
            masks = [oracle.attribution(lengths[j], spans[j], right[j], config.success_conditioned)
                     for j in part]  # fmt: skip
            J, gradient, _ = oracle.stage_two(*columns, mine, [right[j] for j in part], **knobs,
                                              success_conditioned=config.success_conditioned)  # fmt: skip
        run = [(j, t) for j, mask in zip(part, masks) for t in range(lengths[j])
               if mask[t] and (advantages[j] or config.beta)]  # fmt: skip
        if not run:
            continue  # no optimizer step
        losses.append(-J)
        for j, t in run:
            log_p, gap = rows[j][t].item(), old[j][t] - mu[j][t]
            r, up = oracle.token_ratio(log_p, old[j][t]), advantages[j] > 0
            out = r > 1 + config.clip_high if up else r < 1 - config.clip_low
            seen.update(entropy=entropies[j][t].item(), kl=oracle.token_kl(log_p, ref[j][t])[0],
                        clip_fraction=out and advantages[j] != 0, loss_tokens=1, logp_gap=abs(gap),
                        capped_fraction=exp(gap) > (cap or np.inf))  # fmt: skip
            seen["max"] = max(seen["max"], abs(gap))
        model.zero_grad()
        sum(-(rows[j] @ torch.tensor(g, dtype=torch.float64)) for j, g in zip(part, gradient)).backward()
        steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    n, kl = seen["loss_tokens"], config.beta > 0
    means = ("entropy", "clip_fraction", "logp_gap", "capped_fraction") + ("kl",) * kl
    return steps, {
        "loss": np.mean(losses) if steps else None, "grad_norm": 2.0 if steps else None, "loss_tokens": n,
        "empty_updates": config.updates_per_rollout - len(steps), "nonfinite_updates": 0, "kl": None,
        "logp_gap_max": seen["max"] if n else None, **{name: seen[name] / n if n else None for name in means},
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_equations_however_it_is_split(case, split, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    results = split(case)
    assert len(results) == 6 * len(BUDGETS)
    groups, examples, made, _, _ = results[0]
    steps, metrics = expected(case, groups, examples)
    assert all(max(g.abs().max() for g in step.values()) > 1e-3 for step in steps)  # not small
    if CASES[case][0] == 1:
        assert made == {"accuracy": 0.5, "discarded_groups": 0}
    else:
        right = len(CASES[case][2] if CASES[case][2:] else RIGHT[2])
        assert made == pytest.approx({"correction_success": right / 12, "well_formed": 11 / 12})
    for others, _, same, gradients, reported in results:
        assert others == groups and same == made and len(gradients) == len(steps)
        for ours, theirs in zip(gradients, steps):
            assert all((ours[name] - theirs[name]).abs().max() < 1e-9 for name in theirs)
        assert {name for name, value in reported.items() if value is None} == {
            name for name, value in metrics.items() if value is None}  # fmt: skip
        assert all(reported[name] == pytest.approx(value, rel=1e-9, abs=1e-9)
                   for name, value in metrics.items() if value is not None)  # fmt: skip


def test_the_cases_reach_what_they_claim(split):
    reported = {case: split(case)[0][4] for case in CASES}
    assert reported["dr_grpo"]["clip_fraction"] > 0 < reported["dapo with a KL"]["kl"]
    assert 0 < reported["grpo"]["capped_fraction"] < 1 and reported["no cap"]["capped_fraction"] == 0
    assert reported["four updates, two without a gradient"]["empty_updates"] == 2
    assert reported["nothing left"]["empty_updates"] == 1
    advantages = [e.advantage for e in split("overlong")[0][1]]
    assert len(set(np.round(advantages, 4))) > 6  # not those of 0 and 1 alone


def test_what_is_shown_is_what_carries_credit(alone):
    """Of two corrections that share an analysis the right one, though the wrong one comes first."""
    groups, examples, _ = scripted_step("corrections, grpo with a KL")
    said, run = [], SimpleNamespace(tokenizer=TOKENIZER, state=train.State(visits=3))
    run.say = said.append
    for first, shown in ((0, 1), (3, 6)):  # from group 0, from group 1 on
        train.show_correction(run, groups, examples[first:])
        head, solution = TOKENIZER.decode(scripted(2, shown, True)[0]).split("Corrected")
        marked = f"\n---\nAnalysis:>>>{head[9:]}<<<Corrected{solution}\n---"
        assert said[-1].endswith(TOKENIZER.decode(groups[shown // 3].prompt) + marked)
    train.show_correction(run, *scripted_step("nothing left")[:2])
    assert "visit 3" in said[0] and ">>><<<Analysis:" in said[2]


# ------------------------------------------------------------------------------------ what is exact

GOLDEN = {1: "b3bf2f336f84597f", 2: "87ad1a29f90c89bf"}  # of commit 9d2d77d, the first edition
ONE_STEP_EACH = "--steps 2 --train_stages 2 --updates_per_rollout 1".split()  # both sample START


def digest(run, stage) -> str:
    responses = [r["response"] for r in run.samples if r["stage"] == stage]
    return hashlib.sha256(json.dumps(responses).encode()).hexdigest()[:16]


def test_from_the_same_weights_the_same_samples(launch, ranks, tmp_path):
    """On 1 and 2 ranks, at any micro-batch, chunk and memory, and in the first edition. What is
    computed with them is close, as float32 is."""
    two = ranks(tmp_path / "two", *ONE_STEP_EACH)
    one = launch(tmp_path / "one", *ONE_STEP_EACH)
    small = "--micro_batch_tokens 300 --logprob_chunk 32 --gradient_checkpointing True".split()
    for run in (one, two.result(), launch(tmp_path / "small", *ONE_STEP_EACH, *small)):
        assert run.code == 0 and not run.errors, run.err
        assert {stage: digest(run, stage) for stage in GOLDEN} == GOLDEN and run.samples == one.samples
        for m, expected in zip(run.comparable(), one.comparable(), strict=True):
            assert m.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-5, abs=1e-5 if "gap" in name else 1e-7)
                assert m[name] == value, name
        moved = sum((one.weights[name] - START[name]).norm() for name in START)
        apart = sum((one.weights[name] - run.weights[name]).norm() for name in START)
        assert moved > 0.1 and apart < 0.01 * moved


# ---------------------------------------------------------------------------------- a run, from outside

EVERY_STEP = {
    "step", "stage", "accuracy", "correction_success", "loss", "grad_norm", "loss_tokens", "clip_fraction",
    "entropy", "kl", "logp_gap", "logp_gap_max", "capped_fraction", "empty_updates", "nonfinite_updates",
    "tokens_per_second", "mixed_groups", "truncated", "mean_length", "right", "wrong", "ungradable",
    "pool_size", "visits", "dropped_errors", "questions", "samples", "tokens", "seconds", "peak_memory_gb",
}  # fmt: skip
EVALUATED = {f"eval_{what}{se}" for what in ("accuracy", "correction") for se in ("", "_se")}


@pytest.fixture(scope="module")
def standard(launch, tmp_path_factory):
    """A run through both stages, evaluated before, in the middle and after; and all its seeds."""
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(patch, TransformersEngine, "generate")
        run = launch(tmp_path_factory.mktemp("standard") / "run", "--eval_questions", 8, "--eval_every", 3)
    run.seeds = [[seed for row in keywords["seeds"] for seed in row] for _, keywords, _ in calls]
    return run


def test_writes_what_it_promises(standard):
    assert standard.code == 0 and not standard.errors
    names = {path.name for path in standard.folder.iterdir()}
    assert names == {"settings.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "final"}
    assert (standard.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    kept = sorted(path.name for path in (standard.folder / "checkpoints").iterdir())
    assert kept == ["step_000003", "step_000006"]
    saved = json.loads((standard.folder / "settings.json").read_text())
    assert saved.keys() == train.Config.__dataclass_fields__.keys() | {"ranks", "problems", "first_prompt"}
    assert (saved["seed"], saved["clip_high"], saved["ranks"]) == (0, 0.2, 1)
    assert list(standard.samples[0]) == [
        "step", "stage", "problem", "answer", "prompt", "response", "verdict", "finished", "analysis"]  # fmt: skip
    assert not same_weights(standard.weights, START)


def test_metrics_are_there_and_make_sense(standard):
    assert [m["step"] for m in standard.metrics] == list(range(7))
    assert {m["stage"] for m in standard.steps} == {1, 2}
    samples = tokens = questions = 0
    for m in standard.steps:
        own = "discarded_groups" if m["stage"] == 1 else "well_formed"
        assert set(m) == EVERY_STEP | {own} | (EVALUATED if m["step"] % 3 == 0 else set())
        samples, tokens = samples + 16, tokens + round(16 * m["mean_length"])
        questions += 4 * (m["stage"] == 1)
        assert (m["samples"], m["tokens"], m["questions"]) == (samples, tokens, questions)
        shares = m["accuracy"], m["correction_success"]
        assert shares[:: 1 if m["stage"] == 1 else -1] == (m["right"] / 16, None)
        assert m["right"] + m["wrong"] == 16 and m["truncated"] == m["ungradable"] == 0
        assert m["logp_gap"] <= m["logp_gap_max"] < 1e-4  # engine and trainer are the same model
        assert 0 < m["entropy"] < 1 and 0 < m["grad_norm"] < 5 and m["kl"] is None
        assert m["nonfinite_updates"] == m["dropped_errors"] == m["capped_fraction"] == 0
        assert {"rollout", "update"} <= set(m["seconds"]) and m["peak_memory_gb"] > 0.1
    assert [("eval_accuracy" in m) for m in standard.metrics] == [True, False, False] * 2 + [True]


def test_stages_pool_and_prompts_follow_from_the_samples(standard):
    """Eqs. 1, 7 to 11 once more, from samples.jsonl: what was in the pool decides what is asked."""
    pool, stage = [], 1
    for m in standard.steps:
        rows = [r for r in standard.samples if r["step"] == m["step"]]
        groups = [rows[i : i + 4] for i in range(0, 16, 4)]
        assert all(len({(r["problem"], r["prompt"]) for r in group}) == 1 for group in groups)
        stage = 2 if stage == 1 and len(pool) >= 4 else 1 if stage == 2 and len(pool) < 4 else stage  # Eq. 9
        assert m["stage"] == stage and all(r["stage"] == stage for r in rows)
        if stage == 1:
            for group in groups:
                assert group[0]["prompt"] == f"<|user|>{solution_prompt(group[0]['problem'])}<|assistant|>"
                wrong = [r for r in group if r["verdict"] != "right" and r["finished"]]
                if oracle.is_informative([r["verdict"] == "right" for r in group], 0.15) and wrong:
                    pool.append(wrong[0])  # Eq. 8
        else:
            errors, pool = pool[:4], pool[4:]
            for group, error in zip(groups, errors, strict=True):  # Eq. 10, the oldest first
                assert (group[0]["problem"], group[0]["answer"]) == (error["problem"], error["answer"])
                asked = correction_prompt(error["problem"], after_thinking(error["response"]))
                assert group[0]["prompt"] == f"<|user|>{asked}<|assistant|>"
            assert m["well_formed"] == sum(r["analysis"] is not None for r in rows) / 16
        for r in rows:  # Eq. 11: without its two sections a correction has no solution
            said = r["response"].rpartition("Corrected Solution:")[2] if stage == 2 else r["response"]
            right = final_answer(said) == r["answer"] and (stage == 1 or r["analysis"] is not None)
            assert r["verdict"] == ("right" if right else "wrong")
        assert m["pool_size"] == len(pool)
        assert m["mixed_groups"] == sum(len({r["verdict"] for r in g}) == 2 for g in groups) / 4
    asked = [r["problem"] for r in standard.samples if r["stage"] == 1][::4]
    assert standard.metrics[-1]["visits"] >= 1 and len(set(asked)) == len(asked)


def test_randomness_is_of_the_place_alone(standard):
    """No two samples of training share a seed; an evaluation has its own, the same each time."""
    kinds = Counter(tuple(seeds) for seeds in standard.seeds)
    answers = tuple(standard.seeds[0])
    assert kinds[answers] == 3 and len(answers) == 8
    training = [seed for seeds in standard.seeds if len(seeds) == 16 for seed in seeds]
    assert len(set(training)) == len(training) == 96 and not set(training) & set(answers)


def test_final_loads_and_gives_the_last_evaluation_again(standard, launch, tmp_path):
    flags = "--steps 0 --eval_questions 8".split()
    run = launch(tmp_path / "run", "--model", standard.folder / "final", *flags)
    assert all(run.metrics[0][name] == standard.metrics[-1][name] for name in EVALUATED)
    assert same_weights(run.weights, standard.weights)


def test_what_one_sees(standard):
    shown = re.search(r"--- stage 2, visit 1: .*?\n---\nAnalysis:>>>(.*?)<<<(.*?)<\|end\|>\n---", standard.out, re.S)
    first = [r for r in standard.samples if r["stage"] == 2]
    (row, *_) = [r for r in first if r["response"] == f"Analysis:{shown[1]}{shown[2]}"]
    assert row["verdict"] == "right" and row["prompt"] in standard.out
    assert "--- the first prompt\n<|user|>Add " in standard.out
    before, after = standard.metrics[0]["eval_accuracy"], standard.metrics[-1]["eval_accuracy"]
    assert re.search(rf"answered right +{before:.3f} ± [\d.]+ +{after:.3f} ± ", standard.out)
    assert re.search(r"stage 2, 0\.\d\d corrected, pool \d/4", standard.err)


# ------------------------------------------------------------------------------- the parts of the loop


def test_a_stage_that_teaches_nothing_moves_nothing(launch, tmp_path, monkeypatch):
    """Corrections are cut off at 64 tokens, so m = 0. Then Adam's momentum must not move the weights
    either, and a run that trains both stages is one that trains the first."""
    after, log = {}, train.log

    def logged(run, metrics, groups):
        log(run, metrics, groups)
        after[run.config.train_stages, metrics["step"]] = {n: w.clone() for n, w in run.model.state_dict().items()}

    monkeypatch.setattr(train, "log", logged)
    runs = {stages: launch(tmp_path / stages, *"--max_new_tokens 64 --steps 3 --train_stages".split(), stages)
            for stages in ("both", "1", "2")}  # fmt: skip
    assert [m["stage"] for m in runs["both"].steps] == [1, 2, 1]
    assert [same_weights(after["both", i], after["both", i + 1]) for i in range(3)] == [False, True, False]
    assert same_weights(runs["both"].weights, runs["1"].weights) and same_weights(runs["2"].weights, START)
    assert runs["both"].samples == runs["1"].samples
    m = runs["both"].steps[1]
    assert (m["empty_updates"], m["loss_tokens"], m["loss"], m["grad_norm"]) == (2, 0, None, None)
    assert ["loss" in m for m in runs["2"].steps] == [False, True, False]
    assert [line[:60] for line in runs["both"].errors] == [
        "warning: visit 1 to stage 2 trained on nothing: of its corre"] and not runs["1"].errors  # fmt: skip


@pytest.mark.parametrize("rewards,rounds,kept,discarded", [
    ("0011 0000 1111 0001", 1, "a b c d", 0),  # without dynamic sampling
    ("0011 0000 1111 0001 | 1111 0111 | 1000", 4, "a d f g", 3),
    ("0011 0000 1111 0001 | 1111 0111 | 1111 | 0000", 4, "a d f h", 4),  # the last of the discarded
    ("1111 0000 1111 0000 | 1111 0000 1111 0000 | 0000 0000 0000 0000", 3, "i j k l", 8),
])  # fmt: skip
def test_dynamic_sampling(rewards, rounds, kept, discarded, monkeypatch):
    asked = []

    def drawn(run, step, tasks):
        asked.extend(tasks)
        return [SimpleNamespace(problem=task.problem, rewards=[*map(int, reward)])
                for task, reward in zip(tasks, next(batches).split(), strict=True)]  # fmt: skip

    batches = iter(rewards.split("|"))
    monkeypatch.setattr(train, "draw_samples", drawn)
    names = [Problem(letter, "1", "") for letter in "abcdefghijklmnop"]
    monkeypatch.setattr(train, "question_order", lambda seed, count, start, n: range(start, start + n))
    config = train.parse(f"--algorithm dapo --questions_per_step 4 --dynamic_sampling {rounds}".split())
    run = SimpleNamespace(config=config, state=train.State(), problems=names, tokenizer=TOKENIZER)
    groups, thrown = train.draw_questions(run, 1)
    assert (" ".join(g.problem for g in groups), thrown) == (kept, discarded)
    assert next(batches, None) is None and run.state.questions == len(asked) == len(rewards.replace("|", "").split())
    assert len({task.question for task in asked}) == len(asked)  # and so no seed twice
    for task in asked:
        assert task.answer == "1" and solution_prompt(task.problem) in TOKENIZER.decode(task.prompt)


def test_the_switch_and_the_visit_that_taught_nothing(capsys):
    """Eq. 9 with N = 6 and B = 4, and a warning at the end of each visit without a loss token."""
    config = train.parse("--pool_trigger 6 --questions_per_step 4".split())
    run = SimpleNamespace(config=config, state=train.State(), pool=[])
    stages, switched, visits = [], [], []
    for waiting, tokens, formed in ((5, 0, 0), (6, 5, 1), (4, 0, 1), (3, 0, 0), (9, 0, 1), (3, 0, 0), (7, 0, 0), (0, 0, 0)):
        run.pool = range(waiting)
        switched.append(train.switch_stage(run))
        stages.append(run.state.stage)
        run.state.visit_loss_tokens += tokens
        run.state.visit_well_formed += formed
        visits.append(run.state.visits)
    assert stages == [1, 2, 2, 1, 2, 1, 2, 1] and visits == [0, 1, 1, 1, 2, 2, 3, 3]
    assert switched == [False, True, False, True, True, True, True, True]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: visit ") for line in said)
    assert "visit 2 to" in said[0] and "none was right where another was wrong" in said[0]
    assert "visit 3 to" in said[1] and "none had both headers" in said[1]
    run.pool = None  # a baseline's
    assert train.switch_stage(run) is False and run.state.stage == 1


def test_warnings_about_a_run_that_cannot_learn(capsys):
    state, optimizer = train.State(), SimpleNamespace(bf16=False, skipped_in_a_row=0)
    run = SimpleNamespace(state=state, optimizer=optimizer)

    def step(accuracy, finished, **metrics):
        state.step += 1
        groups = [SimpleNamespace(samples=[SimpleNamespace(finished=False), SimpleNamespace(finished=finished)])]
        train.watch(run, {"accuracy": accuracy, **metrics}, groups)
        return capsys.readouterr().err

    assert not any(step(0.0, True) for _ in range(3)) and not step(0.1, True)  # it is right once
    assert not any(step(0.0, True) for _ in range(3))
    assert "four steps in a row every response was wrong" in step(0.0, True) and not step(0.0, True)
    assert not any(step(0.1, False) for _ in range(3)) and not step(0.1, True)
    assert not any(step(0.1, False) for _ in range(3))
    assert "four steps in a row every response was cut off" in step(0.1, False) and not step(0.1, False)
    assert "disagree by 0.003" in step(1.0, True, logp_gap=0.003) and not step(1.0, True, logp_gap=0.001)


def test_baselines_and_the_reference(launch, tmp_path, monkeypatch):
    """grpo with a KL term and a temperature; what it samples with is what it trains with."""
    loaded = spy(monkeypatch, AutoModelForCausalLM, "from_pretrained")
    run = launch(tmp_path / "kl", *"--algorithm grpo --beta 0.5 --temperature 0.8 --steps 3".split())
    assert run.code == 0 and len(loaded) == 2
    assert [m["stage"] for m in run.steps] == [1] * 3 and all(m["pool_size"] is None for m in run.steps)
    assert all(m["logp_gap_max"] < 1e-4 for m in run.steps)
    assert run.steps[-1]["loss_tokens"] == run.steps[-1]["tokens"] - run.steps[-2]["tokens"]  # all have a KL
    assert 1e-6 < run.steps[0]["kl"] < run.steps[-1]["kl"]  # pi_ref stays behind
    del loaded[:]
    run = launch(tmp_path / "dapo", *"--algorithm dapo --steps 1 --overlong_cache 120".split())
    saved, (m,) = json.loads((run.folder / "settings.json").read_text()), run.steps
    assert (saved["clip_high"], saved["reduction"], saved["dynamic_sampling"]) == (0.28, "dapo", 4)
    assert len(loaded) == 1 and m["mixed_groups"] == 1 and m["discarded_groups"] == m["questions"] - 4
    assert m["samples"] == 4 * m["questions"]  # what is discarded counts in every budget


def test_corrections_that_do_not_fit_drop_their_error(launch, tmp_path):
    """A context that holds every solution prompt and no correction prompt."""
    problems = train.load_problems(str(FEW))
    longest = max(len(train.ask(TOKENIZER, problem, 0).prompt) for problem in problems)
    flags = "--steps 3 --max_new_tokens 60 --max_context"
    run = launch(tmp_path / "run", *flags.split(), longest + 60)
    assert run.code == 0 and [m["stage"] for m in run.steps] == [1, 2, 1]
    before, visit, _ = run.steps
    assert visit["correction_success"] is visit["well_formed"] is None and visit["loss_tokens"] == 0
    assert visit["dropped_errors"] == before["pool_size"] and visit["pool_size"] == 0
    assert visit["samples"] == before["samples"] and len(run.errors) == 1 and "visit 1" in run.errors[0]


# ------------------------------------------------------------------------------- settings and refusals


def test_settings_file_first_and_flags_win(tmp_path):
    (tmp_path / "my.yaml").write_text("steps: 9\nsuccess_conditioned: false\nlearning_rate: 1e-5\n")
    config = train.parse([str(tmp_path / "my.yaml"), "--steps", "8"])
    assert (config.steps, config.success_conditioned, config.learning_rate) == (8, False, 1e-5)


def test_ready_made_settings_are_valid():
    files = sorted(map(str, (ROOT / "configs").glob("*.yaml")))
    assert len(files) == 5 and train.parse([files.pop()]) == train.parse([])  # toy.yaml
    for file in files:
        config, dapo = train.parse([file]), train.parse([file, "--algorithm", "dapo"])  # is DAPO there too
        assert (config.clip_high, config.reduction, dapo.clip_high, dapo.reduction) == (0.2, "grpo", 0.28, "dapo")


def test_help_teaches_every_flag_and_names_trls(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    for name, field in train.Config.__dataclass_fields__.items():
        assert f"--{name}" in text and len(field.metadata["help"]) > 15
    for name, trl in {
        "steps": "max_steps", "group_size": "num_generations", "max_new_tokens": "max_completion_length",
        "updates_per_rollout": "steps_per_generation", "scale": "scale_rewards", "clip_low": "epsilon",
        "clip_high": "epsilon_high", "beta": "beta", "reduction": "loss_type", "rollout": "use_vllm",
        "learning_rate": "learning_rate", "temperature": "temperature",
    }.items():  # fmt: skip
        assert f"(TRL: {trl})" in train.Config.__dataclass_fields__[name].metadata["help"]


BAD_INPUT = {  # flags -> what the one line must name, and what it must tell
    "--model {folder}/none": ("--model {folder}/none", "causal language model"),
    "--train_data {folder}/none.jsonl": ("none.jsonl", "give JSON lines"),
    "--eval_data {bad.jsonl}": ("{bad.jsonl}, row 1", "a field answer"),
    "--pool_trigger 3": ("--pool_trigger 3", "raise it"),
    "--min_variance 0.3": ("--min_variance 0.3", "lower it"),
    "--group_size 3 --min_variance 0.24": ("--min_variance 0.24", "--group_size 3"),
    "--min_variance -0.1": ("--min_variance -0.1", "at least 0"),
    "--group_size 1": ("--group_size 1", "at least 2"),
    "--algorithm grpo --train_stages 2": ("--train_stages 2", "has no stage 2"),
    "--updates_per_rollout 3": ("--updates_per_rollout 3", "choose a divisor"),
    "--updates_per_rollout 0": ("--updates_per_rollout 0", "at least 1"),
    "--temperature 0": ("--temperature 0", "must be above 0"),
    "--overlong_cache 161": ("--overlong_cache 161", "exceeds"),
    "--learning_rate nan": ("--learning_rate nan", "at least 0"),
    "--steps many": ("--steps", "--help"),
    "--algorithm ppo": ("--algorithm", "'scrpo'"),
    "--learning_rte 1": ("--learning_rte", "--help"),
    "--max_context 20": ("--train_data", "raise --max_context"),
    "{none.yaml}": ("none.yaml", "cannot be read"),
    "{key.yaml}": ("--learning_rte", "--help"),
    "{value.yaml}": ("--steps", "many"),
    "{text.yaml}": ("text.yaml", "cannot be read"),
}
FILES = {"bad.jsonl": '{"problem": "1+1", "answer": "2"}\n{"problem": "1+2"}\n', "text.yaml": "hello\n",
         "key.yaml": "learning_rte: 1\n", "value.yaml": "steps: many\n"}  # fmt: skip


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_costs_nothing(flags, launch, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    places = {name: tmp_path / name for name in (*FILES, "none.yaml")} | {"folder": tmp_path}
    fill = lambda text: re.sub(r"\{(.*?)\}", lambda found: str(places[found[1]]), text)
    given = fill(flags).split()
    run = launch(tmp_path / "out", *given[given[0].endswith("yaml") :], settings=[g for g in given if g.endswith("yaml")])
    assert run.code == 2 and len(run.err.strip().splitlines()) == 1, run.err
    assert run.err.startswith("error: ") and all(fill(part) in run.err for part in BAD_INPUT[flags]), run.err
    assert not (tmp_path / "out").exists() and not run.out


def test_a_vllm_that_is_not_there_is_one_line(launch, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    run = launch(tmp_path / "run", "--rollout", "vllm")
    assert run.code == 2 and len(run.errors) == 1 and "install requirements-vllm.txt" in run.err
    assert launch(tmp_path / "run", "--steps", 0).code == 0  # what it left is in nobody's way


def test_on_two_ranks_it_is_said_once_and_main_may_be_called_again(ranks, tmp_path):
    job = ranks(tmp_path / "run", "--pool_trigger", 3)
    run = job.result()
    assert job.codes == [2, -15] and run.err.startswith("error: --pool_trigger 3")
    assert run.err.count("\n") == 1 and not job.said(1, "err") and not run.folder.exists()
    patch = """
import rollout
rollout.time.sleep = lambda seconds: None  # which would give torchrun time to end rank 1
try:
    train.main([*flags, "--steps", "many"])
except SystemExit as end:
    assert end.code == 2
train.main(list(flags))
flags[flags.index("--output_dir") + 1] += "_again"
"""
    run = ranks(tmp_path / "run", "--steps", 1, "--algorithm", "grpo", patch=patch).result()
    assert run.code == 0, run.err
    again = run.folder.with_name("run_again")
    assert (again / "samples.jsonl").read_bytes() == (run.folder / "samples.jsonl").read_bytes()
    assert same_weights(run.weights, load_file(again / "final" / "model.safetensors"))


def test_without_output_dir_runs_are_numbered(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    for name in ("7b", "1.5b", "003", "1000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert "runs/1001" in launch(None, "--steps", 0, "--algorithm", "grpo").out
    assert "runs/1002" in launch(None, "--steps", 0, "--algorithm", "grpo").out
    run = launch(None, "--resume")
    assert run.code == 2 and "--resume goes on in --output_dir" in run.err and len(run.errors) == 1
