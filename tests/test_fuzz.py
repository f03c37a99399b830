"""Files with something wrong in them, a minute of them: what is opened is right, or refused by a sentence that names the file. `make test-fuzz`; FUZZ_SECONDS=600 looks longer.

Every kind of file has a process of its own, with a limit on memory and on time, since a decoder written in C may not come back. The same seconds on the same machine need
not see the same files; what is found is shrunk by hypothesis and printed, and belongs into tests/test_hostile.py, where it is looked at every time."""
import csv, io, json, os, pickle, random, resource, signal, subprocess, sys, zipfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
import numpy as np
import pytest

SECONDS = float(os.environ.get("FUZZ_SECONDS", 60))
HANG, GROWS = 20, 4*2**30          # seconds that one file may take; bytes that a process may grow

# ---------- good files, as bytes

@lru_cache(None)
def good_list(): return "".join(f"{i:04d}_01_0001.mp4 {i%52}\n" for i in range(30)).encode()

@lru_cache(None)
def good_table(): return ("video,action,body,subject,split\n" + "".join(f"c{i}.mp4,a{i%3},b{i%2*0},p{i%4},{('train','val','test')[i%3 if i>8 else 0]}\n" for i in range(18))).encode()

def _entries(n=3, T=4, V=28):
    rng = np.random.RandomState(0)
    return [dict(frame_dir=f"{i:04d}_01_0001", label=i, total_frames=T, img_shape=(96,80), original_shape=(96,80), keypoint=rng.rand(1,T,V,2).astype(np.float32),
                 keypoint_score=rng.rand(1,T,V).astype(np.float32)) for i in range(n)]

@lru_cache(None)
def good_pickle(protocol=4): return pickle.dumps(_entries(), protocol=protocol)

@lru_cache(None)
def good_run():
    from pcan.config import make
    return json.loads(json.dumps(asdict(make("pcan", "quick"))))

@lru_cache(None)
def good_dataset():
    from pcan.skeleton import LAYOUTS
    return dict(bodies=["arm", "leg"], actions=["wave", "point", "kick"], parents=[0,0,1], skeleton=json.loads(json.dumps(asdict(LAYOUTS["coco17"]))), videos=True, skeletons=True)

@lru_cache(None)
def good_clips(): return b"clip,video,action,body,subject,split,frames,seconds,sha256\n" + b"".join(b"c%d,c%d.mp4,wave,arm,p%d,train,16,0.640,ab\n" % (i,i,i%3) for i in range(6))

@lru_cache(None)
def good_checkpoint():
    from pcan.checkpoint import default_checkpoint
    return default_checkpoint().read_bytes()

@lru_cache(None)
def good_torch():
    import torch
    f = io.BytesIO(); torch.save(dict(state_dict={"cls_head.fc.weight": torch.zeros(3,4), "backbone.x": torch.ones(2)}), f)
    return f.getvalue()

@lru_cache(None)
def good_scores():
    f, rng = io.BytesIO(), np.random.RandomState(0)
    np.savez(f, name=np.array([f"{i:04d}_01_0001" for i in range(30)]), y_a=np.arange(30), **{f"{s}_{k}": rng.rand(30,n).astype(np.float16) for s in ("rgb","pose") for k,n in (("action",52),("body",7))})
    return f.getvalue()

@lru_cache(None)
def good_submission():
    from pcan.submit import Listed, Scored, csv_text
    rng, f = np.random.RandomState(0), io.BytesIO()
    text = csv_text(Listed(Path("l"), [f"{i:04d}_01_0001" for i in range(30)], None), Scored(rng.rand(30,52), rng.rand(30,7)))
    with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("prediction.csv", text)
    return f.getvalue()

@lru_cache(None)
def good_archive():
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
        for n in ("train/0001_01_0001.mp4", "train/0002_01_0001.mp4", "annotations/train_list_videos.txt", "MA52_train.pkl"): z.writestr(n, n*20)
    return f.getvalue()

@lru_cache(None)
def good_video():
    import av
    f = io.BytesIO()
    with av.open(f, "w", format="mp4") as box:
        s = box.add_stream("libx264", rate=25, options=dict(threads="1")); s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        for t in range(12): box.mux(s.encode(av.VideoFrame.from_ndarray(np.random.RandomState(t).randint(0, 255, (48,64,3), np.uint8), format="rgb24")))
        box.mux(s.encode())
    return f.getvalue()

# ---------- how they are opened: a file's path -> nothing; where there is an oracle, it is asked

def open_list(p):
    from pcan.data import read_list
    got = read_list(p)
    again = p.with_name("again.txt"); again.write_text("".join(f"{n}.mp4 {k}\n" for n,k in got.items()), encoding="utf-8")
    assert read_list(again)==got and all(0<=k<52 for k in got.values())

def open_table(p):
    from pcan.own import choose_splits, clip_names, read_table, tree_of
    rows = read_table(p)
    names, tree = clip_names(rows), tree_of(rows)
    assert len(set(names))==len(rows) and all("/" not in n and not n.startswith(".") for n in names) and set(tree.actions)=={r.action for r in rows}
    again = p.with_name("again.csv")
    with open(again, "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([("video","action","body","subject","split"), *((r.video, r.action, r.body, r.subject, r.split) for r in rows)])
    assert read_table(again)==rows
    try: splits = choose_splits(rows)
    except ValueError: return
    assert set(splits)<={"train","val","test"} and len(splits)==len(rows)

def open_pickle(p):
    from pcan.data import read_keypoints
    for kp,score,shape in read_keypoints(p).values():
        assert kp.shape[1:]==(28,2) and score.shape==kp.shape[:2] and np.isfinite(kp).all() and np.isfinite(score).all() and min(shape)>0
    from pcan.predict import read_people
    from pcan.skeleton import Skeleton
    read_people(p, "0001_01_0001", Skeleton())

def open_run(p):
    from pcan.config import Run, from_dict, read_run
    run = read_run(p)
    assert from_dict(Run, json.loads(json.dumps(asdict(run))))==run
    hash(run); repr(run)

def open_dataset(p):
    from pcan.data import declared, inputs
    tree, skeleton = declared(p.parent)
    assert len(tree.parents)==tree.K_A and all(0<=b<tree.K_B for b in tree.parents) and tree.parent.shape==(tree.K_A,)
    assert all(isinstance(x, str) for x in (*tree.bodies, *tree.actions, *skeleton.joints)) and skeleton.V>0
    inputs(p.parent)

def open_clips(p):
    from pcan.data import lengths, people
    assert all(isinstance(v, str) for v in people(p.parent.parent).values()) and all(v is None or v>=0 for v in lengths(p.parent.parent).values())

def open_network(p):
    from pcan.checkpoint import card_text, open_checkpoint
    o = open_checkpoint(p)
    assert sum(x.numel() for x in o.model.parameters()); card_text(o)

def open_scores(p):
    from pcan.submit import Listed, read_scores
    names = [f"{i:04d}_01_0001" for i in range(30)]
    s = read_scores(p, Listed(Path("list"), names, None))
    assert s.action.shape==(30,52) and np.isfinite(s.action).all() and (s.body is None or s.body.shape==(30,7) and np.isfinite(s.body).all())

def open_submission(p):
    from pcan.submit import Listed, check
    names = [f"{i:04d}_01_0001" for i in range(30)]
    str(check(p, Listed(Path("list"), names, None)))

def open_archive(p):
    from pcan.ma52 import unpack
    to = p.parent/"to"/"data"
    unpack(p, to, "train", progress=False)
    assert {x.name for x in p.parent.iterdir()}<={p.name, "to"} and {x.name for x in to.parent.iterdir()}=={"data"}, "a member left its folder"

def open_video(p):
    from pcan.data import Clip
    from pcan.video import video
    from pcan.predict import open_film
    film = open_film(p)
    assert len(film.times)>0 and (np.diff(film.times)>0).all()
    x = film.read([0, len(film)-1])
    assert x.shape==(2,*film.size,3) and x.dtype==np.uint8
    assert video(Clip("c", p, 0, np.zeros((2,28,2)), np.zeros((2,28)), film.size)).shape[1:]==(*film.size,3)

# name -> (file, where it lies, how it is opened, how many of the seconds)
KINDS = {
    "list": (good_list, "list.txt", open_list), "table": (good_table, "labels.csv", open_table), "pickle": (good_pickle, "poses.pkl", open_pickle),
    "run": (good_run, "config.json", open_run), "dataset": (good_dataset, "dataset.json", open_dataset), "clips": (good_clips, "annotations/clips.csv", open_clips),
    "checkpoint": (good_checkpoint, "net.safetensors", open_network), "torch": (good_torch, "net.pth", open_network), "scores": (good_scores, "scores_test.npz", open_scores),
    "submission": (good_submission, "sub.zip", open_submission), "archive": (good_archive, "train.zip", open_archive), "video": (good_video, "film.mp4", open_video),
}

# ---------- what is wrong with them

def _texts(st): return st.text(max_size=12) | st.sampled_from(["", " ", "\0", "\n", "\"", ",", ";", "../../x", "/etc/passwd", "<script>alert(1)</script>", "\u202egpj.exe", "nan", "1e999", "-1",
    "9"*5000, "²", "٣", "None", "video", "\ufeff", "é", "C:\\x", "a"*300])

def _values(st): # anything JSON can say
    one = st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, -2**70, 10**9, 0, -1]) | st.floats() | _texts(st)
    return st.recursive(one, lambda x: st.lists(x, max_size=3) | st.dictionaries(_texts(st), x, max_size=3), max_leaves=5)

def _places(x, at=()): # every place in a JSON value
    yield at
    for k,v in (x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()): yield from _places(v, (*at, k))

def _changed(x, at, how, value): # x with another thing at a place
    if not at: return value
    x, k = (dict(x) if isinstance(x, dict) else list(x)), at[0]
    if len(at)>1: x[k] = _changed(x[k], at[1:], how, value)
    elif how=="drop": del x[k]
    elif how=="more": x = {**x, str(value): value} if isinstance(x, dict) else [*x, value]
    else: x[k] = value
    return x

def wrong_json(st, good):
    places = list(_places(good))
    edits = st.lists(st.tuples(st.sampled_from(places), st.sampled_from(["set", "set", "drop", "more"]), _values(st)), min_size=1, max_size=3)
    def made(edits):
        x = good
        for at,how,v in edits:
            try: x = _changed(x, at, how, v)
            except (KeyError, IndexError, TypeError): pass
        return json.dumps(x).encode()
    deep = st.sampled_from([b"["*100000, b'{"a":'*100000, b"", b"nul", b"[" + b"9"*5000 + b"]", b"\xff\xfe", b'{"a":1', b'"' + b"x"*10**6])
    return st.builds(made, edits) | deep | wrong_bytes(st, json.dumps(good).encode())

def wrong_text(st, good):
    lines = good.decode().splitlines()
    cell = st.tuples(st.integers(0, len(lines)-1), st.integers(0, 5), _texts(st))
    def made(edits, sep):
        out = [l.replace(" ", ",") if "," not in l else l for l in lines]
        for i,k,v in edits:
            cells = out[i].split(",")
            if k<len(cells): cells[k] = v
            else: cells.append(v)
            out[i] = ",".join(cells)
        return "\n".join(l.replace(",", sep) for l in out).encode("utf-8", "surrogatepass")
    seps = st.sampled_from([" ", "  ", "\t"] if b"," not in good else [",", ";", "\t"])
    return st.builds(made, st.lists(cell, min_size=1, max_size=4), seps) | wrong_bytes(st, good)

def wrong_bytes(st, good):
    n = len(good)
    at = st.integers(0, n) | st.integers(0, min(n, 400)) | st.integers(max(0, n-400), n)
    edit = st.one_of(st.tuples(st.just("flip"), at, st.integers(0, 255)), st.tuples(st.just("cut"), at, st.just(0)), st.tuples(st.just("drop"), at, st.integers(1, 64)),
                     st.tuples(st.just("copy"), at, at), st.tuples(st.just("put"), at, st.binary(max_size=8)), st.tuples(st.just("word"), at, st.sampled_from([0, 0xffffffff, 0x7fffffff, 2**31, 1])))
    def made(edits):
        x = bytearray(good)
        for what,i,v in edits:
            if what=="flip" and i<len(x): x[i] = v
            if what=="cut": del x[i:]
            if what=="drop": del x[i:i+v]
            if what=="copy": x[i:i] = x[v:v+256]
            if what=="put": x[i:i+len(v)] = v
            if what=="word": x[i:i+4] = v.to_bytes(4, "little")
        return bytes(x)
    return st.builds(made, st.lists(edit, min_size=1, max_size=6))

def wrong_pickle(st, good):
    fields, some = list(_entries()[0]), st.none() | st.integers() | st.floats() | st.booleans() | _texts(st) | st.tuples(st.integers(), st.integers()) | st.lists(st.integers(), max_size=3) | st.sampled_from([
        np.zeros((1,4,28,2)), np.zeros((0,4,28,2)), np.zeros((1,4,17,2)), np.full((1,4,28,2), np.nan), np.zeros((1,4,28)), np.array("x"), np.array([None, "a"], object), np.zeros(2, np.complex64),
        np.array(["NaT"], "M8[s]"), (0,0), (-1,5), (float("nan"), 3), (1e300, 1e300), ("a","b"), [[1,2],[3]], np.zeros((1,4,28,2), "f8")*1e300, np.float64(3), np.int64(4), {1:2}, b"bytes"])
    def made(edits, wrap, protocol):
        rows = _entries()
        for i,k,v,drop in edits:
            if drop: rows[i].pop(k, None)
            else: rows[i][k] = v
        return pickle.dumps(dict(annotations=rows) if wrap else rows, protocol=protocol)
    edits = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(fields), some, st.booleans()), min_size=1, max_size=3)
    return st.builds(made, edits, st.booleans(), st.sampled_from([2,4,5])) | st.builds(lambda x: pickle.dumps(x), some) | wrong_bytes(st, good)

def wrong_header(st, good): # of safetensors: its JSON, with the lengths put right
    n = int.from_bytes(good[:8], "little"); head = json.loads(good[8:8+n]); meta = head["__metadata__"]
    inner = {k: json.loads(v) for k,v in meta.items() if v[:1] in "{["}
    def made(field, at, how, value):
        x = dict(head, __metadata__=dict(meta, **{field: json.dumps(_changed(inner[field], at, how, value))}))
        raw = json.dumps(x).encode(); raw += b" "*(-len(raw)%8)
        return len(raw).to_bytes(8, "little") + raw + good[8+n:]
    edit = st.sampled_from([(f, p) for f,x in inner.items() for p in _places(x) if p]).flatmap(lambda fp: st.builds(made, st.just(fp[0]), st.just(fp[1]), st.sampled_from(["set", "set", "drop", "more"]), _values(st)))
    return edit | wrong_bytes(st, good)

def wrong_zip(st, good): # other names, links, sizes that lie
    names = st.sampled_from(["../x.mp4", "/abs/train/x.mp4", "train/../../x.mp4", "C:\\x.mp4", "..\\..\\x.mp4", "train/x.mp4", "train/./x.mp4", "train//x.mp4", "prediction.csv", "a/prediction.csv", "train/x\0.mp4",
                             "train/", "train/" + "a"*300 + ".mp4", "train/\u202ex.mp4", "train_list_videos.txt/x.mp4", "MA52_train.pkl", "train/x.mp4/y.mp4", "train/.mp4"]) | _texts(st)
    def made(members):
        f = io.BytesIO()
        with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
            for name,mode,size in members:
                m = zipfile.ZipInfo("x"); m.filename = m.orig_filename = name; m.external_attr = mode<<16
                try: z.writestr(m, b"0"*size, zipfile.ZIP_DEFLATED)
                except (ValueError, UnicodeError, OverflowError): pass
        return f.getvalue()
    import warnings; warnings.simplefilter("ignore")
    return st.builds(made, st.lists(st.tuples(names, st.sampled_from([0, 0o100644, 0o120777, 0o010644, 0o040755]), st.sampled_from([0, 10, 10**6])), max_size=4)) | wrong_bytes(st, good)

def wrong(st, kind):
    good = KINDS[kind][0]()
    if kind in ("run", "dataset"): return wrong_json(st, good)
    return dict(list=wrong_text, table=wrong_text, clips=wrong_text, pickle=wrong_pickle, checkpoint=wrong_header, submission=wrong_zip, archive=wrong_zip).get(kind, wrong_bytes)(st, good)

# ---------- the property

class Hang(BaseException): pass

def held(kind, raw, folder): # opened, or refused as it should be
    _, name, opened = KINDS[kind]
    import shutil
    at = Path(folder)/"case"; shutil.rmtree(at, ignore_errors=True)
    path = at/name; path.parent.mkdir(parents=True); path.write_bytes(raw)
    def late(*_): raise Hang(f"more than {HANG} s")
    signal.signal(signal.SIGALRM, late); signal.alarm(HANG)
    try: opened(path)
    except ValueError as e:                                   # DataError is one
        if isinstance(e, UnicodeError): raise
        assert type(e).__name__ in ("DataError", "ValueError") and name.rsplit("/", 1)[-1] in str(e) and len(str(e))>len(str(path))+10, f"the refusal does not name the file, or gives no reason: {type(e).__name__}: {e}"
        assert len(str(e))<5000+len(str(path)), f"a refusal of {len(str(e))} characters"
    finally: signal.alarm(0)

def look(kind, seconds, folder):
    "Wrong files of one kind, for so many seconds."
    import time
    import hypothesis, hypothesis.strategies as st
    good = KINDS[kind][0]()
    held(kind, json.dumps(good).encode() if isinstance(good, dict) else good, folder)     # a good one opens, and loads what is needed
    KINDS[kind][2](Path(folder)/"case"/KINDS[kind][1]) if kind not in ("archive", "torch") else None   # and is not refused
    used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])*1024
    resource.setrlimit(resource.RLIMIT_AS, (used+GROWS, used+GROWS))
    files, began, seen, n = wrong(st, kind), time.monotonic(), [0], int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
    while time.monotonic()-began<seconds:
        @hypothesis.seed(n)
        @hypothesis.settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False)
        @hypothesis.given(files)
        def property(raw):
            if time.monotonic()-began>3*seconds+30: return                             # shrinking is no reason to be late
            seen[0] += 1; Path(folder, "last").write_bytes(raw); held(kind, raw, folder)
        try: property()
        except BaseException:
            print(f"FUZZ_SEED={n}", flush=True); raise
        n += 1
    print(f"{kind}: {seen[0]:,} files")

@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_refused_or_right(kind, tmp_path):
    seconds = SECONDS/len(KINDS)
    try: done = subprocess.run([sys.executable, __file__, kind, str(seconds), str(tmp_path)], capture_output=True, text=True, timeout=4*seconds+180, errors="replace", cwd=tmp_path)
    except subprocess.TimeoutExpired: pytest.fail(f"{kind}: hangs on {tmp_path/'last'}")
    assert done.returncode==0, f"{kind}: status {done.returncode}; the last file is {tmp_path/'last'}\n{done.stdout[-1500:]}\n{done.stderr[-6000:]}"
    print(done.stdout)

if __name__=="__main__": look(sys.argv[1], float(sys.argv[2]), sys.argv[3])
