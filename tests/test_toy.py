"""The embedded toy: an ordinary checkpoint, right problems, a policy imperfect on purpose."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from error_pool import correction_prompt
from reward import final_answer, find_correction
from rollout import load_problems, render, solution_prompt
from toy import make_toy

TOY = Path(make_toy.__file__).parent
SOLUTION = r"(Step [123]: \d\+\d\+\d=\d\d\n){3}\\boxed\{\d{1,4}\}"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(str(TOY)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TOY))


@pytest.fixture(scope="module")
def solutions(model, tokenizer):
    """[(problem, text, finished)] of the first 200 test problems, one sample each."""
    problems = load_problems(str(TOY / "test.jsonl"))[:200]
    texts, finished, _ = generate(model, tokenizer, [solution_prompt(p.problem) for p in problems], 80)
    return list(zip(problems, texts, finished))


def generate(model, tokenizer, user_turns, max_new_tokens):
    """(texts, finished, ids) by plain generate, with nothing but the settings saved beside the model."""
    torch.manual_seed(0)
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": turn}] for turn in user_turns], add_generation_prompt=True,
        padding=True, tokenizer_kwargs={"padding_side": "left"}, return_tensors="pt", return_dict=True,
    )
    ids = model.generate(**batch, max_new_tokens=max_new_tokens)[:, batch["input_ids"].shape[1]:]
    finished = (ids == tokenizer.eos_token_id).any(1).tolist()
    return tokenizer.batch_decode(ids, skip_special_tokens=True), finished, ids


# ------------------------------------------------------------------------------------------------------------
# The checkpoint
# ------------------------------------------------------------------------------------------------------------
def test_the_folder_is_an_ordinary_small_checkpoint(model, tokenizer):
    assert model.config.model_type == "qwen3" and model.config.head_dim == 32
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 350_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)  # no row that no token has
    saved = model.generation_config
    assert saved.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert saved.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (saved.do_sample, saved.temperature, saved.top_k, saved.top_p) == (True, 1.0, 0, 1.0)
    files = [path for path in TOY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


@pytest.mark.parametrize("text", [
    "Step 1: 4+4+0=08\nStep 2: 6+9+0=15\nStep 3: 9+4+1=14\n\\boxed{1458}",
    "  two  spaces\n\n\nthree newlines\t\\boxed{\\frac{1}{2}} ", "Analysis:\n not 12", "∑ 中 🙂", "", "\r\n",
])
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_survives_the_tokenizer(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def survives(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    survives()


def test_digits_newlines_and_headers_are_tokens_of_their_own(tokenizer):
    tokens = [tokenizer.decode(i) for i in range(len(tokenizer))]
    assert [token for token in tokens if re.search(r"\d", token)] == list("0123456789")
    assert [token for token in tokens if "\n" in token] == ["\n", "\n\n"]
    pieces = [tokenizer.decode(i) for i in tokenizer.encode("Analysis:\nStep 1\nCorrected Solution:\nStep 1")]
    assert pieces == ["Analysis:", "\n", "Step ", "1", "\n", "Corrected Solution:", "\n", "Step ", "1"]


def test_the_chat_template_closes_assistant_turns_only(tokenizer):
    turns = [{"role": r, "content": content} for r, content in zip(["user", "assistant", "user"], "abc")]
    text = "<|user|>a<|assistant|>b<|end|><|user|>c"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened == text + "<|assistant|>"


def test_prompts_are_short(tokenizer):
    problem = "Add 964+494 digit by digit."
    wrong = "Step 1: 4+4+0=08\nStep 2: 6+9+0=05\nStep 3: 9+4+0=13\n\\boxed{1358}"
    assert len(render(tokenizer, solution_prompt(problem))) == 13
    assert len(tokenizer.encode(wrong)) == 42
    assert len(render(tokenizer, correction_prompt(problem, wrong))) == 66
    bytes_only = render(tokenizer, solution_prompt("Find $x$."))
    assert len(bytes_only) == len("Find $x$.") + 4  # + <|user|>, a newline, the instruction, <|assistant|>


# ------------------------------------------------------------------------------------------------------------
# The problems
# ------------------------------------------------------------------------------------------------------------
def test_problems_are_right_distinct_and_split():
    train, test = (load_problems(str(TOY / f"{name}.jsonl")) for name in ("train", "test"))
    assert (len(train), len(test)) == (6000, 1000)
    assert len({p.problem for p in train + test}) == 7000
    for p in train + test:
        x, y = re.fullmatch(r"Add ([1-9]\d\d)\+([1-9]\d\d) digit by digit\.", p.problem).groups()
        assert (p.answer, p.source) == (str(int(x) + int(y)), "toy")


# ------------------------------------------------------------------------------------------------------------
# The policy: wrong more often than right, in good form
# ------------------------------------------------------------------------------------------------------------
def test_the_policy_solves_a_good_third_and_in_form(solutions):
    accuracy = sum(final_answer(text) == p.answer for p, text, _ in solutions) / len(solutions)
    assert 0.30 < accuracy < 0.55
    in_form = [done and re.fullmatch(SOLUTION, text) is not None for _, text, done in solutions]
    assert sum(in_form) >= 0.97 * len(solutions)


def test_the_policy_mends_about_half_of_its_errors(model, tokenizer, solutions):
    errors = [(p, text) for p, text, done in solutions if done and final_answer(text) != p.answer]
    user_turns = [correction_prompt(p.problem, text) for p, text in errors]
    texts, finished, ids = generate(model, tokenizer, user_turns, 120)
    analysis = r"Analysis:\n(Step [123]: \d\+\d\+\d=\d\d( not \d\d)?\n){3}"
    form = re.compile(analysis + r"Corrected Solution:\n" + SOLUTION)
    in_form = [done and form.fullmatch(text) is not None for text, done in zip(texts, finished)]
    assert sum(in_form) >= 0.95 * len(errors)
    found = [find_correction(row.tolist(), tokenizer) for row in ids]
    mended = [f is not None and final_answer(f[-1]) == p.answer for f, (p, _) in zip(found, errors)]
    assert 0.35 < sum(mended) / len(errors) < 0.65


# ------------------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------------------
def test_a_second_look_brings_carries_up_to_date():
    rng = random.Random(0)
    sure = {(a, b, c): [float(v == a + b + c) for v in range(20)]
            for a in range(10) for b in range(10) for c in (0, 1)}
    wrong = make_toy.walk(964, 494, lambda place, fact: 18 if place == 0 else sum(fact))
    assert wrong == [(4, 4, 0, 18), (6, 9, 1, 16), (9, 4, 1, 14)]
    assert make_toy.correct(964, 494, wrong, sure, rng) == [(4, 4, 0, 8), (6, 9, 0, 15), (9, 4, 1, 14)]


def test_an_excluded_value_is_never_drawn():
    rng = random.Random(0)
    teacher = make_toy.make_teacher(rng)
    assert {make_toy.ask(teacher, (7, 5, 1), rng) for _ in range(99)} >= {3, 13}
    assert 3 not in {make_toy.ask(teacher, (7, 5, 1), rng, excluded=3) for _ in range(99)}


def test_the_teacher_is_as_imperfect_as_the_docstring_says():
    rng = random.Random(0)
    teacher = make_toy.make_teacher(rng)
    answers = [final_answer(make_toy.demonstration(964, 494, "solution", teacher, rng)[1]) for _ in range(50)]
    assert len(set(answers)) > 1
    pairs = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(2000)]
    # Corrections come out better here than of its own errors, where the hard problems are more frequent.
    for kind, low, high in (("solution", 0.35, 0.45), ("correction", 0.6, 0.7)):
        texts = [make_toy.demonstration(x, y, kind, teacher, rng)[1] for x, y in pairs]
        right = [final_answer(text) == str(x + y) for text, (x, y) in zip(texts, pairs)]
        assert low < sum(right) / len(right) < high


def test_labels_cover_the_response_and_its_end(tokenizer):
    ids, labels = make_toy.batch_of([("ab", "12"), ("a", "1")], tokenizer)
    assert ids.shape == labels.shape == (2, 7)
    assert [tokenizer.decode(row[row != -100]) for row in labels] == ["12<|end|>", "1<|end|>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert tokenizer.decode(ids[1]) == "<|user|>a<|assistant|>1<|end|><|pad|><|pad|>"


def test_training_is_a_function_of_the_seed(tokenizer):
    def trained(seed):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        policy = make_toy.make_policy(tokenizer)
        make_toy.train(policy, tokenizer, make_toy.make_teacher(rng), set(), 3, 2, rng, batch_size=8)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    first = trained(0)
    assert torch.equal(first, trained(0)) and not torch.equal(first, trained(1))


def test_the_script_runs_from_start_to_end(tmp_path):
    command = [sys.executable, str(TOY / "make_toy.py"), "--output", str(tmp_path), "--steps", "3"]
    run = subprocess.run([*command, "--measure", "20"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^accuracy +\d\.\d{3} of 20, finished \d\.\d{3}$", run.stdout, re.MULTILINE)
    for name in ("train.jsonl", "test.jsonl", "tokenizer.json", "config.json"):  # as in toy/
        assert (tmp_path / name).read_text() == (TOY / name).read_text()
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert template == make_toy.CHAT_TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path)).num_parameters() > 250_000


def test_longer_sums_are_made_and_solved_alike(tmp_path):
    pairs = make_toy.write_problems(tmp_path, random.Random(0), digits=4, n_train=30, n_test=20)
    problems = load_problems(str(tmp_path / "test.jsonl"))
    assert len(load_problems(str(tmp_path / "train.jsonl"))) == 30 and len({p.problem for p in problems}) == 20
    for (x, y), problem in zip(pairs, problems):
        assert 1000 <= x < 10000 and 1000 <= y < 10000 and problem.problem == f"Add {x}+{y} digit by digit."
        steps = make_toy.walk(x, y, lambda place, fact: sum(fact))
        assert len(steps) == 4 and final_answer(make_toy.solution_text(steps)) == problem.answer == str(x + y)
