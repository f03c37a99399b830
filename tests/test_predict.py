"A video of one's own: the test path to the last bit, every kind of bad input, long, large, turned and odd videos."
import json, pickle
from dataclasses import replace
from fractions import Fraction
import numpy as np
import pytest, torch
from pcan import apply, predict as P, config, runs, submit
from pcan.checkpoint import WARNING, Card, Opened, pack
from pcan.data import Clip, read_split
from pcan.files import DataError, data_dir
from pcan.film import Film, open_film, sample
from pcan.pictures import contact_sheet, save, timeline
from pcan.predict import inputs, predict, windows
from pcan.saliency import grad_cam
from pcan.skeleton import LAYOUTS
from pcan.systems import SYSTEMS
from pcan.tree import MA52, ActionTree
from pcan.video import _reader_av, person_frames, video
from tinyset import frames_and_keypoints, write_video

SYNTH = Card("a-run", "PCAN", "synth/smoke", synthetic=True, seconds=.8)
def said(call, *args): return call([str(a) for a in args])

def network(system="pcan", card=SYNTH, scale=.6, **kw):
    "Random weights, made to answer differently to different clips."
    torch.manual_seed(1)
    run = config.make(system, "smoke", **kw)
    model, _ = SYSTEMS[system].build(run)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.Linear) and m.out_features==MA52.K_A: m.weight.mul_(scale/m.weight.std())
    return Opened(model.eval(), run, card)

@pytest.fixture(scope="module")
def opened(): return network()

@pytest.fixture(scope="module")
def smoke():
    runs.ensure_data("smoke", progress=False)
    return data_dir()/"synth"/"smoke"

@pytest.fixture
def file(tmp_path, opened):
    pack(opened.run, opened.model, opened.card, tmp_path/"net.safetensors")
    return tmp_path/"net.safetensors"

def rows(name, kp, score=None, size=(96,80), **more): # one entry of a pickle; kp: (M,T,V,2)
    return [dict(frame_dir=name, label=0, total_frames=kp.shape[1], img_shape=size, keypoint=kp, keypoint_score=np.ones(kp.shape[:3], np.float32) if score is None else score) | more]

def talk(folder, T=14, name="talk", joints=True, size=(96,80), fps=30): # a video and its joints
    frames, kp = frames_and_keypoints(1, 3, T, size)
    write_video(folder/f"{name}.mp4", frames, fps)
    if joints: (folder/f"{name}.pkl").write_bytes(pickle.dumps(rows(name, kp[None], size=size)))
    return folder/f"{name}.mp4"

# ---- the test path

@pytest.mark.parametrize("system,kw,spec", [("pcan", {}, {}), ("poseconv3d", dict(stream="pose"), {}), ("pcan", dict(reading="released"), dict(clips_test=3, test_size=48)), ("ctrgcn", dict(scale=.1), {}), ("tsn", {}, {})])
def test_the_test_path(smoke, system, kw, spec):
    "The same probabilities, to the last bit they are kept with, as the function that scores a whole split, from the same files."
    o = network(system, **kw)
    o = replace(o, run=replace(o.run, clip=replace(o.run.clip, **spec)))
    want, together = (submit.test_model(o.model, o.run, smoke, "val", batch=b) for b in (1, 26))
    poses = smoke/"MA-52_openpose_28kp"/"MA52_val.pkl"
    clips = read_split(smoke, "val")[::4]
    names, said = list(want["name"]), []
    for c in clips:
        p, i = predict(c.path, o, poses), names.index(c.name)
        w, = p.windows
        said.append(p.of()[0])
        for s,(action,_,body) in w.streams.items():
            if s=="fused": continue
            assert np.array_equal(np.float16(action), want[f"{s}_action"][i]), (c.name, s)
            assert np.allclose(action, together[f"{s}_action"][i], atol=1e-3)
            if f"{s}_body" in want: assert np.array_equal(np.float16(body), want[f"{s}_body"][i])
    assert np.ptp(said, 0).max()>.01, "a network that always says the same would pass anything"

def test_a_run_says_the_same_again(smoke, tmp_path, monkeypatch):
    "What `runs.score` kept when the run ended."
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    result = runs.get(config.make("pcan", "smoke"), progress=False)
    kept = result.scores("test")
    for c in read_split(smoke, "test")[:6]:
        p = predict(c.path, result.path, smoke/"MA-52_openpose_28kp"/"MA52_test.pkl")
        i = list(kept["name"]).index(c.name)
        for s in ("rgb", "pose"):
            said, was = p.there[0].streams[s][0], kept[f"{s}_action"][i].astype(np.float32)
            assert (was>0).sum()>=5 and np.abs(said-was)[was>0].max()<1e-3, "half precision"

def test_crops_in_pieces(smoke, opened):
    "Sixteen frames at a time give the crops of all at once."
    c = read_split(smoke, "val")[3]
    film, at = open_film(c.path), [5,5,0,23,7,*range(20)]
    assert np.array_equal(P.crops(film, c, opened.run.clip, None, 0, at), person_frames(c, opened.run.clip, at))

# ---- what there is to look at

def test_every_system(tmp_path):
    "Each row of Table 1, and the single streams of those that have them, on a drawn clip: text, JSON, pictures."
    for name in SYSTEMS:
        o = network(name)
        p = predict(sample("nodding", "smoke"), o)
        d = json.loads(json.dumps(p.as_dict()))
        assert len(d["actions"])==5 and abs(sum(b["probability"] for b in d["bodies"])-1)<1e-4, name
        assert d["inputs"]["used"]==list(o.sees) and str(p).count("─ ")==5 and WARNING in str(p)
        assert (d["actions"][0]["before"] is not None)==(name in ("pcan", "repaired")), name
        assert bool(d["prototypes"])==(name in ("pcan", "repaired")), name
        assert d["body_from"]==("classifier" if name in ("pcan", "repaired") else "tree") and ("no body classifier" in str(p))==(d["body_from"]=="tree"), name
    for name in ("pcan", "tsn", "ctrgcn", "b2c"):
        assert [f.name for f in save(predict(sample("nodding", "smoke"), network(name)), tmp_path/name)]==["prediction.json", "contact_sheet.png"]
    for s in ("rgb", "pose"):
        p = predict(sample(3, "smoke"), network("pcan", stream=s))
        assert list(p.windows[0].streams)==[s, "fused"] and np.array_equal(p.windows[0].streams[s][0], p.of()[0])
        contact_sheet(p)

def test_one_stream_of_two(opened):
    "Its word alone, with both inputs."
    f = sample("waving", "smoke")
    both, rgb = predict(f, opened), predict(f, opened, stream="rgb")
    assert np.array_equal(rgb.of()[0], both.windows[0].streams["rgb"][0]) and list(P._near(rgb, rgb.best))==["rgb"] and not rgb.absent
    with pytest.raises(ValueError, match="--stream: found 'flow'; this network sees rgb and pose, so expected rgb or pose or fused"): predict(f, opened, stream="flow")
    with pytest.raises(ValueError, match="this network sees pose, so expected pose or fused"): predict(f, network("ctrgcn"), stream="rgb")

def test_before_and_after(opened):
    "Softmax of the plain and of the rectified logits, by hand."
    f = sample("waving", "smoke")
    p, x = predict(f, opened), inputs(opened, f, f.people, 0, len(f))
    with torch.no_grad(): out = opened.model(*x)
    action, before, body = p.of()
    mean = lambda level: torch.stack([getattr(s, level)[0].softmax(0) for s in out.values()]).mean(0).numpy()
    for got,level in ((action, "final"), (before, "action"), (body, "body")): assert np.abs(got-mean(level)).max()<1e-6
    h = opened.model.heads["rgb"]
    want = torch.nn.functional.cosine_similarity(out["rgb"].match, h.P_a.P).numpy()
    assert p.rectified and np.abs(p.windows[0].nearest["rgb"]-want).max()<1e-5

def test_samples():
    a, b = sample(12, "smoke"), sample(MA52.actions[12], "smoke")
    assert a.name==b.name=="playing-objects" and np.array_equal(a.read([3]), b.read([3])) and "synthetic" in a.notes[0]
    for wrong in ("juggling", 52, "-1", ""):
        with pytest.raises(ValueError, match="expected a number below 52 or one of: shaking body"): sample(wrong, "smoke")

@pytest.mark.parametrize("system", ["pcan", "ctrgcn", "poseconv3d"])
def test_a_data_set_of_your_own(tmp_path, system):
    "Two actions under one body part, 17 joints: body parts then say nothing and are not shown, and nothing speaks of MA-52."
    coco, run = LAYOUTS["coco17"], config.make(system, "smoke")
    run = replace(run, data="mine", tree=ActionTree(("all",), ("yes", "no"), (0,0)), clip=replace(run.clip, skeleton=coco), net=replace(run.net, pose=replace(run.net.pose, in_channels=17)))
    model, _ = SYSTEMS[system].build(run)
    pack(run, model.eval(), Card("mine", "PCAN", "mine", clips=(3,4), seconds=.5), tmp_path/"mine.safetensors")
    v = talk(tmp_path, 40)
    with pytest.raises(DataError, match="found 28 joints; this network knows 17"): predict(v, tmp_path/"mine.safetensors")
    v.with_suffix(".pkl").write_bytes(pickle.dumps(rows("talk", frames_and_keypoints(1, 3, 40)[1][None,:,:17])))
    p = predict(v, tmp_path/"mine.safetensors")
    d = p.as_dict()
    assert p.sliding and d["bodies"]==[] and {a["name"] for a in d["actions"]}=={"yes", "no"} and d["label"]=="" and WARNING not in str(p)
    assert not any(line.startswith("all ") for line in str(p).splitlines()) and str(p).count("─ ")==2
    assert len(save(p, tmp_path/"out"))==3

# ---- a missing input

def test_no_joints(tmp_path, opened):
    v = talk(tmp_path, joints=False)
    with pytest.raises(DataError) as e: predict(v, opened)
    for way in ("pcan_pose talk.mp4", "--poses FILE.pkl", "--stream rgb"): assert way in str(e.value)
    with pytest.raises(DataError, match="Two ways on: `pcan_pose"): predict(v, network("ctrgcn"))
    p = predict(v, opened, stream="rgb")
    assert p.absent==("pose",) and "THE NETWORK WAS TRAINED WITH BOTH" in str(p) and p.as_dict()["inputs"]["missing"]==["pose"] and "TRAINED WITH BOTH" in p.as_dict()["notes"][0]
    x, pose = inputs(opened, p.film, None, 0, 14, absent=("pose",))
    assert pose.abs().max()==0 and x.abs().max()>0
    contact_sheet(p)
    alone = predict(v, network("tsn"))                                            # made for frames: nothing is missing
    assert not alone.absent and "TRAINED WITH BOTH" not in str(alone)

def test_joints_alone(tmp_path, opened):
    "For a network of the Pose stream; one that was trained with both says nothing without frames, so it is refused."
    v = talk(tmp_path)
    v.unlink()
    poses = v.with_suffix(".pkl")
    for stream in ("fused", "pose"):
        with pytest.raises(DataError, match="no frames, and this network wants them.*pcan_train --stream pose"): predict(poses, opened, stream=stream)
    for o in (network("ctrgcn"), network("pcan", stream="pose")):
        one, two = predict(poses, o), predict(v, o, poses)                        # the video is named, but not here
        assert not one.absent and "TRAINED WITH BOTH" not in str(one) and np.array_equal(one.of()[0], two.of()[0])
        contact_sheet(one)
    with pytest.raises(DataError, match="no such file"): predict(v, opened, poses)

def test_streams_that_do_not_talk(tmp_path):
    "Without laterals a stream is the same whatever the other gets."
    run = config.make("pcan", "smoke")
    run = replace(run, net=replace(run.net, lateral=False))
    o = Opened(SYSTEMS["pcan"].build(run)[0].eval(), run, SYNTH)
    v = talk(tmp_path)
    both, poses = predict(v, o, box=(0,0,80,80)), v.with_suffix(".pkl").rename(tmp_path/"joints.pkl")
    rgb = predict(v, o, stream="rgb", box=(0,0,80,80))
    assert rgb.absent==("pose",) and not rgb.notes and np.array_equal(rgb.of()[0], both.windows[0].streams["rgb"][0])
    assert predict(poses, o, stream="pose").absent==("rgb",)
    with pytest.raises(DataError, match="no joints"): predict(v, o)
    with pytest.raises(ValueError, match="so expected fused"): predict(v, network("b2c"), stream="rgb")

def test_box(tmp_path):
    "Made square around its middle; joints move along; outside the frame it is refused."
    o, v = network("tsn"), talk(tmp_path)
    p = predict(v, o, box=(10,20,40,80))
    assert p.box==(-5,20,55,80) and p.as_dict()["inputs"]["box"]==[-5,20,55,80]
    frames = video(Clip("talk", v, -1, np.zeros((14,1,2)), np.zeros((14,1)), (96,80)))
    assert not np.array_equal(p.of()[0], predict(v, o).of()[0])
    crop = np.zeros((60,60,3), np.uint8); crop[:,5:] = frames[0,20:80,:55]
    import cv2
    assert np.array_equal(P.crops(p.film, P.clip_of(p.film, None, 0, 14, 28), o.run.clip, p.box, 0, [0])[0], cv2.resize(crop, (36,36)))
    for wrong in ((40,20,10,80), (100,20,140,80), (-9,-9,-1,-1)):
        with pytest.raises(ValueError, match="--box: found .* of the 80 × 96 frame"): predict(v, o, box=wrong)

# ---- joints that do not belong

@pytest.mark.parametrize("change,words", [
    (lambda kp: rows("talk", kp[:,:9]), ["talk.mp4 has 14 frames", "joints of 9"]),
    (lambda kp: rows("talk", kp[:,:,:17]), ["found 17 joints", "knows 28 (nose, neck"]),
    (lambda kp: rows("talk", kp, size=(80,96)), ["frames of 80 × 96", "in frames of 96 × 80", "turned"]),
    (lambda kp: rows("talk", kp, np.zeros(kp.shape[:3], np.float32)), ["nobody is in the joints"]),
    (lambda kp: rows("talk", 0*kp), ["nobody is in the joints"]),
    (lambda kp: rows("talk", kp*np.nan), ["NaN or infinite"]),
    (lambda kp: rows("a", kp)+rows("b", kp), ["joints of 2 videos (a, b", "none of talk"]),
    (lambda kp: [], ["no entry"]),
    (lambda kp: 3, ["found int"]),
    (lambda kp: [3], ["a list of int"]),
    (lambda kp: [dict(frame_dir="talk")], ["found keys ['frame_dir']; expected also ['img_shape', 'keypoint']"]),
])
def test_joints_that_are_refused(tmp_path, opened, change, words, file, capsys):
    v = talk(tmp_path)
    v.with_suffix(".pkl").write_bytes(pickle.dumps(change(frames_and_keypoints(1, 3)[1][None])))
    with pytest.raises(DataError) as e: predict(v, opened)
    for w in words: assert w in str(e.value), str(e.value)
    assert said(apply.predict, v, "--checkpoint", file, "--out", tmp_path/"out")==2 and not (tmp_path/"out").exists()
    assert capsys.readouterr().err.count("\n")==1

def test_joints_that_are_taken(tmp_path, opened):
    "A frame or two too many or too few, a file of several videos, two people, a bare dict, another name, another scale: used, and said."
    v, (_, kp) = talk(tmp_path), frames_and_keypoints(1, 3)
    kp, good, base = kp[None], np.ones((1,14,28), np.float32), predict(tmp_path/"talk.mp4", opened).of()[0]
    def got(x, poses=tmp_path/"p.pkl"): poses.write_bytes(pickle.dumps(x)); return predict(v, opened, poses)
    same = lambda p: np.array_equal(p.of()[0], base)
    assert same(got(rows("talk", kp))) and same(got(rows("talk", kp)[0])) and same(got(dict(annotations=rows("x", kp*2)+rows("talk", kp))))
    p = got(rows("talk", np.concatenate([kp+20, kp]), np.concatenate([.3*good, good])))
    assert same(p) and p.people.persons==2 and "2 people in the joints" in str(p) and p.as_dict()["inputs"]["persons"]==2
    p = got(rows("elsewhere", kp)); assert same(p) and "the joints say they are of 'elsewhere'" in str(p)
    for T in (12, 16):
        p = got(rows("talk", frames_and_keypoints(1, 3, T)[1][None])); assert f"14 frames in the video, {T} in the joints" in str(p)
        assert p.windows[-1].last==min(T, 14)-1
    p = got(rows("talk", kp*2, size=(192,160))); assert np.abs(p.of()[0]-base).max()<.05   # found in frames twice as large

def test_nobody_for_a_while(tmp_path, opened):
    "Windows without a person say nothing and do not count."
    v, T = talk(tmp_path, 96), 96
    kp = frames_and_keypoints(1, 3, T)[1][None]
    score = np.ones((1,T,28), np.float32); score[:,30:70] = 0; kp[:,30:70] = 0
    v.with_suffix(".pkl").write_bytes(pickle.dumps(rows("talk", kp, score)))
    p = predict(v, opened, window=.8, stride=.4)
    there = [bool(w.streams) for w in p.windows]
    assert there==[True, True, True, False, True, True, True] or there.count(False)>=1
    d = p.as_dict()
    assert [w["person"] for w in d["windows"]]==there and all(not w["actions"] for w in d["windows"] if not w["person"]) and "nobody" in str(p)
    assert np.allclose(p.of()[0], np.mean([w.streams["fused"][0] for w in p.windows if w.streams], 0))
    timeline(p)

# ---- bad and odd videos

def remuxed(src, dst, change): # the same packets in another container
    import av
    with av.open(str(src)) as a, av.open(str(dst), "w") as b:
        s = a.streams.video[0]
        t = b.add_stream_from_template(s)
        change(t)
        for p in a.demux(s):
            if p.dts is not None: p.stream = t; b.mux(p)
    return dst

def sound(path):
    import av
    with av.open(str(path), "w") as f:
        s = f.add_stream("aac", rate=44100)
        a = av.AudioFrame.from_ndarray(np.zeros((1,44100), np.float32), format="fltp", layout="mono"); a.rate = 44100
        f.mux(s.encode(a)); f.mux(s.encode())

@pytest.mark.parametrize("name,make,words", [
    ("a.mp4", lambda p: None, "no such file"),
    ("a.mp4", lambda p: p.mkdir(), "no such file"),
    ("a.mp4", lambda p: p.write_bytes(b"hello"*100), "not a video"),
    ("a.mp4", lambda p: p.write_bytes(b""), "found an empty file"),
    ("a.txt", lambda p: p.write_text("talk"), "not a video"),
    ("a.mp4", sound, "found audio only, no picture"),
    ("a.mp4", lambda p: p.write_bytes(talk(p.parent).read_bytes()[:900]), "not a video"),
    ("a.pkl", lambda p: p.write_bytes(b"no pickle"), "not a readable pickle"),
])
def test_files_that_are_no_video(tmp_path, opened, file, name, make, words, capsys):
    path = tmp_path/name
    make(path)
    with pytest.raises(DataError) as e: predict(path, opened, stream="rgb")
    assert words in str(e.value) and str(path) in str(e.value)
    assert said(apply.predict, path, "--checkpoint", file)==2 and capsys.readouterr().err.startswith("pcan_predict: ")

def test_no_frames(tmp_path, opened):
    "A header that promises a video, and nothing behind it."
    import av
    with av.open(str(tmp_path/"z.mkv"), "w") as f:
        s = f.add_stream("libx264", rate=30); s.width = s.height = 64; s.pix_fmt = "yuv420p"
        f.start_encoding()
    with pytest.raises(DataError, match="no frame of it can be decoded|not a video"): predict(tmp_path/"z.mkv", opened, stream="rgb")

def test_one_frame(tmp_path, opened):
    v = talk(tmp_path, 1)
    p = predict(v, opened)
    assert "the video has one frame" in str(p) and len(p.windows)==1 and p.of()[0].shape==(52,)
    assert {f.name for f in save(p, tmp_path/"out")}=={"prediction.json", "contact_sheet.png"}

@pytest.mark.parametrize("angle", [90, 180, 270])
def test_turned(tmp_path, angle):
    "A telephone's video: upright here, upright in `pcan.video.video`, upright in PyAV's place."
    plain = talk(tmp_path, joints=False)
    turned = remuxed(plain, tmp_path/"turned.mp4", lambda s: s.set_display_rotation(angle))
    film, flat = open_film(turned), open_film(plain)
    assert film.size==((80,96) if angle in (90,270) else (96,80))
    x = film.read([0,7])
    assert np.array_equal(x, np.rot90(flat.read([0,7]), angle//90, (1,2)))
    clip = Clip("turned", turned, -1, np.zeros((14,1,2)), np.zeros((14,1)), film.size)
    assert np.array_equal(video(clip, [0,7]), x)
    assert np.array_equal(_reader_av(str(turned))[1]([0,7]), x)
    assert predict(turned, network("tsn")).film.size==film.size

def test_changing_frame_rate(tmp_path):
    "Times decide where a window ends."
    import av
    frames, t = frames_and_keypoints(1, 3, 60)[0], 0
    with av.open(str(tmp_path/"v.mp4"), "w") as f:
        s = f.add_stream("libx264", rate=30, options=dict(preset="veryfast", threads="1")); s.width, s.height, s.pix_fmt = 80, 96, "yuv420p"
        s.time_base = s.codec_context.time_base = Fraction(1, 1000)
        for i,x in enumerate(frames):
            y = av.VideoFrame.from_ndarray(x, format="rgb24"); y.pts, y.time_base = t, Fraction(1, 1000)
            f.mux(s.encode(y)); t += 20 if i<40 else 100                          # 50 a second, then 10
        f.mux(s.encode())
    film = open_film(tmp_path/"v.mp4")
    assert len(film)==60 and np.allclose(film.times[[1,40,59]], [.02,.8,2.7], atol=2e-3)
    p = predict(film, network("tsn"), window=.8, stride=.8)
    assert [(w.first, w.last) for w in p.windows][0]==(0,39) and all(w.end-w.start<1. for w in p.windows) and p.windows[-1].last==59
    assert np.allclose(_reader_av(str(tmp_path/"v.mp4"))[2](), film.times, atol=1e-6)

def test_large(tmp_path, opened):
    "4K: a handful of frames at a time, and the crop of a person in it."
    frames = np.full((4,2160,3840,3), 90, np.uint8); frames[:,700:1500,1500:2300] = 200
    write_video(tmp_path/"k.mp4", frames)
    kp = np.random.RandomState(0).uniform((1500,700), (2300,1500), (1,4,28,2)).astype(np.float32)
    (tmp_path/"k.pkl").write_bytes(pickle.dumps(rows("k", kp, size=(2160,3840))))
    p = predict(tmp_path/"k.mp4", opened)
    assert p.film.size==(2160,3840) and save(p, tmp_path/"out")

class Tape:
    "Ten minutes that are drawn when they are wanted; notes how much was wanted."
    def __init__(self): self.most, self.total = 0, 0
    def __call__(self, i): self.most, self.total = max(self.most, len(i)), self.total+len(i); return np.full((len(i),48,64,3), 99, np.uint8)

def test_long():
    "Ten minutes, a window at a time, never more than 16 frames in memory."
    tape = Tape()
    film = Film("long.mp4", np.arange(18000)/30, (48,64), tape)
    p = predict(film, network("tsn"), window=2., stride=10.)
    assert len(p.windows)==61 and p.windows[-1].last==17999 and tape.most<=16 and tape.total<=61*16
    assert "61 windows of 2 s, one every 10 s" in str(p)
    timeline(p)

def test_when_a_video_is_long():
    "Windows begin at one and a half of a training clip; the card says how long that is, else two seconds."
    film = lambda s: Film("x", np.arange(round(s*30))/30, (48,64), lambda i: np.zeros((len(i),48,64,3), np.uint8))
    o = network("tsn")
    assert not predict(film(1.2), o).sliding
    p = predict(film(1.3), o); assert p.sliding and (p.length, p.stride)==(.8, .4) and [w.start for w in p.windows]==[0., .4, .5]
    o = network("tsn", Card())
    assert not predict(film(3), o).sliding and predict(film(3.1), o).length==2.
    assert predict(film(1), o, window=.5).sliding
    for kw in (dict(window=0), dict(window=-1.), dict(window=1., stride=0.)):
        with pytest.raises(ValueError, match="expected more than 0"): predict(film(3), o, **kw)

def test_windows_cover_everything():
    rng = np.random.RandomState(0)
    for _ in range(200):
        n, fps = rng.randint(1, 400), rng.choice([10, 25, 29.97, 30, 60])
        times, length = np.arange(n)/fps, rng.uniform(.2, 3)
        spans = windows(times, length, length*rng.uniform(.1, 1))
        assert spans[0][0]==0 and spans[-1][1]==n and all(b>a for a,b in spans)
        assert all(c<=b and c>=a for (a,b),(c,d) in zip(spans, spans[1:])), "a frame is left out, or time runs backwards"
        assert all(b-a<=np.ceil(length*fps)+1 for a,b in spans)

# ---- Grad-CAM

def test_grad_cam(opened):
    "One map per frame, between 0 and 1, nothing left behind in the model, and other actions have other maps."
    f = sample("waving", "smoke")
    x = inputs(opened, f, f.people, 0, len(f))
    grads = [p.grad for p in opened.model.parameters()]
    a, b = (grad_cam(opened, *x, "rgb", k) for k in (3, 30))
    assert a.shape==(4,8,8) and a.min()>=0 and a.max()==1 and not np.array_equal(a, b)
    assert [p.grad for p in opened.model.parameters()]==grads and not any(m._forward_hooks for m in opened.model.modules())
    assert grad_cam(network("ctrgcn"), None, torch.rand(1,8,28,3), "pose", 3) is None
    with torch.no_grad(): w = opened.model.heads["rgb"].W1.weight[5].clone(); opened.model.heads["rgb"].W1.weight[5] = 0
    gamma, opened.model.heads["rgb"].gamma = opened.model.heads["rgb"].gamma, 0.
    assert grad_cam(opened, *x, "rgb", 5).max()==0, "a logit that depends on nothing"
    with torch.no_grad(): opened.model.heads["rgb"].W1.weight[5] = w
    opened.model.heads["rgb"].gamma = gamma

# ---- the command

def test_command(tmp_path, file, capsys, monkeypatch):
    "Each video gets a folder of its own; one that fails does not cost the others theirs; JSON is a line per video."
    monkeypatch.chdir(tmp_path)
    a, b = talk(tmp_path), talk(tmp_path/"other", 40)
    assert said(apply.predict, a, "no.mp4", b, "--sample", "nodding", "--checkpoint", file)==2
    got = capsys.readouterr()
    assert got.err=="pcan_predict: no.mp4: no such file; expected a video, or a pickle of joints (.pkl)\n"
    assert sorted(p.name for p in (tmp_path/"predictions").iterdir())==["nodding", "talk", "talk_2"] and got.out.count(WARNING)==3
    assert sorted(p.name for p in (tmp_path/"predictions"/"talk_2").iterdir())==["contact_sheet.png", "prediction.json", "timeline.png"]
    d = json.loads((tmp_path/"predictions"/"nodding"/"prediction.json").read_text())
    assert d["schema"]=="pcan-prediction-1" and d["label"]==WARNING and d["network"]["synthetic"] and "synthetic" in d["notes"][0]
    assert said(apply.predict, a, "--sample", "nodding", "--checkpoint", file, "--json")==0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [x["video"]["name"] for x in lines]==["talk.mp4", "nodding"] and lines[1]==d
    assert said(apply.predict, "--checkpoint", file)==2 and "expected a video, or --sample" in capsys.readouterr().err
    assert said(apply.predict, a, "--checkpoint", tmp_path/"none.safetensors")==2 and "no such file, folder or run" in capsys.readouterr().err

def test_the_schema_is_kept(opened):
    "Keys are only ever added: these stay."
    d = predict(sample("waving", "smoke"), opened).as_dict()
    assert set(d)>={"schema","label","notes","video","network","inputs","actions","bodies","prototypes","body_from","sliding","window","stride","windows"}
    assert set(d["video"])>={"name","frames","seconds","fps","width","height"} and set(d["network"])>={"system","run","data","synthetic"}
    assert set(d["inputs"])>={"stream","used","missing","keypoints","persons","box"}
    assert set(d["actions"][0])>={"id","name","body","probability","before"} and set(d["bodies"][0])>={"id","name","probability"}
    assert set(d["prototypes"]["rgb"][0])>={"id","name","cosine"} and len(d["prototypes"]["rgb"])==3
    assert set(d["windows"][0])>={"start","end","first_frame","last_frame","person","actions","bodies","prototypes"}

# ---- names that do harm

def test_a_name_that_leads_out_or_is_taken(tmp_path, file, opened, capsys):
    "Every prediction gets a folder of its own, below the one that was asked for."
    from types import SimpleNamespace as Bag
    from pcan.apply import _folder
    made = lambda name, n=1: Bag(film=Bag(name=name), as_dict=lambda: dict(video=dict(name=name, frames=n)))
    taken = set()
    names = [_folder(tmp_path, made(n), taken).name for n in ("a/x.mp4", "b/x.mp4", "x_2.mp4", "..", "...mp4", "$1 $2.mp4", "ünï.mp4")]
    assert names==["x", "x_2", "x_2_2", "clip", "clip_2", "1-2", "ünï"] and all(_folder(tmp_path, made(n), taken).parent==tmp_path for n in ("..", "/etc/passwd", "a/../../b"))
    (tmp_path/"y").mkdir(); (tmp_path/"y"/"prediction.json").write_text(json.dumps(made("y.mp4").as_dict()))
    assert _folder(tmp_path, made("y.mp4"), set()).name=="y" and _folder(tmp_path, made("y.mp4", 2), set()).name=="y_2", "what was said of another video stays"
    f = sample("waving", "smoke")
    f.name = "$c_1$ and $x^$"
    p = predict(f, opened)
    assert len(save(p, tmp_path/"o"))==2, "a name is no formula"

def test_one_that_fails_does_not_take_the_others_along(tmp_path, file, capsys):
    (tmp_path/"file").write_text("in the way")
    assert said(apply.predict, "--sample", "waving", "--sample", "nodding", "--checkpoint", file, "--out", tmp_path/"file")==2
    assert capsys.readouterr().err.count("pcan_predict:")==2

def test_a_drawn_clip_for_another_skeleton(tmp_path):
    from pcan.skeleton import LAYOUTS
    run = config.make("poseconv3d", "smoke", stream="pose")
    run = replace(run, clip=replace(run.clip, skeleton=LAYOUTS["coco17"]), net=replace(run.net, pose=replace(run.net.pose, in_channels=17)))
    model, _ = SYSTEMS[run.system].build(run)
    pack(run, model.eval(), SYNTH, tmp_path/"coco.safetensors")
    with pytest.raises(DataError, match="found 28 joints; this network knows 17"): predict(sample("waving", "smoke"), tmp_path/"coco.safetensors")

def test_a_smoke_run_says_so(opened):
    assert replace(SYNTH, smoke=True).label.startswith("SMOKE") and SYNTH.label in replace(SYNTH, smoke=True).label
