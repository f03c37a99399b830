"What stands in reports/ is what its runs say: names, metrics and tables can be made again from the kept scores."
from pathlib import Path
import pytest
from pcan import runs
from pcan.files import read_json
from pcan.report import read_table

RUNS = sorted((Path(__file__).resolve().parent.parent/"reports"/"runs").glob("*/metrics.json"))
assert RUNS, "no committed runs"

@pytest.mark.parametrize("path", [p.parent for p in RUNS], ids=lambda p: p.name)
def test_run(path):
    run = runs.from_dict(runs.Run, read_json(path/"config.json"))
    assert run.name==path.name, "made with another configuration, data set or recipe than its name says: train it again"
    result = runs.Result(run, path)
    for split,m in result.metrics.items(): assert runs.measure(result.scores(split))==m
    assert len(result.history)==run.optim.epochs
    assert {"commit", "torch", "device", "seconds", "data", "recipe", "peak_memory_mb"} <= set(result.environment)

@pytest.mark.parametrize("profile,table", [("quick", "table1"), ("quick", "table2"), ("quick", "table3"), ("bench", "readings"), ("bench", "choices"), ("bench", "repaired")])
def test_table(profile, table):
    rows = read_table(table, profile)
    named = rows[rows.run!=""]
    assert len(named)>=24
    for r in named.itertuples():
        m = read_json(RUNS[0].parent.parent/r.run/"metrics.json")
        assert f"{m[r.split][r.stream][r.metric]:.6f}"==f"{r.value:.6f}", f"{table}: {r.variant} {r.metric}"

def test_systems():
    "The points of the plot of sixteen systems: accuracy from the runs, sizes from the networks."
    import pandas as pd
    from pcan.systems import SYSTEMS, bill
    t = pd.read_csv(RUNS[0].parent.parent.parent/"bench"/"figures"/"systems.csv")
    assert sorted(t.system)==sorted(s.label for s in SYSTEMS.values() if s.group)
    for r in t.itertuples():
        path = RUNS[0].parent.parent/r.run
        assert f"{read_json(path/'metrics.json')['test']['fused']['action_top1']:.6f}"==f"{r.value:.6f}"
        n, flops = bill(runs.from_dict(runs.Run, read_json(path/"config.json")))
        assert (n, f"{flops/1e9:.6f}")==(r.parameters, f"{r.gflops:.6f}"), f"{r.system}: the network has changed since it was trained"

def test_table1_has_all_rows():
    from pcan.report import paper_table
    rows = read_table("table1", "quick")
    assert set(rows.variant)=={"Majority class", *paper_table("table1").index}

@pytest.mark.parametrize("table", ["readings", "repaired"])
def test_differences(table):
    "The differences of a page, from the kept scores: its first row again, to the last digit."
    import pandas as pd
    from pcan.verdicts import difference, predictions
    row = pd.read_csv(RUNS[0].parent.parent.parent/"bench"/"tables"/f"{table}_differences.csv").query("metric=='f1_mean'").iloc[0]
    ours, theirs = row.pair.split(" − ")
    made = read_table(table, "bench")
    runs_of = lambda v: [runs.Result(runs.from_dict(runs.Run, read_json(RUNS[0].parent.parent/n/"config.json")), RUNS[0].parent.parent/n) for n in dict.fromkeys(made[made.variant==v].run)]
    p, q = ([predictions(r.scores("test")) for r in runs_of(v)] for v in (ours, theirs))
    d = difference(p, q, "f1_mean")
    assert (f"{100*d.value:.4f}", f"{100*d.lo:.4f}", f"{100*d.hi:.4f}", d.seeds)==(f"{row.value:.4f}", f"{row.lo:.4f}", f"{row.hi:.4f}", row.seeds)
