"""train.py: a step is the method's, from samples to gradient, in float64; the same weights give the
same samples; what a run writes, warns of and refuses. No last bit of a float32 sum matters."""

import hashlib
import json
import re
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from math import exp, inf
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from conftest import FEW, ROOT, TINY, TOY, same_weights
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import rollout
import train
from error_pool import ErrorPool, correction_prompt
from reward import after_thinking, final_answer
from rollout import Problem, Sample, TransformersEngine, solution_prompt, solution_task

START = load_file(TOY / "model.safetensors")
TOKENIZER = AutoTokenizer.from_pretrained(TOY)

# ------------------------------------------------ one step, from samples to gradient, by the oracle
#
# A scripted engine answers; trial_and_error or self_correction, make_examples and update do the
# rest, on 1, 2 and 3 ranks with micro-batches of any size. The gradients of each optimizer step and
# the metrics are compared with tests/oracle.py, one unpadded sequence at a time.

QUESTIONS = [Problem(f"What is {b} + 1?", f"{b + 1}", "") for b in range(4)]
TASKS = [solution_task(TOKENIZER, problem, b) for b, problem in enumerate(QUESTIONS)]
COMMON = ("--questions_per_step 4 --group_size 3 --pool_trigger 4 --min_variance 0 --seed 3 "
          "--temperature 0.7 --max_new_tokens 44 --importance_cap 1.3 --updates_per_rollout 1")
FOUR, SIX = {1, 2, 6, 9}, {0, 3, 4, 5, 7, 8}
CASES = {  # name: stage, which samples of 12 are right, flags
    "grpo": (1, SIX, ""),
    "four updates, two of them empty": (1, SIX, "--updates_per_rollout 4"),
    "dapo with a KL": (1, SIX, "--reduction dapo --beta 0.1 --clip_high 0.28"),
    "dr_grpo": (1, SIX, "--reduction dr_grpo --scale none --updates_per_rollout 2 --clip_high .3"),
    "overlong": (1, SIX, "--algorithm dapo --dynamic_sampling 1 --overlong_cache 30"),
    "no cap": (1, SIX, "--importance_cap 0"),
    "corrections, grpo with a KL": (2, FOUR, "--beta 0.1"),
    "corrections, dapo": (2, FOUR, "--reduction dapo --updates_per_rollout 2"),
    "corrections, dr_grpo": (2, FOUR, "--reduction dr_grpo --scale none"),
    "all before the solution": (2, FOUR, "--analysis_span prefix --updates_per_rollout 2"),
    "failed ones too": (2, FOUR, "--success_conditioned false --reduction dapo"),
    "the whole response": (2, FOUR, "--credit response"),
    "all of all": (2, FOUR, "--credit response --success_conditioned false"),
    "two ranks without a sample": (2, {6}, "--beta 0.1"),
    "nothing left": (2, set(), "--beta 0.1"),
}
LOGP = dict(temperature=0.7, chunk=5)
BUDGETS = (1, 900, 100_000)  # micro-batches of one sequence, of a few, of all of a rank


@lru_cache
def settings(case):
    return train.parse(f"{COMMON} {CASES[case][2]}".split())


def scripted(stage, j, right):
    """Sample j of 12: (ids, span of its analysis, log mu). 0 and 1 share an analysis; 8 has the
    right answer, but no sections; 9 is cut off."""
    rng = np.random.default_rng((stage, j or 1))
    letters = "".join(rng.choice(list("abcdef "), rng.integers(2, 25)))
    answer, head = f"\\boxed{{{j // 3 + 1 if right or j == 8 else 0}}}", f"Analysis:\n{letters}\n"
    text = f"{head}Corrected Solution:{answer}" if stage == 2 and j != 8 else letters + answer
    ids = TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id] * (j != 9)
    span = (1, len(TOKENIZER(head).input_ids)) if stage == 2 and j != 8 else None
    return ids, span, np.float32(-rng.uniform(4, 7, len(ids))).tolist()


class Script:
    """An engine that says sample 3 b + i as sample i of question b; and a grader."""

    max_context = 10_000

    def __init__(self, stage, right):
        self.rows = [scripted(stage, j, j in right) for j in range(12)]

    def generate(self, prompts, n, *, seeds, temperature, **_):
        assert temperature == 0.7 and all(len(row) == n == 3 for row in seeds)
        asked = [re.search(r"What is (\d) ", TOKENIZER.decode(prompt))[1] for prompt in prompts]
        return [[self.sample(3 * int(b) + i) for i in range(3)] for b in asked]

    def sample(self, j):
        ids, _, log_mu = self.rows[j]
        return Sample(ids, log_mu, TOKENIZER.decode(ids).removesuffix("<|end|>"), j != 9)

    def verdicts(self, texts, golds, problems):
        return ["right" if final_answer(t) == gold else "wrong" for t, gold in zip(texts, golds)]


def scripted_step(case):
    """(groups, examples, metrics) of a step, as train.py makes them."""
    (stage, right, _), pool = CASES[case], ErrorPool(min_variance=0)
    for q in QUESTIONS if stage == 2 else ():
        pool.add(q.problem, q.answer, ["wrong"], [0.0], [True])
    script = Script(stage, right)
    run = SimpleNamespace(config=settings(case), state=train.State(), tasks=TASKS, pool=pool,
                          tokenizer=TOKENIZER, engine=script, grader=script)  # fmt: skip
    made = (train.trial_and_error if stage == 1 else train.self_correction)(run, 1)
    first = [script.sample(j).text for j in (1, 6, 10)]  # of each group that has errors
    assert sorted(e.response for e in pool.errors) == (sorted(first) if stage == 1 else [])
    assert run.state.samples == 12
    return made


@lru_cache
def original(seed):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=276, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True,
    ))  # fmt: skip
    for parameter in model.parameters():  # as they begin, the logits are nearly uniform
        parameter.data.mul_(6 if parameter.dim() == 2 else 1)
    return model.double().eval()


def tiny_model(seed):
    return deepcopy(original(seed))


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
                config, model = replace(settings(case), micro_batch_tokens=budget), tiny_model(0)
                if budget == 900:  # recomputed activations must change nothing either
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                policy, optimizer = train.Policy(model, **LOGP), PlainDescent(model)
                reference = train.Policy(tiny_model(1), **LOGP) if config.beta else None
                how = (DistributedDataParallel(policy), reference, optimizer, config, 1)
                metrics = train.update(*how, groups, examples)
                kept = (groups, examples, made, optimizer.steps, metrics)
                torch.save(kept, f"{folder}/{k}_{world}_{rank}_{budget}.pt")
        del how
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def split(ranks, tmp_path_factory):
    """split(case) -> [what on_ranks kept, of each number of ranks, rank and budget]."""
    folder = tmp_path_factory.mktemp("split")
    patch = f"import test_train; test_train.on_ranks(rank, {str(folder)!r}); raise SystemExit(0)"
    job = ranks(folder / "run", ranks=3, patch=patch)
    assert job.result().code == 0, [job.said(rank, "err") for rank in range(3)]

    def of(case):
        files = sorted(folder.glob(f"{list(CASES).index(case)}_*.pt"))
        return [torch.load(file, weights_only=False) for file in files]

    return of


def log_probabilities(model, samples, temperature=0.7):
    """For each sample log pi of each of its tokens, and the entropies, one sequence at a time."""
    rows, entropies = [], []
    for g, s in samples:
        ids, n = torch.tensor([g.prompt + s.token_ids]), len(g.prompt)
        log_p = (model(ids).logits[0, n - 1 : -1] / temperature).log_softmax(-1)
        rows.append(log_p.gather(1, ids[0, n:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return rows, entropies


def expected(case, groups, examples):
    """(gradients of each optimizer step, metrics) by the oracle, plain descent in between."""
    (stage, places, _), c, model = CASES[case], settings(case), tiny_model(0)
    samples, U = [(g, s) for g in groups for s in g.samples], c.updates_per_rollout
    js = [3 * (int(g.answer) - 1) + i for g in groups for i in range(3)]
    right, lengths = [j in places for j in js], [len(s.token_ids) for _, s in samples]
    spans = [scripted(stage, j, False)[1] for j in js]
    if c.analysis_span == "prefix":
        spans = [span and (0, span[1]) for span in spans]
    if c.credit == "response" or stage == 1:
        spans = [(0, n) for n in lengths]
    punished = [oracle.overlong(n, 44, 30) if c.overlong_cache else 0 for n in lengths]
    rewards = np.add(right, punished).reshape(4, 3)
    advantages = [a for row in rewards for a in oracle.advantages(row, c.scale)]
    assert [e.advantage for e in examples] == pytest.approx(advantages, abs=2e-6)
    advantages = [e.advantage for e in examples]  # to their last bit in float32
    with torch.no_grad():
        old, ref = ([row.tolist() for row in log_probabilities(m, samples)[0]]
                    for m in (model, tiny_model(1)))  # fmt: skip
    gaps = [[o - m for o, m in zip(o, s.logprobs)] for o, (_, s) in zip(old, samples)]
    cap = c.importance_cap or inf
    weights = [[oracle.token_weight(gap, 0, cap) if cap < inf else 1 for gap in x] for x in gaps]
    knobs = {name: getattr(c, name) for name in ("clip_low", "clip_high", "beta", "reduction")}
    steps, losses, seen, widest = [], [], Counter(), 0
    for u in range(U):
        part = range(12 * u // U, 12 * (u + 1) // U)
        rows, entropies = log_probabilities(model, samples)
        columns = [row.tolist() for row in rows], old, ref, advantages, weights, spans, right
        columns, conditioned = [[x[j] for j in part] for x in columns], c.success_conditioned
        if stage == 1:
            conditioned = False
            J, gradient, _ = oracle.stage_one(*columns[:5], longest=44, **knobs)
        else:
            knobs["success_conditioned"] = conditioned
            J, gradient, _ = oracle.stage_two(*columns, longest=44, **knobs)
        masks = [oracle.attribution(lengths[j], spans[j], right[j], conditioned) for j in part]
        run = [(j, t) for j, mask in zip(part, masks) for t, m in enumerate(mask)
               if m and (advantages[j] or c.beta)]  # fmt: skip
        if not run:
            continue  # no optimizer step
        losses.append(-J)
        for j, t in run:
            gap, log_p = gaps[j][t], rows[j][t].item()
            r, widest = oracle.token_ratio(log_p, old[j][t]), max(widest, abs(gap))
            below = advantages[j] < 0 and r < 1 - c.clip_low
            above = advantages[j] > 0 and r > 1 + c.clip_high
            seen.update(entropy=entropies[j][t].item(), kl=oracle.token_kl(log_p, ref[j][t])[0],
                        clip_fraction=below or above, capped_fraction=exp(gap) > cap,
                        logp_gap=abs(gap), loss_tokens=1)  # fmt: skip
        model.zero_grad()
        gradient = [torch.tensor(row, dtype=torch.float64) for row in gradient]
        sum(-(rows[j] @ g) for j, g in zip(part, gradient)).backward()
        steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    n = seen.pop("loss_tokens", 0)
    names = ("entropy", "kl", "clip_fraction", "capped_fraction", "logp_gap")
    metrics = {name: seen[name] / n if n else None for name in names}
    metrics |= {"logp_gap_max": widest} | dict.fromkeys(["kl"] * (not c.beta))
    metrics |= {"loss": np.mean(losses), "grad_norm": 2.0} if steps else dict.fromkeys(
        ("loss", "grad_norm", "logp_gap_max"))  # fmt: skip
    counts = {"loss_tokens": n, "empty_updates": U - len(steps), "nonfinite_updates": 0}
    return steps, metrics | counts


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_equations_however_it_is_split(case, split, monkeypatch):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    results = split(case)
    groups, examples, made, _, _ = results[0]
    steps, metrics = expected(case, groups, examples)
    assert all(max(g.abs().max() for g in step.values()) > 1e-3 for step in steps)  # not small
    share = {"correction_success": len(CASES[case][1]) / 12, "well_formed": 11 / 12}
    share = {"accuracy": 0.5, "discarded_groups": 0} if CASES[case][0] == 1 else share
    assert made == pytest.approx(share) and len(results) == 6 * len(BUDGETS)
    for others, _, same, gradients, reported in results:
        assert others == groups and same == made and len(gradients) == len(steps)
        for ours, theirs in zip(gradients, steps):
            assert all((ours[name] - theirs[name]).abs().max() < 1e-9 for name in theirs)
        assert reported.keys() == metrics.keys()
        for name, value in metrics.items():
            close = value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)
            assert reported[name] == close, name


@sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # one operation, not products and a softmax
def test_compiled_it_is_the_same_step(alone, monkeypatch):
    """--compile and --gradient_checkpointing, but for the GPU's code: layers are computed again,
    their attention is not; and what the engine runs is not compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    groups, examples, _ = scripted_step("corrections, dapo")
    config, results = replace(settings("corrections, dapo"), micro_batch_tokens=130), []
    for compiled in (False, True):
        model = tiny_model(0)
        if compiled:
            train.compile_layers(model, recompute=True)
        policy, optimizer = train.Policy(model, **LOGP, compile_head=compiled), PlainDescent(model)
        how = (DistributedDataParallel(policy), None, optimizer, config, 1)
        train.update(*how, groups, examples)  # it compiles here
        with torch.profiler.profile() as profile:
            metrics = train.update(*how, groups, examples)
        calls = Counter({e.key.split("/")[0]: e.count for e in profile.key_averages()})
        results.append((optimizer.steps, metrics, calls))
    (plain, metrics, calls), (fused, reported, compiled_calls) = results
    for ours, theirs in zip(fused, plain, strict=True):
        assert all((ours[name] - theirs[name]).abs().max() < 1e-9 for name in theirs)
    assert reported == pytest.approx(metrics)
    assert compiled_calls["aten::mm"] > calls["aten::mm"] > 0
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert compiled_calls[attention] == calls[attention] > 0
    regions = [[key for key in c if "Compiled Region" in key] for c in (calls, compiled_calls)]
    assert [len(names) for names in regions] == [0, 3]  # layers; the head, forward and backward
    train.compile_layers(model := tiny_model(0), recompute=False)
    engine = TransformersEngine(model, TOKENIZER, max_context=99)
    with torch.profiler.profile() as profile:
        engine.generate([[1, 2]], 1, temperature=1.0, max_new_tokens=3, seeds=[[0]])
    assert not any("Compiled" in event.key for event in profile.key_averages())


def test_the_cases_reach_what_they_claim(split):
    reported = {case: split(case)[0][4] for case in CASES}
    assert reported["dr_grpo"]["clip_fraction"] > 0 < reported["dapo with a KL"]["kl"]
    assert 0 < reported["grpo"]["capped_fraction"] < 1 and not reported["no cap"]["capped_fraction"]
    empty = {case: m["empty_updates"] for case, m in reported.items() if m["empty_updates"]}
    assert empty == {"four updates, two of them empty": 2, "nothing left": 1}
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
STANDING = "--steps 2 --learning_rate 0".split()  # so all four updates, and both stages, see START


def test_from_the_same_weights_the_same_samples(launch, ranks, tmp_path):
    """On 1 and 2 ranks, at any micro-batch, chunk and memory, and in the first edition. What is
    computed with them is close, as float32 is."""
    two, one = ranks(tmp_path / "two", *STANDING), launch(tmp_path / "one", *STANDING)
    small = "--micro_batch_tokens 300 --logprob_chunk 32 --gradient_checkpointing True".split()
    for run in (one, two.result(), launch(tmp_path / "small", *STANDING, *small)):
        assert run.code == 0 and not run.errors and run.samples == one.samples, run.err
        for stage, digest in GOLDEN.items():
            said = json.dumps([r["response"] for r in run.samples if r["stage"] == stage])
            assert hashlib.sha256(said.encode()).hexdigest()[:16] == digest
        for m, first in zip(run.comparable(), one.comparable(), strict=True):
            assert m.keys() == first.keys()
            for name, value in first.items():
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-5, abs=1e-5 if "gap" in name else 1e-7)
                assert m[name] == value, name
        assert same_weights(run.weights, START)


# ------------------------------------------------------------------------------ a run, from outside

EVERY_STEP = set(
    "step stage accuracy correction_success loss grad_norm loss_tokens clip_fraction entropy kl "
    "logp_gap logp_gap_max capped_fraction empty_updates nonfinite_updates tokens_per_second right "
    "wrong ungradable mixed_groups truncated mean_length pool_size visits dropped_errors questions "
    "samples tokens seconds peak_memory_gb".split()
)
EVALUATED = {f"eval_{what}{se}" for what in ("accuracy", "correction") for se in ("", "_se")}
BY_CONTENT = ("ranks", "problems", "first_prompt", "weights")
SAMPLE = "step stage problem answer prompt response verdict finished analysis".split()


@pytest.fixture(scope="module")
def standard(launch, tmp_path_factory):
    """A run through both stages, evaluated before, in the middle and after; and all its seeds."""
    generate, seeds = TransformersEngine.generate, []

    def watched(*arguments, **keywords):
        seeds.append([seed for row in keywords["seeds"] for seed in row])
        return generate(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", watched)
        flags = "--eval_questions 8 --eval_every 3".split()
        run = launch(tmp_path_factory.mktemp("standard") / "run", *flags)
    run.seeds = seeds
    return run


def test_writes_what_it_promises(standard, launch, tmp_path):
    assert standard.code == 0 and not standard.errors
    names = sorted(path.name for path in standard.folder.glob("[!.]*"))
    assert names == "checkpoints curves.png final metrics.jsonl samples.jsonl settings.json".split()
    kept = sorted(path.name for path in (standard.folder / "checkpoints").iterdir())
    assert kept == ["step_000003", "step_000006"]
    assert (standard.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((standard.folder / "settings.json").read_text())
    assert saved.keys() == {*train.Config.__dataclass_fields__, *BY_CONTENT}
    assert all(list(row) == SAMPLE for row in standard.samples)
    flags = f"--steps 0 --eval_data {TOY}/test.jsonl --eval_questions 8".split()
    again = launch(tmp_path / "run", "--model", standard.folder / "final", *flags)
    assert all(again.metrics[0][name] == standard.metrics[-1][name] for name in EVALUATED)
    before, after = (standard.metrics[i]["eval_accuracy"] for i in (0, -1))
    assert re.search(rf"answered right +{before:.3f} ± [\d.]+ +{after:.3f} ± ", standard.out)
    assert "--- the first prompt\n<|user|>Add " in standard.out
    assert standard.out.count("--- stage 2, visit ") == standard.steps[-1]["visits"] > 0


def test_metrics_are_there_and_make_sense(standard):
    assert [("eval_accuracy" in m) for m in standard.metrics] == [True, False, False] * 2 + [True]
    tokens = questions = 0
    for i, m in enumerate(standard.steps, 1):
        one, more = m["stage"] == 1, EVALUATED if i % 3 == 0 else set()
        assert set(m) == EVERY_STEP | more | {"discarded_groups" if one else "well_formed"}
        tokens, questions = tokens + round(16 * m["mean_length"]), questions + 4 * one
        counts = (i, 16 * i, tokens, questions)
        assert (m["step"], m["samples"], m["tokens"], m["questions"]) == counts
        shares = m["accuracy"], m["correction_success"]
        assert shares == ((m["right"] / 16, None) if one else (None, m["right"] / 16))
        assert m["right"] + m["wrong"] == 16 and m["truncated"] == m["ungradable"] == 0
        assert m["logp_gap"] <= m["logp_gap_max"] < 1e-4  # engine and trainer are the same model
        assert 0 < m["entropy"] < 1 and 0 < m["grad_norm"] < 5 and m["peak_memory_gb"] > 0.1
        assert {"rollout", "update"} <= set(m["seconds"]) and m["dropped_errors"] == 0
        assert 0 < sum(m["seconds"].values()) < 100  # durations, not times of the day


def test_stages_pool_and_prompts_follow_from_the_samples(standard):
    """Eqs. 1, 7 to 11 once more, from samples.jsonl: what was in the pool decides what is asked."""
    pool, stage, asked = [], 1, []
    for m in standard.steps:
        rows = [r for r in standard.samples if r["step"] == m["step"]]
        groups = [rows[i : i + 4] for i in range(0, 16, 4)]
        assert all(len({(r["problem"], r["prompt"]) for r in group}) == 1 for group in groups)
        stage = 2 if stage == 1 and len(pool) >= 4 else 1 if len(pool) < 4 else stage  # Eq. 9
        assert m["stage"] == stage and all(r["stage"] == stage for r in rows)
        errors, pool = (pool[:4], pool[4:]) if stage == 2 else ([None] * 4, pool)
        for group, error in zip(groups, errors, strict=True):  # Eq. 10, the oldest first
            turn = solution_prompt(group[0]["problem"])
            if error:
                turn = correction_prompt(error["problem"], after_thinking(error["response"]))
                assert all(group[0][name] == error[name] for name in ("problem", "answer"))
            assert group[0]["prompt"] == f"<|user|>{turn}<|assistant|>"
            wrong = [r for r in group if r["verdict"] != "right" and r["finished"]]
            if not error and wrong and oracle.is_informative([r not in wrong for r in group], 0.15):
                pool.append(wrong[0])  # Eq. 8
        for r in rows:  # Eq. 11: without its two sections a correction has no solution
            right = final_answer(r["response"].rpartition("Corrected Solution:")[2]) == r["answer"]
            right = right and (stage == 1 or r["analysis"] is not None)
            assert r["verdict"] == ("right" if right else "wrong")
        asked += [group[0]["problem"] for group in groups if stage == 1]
        assert m["pool_size"] == len(pool)
        assert m["mixed_groups"] == sum(len({r["verdict"] for r in g}) == 2 for g in groups) / 4
    assert {m["stage"] for m in standard.steps} == {1, 2} and len(set(asked)) == len(asked)


def test_randomness_is_of_the_place_alone(standard):
    """No two samples of training share a seed; an evaluation has its own, the same each time."""
    assert standard.seeds[0] == [0, 1, 2, 3]  # of the trial before a run
    answers, training = standard.seeds[1], sum([s for s in standard.seeds if len(s) == 16], [])
    assert standard.seeds.count(answers) == 3 and len(answers) == 8
    assert len(set(training)) == len(training) == 96 and not set(training) & set(answers)


# ---------------------------------------------------------------------------- the parts of the loop


def test_only_what_is_known_to_be_wrong_enters_the_pool():
    """Not what could not be graded, nor what was cut off; a fork's partial reward is no full one."""
    rows = [("a", 1.0, "right", True), ("b", 0.0, "ungradable", True), ("c", 0.0, "wrong", False),
            ("d", 0.0, "wrong", True), ("e", 0.5, "wrong", True)]  # fmt: skip
    samples = [Sample([1], [-1.0], text, done, verdict, value) for text, value, verdict, done in rows]
    pool = ErrorPool(min_variance=0.1, errors_per_question=9)
    train.add_errors(pool, rollout.Group("q", "1", [7], 0, samples=samples))
    assert [error.response for error in pool.errors] == ["d", "e"]


def test_a_stage_that_teaches_nothing_moves_nothing(launch, tmp_path, monkeypatch):
    """Corrections are cut off at 64 tokens, so m = 0. Adam's momentum must not move the weights
    either: a run that trains both stages is one that trains the first, and of the second none."""
    after, log = {}, train.log

    def logged(run, metrics, groups):
        log(run, metrics, groups)
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        after[run.config.train_stages, metrics["step"]] = weights

    monkeypatch.setattr(train, "log", logged)
    flags = "--max_new_tokens 64 --steps 3 --train_stages".split()
    both, one, two = (launch(tmp_path / stages, *flags, stages) for stages in ("both", "1", "2"))
    assert [m["stage"] for m in both.steps] == [1, 2, 1] and both.samples == one.samples
    same = [same_weights(after["both", i], after["both", i + 1]) for i in range(3)]
    assert same == [False, True, False] and same_weights(two.weights, START)
    assert same_weights(both.weights, one.weights)
    m = both.steps[1]
    assert (m["empty_updates"], m["loss_tokens"], m["loss"], m["grad_norm"]) == (2, 0, None, None)
    assert ["loss" in m for m in two.steps] == [False, True, False]
    assert len(both.errors) == 1 and "visit 1 to stage 2 trained on nothing" in both.err
    assert not one.errors


@pytest.mark.parametrize("rounds,rewards,kept,discarded", [
    (1, "0011 0000 1111 0001", "a b c d", 0),  # without dynamic sampling
    (4, "0011 0000 1111 0001 | 1111 0111 | 1000", "a d f g", 3),
    (4, "0011 0000 1111 0001 | 1111 0111 | 1111 | 0000", "a d f h", 4),  # the last of the discarded
    (3, "1111 0000 1111 0000 | 1111 0000 1111 0000 | 0000 0000 0000 0000", "i j k l", 8),
])  # fmt: skip
def test_dynamic_sampling(rounds, rewards, kept, discarded, monkeypatch):
    asked, batches = [], iter(rewards.split("|"))

    def in_order(seed, count, start, n):
        assert (seed, count) == (3, 16)
        return range(start, start + n)

    def drawn(run, step, tasks):
        asked.extend(tasks)
        return [SimpleNamespace(problem=task.problem, rewards=[*map(int, row)])
                for task, row in zip(tasks, next(batches).split(), strict=True)]  # fmt: skip

    monkeypatch.setattr(train, "draw_samples", drawn)
    monkeypatch.setattr(train, "question_order", in_order)
    flags = f"--algorithm dapo --questions_per_step 4 --seed 3 --dynamic_sampling {rounds}"
    tasks = [solution_task(TOKENIZER, Problem(letter, "1", ""), 0) for letter in "abcdefghijklmnop"]
    run = SimpleNamespace(config=train.parse(flags.split()), state=train.State(), tasks=tasks)
    groups, thrown = train.draw_questions(run, 1)
    assert (" ".join(g.problem for g in groups), thrown) == (kept, discarded)
    n = len(rewards.replace("|", "").split())
    assert [task.problem for task in asked] == [task.problem for task in tasks[:n]]
    assert run.state.questions == n
    assert len({task.question for task in asked}) == n  # no seed twice
    assert next(batches, None) is None


def test_the_switch_and_the_visit_that_taught_nothing(capsys):
    """Eq. 9 with N = 6 and B = 4, and a warning at the end of each visit without a loss token."""
    config = train.parse("--pool_trigger 6 --questions_per_step 4".split())
    run, seen = SimpleNamespace(config=config, state=train.State()), []
    for waiting, tokens in zip([5, 6, 4, 3, 9, 3, 7, 0], [0, 5, 0, 0, 0, 0, 0, 0]):
        run.pool = range(waiting)
        entered = train.switch_stage(run)
        seen.append((run.state.stage, run.state.visits, entered))
        run.state.visit_loss_tokens += tokens
    stages, visits, entries = zip(*seen)
    assert stages == (1, 2, 2, 1, 2, 1, 2, 1) and visits == (0, 1, 1, 1, 2, 2, 3, 3)
    assert entries == (False, True, False, False, True, False, True, False)
    (second, third) = capsys.readouterr().err.splitlines()
    assert "visit 2 to stage 2 trained on nothing: no correction had both headers" in second
    assert "visit 3 to" in third and "none was right where another was wrong" in third
    run.pool = None  # a baseline's
    assert train.switch_stage(run) is False and run.state.stage == 1


def test_baselines_the_reference_and_the_alarm(launch, tmp_path, monkeypatch):
    """grpo with a KL term and a temperature: what it samples with is what it trains with, until the
    engine is stale. pi_ref is loaded only where there is a KL."""
    loaded, load = [], rollout.load_policy
    monkeypatch.setattr(rollout, "load_policy", lambda *a: loaded.append(load(*a)) or loaded[-1])
    flags = "--algorithm grpo --temperature 0.8 --learning_rate 2e-3 --beta 0.5 --steps 3".split()
    run = launch(tmp_path / "kl", *flags)
    assert run.code == 0 and not run.errors and len(loaded) == 2
    assert all(m["pool_size"] is None and m["logp_gap_max"] < 1e-4 for m in run.steps)
    assert sum(m["loss_tokens"] for m in run.steps) == run.steps[-1]["tokens"]  # all have a KL
    assert 1e-6 < run.steps[0]["kl"] < run.steps[-1]["kl"]  # pi_ref stays behind
    stale = loaded[1][0]
    monkeypatch.setattr(TransformersEngine, "update_weights",
                        lambda self, _: vars(self).update(model=stale))  # fmt: skip
    run = launch(tmp_path / "dapo", *"--algorithm dapo --steps 2 --learning_rate 5e-3".split())
    assert len(loaded) == 3
    assert len(run.errors) == 1 and "step 2: engine and trainer disagree" in run.errors[0]


def test_corrections_that_do_not_fit_drop_their_error(launch, tmp_path):
    """A context that holds every solution prompt and no correction prompt."""
    longest = max(len(task.prompt) for task in rollout.load_tasks(TOKENIZER, str(FEW)))
    flags = "--steps 3 --max_new_tokens 60 --max_context".split()
    run = launch(tmp_path / "run", *flags, longest + 60)
    assert run.code == 0 and [m["stage"] for m in run.steps] == [1, 2, 1]
    before, visit, _ = run.steps
    assert visit["correction_success"] is visit["well_formed"] is None and visit["loss_tokens"] == 0
    assert visit["dropped_errors"] == before["pool_size"] and visit["pool_size"] == 0
    assert visit["samples"] == before["samples"] and len(run.errors) == 1 and "visit 1" in run.err


# ---------------------------------------------------------------------------- settings and refusals


def test_settings_files(tmp_path):
    (tmp_path / "my.yaml").write_text("steps: 9\nsuccess_conditioned: false\nlearning_rate: 1e-5\n")
    config = train.parse([str(tmp_path / "my.yaml"), "--steps", "8"])  # flags win
    assert (config.steps, config.success_conditioned, config.learning_rate) == (8, False, 1e-5)
    *files, toy = sorted(map(str, (ROOT / "configs").glob("*.yaml")))
    assert len(files) == 4 and train.parse([toy]) == train.parse([])
    for c in [train.parse([file, "--algorithm", "dapo"]) for file in files]:  # is DAPO there too
        assert (c.clip_high, c.reduction, c.dynamic_sampling) == (0.28, "dapo", 4)


def test_help_teaches_every_flag_and_names_trls(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse(["--help"])
    text, fields = " ".join(capsys.readouterr().out.split()), train.Config.__dataclass_fields__
    assert all(f"--{name}" in text and len(f.metadata["help"]) > 15 for name, f in fields.items())
    trl = {"steps": "max_steps / updates_per_rollout", "group_size": "num_generations",
           "beta": "beta", "reduction": "loss_type", "temperature": "temperature"}  # fmt: skip
    assert all(f"(TRL: {theirs})" in fields[ours].metadata["help"] for ours, theirs in trl.items())


BAD = {  # flags: what the one line must name, and what it must tell
    "--model .": ("--model .", "causal language model"),
    "--train_data none.jsonl": ("none.jsonl", "give JSON lines"),
    "--eval_data bad.jsonl": ("bad.jsonl, row 1", "a field answer"),
    "--pool_trigger 3": ("--pool_trigger 3", "raise it"),
    "--min_variance 0.3": ("--min_variance 0.3", "lower it"),
    "--group_size 3 --min_variance 0.24": ("--min_variance 0.24", "--group_size 3"),
    "--group_size 1": ("--group_size 1", "at least 2"),
    "--algorithm grpo --train_stages 2": ("--train_stages 2", "has no stage 2"),
    "--updates_per_rollout 3": ("--updates_per_rollout 3", "choose a divisor"),
    "--temperature 0": ("--temperature 0", "must be above 0"),
    "--overlong_cache 161": ("--overlong_cache 161", "exceeds"),
    "--learning_rate nan": ("--learning_rate nan", "at least 0"),
    "--algorithm ppo": ("--algorithm", "'scrpo'"),
    "--learning_rte 1": ("--learning_rte", "--help"),
    "--max_context 20": ("--train_data", "raise --max_context"),
    "none.yaml": ("none.yaml", "cannot be read"),
    "key.yaml": ("--learning_rte", "--help"),
    "value.yaml": ("--steps", "many"),
    "text.yaml": ("text.yaml", "cannot be read"),
    "--rollout vllm": ("--rollout vllm", "install requirements-vllm.txt"),
}
FILES = {"bad.jsonl": '{"problem": "1", "answer": "1"}\n{"problem": "2"}\n', "text.yaml": "hello\n",
         "key.yaml": "learning_rte: 1\n", "value.yaml": "steps: many\n"}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_costs_nothing(flags, launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yaml, given = flags.endswith("yaml"), flags.split()
    run = launch(tmp_path / "out", *given * (not yaml), first=given * yaml + TINY * (not yaml))
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1, run.err
    assert all(part in run.err for part in BAD[flags]) and not run.out, run.err
    assert not (tmp_path / "out").exists()


def test_on_two_ranks_it_is_said_once_and_main_may_be_called_again(ranks, tmp_path):
    job = ranks(tmp_path / "run", "--pool_trigger", 3)
    run = job.result()
    assert job.codes == [2, -15] and run.err.startswith("error: --pool_trigger 3")
    assert run.err.count("\n") == 1 and not job.said(1, "err") and not run.folder.exists()
    patch = """
import rollout
rollout.time.sleep = lambda seconds: None  # which gives torchrun the time to end rank 1
try:
    train.main([*flags, "--steps", "many"])
except SystemExit as end:
    assert end.code == 2
train.main(list(flags))
flags[flags.index("--output_dir") + 1] += "_again"
"""
    job = ranks(tmp_path / "run", *"--steps 1 --algorithm grpo".split(), patch=patch)
    run = job.result()
    assert run.code == 0 and "1/1" in run.err, run.err
    assert not job.said(1) and "1/1" not in job.said(1, "err")  # a bar on rank 0 alone
    again = load_file(tmp_path / "run_again" / "final" / "model.safetensors")
    assert same_weights(run.weights, again) and "RANK" not in train.os.environ


def test_without_output_dir_runs_are_numbered(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    for name in ("7b", "1.5b", "003", "1000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for number in (1001, 1002):
        assert f"runs/{number}" in launch(None, "--steps", 0, "--algorithm", "grpo").out
    run = launch(None, "--resume")
    assert run.code == 2 and "--resume continues the run in --output_dir" in run.err and len(run.errors) == 1
