"The paper's own numbers: what is written beside the tables follows from them where it can, and the checks find planted slips."
import numpy as np
import pandas as pd
import pytest

from pcan import audit, files, pairs
from pcan.audit import paper_claims, paper_table
from pcan.report import METRICS
from pcan.tree import MA52
from pcan.verdicts import predictions

CLAIMS = paper_claims()


def test_claims_file():
    assert list(CLAIMS.columns)==["section", "claim", "metric", "paper", "unit"] and CLAIMS.index.is_unique
    assert CLAIMS.claim.is_unique and CLAIMS.claim.str.endswith(".").all(), "a claim is a sentence, and a row of the page"
    assert set(CLAIMS.unit)<={"points", "actions", "%"} and CLAIMS.paper.notna().all()
    assert [i for i in CLAIMS.index[CLAIMS.metric.str.startswith("action ")] if CLAIMS.metric[i][7:] not in MA52.actions]==[]
    assert (files.root()/"data"/"paper"/"claims.csv").read_text(encoding="utf-8").endswith("\n")


@pytest.mark.parametrize("id", CLAIMS.index[CLAIMS.metric.str.startswith("table")])
def test_claims_that_follow_from_the_tables(id):
    name, rows, metric = CLAIMS.metric[id].split(" | "); a, b = rows.split(" - "); t = paper_table(name)
    assert metric in METRICS and round(t.at[a, metric] - t.at[b, metric], 2)==CLAIMS.paper[id]


def test_the_unknown_difference_is_in_no_table():
    "As long as nobody knows what 9.11 compares: no PCAN row minus another row of its table."
    for x in CLAIMS.paper[CLAIMS.metric=="unknown"]:
        for name in ("table1", "table2", "table3"):
            t = paper_table(name)
            ours = [v for v in t.index if name!="table1" or v.startswith("PCAN")]
            assert not any(np.isclose(t.loc[v] - t.loc[w], x, atol=.001).any() for v in ours for w in t.index)


def test_counts_of_figure5_add_up():
    assert CLAIMS.paper[["improved", "same", "worse"]].sum()==MA52.K_A


def test_a_planted_slip_is_found():
    t = paper_table("table1"); assert not audit.slips(audit.identities(t)).values.any()
    t.loc["PCAN", "f1_mean"] += .02; t.loc["TSN", "body_f1_micro"] -= .01
    assert [(v, c) for v,r in audit.slips(audit.identities(t)).iterrows() for c in r.index[r]]==[("TSN", "body_f1_micro"), ("PCAN", "f1_mean")]


@pytest.mark.parametrize("n", [5, 400, 5586])
@pytest.mark.parametrize("how,round_", [("rounded", lambda x: np.floor(x+.5)), ("cut", np.floor), ("up", np.ceil)])
def test_counts_against_all_fractions(n, how, round_):
    "Every k of n is found under the percentage it prints as; what nothing prints as has no k."
    printed = {k: round_(round(1e4*k/n, 6))/100 for k in range(n+1)}
    assert all(k in audit.counts(x, n, how=how) for k,x in printed.items())
    assert not any(len(audit.counts(x, n)) for x in np.arange(0, 10001, 37)/100 if how=="rounded" and not np.isclose(x, list(printed.values())).any())


def test_room_and_half_width_belong_together():
    for d in (.0007, .004, .03): assert np.isclose(audit.half_width(5586, audit.room(5586, d), d), d)
    with pytest.raises(ValueError, match="expected one of"): audit.counts(50, 10, how="down")


def test_pair_by_rule_and_positions():
    import torch
    y = np.repeat([9, 10, 28], 6); said = y.copy(); said[:3], said[6], said[12:] = 10, 9, 9
    p = predictions(dict(y_a=y, fused_action=np.eye(52)[said]))
    assert pairs.closest_pair([p])==(9, 10) and pairs.confused([p])[9,10]==4 and pairs.confused([p])[9,28]==-1
    chosen = pairs.examples(np.eye(52)[said], y, (9, 10))
    assert [(y[i], k) for i,k in chosen]==[(9, "right"), (9, "half right"), (10, "right"), (10, "half right")]
    xy = pairs.cosines(torch.randn(4, 8), torch.randn(52, 8), (9, 10))
    assert xy.shape==(6, 2) and np.allclose([xy[4,0], xy[5,1]], 1, atol=1e-6) and np.isclose(xy[4,1], xy[5,0])


def test_positions_are_kept_and_belong_to_a_run(tmp_path, monkeypatch):
    from types import SimpleNamespace
    def no_weights(*a): raise files.DataError("no weights")
    monkeypatch.setattr(pairs, "positions", no_weights); monkeypatch.setattr(pairs, "folder", lambda *a: tmp_path/a[-1])
    run = SimpleNamespace(name="r")
    assert pairs.kept_positions(run, "test", (9, 10), "f", "quick") is None
    pd.DataFrame(dict(run=["r"], stream=["rgb"], kind=["sample"], action=[MA52.actions[9]], first=[.5], second=[.4])).to_csv(tmp_path/"f.csv", index=False)
    assert len(pairs.kept_positions(run, "test", (9, 10), "f", "quick"))==1
    assert pairs.kept_positions(SimpleNamespace(name="other"), "test", (9, 10), "f", "quick") is None
    assert pairs.kept_positions(run, "test", (1, 2), "f", "quick") is None
