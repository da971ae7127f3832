"""error_pool.py: Eqs. 7 to 10."""

import json

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from error_pool import ErrorPool, WrongAnswer, after_thinking, correction_prompt, informative, next_stage

taus = st.sampled_from([0.0, 0.05, 0.1, 0.15, 0.1875, 0.21, 0.25]) | st.integers(0, 2500).map(lambda n: n / 10_000)


# ----------------------------------------------------------------------------------- Eq. 7: the variance filter


@settings(max_examples=500)
@given(st.lists(st.booleans(), min_size=2, max_size=64), taus)
def test_informative_equals_the_oracle(rewards, tau):
    assert informative(sum(rewards), len(rewards), tau) == oracle.is_informative(rewards, tau)


def test_thresholds_are_met_exactly():
    assert [k for k in range(9) if informative(k, 8, 0.15)] == [2, 3, 4, 5, 6]
    assert [k for k in range(11) if informative(k, 10, 0.21)] == [3, 4, 5, 6, 7]  # 0.21 == 3 * 7 / 100, not in floats
    assert [k for k in range(9) if informative(k, 8, 0.25)] == [4]
    assert [k for k in range(8) if informative(k, 7, 0.25)] == []  # an odd group never reaches 1/4
    assert all(informative(k, 8, 0.0) for k in range(9))  # off: all-wrong groups qualify
    assert informative(1, 2, 1e-05)  # a tau that Python writes with an exponent


# --------------------------------------------------------------------------------------- Eq. 8: what is kept


def pool(trigger=4, min_variance=0.15, errors_per_question=1):
    return ErrorPool(trigger, min_variance, errors_per_question)


def kept(pool):
    return [error.response for error in pool.take(len(pool))]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=10), taus, st.integers(1, 4))
def test_kept_are_the_first_finished_wrong_responses_of_informative_questions(samples, tau, limit):
    p = pool(min_variance=tau, errors_per_question=limit)
    rewards = [float(right) for right, _ in samples]
    names = [f"response {i}" for i in range(len(samples))]
    count = p.add("q", "a", names, rewards, [done for _, done in samples])
    expected = [name for name, (right, done) in zip(names, samples) if not right and done][:limit]
    if not oracle.is_informative(rewards, tau):
        expected = []
    assert count == len(p) == len(expected)
    assert p.take(99) == [WrongAnswer("q", "a", name) for name in expected]


def test_one_error_per_question_by_default():
    p = ErrorPool(trigger=4, min_variance=0.15)
    assert p.add("q", "a", list("wxyz"), [0.0, 1.0, 0.0, 0.0], [True] * 4) == 1
    assert kept(p) == ["w"]


def test_truncated_wrong_responses_count_in_the_variance_but_are_not_kept():
    p = pool()
    assert p.add("q", "a", ["cut", "right"], [0.0, 1.0], [False, True]) == 0
    assert p.add("q", "a", ["cut", "wrong", "right"], [0.0, 0.0, 1.0], [False, True, True]) == 1
    assert kept(p) == ["wrong"]


def test_all_right_and_all_wrong_groups():
    for tau, from_all_wrong in ((0.15, 0), (0.0, 1)):
        p = pool(min_variance=tau)
        assert p.add("q", "a", ["x", "y"], [1.0, 1.0], [True, True]) == 0
        assert p.add("q", "a", ["x", "y"], [0.0, 0.0], [True, True]) == from_all_wrong


def test_only_what_follows_the_thinking_is_kept():
    p = pool(errors_per_question=9)
    responses = ["<think>hm</think>\nIt is \\boxed{3}.", "<think>hm", "no tag\\boxed{1}", "prefilled</think>so 4",
                 "<think>x</think> ", "r"]  # fmt: skip
    p.add("q", "a", responses, [0.0] * 5 + [1.0], [True] * 6)
    assert kept(p) == []  # 1 of 6 right is too hard
    p.add("q", "a", responses + ["r"], [0.0] * 5 + [1.0] * 2, [True] * 7)
    assert kept(p) == ["It is \\boxed{3}.", "no tag\\boxed{1}", "so 4"]  # unclosed or empty ones are no solutions


@pytest.mark.parametrize(
    "text, rest",
    [
        ("", ""),
        ("  plain  ", "plain"),
        ("<think>a</think>b", "b"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("<think>a</think>", ""),
        ("</think>", ""),
    ],
)
def test_after_thinking(text, rest):
    assert after_thinking(text) == rest


# ------------------------------------------------------------------------------- Eq. 9: order, trigger, switch


@given(st.lists(st.integers(1, 9), max_size=12))
def test_first_in_first_out_across_groups_and_takes(sizes):
    p, waiting = pool(min_variance=0.0, errors_per_question=99), []
    for number, size in enumerate(sizes):
        names = [f"{number}.{i}" for i in range(size)]
        p.add("q", "a", names, [0.0] * size, [True] * size)
        waiting += names
        n = size // 2
        assert [error.response for error in p.take(n)] == waiting[:n]
        waiting = waiting[n:]
        assert len(p) == len(waiting)
        assert p.ready == (len(waiting) >= 4)
    assert kept(p) == waiting


def test_taking_more_than_there_is_and_from_an_empty_pool():
    p = pool()
    assert p.take(3) == []
    p.add("q", "a", ["x", "y"], [0.0, 1.0], [True, True])
    assert [error.response for error in p.take(3)] == ["x"]
    assert len(p) == 0 and not p.ready and p.take(0) == []


@given(st.integers(1, 2), st.integers(0, 40), st.integers(1, 20), st.integers(0, 20))
def test_next_stage(stage, size, batch, more):
    trigger = batch + more
    after = next_stage(stage, size, trigger, batch)
    assert after == (2 if (size >= trigger if stage == 1 else size >= batch) else 1)
    assert next_stage(after, size, trigger, batch) == after  # no flapping on one pool


def test_a_visit_to_stage_two_takes_whole_batches():
    p, stage, visits = pool(trigger=5, min_variance=0.0, errors_per_question=99), 1, []
    for step in range(12):
        stage = next_stage(stage, len(p), 5, 2)
        if stage == 1:
            p.add(str(step), "a", ["x"] * 3, [0.0] * 3, [True] * 3)
        else:
            assert len(p.take(2)) == 2
        visits.append(stage)
    assert visits == [1, 1, 2, 2, 2, 1, 1, 2, 2, 2, 1, 1]


# --------------------------------------------------------------------------------------------- Eq. 10: the prompt


def test_the_correction_prompt_word_for_word():
    assert correction_prompt("Add 1+1.", "It is {3}.") == (
        "Here is a problem and a wrong solution of it.\n\nProblem:\nAdd 1+1.\n\nWrong solution:\nIt is {3}.\n\n"
        "Find the mistake, then correct it. Answer in two sections:\nAnalysis: what went wrong, where, and why.\n"
        "Corrected Solution: the whole solution again, ending with the final answer within \\boxed{}."
    )


# ------------------------------------------------------------------------------------------------- checkpoints


@given(st.lists(st.tuples(st.text(), st.text(), st.text(min_size=1)), max_size=6), st.integers(0, 6))
def test_a_pool_goes_on_from_its_state_through_json(errors, taken):
    p = pool(min_variance=0.0)
    for problem, answer, response in errors:
        p.add(problem, answer, [response], [0.0], [True])
    p.take(taken)
    restored = pool(min_variance=0.0)
    restored.add("left over", "a", ["x"], [0.0], [True])  # loading replaces, it does not add
    restored.load_state_dict(json.loads(json.dumps(p.state_dict())))
    assert restored.state_dict() == p.state_dict() and len(restored) == len(p) and restored.ready == p.ready
    for x in (p, restored):
        x.add("new", "a", ["y"], [0.0], [True])
    assert restored.take(99) == p.take(99)
