"""The error pool: which wrong answers are kept, when stage 2 starts, and what it asks (Eqs. 7 to 10).

    stage 1  ---- wrong responses to informative questions --->  E     informative: Eq. 7, kept: Eq. 8
    stage 2  <--- the oldest B of them, as correction prompts ---  E   switch: Eq. 9, prompt: Eq. 10

The idea of the filter, of the pool and of the two alternating stages is the paper's (ScRPO, arXiv 2511.06065);
what is marked [ours] it leaves open. Fork here for another rule of what is worth correcting: `informative`
decides about a question, `ErrorPool.add` about its responses, `next_stage` about the rhythm.
"""

from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction


def informative(right: int, group_size: int, min_variance: float) -> bool:
    """Is a question with `right` of `group_size` responses right neither too hard nor too easy? (Eq. 7)

    The population variance of 0/1 rewards is k(G-k)/G^2, at most 1/4. It is compared as k(G-k) >= tau G^2 with
    tau read as the decimal it is written as, so that no rounding decides about a question at the threshold.
    tau = 0.15 is ours; tau = 0 turns the filter off.

    >>> [k for k in range(9) if informative(k, 8, 0.15)]   # 7 = 1*7 < 9.6 <= 12 = 2*6
    [2, 3, 4, 5, 6]
    >>> informative(3, 10, 0.21), informative(0, 10, 0.0)
    (True, True)
    """
    return right * (group_size - right) >= Fraction(str(min_variance)) * group_size**2  # Eq. 7


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: all of it without thinking, nothing when the thinking was never closed.

    >>> after_thinking("<think>2+2 is 5?</think>It is \\\\boxed{4}."), after_thinking("<think>2+2"), after_thinking("4")
    ('It is \\\\boxed{4}.', '', '4')
    """
    thinking, closed, answer = text.rpartition("</think>")
    return answer.strip() if closed or "<think>" not in text else ""


def correction_prompt(problem: str, wrong_response: str) -> str:
    """x' = T(q, o_wrong), the user turn of stage 2 (Eq. 10).

    The two sections are the paper's, the wording is ours. The wrong solution stands in the *user* turn: the chat
    template of reasoning models splits assistant turns at `</think>` and would drop part of it.
    """
    return (
        f"Here is a problem and a wrong solution of it.\n\nProblem:\n{problem}\n\nWrong solution:\n{wrong_response}\n\n"
        "Find the mistake, then correct it. Answer in two sections:\n"
        "Analysis: what went wrong, where, and why.\n"
        "Corrected Solution: the whole solution again, ending with the final answer within \\boxed{}."
    )  # Eq. 10


def next_stage(stage: int, pool_size: int, trigger: int, batch: int) -> int:
    """Stage of the next step: 1 is trial and error, 2 is self-correction (Eq. 9; the exact trigger is ours).

    >>> next_stage(1, 31, 32, 8), next_stage(1, 32, 32, 8), next_stage(2, 8, 32, 8), next_stage(2, 7, 32, 8)
    (1, 2, 2, 1)
    """
    if stage == 1 and pool_size >= trigger:
        return 2  # Eq. 9
    if stage == 2 and pool_size < batch:
        return 1  # Eq. 9
    return stage


@dataclass(frozen=True)
class WrongAnswer:
    """One element (q, a, o_wrong) of E."""

    problem: str
    answer: str
    response: str


class ErrorPool:
    """E, first in, first out. Every rank adds the same gathered groups in question order, so all pools are equal.

    trigger            N of Eq. 9: stage 2 may start once so many errors wait
    min_variance       tau of Eq. 7
    errors_per_question  wrong responses kept of one group [ours: 1, so that a hard question does not fill the pool]

    >>> pool = ErrorPool(trigger=2, min_variance=0.15)
    >>> pool.add("1+1", "2", ["\\\\boxed{2}", "\\\\boxed{3}", "\\\\boxed{1"], [1.0, 0.0, 0.0], [True, True, False])
    1
    >>> pool.add("1+2", "3", ["no", "idea"], [0.0, 0.0], [True, True])   # too hard: nothing to learn from
    0
    >>> len(pool), pool.ready, pool.take(1)[0].response
    (1, False, '\\\\boxed{3}')
    """

    def __init__(self, trigger: int, min_variance: float, errors_per_question: int = 1):
        self.trigger, self.min_variance, self.errors_per_question = trigger, min_variance, errors_per_question
        self.errors: deque[WrongAnswer] = deque()

    def add(self, problem, answer, responses, rewards, finished) -> int:
        """Keeps what Eqs. 7 and 8 let through of one group of G `responses`; returns how many.

        `rewards` are the 0/1 of Eq. 1. A truncated response (`finished` false) is no reasoning to diagnose, and
        of a reasoning model's only what follows `</think>` is kept [both ours].
        """
        if not informative(sum(reward == 1 for reward in rewards), len(rewards), self.min_variance):
            return 0
        wrong = [after_thinking(o) for o, reward, done in zip(responses, rewards, finished) if reward == 0 and done]
        kept = [response for response in wrong if response][: self.errors_per_question]
        self.errors.extend(WrongAnswer(problem, answer, response) for response in kept)  # Eq. 8
        return len(kept)

    @property
    def ready(self) -> bool:
        """|E| >= N: enough for stage 2 (Eq. 9)."""
        return len(self) >= self.trigger

    def take(self, n: int) -> list[WrongAnswer]:
        """Removes and returns the oldest `n` errors, or all if fewer are left."""
        return [self.errors.popleft() for _ in range(min(n, len(self)))]

    def __len__(self) -> int:
        return len(self.errors)

    def state_dict(self) -> dict:
        """The errors, oldest first, as plain lists and strings: what a checkpoint needs to go on exactly."""
        return {"errors": [asdict(error) for error in self.errors]}

    def load_state_dict(self, state: dict) -> None:
        self.errors = deque(WrongAnswer(**error) for error in state["errors"])
