"""The README's promises: its map of equations, its names, its links."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("train.py", "evaluate.py", "rollout.py", "reward.py", "error_pool.py", "loss.py")
MAP = {int(n): re.findall(r"`(\w+)\.py:([\w.]+)`", row) for n, row in re.findall(r"^\| (\d+) \|(.*)$", README, re.M)}


def find(module: str, name: str):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "fget", found)  # of a property its function


def cited(source: str) -> set[int]:
    """The equations that comments and docstrings of `source` name: `Eq. 2`, `Eqs. 7, 8`, `Eqs. 3 to 6`."""
    numbers = set()
    for listed in re.findall(r"\bEqs?\. (\d+(?:(?:, | and | or | to |-)\d+)*)", source):
        parts = re.split(r"(, | and | or | to |-)", listed)
        numbers.add(int(parts[0]))
        for joint, number in zip(parts[1::2], parts[2::2]):
            numbers |= set(range(int(parts[0]), int(number) + 1)) if joint in (" to ", "-") else {int(number)}
            parts[0] = number
    return numbers


def test_cited_reads_lists_and_ranges():
    assert cited("# Eq. 2\n# Eqs. 7, 8; Eqs. 3 to 6") == {2, 3, 4, 5, 6, 7, 8}


def test_every_equation_is_on_the_map():
    assert sorted(MAP) == list(range(1, 16))
    assert all(MAP.values())


@pytest.mark.parametrize("number", range(1, 16))
def test_the_mapped_function_has_a_line_with_the_equation(number):
    for module, name in MAP[number]:
        lines, _ = inspect.getsourcelines(find(module, name))
        code = [line for line in lines if "#" in line and number in cited(line[line.index("#") :])]
        assert code, f"{module}.py:{name} has no code line marked `# Eq. {number}`"


def test_every_name_in_the_readme_exists():
    names = re.findall(r"`(\w+)\.py:([\w.]+)`", README)
    assert len(names) > 25
    for module, name in names:
        assert callable(find(module, name)), name


@pytest.mark.parametrize("name", FILES)
def test_no_equation_is_cited_that_does_not_exist(name):
    assert cited((ROOT / name).read_text(encoding="utf-8")) <= set(range(1, 16))


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_the_readme_shows_of_the_study_is_in_its_results():
    results = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    shown = re.search(r"<!-- study.py: begin -->\n(.*?)<!-- study.py: end -->", README, re.S)[1].strip().splitlines()
    assert len(shown) == 5 and all(line in results for line in shown)
