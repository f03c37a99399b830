"Scores of a model, and the file for Codabench."
import csv, io, os, pickle, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch
from pcan import cli, config, runs, submit
from pcan.augment import prepare
from pcan.clips import Clips
from pcan.data import read_list
from pcan.files import data_dir
from pcan.metrics import evaluate
from pcan.model import RELEASED, pcan
from pcan.released import load, save
from pcan.rgbpose import PAPER, RGBPoseConv3D, Sizes
from pcan.tree import MA52

@pytest.fixture(scope="module")
def smoke():
    config.ensure_data("smoke", progress=False)
    return data_dir()/"synth"/"smoke"

@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path/"reports"))
    return tmp_path/"reports"

def said(call, *args): return call([str(a) for a in args])

# ---- scores of a model

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A small network of the released build; its scores are made to differ between clips."
    torch.manual_seed(0)
    sizes = Sizes(replace(PAPER.rgb, base=8, blocks=(1,1,1,1)), replace(PAPER.pose, base=4, blocks=(1,1,1)), interaction=True)
    model, _ = pcan(RGBPoseConv3D(sizes), MA52, RELEASED)
    with torch.no_grad():
        for h in model.heads.values():
            for fc in (h.W1, h.W_b): fc.weight.mul_(200)
    path = tmp_path_factory.mktemp("weights")/"small.pth"
    save(model, path)
    return path

def test_released(checkpoint, smoke, reports, capsys):
    "What `pcan_test --released` prints is what its scores say, and what the network says when it is asked by hand."
    assert said(cli.test, "--released", checkpoint, "--split", "val", "--data", smoke, "--crop", 32, "--clips", 2, "--batch", 4)==0
    out = capsys.readouterr().out
    file = reports/"released"/"small"/"scores_val.npz"
    with np.load(file) as z: kept = dict(z)
    m = submit.metrics_of(kept)
    assert out.endswith(submit.metrics_text(m)+"\n") and set(m)=={"rgb", "pose", "fused"} and "52 clips" in out

    run = submit.released_run()
    assert (run.clip.size(False), run.clip.map_size(False), run.clip.side, run.clip.clips_test, run.clip.flip_fingers)==(256, 64, 256, 10, False)
    spec = replace(run.clip, test_size=32, side=32, clips_test=2, cache=False)
    data, model = Clips(smoke, "val", spec), load(checkpoint)
    with torch.no_grad():
        rows = []
        for i in range(len(data)):
            item = data[i]
            rgb, pose = prepare({k: torch.as_tensor(v)[None] for k,v in item.items()}, spec, False)
            assert rgb.shape==(2,3,8,32,32) and pose.shape==(2,28,32,8,8)
            rows.append({s: (z.final.softmax(1).mean(0), z.body.softmax(1).mean(0)) for s,z in model(rgb, pose).items()})
    stack = lambda s, level: torch.stack([r[s][level] for r in rows]).numpy()
    by_hand = {s: (stack(s,0), stack(s,1)) for s in ("rgb", "pose")}
    by_hand["fused"] = tuple(sum(by_hand[s][i] for s in ("rgb","pose"))/2 for i in (0,1))
    for s,(action,body) in by_hand.items():
        assert evaluate(dict(p_action=action, p_body=body), data.labels, None, MA52)==m[s], s
    assert len(set(by_hand["fused"][0].argmax(1)))>3, "a network that always says the same would pass anything"
    body = submit.with_fused(kept)["fused_body"]
    assert np.allclose(body, by_hand["fused"][1], atol=1e-3)

def test_a_run_again(smoke, reports, capsys):
    "A finished run whose weights are here: the same scores again, and those of another split on request."
    run = config.make("poseconv3d", "smoke", stream="pose")
    result = runs.get(run, progress=False)
    kept = (result.path/"scores_test.npz").read_bytes()
    assert said(cli.test, run.name, "--split", "test")==0
    out = capsys.readouterr().out
    assert submit.metrics_text(result.metrics["test"]) in out and "is there already" in out
    assert (result.path/"scores_test.npz").read_bytes()==kept
    (result.path/"scores_test.npz").unlink()
    assert said(cli.submit, run.name)==2 and f"pcan_test {run.name} --split test" in capsys.readouterr().err
    assert said(cli.test, run.name, "--split", "test")==0 and said(cli.submit, run.name, "--out", reports/"s.zip", "--score")==0
    printed = capsys.readouterr().out
    fused = result.metrics["test"]["fused"]
    assert f"{100*fused['action_top5']:17.2f}" in printed and f"{100*fused['f1_mean']:17.2f}" in printed and "bodies from the tree" in printed
    (result.path/"model.safetensors").unlink()
    assert said(cli.test, run.name)==2 and "the weights of this run are not here" in capsys.readouterr().err

def test_hidden_labels(smoke, reports, checkpoint, tmp_path, capsys):
    "The test split as MA-52 has it: no metrics, but a file."
    import shutil
    data = Path(shutil.copytree(smoke, tmp_path/"ma52", ignore=shutil.ignore_patterns("test_labels.txt", "train", "manifest.json")))
    few = data/"annotations"/"test_list_videos.txt"
    few.write_text("".join(few.read_text().splitlines(True)[:9]))
    args = ("--released", checkpoint, "--split", "test", "--data", data, "--crop", 32, "--clips", 1)
    assert said(cli.test, *args, "--out", tmp_path/"s.npz")==0 and "labels are hidden" in capsys.readouterr().out
    assert said(cli.submit, tmp_path/"s.npz", "--data", data, "--out", tmp_path/"s.zip")==0
    assert said(cli.submit, tmp_path/"s.npz", "--data", data, "--out", tmp_path/"s.zip", "--score")==2 and "labels are hidden" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path/"s.zip") as z:
        assert z.namelist()==["prediction.csv"]
        rows = list(csv.reader(io.StringIO(z.read("prediction.csv").decode())))
    assert rows[0]==["vid", *(f"action_pred_{i}" for i in range(1,6)), *(f"body_pred_{i}" for i in range(1,6))]
    assert [r[0] for r in rows[1:]]==[f"{n}.mp4" for n in read_list(few)]
    with np.load(tmp_path/"s.npz") as z: s = submit.with_fused(dict(z))
    for r,a,b in zip(rows[1:], s["fused_action"], s["fused_body"]):
        assert [a[int(i)] for i in r[1:6]]==sorted(a, reverse=True)[:5] and len(set(r[1:6]))==5
        assert [b[int(i)] for i in r[6:]]==sorted(b, reverse=True)[:5] and len(set(r[6:]))==5

@pytest.mark.parametrize("args,words", [
    ((), "expected a run, or --released"),
    (("no-such-run",), "no such run"),
    (("--released", "/no/such.pth"), "no such file"),
])
def test_mistakes_of_test(args, words, reports, capsys):
    assert said(cli.test, *args)==2
    err = capsys.readouterr().err
    assert err.startswith("pcan_test: ") and words in err and err.count("\n")==1

# ---- the file

@pytest.fixture
def listed(tmp_path):
    rng = np.random.RandomState(1)
    y = rng.randint(52, size=40)
    (tmp_path/"val_list_videos.txt").write_text("".join(f"0003_01_{i:04}.mp4 {k}\n" for i,k in enumerate(y)))
    return submit.listed("val", tmp_path/"val_list_videos.txt"), rng.randn(40,52) + 2*np.eye(52)[y]

def pickled(path, rows): path.write_bytes(pickle.dumps(rows)); return path

def test_fusion_from_the_command_line(listed, tmp_path, capsys):
    "Logits and probabilities together, with weights: what is done is said, and the file's metrics are those of the mean."
    clips, z = listed
    p = torch.as_tensor(z).softmax(1).numpy(); q = np.roll(p, 1, 1)
    a, b = pickled(tmp_path/"a.pkl", list(z)), pickled(tmp_path/"b.pkl", [dict(pred_score=torch.as_tensor(x), gt_label=torch.tensor([k])) for x,k in zip(q, clips.y_a)])
    assert said(cli.submit, a, b, "--weights", 3, 1, "--list", clips.path, "--split", "val", "--out", tmp_path/"s.zip", "--score")==0
    out = capsys.readouterr().out
    assert "a.pkl: scores: rows sum to" in out and "softmax applied" in out and "b.pkl" not in out and "bodies from the tree: a system has no body classifier" in out
    mean = .75*p + .25*q
    assert submit.metrics_text({"": evaluate(dict(p_action=mean), clips.y_a, None, MA52)}) in out
    first = (tmp_path/"s.zip").read_bytes()
    said(cli.submit, a, b, "--weights", 6, 2, "--list", clips.path, "--split", "val", "--out", tmp_path/"s.zip")
    assert (tmp_path/"s.zip").read_bytes()==first

def test_bodies(listed, tmp_path):
    "From the classifier, or from the tree on request; five different ones either way."
    clips, z = listed
    rng = np.random.RandomState(2)
    rows = [dict(pred_scores={"rgb": torch.as_tensor(x), "pose": torch.as_tensor(x), "rgb_coarse": torch.as_tensor(c), "pose_coarse": torch.as_tensor(c)}) for x,c in zip(z, rng.randn(40,7))]
    file = pickled(tmp_path/"r.pkl", rows)
    for body in ("classifier", "tree"):
        assert said(cli.submit, file, "--list", clips.path, "--split", "val", "--body", body, "--out", tmp_path/"s.zip")==0
        found = submit.check(tmp_path/"s.zip", clips)
        apart = sum(MA52.parents[a[0]]!=b[0] for a,b in found.rows.values())
        assert (apart==0)==(body=="tree") and all(len(set(b))==5 for _,b in found.rows.values())

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)

@pytest.mark.parametrize("rows,words", [
    (lambda z, t: [Evil(t/"ran")]*40, "neither a numpy array nor a plain container"),
    (lambda z, t: list(z[:39]), "found 39 rows; expected a list of 40"),
    (lambda z, t: list(z[:,:51]), "row 0, scores: found shape [51]; expected 52 numbers"),
    (lambda z, t: [*z[:7], z[7]*np.nan, *z[8:]], "row 7, scores"),
    (lambda z, t: 3, "found int; expected a list of 40"),
    (lambda z, t: [dict(pred_label=1)]*40, "expected pred_score or pred_scores"),
    (lambda z, t: [dict(pred_score=x, gt_label=0) for x in z], "expected the list's order"),
    (lambda z, t: [dict(pred_score=z[0])]*39+[dict(x=1)], "row 39"),
])
def test_pickles_that_are_refused(listed, tmp_path, capsys, rows, words):
    clips, z = listed
    file = pickled(tmp_path/"x.pkl", rows(z, tmp_path))
    assert said(cli.submit, file, "--list", clips.path, "--split", "val", "--out", tmp_path/"s.zip")==2
    err = capsys.readouterr().err
    assert words in err and "x.pkl" in err and not (tmp_path/"ran").exists() and not (tmp_path/"s.zip").exists()

# ---- the checker, on files of others

@pytest.fixture
def good(listed):
    clips, z = listed
    p = torch.as_tensor(z).softmax(1).numpy()
    return clips, submit.csv_text(clips, submit.combine([submit.Scored(p, None)])).splitlines()

def checked(tmp_path, clips, lines, capsys, name="prediction.csv"):
    (tmp_path/name).write_text("\n".join(lines)+"\n")
    status = said(cli.submit, "--check", tmp_path/name, "--list", clips.path, "--split", "val")
    return status, capsys.readouterr().out

def test_a_good_file(good, tmp_path, capsys):
    clips, lines = good
    status, out = checked(tmp_path, clips, lines, capsys)
    assert status==0 and "40 rows in order" in out and "0 problems" in out and "0 notes" in out
    assert checked(tmp_path, clips, [l.replace("\n", "\r\n") for l in lines], capsys)[0]==0

def cell(line, i, value): c = line.split(","); c[i] = value; return ",".join(c)

@pytest.mark.parametrize("change,words", [
    (lambda l: [l[0].replace("vid", "id"), *l[1:]], ["row 1: found id,", "expected vid,action_pred_1"]),
    (lambda l: l[1:], ["row 1: found 0003_01_0000.mp4", "missing: 0003_01_0000"]),
    (lambda l: l[:-1], ["missing: 0003_01_0039"]),
    (lambda l: l[:5], ["missing: 0003_01_0004", "missing: 26 more of 40"]),
    (lambda l: [*l, "9999_01_0001.mp4"+l[1][16:]], ["row 42: 9999_01_0001 is not in"]),
    (lambda l: [*l, l[3]], ["row 42: 0003_01_0002 again, it is in row 4 already"]),
    (lambda l: [l[0], l[2], l[1], *l[3:]], ["row 2: found 0003_01_0001; expected 0003_01_0000, the order of the list (2 rows"]),
    (lambda l: [*l[:4], cell(l[4], 2, "52"), *l[5:]], ["row 5, 0003_01_0003: found action 52; expected 0 to 51"]),
    (lambda l: [*l[:4], cell(l[4], 10, "-1"), *l[5:]], ["row 5, 0003_01_0003: found body -1; expected 0 to 6"]),
    (lambda l: [*l[:4], cell(l[4], 3, "1.0"), *l[5:]], ["row 5, 0003_01_0003: found '1.0'; expected whole numbers"]),
    (lambda l: [*l[:4], cell(l[4], 2, l[4].split(",")[1]), *l[5:]], ["row 5", "twice; expected five different"]),
    (lambda l: [*l[:4], l[4]+",3", *l[5:]], ["row 5, 0003_01_0003: found 12 columns; expected 11"]),
    (lambda l: [*l[:4], l[4].replace(".mp4", ""), *l[5:]], ["row 5: found '0003_01_0003'; expected '0003_01_0003.mp4'"]),
    (lambda l: [*l[:4], "", *l[4:]], ["row 5: empty"]),
    (lambda l: [], ["row 1: found nothing"]),
])
def test_a_bad_file(good, tmp_path, capsys, change, words):
    clips, lines = good
    status, out = checked(tmp_path, clips, change(lines), capsys)
    assert status==2, out
    for w in words: assert w in out, (w, out)

def test_what_is_odd_is_a_note(good, tmp_path, capsys):
    "Bodies that disagree with the action, and a body named twice, as in the organisers' own example."
    clips, lines = good
    other = (MA52.parents[int(lines[4].split(",")[1])]+1)%7
    status, out = checked(tmp_path, clips, [*lines[:4], ",".join([*lines[4].split(",")[:6], str(other), str(other), "0", "1", "2"]), *lines[5:]], capsys)
    assert status==0 and "1 rows name a body twice" in out and "1 of 40 rows have a first body that is not the parent" in out

def test_zips_of_others(good, tmp_path, capsys):
    clips, lines = good
    def zipped(**files):
        with zipfile.ZipFile(tmp_path/"s.zip", "w") as z: [z.writestr(n, c) for n,c in files.items()]
        status = said(cli.submit, "--check", tmp_path/"s.zip", "--list", clips.path, "--split", "val")
        got = capsys.readouterr()
        return status, got.out+got.err
    text = "\n".join(lines)
    assert zipped(**{"prediction.csv": text})[0]==0
    assert zipped(**{"out/prediction.csv": text})==(2, f"{tmp_path/'s.zip'}: 1 problem\n  out/prediction.csv: in a folder; expected prediction.csv at the top of the zip\n0 notes\n")
    status, out = zipped(**{"submission.csv": text}); assert status==2 and "found submission.csv; expected prediction.csv" in out
    (tmp_path/"s.zip").write_bytes(b"PK\x03\x04 cut short")
    assert said(cli.submit, "--check", tmp_path/"s.zip", "--list", clips.path)==2 and "not a zip" in capsys.readouterr().err
