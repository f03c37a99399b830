"The road to MA-52, driven against a hub on this machine: the transfers, the refusals, the archives."
import errno, io, os, re, subprocess, sys, zipfile
from pathlib import Path
import pytest
from hub import Hub, serve
from tinyset import tiny_set
from pcan import ma52
from pcan.files import DataError, read_json, sha256_file
from pcan.validation import validate

def zipped(files, prefix=""):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name,content in files.items(): z.writestr(prefix+name, content)
    return out.getvalue()

@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return tiny_set(tmp_path_factory.mktemp("data")/"tiny")

@pytest.fixture
def hub(tiny, monkeypatch, tmp_path):
    "MA-52 as we imagine it: three archives, each with another inside; lists in a folder; skeletons in their own repository."
    video = lambda s: {f.name: f.read_bytes() for f in sorted((tiny/"raw_videos"/s).glob("*.mp4"))}
    inside = dict(train="MA-52/raw_videos/train/", val="val/", test="")
    files = {f"{s}.zip": zipped(video(s) | {"README.txt": b"hello"}, inside[s]) for s in ma52.SPLITS}
    files |= {f"lists/{s}_list_videos.txt": (tiny/"annotations"/f"{s}_list_videos.txt").read_bytes() for s in ma52.SPLITS} | {"README.md": b"# MA-52"}
    monkeypatch.setenv("HF_TOKEN", "hf_granted"); monkeypatch.setenv("HF_HOME", str(tmp_path/"hf"))
    return Hub({ma52.REPO: files, ma52.SKELETON_REPO: {f.name: f.read_bytes() for f in sorted((tiny/ma52.SKELETONS).iterdir())}})

@pytest.fixture
def at(hub):
    with serve(hub) as address: yield address

def get(to, at, **asked): return ma52.download(to, endpoint=at, progress=False, **asked)
def sent(hub): return [(p.rsplit("/", 1)[1], r) for p,r,_ in hub.requests if p.startswith("/cdn/")]
def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file() and p.name!="download.json"}

def shell(*args, **env):
    "The command as a user types it, in a process of its own."
    env = {k: v for k,v in os.environ.items() if k not in ("HF_TOKEN",)} | {k: v for k,v in env.items() if v is not None}
    return subprocess.run([sys.executable, "-m", "pcan.cli", "ma52", *map(str, args)], capture_output=True, text=True, timeout=300, env=env)

def refused(call, *words):
    with pytest.raises(DataError) as e: call()
    for w in words: assert w in str(e.value), (w, str(e.value))
    assert "\n" not in str(e.value) and "hf_granted" not in str(e.value)

# ---- the whole road

def test_everything(tiny, hub, at, tmp_path):
    "One command: what arrives is the set that was packed, byte for byte, and nothing else is left behind."
    r = shell("download", "--to", tmp_path/"ma52", HF_ENDPOINT=at, HF_TOKEN="hf_granted")
    assert r.returncode==0, r.stderr
    assert tree(tmp_path/"ma52")=={k: v for k,v in tree(tiny).items() if k!="annotations/test_labels.txt"}
    assert r.stdout.index("to fetch") < r.stdout.index("train.zip: 7 files in raw_videos/train") < r.stdout.index("0 problems")
    assert "train      7 clips" in r.stdout and "hf_granted" not in r.stdout+r.stderr
    noted = read_json(tmp_path/"ma52"/"download.json")
    for repo,files in hub.repos.items():
        for path,b in files.items():
            if path!="README.md": assert (noted[f"{repo}/{path}"]["size"], noted[f"{repo}/{path}"]["revision"])==(len(b), hub.commit)
    assert noted[f"{ma52.SKELETON_REPO}/MA52_val.pkl"]["sha256"]==sha256_file(tiny/ma52.SKELETONS/"MA52_val.pkl")
    assert not any(a for p,_,a in hub.requests if p.startswith("/cdn/")), "the token went to another host"

def test_twice_transfers_once(hub, at, tmp_path):
    get(tmp_path/"a", at); n = len(sent(hub))
    p = get(tmp_path/"a", at)
    assert len(sent(hub))==n==9 and not p.todo and all(w=="there, whole" for _,_,w in p.rows)

def test_a_part(hub, at, tmp_path, capsys):
    "`--only`: what is complete and what is not, in so many words."
    get(tmp_path/"a", at, only=("annotations", "val"))
    assert {p for p,_ in sent(hub)}=={"train_list_videos.txt", "val_list_videos.txt", "test_list_videos.txt", "val.zip"}
    get(tmp_path/"a", at, only=("skeletons",))
    found = validate(tmp_path/"a", videos=False)
    assert [found.whole(s) for s in ma52.SPLITS]==[False, True, False] and found.there["train"]==(7,0,7,0)
    assert "train   incomplete: 7 listed, 0 with video, 7 with skeleton, 0 with both" in str(found) and "7 of 7 listed videos are missing" in str(found)

def test_dry_run_touches_nothing(hub, at, tmp_path, capsys):
    get(tmp_path/"a", at, dry_run=True)
    assert not sent(hub) and not (tmp_path/"a").exists() and "train.zip: to fetch" in capsys.readouterr().out

def test_kept_archives_are_not_fetched_again(hub, at, tmp_path):
    get(tmp_path/"a", at, keep=True)
    assert (tmp_path/"a/archives/train.zip").read_bytes()==hub.repos[ma52.REPO]["train.zip"]
    next((tmp_path/"a/raw_videos/train").iterdir()).unlink(); hub.requests.clear()
    get(tmp_path/"a", at, keep=True)
    assert not sent(hub) and len(list((tmp_path/"a/raw_videos/train").iterdir()))==7

# ---- interruptions

def test_a_connection_that_breaks(hub, at, tmp_path, monkeypatch):
    "The library asks for the rest by itself, from the last chunk on that came whole."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)          # of 10 MB
    size = len(hub.repos[ma52.REPO]["train.zip"]); hub.cut["train.zip"] = size//2
    get(tmp_path/"a", at, only=("train",))
    assert sent(hub)==[("train.zip", None), ("train.zip", f"bytes={size//2//1000*1000}-")] and size//2>1000
    assert len(list((tmp_path/"a/raw_videos/train").iterdir()))==7

def test_a_process_that_ended(hub, at, tmp_path, monkeypatch):
    "What had arrived is kept; another call asks for the rest only."
    from huggingface_hub import file_download
    size, real = len(hub.repos[ma52.REPO]["train.zip"]), file_download.http_get
    def killed(url, f, **kw): f.write(hub.repos[ma52.REPO]["train.zip"][:size//3]); raise KeyboardInterrupt
    monkeypatch.setattr(file_download, "http_get", killed)
    with pytest.raises(KeyboardInterrupt): get(tmp_path/"a", at, only=("train",))
    assert not (tmp_path/"a/raw_videos").exists() and not (tmp_path/"a/download.json").exists()
    monkeypatch.setattr(file_download, "http_get", real)
    p = get(tmp_path/"a", at, only=("train",))
    assert "of it are here" in p.rows[0][2] and sent(hub)==[("train.zip", f"bytes={size//3}-")]

def test_what_a_killed_process_left(hub, at, tmp_path):
    litter = tmp_path/"a/.unpack-old/raw_videos/val"; litter.mkdir(parents=True); (litter/"x.mp4").write_bytes(b"half")
    get(tmp_path/"a", at, only=("val",))
    assert not list((tmp_path/"a").glob(".unpack-*")) and not (tmp_path/"a/raw_videos/val/x.mp4").exists()

def test_brought_by_another_way(hub, at, tmp_path, monkeypatch):
    "A file too large for a plain connection: what to do is said, and after that it works."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    refused(lambda: get(tmp_path/"a", at, only=("val",)), "plain connection", "hf download kunli-cs/MA-52 val.zip")
    (tmp_path/"a/archives").mkdir(parents=True, exist_ok=True)
    (tmp_path/"a/archives/val.zip").write_bytes(hub.repos[ma52.REPO]["val.zip"])
    get(tmp_path/"a", at, only=("val",))
    assert not sent(hub) and len(list((tmp_path/"a/raw_videos/val").iterdir()))==3 and not (tmp_path/"a/archives").exists()

def test_a_hub_that_is_down(hub, at, tmp_path):
    hub.down = True
    refused(lambda: get(tmp_path/"a", at, only=("train",)), "answered 503", "goes on from there")

def test_no_network(hub, tmp_path):
    refused(lambda: get(tmp_path/"a", "http://127.0.0.1:9"), "no connection to http://127.0.0.1:9")

def test_a_full_disk(hub, at, tmp_path, monkeypatch):
    from huggingface_hub import file_download
    def full(*a, **kw): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(file_download, "http_get", full)
    refused(lambda: get(tmp_path/"a", at, only=("val",)), "No space left on device", "--to")

def test_a_disk_too_small(hub, at, tmp_path, monkeypatch):
    monkeypatch.setattr(ma52.shutil, "disk_usage", lambda p: type("D", (), dict(free=100)))
    refused(lambda: get(tmp_path/"a", at), "of disk are needed and 100 bytes are free")
    assert not sent(hub)

# ---- refusals

@pytest.mark.parametrize("token,words", [
    (None, ("given out on request", "/datasets/kunli-cs/MA-52", "hf auth login", "HF_TOKEN")),
    ("hf_stranger", ("access is not granted to its account", "Fill in the form at")),
    ("hf_mistyped", ("answered 401", "mistyped or expired", "settings/tokens")),
])
def test_no_access(hub, at, tmp_path, token, words):
    r = shell("download", "--to", tmp_path/"a", HF_ENDPOINT=at, HF_TOKEN=token, HF_HOME=str(tmp_path/"hf"))
    assert r.returncode==2 and r.stderr.count("\n")==1 and r.stderr.startswith("pcan_ma52: "), r.stderr
    for w in words: assert w in r.stderr, (w, r.stderr)
    assert not token or token not in r.stdout+r.stderr
    assert not (tmp_path/"a").exists()

def test_other_names(hub, at, tmp_path):
    files = hub.repos[ma52.REPO]; files["videos/part_train.zip"] = files.pop("train.zip")
    refused(lambda: get(tmp_path/"a", at), "README.md", "expected train as train.zip", "--name 'train=NAME'")
    get(tmp_path/"a", at, only=("train",), names=dict(train="part_train.zip"))
    assert len(list((tmp_path/"a/raw_videos/train").iterdir()))==7
    refused(lambda: get(tmp_path/"a", at, repo="someone/else"), "someone/else: no such data set")
    refused(lambda: get(tmp_path/"a", at, revision="v9"), "no such revision")
    refused(lambda: get(tmp_path/"a", at, only=("videos",)), "found part videos")

def test_a_split_in_two_archives(hub, at, tmp_path):
    files = hub.repos[ma52.REPO]
    with zipfile.ZipFile(io.BytesIO(files.pop("train.zip"))) as z: rows = {n.rsplit("/", 1)[1]: z.read(n) for n in z.namelist() if n.endswith(".mp4")}
    names = sorted(rows)
    for i,part in enumerate((names[:3], names[3:])): files[f"train_{i}.zip"] = zipped({n: rows[n] for n in part})
    asked = dict(only=("train",), names=dict(train="train_*.zip"))
    get(tmp_path/"a", at, **asked)
    assert sorted(f.name for f in (tmp_path/"a/raw_videos/train").iterdir())==names
    assert not get(tmp_path/"a", at, **asked).todo

# ---- what changed

def test_changed_on_the_hub(hub, at, tmp_path):
    get(tmp_path/"a", at)
    files = hub.repos[ma52.REPO]
    with zipfile.ZipFile(io.BytesIO(files["val.zip"])) as z: rows = {n: z.read(n) for n in z.namelist()}
    first = next(n for n in rows if n.endswith(".mp4"))
    rows[first] += b"tail"; files["val.zip"] = zipped(rows); hub.requests.clear()
    p = get(tmp_path/"a", at)
    assert [(r.path, re.sub("[0-9a-f]{12}", "...", w)) for r,whole,w in p.rows if not whole]==[("val.zip", "changed on the hub since (..., now ...)")]
    assert sent(hub)==[("val.zip", None)]
    assert (tmp_path/"a/raw_videos/val"/first.rsplit("/", 1)[1]).read_bytes()==rows[first]

@pytest.mark.parametrize("file,words", [("MA-52_openpose_28kp/MA52_val.pkl", "is not what was downloaded"), ("raw_videos/val", "1 files"), ("annotations/val_list_videos.txt", "is gone")])
def test_changed_here(hub, at, tmp_path, file, words):
    get(tmp_path/"a", at); whole = tree(tmp_path/"a")
    f = tmp_path/"a"/file
    if f.is_dir(): [x.unlink() for x in sorted(f.iterdir())[1:]]
    elif words.endswith("gone"): f.unlink()
    else: f.write_bytes(f.read_bytes()[:-1]+b"?")
    p = get(tmp_path/"a", at)
    assert len(p.todo)==1 and words in next(w for _,ok,w in p.rows if not ok) and tree(tmp_path/"a")==whole

def test_other_bytes_than_announced(hub, at, tmp_path):
    real, hub.listing = hub.listing, lambda repo: {**real(repo), "siblings": [{**r, "lfs": {**r["lfs"], "sha256": "0"*64}} if "lfs" in r else r for r in real(repo)["siblings"]]}
    refused(lambda: get(tmp_path/"a", at, only=("val",)), "val.zip", "the hub says 000000000000", "deleted")
    assert not [f for f in (tmp_path/"a").rglob("*") if f.is_file()]

def test_an_old_piece_is_not_continued(hub, at, tmp_path):
    (tmp_path/"a/archives").mkdir(parents=True)
    (tmp_path/"a/archives/val.zip.0123456789ab.part").write_bytes(b"of another revision")
    get(tmp_path/"a", at, only=("val",))
    assert sent(hub)==[("val.zip", None)] and not (tmp_path/"a/archives").exists()

# ---- archives

def test_an_archive_that_would_escape(hub, at, tmp_path):
    hub.repos[ma52.REPO]["val.zip"] = zipped({"val/fine.mp4": b"x", "../../evil.mp4": b"x"})
    refused(lambda: get(tmp_path/"deep/a", at, only=("val",)), "'../../evil.mp4'", "leads out of its folder", "nothing was unpacked")
    assert not list(tmp_path.rglob("*.mp4"))

def test_no_half_archive(hub, at, tmp_path):
    "An archive whose last member is broken leaves no first member behind."
    whole = zipped({"a.mp4": b"fine"*100, "b.mp4": b"broken"*100})
    hub.repos[ma52.REPO]["val.zip"] = whole.replace(b"broken", b"brokem", 1)
    refused(lambda: get(tmp_path/"a", at, only=("val",)), "not a readable zip", "CRC")
    assert not list(tmp_path.rglob("*.mp4")) and not list((tmp_path/"a").glob(".unpack-*"))
