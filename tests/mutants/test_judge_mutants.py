"""The check that ends ``make mutants``: what it reads, what it refuses, and a list that still fits the sources."""

from pathlib import Path

import pytest
from judge_mutants import LISTED, Mutant, judge, read_listed, read_mutant, read_statuses

ROOT = Path(__file__).parents[2]
ONE, OTHER = Mutant("p.m.f", "a + b", "a - b"), Mutant("p.m.f", "a * b", "a / b")


def test_names_and_statuses_are_read():
    listing = "\n    p.m.x_f__mutmut_1: killed\n    p.m.xǁAǁg__mutmut_12: no tests\n"
    assert read_statuses(listing) == {"p.m.x_f__mutmut_1": "killed", "p.m.xǁAǁg__mutmut_12": "no tests"}


def test_a_mutant_is_its_function_and_its_lines():
    diff = "# p: survived\n--- p/m.py\n+++ p/m.py\n@@ -1,2 +1,2 @@\n def f():\n-    a + b\n+    a - b\n"
    assert read_mutant("p.m.x_f__mutmut_1", diff) == ONE
    assert read_mutant("p.m.xǁAǁg__mutmut_12", diff).function == "p.m.A.g"
    assert read_mutant("p.m.x__f__mutmut_1", diff).function == "p.m._f"


@pytest.mark.parametrize(
    ("killed", "survivors", "listed", "good", "last"),
    [
        (99, {ONE}, {ONE}, True, "100 mutants, 99 killed (99.0%), 1 survivors all listed"),
        (19, {ONE}, {ONE}, True, "20 mutants, 19 killed (95.0%), 1 survivors all listed"),
        (18, {ONE}, {ONE}, False, "19 mutants, 18 killed (94.7%), 1 survivors all listed"),
        (99, {ONE}, {OTHER}, False, "100 mutants, 99 killed (99.0%), 1 survivors 1 not listed"),
        (99, {ONE}, {ONE, OTHER}, False, "100 mutants, 99 killed (99.0%), 1 survivors all listed"),
        (0, set(), set(), False, "0 mutants, 0 killed (0.0%), 0 survivors all listed"),
    ],
)
def test_too_few_kills_unlisted_survivors_and_stale_entries_are_refused(killed, survivors, listed, good, last):
    statuses = {f"p.m.x_f__mutmut_{number}": "killed" for number in range(killed)}
    statuses |= {f"p.m.x_g__mutmut_{number}": "survived" for number in range(len(survivors))}
    text, verdict = judge(statuses, survivors, listed)
    assert verdict is good
    assert text.splitlines()[-1] == last
    assert ("not listed: p.m.f\n  - a + b\n  + a - b" in text) == bool(survivors - listed)
    assert ("no survivor any more: p.m.f\n  - a * b\n  + a / b" in text) == bool(listed - survivors)


def test_every_listed_line_is_still_in_its_file():
    listed = read_listed(LISTED)
    assert listed
    for mutant in listed:
        module = mutant.function.rpartition(".")[0]
        file = ROOT / (module.replace(".", "/") + ".py")
        assert mutant.before in file.read_text(), mutant
