"""Makes the embedded toy again: a tiny language model, its tokenizer, its problems. Minutes on one core.

    python toy/make_toy.py                                 # writes over toy/ itself
    python toy/make_toy.py --output /tmp/toy --seed 1      # another policy, with other misconceptions
    python toy/make_toy.py --output /tmp/toy --digits 4    # longer sums, of which it gets fewer right
    python toy/make_toy.py --output /tmp/toy --analysis quote   # analyses that judge and do not compute

The toy exists so that both stages of ScRPO can be watched at work without a GPU. It needs a policy whose
errors have structure, which puts about half of them right when asked to, and which learns within a few dozen
steps.

1. Task. Addition of two 3-digit numbers (--digits), written digit by digit from the right. A step adds two digits and
   the carry; its value has two digits, the first of which is the next step's carry. That makes 200 facts in
   all.

       Add 964+494 digit by digit.    ->    Step 1: 4+4+0=08
                                            Step 2: 6+9+0=15
                                            Step 3: 9+4+1=14
                                            \\boxed{1458}

2. Noisy teacher. It knows 110 of the facts well. The other 90 are shaky: right with a probability drawn from
   (0.2, 0.7), and otherwise mostly one fixed misconception. A demonstration draws every step's value from the
   teacher and carries on with what it drew. So whoever imitates it to perfection knows the format and the
   way, and is still wrong on more than half of the problems. Not a policy whose training was cut short: that
   one errs at random, and in its format too.

3. Corrections. The prompt is the question with a wrong solution, the response has ScRPO's two sections:

       Analysis:
       Step 1: 4+4+0=08
       Step 2: 6+9+0=15 not 16
       Step 3: 9+4+1=14
       Corrected Solution:
       Step 1: 4+4+0=08
       ...
       \\boxed{1458}

   The analysis takes every step again, with carries brought up to date. A value that is right there is kept
   with probability 0.85; else it is drawn from the teacher again, a wrong one being excluded with probability
   0.75. So corrections are as imperfect as solutions. The corrected solution copies the analysis: hence it is
   right iff the analysis is, and a gradient on the analysis alone (Eq. 12) has something to teach. Not an
   analysis that only names the first wrong step: a policy taught so never learned to find it.

   --analysis decides what an analysis says, and so what practising it can transfer to solving. quote and verdict
   judge each line by itself, by the same second look at its digits and its carry; the corrected solution has
   the value that was found, unless the carry is another one by now.

       recompute (the default)      quote                      verdict
       Step 1: 4+4+0=08             Step 1: 4+4+0=08 right     Step 1: right
       Step 2: 6+9+0=15 not 16      Step 2: 6+9+0=16 wrong     Step 2: wrong
       Step 3: 9+4+1=14             Step 3: 9+4+1=14 right     Step 3: right

   recompute holds the solution's own lines, so a better analysis is a better solution. quote holds the wrong
   solution's lines with a judgement on each: to judge a line one must know its value, but no token computes
   one, and a wrong line stands there as it was. verdict holds judgements only: no digit of a value at all.
   In 600 steps all three learn to correct half of the errors, but not all to judge: quote's judgements are a
   little better than chance, verdict's are not (bench/RESULTS.md). More --steps may change that.

4. Policy. 0.3 million parameters in Qwen3's architecture, which every engine knows, trained from scratch on
   fresh demonstrations, solutions and corrections in separate batches, with the loss on response tokens. Muon
   on the matrices and AdamW on the rest: AdamW alone takes two to three times as long. It never sees a test
   problem.

5. Tokenizer. All 256 bytes, so that any text can be encoded, and one token for each phrase of the task, so
   that prompts are short: sampling is most of an RL step. Digits and newlines are always tokens of their own.

The files here: seed 0, OMP_NUM_THREADS=1. One machine, seed and number of threads give the same bytes again.
Everything about the toy is [ours]; the paper has nothing like it.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from error_pool import correction_prompt  # noqa: E402  the prompts of training itself
from reward import final_answer, find_correction  # noqa: E402
from rollout import render, solution_prompt  # noqa: E402

CONTEXT = 2048  # tokens; the toy uses under 200, and most problems of a real benchmark fit too, byte by byte
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ------------------------------------------------------------------------------------------------------------
# The task and the noisy teacher: a fact is (digit, digit, carry), a step is (digit, digit, carry, value)
# ------------------------------------------------------------------------------------------------------------
def make_teacher(rng):
    """{fact: the weights with which it answers 0 to 19}

    >>> teacher = make_teacher(random.Random(0))
    >>> len(teacher), sum(weights[sum(fact)] == 0.98 for fact, weights in teacher.items())
    (200, 110)
    >>> {value: round(weight, 2) for value, weight in enumerate(teacher[7, 5, 1]) if weight > 0.01}
    {3: 0.32, 13: 0.63}
    """
    facts = [(a, b, carry) for a in range(10) for b in range(10) for carry in range(2)]
    shaky = set(rng.sample(facts, 90))
    teacher = {}
    for fact in facts:
        right = sum(fact)
        p_right = rng.uniform(0.2, 0.7) if fact in shaky else 0.98
        misconception = rng.choice([v for v in (right - 10, right - 1, right + 1, right + 10) if 0 <= v < 20])
        teacher[fact] = [0.15 * (1 - p_right) / 18] * 20  # what is left: any other value
        teacher[fact][misconception] = 0.85 * (1 - p_right)
        teacher[fact][right] = p_right
    return teacher


def ask(teacher, fact, rng, excluded=None):
    """One value drawn from the teacher, never `excluded`."""
    weights = [0 if value == excluded else weight for value, weight in enumerate(teacher[fact])]
    return rng.choices(range(20), weights)[0]


def walk(x, y, draw):
    """The steps of x + y from the right, one a digit; draw(place, fact) gives their values, and so the carries.

    >>> walk(964, 494, lambda place, fact: sum(fact))
    [(4, 4, 0, 8), (6, 9, 0, 15), (9, 4, 1, 14)]
    """
    steps, carry = [], 0
    for place in range(len(str(x))):
        fact = (x // 10**place % 10, y // 10**place % 10, carry)
        value = draw(place, fact)
        steps.append((*fact, value))
        carry = value // 10
    return steps


def solve(x, y, teacher, rng):
    """The steps of the teacher's solution, right or wrong."""
    return walk(x, y, lambda place, fact: ask(teacher, fact, rng))


def look_again(fact, old, teacher, rng):
    """The teacher's second look at one value; see 3 above."""
    if old == sum(fact):
        return old if rng.random() < 0.85 else ask(teacher, fact, rng)
    return ask(teacher, fact, rng, excluded=old if rng.random() < 0.75 else None)


def correct(x, y, wrong, teacher, rng, judged=None):
    """The steps of the teacher's second look at the steps `wrong`, carries brought up to date.

    judged: the values that it found when it looked at each line of `wrong` by itself, if it did.
    """
    def second_look(place, fact):
        if judged and fact == wrong[place][:3]:
            return judged[place]
        return look_again(fact, wrong[place][-1], teacher, rng)

    return walk(x, y, second_look)


# ------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------
def problem_text(x, y):
    """
    >>> problem_text(964, 494)
    'Add 964+494 digit by digit.'
    """
    return f"Add {x}+{y} digit by digit."


def step_text(n, step):
    a, b, carry, value = step
    return f"Step {n}: {a}+{b}+{carry}={value:02d}"


def solution_text(steps):
    r"""
    >>> print(solution_text([(4, 4, 0, 8), (6, 9, 0, 15), (9, 4, 1, 14)]))
    Step 1: 4+4+0=08
    Step 2: 6+9+0=15
    Step 3: 9+4+1=14
    \boxed{1458}
    """
    lines = [step_text(n, step) for n, step in enumerate(steps, 1)]
    *lower, highest = (value for *_, value in steps)  # of the highest step both digits count
    total = sum(value % 10 * 10**place for place, value in enumerate(lower)) + highest * 10 ** len(lower)
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


ANALYSES = ("recompute", "quote", "verdict")


def analysis_line(n, new, old, judged, analysis):
    """What an analysis says about step n: `new` is the corrected step, `old` the wrong solution's, and `judged`
    what that line should say by itself.

    >>> step = 2, (6, 9, 0, 15), (6, 9, 0, 16), 15
    >>> [analysis_line(*step, analysis) for analysis in ANALYSES]
    ['Step 2: 6+9+0=15 not 16', 'Step 2: 6+9+0=16 wrong', 'Step 2: wrong']
    """
    if analysis == "recompute":
        return step_text(n, new) if new[-1] == old[-1] else f"{step_text(n, new)} not {old[-1]:02d}"
    judgement = "right" if judged == old[-1] else "wrong"
    return f"{step_text(n, old)} {judgement}" if analysis == "quote" else f"Step {n}: {judgement}"


def correction_text(steps, wrong, analysis="recompute", judged=None):
    r"""The steps `wrong` analysed, then corrected. Without `judged` each line is judged rightly.

    >>> wrong = [(4, 4, 0, 18), (6, 9, 1, 16), (9, 4, 1, 14)]
    >>> print(correction_text(walk(964, 494, lambda place, fact: sum(fact)), wrong))
    Analysis:
    Step 1: 4+4+0=08 not 18
    Step 2: 6+9+0=15 not 16
    Step 3: 9+4+1=14
    Corrected Solution:
    Step 1: 4+4+0=08
    Step 2: 6+9+0=15
    Step 3: 9+4+1=14
    \boxed{1458}
    """
    solution = solution_text(steps)
    judged = judged or [sum(fact) for *fact, _ in wrong]
    places = enumerate(zip(steps, wrong, judged), 1)
    lines = [analysis_line(n, new, old, value, analysis) for n, (new, old, value) in places]
    return "\n".join(["Analysis:", *lines, "Corrected Solution:", solution])


def read_steps(problem, solution):
    r"""(steps as they stand there, right steps); None for a solution that is right or out of form.

    >>> read_steps("Add 64+94 digit by digit.", "Step 1: 4+4+0=09\nStep 2: 6+9+0=15\n\\boxed{159}")
    ([(4, 4, 0, 9), (6, 9, 0, 15)], [(4, 4, 0, 8), (6, 9, 0, 15)])
    """
    x, y = (int(number) for number in re.search(r"(\d+)\+(\d+)", problem).groups())
    found = re.findall(r"^Step \d: (\d)\+(\d)\+(\d)=(\d\d)$", solution, re.MULTILINE)
    steps = [tuple(int(number) for number in step) for step in found]
    truth = walk(x, y, lambda place, fact: sum(fact))
    in_form = len(steps) == len(truth) and solution_text(steps) == solution
    right = [value for *_, value in steps] == [value for *_, value in truth]
    return (steps, truth) if in_form and not right else None


def read_judgements(correction, steps, truth):
    r"""(is the step wrong?, does the analysis call it wrong?) of each step; None: it does not say.

    Left out are steps that are right or wrong only because of the carry that they were given.

    >>> said = "Analysis:\nStep 1: 4+4+0=08 not 09\nStep 2: right\nCorrected Solution:\n"
    >>> steps = [(4, 4, 0, 9), (6, 9, 1, 16), (9, 4, 1, 14)]
    >>> read_judgements(said, steps, walk(964, 494, lambda place, fact: sum(fact)))
    [(True, True), (False, None)]
    """
    analysis = correction.partition("Corrected Solution:")[0]
    lines = dict(re.findall(r"^Step (\d): (.*)$", analysis, re.MULTILINE))
    judgements = []
    for n, (step, true) in enumerate(zip(steps, truth), 1):
        is_wrong = step[-1] != true[-1]
        if is_wrong == (step[-1] != sum(step[:3])):
            line = lines.get(str(n))
            judgements.append((is_wrong, line and (line.endswith("wrong") or " not " in line)))
    return judgements


def until_wrong_value(problem, steps, truth, where, analysis="recompute"):
    r"""(user turn, response up to a value, the right value, the wrong one), of the first wrong step.

    where: "solution", "analysis" or "corrected solution", the text that the value stands in.

    >>> steps, truth = read_steps("Add 64+94 digit by digit.", "Step 1: 4+4+0=09\nStep 2: 6+9+0=15\n\\boxed{159}")
    >>> until_wrong_value("Add 64+94 digit by digit.", steps, truth, "analysis")[1:]
    ('Analysis:\nStep 1: 4+4+0=', '08', '09')
    """
    first = [step[-1] != true[-1] for step, true in zip(steps, truth)].index(True)
    user_turn, text = solution_prompt(problem), solution_text(truth)
    if where != "solution":
        user_turn = correction_prompt(problem, solution_text(steps))
        text = correction_text(truth, steps, analysis)
    start = text.index("Corrected Solution:") if where == "corrected solution" else 0
    value = text.index("=", text.index(f"Step {first + 1}: ", start)) + 1
    return user_turn, text[:value], f"{truth[first][-1]:02d}", f"{steps[first][-1]:02d}"


def demonstration(x, y, kind, teacher, rng, analysis):
    """(user turn, response) of one "solution" or one "correction"."""
    steps = solve(x, y, teacher, rng)
    if kind == "solution":
        return solution_prompt(problem_text(x, y)), solution_text(steps)
    while all(value == sum(fact) for *fact, value in steps):  # a correction needs a wrong solution
        steps = solve(x, y, teacher, rng)
    user_turn = correction_prompt(problem_text(x, y), solution_text(steps))
    judged = None
    if analysis != "recompute":
        judged = [look_again(step[:3], step[-1], teacher, rng) for step in steps]
    return user_turn, correction_text(correct(x, y, steps, teacher, rng, judged), steps, analysis, judged)


# ------------------------------------------------------------------------------------------------------------
# Problems, tokenizer, policy
# ------------------------------------------------------------------------------------------------------------
def write_problems(folder, rng, digits, n_train=6000, n_test=1000):
    """Write train.jsonl and test.jsonl, with no problem in common; return the pairs (x, y) of the test."""
    least, count = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    pairs = [(least + n // count, least + n % count) for n in rng.sample(range(count**2), n_train + n_test)]
    for name, part in (("test", pairs[:n_test]), ("train", pairs[n_test:])):
        rows = [{"problem": problem_text(x, y), "answer": str(x + y), "source": "toy"} for x, y in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs[:n_test]


def make_tokenizer(analysis="recompute"):
    r"""Byte-level BPE without merges: what stands between digits and newlines is a phrase, a token, or bytes.

    Not merges learned from demonstrations: each merge on the way to a phrase would cost the embedding a row.

    >>> tokenizer = make_tokenizer()
    >>> [tokenizer.decode(i) for i in tokenizer.encode("Step 1: 4+9+0=13\n not ok")]
    ['Step ', '1', ': ', '4', '+', '9', '+', '0', '=', '1', '3', '\n', ' ', 'n', 'o', 't', ' ', 'o', 'k']
    """
    split = pre_tokenizers.Split(Regex(r"\d|\n+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence([split, to_bytes])
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    problem, steps, others = problem_text(964, 494), [(4, 4, 0, 8)] * 3, [(4, 4, 0, 9)] * 3
    for text in (solution_prompt(problem), correction_prompt(problem, solution_text(steps)),
                 correction_text(steps, others, analysis), correction_text(steps, steps, analysis)):
        for phrase, _ in pieces.pre_tokenize_str(text):
            vocabulary.setdefault(phrase, len(vocabulary))
    # ignore_merges: a piece that is in the vocabulary is a token as it stands.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pieces, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=["<|user|>", "<|assistant|>"], model_max_length=CONTEXT,
    )


def make_policy(tokenizer):
    """Qwen3 with 0.3 million parameters; the embedding, tied to the head, has exactly len(tokenizer) rows."""
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, dtype="float32", **ids,
    )
    model = Qwen3ForCausalLM(config)
    # Without top_k=0, generate samples among the 50 likeliest tokens only: not from the policy.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def batch_of(demonstrations, tokenizer):
    """(input_ids, labels) [S,T], padded on the right; labels are -100 outside responses, which end in EOS."""
    ids, labels = [], []
    for user_turn, response in demonstrations:
        prompt = render(tokenizer, user_turn)
        answer = tokenizer.encode(response) + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    return pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(labels, True, -100)


def train(
    model, tokenizer, teacher, unseen, digits, analysis, steps, rng, batch_size=64, solutions=0.58
):
    """Supervised learning on fresh demonstrations of problems that are not in `unseen`.

    Solutions take the share `solutions` of batches. Both learning rates fall linearly to 0.
    """
    is_matrix = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
    rest = [p for name, p in model.named_parameters() if not is_matrix[name]]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / steps) for o in optimizers]
    bar = tqdm(range(steps), desc="supervised learning", unit="step")
    for _ in bar:
        kind = "solution" if rng.random() < solutions else "correction"
        demonstrations = []
        while len(demonstrations) < batch_size:
            x, y = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            if (x, y) not in unseen:
                demonstrations.append(demonstration(x, y, kind, teacher, rng, analysis))
        input_ids, labels = batch_of(demonstrations, tokenizer)
        loss = model(input_ids=input_ids, labels=labels).loss  # no mask needed: the padding comes last
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix({kind: f"{loss.item():.3f}"})


# ------------------------------------------------------------------------------------------------------------
# Measurement
# ------------------------------------------------------------------------------------------------------------
def sample(model, tokenizer, user_turns, max_new_tokens, batch_size=250):
    """One response (token ids, the last one EOS if finished) to each user turn, at temperature 1."""
    responses = []
    for start in tqdm(range(0, len(user_turns), batch_size), desc="measuring", unit="batch"):
        prompts = [render(tokenizer, turn) for turn in user_turns[start:start + batch_size]]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=max_new_tokens)
        for row in ids[:, batch["input_ids"].shape[1]:].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
    return responses


def report(name, right, responses, tokenizer, more=""):
    finished = sum(ids[-1] == tokenizer.eos_token_id for ids in responses)
    n = max(1, len(responses))
    print(f"{name:9} {sum(right) / n:.3f} of {len(responses)}, finished {finished / n:.3f}{more}")


def measure(model, tokenizer, pairs):
    """Print the sampled accuracy on `pairs`, and the share of its errors there that the policy puts right.

    Equality of strings stands in for math-verify: every answer is a plain number.
    """
    model.eval()
    problems = [problem_text(x, y) for x, y in pairs]
    solutions = sample(model, tokenizer, [solution_prompt(p) for p in problems], max_new_tokens=80)
    texts = tokenizer.batch_decode(solutions, skip_special_tokens=True)
    right = [final_answer(text) == str(x + y) for (x, y), text in zip(pairs, texts)]
    report("accuracy", right, solutions, tokenizer)

    errors = [i for i, ids in enumerate(solutions) if ids[-1] == tokenizer.eos_token_id and not right[i]]
    user_turns = [correction_prompt(problems[i], texts[i]) for i in errors]
    corrections = sample(model, tokenizer, user_turns, max_new_tokens=160)
    found = [find_correction(ids, tokenizer) for ids in corrections]  # None unless well-formed, Eq. 11
    mended = [f is not None and final_answer(f[-1]) == str(sum(pairs[i])) for i, f in zip(errors, found)]
    well_formed = sum(f is not None for f in found) / max(1, len(found))
    report("corrected", mended, corrections, tokenizer, f", well-formed {well_formed:.3f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of teacher, problems, demonstrations and policy")
    parser.add_argument("--digits", type=int, default=3, help="of each number")
    parser.add_argument("--analysis", choices=ANALYSES, default="recompute", help="what an analysis says; see 3")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of supervised learning")
    parser.add_argument("--measure", type=int, default=1000, help="test problems of the final measurement")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)

    teacher = make_teacher(rng)
    test_pairs = write_problems(args.output, rng, args.digits)
    tokenizer = make_tokenizer(args.analysis)
    model = make_policy(tokenizer)
    train(model, tokenizer, teacher, set(test_pairs), args.digits, args.analysis, args.steps, rng)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output, save_jinja_files=False)  # template: in tokenizer_config.json
    measure(model, tokenizer, test_pairs[:args.measure])


if __name__ == "__main__":
    main()
