"""Stand-in."""
import numpy as np
from error_pool import after_thinking, correction_prompt
from rollout import Task, fits, render


def accuracy(groups):
    if not groups:
        return float("nan"), float("nan")
    means = [np.mean(g.rewards) for g in groups]
    return float(np.mean(means)), float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def correction_tasks(tokenizer, groups, max_new_tokens, max_context):
    tasks = []
    for g in groups:
        for i, s in enumerate(g.samples):
            shown = after_thinking(s.text)
            prompt = render(tokenizer, correction_prompt(g.problem, shown))
            if s.finished and shown and fits(prompt, max_new_tokens, max_context):
                tasks.append(Task(problem=g.problem, answer=g.answer, prompt=prompt, question=g.question, corrects=i))
    return tasks
