"""The README's promises: its map of equations, its names, its links."""

import importlib
import inspect
import re
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("train.py", "evaluate.py", "rollout.py", "reward.py", "error_pool.py", "loss.py")
NAME = r"`(\w+)\.py:([\w.]+)`"
ROWS = re.findall(r"^\| (\d+) \|(.*)$", README, re.M)
MAP = {int(number): re.findall(NAME, row) for number, row in ROWS}


def find(module: str, name: str):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "fget", found)  # of a property its function


def cited(source: str) -> set[int]:
    """The equations that `source` names: `Eq. 2`, `Eqs. 7, 8`, `Eqs. 3 to 6`."""
    numbers = set()
    for listed in re.findall(r"\bEqs?\. (\d+(?:(?:, | and | or | to |-)\d+)*)", source):
        for part in re.split(", | and | or ", listed):
            first, *last = map(int, re.split(" to |-", part))
            numbers |= {first, *range(first, max(last, default=first) + 1)}
    return numbers


def test_cited_reads_lists_and_ranges():
    assert cited("# Eq. 2\n# Eqs. 7, 8; Eqs. 3 to 6, 9") == {2, 3, 4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize("number", range(1, 16))
def test_every_mapped_function_has_the_equation_at_a_line_or_in_its_first_sentence(number):
    assert MAP.keys() == set(range(1, 16)) and MAP[number]
    for module, name in MAP[number]:
        function = find(module, name)
        lines, _ = inspect.getsourcelines(function)
        marked = [line for line in lines if number in cited(line.partition("#")[2])]
        about = inspect.getdoc(function).splitlines()[0] if inspect.getdoc(function) else ""
        where = f"{module}.py:{name}"
        assert marked or number in cited(about), f"{where} has no line marked `# Eq. {number}`"


def test_every_name_in_the_readme_exists():
    names = re.findall(NAME, README)
    assert len(names) > 25
    for module, name in names:
        assert callable(find(module, name)), name


def test_no_equation_is_cited_that_does_not_exist():
    for name in FILES:
        assert cited((ROOT / name).read_text(encoding="utf-8")) <= set(range(1, 16)), name


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_the_readme_shows_of_the_study_is_in_its_results():
    """Every row's seeds, difference, p and detectable difference stand together in RESULTS.md."""
    results = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    shown = README.partition("## Does it work?")[2].partition("\n## ")[0]
    figures = re.findall(r"^\|[^|]+(\| \d+ \| [-+]\d.*\|)$", shown, re.M)
    assert len(figures) >= 5 and all(row in results for row in figures)
    for difference, p in re.findall(r"\(([-+][\d.]+ \[.*?\]), p ([\d.]+)\)", shown):
        assert f"{difference} | {p} |" in results


def test_length_and_what_the_first_screen_shows():
    assert len(README) <= 12_000
    assert README.index("Status") < README.index("torchrun") < README.index("![")


def test_what_the_readme_shows_of_a_settings_file_is_there():
    """Launch lines give a step the time to end: torchrun kills it after 30 s by default."""
    for path in (ROOT / "configs").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "--shutdown-timeout=" in text or path.name == "toy.yaml", path
        differing = yaml.safe_load(text)
        defaults = asdict(train.Config())
        same = [name for name, value in differing.items() if value == defaults[name]]
        assert not same, f"{path.name} repeats the defaults of {same}"
    assert "--shutdown-timeout=" in README
