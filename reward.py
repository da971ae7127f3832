"""Responses -> R in {0, 1} (Eq. 1), and the sections of a correction (Eqs. 11, 12).

The trainer's side, above, finds the answer in a response and hands it to a worker, a process that it can kill.
The worker's side, below, is the marker: it tidies notation and lets math-verify compare. Only it imports math-verify.

    >>> final_answer(r"<think>\\boxed{1}?</think> So it is \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    >>> grade([r"\\boxed{0.5}", r"\\boxed{0.33}"], [r"\\frac12", r"\\frac13"])
    [1.0, 0.0]
"""

import collections
import json
import os
import re
import selectors
import subprocess
import sys
import time

ANALYSIS_HEADER, SOLUTION_HEADER = "Analysis", "Corrected Solution"
LONGEST_ANSWER = 2000  # characters; nothing longer is read as mathematics


# ---------------------------------------------------------------------------------------------------------------
# The trainer's side
# ---------------------------------------------------------------------------------------------------------------
def final_answer(text):
    """The content of the last \\boxed{} after the last </think>; None if it is missing, empty or left open."""
    head, closed, tail = text.rpartition("</think>")
    if not closed and "<think>" in text or closed and "<think>" in tail:
        return None  # thinking that never ends is no answer
    boxes = list(re.finditer(r"\\boxed\s*", tail))
    if not boxes:
        return None
    body = tail[boxes[-1].end():]
    if not body.startswith("{"):
        return None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", body, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped \{ or \} does not count
        if depth == 0:
            return body[1:match.start()].strip() or None
    return None


class Worker:
    """One `python reward.py --worker`: a JSON line in, a JSON line out, never more than one job in flight."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        first = self.receive()
        if first != "ready":
            self.kill()
            raise RuntimeError(f"the grading worker did not start: {first}")

    def send(self, job):
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is dead: receive() will say so

    def receive(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass


class Grader:
    """A pool of killable workers. `deadline` is in seconds and for one item."""

    def __init__(self, workers=2, deadline=5.0):
        self.size, self.deadline = workers, deadline
        self.idle = []
        self.counts = collections.Counter()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        while self.idle:
            self.idle.pop().kill()

    def verdicts(self, responses, golds):
        """"right", "wrong" or "ungradable" for each response."""
        verdicts, jobs = [None] * len(responses), []
        for i, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            answer = final_answer(response)
            if answer is None:
                verdicts[i] = "wrong"
            elif answer == gold.strip():
                verdicts[i] = "right"
            elif len(answer) > LONGEST_ANSWER:
                verdicts[i] = "ungradable"
            else:
                jobs.append((i, {"gold": gold, "answer": answer, "deadline": self.deadline}))
        for i, verdict in self._run(jobs):
            verdicts[i] = verdict
        self.counts.update(verdicts)
        return verdicts

    def grade(self, responses, golds):
        """R of Eq. 1: 1.0 if right, else 0.0."""
        return [float(verdict == "right") for verdict in self.verdicts(responses, golds)]  # Eq. 1

    def unparsable(self, golds):
        """Indices of the golds that math-verify cannot read."""
        jobs = [(i, {"gold": gold, "deadline": self.deadline}) for i, gold in enumerate(golds)]
        return sorted(i for i, verdict in self._run(jobs) if verdict == "ungradable")

    def _run(self, jobs):
        """Yield (index, verdict) for each (index, job), in the order in which they end."""
        jobs, busy = collections.deque(jobs), {}
        with selectors.DefaultSelector() as selector:
            try:
                while jobs or busy:
                    while jobs and len(busy) < self.size:
                        worker = self.idle.pop() if self.idle else Worker()
                        index, job = jobs.popleft()
                        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                        busy[worker] = index, time.monotonic() + self.deadline
                        worker.send(job)
                    soonest = min(end for _, end in busy.values())
                    ready = [key.data for key, _ in selector.select(max(0, soonest - time.monotonic()))]
                    late = [w for w, (_, end) in busy.items() if w not in ready and end <= time.monotonic()]
                    for worker in ready + late:
                        verdict = worker.receive() if worker in ready else None
                        selector.unregister(worker.process.stdout)
                        index, _ = busy.pop(worker)
                        if verdict is None:
                            worker.kill()
                        else:
                            self.idle.append(worker)
                        yield index, verdict or "ungradable"
            finally:
                for worker in busy:
                    worker.kill()


def grade(responses, golds, timeout=5.0):
    """Grader.grade for one call."""
    with Grader(deadline=timeout) as grader:
        return grader.grade(responses, golds)


def find_correction(token_ids, tokenizer, span="sections"):
    """(start, end, solution_text) of a well-formed correction, else None (Eq. 11).

    The analysis is token_ids[start:end]: a token belongs if all its characters do (Eq. 12).
    """
    text = decode(tokenizer, token_ids)
    after = text.rfind("</think>") + 1
    if not after and "<think>" in text:
        return None
    headers = [[m for m in header(name).finditer(text) if m.start() >= after]
               for name in (ANALYSIS_HEADER, SOLUTION_HEADER)]
    if [len(found) for found in headers] != [1, 1]:
        return None
    (analysis,), (solution,) = headers
    if not any(map(str.isalnum, text[analysis.end():solution.start()])):
        return None
    first = 0 if span == "prefix" else token_at(tokenizer, token_ids, text, analysis.end(), whole=True)
    last = token_at(tokenizer, token_ids, text, solution.start(), whole=False)
    return first, max(first, last), text[solution.end():]


def header(name):
    junk = r"[^\S\n]|[#*_:]"
    letters = rf"(?:{junk})*".join(name.replace(" ", ""))
    return re.compile(rf"^(?:{junk})*{letters}(?![^\W_])(?:{junk})*", re.IGNORECASE | re.MULTILINE)


def decode(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_at(tokenizer, token_ids, text, position, whole):
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high + (not whole)) // 2
        prefix = decode(tokenizer, token_ids[:middle])
        if whole:
            if not text.startswith(prefix):
                prefix = prefix.rstrip("\ufffd")
            if len(prefix) >= position:
                high = middle
            else:
                low = middle + 1
        else:
            if len(prefix) <= position:
                low = middle
            else:
                high = middle - 1
    return low


# ---------------------------------------------------------------------------------------------------------------
# The worker's side
# ---------------------------------------------------------------------------------------------------------------
def read(text):
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(rf"\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def judge(gold, answer=None):
    from math_verify import verify

    parsed = read(gold)
    if not parsed:
        return "ungradable"
    if answer is None:
        return "readable"
    return "right" if verify(parsed, read(answer), timeout_seconds=None) else "wrong"


def worker():
    import resource
    import signal

    out = os.fdopen(os.dup(1), "w", buffering=1)  # ours; what a library prints goes to stderr
    os.dup2(2, 1)
    try:
        judge("1", "2")
    except ImportError as error:
        print(json.dumps(f"{error}"), file=out)
        return
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, job.pop("deadline") + 1)
        verdict = judge(**job)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    worker()
