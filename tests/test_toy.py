"""The embedded toy: right problems, an ordinary checkpoint, a policy imperfect on purpose."""

import json
import random
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import TOY
from error_pool import correction_prompt
from reward import final_answer, find_correction
from rollout import load_problems, solution_prompt
from toy import make_toy

TOKENIZER = AutoTokenizer.from_pretrained(TOY)
SOLUTION = r"(Step [123]: \d\+\d\+\d=\d\d\n){3}\\boxed\{\d{1,4}\}"
ANALYSIS = r"Analysis:\n(Step [123]: \d\+\d\+\d=\d\d( not \d\d)?\n){3}"


@pytest.mark.parametrize("digits, seed", [(3, None), (4, 1)])
def test_problems_are_right_and_no_training_problem_is_a_test_problem(tmp_path, digits, seed):
    if seed is not None:  # the study's longer sums
        make_toy.write_problems(tmp_path, random.Random(seed), digits)
    folder = TOY if seed is None else tmp_path
    train, test = (load_problems(str(folder / f"{name}.jsonl")) for name in ("train", "test"))
    assert (len(train), len(test)) == (6000, 1000)
    assert len({p.problem for p in train + test}) == 7000
    number = rf"([1-9]\d{{{digits - 1}}})"
    for p in train + test:
        x, y = re.fullmatch(rf"Add {number}\+{number} digit by digit\.", p.problem).groups()
        steps = make_toy.walk(int(x), int(y), lambda place, fact: sum(fact))
        assert final_answer(make_toy.solution_text(steps)) == p.answer == str(int(x) + int(y))


def test_the_script_writes_these_files_and_a_seed_the_same_weights(tmp_path, monkeypatch, capsys):
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        flags = f"--steps 2 --measure 20 --output {tmp_path / folder} --seed {seed}"
        monkeypatch.setattr(sys, "argv", ["make_toy.py", *flags.split()])
        make_toy.main()
    measured = r"^accuracy +\d\.\d{3} of 20, finished \d\.\d{3}$"
    assert len(re.findall(measured, capsys.readouterr().out, re.M)) == 3
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc"]
    assert weights[0] == weights[1] != weights[2]
    for name in ("train.jsonl", "test.jsonl", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_text() == (TOY / name).read_text()
    written = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == make_toy.CHAT_TEMPLATE


JUDGED = {
    "recompute": r"\d\+\d\+\d=\d\d( not \d\d)?",
    "quote": r"\d\+\d\+\d=\d\d (right|wrong)",
    "verdict": "(right|wrong)",
}


@pytest.mark.parametrize("analysis", make_toy.ANALYSES)
def test_each_kind_of_analysis_says_what_it_should_and_can_be_read(analysis):
    rng = random.Random(0)
    teacher = make_toy.make_teacher(rng)
    tokenizer = make_toy.make_tokenizer(analysis)
    truths = []
    for _ in range(300):
        x, y = rng.randrange(100, 1000), rng.randrange(100, 1000)
        turn, text = make_toy.demonstration(x, y, "correction", teacher, rng, analysis)
        start, end, solution = find_correction(tokenizer.encode(text), tokenizer)
        said = tokenizer.decode(tokenizer.encode(text)[start:end])
        assert re.fullmatch(rf"\n?(Step \d: {JUDGED[analysis]}\n){{3}}", said)
        assert re.fullmatch(SOLUTION, solution.strip())
        wrong = turn.partition("Wrong solution:\n")[2].partition("\n\n")[0]
        steps, truth = make_toy.read_steps(f"Add {x}+{y}", wrong)
        if analysis == "quote":  # the wrong solution's own lines, whatever is said of them
            assert re.sub(" (right|wrong)\n", "\n", said).strip() == wrong.partition("\n\\boxed")[0]
        judged = make_toy.read_judgements(text, steps, truth)
        truths += [is_wrong == says for is_wrong, says in judged]
    assert 0.6 < sum(truths) / len(truths) < 0.95  # an imperfect teacher, but no coin


def test_any_text_survives_the_tokenizer_and_digits_stand_alone():
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def survives(text):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text

    survives()
    tokens = [TOKENIZER.decode(i) for i in range(len(TOKENIZER))]
    assert [token for token in tokens if re.search(r"\d", token)] == list("0123456789")


def generate(model, user_turns, max_new_tokens):
    """(texts, finished, ids) by generate, with nothing but the settings saved beside the model."""
    torch.manual_seed(0)
    turns = [[{"role": "user", "content": turn}] for turn in user_turns]
    batch = TOKENIZER.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    ids = model.generate(**batch, max_new_tokens=max_new_tokens)
    ids = ids[:, batch["input_ids"].shape[1] :]
    finished = (ids == TOKENIZER.eos_token_id).any(1).tolist()
    return TOKENIZER.batch_decode(ids, skip_special_tokens=True), finished, ids


def test_the_policy_solves_a_good_third_and_mends_half_of_its_errors_in_form():
    model = AutoModelForCausalLM.from_pretrained(TOY).eval()
    assert 250_000 < model.num_parameters() < 350_000
    problems = load_problems(str(TOY / "test.jsonl"))[:200]
    texts, finished, _ = generate(model, [solution_prompt(p.problem) for p in problems], 80)
    in_form = [done and bool(re.fullmatch(SOLUTION, t)) for t, done in zip(texts, finished)]
    assert sum(in_form) >= 0.97 * 200
    wrong = [(p, t) for p, t in zip(problems, texts) if final_answer(t) != p.answer]
    assert 0.30 < 1 - len(wrong) / 200 < 0.55
    asked = [correction_prompt(p.problem, text) for p, text in wrong]
    texts, finished, ids = generate(model, asked, 120)
    form = re.compile(rf"{ANALYSIS}Corrected Solution:\n{SOLUTION}")
    in_form = [done and bool(form.fullmatch(t)) for t, done in zip(texts, finished)]
    assert sum(in_form) >= 0.95 * len(wrong)
    found = [find_correction(row.tolist(), TOKENIZER) for row in ids]
    mended = [f is not None and final_answer(f[-1]) == p.answer for f, (p, _) in zip(found, wrong)]
    assert 0.35 < sum(mended) / len(wrong) < 0.65
