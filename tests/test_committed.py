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

@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_table(table):
    rows = read_table(table, "quick")
    named = rows[rows.run!=""]
    assert len(named)>=24
    for r in named.itertuples():
        m = read_json(RUNS[0].parent.parent/r.run/"metrics.json")
        assert f"{m[r.split][r.stream][r.metric]:.6f}"==f"{r.value:.6f}", f"{table}: {r.variant} {r.metric}"
