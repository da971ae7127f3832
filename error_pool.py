"""The error pool: which wrong answers are kept, when stage 2 starts, what it asks (Eqs. 7 to 10).

    stage 1  --- wrong responses to informative questions ---> E      Eqs. 7, 8
    stage 2  <--- the oldest B of them, as correction prompts ---     Eqs. 9, 10

Filter, pool and alternating stages are the paper's (ScRPO, arXiv 2511.06065); what is marked [ours]
it leaves open. Fork here for another rule of what is worth correcting, and when.
"""

from collections import deque
from dataclasses import asdict, dataclass
from fractions import Fraction


def informative(right: int, group_size: int, min_variance: float) -> bool:
    """Is a question with `right` of `group_size` right neither too hard nor too easy? (Eq. 7)

    0/1 rewards have the population variance k(G-k)/G^2, at most 1/4. tau [ours: 0.15; 0 is off] is
    read as the decimal that was written, so that rounding decides about no question at the edge.

    >>> [k for k in range(9) if informative(k, 8, 0.15)]   # 1 * 7 < 9.6 <= 2 * 6
    [2, 3, 4, 5, 6]
    """
    return right * (group_size - right) >= Fraction(str(min_variance)) * group_size**2  # Eq. 7


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: all of a text without thinking, nothing of an unclosed one.

    >>> [after_thinking(text) for text in ("<think>2+2</think>It is 4.", "It is 4.", "<think>2+2")]
    ['It is 4.', 'It is 4.', '']
    """
    answer = text.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer.strip()


def correction_prompt(problem: str, wrong_response: str) -> str:
    """x' = T(q, o_wrong), the user turn of stage 2 (Eq. 10).

    The two sections are the paper's, the wording is [ours]. The response is quoted, not given as an
    assistant's turn, of which a chat template may cut a part.
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
    """Stage of the next step: 1 is trial and error, 2 is self-correction (Eq. 9; trigger [ours]).

    >>> [next_stage(1, n, 32, 8) for n in (31, 32)], [next_stage(2, n, 32, 8) for n in (8, 7)]
    ([1, 2], [2, 1])
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
    """E, first in, first out. All ranks add the same groups in question order, so all pools agree.

    `min_variance` is tau; one error a question [ours], so that a hard one does not fill the pool.

    >>> pool = ErrorPool(min_variance=0.15)
    >>> pool.add("1+1", "2", ["It is 2", "It is 3", "It"], [1.0, 0.0, 0.0], [True, True, False])
    >>> pool.take(8)
    [WrongAnswer(problem='1+1', answer='2', response='It is 3')]
    """

    def __init__(self, min_variance: float, errors_per_question: int = 1):
        self.min_variance, self.errors_per_question = min_variance, errors_per_question
        self.errors: deque[WrongAnswer] = deque()

    def add(self, problem, answer, responses, rewards, finished) -> None:
        """Keeps what Eqs. 7 and 8 let through of one group of responses."""
        if not informative(rewards.count(1), len(rewards), self.min_variance):
            return
        # What was cut off is no reasoning to diagnose, and thinking is not kept either [both ours].
        rows = zip(responses, rewards, finished)
        wrong = [after_thinking(o) for o, reward, done in rows if reward == 0 and done]
        kept = [response for response in wrong if response][: self.errors_per_question]
        self.errors.extend(WrongAnswer(problem, answer, response) for response in kept)  # Eq. 8

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
