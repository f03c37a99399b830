"The ledger of readings: complete, without doubles, and every row points to something that is there."
import json
import re
from dataclasses import asdict, replace
import pytest
from pcan.files import root
from pcan.model import GROUPS, RELEASED, Method, flip
from pcan.readings import LEDGER, THEMES, Row, arms, as_markdown, flat, ledger, missing, two_readings, values


def changed(a, b): return {k for k,v in asdict(a).items() if v!=asdict(b)[k]}


def test_every_difference_stands_in_exactly_one_row():
    ours, theirs = two_readings()
    named = [f for r in LEDGER for f in r.fields]
    assert len(named)==len(set(named)), "a field stands in two rows"
    assert set(named)<=set(ours), "a row names a field that a run does not have"
    assert {k for k in ours if ours[k]!=theirs[k]}<=set(named), "a difference between the readings stands in no row"
    assert {f"method.{k}" for k in changed(Method(), RELEASED)}<=set(named)


@pytest.mark.parametrize("row", LEDGER, ids=lambda r: r.item)
def test_row(row):
    assert row.theme in THEMES
    assert all(getattr(row, k) for k in ("item", "where", "paper", "released", "ours", "does", "shown"))
    assert all(len(getattr(row, k))<=110 and "|" not in getattr(row, k) for k in ("item", "paper", "released", "ours", "does")), "cells are short"
    assert not missing(row.shown)
    assert set(values(row))==set(row.fields)


def test_items_are_unique(): assert len({r.item for r in LEDGER})==len(LEDGER)


def test_what_is_missing_is_said():
    assert "no such file" in missing("tests/test_nothing.py::test_x")
    assert "no test test_x" in missing("tests/test_ledger.py::test_x")
    assert not missing("tests/test_ledger.py::test_what_is_missing_is_said")


def test_tables():
    every = ledger()
    assert len(every)==len(LEDGER)==sum(len(ledger(t)) for t in THEMES)
    assert every.set_index("item").fields["temperature τ"]==f"tau = {Method().tau} / {RELEASED.tau}"
    with pytest.raises(ValueError, match="expected one of losses"): ledger("loss")
    for t in THEMES:
        lines = as_markdown(ledger(t)).splitlines()
        assert len({len(re.findall(r"\|", l)) for l in lines})==1 and len(lines)==2+len(ledger(t))
        for target in re.findall(r"\]\(([^)]+)\)", "\n".join(lines)): assert (root()/"nbs"/target).is_file()


def test_page_shows_every_row():
    page = json.loads((root()/"nbs"/"65_readings.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []))
    for t in THEMES: assert as_markdown(ledger(t)) in text, f"{t}: the page shows an older ledger; execute it"


@pytest.mark.parametrize("label", GROUPS)
def test_flip_sets_one_group_back(label):
    m = flip(label)
    assert changed(m, RELEASED)==set(GROUPS[label])
    assert all(getattr(m, f)==getattr(Method(), f) for f in GROUPS[label])
    assert m.width==RELEASED.width
    assert flip(label, m)==m and flip(label, Method())==Method()


def test_flips_together_leave_what_the_page_says():
    fields = [f for g in GROUPS.values() for f in g]
    assert len(fields)==len(set(fields))
    m = RELEASED
    for label in GROUPS: m = flip(label, m)
    left = dict(width=RELEASED.width, detach_q=False, detach_mu=False, detach_p=False)
    assert m==replace(Method(), **left) and changed(m, Method())==set(left)
    assert set(fields) | set(left)==changed(Method(), RELEASED)
    assert len(set(arms().values()))==2+len(GROUPS)


def test_unknown_group():
    with pytest.raises(ValueError, match="membership and alpha, temperature, FN/FP penalties, PDA, rectification, pooling"): flip("alpha")


def test_flat():
    assert flat(Row("a", *"bcdefgh"), "row.")["row.theme"]=="a"
    assert flat(Method())["alpha"]==Method().alpha
