"A table, videos and skeletons of one's own become a data set that is read, trained on and reported."
import csv, json, os, pickle, shutil
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest
from pcan import config, own, runs
from pcan.data import SPLITS, inputs, people, read_split
from pcan.files import DataError, atomic, read_json, write_json
from pcan.skeleton import LAYOUTS
from pcan.validation import validate
from pcan.video import open_video

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
    before, films = {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}, {p: p.stat().st_ino for p in to.rglob("*.mp4")}
    own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False, longest=94)
    assert {p: p.read_bytes() for p in to.rglob("*") if p.is_file()}==before and {p: p.stat().st_ino for p in to.rglob("*.mp4")}==films
    own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False, longest=90)
    assert {p: p.stat().st_ino for p in to.rglob("*.mp4")}.keys()==films.keys() and open_video(next(iter(films)))[1]([0]).shape[1]==90

@pytest.mark.parametrize("longest", [1296, 90])
def test_a_new_table_gets_its_own_videos(tmp_path, root, longest):
    "Names of clips follow the table; a film of the same name, older or newer, is another film."
    grey = lambda path: int(open_video(path)[1]([0]).mean())
    for name,t in (("p1/nod.mp4", 2), ("p2/nod.mp4", 12)):
        encode(tmp_path/name, T=t+1)
        import av
        with av.open(str(tmp_path/name), "w") as f:
            s = f.add_stream("libx264", rate=25); s.height, s.width, s.pix_fmt = 96, 80, "yuv420p"
            for _ in range(16): f.mux(s.encode(av.VideoFrame.from_ndarray(np.full((96,80,3), 16*t, np.uint8), format="rgb24")))
            f.mux(s.encode())
    os.utime(tmp_path/"p2/nod.mp4", (1e9, 1e9))                                  # older than anything
    head = ("video", "action", "split")
    for rows in ([("p1/nod.mp4", "nod", "train"), ("p2/nod.mp4", "wave", "train")], [("p2/nod.mp4", "wave", "train"), ("p1/nod.mp4", "nod", "train")]):
        encode(tmp_path/"v.mp4")
        to = own.make_dataset(written(tmp_path, [*rows, ("v", "nod", "val")], head), root/"data"/"x", tmp_path, progress=False, longest=longest)
        light = {c.label: grey(c.path) for c in read_split(to, "train")}
        assert abs(light[0]-32)<4 and abs(light[1]-192)<4, (rows, light)
    own.make_dataset(written(tmp_path, [("p1/nod.mp4", "nod", "train"), ("p2/nod.mp4", "wave", "train"), ("v", "nod", "val")], head), to, tmp_path, progress=False)
    assert sorted(p.name for p in to.rglob("*.mp4"))==["nod-2.mp4", "nod.mp4", "v.mp4"] and (tmp_path/"p2/nod.mp4").is_file()

def test_interrupted_import_is_not_taken_for_a_whole_one(given, root, monkeypatch):
    labels, clips, poses = given
    to = own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False)
    done = []
    def stop(*a):
        done.append(a)
        if len(done)==5: raise KeyboardInterrupt
        return 16, (96, 80), .64
    monkeypatch.setattr(own, "take_video", stop)
    with pytest.raises(KeyboardInterrupt): own.make_dataset(labels, to, clips, poses, progress=False)
    raises(lambda: read_split(to, "train"), "not finished: run `pcan_own` again")   # some of its videos may be new by now
    lists = []
    def cut(path, *a):
        if str(path).endswith("_list_videos.txt"): lists.append(path)
        if len(lists)==3: raise KeyboardInterrupt
        return atomic(path, *a)
    monkeypatch.undo(); monkeypatch.setenv("PCAN_ROOT", str(root)); monkeypatch.setattr(own, "atomic", cut)
    with pytest.raises(KeyboardInterrupt): own.make_dataset(labels, to, clips, poses, progress=False)
    raises(lambda: read_split(to, "train"), "train_list_videos.txt", "not finished: run `pcan_own` again")

@pytest.mark.parametrize("container,codec,name", [("matroska", "libx264", "x.mkv"), ("avi", "mpeg4", "x.avi"), ("mov", "libx264", "x.MOV")])
def test_other_containers_keep_every_frame(tmp_path, container, codec, name):
    source = encode(tmp_path/name, container=container, codec=codec)
    n, size, _ = own.take_video(own.find_video(tmp_path, "x"), tmp_path/"out"/"x.mp4")
    m, read, _ = open_video(tmp_path/"out"/"x.mp4")
    assert (n, m, size)==(16, 16, (96, 80)) and source.is_file()
    assert np.abs(read(range(16)).mean((1,2,3))-8*np.arange(16)).max()<6          # in their order

def test_variable_rate_keeps_every_frame(tmp_path):
    encode(tmp_path/"x.mkv", container="matroska", seconds=np.cumsum([.02, .2]*8))
    n, _, seconds = own.take_video(tmp_path/"x.mkv", tmp_path/"x.mp4")
    assert 1.5<seconds<2
    assert n==open_video(tmp_path/"x.mp4")[0]==16

def test_large_frames_are_made_smaller_and_keypoints_still_fit(tmp_path):
    encode(tmp_path/"x.mp4", size=(640, 480))
    n, size, _ = own.take_video(tmp_path/"x.mp4", tmp_path/"y.mp4", longest=128)
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
    few = people_ in (3, 5)
    assert min(share.values())>0 and (few or abs(share["test"]-.2)<.06 and abs(share["val"]-.15)<.06), share
    if people_: assert len({(r.subject, s) for r,s in zip(rows, splits)})==len({r.subject for r in rows}), "a person is in two splits"
    assert own.choose_splits(rows, test=0).count("test")==0
    more = own.choose_splits([*rows, own.Row("new", "a0", subject=rows[0].subject)])
    if not people_: assert np.mean([a!=b for a,b in zip(splits, more)])<.02, "one more clip turns the splits over"

@pytest.mark.parametrize("seed", range(8))
def test_one_person_with_most_clips_is_trained_on(seed):
    rows = [own.Row(f"v{i}", f"a{i%2}", subject="P0" if i<80 else f"P{1+i%5}") for i in range(100)]
    splits = own.choose_splits(rows, seed=seed)
    assert {s for r,s in zip(rows, splits) if r.subject=="P0"}=={"train"} and {"val", "test"}<=set(splits)

@pytest.mark.parametrize("text,words", [
    ('video,action\na,nod\nz,"nod\nb,wave\nc,nod\n', ["quote"]), ('video,action\na,"nod\nding"\nb,x\n', ["line break"]),
    ("video,action\nx,a.mp4,nod\nb,y\n", ["row 2: more cells than columns"]), ("video,action,Action\na,b,c\n", ["'action' twice", "column action twice"][1:]),
    ("video,action\na," + "x"*200_000 + "\nb,y\n", ["quote"])])
def test_tables_that_a_spreadsheet_broke(tmp_path, text, words):
    (tmp_path/"labels.csv").write_text(text, encoding="utf-8")
    raises(lambda: own.read_table(tmp_path/"labels.csv"), "labels.csv", *words)

def test_what_a_spreadsheet_does_is_forgiven(tmp_path):
    (tmp_path/"labels.csv").write_text("sep=;\r\nvideo;action;body\r\na b.mp4;touching\u00a0nose;head\r\nc;touching  nose;head\r\nd;kick\t;leg\r\n", encoding="utf-8-sig")
    rows = own.read_table(tmp_path/"labels.csv")
    assert [r.video for r in rows]==["a b.mp4", "c", "d"] and own.tree_of(rows).actions==("touching nose", "kick")

def test_names_with_dots_are_different_clips(tmp_path, root):
    poses = [moving(k, i) | dict(frame_dir=f"person1.take{2*k+i}") for k in range(2) for i in range(2)]
    rows = [(f"person1.take{2*k+i}", "ab"[k], s) for k in range(2) for i,s in enumerate(("train", "val"))]
    (tmp_path/"p.pkl").write_bytes(pickle.dumps(poses))
    to = own.make_dataset(written(tmp_path, rows, ("video", "action", "split")), root/"data"/"x", skeletons=[tmp_path/"p.pkl"], progress=False)
    assert len({c.keypoint.tobytes() for s in ("train", "val") for c in read_split(to, s)})==4
    (tmp_path/"q.pkl").write_bytes(pickle.dumps(poses[:1]))
    raises(lambda: own.make_dataset(tmp_path/"labels.csv", to, skeletons=[tmp_path/"p.pkl", tmp_path/"q.pkl"], progress=False), "person1.take0: also in an earlier pickle")
    (tmp_path/"p.pkl").write_bytes(pickle.dumps(poses+poses[:1]))
    raises(lambda: own.make_dataset(tmp_path/"labels.csv", to, skeletons=[tmp_path/"p.pkl"], progress=False), "person1.take0: found the name twice")

def test_a_file_is_one_clip(tmp_path, root):
    for n in ("a", "b", "c"): encode(tmp_path/"clips"/f"{n}.mp4")
    table = lambda *rows: written(tmp_path, rows, ("video", "action", "split"))
    make = lambda rows: own.make_dataset(table(*rows), root/"data"/"x", tmp_path/"clips", progress=False)
    raises(lambda: make([("a.mp4", "x", "train"), ("a", "y", "train"), ("./b.mp4", "x", "val"), ("b", "y", "val")]), "2 problems", "a.mp4 and a: the same file", "./b.mp4 and b")
    raises(lambda: make([("a", "x", "train"), ("no1", "y", "train"), ("no2", "x", "val"), ("../labels.csv", "y", "val")]), "3 problems", "no1", "no2", "leaves")
    (tmp_path/"clips"/"link.mp4").symlink_to(encode(tmp_path/"store"/"far.mp4"))           # what a link points to may lie anywhere
    make([("a", "x", "train"), ("link", "y", "train"), ("clips\\..\\c.mp4".replace("clips\\..\\", ""), "x", "val")])

def test_classes_that_have_changed_are_not_scored(given, root):
    labels, clips, poses = given
    own.make_dataset(labels, root/"data"/"mine", skeletons=poses, progress=False)
    r = config.make("ctrgcn", "smoke@mine")
    path = runs.get(r, progress=False).path
    said = read_json(root/"data"/"mine"/"dataset.json"); write_json(root/"data"/"mine"/"dataset.json", said | dict(actions=["a punt", *said["actions"][1:]]))
    raises(lambda: config.clips_of(r, "val"), "other classes or joints")
    from pcan.submit import load_run, test_model
    model, run, _ = load_run(path)
    raises(lambda: test_model(model, run, root/"data"/"mine", "val"), "other classes or joints")
    from pcan.submit import data_of
    raises(lambda: data_of(path, "val"), "classes of its own", "Codabench")

@pytest.mark.parametrize("name", ["ma52", "MA52", "synth", "cache", "paper", "my set", "_x", "größe"])
def test_names_that_are_taken_or_none(given, root, name, capsys):
    from pcan.apply import own as command
    assert command([str(given[0]), name, "--videos", str(given[1])])==2
    assert "data set: found the name" in capsys.readouterr().err and not (root/"data").exists()

def test_a_first_import_that_was_interrupted_goes_on(given, root, monkeypatch):
    labels, clips, poses = given
    real, done = own.take_video, []
    def stop(*a):
        done.append(a)
        if len(done)==5: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(own, "take_video", stop)
    with pytest.raises(KeyboardInterrupt): own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False)
    assert validate(own.make_dataset(labels, root/"data"/"mine", clips, poses, progress=False), workers=1).ok

def test_what_does_not_fit_is_said(given, root):
    labels, clips, poses = given
    read = pickle.loads(poses[0].read_bytes())["annotations"]
    def made(change):
        (root/"p.pkl").write_bytes(pickle.dumps([change(i, dict(r)) for i,r in enumerate(read)]))
        return lambda: own.make_dataset(labels, root/"data"/"x", clips, [root/"p.pkl"], progress=False)
    raises(made(lambda i,r: r | dict(img_shape=(80, 96))), "24 problems", "96 × 80", "turned")
    raises(made(lambda i,r: r | dict(frame_dir=f"other{i}")), "24 problems", "no skeleton of that name")
    raises(made(lambda i,r: r | moving(0, i, V=17)), "28 joints", "as in coco17")
    raises(made(lambda i,r: r | dict(img_shape=(0, 0))), "img_shape (0, 0)")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", clips, poses, joints="coco", progress=False), "coco17")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", root, poses, progress=False), "24 problems", "no such video below")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", root/"none", poses, progress=False), "no such folder")
    raises(lambda: own.make_dataset(labels, root/"data"/"x", progress=False), "neither videos nor skeletons")
    (root/"data"/"full").mkdir(parents=True); (root/"data"/"full"/"thesis.txt").write_text("mine")
    raises(lambda: own.make_dataset(labels, root/"data"/"full", clips, poses, progress=False), "found other files there")
    assert (root/"data"/"full"/"thesis.txt").read_text()=="mine"

@pytest.mark.parametrize("profile", ["smoke@../x", "smoke@", "smoke@a/b", "fast@mine"])
def test_profiles_that_are_none(profile):
    with pytest.raises(ValueError, match="found"): config.profile_of(profile)

def test_a_data_set_that_is_not_there(root): raises(lambda: config.make("pcan", "smoke@nothing"), "no such folder", "pcan_own")

def test_names_of_runs_follow_the_data(given, root):
    labels, clips, poses = given
    for name in ("one", "two"): own.make_dataset(labels, root/"data"/name, clips, poses, test=.2 if name=="one" else 0, progress=False)
    a, b = (config.make("pcan", f"smoke@{n}") for n in ("one", "two"))
    assert (a.split, b.split)==("test", "val"), "without a test split the val split is scored"
    assert a.name.startswith("pcan-smoke@one-s0-") and a.tree==b.tree and a.data=="one"
    assert config.data_identity("one")!=config.data_identity("two"), "other splits are other data"
    assert config.from_dict(config.Run, json.loads(json.dumps(asdict(a))))==a
    said = read_json(root/"data"/"one"/"dataset.json"); write_json(root/"data"/"one"/"dataset.json", said | dict(actions=["punt", *said["actions"][1:]]))
    assert config.make("pcan", "smoke@one").name!=a.name, "renamed classes are other data"

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
    for r in config.own_runs("smoke@mine"):
        result = runs.get(r, progress=False)
        s = result.scores()
        assert s["fused_action"].shape[1]==3 and s["fused_body"].shape[1]==2 and set(s["subject"])<={f"P{i}" for i in range(4)}
        assert runs.measure(s, r.tree)==result.metrics["test"]

@pytest.mark.parametrize("joints,V,system,stream", [("kinect25", 25, "ctrgcn", None), ("openpose25", 25, "2sagcn", None), ("coco17", 17, "pcan", "pose")])
def test_skeletons_alone_of_another_layout(tmp_path, root, joints, V, system, stream):
    "iMiGUE- and SMG-shaped: no videos, other joints, one level."
    labels, _, poses = some(tmp_path/"given", 4, V, filmed=False)
    rows = [r[:2] for r in csv.reader(open(labels))][1:]
    to = own.make_dataset(written(tmp_path/"given", rows, ("video", "action")), root/"data"/"bones", skeletons=poses, joints=joints, progress=False)
    assert validate(to).ok and inputs(to)==("pose",)
    r = config.make(system, "smoke@bones", stream=stream)
    assert r.clip.skeleton==LAYOUTS[joints] and r.tree.bodies==("all",)
    m = runs.get(r, progress=False).metrics["test"]["fused"]
    assert m["body_top1"]==1 and 0<=m["action_top1"]<=1 and m["action_top5"]==1, m
    raises(lambda: config.make("poseconv3d", "smoke@bones"), "no videos", "stream='pose'")

def test_frames_alone(given, root):
    labels, clips, _ = given
    to = own.make_dataset(labels, root/"data"/"films", clips, progress=False)
    assert validate(to, workers=1).ok and inputs(to)==("rgb",)
    raises(lambda: config.make("ctrgcn", "smoke@films"), "no skeletons")
    assert set(runs.get(config.make("tsn", "smoke@films"), progress=False).metrics)=={"val", "test"}

def test_command(given, root, capsys):
    from pcan.apply import own as command
    labels, clips, poses = given
    assert command([str(labels), "mine", "--videos", str(clips), "--skeletons", *map(str, poses)])==0
    assert "next: pcan_train pcan --profile quick@mine" in capsys.readouterr().out
    assert command([str(labels), "../mine", "--videos", str(clips)])==2 and "letters, digits" in capsys.readouterr().err
    assert command([str(labels), "mine2", "--videos", str(clips), "--skeletons", "none.pkl"])==2 and "none.pkl" in capsys.readouterr().err
