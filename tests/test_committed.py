"What stands in reports/ is what its runs say: names, metrics and tables can be made again from the kept scores."
from pathlib import Path
import pytest
from pcan import config, runs
from pcan.files import root, read_json
from pcan.report import read_table

RUNS = sorted((Path(__file__).resolve().parent.parent/"reports"/"runs").glob("*/metrics.json"))
assert RUNS, "no committed runs"

@pytest.mark.parametrize("path", [p.parent for p in RUNS], ids=lambda p: p.name)
def test_run(path):
    run = config.from_dict(config.Run, read_json(path/"config.json"))
    assert run.name==path.name, "made with another configuration, data set or recipe than its name says: train it again"
    result = runs.Result(run, path)
    for split,m in result.metrics.items(): assert runs.measure(result.scores(split))==m
    assert len(result.history)==run.optim.epochs
    assert {"commit", "torch", "device", "seconds", "data", "recipe", "peak_memory_mb"} <= set(result.environment)
    assert result.environment["recipe"]==config.RECIPE, "made by an older recipe than its name says: train it again"

def test_faults_were_survived():
    "What `make test-faults` wrote: every fault was tried, none was fatal."
    import csv
    with open(root()/"reports"/"faults.csv", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    kills = sum(int(r["times"]) for r in rows if r["fault"].startswith("SIG"))
    assert kills>=20 and {"no room for a file", "a disk that fills up", "videos removed in mid-epoch", "a reading process killed"} <= {r["fault"] for r in rows}

@pytest.mark.parametrize("profile,table", [("bench", t) for t in ("table1", "table2", "table3", "readings", "choices", "repaired")])
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
        n, flops = bill(config.from_dict(config.Run, read_json(path/"config.json")))
        assert (n, f"{flops/1e9:.6f}")==(r.parameters, f"{r.gflops:.6f}"), f"{r.system}: the network has changed since it was trained"

def test_table1_has_all_rows():
    from pcan.audit import paper_table
    rows = read_table("table1", "bench")
    assert set(rows.variant)=={"Majority class", *paper_table("table1").index}

def predictions_of(label, profile="bench"):
    "Predictions of a row of Table 1, one per seed."
    from pcan.verdicts import predictions
    return [predictions(runs.get(r, progress=False).scores("test")) for r in config.plan("table1", profile)[label]]

def figure_data(name):
    "What the data of a figure of profile bench has to be, from the kept scores alone."
    import pandas as pd
    from pcan import errors, figures
    from pcan.tree import MA52
    base, ours = p = [predictions_of(k) for k in ("PoseConv3D", "PCAN")]
    by_name = dict(zip(("PoseConv3D", "PCAN"), p))
    if name=="figure3":
        halves = {"Same clips (the paper's way)": False, "Other half of the clips": True}
        return pd.concat([pd.DataFrame(dict(clips=k, group=figures.GROUPS, actions=n, PoseConv3D=a[0], PCAN=b[0])) for k,apart in halves.items() for n,a,b in [figures.difficulty(base, ours, apart)]])
    if name=="figure4": return pd.concat([figures.answers(k, by_name).assign(action=MA52.actions[k]) for k,_,_ in figures.ambiguous(base, ours)])[["action", "answer", "PoseConv3D", "PCAN"]]
    return dict(figure5=figures.changes, errors_confusion=lambda *_: errors.confusions(by_name))[name](base, ours)

@pytest.mark.parametrize("name", ["figure3", "figure4", "figure5", "errors_confusion"])
def test_figure(name):
    "A figure shows what its runs give: its CSV again, byte by byte; bars that are labelled bear these numbers."
    at = RUNS[0].parent.parent.parent/"bench"/"figures"
    assert (at/f"{name}.csv").read_text(encoding="utf-8")==figure_data(name).to_csv(index=False, float_format="%.6f", lineterminator="\n")
    drawing = (at/f"{name}.svg").read_text(encoding="utf-8")
    assert (at/f"{name}.png").stat().st_size>5000 and "<text" in drawing
    if name=="figure3":
        for v in figure_data(name)[["PoseConv3D", "PCAN"]].to_numpy().ravel(): assert f">{100*v:.1f}</text>" in drawing, v

@pytest.mark.parametrize("table", ["table1", "table2", "table3", "readings", "repaired"])
def test_differences(table):
    "The differences of a page, from the kept scores: its first row again, to the last digit."
    import pandas as pd
    from pcan.verdicts import difference, predictions
    row = pd.read_csv(RUNS[0].parent.parent.parent/"bench"/"tables"/f"{table}_differences.csv").query("metric=='f1_mean'").iloc[0]
    made = read_table(table, "bench")
    def scored(label): # predictions of a row, one per seed
        rows = made[made.variant==(label if label in set(made.variant) else label.strip("()"))]
        of = lambda n: runs.Result(config.from_dict(config.Run, read_json(RUNS[0].parent.parent/n/"config.json")), RUNS[0].parent.parent/n)
        return [predictions(of(n).scores("test"), rows.stream.iloc[0]) for n in dict.fromkeys(rows.run)]
    p, q = map(scored, row.pair.split(" − "))
    d = difference(p, q, "f1_mean")
    assert (f"{100*d.value:.4f}", f"{100*d.lo:.4f}", f"{100*d.hi:.4f}", d.seeds)==(f"{row.value:.4f}", f"{row.lo:.4f}", f"{row.hi:.4f}", row.seeds)
