"A table, videos and skeletons of one's own become a data set that is read, trained on and reported."
import csv, json, pickle, shutil
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest
from pcan import own, runs
from pcan.data import SPLITS, inputs, open_video, people, read_split, validate
from pcan.files import DataError, read_json, write_json
from pcan.skeleton import LAYOUTS, Skeleton

ACTIONS = {"wave": "arm", "point": "arm", "kick": "leg"}

def moving(k, i, V=28, T=16, size=(96, 80)): # a skeleton whose joint 3+k moves: the action can be seen
    rng = np.random.RandomState(100*k+i)
    kp = rng.uniform(8, 40, (1, 1, V, 2)).repeat(T, 1)
    kp[0,:,3+k] += 6*np.sin(np.arange(T)/2)[:,None]
    return dict(img_shape=size, total_frames=T, keypoint=kp.astype(np.float32), keypoint_score=np.ones((1,T,V), np.float32))

def encode(path, T=16, size=(96, 80), container="mp4", codec="libx264", seconds=None, turn=0):
    "A film of T frames; `seconds`: when each is shown, `turn`: how a player is to turn it."
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as f:
        s = f.add_stream(codec, rate=25)
        s.height, s.width, s.pix_fmt = *size, "yuv420p"
        if turn: s.set_display_rotation(turn) if hasattr(s, "set_display_rotation") else pytest.fail("PyAV cannot write a turned film")
        for t in range(T):
            x = av.VideoFrame.from_ndarray(np.full((*size,3), 8*t, np.uint8), format="rgb24")
            if seconds is not None: x.pts, x.time_base = int(1000*seconds[t]), Fraction(1, 1000)
            f.mux(s.encode(x))
        f.mux(s.encode())
    return path

def written(folder, rows, header=("video", "action", "body", "subject")):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/"labels.csv", "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([header, *rows])
    return folder/"labels.csv"

def some(folder, n=8, V=28, filmed=True):
    "A table, its films and its skeletons: n clips of every action, four people."
    folder.mkdir(parents=True, exist_ok=True)
    rows, poses = [], []
    for k,(a,b) in enumerate(ACTIONS.items()):
        for i in range(n):
            name = f"{a} {i}"
            if filmed: encode(folder/"clips"/f"{name}.mp4")
            rows.append((name, a, b, f"P{i%4}"))
            poses.append(moving(k, i, V) | dict(frame_dir=name))
    (folder/"poses.pkl").write_bytes(pickle.dumps(dict(annotations=poses)))
    return written(folder, rows), folder/"clips", [folder/"poses.pkl"]

@pytest.fixture(scope="module")
def given(tmp_path_factory): return some(tmp_path_factory.mktemp("given"))

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PCAN_ROOT", str(tmp_path)); monkeypatch.setenv("PCAN_REPORTS", str(tmp_path/"reports"))
    return tmp_path

def raises(f, *words):
    with pytest.raises(DataError) as e: f()
    for w in words: assert w in str(e.value), str(e.value)

def test_read_back(given, root):
    labels, clips, poses = given
    to = own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False)
    found, who = validate(to, workers=1), people(to)
    assert found.ok and not found.notes, str(found)
    assert inputs(to)==("rgb", "pose") and len(who)==24
    seen = {s: {who[c.name] for c in read_split(to, s)} for s in SPLITS}
    assert all(seen.values()) and not (seen["train"] & seen["val"] | seen["train"] & seen["test"] | seen["val"] & seen["test"])
    c = next(c for c in read_split(to, "train") if c.name.startswith("kick"))
    assert c.label==2 and c.path.is_file()
    k = int(c.name.split("-")[1])
    assert np.array_equal(c.keypoint, moving(2, k)["keypoint"][0])

def test_twice_is_the_same_and_nothing_is_converted_again(given, root):
    labels, clips, poses = given
    to = own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False, longest=94)
    state = {p: (p.read_bytes(), p.stat().st_ino) for p in sorted(to.rglob("*.mp4"))}
    before = {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}
    own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False, longest=94)
    assert {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}==before
    assert {p: (p.read_bytes(), p.stat().st_ino) for p in sorted(to.rglob("*.mp4"))}==state

def test_interrupted_import_is_not_taken_for_a_whole_one(given, root, monkeypatch):
    labels, clips, poses = given
    to = own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False)
    done = []
    def stop(*a):
        done.append(a)
        if len(done)==5: raise KeyboardInterrupt
        return 16, (96, 80)
    monkeypatch.setattr(own, "take_video", stop)
    with pytest.raises(KeyboardInterrupt): own.make_dataset(labels, to, clips, poses, progress=False)
    raises(lambda: read_split(to, "train"), "train_list_videos.txt", "no such file")

@pytest.mark.parametrize("container,codec,name", [("matroska", "libx264", "x.mkv"), ("avi", "mpeg4", "x.avi"), ("mov", "libx264", "x.MOV")])
def test_other_containers_keep_every_frame(tmp_path, container, codec, name):
    source = encode(tmp_path/name, container=container, codec=codec)
    n, size = own.take_video(own.find_video(tmp_path, "x"), tmp_path/"out"/"x.mp4")
    m, read, _ = open_video(tmp_path/"out"/"x.mp4")
    assert (n, m, size)==(16, 16, (96, 80)) and source.is_file()
    assert np.abs(read(range(16)).mean((1,2,3))-8*np.arange(16)).max()<6          # in their order

def test_variable_rate_keeps_every_frame(tmp_path):
    encode(tmp_path/"x.mkv", container="matroska", seconds=np.cumsum([.02, .2]*8))
    n, _ = own.take_video(tmp_path/"x.mkv", tmp_path/"x.mp4")
    assert n==open_video(tmp_path/"x.mp4")[0]==16

def test_large_frames_are_made_smaller_and_keypoints_still_fit(tmp_path):
    encode(tmp_path/"x.mp4", size=(640, 480))
    n, size = own.take_video(tmp_path/"x.mp4", tmp_path/"y.mp4", longest=128)
    assert size==(640, 480) and open_video(tmp_path/"y.mp4")[1]([0]).shape[1:3]==(128, 96)

@pytest.mark.parametrize("rows,words", [
    ([("a", "wave", "arm", "")], ["one action only"]),
    ([("a", "wave", "arm", ""), ("a", "kick", "leg", "")], ["a: 2 rows"]),
    ([("a", "wave", "arm", ""), ("b", "wave", "leg", "")], ["'wave' is below 'arm' and 'leg'"]),
    ([("a", "wave", "", ""), ("", "kick", "leg", "")], ["2 problems", "row 2: no body", "row 3: no video"]),
    ([], ["no rows"])])
def test_tables_that_cannot_be(tmp_path, rows, words): raises(lambda: own.read_table(written(tmp_path, rows)), "labels.csv", *words)

def test_splits_of_the_table_are_kept(tmp_path):
    rows = own.read_table(written(tmp_path, [("a", "x", "train"), ("b", "y", "train"), ("c", "x", "val")], ("video", "action", "split")))
    assert own.choose_splits(rows)==["train", "train", "val"] and own.tree_of(rows).bodies==("all",)
    raises(lambda: own.read_table(written(tmp_path, [("a", "x", "train"), ("b", "y", "")], ("video", "action", "split"))), "1 of 2 rows have no split")
    raises(lambda: own.read_table(written(tmp_path, [("a", "x", "train"), ("b", "y", "dev")], ("video", "action", "split"))), "split 'dev'")
    raises(lambda: own.choose_splits([own.Row("a", "x", split="train"), own.Row("b", "y", split="val")]), "no training clip of y")
    raises(lambda: own.choose_splits([own.Row("a", "x", split="train"), own.Row("b", "y", split="train")]), "no val clip")
    raises(lambda: own.choose_splits(rows, val=.6, test=.5), "shares that leave something")

@pytest.mark.parametrize("people_", [0, 3, 5, 40])
def test_chosen_splits(people_):
    rng = np.random.RandomState(people_)
    rows = [own.Row(f"v{i}", f"a{i%4}", subject=f"P{rng.randint(people_)}" if people_ else "") for i in range(400)]
    splits = own.choose_splits(rows)
    share = {s: splits.count(s)/400 for s in SPLITS}
    assert min(share.values())>0 and (people_ in (3, 5) or abs(share["test"]-.2)<.06 and abs(share["val"]-.15)<.06), share
    if people_: assert len({(r.subject, s) for r,s in zip(rows, splits)})==len({r.subject for r in rows}), "a person is in two splits"
    assert own.choose_splits(rows[:400], test=0).count("test")==0
    more = own.choose_splits([*rows, own.Row("new", "a0", subject=rows[0].subject)])
    if not people_: assert np.mean([a!=b for a,b in zip(splits, more)])<.02, "one more clip turns the splits over"

def test_what_does_not_fit_is_said(given, root):
    labels, clips, poses = given
    read = pickle.loads(poses[0].read_bytes())["annotations"]
    def made(change):
        (root/"p.pkl").write_bytes(pickle.dumps([change(i, dict(r)) for i,r in enumerate(read)]))
        return lambda: own.make_dataset(labels, root/"data"/"x", clips, [root/"p.pkl"], progress=False)
    raises(made(lambda i,r: r | dict(img_shape=(80, 96))), "24 problems", "96 × 80", "turned")
    raises(made(lambda i,r: r | dict(frame_dir=f"other{i}")), "24 problems", "no skeleton of that name")
    raises(made(lambda i,r: r | moving(0, i, V=17)), "28 joints")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", clips, poses, joints="coco", progress=False), "coco17")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", root, poses, progress=False), "no such video below")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", progress=False), "neither videos nor skeletons")
    (root/"data"/"full").mkdir(parents=True); (root/"data"/"full"/"thesis.txt").write_text("mine")
    raises(lambda: own.make_dataset(labels, root/"data"/"full", clips, poses, progress=False), "found other files there")
    assert (root/"data"/"full"/"thesis.txt").read_text()=="mine"

@pytest.mark.parametrize("profile", ["smoke@../x", "smoke@", "smoke@a/b", "fast@mine"])
def test_profiles_that_are_none(profile):
    with pytest.raises(ValueError, match="profile: found"): runs.profile_of(profile)

def test_a_data_set_that_is_not_there(root): raises(lambda: runs.make("pcan", "smoke@nothing"), "no such folder", "pcan_own")

def test_names_of_runs_follow_the_data(given, root):
    labels, clips, poses = given
    for name in ("one", "two"): own.make_dataset(labels, root/"data"/name, clips, poses, test=.2 if name=="one" else 0, progress=False)
    a, b = (runs.make("pcan", f"smoke@{n}") for n in ("one", "two"))
    assert (a.split, b.split)==("test", "val"), "without a test split the val split is scored"
    assert a.name.startswith("pcan-smoke@one-s0-") and a.tree==b.tree and a.data=="one"
    assert runs.data_identity("one")!=runs.data_identity("two"), "other splits are other data"
    assert runs.from_dict(runs.Run, json.loads(json.dumps(asdict(a))))==a
    said = read_json(root/"data"/"one"/"dataset.json"); write_json(root/"data"/"one"/"dataset.json", said | dict(actions=["punt", *said["actions"][1:]]))
    assert runs.make("pcan", "smoke@one").name!=a.name, "renamed classes are other data"

def test_trains_and_reports(given, root):
    "The whole way: both systems on frames and skeletons, and the page about them."
    from pcan.site import make_reports
    labels, clips, poses = given
    own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False)
    for d in ("nbs", "settings.ini"):
        source = Path(__file__).resolve().parent.parent/d
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root/d)
    page = make_reports("smoke@mine", jobs=2).read_text(encoding="utf-8")
    assert page.count("<figure")>=4 and "kick" in page and "SMOKE" in page and "data/mine" in page
    for r in runs.own_runs("smoke@mine"):
        result = runs.get(r, progress=False)
        s = result.scores()
        assert s["fused_action"].shape[1]==3 and s["fused_body"].shape[1]==2 and len(set(s["subject"]))>=1
        assert runs.measure(s, r.tree)==result.metrics["test"]

@pytest.mark.parametrize("joints,V,system,stream", [("kinect25", 25, "ctrgcn", None), ("openpose25", 25, "2sagcn", None), ("coco17", 17, "pcan", "pose")])
def test_skeletons_alone_of_another_layout(tmp_path, root, joints, V, system, stream):
    "iMiGUE- and SMG-shaped: no videos, other joints, one level."
    labels, _, poses = some(tmp_path/"given", 4, V, filmed=False)
    rows = [r[:2] for r in csv.reader(open(labels))][1:]
    to = own.make_dataset(written(tmp_path/"given", rows, ("video", "action")), root/"data"/"bones", skeletons=poses, joints=joints, progress=False)
    assert validate(to).ok and inputs(to)==("pose",)
    r = runs.make(system, "smoke@bones", stream=stream)
    assert r.clip.skeleton==LAYOUTS[joints] and r.tree.bodies==("all",)
    m = runs.get(r, progress=False).metrics["test"]["fused"]
    assert m["body_top1"]==1 and 0<=m["action_top1"]<=1 and m["action_top5"]==1, m
    raises(lambda: runs.make("poseconv3d", "smoke@bones"), "no videos", "stream='pose'")

def test_frames_alone(given, root):
    labels, clips, _ = given
    to = own.make_dataset(labels, root/"data"/"films", clips, progress=False)
    assert validate(to, workers=1).ok and inputs(to)==("rgb",)
    raises(lambda: runs.make("ctrgcn", "smoke@films"), "no skeletons")
    assert set(runs.get(runs.make("tsn", "smoke@films"), progress=False).metrics)=={"val", "test"}

def test_command(given, root, capsys):
    from pcan.cli import own as command, train
    labels, clips, poses = given
    assert command([str(labels), "mine", "--videos", str(clips), "--skeletons", *map(str, poses)])==0
    assert "next: pcan_train pcan --profile quick@mine" in capsys.readouterr().out
    assert command([str(labels), "../mine", "--videos", str(clips)])==2 and "letters, digits" in capsys.readouterr().err
    assert command([str(labels), "mine2", "--videos", str(clips), "--skeletons", "none.pkl"])==2 and "none.pkl" in capsys.readouterr().err
