"""The error pool: which wrong answers are kept, when stage 2 starts, what it asks (Eqs. 7 to 10).

    stage 1  --- wrong responses to informative questions ---> E      Eqs. 7, 8
    stage 2  <--- the oldest B of them, as correction prompts ---     Eqs. 9, 10

Variance filter, pool and alternating stages are the paper's (ScRPO, arXiv 2511.06065); [ours] marks
what our sources do not state. Fork here for another rule of what is worth correcting.
"""

from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction

import reward


def informative(right: float, group_size: int, min_variance: float) -> bool:
    """Is a question neither too hard nor too easy? (Eq. 7)

    Rewards of 0 and 1 with k = `right` ones among G have the population variance k (G - k) / G^2,
    at most 1/4. `min_variance` is tau [ours: 0.15; 0: no filter]. In a fork with rewards between 0
    and 1, `right` is their sum.

    >>> [k for k in range(9) if informative(k, 8, 0.15)]   # 1 * 7 < 9.6 <= 2 * 6
    [2, 3, 4, 5, 6]
    """
    tau = Fraction(str(min_variance))  # the decimal that was written: a float misses some edges
    return right * (group_size - right) >= tau * group_size**2  # Eq. 7


def correction_prompt(problem: str, wrong_response: str) -> str:
    """x' = T(q, o_wrong), the user turn of stage 2 (Eq. 10).

    The two sections are the paper's, the wording is [ours]. The wrong response is quoted in the
    user's turn: as an assistant's turn, some chat templates would cut a part of it off.
    """
    return (
        "Here is a problem and a wrong solution of it.\n\n"
        f"Problem:\n{problem}\n\nWrong solution:\n{wrong_response}\n\n"
        "Find the mistake, then correct it. Answer in two sections:\n"
        "Analysis: what went wrong, where, and why.\n"
        "Corrected Solution: the whole solution again, "
        "ending with the final answer within \\boxed{}."
    )  # Eq. 10


def next_stage(stage: int, pool_size: int, trigger: int, batch: int) -> int:
    """Stage of the coming step: 1 is trial and error, 2 is self-correction (Eq. 9; trigger [ours]).

    >>> [next_stage(1, n, 32, 8) for n in (31, 32)]   # full: N = 32 errors
    [1, 2]
    >>> [next_stage(2, n, 32, 8) for n in (8, 7)]     # drained: fewer than B = 8
    [2, 1]
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
    response: str  # without its thinking


class ErrorPool:
    """E, first in, first out. All ranks add the same groups in the same order, so all pools agree.

    min_variance         tau of Eq. 7
    errors_per_question  most errors kept of a group [ours: 1, so that no hard question fills E]

    >>> pool = ErrorPool(min_variance=0.15)
    >>> pool.add("1+1", "2", ["It is 2", "It is 3", "It"], [1.0, 0.0, 0.0], [True, True, False])
    >>> pool.take(8)
    [WrongAnswer(problem='1+1', answer='2', response='It is 3')]
    """

    def __init__(self, min_variance: float, errors_per_question: int = 1):
        self.min_variance = min_variance
        self.errors_per_question = errors_per_question
        self.errors: deque[WrongAnswer] = deque()

    def add(self, problem, answer, responses, rewards, finished) -> None:
        """Keeps what Eqs. 7 and 8 let through of one group of responses.

        rewards   less than 1 is wrong
        finished  False where a response was cut off, or its grading failed: no error to diagnose
        """
        if not informative(sum(rewards), len(rewards), self.min_variance):  # Eq. 7
            return
        wrong = []
        for response, its_reward, is_finished in zip(responses, rewards, finished):
            shown = reward.after_thinking(response)  # the thinking is not kept [ours]
            if its_reward < 1 and is_finished and shown:
                wrong.append(WrongAnswer(problem, answer, shown))
        self.errors.extend(wrong[: self.errors_per_question])  # Eq. 8

    def take(self, n: int) -> list[WrongAnswer]:
        """Removes and returns the oldest `n` errors, or all if fewer are left."""
        return [self.errors.popleft() for _ in range(min(n, len(self)))]

    def __len__(self) -> int:
        return len(self.errors)

    def state_dict(self) -> dict:
        """The errors, oldest first, as plain lists and strings."""
        return {"errors": [asdict(error) for error in self.errors]}

    def load_state_dict(self, state: dict) -> None:
        self.errors = deque(WrongAnswer(**error) for error in state["errors"])
