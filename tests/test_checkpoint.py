"One file that holds a network: what goes in comes out, and what is wrong with a file is said."
import json
from dataclasses import replace
import pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file
from pcan import apply, checkpoint, config, runs
from pcan.checkpoint import Card, open_checkpoint, pack
from pcan.files import DataError
from pcan.model import RELEASED, pcan
from pcan.released import save
from pcan.rgbpose import PAPER, RGBPoseConv3D
from pcan.systems import SYSTEMS, shapes_of
from pcan.tree import MA52

CARD = Card("some-run", "PCAN", "synth/smoke", "ab"*32, True, (3,)*52, .8, {"val": {"fused": {"action_top1": .5}}}, 10, 2, "c"*40, {"torch": "2"}, "a note, with ümlaut")

@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path/"reports"))
    return tmp_path/"reports"

def built(system="pcan", **kw):
    torch.manual_seed(0)
    run = config.make(system, "smoke", **kw)
    return run, SYSTEMS[system].build(run)[0].eval()

def said(call, *args): return call([str(a) for a in args])

@pytest.mark.parametrize("system,kw", [("pcan", {}), ("pcan", dict(stream="pose")), ("pcan", dict(reading="released")), ("poseconv3d", {}), ("repaired", dict(vote=.5)),
                                       ("ctrgcn", {}), ("tsn", {}), ("manet", {}), ("swin", {})])
def test_round_trip(tmp_path, system, kw):
    "The same run, card and tensors; the same logits as before, exactly without halving."
    run, model = built(system, **kw)
    x = [None if s is None else torch.rand(s) for s in shapes_of(run).values()]
    before = torch.random.get_rng_state()
    with torch.no_grad(): want = model(*x)
    for half in (False, True):
        pack(run, model, CARD, tmp_path/"a.safetensors", half)
        o = open_checkpoint(tmp_path/"a.safetensors")
        assert (o.run, o.card)==(run, CARD) and not o.model.training and o.path==str(tmp_path/"a.safetensors")
        with torch.no_grad(): got = o.model(*x)
        for s in want: assert torch.allclose(want[s].final, got[s].final, atol=.05 if half else 1e-5), (system, half)
        if half: continue
        a, b = model.state_dict(), o.model.state_dict()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)
    assert torch.equal(before, torch.random.get_rng_state()), "opening a file moves nobody's random numbers"

def test_what_is_in_it(tmp_path):
    "Weights and buffers only, half where they are numbers with a point and fit; below 2 MB for the thin network."
    run, model = built()
    model.heads["rgb"].P_a.P.data[0,0] = 1e6                                     # too large for half precision
    pack(run, model, CARD, tmp_path/"a.safetensors")
    with safe_open(tmp_path/"a.safetensors", "pt") as f:
        kinds = {k: f.get_tensor(k).dtype for k in f.keys()}
        meta = f.metadata()
    assert set(kinds)==set(model.state_dict()) and meta["format"]==checkpoint.FORMAT
    assert kinds["heads.rgb.P_a.P"]==torch.float32 and kinds["heads.pose.P_a.P"]==torch.float16
    assert {v for k,v in kinds.items() if k.endswith("num_batches_tracked")}=={torch.int64}
    assert json.loads(meta["card"])["note"]=="a note, with ümlaut" and json.loads(meta["run"])["system"]=="pcan"
    assert sum(p.numel() for p in model.parameters())==682_678 and (tmp_path/"a.safetensors").stat().st_size<2e6
    assert open_checkpoint(tmp_path/"a.safetensors").model.heads["rgb"].P_a.P[0,0]==1e6

def rewritten(path, **changes):
    with safe_open(path, "pt") as f: tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())
    meta = {k: v for k,v in (meta | changes).items() if v is not None}
    save_file(tensors, path.with_name("b.safetensors"), metadata=meta)
    return path.with_name("b.safetensors")

@pytest.mark.parametrize("what,words", [
    (lambda p: p.with_name("none.safetensors"), "no such file, folder or run"),
    (lambda p: (p.write_bytes(p.read_bytes()[:1000]), p)[1], "not readable as safetensors"),
    (lambda p: (p.write_bytes(b""), p)[1], "not readable as safetensors"),
    (lambda p: rewritten(p, format=None), "found no format; expected a file of format 'pcan-1'"),
    (lambda p: rewritten(p, format="pcan-2"), "found format 'pcan-2'"),
    (lambda p: rewritten(p, format=None, state="{}"), "the weights of a training run, so give its folder"),
    (lambda p: rewritten(p, card="{"), "its header is not readable"),
    (lambda p: rewritten(p, run="{}"), "found a network of system None"),
    (lambda p: rewritten(p, run=json.dumps(dict(system="pcan9"))), "found a network of system 'pcan9'; this version knows tsn"),
    (lambda p: rewritten(p, run=json.dumps(dict(system="pcan", shoes=2))), "of another version of pcan (Run: unknown field shoes"),
    (lambda p: rewritten(p, run=json.dumps(dict(system="poseconv3d", profile="smoke"))), "do not fit the poseconv3d network"),
])
def test_files_that_are_refused(tmp_path, what, words, capsys):
    run, model = built()
    pack(run, model, CARD, tmp_path/"a.safetensors")
    file = what(tmp_path/"a.safetensors")
    with pytest.raises(DataError) as e: open_checkpoint(file)
    assert words in str(e.value) and str(file) in str(e.value)
    assert said(apply.pack, "--show", file)==2
    err = capsys.readouterr().err
    assert err.startswith("pcan_pack: ") and err.count("\n")==1

def test_no_network_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "default_checkpoint", lambda: tmp_path/"thin.safetensors")
    with pytest.raises(DataError, match="no network comes with this installation.*pcan_pack RUN --out FILE"): open_checkpoint()
    run, model = built()
    pack(run, model, CARD, tmp_path/"thin.safetensors")
    assert open_checkpoint().run==run

def test_the_authors_file(tmp_path):
    "A checkpoint of the released code, with its own test recipe."
    small = replace(PAPER, rgb=replace(PAPER.rgb, base=8, blocks=(1,1,1,1)), pose=replace(PAPER.pose, base=4, blocks=(1,1,1)), interaction=True)
    model, _ = pcan(RGBPoseConv3D(small), MA52, RELEASED)
    save(model, tmp_path/"small.pth")
    o = open_checkpoint(tmp_path/"small.pth")
    assert o.run.clip.clips_test==10 and o.run.clip.size(False)==256 and o.card.system=="PCAN (released)" and not o.card.label and o.sees==("rgb", "pose")

def test_from_a_run(reports, tmp_path, capsys, monkeypatch):
    "pcan_pack makes the file of a run, by name or folder, and shows its card; the run itself opens too."
    run = config.make("poseconv3d", "smoke", stream="pose")
    result = runs.get(run, progress=False)
    assert said(apply.pack, run.name, "--out", tmp_path/"n.safetensors", "--note", "for the test")==0
    out = capsys.readouterr().out
    a, b = open_checkpoint(tmp_path/"n.safetensors"), open_checkpoint(run.name)
    assert a.card==replace(b.card, note="for the test") and a.run==b.run==run
    assert a.card.run==run.name and a.card.synthetic and a.card.metrics==result.metrics and a.card.clips==(3,)*52 and a.card.seconds==.8
    assert a.card.recipe==config.RECIPE and a.card.data_sha==config.data_identity(run.data) and a.card.commit==result.environment["commit"]
    for words in (checkpoint.WARNING, run.name, "synthetic: drawn figures, no people", "for the test", f"{100*result.metrics['test']['fused']['action_top1']:.1f}%", "sees joints"): assert words in out, words
    assert checkpoint.WARNING in a._repr_markdown_() and "| network |" in a._repr_markdown_()
    assert said(apply.pack, "--show", tmp_path/"n.safetensors")==0 and capsys.readouterr().out in out
    with pytest.raises(DataError, match="give its folder"): open_checkpoint(result.path/"model.safetensors")
    (result.path/"model.safetensors").unlink()
    assert said(apply.pack, run.name)==2 and "the weights of this run are not here" in capsys.readouterr().err
    assert said(apply.pack)==2 and "expected a run, or --show" in capsys.readouterr().err

def test_the_card_of_another_data_set(tmp_path, monkeypatch):
    "Real data: clips per action from its list, where it is here; no warning."
    from tinyset import tiny_set
    monkeypatch.setenv("PCAN_ROOT", str(tmp_path))
    tiny_set(tmp_path/"data"/"mine", encode=False)
    run = replace(config.make("pcan", "smoke"), data="mine")
    (tmp_path/"run").mkdir()
    for n in ("environment", "metrics"): (tmp_path/"run"/f"{n}.json").write_text(json.dumps(dict(data=config.data_identity("mine")) if n=="environment" else {}))
    c = checkpoint.card_of(run, tmp_path/"run")
    assert c.clips[:4]==(3,2,2,0) and c.seconds==round(14/30, 3) and not c.synthetic and checkpoint.WARNING not in c.label
    other = json.dumps(dict(data="of another day")); (tmp_path/"run"/"environment.json").write_text(other)
    assert checkpoint.card_of(run, tmp_path/"run").clips==(), "the data set has changed since"
    assert checkpoint.card_of(replace(run, data="elsewhere"), tmp_path/"run").clips==()
