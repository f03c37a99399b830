"Made again and compared: what counts as the same, without training anything; and that the reproducibility lists name files that exist."
import csv, shutil
import pytest
from pcan import cli, config, runs, verify as v
from pcan.scale import make_accelerator
from pcan.files import DataError, read_json, root, write_json
from pcan.report import METRICS

HERE = dict(python="3.11.7", torch="2.13.0", numpy="2.4.6", device="CPU, x86_64", vector="AVX512", threads=1, frames="decoded")
result = lambda **kw: {s: dict.fromkeys(METRICS, .5) | kw for s in ("rgb", "pose", "fused")}
outcomes = lambda now, exact, clips=400: {r.outcome for r in v.compare("by-hand", result(), now, clips, exact)}

@pytest.mark.parametrize("change,exact,expected", [
    (.5, True, {"equal"}), (.5, False, {"equal"}),
    (.5025, True, {"equal", "differs"}), (.5025, False, {"equal", "within"}),
    (.44, False, {"equal", "within"}), (.4375, False, {"equal", "differs"}), (.58, False, {"equal", "differs"})])
def test_compare(change, exact, expected): assert outcomes(result(action_top1=change), exact)==expected

def test_tolerance_depends_on_metric_and_clips():
    assert outcomes(result(action_f1_macro=.58), False)=={"equal", "within"}, "macro F1 may be further off"
    assert outcomes(result(f1_mean=.54), False, 1600)=={"equal", "differs"}, "more clips, less room"
    assert [v.tolerance(m, 1600) for m in ("body_f1_macro", "action_top5")]==[5, 3]

def test_other_streams_are_no_result_of_this_run():
    with pytest.raises(DataError, match="found streams fused, committed are fused, pose, rgb"): v.compare("by-hand", result(), {"fused": result()["fused"]}, 400, True)

@pytest.mark.parametrize("key", v.SAME)
def test_other_versions(key):
    assert v.apart(HERE, HERE)==[]
    assert v.apart(HERE, HERE | {key: "another"})==[key]
    assert v.apart({k: x for k,x in HERE.items() if k!=key}, HERE)==[key], "what is not said is not the same"
    assert v.apart(dict.fromkeys(v.SAME), dict.fromkeys(v.SAME))==list(v.SAME)

def test_chosen_runs():
    found = v.chosen()
    assert list(found.values())==["table1", "table2", "table2", "table3", "systems"], "PCAN is in two tables and made once"
    assert {r.system for r in found}=={"poseconv3d", "pcan", "stgcn"} and {r.seed for r in found}=={0} and {r.profile for r in found}=={"quick"}
    with pytest.raises(ValueError, match="found table9, expected names from table1, table2, table3, systems"): v.chosen(("table1", "table9"))

def test_a_finished_run_says_what_decides_its_bits():
    import torch
    said = runs.environment(torch.nn.Linear(1, 1), make_accelerator()) | dict(frames="drawn")
    assert v.apart(said, said)==[]

# ---- from shell to status, with a result that is only copied

@pytest.fixture
def again(tmp_path, monkeypatch):
    "A store with the committed PoseConv3D in it, and `get_all` that copies instead of training; the function says what training changes."
    run, here = config.make("poseconv3d", "quick"), tmp_path/"committed"
    assert (run.path/"metrics.json").exists()
    shutil.copytree(run.path, here/"runs"/run.name)
    write_json(here/"runs"/run.name/"environment.json", read_json(run.path/"environment.json") | dict(vector="AVX512"))
    monkeypatch.setenv("PCAN_REPORTS", str(here))
    def use(metrics=lambda m: m, **env):
        def copied(rs, jobs=None, progress=True):
            for r in rs:
                assert not r.path.exists() and here not in r.path.parents, "a store of its own, and empty"
                shutil.copytree(here/"runs"/r.name, r.path)
                write_json(r.path/"metrics.json", metrics(read_json(r.path/"metrics.json")))
                write_json(r.path/"environment.json", read_json(r.path/"environment.json") | env)
            return [runs.Result(r, r.path) for r in rs]
        monkeypatch.setattr(v, "get_all", copied)
    return use

def moved(points):
    def change(m):
        m["test"]["rgb"]["action_top1"] += points/100
        return m
    return change

@pytest.mark.parametrize("points,env,exact,status,said", [
    (0, {}, [], 0, "24 are equal, 0 within tolerance, 0 differ"), (1, {}, [], 1, "23 are equal, 0 within tolerance, 1 differ"),
    (1, dict(torch="2.12.0"), [], 0, "23 are equal, 1 within tolerance, 0 differ"), (1, dict(torch="2.12.0"), ["--exact"], 1, "1 differ"),
    (9, dict(vector="AVX2"), [], 1, "1 differ")])
def test_status(again, capsys, points, env, exact, status, said):
    again(moved(points), **env)
    assert cli.verify(["--tables", "table1", *exact])==status
    out = capsys.readouterr().out
    assert said in out
    assert ("rgb action_top1" in out)==bool(status), "other streams are shown where they differ"
    for k,x in env.items(): assert f"Equality was not asked for ({k}: " in out and f"{x} now): poseconv3d-quick-s0" in out

def test_without_a_committed_result(again, capsys, tmp_path):
    again()
    assert cli.verify(["--tables", "systems"])==2
    assert "found no result of stgcn-quick-s0-" in (err := capsys.readouterr().err) and "`pcan_train --table systems --profile quick` makes it" in err
    assert cli.verify(["--tables", "table1", "systems"])==0
    assert "stgcn-quick-s0-" in (out := capsys.readouterr().out) and "not checked" in out and "24 are equal" in out

def test_keep(again, capsys, tmp_path, monkeypatch):
    import os
    again(); before = os.environ["PCAN_REPORTS"]
    args = ["--tables", "table1", "--keep", str(tmp_path/"kept")]
    assert cli.verify(args)==0 and len(list((tmp_path/"kept"/"runs").iterdir()))==1 and os.environ["PCAN_REPORTS"]==before
    assert cli.verify(args)==2 and "expected an empty or a new folder" in capsys.readouterr().err

# ---- the lists of the page Reproducibility

def items():
    with open(root()/"data"/"reproducibility.csv", encoding="utf-8") as f: return list(csv.DictReader(f))

@pytest.mark.parametrize("item", items(), ids=lambda r: r["item"])
def test_item(item):
    assert item["answer"] in ("yes", "partly", "no") and item["why"].endswith(".") and item["evidence"]
    for e in item["evidence"].split(): assert (root()/e).exists(), e

def test_lists_are_whole():
    n = {}
    for r in items(): n[r["list"]] = n.get(r["list"], 0)+1
    assert n=={"Code completeness": 5, "Reproducibility": 15, "A replication's own": 5} and len({r["item"] for r in items()})==25
