"""train.py: the loop visits both stages, does what the method says on every line that is not loss.py's or the pool's,
writes what it promises, and says in one line what is wrong with its input."""

import fcntl
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import oracle
import pytest
import torch
from conftest import PATIENCE, ROOT, same_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from error_pool import after_thinking, correction_prompt
from evaluate import accuracy, sample_answers, start_distributed
from reward import Grader, find_correction
from rollout import TransformersEngine, load_problems, make_engine, render, sample_seed, solution_prompt

TOY = ROOT / "toy"
BENCHMARK = ROOT.parent / "shared" / "benchmarks" / "train.jsonl"
START = load_file(TOY / "model.safetensors")
EVERY_STEP = {
    "step", "stage", "accuracy", "correction_success", "discarded_groups", "loss", "grad_norm", "loss_tokens",
    "clip_fraction", "entropy", "kl", "logp_gap", "logp_gap_max", "capped_fraction", "empty_updates",
    "nonfinite_updates", "tokens_per_second", "mixed_groups", "truncated", "mean_length", "right", "wrong",
    "ungradable", "pool_size", "visits", "dropped_errors", "questions", "samples", "tokens", "seconds",
    "peak_memory_gb",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


@pytest.fixture(scope="module")
def standard(launch, tmp_path_factory):
    """The run that most tests look at: both stages, evaluated before, in the middle and after, every sample kept."""
    return launch(
        tmp_path_factory.mktemp("standard") / "run",
        "--eval_questions",
        32,
        "--eval_every",
        3,
        "--samples_per_step",
        -1,
    )


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) -> a list that gets (arguments, keywords, result) of every call from now on."""

    def watch(owner, name):
        calls, original = [], getattr(owner, name)

        def watched(*arguments, **keywords):
            result = original(*arguments, **keywords)
            calls.append((arguments, keywords, result))
            return result

        monkeypatch.setattr(owner, name, watched)
        return calls

    return watch


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toy_problems(folder, n, source="train.jsonl"):
    path = folder / f"{n}_{source}"
    path.write_text("".join((TOY / source).read_text().splitlines(keepends=True)[:n]))
    return path


# ------------------------------------------------------------------------------------------------ the standard run


def test_writes_what_it_promises(standard):
    assert standard.code == 0 and not standard.errors
    names = {path.name for path in standard.folder.glob("[!.]*")}
    assert names == {"settings.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints", "final"}
    assert (standard.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (standard.folder / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    settings = json.loads((standard.folder / "settings.json").read_text())
    assert settings["seed"] == 0 and settings["clip_high"] == 0.2 and settings["ranks"] == 1


def test_metrics_are_there_and_make_sense(standard):
    assert [m["step"] for m in standard.metrics] == list(range(7))
    assert {m["stage"] for m in standard.steps} == {1, 2}
    samples = tokens = questions = 0
    for m in standard.steps:
        own = {"discarded_groups"} if m["stage"] == 1 else {"well_formed"}
        assert set(m) - {"eval_accuracy", "eval_accuracy_se", "eval_correction", "eval_correction_se"} == (
            EVERY_STEP - {"discarded_groups"} | own)  # fmt: skip
        samples, tokens = samples + 64, tokens + round(64 * m["mean_length"])
        questions += 8 * (m["stage"] == 1)
        assert (m["samples"], m["tokens"], m["questions"]) == (samples, tokens, questions)
        assert m["right"] + m["wrong"] + m["ungradable"] == 64
        shares = (
            (m["accuracy"], m["correction_success"]) if m["stage"] == 1 else (m["correction_success"], m["accuracy"])
        )
        assert shares == (m["right"] / 64, None)
        assert 0 < m["loss_tokens"] <= 64 * m["mean_length"] and 0 <= m["clip_fraction"] < 0.1 and m["kl"] is None
        assert 0 < m["entropy"] < 1 and 0 < m["grad_norm"] < 5 and abs(m["loss"]) < 1  # stage 2: only Â > 0
        assert m["logp_gap"] <= m["logp_gap_max"] < 1e-4  # engine and trainer are the same model
        assert (
            m["empty_updates"]
            == m["nonfinite_updates"]
            == m["dropped_errors"]
            == m["truncated"]
            == m["capped_fraction"]
            == 0
        )
        assert (
            set(m["seconds"]) >= {"push", "rollout", "grading", "waiting", "update"} and m["tokens_per_second"] > 100
        )
        assert 0.1 < m["peak_memory_gb"] < 8
    assert [("eval_accuracy" in m) for m in standard.metrics] == [True, False, False, True, False, False, True]
    assert not same_weights(standard.weights, START)


def test_stages_pool_and_prompts_follow_from_the_samples(standard):
    """Eqs. 7 to 11 once more, from samples.jsonl alone: what was in the pool decides each step's stage and prompts."""
    pool, stage = [], 1
    for m in standard.steps:
        rows = [r for r in standard.samples if r["step"] == m["step"]]
        groups = [rows[i : i + 8] for i in range(0, 64, 8)]
        assert all(len({(r["problem"], r["prompt"]) for r in group}) == 1 for group in groups)
        stage = 2 if stage == 1 and len(pool) >= 8 else 1 if stage == 2 and len(pool) < 8 else stage  # Eq. 9
        assert m["stage"] == stage and all(r["stage"] == stage for r in rows)
        if stage == 1:
            for group in groups:
                assert group[0]["prompt"] == f"<|user|>{solution_prompt(group[0]['problem'])}<|assistant|>"
                wrong = [r for r in group if r["verdict"] != "right" and r["finished"]]
                if oracle.is_informative([r["verdict"] == "right" for r in group], 0.15) and wrong:
                    pool.append(wrong[0])  # Eq. 8
        else:
            errors, pool = pool[:8], pool[8:]
            for group, error in zip(groups, errors, strict=True):  # Eq. 10, the oldest first
                assert (group[0]["problem"], group[0]["answer"]) == (error["problem"], error["answer"])
                assert correction_prompt(error["problem"], after_thinking(error["response"])) in group[0]["prompt"]
            assert m["well_formed"] == sum(r["analysis"] is not None for r in rows) / 64
            assert all(r["verdict"] == "wrong" for r in rows if r["analysis"] is None)  # Eq. 11
        assert m["pool_size"] == len(pool)
        assert m["mixed_groups"] == sum(0 < sum(r["verdict"] == "right" for r in g) < 8 for g in groups) / 8
    assert standard.metrics[-1]["visits"] >= 1


def test_verdicts_are_the_graders(standard):
    def graded(r):  # Eq. 11: without its two sections a correction has no solution
        return (
            r["response"]
            if r["stage"] == 1
            else r["response"].rpartition("Corrected Solution:")[2]
            if r["analysis"]
            else ""
        )

    with Grader(deadline=PATIENCE) as grader:
        verdicts = grader.verdicts([graded(r) for r in standard.samples], [r["answer"] for r in standard.samples])
    assert verdicts == [r["verdict"] for r in standard.samples]


def test_final_loads_and_gives_the_last_accuracy_again(standard, tokenizer):
    for line, folder in ((standard.metrics[0], TOY), (standard.metrics[-1], standard.folder / "final")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        engine = make_engine("transformers", model, AutoTokenizer.from_pretrained(folder), model_path=str(folder))
        start_distributed()
        try:
            with Grader(deadline=PATIENCE) as grader:
                answers = sample_answers(engine, engine.tokenizer, load_problems(str(TOY / "test.jsonl"))[:32], grader,
                                         k=1, temperature=1.0, top_p=1.0, max_new_tokens=160, seed=0)  # fmt: skip
        finally:
            torch.distributed.destroy_process_group()
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                train.os.environ.pop(name)
        assert accuracy(answers) == (line["eval_accuracy"], line["eval_accuracy_se"])


def test_what_one_sees(standard):
    assert "--- stage 1: the first prompt\n<|user|>Add " in standard.out
    shown = re.search(r"--- stage 2, visit 1: .*?\n---\nAnalysis:>>>(.*?)<<<(.*?)<\|end\|>\n---", standard.out, re.S)
    first = [r for r in standard.samples if r["stage"] == 2]
    row = next(r for r in first if r["verdict"] == "right" and f"Analysis:{shown[1]}Corrected" in r["response"])
    assert row["prompt"] in standard.out and shown[2].startswith("Corrected Solution:")
    before, after = standard.metrics[0]["eval_accuracy"], standard.metrics[-1]["eval_accuracy"]
    assert re.search(rf"answered right +{before:.3f} ± [\d.]+ +{after:.3f} ± ", standard.out)
    assert "own errors corrected" in standard.out and re.search(r"time: .*rollout \d+ s", standard.out)
    assert "stage 2, corrected 0." in standard.err and "pool " in standard.err and "tok/s" in standard.err


# ------------------------------------------------------------------------- one step against the equations, end to end


def log_probabilities(weights, groups):
    """[[log pi of each of its tokens] for each sample], float64, one sequence at a time: no padding, no cutting."""
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float64)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    rows = []
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([group.prompt + sample.token_ids])
            logits = model(ids).logits[0, len(group.prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, ids[0, len(group.prompt) :, None])[:, 0])
    return model, rows


@pytest.mark.parametrize("flags", [
    "--reduction grpo --beta 0.04 --updates_per_rollout 2",
    "--reduction dapo --clip_high 0.28 --updates_per_rollout 1",
    "--reduction dr_grpo --scale none --updates_per_rollout 2",
    "--reduction grpo --no_success_conditioned --updates_per_rollout 1",
])  # fmt: skip
def test_loss_and_gradient_are_the_equations(flags, launch, tmp_path, monkeypatch):
    """Each optimizer step of a run through both stages: -J and its gradient, against oracle.py in float64."""
    flags, groups_now, rollouts, steps = flags.split(), [], [], []
    option = dict(zip(flags, [*flags[1:], ""]))
    generate, update, make_examples = TransformersEngine.generate, train.update, train.make_examples

    def disagreeing(*arguments, **keywords):  # so that Eq. 14 has something to do, its cap too
        groups = generate(*arguments, **keywords)
        for sample in (s for group in groups for s in group):
            sample.logprobs = [logprob - 0.4 * (t % 3) for t, logprob in enumerate(sample.logprobs)]
        return groups

    def keep_groups(groups, *rest):
        groups_now[:] = groups
        return make_examples(groups, *rest)

    def watched_update(run, *arguments):
        def watched_step(rate):
            steps.append((len(rollouts) - 1, copy(run.model), [p.grad.clone() for p in run.optimizer.params]))
            return train.MasterAdamW.step(run.optimizer, rate)

        run.optimizer.step = watched_step
        rollouts.append((copy(run.model), run.state.stage, [*groups_now]))
        return update(run, *arguments)

    def copy(model):
        return {name: value.detach().double() for name, value in model.state_dict().items()}

    monkeypatch.setattr(TransformersEngine, "generate", disagreeing)
    monkeypatch.setattr(train, "make_examples", keep_groups)
    monkeypatch.setattr(train, "update", watched_update)
    small = "--steps 2 --questions_per_step 6 --pool_trigger 6 --min_variance 0 --errors_per_question 2"
    run = launch(tmp_path / "run", *small.split(), "--learning_rate", 1e-3, *flags)
    assert [m["stage"] for m in run.steps] == [1, 2]

    U, beta = int(option["--updates_per_rollout"]), float(option.get("--beta", 0))
    how = {"clip_low": 0.2, "clip_high": float(option.get("--clip_high", 0.2)), "beta": beta,
           "reduction": option["--reduction"], "longest": 160}  # fmt: skip
    reference = {name: value.double() for name, value in START.items()}
    losses = [[], []]
    for place, (i, weights, gradients) in enumerate(steps):
        old_weights, stage, groups = rollouts[i]
        u = sum(j == i for j, *_ in steps[:place])  # no update of this run is empty: asserted below
        groups = groups[u * len(groups) // U : (u + 1) * len(groups) // U]
        model, logp = log_probabilities(weights, groups)
        with torch.no_grad():
            old = [row.tolist() for row in log_probabilities(old_weights, groups)[1]]
            ref = [row.tolist() for row in log_probabilities(reference, groups)[1]] if beta else None
        advantages = [a for g in groups for a in oracle.advantages(g.rewards, option.get("--scale", "std"))]
        engine = [s.logprobs for g in groups for s in g.samples]
        cap = [[oracle.token_weight(o, e, 2.0) for o, e in zip(*rows)] for rows in zip(old, engine)]
        rows = [row.tolist() for row in logp], old, ref, advantages, cap
        if stage == 1:
            J, gradient, _ = oracle.stage_one(*rows, **how)
        else:
            spans, success = (
                [span for g in groups for span in g.spans],
                [reward == 1 for g in groups for reward in g.rewards],
            )
            J, gradient, _ = oracle.stage_two(
                *rows, spans, success, **how, success_conditioned="--no_success_conditioned" not in flags
            )
        losses[i].append(-J)
        sum((torch.tensor(g) * row).sum() for g, row in zip(gradient, logp)).neg().backward()
        for (name, p), ours in zip(model.named_parameters(), gradients, strict=True):
            assert (ours - p.grad).norm() <= 2e-4 * p.grad.norm() + 1e-7, (stage, u, name)
    assert [m["empty_updates"] for m in run.steps] == [0, 0] and len(steps) == 2 * U
    for m, expected in zip(run.steps, losses, strict=True):
        assert m["loss"] == pytest.approx(sum(expected) / U, abs=2e-6)
        assert 0.1 < m["capped_fraction"] < 0.5 and (m["kl"] is not None) == bool(beta)
    assert any("disagree" in line and "stale weights" in line for line in run.errors)  # the alarm


# --------------------------------------------------------------------------------------- which tokens carry what


class Watched:
    """What one run did, from inside: each rollout's groups and examples, each optimizer step's denominator."""

    def __init__(self, monkeypatch):
        self.rollouts, self.counted = [], []
        make_examples, step_denominator = train.make_examples, train.step_denominator

        def watched_examples(groups, *rest):
            self.rollouts.append((groups, examples := make_examples(groups, *rest)))
            return examples

        def watched_denominator(lengths, *rest):
            self.counted.append(list(lengths))
            return step_denominator(lengths, *rest)

        monkeypatch.setattr(train, "make_examples", watched_examples)
        monkeypatch.setattr(train, "step_denominator", watched_denominator)

    def stage(self, run, number):
        """[(group, sample, analysis span, example)] of all rollouts of one stage."""
        return [
            (groups[e.group], groups[e.group].samples[i % 8], groups[e.group].spans[i % 8], e)
            for m, (groups, examples) in zip(run.steps, self.rollouts, strict=True) if m["stage"] == number
            for i, e in enumerate(examples)
        ]  # fmt: skip


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def carried(group, sample, example):
    """The places in the sample whose tokens carry loss; also checks that the example is cut from the sample."""
    whole = group.prompt + sample.token_ids
    start = example.first - len(group.prompt)
    assert example.ids == whole[: len(example.ids)] and len(example.ids) == example.first + len(example.mask)
    assert example.engine_logp == sample.logprobs[start : start + len(example.mask)]
    return [start + t for t in range(len(example.mask)) if example.mask[t]]


def check_advantages(rows):
    for k in range(0, len(rows), 8):
        group = rows[k][0]
        assert [e.advantage for *_, e in rows[k : k + 8]] == pytest.approx(oracle.advantages(group.rewards), abs=1e-5)


@pytest.mark.parametrize("flags", ["", "--no_success_conditioned", "--credit response", "--analysis_span prefix",
                                   "--credit response --no_success_conditioned"])  # fmt: skip
def test_tokens_that_carry_loss(flags, launch, tmp_path, watched, tokenizer):
    """Eq. 12 with each of its switches, and the denominator of Eq. 13, which they share."""
    run = launch(tmp_path / "run", *"--min_variance 0 --errors_per_question 2 --steps 3".split(), *flags.split())
    assert run.code == 0 and not run.errors
    ones, twos = watched.stage(run, 1), watched.stage(run, 2)
    check_advantages(ones), check_advantages(twos)
    for group, sample, _, example in ones:
        assert carried(group, sample, example) == list(range(example.counted)) and example.counted == len(
            sample.token_ids
        )
    negative = 0
    for group, sample, span, example in twos:
        success = group.verdicts[next(i for i, s in enumerate(group.samples) if s is sample)] == "right"
        found = find_correction(sample.token_ids, tokenizer, "prefix" if "prefix" in flags else "sections")
        assert span == (found and found[:2]) and (found is None) <= (not success)
        if "prefix" in flags and span:
            assert span[0] == 0
        where = range(len(sample.token_ids)) if "response" in flags else range(*span) if span else range(0)
        assert example.counted == len(
            where
        )  # a failed one counts too, one without an analysis counts 0 but is one of S
        assert carried(group, sample, example) == (list(where) if success or "--no_success" in flags else [])
        if not success and example.mask.any() and example.advantage:
            negative += 1
            assert example.advantage < 0
    assert (negative > 0) == ("--no_success" in flags)
    # Cut by groups before anything is skipped: 2 optimizer steps of 4 groups, each with all its samples' counts.
    counts = [[e.counted for e in examples[u : u + 32]] for _, examples in watched.rollouts for u in (0, 32)]
    assert watched.counted == counts
    for m, (_, examples) in zip(run.steps, watched.rollouts):
        assert m["loss_tokens"] == sum(int(e.mask.sum()) for e in examples if e.advantage)


def track_weights(monkeypatch):
    """[weights after each step], from the moment its metrics are recorded."""
    history, record = [], train.record

    def recorded(run, *rest):
        history.append({name: value.clone() for name, value in run.model.state_dict().items()})
        return record(run, *rest)

    monkeypatch.setattr(train, "record", recorded)
    return history


@pytest.mark.parametrize("stages", ["1", "2"])
def test_a_stage_that_is_not_trained_leaves_the_weights_alone(stages, launch, tmp_path, monkeypatch):
    history = track_weights(monkeypatch)
    run = launch(tmp_path / "run", "--train_stages", stages, "--min_variance", 0)
    assert {m["stage"] for m in run.steps} == {1, 2} and not run.errors
    for m, before, after in zip(run.steps, history[:-1], history[1:], strict=True):
        assert same_weights(before, after) == (str(m["stage"]) != stages)
        assert ("loss_tokens" in m) == ("update" in m["seconds"]) == (str(m["stage"]) == stages)
        assert m["right"] + m["wrong"] == 64  # sampled and graded all the same


def test_without_a_loss_token_nothing_moves_and_the_visit_warns(launch, tmp_path, monkeypatch):
    """Eq. 12's mask all zero: no optimizer step at all, so Adam's momentum moves nothing either."""
    empty = lambda spans, width, success: train.torch.zeros(len(spans), width, dtype=torch.bool)
    monkeypatch.setattr(train, "analysis_mask", empty)
    history, steps = track_weights(monkeypatch), []
    monkeypatch.setattr(train.MasterAdamW, "step", lambda *_: steps.append(_))
    run = launch(tmp_path / "run", "--train_stages", 2, "--min_variance", 0)
    visited = [m for m in run.steps if m["stage"] == 2]
    assert (
        not steps
        and all(same_weights(weights, history[0]) for weights in history)
        and same_weights(run.weights, START)
    )
    assert visited and all(
        (m["empty_updates"], m["loss_tokens"], m["loss"], m["grad_norm"]) == (2, 0, None, None) for m in visited
    )
    assert any("visit 1 to stage 2 ended without a single loss token" in line for line in run.errors)


def test_momentum_does_not_move_weights_in_an_empty_update(launch, tmp_path, monkeypatch):
    """Both stages trained, stage 2 without a loss token: after real steps Adam has a momentum to be kept still."""
    empty = lambda spans, width, success: train.torch.zeros(len(spans), width, dtype=torch.bool)
    monkeypatch.setattr(train, "analysis_mask", empty)
    history = track_weights(monkeypatch)
    run = launch(tmp_path / "run", "--min_variance", 0, "--steps", 3)
    for m, before, after in zip(run.steps, history[:-1], history[1:], strict=True):
        assert same_weights(before, after) == (m["stage"] == 2)
    assert {m["stage"] for m in run.steps} == {1, 2}


# --------------------------------------------------------------------------------------------- baselines, variants


def test_grpo_has_no_pool_and_no_second_stage(launch, tmp_path, standard):
    run = launch(tmp_path / "run", "--algorithm", "grpo", "--steps", 3)
    assert all(m["stage"] == 1 and m["pool_size"] is None and m["visits"] == 0 for m in run.steps)
    same = [{k: v for k, v in m.items() if k not in ("pool_size", "eval_accuracy")} for m in run.comparable()[1:3]]
    assert same == [
        {k: v for k, v in m.items() if k != "pool_size"} for m in standard.comparable()[1:3]
    ]  # as ScRPO's stage 1


def test_dapo_replaces_equal_groups_and_punishes_length(launch, tmp_path, watched, spy):
    """Dynamic sampling looks at R alone; Eq. 15 is added in Eq. 2 alone; clip range and reduction are DAPO's."""
    drawn, losses = spy(train, "sample_groups"), spy(train, "policy_loss")
    run = launch(tmp_path / "run", "--algorithm", "dapo", "--steps", 2, "--max_new_tokens", 46, "--overlong_cache", 8)
    saved = json.loads((run.folder / "settings.json").read_text())
    assert (saved["clip_high"], saved["reduction"], saved["dynamic_sampling"], saved["overlong_cache"]) == (
        0.28,
        "dapo",
        4,
        8,
    )
    assert all(
        (k["clip_low"], k["clip_high"], k["reduction"], k["beta"]) == (0.2, 0.28, "dapo", 0) for _, k, _ in losses
    )
    rounds, drawn_so_far = iter(drawn), 0
    punished = 0
    for m, (groups, examples) in zip(run.steps, watched.rollouts, strict=True):
        all_groups, kept = [], []
        while len(kept) < 8 and len(all_groups) < 8 * 4:
            (_, _, tasks, *_), _, round_groups = next(rounds)
            assert len(tasks) == len(round_groups) == 8 - len(kept)  # only what is missing is drawn again
            all_groups += round_groups
            kept += [g for g in round_groups if len(set(g.rewards)) > 1]
        assert len(kept) == 8 and [g.problem for g in groups] == [g.problem for g in kept]
        assert m["discarded_groups"] == len(all_groups) - 8
        drawn_so_far += len(all_groups)
        assert (
            m["questions"] == drawn_so_far and m["samples"] == 8 * drawn_so_far
        )  # discarded ones count in every budget
        for b, group in enumerate(groups):
            punishment = [oracle.overlong(len(s.token_ids), 46, 8) for s in group.samples]
            rewards = [r + p for r, p in zip(group.rewards, punishment)]
            assert [e.advantage for e in examples[8 * b : 8 * b + 8]] == pytest.approx(
                oracle.advantages(rewards), abs=1e-4
            )
            punished += sum(p < 0 for p in punishment)
    assert next(rounds, None) is None and punished and sum(m["discarded_groups"] for m in run.steps) > 0
    asked = [problem for (_, _, tasks, *_), _, _ in drawn for problem, *_ in tasks]
    assert len(set(asked)) == len(asked)  # no question twice


def test_dynamic_sampling_is_bounded(launch, tmp_path, monkeypatch, watched):
    monkeypatch.setattr(Grader, "verdicts", lambda self, responses, golds: ["right"] * len(responses))
    run = launch(
        tmp_path / "run", "--algorithm", "dapo", "--steps", 1, "--dynamic_sampling", 3, "--overlong_cache", 0
    )
    (m,) = run.steps
    assert (m["discarded_groups"], m["questions"], m["samples"], m["right"]) == (16, 24, 192, 64)
    assert (m["empty_updates"], m["loss"], m["loss_tokens"]) == (2, None, 0) and same_weights(run.weights, START)


def test_all_seeds_of_a_run_differ(launch, tmp_path, spy):
    """Both stages, DAPO's further rounds, evaluation and its corrections: no two samples share their randomness."""
    calls = spy(TransformersEngine, "generate")
    for algorithm in ("scrpo", "dapo"):
        calls.clear()
        flags = "--steps 3 --min_variance 0 --eval_questions 32 --max_new_tokens 60 --eval_every 0"
        launch(tmp_path / algorithm, "--algorithm", algorithm, *flags.split())
        answers, corrections, *training, _, _ = [
            [seed for row in keywords["seeds"] for seed in row] for _, keywords, _ in calls
        ]
        seeds = answers + corrections + [seed for rollout in training for seed in rollout]
        assert len(set(seeds)) == len(seeds) > 3 * 64
        assert sample_seed(0, 1, 0, 0) in seeds


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_reference_is_loaded_only_for_a_kl_term(beta, launch, tmp_path, spy):
    loaded, losses = spy(AutoModelForCausalLM, "from_pretrained"), spy(train, "policy_loss")
    run = launch(tmp_path / "run", "--beta", beta, "--steps", 3, "--algorithm", "grpo")
    assert len(loaded) == (2 if beta else 1)
    for (logp, _, ref_logp, *_), keywords, _ in losses:
        assert keywords["beta"] == beta and (ref_logp is None) == (beta == 0)
    if beta:
        assert torch.allclose(losses[0][0][0], losses[0][0][2], atol=1e-5)  # at first pi_ref = pi_theta
        assert all(m["kl"] > 1e-6 for m in run.steps)
        assert (
            sum(m["loss_tokens"] for m in run.steps) == run.steps[-1]["tokens"]
        )  # groups of equal rewards have a KL too
    else:
        assert run.steps[0]["kl"] is None and sum(m["loss_tokens"] for m in run.steps) < run.steps[-1]["tokens"]


def test_other_machine_settings_change_no_number(launch, tmp_path):
    """Small micro-batches, small chunks and recomputed activations: the same run."""
    runs = [launch(tmp_path / f"{i}", "--steps", 2, *flags.split()) for i, flags in enumerate(
        ("", "--micro_batch_tokens 700 --logprob_chunk 64", "--gradient_checkpointing"))]  # fmt: skip
    for m, *others in zip(*(run.steps for run in runs)):
        for other in others:
            assert other["loss"] == pytest.approx(m["loss"], abs=1e-5) and other["grad_norm"] == pytest.approx(
                m["grad_norm"], rel=1e-3
            )
            assert other["tokens"] == m["tokens"] and other["loss_tokens"] == m["loss_tokens"]


def test_bf16_keeps_fp32_masters(launch, tmp_path, monkeypatch):
    """At lr 1e-6 most weights in bf16 would never move; their masters do, and resuming brings them back exactly."""
    masters, step = [], train.MasterAdamW.step

    def watched_step(self, rate):
        norm = step(self, rate)
        masters.append({i: m.clone() for i, m in self.masters.items()})
        assert all(torch.equal(self.params[i], m.to(torch.bfloat16)) for i, m in self.masters.items())
        return norm

    monkeypatch.setattr(train.MasterAdamW, "step", watched_step)
    flags = "--precision bf16 --learning_rate 1e-6 --steps 4 --save_every 2 --algorithm grpo".split()
    whole = launch(tmp_path / "whole", *flags)
    moved = [(a != b).float().mean().item() for a, b in zip(masters[0].values(), masters[-1].values())]
    assert (
        whole.code == 0
        and sum(moved) / len(moved) > 0.9
        and all(m.dtype == torch.float32 for m in masters[0].values())
    )
    expected = masters[-1]
    launch(tmp_path / "half", *flags, "--steps", 2)
    half = launch(tmp_path / "half", *flags, "--resume")
    assert all(torch.equal(masters[-1][i], expected[i]) for i in expected) and half.comparable() == whole.comparable()
    assert all(m["logp_gap"] < 0.05 for m in whole.steps) and not whole.errors


def test_schedule():
    def rates(**settings):
        config = train.Config(steps=8, learning_rate=1.0, **settings)
        return [train.learning_rate(config, step) for step in range(1, 9)]

    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[5] == pytest.approx(0.5) and 0 < cosine[7] < 0.1
    assert all(a >= b for a, b in zip(cosine[1:], cosine[2:]))


def test_gradients_are_clipped_by_the_global_norm(launch, tmp_path, monkeypatch):
    seen, adam = [], torch.optim.AdamW.step

    def watched_step(self, *rest):
        seen.append(
            torch.nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"]]).item()
        )
        return adam(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    run = launch(tmp_path / "run", "--steps", 1, "--max_grad_norm", 0.02)
    assert run.steps[0]["grad_norm"] > 0.05 and seen == pytest.approx([0.02, 0.02], rel=1e-3)


def test_stale_weights_raise_the_alarm(launch, tmp_path, monkeypatch):
    """An engine that samples from the weights of the start: seen after the first update, and no earlier."""
    frozen = AutoModelForCausalLM.from_pretrained(TOY).eval()
    monkeypatch.setattr(TransformersEngine, "update_weights", lambda self, model: setattr(self, "model", frozen))
    run = launch(tmp_path / "run", "--steps", 3, "--learning_rate", 5e-3)
    assert [line[:16] for line in run.errors] == ["warning: step 2:", "warning: step 3:"]
    assert "engine and trainer disagree" in run.errors[0] and "stale weights" in run.errors[0]


# ---------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_do_the_same_run_as_one(launch, ranks, tmp_path):
    """Same samples in the same order, losses within 1e-5, for 5 steps; each question once an epoch of stage 1."""
    flags = [
        "--train_data",
        toy_problems(tmp_path, 24),
        *"--steps 5 --samples_per_step -1 --eval_questions 16 --min_variance 0.1".split(),
    ]
    pair = ranks(tmp_path / "two", *flags)
    one, two = launch(tmp_path / "one", *flags), pair.result()
    assert one.code == two.code == 0, two.err
    assert one.samples == two.samples and {m["stage"] for m in one.steps} == {1, 2}
    for a, b in zip(one.metrics, two.metrics, strict=True):
        for name in ("loss", "grad_norm", "entropy", "logp_gap"):
            assert b.get(name) == pytest.approx(a.get(name), abs=1e-5), name
        exact = {"step", "stage", "accuracy", "correction_success", "pool_size", "questions", "samples", "tokens",
                 "loss_tokens", "eval_accuracy", "eval_correction", "right"}  # fmt: skip
        assert all(a.get(name) == b.get(name) for name in exact)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.weights.values(), two.weights.values()))
    asked = [r["problem"] for r in two.samples if r["stage"] == 1]
    assert max(map(asked[: 24 * 8].count, set(asked))) == 8  # 8 samples of a question in the first epoch, never 16
    responses = {(r["step"], r["problem"]): [] for r in two.samples}
    for r in two.samples:
        responses[r["step"], r["problem"]].append(r["response"])
    assert all(len(rows) == 8 for rows in responses.values())
    assert sum(len(set(rows)) for rows in responses.values()) > 2 * len(responses)  # not one sample 8 times


def test_an_epoch_asks_each_question_once_and_may_end_the_run(launch, tmp_path):
    run = launch(
        tmp_path / "run",
        "--train_data",
        toy_problems(tmp_path, 24),
        *"--epochs 2 --algorithm grpo --steps 99 --samples_per_step -1".split(),
    )
    problems = [p.problem for p in load_problems(str(toy_problems(tmp_path, 24)))]
    asked = [r["problem"] for r in run.samples][::8]
    assert (
        len(run.steps) == 6
        and sorted(asked[:24]) == sorted(asked[24:]) == sorted(problems)
        and asked[:24] != asked[24:]
    )
    assert (run.folder / "final").is_dir()


# ---------------------------------------------------------------------------------------------- what does not fit


def test_prompts_that_do_not_fit_are_left_out_named_and_counted(launch, tmp_path):
    rows = [json.loads(line) for line in toy_problems(tmp_path, 10).read_text().splitlines()]
    rows[3]["problem"] = "1+" * 500 + "1"
    data = write(tmp_path / "some.jsonl", rows)
    run = launch(tmp_path / "run", "--train_data", data, "--steps", 2, "--max_context", 300)
    assert run.code == 0 and len(run.errors) == 1
    assert "1 of 10 problems" in run.errors[0] and "'1+1+1+1+" in run.errors[0] and "context of 300" in run.errors[0]
    assert not any("1+1+" in r["problem"] for r in run.samples)
    run = launch(tmp_path / "none", "--train_data", data, "--steps", 1, "--max_context", 170)
    assert run.code == 2 and re.match(
        r"error: --train_data .*no prompt fits the context of 170 tokens.*lower --max_new_tokens", run.errors[-1]
    )


def test_corrections_that_do_not_fit_drop_their_error(launch, tmp_path, tokenizer):
    """A context that holds every solution prompt and no correction prompt."""
    longest = max(len(render(tokenizer, solution_prompt(p.problem))) for p in load_problems(str(TOY / "train.jsonl")))
    run = launch(
        tmp_path / "run", "--steps", 4, "--max_context", longest + 60, "--max_new_tokens", 60, "--min_variance", 0
    )
    visits = [m for m in run.steps if m["stage"] == 2]
    assert visits and all(
        m["correction_success"] is None and m["well_formed"] is None and m["loss_tokens"] == 0 for m in visits
    )
    before = run.steps[run.steps.index(visits[0]) - 1]
    assert (
        visits[0]["pool_size"] == 0
        and visits[0]["dropped_errors"] == before["pool_size"]
        and visits[0]["samples"] == before["samples"]
    )
    assert run.out.count("dropped an error: its correction prompt has") == run.steps[-1]["dropped_errors"] > 0
    assert any("without a single loss token" in line for line in run.errors)


@pytest.mark.skipif(not BENCHMARK.exists(), reason="the benchmark files are not beside this repository")
def test_real_problems_run(launch, tmp_path):
    run = launch(tmp_path / "run", "--train_data", BENCHMARK, "--steps", 2, "--max_new_tokens", 64)
    assert (
        run.code == 0
        and [m["samples"] for m in run.steps] == [64, 128]
        and not any("error" in line for line in run.errors)
    )
    assert all(solution_prompt(r["problem"]) in r["prompt"] for r in run.samples)


# ------------------------------------------------------------------------------------------------- settings, input


def test_settings_file_first_and_flags_win(launch, tmp_path):
    settings = tmp_path / "my.yaml"
    lines = (
        "questions_per_step: 4",
        "pool_trigger: 5",
        "steps: 1",
        "eval_questions: 0",
        "success_conditioned: false",
        "seed: 7",
    )
    settings.write_text("\n".join(lines))
    run = launch(tmp_path / "run", "--seed", 8, settings=[settings], tiny=False)
    saved = json.loads((run.folder / "settings.json").read_text())
    assert run.code == 0 and run.steps[-1]["samples"] == 32
    assert (saved["questions_per_step"], saved["pool_trigger"], saved["success_conditioned"], saved["seed"]) == (
        4,
        5,
        False,
        8,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_settings_are_valid(path):
    config = train.parse([str(path)])
    assert config.steps > 0 and path.stem != "toy" or config.model == str(TOY)
    dapo = train.parse([str(path), "--algorithm", "dapo"])  # is DAPO there too
    assert (config.clip_high, config.reduction, dapo.clip_high, dapo.reduction) == (0.2, "grpo", 0.28, "dapo")


def test_the_toys_settings_are_the_defaults():
    assert train.parse([str(ROOT / "configs" / "toy.yaml")]) == train.parse([])


def test_without_output_dir_runs_are_numbered(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    for _ in range(2):
        assert launch(None, "--steps", 1, "--algorithm", "grpo").code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["001", "002"]


def test_help_teaches_every_flag_and_names_trls(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    for name, field in train.Config.__dataclass_fields__.items():
        assert f"--{name}" in text and len(field.metadata["help"]) > 15
    for name, trl in {
        "steps": "max_steps", "group_size": "num_generations", "max_new_tokens": "max_completion_length",
        "temperature": "temperature", "updates_per_rollout": "steps_per_generation", "scale": "scale_rewards",
        "clip_low": "epsilon", "clip_high": "epsilon_high", "beta": "beta", "reduction": "loss_type",
        "importance_cap": "vllm_importance_sampling_cap", "learning_rate": "learning_rate", "rollout": "use_vllm",
    }.items():  # fmt: skip
        assert f"(TRL: {trl})" in train.Config.__dataclass_fields__[name].metadata["help"]


GOOD = '{"problem": "Add 1+1 digit by digit.", "answer": "2"}\n'
BAD_INPUT = {  # flags -> what the one line must name, and what it must tell to do
    "no such model": ("--model {folder}/none", "--model {folder}/none", "name a folder or a hub id"),
    "no weights in the folder": ("--model {folder}", "--model {folder}", "name a folder"),
    "damaged weights": ("--model {damaged}", "--model {damaged}", "name a folder"),
    "no such data": ("--train_data {folder}/none.jsonl", "none.jsonl", "give a JSONL file"),
    "no such held-out data": ("--eval_data {folder}/none.jsonl", "none.jsonl", "give a JSONL file"),
    "empty data": ("--train_data {empty}", "{empty}", "with problem and answer"),
    "not JSONL": ("--train_data {text}", "{text}, line 2", "one object a line"),
    "no problem": ("--train_data {noproblem}", "{noproblem}, line 3", "'problem'"),
    "no answer": ("--train_data {noanswer}", "{noanswer}, line 2", "'answer'"),
    "held-out without answer": ("--eval_data {noanswer}", "{noanswer}, line 2", "'answer'"),
    "N < B": ("--pool_trigger 7", "--pool_trigger 7", "raise the one or lower the other"),
    "tau": ("--min_variance 0.3", "--min_variance 0.3", "choose 0 to 0.25"),
    "tau of an odd G": ("--group_size 3 --min_variance 0.24", "--min_variance 0.24", "--group_size 3"),
    "tau below 0": ("--min_variance -0.1", "--min_variance -0.1", "at least 0"),
    "G": ("--group_size 1", "--group_size 1", "at least 2"),
    "stage 2 of grpo": ("--algorithm grpo --train_stages 2", "--train_stages 2", "leave one of them out"),
    "updates": ("--updates_per_rollout 3", "--updates_per_rollout 3", "does not divide"),
    "no updates": ("--updates_per_rollout 0", "--updates_per_rollout 0", "at least 1"),
    "no questions": ("--questions_per_step 0", "--questions_per_step 0", "at least 1"),
    "temperature": ("--temperature 0", "--temperature 0", "must be above 0"),
    "clip": ("--clip_low 1.5", "--clip_low 1.5", "below 1"),
    "overlong": ("--overlong_cache 161", "--overlong_cache 161", "exceeds"),
    "negative": ("--beta -1", "--beta -1", "at least 0"),
    "negative seed": ("--seed -1", "--seed -1", "at least 0"),
    "no number": ("--steps many", "--steps", "--help"),
    "nan": ("--learning_rate nan", "--learning_rate nan", "at least 0"),
    "choice": ("--algorithm ppo", "--algorithm", "scrpo"),
    "unknown flag": ("--learning_rte 1", "--learning_rte", "--help"),
    "none fits": ("--max_context 20", "--train_data", "raise the context"),
    "wandb": ("--wandb", "--wandb", "leave the flag out"),
    "engine": ("--rollout vllm", "--rollout vllm", "requirements-vllm.txt"),
    "no such settings": ("none.yaml", "none.yaml", "cannot be read"),
    "settings' name": ("{settings}", "{settings}", "train.py --help"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_costs_nothing(case, launch, tmp_path):
    flags, named, told = BAD_INPUT[case]
    if case in ("wandb", "engine") and find_spec({"wandb": "wandb", "engine": "vllm"}[case]):
        pytest.skip("it is installed here")
    texts = {"empty.jsonl": "\n", "text.jsonl": GOOD + "hello\n", "noproblem.jsonl": GOOD * 2 + '{"answer": "2"}\n',
             "noanswer.jsonl": GOOD + '{"problem": "1+1"}\n', "settings.yaml": "learning_rte: 1\n"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (damaged / name).write_bytes((TOY / name).read_bytes()[: 5000 if name == "model.safetensors" else None])
    names = {path.stem: path for path in tmp_path.iterdir()}
    flags, named = flags.format(**names).split(), named.format(**names)
    settings = [flags.pop(0)] if flags[0].endswith(".yaml") else []
    run = launch(tmp_path / "out", *flags, settings=settings)
    assert run.code == 2 and "Traceback" not in run.err, run.err
    said = run.err.strip().splitlines()
    assert len(said) == 1, said
    assert said[-1].startswith("error: ") and named in said[-1] and told in said[-1], said
    assert not [path for path in (tmp_path / "out").glob("[!.]*") if path.name != "settings.json"]
    if (tmp_path / "out").exists():  # then it is not in the way of the next start
        assert launch(tmp_path / "out", "--steps", 0).code == 0


def test_the_baselines_have_no_pool_that_could_be_too_small():
    assert train.parse("--algorithm grpo --questions_per_step 64".split()).questions_per_step == 64


def test_resume_must_be_told_where(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    run = launch(None, "--resume")
    assert run.code == 2 and len(run.errors) == 1 and "--resume goes on in --output_dir" in run.err
    assert not (tmp_path / "runs").exists()


def test_numbered_folders_stand_beside_others(launch, tmp_path, monkeypatch):
    """Other names may begin with a digit; 1000 follows 999; what is there already, by another start too, is not taken."""
    monkeypatch.setattr(train, "HERE", tmp_path)
    for name in ("7b", "1.5b", "003", "1000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    config = train.parse([])
    assert [Path(train.find_output(config, False, "")).name for _ in range(2)] == ["1001", "1002"]
    run = launch(None, "--algorithm", "grpo", "--steps", 0)
    assert run.code == 0 and "runs/1003" in run.out


def test_a_run_that_is_being_written_is_left_alone(launch, tmp_path):
    assert launch(tmp_path / "run", "--steps", 1, "--algorithm", "grpo").code == 0
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = launch(tmp_path / "run", "--steps", 1, "--algorithm", "grpo", "--resume")
        assert run.code == 2 and len(run.errors) == 1 and "another run is writing there" in run.err
    assert launch(tmp_path / "run", "--steps", 1, "--algorithm", "grpo", "--resume").code == 0


def test_a_broken_library_is_not_blamed_on_a_flag(launch, tmp_path, monkeypatch):
    def broken(source):
        raise ImportError("libfoo.so is missing")

    monkeypatch.setattr(train, "load_problems", broken)
    run = launch(tmp_path / "run")
    assert run.code == 2 and run.errors == ["error: libfoo.so is missing"]


def test_words_about_flags_that_hardly_fit(launch, tmp_path):
    small = "--steps 0 --eval_questions 8".split()
    run = launch(tmp_path / "dapo", *small, "--algorithm", "dapo", "--beta", 0.1)
    assert run.code == 0 and len(run.errors) == 1 and "DAPO has beta 0" in run.errors[0]
    shutil.copytree(TOY, tmp_path / "mine")
    run = launch(tmp_path / "own", *small, "--model", tmp_path / "mine", "--eval_data", TOY / "test.jsonl")
    assert run.code == 0 and len(run.errors) == 1 and "--eval_data is still the toy's" in run.errors[0]


def test_an_output_folder_with_a_run_is_not_touched(launch, tmp_path):
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert launch(tmp_path / "run", "--steps", 1).code == 0
    before = contents()
    run = launch(tmp_path / "run", "--steps", 1)
    assert run.code == 2 and len(run.errors) == 1 and "already holds a run; add --resume" in run.err
    run = launch(tmp_path / "run", "--steps", 1, "--resume", "--learning_rate", 1e-3)
    assert run.code == 2 and "another learning_rate (0.0005" in run.err and "now 0.001" in run.err
    assert contents() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("mine\n")
    run = launch(tmp_path / "other", "--steps", 1)
    assert run.code == 2 and "holds metrics.jsonl but no settings.json" in run.err
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    "flags,named", [("--pool_trigger 7", "--pool_trigger 7"), ("--train_data none.jsonl", "none.jsonl")]
)
def test_bad_input_ends_every_rank_with_2(flags, named, ranks, tmp_path):
    job = ranks(tmp_path / "run", *flags.split())
    run = job.result()
    assert job.codes == [2, 2] and len(run.errors) == 1 and run.err.startswith("error: ") and named in run.err
    assert run.err.count("\n") == 1 and not job.said(1, "err") and not job.said(1) and not (tmp_path / "run").exists()


def test_bad_input_under_torchrun_is_said_once(torchrun, tmp_path):
    run = torchrun(tmp_path / "run", "--pool_trigger", 7).result()
    assert run.code == 1 and len(run.errors) == 1 and "--pool_trigger 7" in run.errors[0]  # torchrun turns 2 into 1
    assert "exitcode  : 2" in run.err and not (tmp_path / "run").exists()
