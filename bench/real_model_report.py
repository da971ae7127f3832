"""Results of real_model.py's runs -> tables with intervals, and the curves.

A result holds for each held-out problem which answers were right, whether the first is an error
(wrong, but finished), whether the correction of that answer, wrong or right, is right (`own`), and
likewise of the warm start's errors (`fixed`). Every share is a ratio of two sums over problems, so
that one bootstrap over problems serves them all, paired.
"""

import json
import os
from pathlib import Path

import numpy as np

RATE_SEED = 100  # of the runs that choose the learning rate; not one of the comparison
MEASURES = ("solved", "own errors corrected", "warm start's errors corrected",
            "right answers spoiled")


def write_whole(path: Path, text: str) -> None:
    """There wholly or not at all, so that what is there need not be done again."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def result_file(work: Path, method: str, rate: str, seed: int) -> Path:
    return work / "runs" / f"{method}-{rate}-{seed}.json"


def load(work: Path, method: str, rate: str, seeds) -> list[dict]:
    files = [result_file(work, method, rate, seed) for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def while_training(result: dict, first: bool) -> float:
    """Accuracy in the first or the last quarter of a run's stage-1 steps."""
    accuracy = [row["accuracy"] for row in result["curve"] if row["accuracy"] is not None]
    n = max(1, len(accuracy) // 4)
    return float(np.mean(accuracy[:n] if first else accuracy[-n:]))


def best_rate(work: Path, rates: list[str]) -> str:
    last = {rate: while_training(result, False) for rate in rates
            for result in load(work, "grpo", rate, [RATE_SEED])}
    return max(last, key=last.get, default=rates[0])


# ====================================================================================== 5. report


def counts(result: dict, what: str) -> tuple[np.ndarray, np.ndarray]:
    """For each held-out problem what is counted, and out of how many: both [J]."""
    first = np.array(result["right"])[:, 0]
    error, mended = np.array(result["error"]), np.array(result["own"]["right"])
    if what == "solved":
        return np.mean(result["right"], axis=1), np.ones(len(first))
    if what == "right answers spoiled":
        return first * (1 - mended), first
    if what == "warm start's errors corrected" and "fixed" in result:
        asked = [result["fixed"].get(str(j)) for j in range(len(first))]
        return np.array([a or 0 for a in asked]), np.array([a is not None for a in asked], int)
    return error * mended, error


def share(results: list[dict], what: str, weights=1.0):
    """Over problems and seeds; each row of weights [R,J] is a resampling of the problems."""
    counted, out_of = np.sum([counts(result, what) for result in results], axis=0)  # [J] each
    return (weights * counted).sum(-1) / np.maximum((weights * out_of).sum(-1), 1e-9)


def difference(ours: list[dict], theirs: list[dict], what: str) -> str:
    J = len(ours[0]["right"])
    weights = np.random.default_rng(0).multinomial(J, np.full(J, 1 / J), size=4000)
    redrawn = share(ours, what, weights) - share(theirs, what, weights)
    low, high = np.percentile(redrawn, (2.5, 97.5))
    return f"{share(ours, what) - share(theirs, what):+.3f} [{low:+.3f}, {high:+.3f}]"


def over_seeds(results: list[dict], what: str) -> str:
    spread = np.std([share([result], what) for result in results], ddof=len(results) > 1)
    return f"{share(results, what):.3f} (sd {spread:.3f})"


def markdown(*rows) -> str:
    """Tuples as a table, the first of them its head."""
    lines = [" | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
             for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join(f"| {line} |\n" for line in lines)


def table_before(result: dict) -> str:
    error, formed, pool = result["error"], result["own"]["formed"], result["pool"]["right"]
    return markdown(
        ("before RL, T = 1", "share", "must be"),
        ("boxed", result["boxed"], ">= 0.95"),
        ("solved", share([result], MEASURES[0]), "0.25 to 0.65"),
        ("both headers, own errors", np.dot(error, formed) / max(1, sum(error)), ">= 0.9"),
        (MEASURES[1], share([result], MEASURES[1]), ">= 0.2"),
        (f"of the {len(pool)} that enter the pool", sum(pool) / max(1, len(pool)), ">= 0.35"),
        (MEASURES[3], share([result], MEASURES[3]), ""),
    )


def report(work: Path, rates: list[str], methods: list[str], seeds: list[int]) -> str:
    """Writes report.md and curves.png from the results that are there; returns the former."""
    before, rate = json.loads((work / "before.json").read_text()), best_rate(work, rates)
    done = {method: load(work, method, rate, seeds) for method in methods}
    done = {"before": [before]} | {method: results for method, results in done.items() if results}
    tried = [(r, while_training(x, True), while_training(x, False), share([x], "solved"))
             for r in rates for x in load(work, "grpo", r, [RATE_SEED])]
    finals = []
    for method, results in done.items():
        last = [result.get("curve", [{"samples": 0, "questions": 0}])[-1] for result in results]
        spent = [round(np.mean([row[name] for row in last])) for name in ("samples", "questions")]
        finals.append((method, len(results), *spent, *(over_seeds(results, m) for m in MEASURES)))
    pairs = [(method, "before") for method in done if method != "before"]
    pairs += [(method, "grpo") for method, _ in pairs if "grpo" in done and method != "grpo"]
    differences = [(f"{a} - {b}", *(difference(done[a], done[b], m) for m in MEASURES))
                   for a, b in pairs]
    text = "\n".join([
        table_before(before),
        markdown(("rate of GRPO", "first quarter", "last quarter", "held out, after"), *tried),
        markdown((f"at {rate}", "seeds", "samples", "questions", *MEASURES), *finals),
        markdown(("difference [95 % over problems]", *MEASURES), *differences),
    ])
    write_whole(work / "report.md", text)
    draw(work / "curves.png", {method: done[method] for method, _ in pairs[: len(done) - 1]})
    return text


def draw(path: Path, done: dict) -> None:
    """All seeds' steps in ten bins of samples drawn, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("accuracy", "correction_success")):
        for method, results in done.items():
            points = sorted((row["samples"], row[name]) for result in results
                            for row in result["curve"] if row[name] is not None)
            bins = [np.mean(part, axis=0) for part in np.array_split(points, 10) if len(part)]
            axis.plot(*(np.transpose(bins) if points else ([], [])), marker="o", label=method)
        axis.set(xlabel="samples drawn", ylabel=f"{name.replace('_', ' ')}, T = 1")
        axis.legend()
    figure.savefig(path, dpi=120)
