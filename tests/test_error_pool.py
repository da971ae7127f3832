"""error_pool.py: Eqs. 7 to 10."""

import itertools
import json

import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from error_pool import ErrorPool, WrongAnswer, correction_prompt, informative, next_stage
from reward import after_thinking

settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repository")

taus = st.sampled_from([0.0, 0.1, 0.15, 0.21, 0.25]) | st.integers(0, 2500).map(lambda n: n / 1e4)
AFTER = {  # responses, and what follows their thinking
    "": "", "  plain \\boxed{1} ": "plain \\boxed{1}", "<think>a</think>\nb": "b",
    "a</think>b": "b", "<think>a</think>b<think>c</think>d": "d", "<think>a": "",
    "<think>a</think> ": "", "</think>": "",
}  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.booleans(), min_size=2, max_size=64), taus)
def test_informative_equals_the_oracle(rewards, tau):
    assert informative(sum(rewards), len(rewards), tau) == oracle.is_informative(rewards, tau)


def test_thresholds_are_met_exactly():
    assert [k for k in range(9) if informative(k, 8, 0.15)] == [2, 3, 4, 5, 6]
    assert [k for k in range(6) if informative(k, 5, 0.16)] == [1, 2, 3, 4]  # in binary 0.1600..3
    assert informative(3, 40, 0.069375)  # 0.069375 * 1600 is 111.00000000000001 in floats
    assert [k for k in range(9) if informative(k, 8, 0.25)] == [4]
    assert [k for k in range(8) if informative(k, 7, 0.25)] == []  # odd groups never reach 1/4
    assert all(informative(k, 8, 0.0) for k in range(9))  # off: all-wrong groups qualify
    assert informative(1, 2, 1e-05)  # a tau that Python writes with an exponent


def test_after_thinking():
    assert {text: after_thinking(text) for text in AFTER} == AFTER


samples = st.tuples(st.sampled_from(list(AFTER)), st.sampled_from([0.0, 1.0]), st.booleans())


@settings(max_examples=300)
@given(st.lists(samples, min_size=2, max_size=10), taus, st.integers(1, 4))
def test_kept_are_the_first_finished_wrong_responses_of_informative_questions(group, tau, limit):
    """What was cut off, or says nothing after its thinking, counts in the variance alone."""
    texts, rewards, finished = map(list, zip(*group))
    expected = [AFTER[text] for text, reward, done in group if reward == 0 and done and AFTER[text]]
    if not oracle.is_informative(rewards, tau):
        expected = []
    for pool, n in ((ErrorPool(tau, limit), limit), (ErrorPool(tau), 1)):  # by default one
        pool.add("q", "a", texts, rewards, finished)
        assert pool.take(99) == [WrongAnswer("q", "a", text) for text in expected[:n]]


@given(st.lists(st.tuples(st.text(), st.text(), st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_first_in_first_out_also_through_json(steps):
    pool, waiting = ErrorPool(0.0, 99), []
    for number, (problem, answer, made, taken) in enumerate(steps):
        texts = [f"{number}.{i}" for i in range(made)]
        pool.add(problem, answer, texts, [0.0] * made, [True] * made)
        waiting += [WrongAnswer(problem, answer, text) for text in texts]
        assert pool.take(taken) == waiting[:taken]  # all, where fewer are left
        waiting = waiting[taken:]
        state = json.loads(json.dumps(pool.state_dict()))
        pool.add("left over", "a", ["x"], [0.0], [True])  # loading replaces, it does not add
        pool.load_state_dict(state)
        assert len(pool) == len(waiting)
    assert pool.take(99) == waiting


def test_next_stage():
    for size, batch, more in itertools.product(range(10), range(1, 5), range(4)):
        for stage, least in ((1, batch + more), (2, batch)):
            after = next_stage(stage, size, batch + more, batch)
            assert after == (2 if size >= least else 1)
            assert next_stage(after, size, batch + more, batch) == after  # no flapping on one pool


def test_the_correction_prompt_word_for_word():
    assert correction_prompt("Add 1+1.", "It is {3}.") == (
        "Here is a problem and a wrong solution of it.\n\n"
        "Problem:\nAdd 1+1.\n\nWrong solution:\nIt is {3}.\n\n"
        "Find the mistake, then correct it. Answer in two sections:\n"
        "Analysis: what went wrong, where, and why.\nCorrected Solution: the whole solution "
        "again, ending with the final answer within \\boxed{}."
    )
