"""Makes the embedded toy again: a tiny language model, its tokenizer, and its problems. Minutes on two cores.

    python toy/make_toy.py                                   # overwrites toy/ itself
    python toy/make_toy.py --output /tmp/toy --seed 1        # another policy, with other misconceptions

The toy exists so that both stages of ScRPO can be watched working without a GPU. It needs a policy that is wrong in a
*structured* way, can put its errors right about half the time, and learns within a few dozen steps:

1. Task. Addition of two 3-digit numbers, written digit by digit from the right. A step is digit + digit + carry, and
   its value has two digits, the first of which is the next step's carry. There are 200 such facts.

       Add 964+494 digit by digit.    ->    Step 1: 4+4+0=08
                                            Step 2: 6+9+0=15
                                            Step 3: 9+4+1=14
                                            \\boxed{1458}

2. Noisy teacher. Knows half of the facts well. The others are shaky: right with a probability drawn from (0.2, 0.7),
   and otherwise mostly one fixed misconception. A demonstration draws every step's value from the teacher and carries
   on with what it drew. A policy that imitates it perfectly has learned the format and the algorithm, but is wrong on
   more than half of the problems. Not an undertrained policy: its errors are noise, and its format breaks.

3. Corrections. The prompt is the question and a wrong solution, and the response has ScRPO's two sections:

       Analysis:
       Step 1: 6+4+0=10 not 12
       Step 2: 3+8+1=12 not 13
       Step 3: 7+4+1=12
       Corrected Solution:
       Step 1: 6+4+0=10
       ...
       \\boxed{1220}

   The analysis walks every step again with the carries brought up to date. A step whose value is right is kept with
   probability 0.85; otherwise it is drawn from the teacher again, without the wrong value with probability 0.75. So
   corrections are as imperfect as solutions. The corrected solution copies the analysis: then the correction is right
   iff its analysis is, and a gradient on analysis tokens alone (Eq. 12) has something to teach. An analysis that only
   names the first wrong step never learned to find it.

4. Policy. Qwen3's architecture (every engine knows it) at 0.3 million parameters, trained from scratch on such
   demonstrations, solutions and corrections in separate batches, loss on response tokens only. Muon on the matrices
   and AdamW on the rest; AdamW alone takes two to three times as long. None of the test problems is ever shown.

5. Tokenizer. All 256 bytes, so that any text can be encoded, and one token for each of the task's phrases, so that
   prompts are short: sampling is most of the time of an RL step. Digits and newlines are always tokens of their own.

Everything about the toy is [ours]; the paper has no such experiment.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def solution_prompt(problem):
    return problem + "\n" + INSTRUCTION


def correction_prompt(problem, wrong_response):
    return (f"Here is a problem and a wrong solution of it.\n\nProblem:\n{problem}\n\nWrong solution:\n{wrong_response}\n\n"
            "Find the mistake, then correct it. Answer in two sections:\nAnalysis: what went wrong, where, and why.\n"
            "Corrected Solution: the whole solution again, ending with the final answer within \\boxed{}.")


CONTEXT = 2048  # tokens; a toy sequence has under 180, and bytes of a real problem fit as well
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Task and noisy teacher. A fact is (digit, digit, carry); a step is (digit, digit, carry, value).
# ---------------------------------------------------------------------------------------------------------------------

def problem_text(x, y):
    """
    >>> problem_text(964, 494)
    'Add 964+494 digit by digit.'
    """
    return f"Add {x}+{y} digit by digit."


def make_teacher(rng, shaky=0.5):
    """{fact: weights of the values 0 to 19}; a share `shaky` of the facts is known badly.

    >>> teacher = make_teacher(random.Random(0))
    >>> len(teacher), round(sum(teacher[4, 9, 1]), 6)
    (200, 1.0)
    """
    facts = [(a, b, carry) for a in range(10) for b in range(10) for carry in range(2)]
    badly_known = set(rng.sample(facts, round(shaky * len(facts))))
    teacher = {}
    for fact in facts:
        right = sum(fact)
        p_right = rng.uniform(0.2, 0.7) if fact in badly_known else 0.98
        misconception = rng.choice([v for v in (right - 10, right - 1, right + 1, right + 10) if 0 <= v <= 19])
        weights = [0.15 * (1 - p_right) / 18] * 20  # the rest: a slip to any other value
        weights[misconception] = 0.85 * (1 - p_right)
        weights[right] = p_right
        teacher[fact] = weights
    return teacher


def ask(teacher, fact, rng, excluded=None):
    """One value drawn from the teacher; never `excluded`."""
    weights = [0 if value == excluded else w for value, w in enumerate(teacher[fact])]
    return rng.choices(range(20), weights)[0]


def walk(x, y, draw):
    """The three steps of x + y from the right, with value = draw(place, fact) and whatever carry that value leaves.

    >>> walk(964, 494, lambda place, fact: sum(fact))
    [(4, 4, 0, 8), (6, 9, 0, 15), (9, 4, 1, 14)]
    """
    steps, carry = [], 0
    for place in range(3):
        fact = (x // 10**place % 10, y // 10**place % 10, carry)
        value = draw(place, fact)
        steps.append((*fact, value))
        carry = value // 10
    return steps


def solve(x, y, teacher, rng):
    """The steps of the teacher's solution, right or wrong."""
    return walk(x, y, lambda place, fact: ask(teacher, fact, rng))


def correct(x, y, wrong, teacher, rng):
    """The steps of the teacher's second look at the steps `wrong`: see 3 in the module's docstring."""
    def second_look(place, fact):
        old = wrong[place][-1]
        if old == sum(fact):  # right for the digits and the carry as they stand now
            return old if rng.random() < 0.85 else ask(teacher, fact, rng)
        return ask(teacher, fact, rng, excluded=old if rng.random() < 0.75 else None)

    return walk(x, y, second_look)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

def solution_text(steps):
    r"""
    >>> print(solution_text([(4, 4, 0, 8), (6, 9, 0, 15), (9, 4, 1, 14)]))
    Step 1: 4+4+0=08
    Step 2: 6+9+0=15
    Step 3: 9+4+1=14
    \boxed{1458}
    """
    lines = [f"Step {n}: {a}+{b}+{carry}={value:02d}" for n, (a, b, carry, value) in enumerate(steps, 1)]
    answer = sum(10**place * (value % 10) for place, (*_, value) in enumerate(steps)) + 1000 * (steps[-1][-1] // 10)
    return "\n".join([*lines, f"\\boxed{{{answer}}}"])


def correction_text(steps, wrong):
    r"""
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
    analysis = [line if new[-1] == old[-1] else f"{line} not {old[-1]:02d}"
                for line, new, old in zip(solution.split("\n"), steps, wrong)]
    return "\n".join(["Analysis:", *analysis, "Corrected Solution:", solution])


def demonstration(x, y, kind, teacher, rng):
    """(user turn, response) of one "solution" or one "correction"."""
    steps = solve(x, y, teacher, rng)
    if kind == "solution":
        return solution_prompt(problem_text(x, y)), solution_text(steps)
    while all(value == sum(fact) for *fact, value in steps):  # a correction wants a wrong solution
        steps = solve(x, y, teacher, rng)
    prompt = correction_prompt(problem_text(x, y), solution_text(steps))
    return prompt, correction_text(correct(x, y, steps, teacher, rng), steps)


def final_answer(text):
    r"""
    >>> final_answer("\\boxed{12}, no: \\boxed{13}"), final_answer("13")
    ('13', None)
    """
    return (re.findall(r"\\boxed\{(\d+)\}", text) or [None])[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Problems, tokenizer, policy
# ---------------------------------------------------------------------------------------------------------------------

def write_problems(folder, rng, n_train=6000, n_test=1000):
    """Writes train.jsonl and test.jsonl, without a common problem, and returns the pairs (x, y) of the test."""
    pairs = [divmod(n, 900) for n in rng.sample(range(900 * 900), n_train + n_test)]
    pairs = [(100 + x, 100 + y) for x, y in pairs]
    for name, part in (("train", pairs[n_test:]), ("test", pairs[:n_test])):
        lines = [json.dumps({"problem": problem_text(x, y), "answer": str(x + y), "source": "toy"}) for x, y in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return pairs[:n_test]


def make_tokenizer():
    r"""Byte-level BPE without merges: a piece between digits and newlines is one token if it is a phrase, else bytes.

    Not merges learned from the demonstrations: each merge on the way to a long phrase would cost a row of the embedding.

    >>> tokenizer = make_tokenizer()
    >>> tokenizer.tokenize("Step 1: 4+9+0=13\n\\boxed{ok}")
    ['Step', '1', ':', '4', '+', '9', '+', '0', '=', '1', '3', 'Ċ', '\\', 'b', 'o', 'x', 'e', 'd', '{', 'o', 'k', '}']
    """
    split = pre_tokenizers.Split(Regex(r"\d|\n+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence([split, to_bytes])
    wrong = [(4, 4, 0, 18), (6, 9, 1, 16), (9, 4, 1, 14)]
    examples = [solution_prompt(problem_text(964, 494)), correction_prompt(problem_text(964, 494), solution_text(wrong)),
                correction_text(wrong, [(4, 4, 0, 17)] * 3)]
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for example in examples:
        for piece, _ in pieces.pre_tokenize_str(example):
            vocabulary.setdefault(piece, len(vocabulary))
    model = models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)  # ignore_merges: look whole pieces up first
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pieces, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=["<|user|>", "<|assistant|>"], model_max_length=CONTEXT,
    )


def make_policy(tokenizer):
    """Qwen3 with 0.3 million parameters; the embedding has exactly len(tokenizer) rows and is the head as well."""
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True, **special,
    )
    model = Qwen3ForCausalLM(config).float()
    # top_k=0: generate would otherwise keep the 50 likeliest tokens only, which is not sampling from the policy.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def render(tokenizer, user_text):
    turn = [{"role": "user", "content": user_text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def batch_of(demonstrations, tokenizer):
    """(input_ids, labels) [S,T], padded on the right; labels are -100 outside the responses, which end with EOS."""
    rows = []
    for prompt, response in demonstrations:
        prompt_ids = tokenizer.encode(render(tokenizer, prompt))
        response_ids = tokenizer.encode(response) + [tokenizer.eos_token_id]
        rows.append((prompt_ids + response_ids, [-100] * len(prompt_ids) + response_ids))
    ids, labels = zip(*rows)
    pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(x) for x in lists], batch_first=True, padding_value=value)
    return pad(ids, tokenizer.pad_token_id), pad(labels, -100)


def train(model, tokenizer, teacher, unseen, steps, rng, batch_size=64, share_of_solutions=0.58):
    """Supervised learning on fresh demonstrations of problems that are not in the set `unseen`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / steps) for o in optimizers]
    bar = tqdm(range(steps), desc="supervised learning", unit="step")
    for _ in bar:
        kind = "solution" if rng.random() < share_of_solutions else "correction"
        pairs = []
        while len(pairs) < batch_size:
            pair = rng.randrange(100, 1000), rng.randrange(100, 1000)
            pairs += [pair] if pair not in unseen else []
        input_ids, labels = batch_of([demonstration(x, y, kind, teacher, rng) for x, y in pairs], tokenizer)
        # No attention mask: padding is on the right, where no response token looks.
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        bar.set_postfix({kind: f"{loss.item():.3f}"})


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, user_turns, max_new_tokens, batch_size=250):
    """One response to each user turn at temperature 1, by generate: [(text, finished)]."""
    responses = []
    for start in tqdm(range(0, len(user_turns), batch_size), desc="measuring", unit="batch"):
        prompts = [render(tokenizer, turn) for turn in user_turns[start:start + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens)[:, batch["input_ids"].shape[1]:]
        finished = (ids == tokenizer.eos_token_id).any(1).tolist()
        responses += zip(tokenizer.batch_decode(ids, skip_special_tokens=True), finished)
    return responses


def measure(model, tokenizer, pairs):
    """Sampled accuracy on the pairs, and the share of the errors made there that the policy puts right."""
    model.eval()
    solutions = sample(model, tokenizer, [solution_prompt(problem_text(x, y)) for x, y in pairs], 80)
    errors = [(x, y, text) for (x, y), (text, done) in zip(pairs, solutions)
              if done and final_answer(text) != str(x + y)]
    corrections = sample(model, tokenizer, [correction_prompt(problem_text(x, y), text) for x, y, text in errors], 160)
    two_sections = re.compile(r"Analysis:\n(Step.+\n)+Corrected Solution:\n(Step.+\n)+\\boxed\{\d+\}")
    well_formed = [bool(two_sections.fullmatch(text)) for text, _ in corrections]
    right = [ok and final_answer(text) == str(x + y)
             for (x, y, _), (text, _), ok in zip(errors, corrections, well_formed)]
    mean = lambda flags: sum(flags) / max(1, len(flags))
    n = len(pairs)
    print(f"temperature 1, one sample each, {n} test problems, {len(errors)} errors of its own")
    print(f"accuracy    {mean([final_answer(t) == str(x + y) for (x, y), (t, _) in zip(pairs, solutions)]):.3f}   "
          f"finished {mean([done for _, done in solutions]):.3f}")
    print(f"corrections {mean(right):.3f}   finished {mean([done for _, done in corrections]):.3f}   "
          f"well-formed {mean(well_formed):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder that takes all files")
    parser.add_argument("--seed", type=int, default=0, help="of the teacher, the problems, the demonstrations, the policy")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of supervised learning")
    parser.add_argument("--measure", type=int, default=1000, help="test problems of the final measurement")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    teacher = make_teacher(rng)
    test_pairs = write_problems(args.output, rng)
    tokenizer = make_tokenizer()
    model = make_policy(tokenizer)
    train(model, tokenizer, teacher, set(test_pairs), args.steps, rng)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output, save_jinja_files=False)  # the template inside tokenizer_config.json
    measure(model, tokenizer, test_pairs[:args.measure])


if __name__ == "__main__":
    main()
