"""Poses of one's own videos: what is decoded, what is kept, what comes back, and what is said when something is wrong.

What needs mmpose is marked `pose` and runs as a user would run it: the command, from this environment, into `.venv-pose`."""
import json, os, subprocess, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest
import torch
from pcan import apply, pose, video as reading, wholebody
from pcan.data import Clip, read_keypoints
from pcan.files import DataError, load_pickle
from pcan.pose import as_row, best, check_sheet, estimate, estimate_video, find_videos, fixed_box, read_video, part_path, settings_of, whole_frame, write_sheet
from pcan.skeleton import JOINTS, from_wholebody
from pcan.video import video
from pcan.wholebody import load_weights
from tinyset import write_video

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT/".venv-pose"/"bin"/"python"

def film(n=12, h=48, w=64, shift=3):
    "A green square that moves to the right."
    x = np.full((n,h,w,3), 30, np.uint8)
    for t in range(n): x[t, 8:16, 4+shift*t%(w-12):12+shift*t%(w-12)] = 0, 220, 0
    return x

def green(frames, boxes):
    "An estimator that sees: all points lie in the middle of the green square, the last one is not sure."
    out = np.zeros((*boxes.shape[:2], 133, 3), np.float32)
    for i,x in enumerate(frames):
        y, xx = np.nonzero((x[...,1]>120) & (x[...,0]<90))
        out[i,:,:,:2], out[i,...,2] = (xx.mean(), y.mean()), .8
    out[...,132,2] = .01
    return out
green.settings = dict(model="green")

def counted(f, most=10**9):
    "The estimator, with a list of the batches it saw; it breaks after so many frames."
    def g(frames, boxes):
        if sum(g.calls)+len(frames)>most: raise RuntimeError("out of memory")
        g.calls.append(len(frames))
        return f(frames, boxes)
    g.calls, g.settings = [], getattr(f, "settings", {})
    return g

@pytest.fixture
def films(tmp_path):
    for k in range(3): write_video(tmp_path/"films"/f"v{k}.mp4", film(12-k))
    return sorted((tmp_path/"films").iterdir())

def clip_of(path, row, size): # as the rest of the package sees it
    keypoint, score, img_shape = row
    return Clip(path.stem, path, -1, keypoint, score, img_shape)

# --- coordinates: the same as in the frames that training decodes

def rotated(path, degrees, frames):
    import av
    with av.open(str(path), "w") as f:
        s = f.add_stream("libx264", rate=30, options=dict(crf="12", preset="veryfast", threads="1")); s.height, s.width, s.pix_fmt = *frames.shape[1:3], "yuv420p"
        if degrees: s.set_display_rotation(degrees)
        for x in frames: f.mux(s.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        f.mux(s.encode())
    return path

@pytest.mark.parametrize("reader", ["decord", "av"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_videos(tmp_path, monkeypatch, degrees, reader):
    "Joints lie where `pcan.video.video` shows the square, whatever the file's note on how to turn it, with either reader."
    if reader=="av": monkeypatch.setitem(sys.modules, "decord", None)
    path, x = rotated(tmp_path/"v.mp4", degrees, film(h=108, w=130)), film(h=108, w=130)
    estimate([path], green, tmp_path/"p.pkl", batch=5)
    row = read_keypoints(tmp_path/"p.pkl")["v"]
    want = np.rot90(x, degrees//90, (1,2))
    assert row[2]==want.shape[1:3] and len(row[0])==len(x)
    seen = video(clip_of(path, row, want.shape))
    assert seen.shape==want.shape and np.abs(seen.astype(int)-want).mean()<6
    for t,f in enumerate(seen):
        y, xx = np.nonzero((f[...,1]>120) & (f[...,0]<90))
        assert np.allclose(row[0][t], (xx.mean(), y.mean()), atol=.01)

@pytest.mark.parametrize("reader", ["decord", "av"])
def test_changing_frame_rate(tmp_path, monkeypatch, reader):
    "As many frames as are stored, in their order, whatever their times."
    import av
    if reader=="av": monkeypatch.setitem(sys.modules, "decord", None)
    times = np.cumsum(np.random.RandomState(0).choice([17, 33, 100, 400], 20)).tolist()
    with av.open(str(tmp_path/"v.mp4"), "w") as f:
        s = f.add_stream("libx264", rate=30, options=dict(crf="12", threads="1")); s.height, s.width, s.pix_fmt = 48, 64, "yuv420p"
        s.codec_context.time_base = Fraction(1, 1000)
        for x,t in zip(film(20, shift=2), times):
            v = av.VideoFrame.from_ndarray(x, format="rgb24"); v.pts, v.time_base = t, Fraction(1, 1000)
            f.mux(s.encode(v))
        f.mux(s.encode())
    estimate([tmp_path/"v.mp4"], green, tmp_path/"p.pkl")
    keypoint, score, size = row = read_keypoints(tmp_path/"p.pkl")["v"]
    assert np.allclose(keypoint[:,0,0], 7.5+2*np.arange(20), atol=.6)
    assert len(video(clip_of(tmp_path/"v.mp4", row, size)))==20

def test_av_goes_forwards_and_back(films):
    n, read, _ = reading._reader_av(str(films[0]))
    whole = read(range(n))
    for i in ([0], [5,5,2], range(3,9), [11], [0,11], range(12)): assert np.array_equal(read(i), whole[list(i)])
    assert np.array_equal(whole, reading.open_video(films[0])[1](range(n)))

def test_one_frame(tmp_path):
    write_video(tmp_path/"one.mp4", film(1))
    done, = estimate([tmp_path/"one.mp4"], green, tmp_path/"p.pkl")
    assert (done.frames, done.nobody)==(1, 0) and read_keypoints(tmp_path/"p.pkl")["one"][0].shape==(1,28,2)

def test_a_large_film_goes_through_in_batches(tmp_path):
    "4K: no more frames than a batch are asked for together."
    write_video(tmp_path/"big.mp4", film(5, 2160, 3840))
    g = counted(lambda frames, boxes: np.ones((*boxes.shape[:2],133,3), np.float32))
    assert estimate_video(tmp_path/"big.mp4", g, batch=2)[2]==(2160, 3840) and g.calls==[2,2,1]

# --- into the pickle and back

def test_packing(films, tmp_path):
    labels = {"v1": 9}
    estimate(films, green, tmp_path/"p.pkl", labels=labels)
    rows = load_pickle(tmp_path/"p.pkl")
    assert [r["label"] for r in rows]==[-1, 9, -1] and [r["total_frames"] for r in rows]==[12, 11, 10]
    for r in rows:
        assert r["keypoint"].shape==(1,r["total_frames"],28,2) and r["keypoint_score"].shape==(1,r["total_frames"],28)
        assert r["keypoint"].dtype==r["keypoint_score"].dtype==np.float32 and r["img_shape"]==(48,64) and r["estimator"]=="green"
    little = JOINTS.index("r_little")
    assert np.allclose(rows[0]["keypoint_score"][...,little], .01) and (rows[0]["keypoint"][...,little,:]>0).all()     # unsure, and kept

def test_all_133_from_the_same_parts(films, tmp_path):
    g = counted(green)
    estimate(films, g, tmp_path/"p.pkl")
    small = load_pickle(tmp_path/"p.pkl"); g.calls.clear()
    estimate(films, g, tmp_path/"p.pkl", layout="wholebody")
    whole = load_pickle(tmp_path/"p.pkl")
    assert g.calls==[] and whole[0]["keypoint"].shape==(1,12,133,2)
    assert np.allclose(from_wholebody(whole[0]["keypoint"]), small[0]["keypoint"])
    with pytest.raises(DataError, match="133, 2"): read_keypoints(tmp_path/"p.pkl")

@pytest.mark.parametrize("name", ["my.clip.mp4", "with space.mp4", "ümlaut.MP4"])
def test_names(tmp_path, name):
    "The reader finds a video under the name its list gives it."
    path = tmp_path/name
    write_video(tmp_path/"x.mp4", film(3)); (tmp_path/"x.mp4").rename(path)
    estimate(find_videos([tmp_path]), green, tmp_path/"p.pkl")
    assert list(read_keypoints(tmp_path/"p.pkl"))==[path.stem]

def test_scores_end_at_one():
    p = np.full((4,1,133,3), 7., np.float32)
    assert as_row("a.mp4", p, (48,64))["keypoint_score"].max()==1
    assert as_row("a.mp4", p, (48,64), layout="wholebody")["keypoint_score"].max()==7

def test_a_score_that_is_not_above_zero_is_no_point(films):
    points = estimate_video(films[0], lambda f,b: np.full((*b.shape[:2],133,3), (5,5,-1), np.float32))[0]
    assert not points.any()

# --- whom

def test_nobody(films, tmp_path):
    "Frames without anybody are zeros with score 0, counted, and the estimator is not asked about a batch without anybody."
    def now_and_then(frames): return [b if x[8,40,1]<120 else np.zeros((0,5)) for b,x in zip(whole_frame(frames), frames)]
    g = counted(green)
    done = estimate(films[:1], g, tmp_path/"p.pkl", now_and_then, batch=1)[0]
    keypoint, score, _ = read_keypoints(tmp_path/"p.pkl")["v0"]
    empty = ~score.any(1)
    assert 0<empty.sum()==done.nobody<12 and not keypoint[empty].any() and (keypoint[~empty]>0).all()
    assert len(g.calls)==12-done.nobody and f"nobody in {done.nobody}" in str(done)

def test_nobody_at_all(films, tmp_path):
    done = estimate(films[:1], green, tmp_path/"p.pkl", lambda f: [[] for _ in f])[0]
    assert done.nobody==12 and done.score==0 and read_keypoints(tmp_path/"p.pkl")["v0"][0].shape==(12,28,2)

def test_people_best_first(films):
    "By score, in each frame; as many as the fullest frame has."
    left, right, third = (0,0,20,48), (30,0,64,48), (22,0,28,48)
    def detect(frames): return [np.array([(*left,.5), (*right,.9), (*third,.1)][:2+(t%2)]) for t in range(len(frames))]
    def corner(frames, boxes):
        out = np.full((*boxes.shape[:2],133,3), .5, np.float32); out[...,:2] = np.nan_to_num(boxes)[:,:,None,:2] + 1
        return out
    p, there, _ = estimate_video(films[0], corner, detect, people=5)
    assert p.shape==(12,3,133,3) and there.all()
    assert np.allclose(p[:,0,0,0], 31) and np.allclose(p[:,1,0,0], 1)
    assert np.allclose(p[1::2,2,0,0], 23) and not p[::2,2].any()
    one = estimate_video(films[0], corner, detect, people=1)[0]
    assert one.shape==(12,1,133,3) and np.array_equal(one[:,0], p[:,0])

def test_equal_scores_keep_their_order():
    assert np.array_equal(best([np.array([(0,0,5,5,.5), (1,1,6,6,.5)])], 2, (9,9))[0,:,0], [0,1])

@pytest.mark.parametrize("box,message", [((5,0,5,9), "x1 < x2"), ((0,9,5,3), "y1 < y2"), ((0,0,float("nan"),3), "x1 y1 x2 y2"), ((100,0,120,30), "outside its 64 × 48")])
def test_bad_boxes(films, tmp_path, box, message):
    with pytest.raises(DataError, match=message): estimate(films, green, tmp_path/"p.pkl", fixed_box(box))

# --- batches, interruptions, changes

@pytest.mark.parametrize("batch", [1, 5, 11, 12, 13, 100])
def test_batches_change_nothing(films, batch):
    g = counted(green)
    p = estimate_video(films[0], g, batch=batch)[0]
    assert np.array_equal(p, estimate_video(films[0], green)[0])
    assert sum(g.calls)==12 and max(g.calls)<=batch

@pytest.mark.parametrize("most,kept", [(11,0), (12,1), (20,1), (23,2), (32,2)])
def test_goes_on(films, tmp_path, most, kept):
    out = tmp_path/"p.pkl"
    with pytest.raises(RuntimeError, match="out of memory"): estimate(films, counted(green, most), out, batch=4)
    assert not out.exists() and [p.suffix for p in (tmp_path/"p.parts").rglob("*")]==[".npz"]*kept
    g = counted(green)
    done = estimate(films, g, out, batch=4)
    assert sum(g.calls)==33-sum([12,11,10][:kept]) and [d.was_there for d in done]==[True]*kept+[False]*(3-kept)
    g.calls.clear(); whole = out.read_bytes(); estimate(films, g, out)
    assert g.calls==[] and out.read_bytes()==whole

def test_what_is_estimated_again(films, tmp_path):
    g, out = counted(green), tmp_path/"p.pkl"
    again = lambda *a, **kw: (g.calls.clear(), estimate(films, g, out, *a, **kw), sum(g.calls))[2]
    assert again()==33 and again()==0 and again(batch=3)==0
    os.utime(films[0]); assert again()==0                                  # touched, not changed
    write_video(films[1], film(7)); assert again()==7
    assert again(fixed_box((0,0,60,40)))==12+7+10 and again(people=2)==29
    g.settings = dict(model="green", weights="others"); assert again()==29
    g.settings = green.settings; assert again()==0                         # the first ones are still there

def test_a_broken_part_is_named(films, tmp_path):
    estimate(films, green, tmp_path/"p.pkl")
    part = part_path(tmp_path/"p.pkl", films[1], settings_of(green, whole_frame, 1))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(DataError, match=f"{part.name}.*delete it and run"): estimate(films, green, tmp_path/"p.pkl")

def test_one_that_breaks_off_does_not_take_the_others_along(films, tmp_path, monkeypatch):
    real = reading.open_video
    def reader(path):
        n, read, times = real(path)
        def broken(i):
            if str(path).endswith("v1.mp4") and max(i)>6: raise RuntimeError("invalid data")
            return read(i)
        return n, broken, times
    monkeypatch.setattr(pose, "open_video", reader)
    with pytest.raises(DataError, match=r"1 of 3 videos failed.*\n.*v1.mp4: broken between frames 4 and 7 of 11"): estimate(films, green, tmp_path/"p.pkl", batch=4)
    assert not (tmp_path/"p.pkl").exists() and len(list((tmp_path/"p.parts").iterdir()))==2

@pytest.mark.parametrize("kw,message", [(dict(batch=0), "--batch: found 0"), (dict(people=0), "--people: found 0"), (dict(layout="17"), "--layout: found '17'")])
def test_bad_numbers(films, tmp_path, kw, message):
    with pytest.raises(DataError, match=message): estimate(films, green, tmp_path/"p.pkl", **kw)

@pytest.mark.parametrize("estimator,message", [(lambda f,b: np.zeros((len(f),1,17,3)), r"\[12, 1, 17, 3\]; expected \[12, 1, 133, 3\]"),
                                               (lambda f,b: np.full((len(f),1,133,3), np.nan), "NaN or infinite")])
def test_estimators_that_give_something_else(films, tmp_path, estimator, message):
    with pytest.raises(DataError, match=message): estimate(films[:1], estimator, tmp_path/"p.pkl")

# --- files that are no videos

def test_all_bad_files_are_named_before_anything_is_estimated(films, tmp_path):
    import av
    with av.open(str(tmp_path/"films"/"sound.mp4"), "w") as f:
        s = f.add_stream("aac", rate=44100, layout="mono")
        for i in range(9):
            a = av.AudioFrame.from_ndarray(np.zeros((1,1024), np.float32), format="fltp", layout="mono"); a.sample_rate, a.pts = 44100, 1024*i
            f.mux(s.encode(a))
        f.mux(s.encode())
    (tmp_path/"films"/"text.mp4").write_text("hello"*99); (tmp_path/"films"/"empty.mov").touch()
    (tmp_path/"films"/"cut.mp4").write_bytes(films[0].read_bytes()[:900])
    g = counted(green)
    with pytest.raises(DataError) as e: estimate(find_videos([tmp_path/"films"]), g, tmp_path/"p.pkl")
    said = str(e.value)
    assert g.calls==[] and "4 of 7 videos cannot be read" in said
    for part in ("sound.mp4: found audio only, no picture", "text.mp4: not a video", "empty.mov: found an empty file", "cut.mp4: not a video"): assert part in said, said

def test_a_picture_is_no_video(tmp_path):
    from PIL import Image
    Image.new("RGB", (64,64)).save(tmp_path/"a.jpg")
    with pytest.raises(DataError, match="a.jpg: no frame of it can be decoded"): read_video(tmp_path/"a.jpg")

def test_finding_videos(films, tmp_path):
    (tmp_path/"films"/"deep").mkdir(); films[0].rename(tmp_path/"films"/"deep"/"v9.MP4"); (tmp_path/"films"/"list.txt").touch()
    assert [p.name for p in find_videos([tmp_path/"films", films[1]])]==["v9.MP4", "v1.mp4", "v2.mp4"]
    with pytest.raises(DataError, match="no such file or folder"): find_videos([tmp_path/"nowhere"])
    with pytest.raises(DataError, match="found no video"): find_videos([])

# --- weights, names, the other environment

def test_random_weights_never_pass(films, tmp_path):
    g = counted(green); g.settings = dict(model="m", random_weights=True)
    estimate(films, g, tmp_path/"p.pkl")
    assert all(r["random_weights"] for r in load_pickle(tmp_path/"p.pkl"))
    with pytest.raises(DataError, match="random weights"): read_keypoints(tmp_path/"p.pkl")

def test_weights_of_another_model(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3,4), torch.nn.BatchNorm1d(4))
    state = {f"module.{k}": v for k,v in net.state_dict().items()}
    torch.save(dict(state_dict=state | {"teacher.w": torch.ones(2)}, meta=dict(dataset_meta=dict(sigmas=np.ones(3), n=np.float64(2)))), tmp_path/"w.pth")
    assert load_weights(net, tmp_path/"w.pth")==["teacher.w"]
    del state["module.1.bias"]; torch.save(state, tmp_path/"w.pth")
    with pytest.raises(DataError, match=r"1 of 7 tensors are missing.*1\.bias"): load_weights(net, tmp_path/"w.pth")

def test_a_checkpoint_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/"ran",))
    torch.save(dict(state_dict=Evil()), tmp_path/"w.pth")
    with pytest.raises(DataError, match="not readable as weights"): load_weights(torch.nn.Linear(1,1), tmp_path/"w.pth")
    assert not (tmp_path/"ran").exists()

def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"home"))
    (tmp_path/"m.pth").write_bytes(b"weights")
    assert wholebody.download((tmp_path/"m.pth").as_uri()).read_bytes()==b"weights"
    with pytest.raises(DataError, match="cannot be downloaded.*--weights"): wholebody.download((tmp_path/"none.pth").as_uri())

def test_devices():
    assert wholebody.device_of("cpu").type=="cpu"
    with pytest.raises(DataError, match="--device: found 'gpu'"): wholebody.device_of("gpu")

def test_starts_again_where_mmpose_is(tmp_path, monkeypatch):
    gone = []
    monkeypatch.setattr(wholebody.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wholebody, "root", lambda: tmp_path)
    monkeypatch.setattr(wholebody.os, "execv", lambda *a: gone.append(a) or (_ for _ in ()).throw(SystemExit))
    with pytest.raises(DataError, match="make pose-env.*is not there"): wholebody.enter(["a.mp4"])
    python = tmp_path/".venv-pose"/"bin"/"python"; python.parent.mkdir(parents=True); python.touch()
    with pytest.raises(SystemExit): wholebody.enter(["a.mp4", "--batch", "4"])
    assert gone==[(python, [str(python), "-m", "pcan.cli", "pose", "a.mp4", "--batch", "4"])]
    monkeypatch.setattr(wholebody.sys, "prefix", str(tmp_path/".venv-pose"))
    with pytest.raises(DataError, match="without mmpose: delete it first"): wholebody.enter(["a.mp4"])   # and not for ever in a circle
    assert len(gone)==1

def test_stand_ins_fail_loudly_and_step_aside(monkeypatch):
    kept = dict(sys.modules)
    here = type(sys)("torchvision.transforms"); here.ToPILImage = "the real one"
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision")); monkeypatch.setitem(sys.modules, "torchvision.transforms", here)
    try:
        missing = wholebody._stand_ins()
        assert missing==[m for m in wholebody._WANTED if m!="torchvision.transforms"] and sys.modules["torchvision.transforms"] is here
        from mmcv.ops import MultiScaleDeformableAttention
        with pytest.raises(RuntimeError, match="install the full mmcv"): MultiScaleDeformableAttention()
    finally:
        for m in set(sys.modules)-set(kept)-{"torchvision", "torchvision.transforms"}: del sys.modules[m]

def test_mmdet_missing():
    with pytest.raises(DataError, match="--detector: mmdet cannot be used here.*--box"): wholebody.mmdet_detector("rtmdet-m")

def test_boxes_from_mmdet(tmp_path, monkeypatch):
    "People only, above the least score, from BGR frames; mmdet itself is played by a stand-in with its signatures."
    from types import ModuleType, SimpleNamespace as N
    net, seen = torch.nn.Linear(1, 1), []
    net.dataset_meta, net.cfg = dict(classes=("dog", "person")), "steps"
    def inference_detector(model, imgs):
        assert model.cfg=="mmdet.steps"; seen.extend(imgs)
        p = N(bboxes=np.array([(0,0,9,9), (1,1,8,8), (2,2,7,7), (3,3,6,6)], np.float32), scores=np.array([.99, .4, .8, .2], np.float32), labels=np.array([0, 1, 1, 1]))
        return [N(pred_instances=N(cpu=lambda: N(numpy=lambda: p))) for _ in imgs]
    fakes = {"mmdet": {}, "mmdet.apis": dict(init_detector=lambda config, checkpoint, device: net, inference_detector=inference_detector),
             "mmpose": {}, "mmpose.utils": dict(adapt_mmdet_pipeline=lambda cfg: f"mmdet.{cfg}")}
    for name,what in fakes.items():
        m = ModuleType(name); vars(m).update(what); monkeypatch.setitem(sys.modules, name, m)
    monkeypatch.setattr(wholebody, "model_index", lambda package: ([], tmp_path))
    (tmp_path/"d.py").touch(); torch.save(net.state_dict(), tmp_path/"d.pth")
    with pytest.raises(DataError, match="expected --detector-weights"): wholebody.mmdet_detector(str(tmp_path/"d.py"))
    detect = wholebody.mmdet_detector(str(tmp_path/"d.py"), tmp_path/"d.pth", "cpu")
    x = film(2); x[0,0,0] = 1, 2, 3
    boxes = best(detect(x), 3, (48,64))
    assert np.array_equal(boxes[0,:2], [(2,2,7,7), (1,1,8,8)]) and np.isnan(boxes[:,2]).all()
    assert seen[0][0,0].tolist()==[3,2,1] and detect.settings["detector"]=="d"

@pytest.mark.parametrize("args,message", [(["v.mp4", "--random-weights", "--weights", "w.pth"], "not both"), (["v.mp4", "--box", "1", "2", "3", "4", "--detector", "d"], "not both"),
                                          (["nowhere"], "no such file or folder")])
def test_the_command_says_what_is_wrong(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert apply.pose(args)==2 and message in capsys.readouterr().err

def test_the_command(films, tmp_path, capsys, monkeypatch):
    "With another estimator in mmpose's place: labels, sheets, and what is printed."
    monkeypatch.setattr(wholebody, "enter", lambda argv: None)
    monkeypatch.setattr(wholebody, "mmpose_estimator", lambda *a: green)
    (tmp_path/"list.txt").write_text("v0.mp4 3\nv2.mp4 51\n")
    assert apply.pose([str(tmp_path/"films"), "--out", str(tmp_path/"p.pkl"), "--labels", str(tmp_path/"list.txt"), "--sheet", str(tmp_path/"sheets")])==0
    assert [r["label"] for r in load_pickle(tmp_path/"p.pkl")]==[3, -1, 51]
    said = capsys.readouterr().out
    assert "v1.mp4: 11 frames, 64 × 48, 1 person at most" in said and "sheets to check by eye" in said and "3 videos: " in said
    assert sorted(p.name for p in (tmp_path/"sheets").iterdir())==["v0.png", "v1.png", "v2.png"]

def test_sheet(films, tmp_path):
    estimate(films, green, tmp_path/"p.pkl", layout="wholebody")
    rows = load_pickle(tmp_path/"p.pkl")
    from PIL import Image
    assert Image.open(write_sheet(films[0], rows[0], tmp_path/"s", moments=8)).size==(4*320, 2*240)
    x, kp = film(2), np.full((1,2,28,2), 20., np.float32)
    blank, drawn = (check_sheet(x, kp, np.full((1,2,28), s, np.float32)) for s in (0., .5))
    assert blank.shape==(240, 640, 3) and not np.array_equal(blank, drawn)

# --- the real thing: `make test-pose`

def command(*args, **env):
    assert PYTHON.is_file(), f"{PYTHON} is not there: make pose-env"
    return subprocess.run([sys.executable, "-m", "pcan.cli", "pose", *map(str, args)], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"PCAN_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)} | env)

def in_pose_env(code, *args):
    assert PYTHON.is_file(), f"{PYTHON} is not there: make pose-env"
    r = subprocess.run([str(PYTHON), "-c", code, *map(str, args)], capture_output=True, text=True, timeout=900, env=os.environ | {"PCAN_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)})
    assert r.returncode==0, r.stderr[-3000:]
    return r.stdout

@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A short clip of the synthetic benchmark."
    from pcan.render import write_mp4
    from pcan.synth import clip
    path, c = tmp_path_factory.mktemp("pose")/"wave.mp4", clip("smoke", "val", 0)
    write_mp4(path, c.frames[:6])
    return path

@pytest.mark.pose
def test_a_real_model(short, tmp_path):
    "From this environment into the other and back: 28 joints of every frame, marked as what they are; the second call only reads."
    args = short, "--out", tmp_path/"p.pkl", "--random-weights", "--batch", "4", "--sheet", tmp_path/"s"
    r = command(*args)
    assert r.returncode==0, r.stderr[-3000:]
    assert "RANDOM WEIGHTS" in r.stdout and "wave.mp4: 6 frames, 108 × 130" in r.stdout and (tmp_path/"s"/"wave.png").is_file()
    row, = load_pickle(tmp_path/"p.pkl")
    assert row["random_weights"] is True and row["estimator"]==wholebody.MODEL
    assert row["keypoint"].shape==(1,6,28,2) and np.isfinite(row["keypoint"]).all() and (row["keypoint_score"]>0).any()
    with pytest.raises(DataError, match="random weights"): read_keypoints(tmp_path/"p.pkl")
    r = command(*args)
    assert r.returncode==0 and "kept from an earlier run" in r.stdout

@pytest.mark.pose
def test_as_mmpose_itself_does_it(short):
    "Batches of several frames and boxes give what mmpose gives for each frame alone; its names of the points are those we map."
    said = json.loads(in_pose_env("""
import json, sys, numpy as np
from pcan import pose, wholebody
from pcan.skeleton import WHOLEBODY
seen = {}
estimate = wholebody.mmpose_estimator(random=True)
film, read = pose.read_video(sys.argv[1]); x = read(range(5)); h, w = film.size
boxes = np.array([[(0,0,w,h), (10,5,w-20,h-9)]]*5, np.float32); boxes[2,1] = np.nan
ours = estimate(x, boxes)
from mmpose.apis import inference_topdown, init_model
import torch; torch.manual_seed(0)
path, _ = wholebody.choose_model(wholebody.MODEL, *wholebody.model_index('mmpose')); model = init_model(str(path), None, 'cpu')
worst = 0
for i in range(5):
    for m in range(2):
        if np.isnan(boxes[i,m,0]): assert not ours[i,m].any(); continue
        p = inference_topdown(model, x[i][...,::-1].copy(), boxes[i,m][None])[0].pred_instances
        worst = max(worst, np.abs(ours[i,m,:,:2]-p.keypoints[0]).max(), np.abs(ours[i,m,:,2]-p.keypoint_scores[0]).max())
names = model.dataset_meta['keypoint_id2name']
print(json.dumps(dict(worst=float(worst), spread=float(ours[...,0].std()), names=[[names[i] for i in p] for p in WHOLEBODY])))
""", short).splitlines()[-1])
    assert said["worst"]<.05 and said["spread"]>1, said
    fingers = dict(thumb="thumb4", index="forefinger4", middle="middle_finger4", ring="ring_finger4", little="pinky_finger4")
    full = lambda n: n if n=="nose" else {"l":"left_", "r":"right_"}[n[0]]+fingers.get(n[2:], n[2:])
    assert said["names"]==[["left_shoulder", "right_shoulder"] if n=="neck" else [full(n)] for n in JOINTS]

@pytest.mark.pose
@pytest.mark.parametrize("name", ["rtmw-m_8xb1024-270e_cocktail14-256x192", "rtmpose-l_8xb64-270e_coco-ubody-wholebody-256x192", "td-hm_res50_8xb64-210e_coco-wholebody-256x192"])
def test_other_families(short, name):
    "RTMW, a config that the index does not list, and a network that gives heatmaps."
    in_pose_env("""
import sys, numpy as np
from pcan import pose, wholebody
f = wholebody.mmpose_estimator(sys.argv[2], random=True)
film, read = pose.read_video(sys.argv[1]); x = read([0])
p = pose._points(f(x, pose.best(pose.whole_frame(x), 1, film.size)), (1,1))
assert p[...,:2].std()>1 and f.settings['model']==sys.argv[2] and f.settings['random_weights']
""", short, name)

@pytest.mark.pose
def test_weights_from_a_file(short, tmp_path):
    "A checkpoint as mmpose writes it is loaded, and no longer marked as random; one of another model is refused."
    in_pose_env("""
import sys, torch
from pcan import pose, wholebody
wholebody._stand_ins()
from mmpose.apis import init_model
model = init_model(str(wholebody.choose_model(wholebody.MODEL, *wholebody.model_index('mmpose'))[0]), None, 'cpu')
state = {k: v for k,v in model.state_dict().items()}
torch.save(dict(state_dict=state, meta=dict(dataset_meta=model.dataset_meta)), sys.argv[1]+'/w.pth')
state.pop('backbone.stem.0.conv.weight'); torch.save(dict(state_dict=state), sys.argv[1]+'/half.pth')
""", tmp_path)
    r = command(short, "--out", tmp_path/"p.pkl", "--weights", tmp_path/"w.pth")
    assert r.returncode==0 and "RANDOM" not in r.stdout, r.stderr[-3000:]
    assert list(read_keypoints(tmp_path/"p.pkl"))==["wave"]
    for args,message in ((("--weights", tmp_path/"half.pth"), "weights of another model"), (("--weights", tmp_path/"none.pth"), "no such file")):
        r = command(short, "--out", tmp_path/"q.pkl", *args)
        assert r.returncode==2 and message in r.stderr and "Traceback" not in r.stderr, r.stderr[-2000:]

@pytest.mark.pose
@pytest.mark.parametrize("args,message", [
    (("--model", "rtmpose-xxl"), "expected a name such as rtmpose"),
    (("--model", "rtmpose-m_8xb256-420e_coco-256x192", "--random-weights"), "gives 17 points per person; expected COCO-WholeBody's 133"),
    (("--model", "rtmo-s_8xb32-600e_coco-640x640", "--random-weights"), "expected a top-down model"),
    (("--model", "dwpose_l-ll_coco-384x288", "--random-weights"), "What this one trains is --model rtmpose-l_8xb32-270e_coco-wholebody-384x288"),
    (("--detector", "rtmdet-m"), "mmdet cannot be used here"),
    (("--random-weights", "--device", "cuda:7"), "--device: found 'cuda:7'"),
])
def test_what_the_real_command_refuses(short, tmp_path, args, message):
    r = command(short, "--out", tmp_path/"p.pkl", *args)
    assert r.returncode==2 and message in r.stderr and "Traceback" not in r.stderr, r.stderr[-2000:]
    assert not (tmp_path/"p.pkl").exists()
