"""What may happen to a run, and what must not: nothing finished is lost, nothing half-written is read as whole, and a run that goes on ends as an undisturbed one.

Three kills are part of `make test`; `make test-faults` kills twenty times, fills a disk, cuts every file short, and writes what was survived to reports/faults.csv."""
import os, random, shutil, signal, subprocess, sys, time
from dataclasses import asdict, replace
import numpy as np
import pytest
from pcan import config, runs
from pcan.clips import Clips, build_cache
from pcan.files import DataError, load_npz, read_json, root, write_json
from pcan.train import write_csv

ROOT, EPOCHS, SURVIVED = root(), 3, []
ENV = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A root with the smoke data set, a run of three epochs, and what became of it undisturbed."
    at, old = tmp_path_factory.mktemp("home"), {k: os.environ.get(k) for k in ("PCAN_ROOT", "PCAN_REPORTS")}
    shutil.copy(ROOT/"settings.ini", at)
    os.environ["PCAN_ROOT"] = str(at); os.environ.pop("PCAN_REPORTS", None)
    run = config.make("pcan", "smoke", epochs=EPOCHS)
    config.ensure_data("smoke", workers=2, progress=False)
    write_json(at/"run.json", asdict(run))
    whole = trained(at, at/"whole", COUNTS=str(at/"counts.json"))
    assert whole.returncode==0, whole.stderr
    yield at, run, read_json(at/"counts.json")
    for k,v in old.items(): os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)
    if "PCAN_FAULTS" in os.environ and SURVIVED: table()

def trained(at, reports, event="count", number=0, what="none", timeout=180, **env):
    return subprocess.run([sys.executable, ROOT/"tests"/"faulty.py", event, str(number), what, "--", "--config", str(at/"run.json")], capture_output=True, text=True, timeout=timeout,
                          cwd=at, env=os.environ | ENV | dict(PCAN_ROOT=str(at), PCAN_REPORTS=str(reports)) | env)

def folder(at, reports, run): return reports/"smoke"/"runs"/run.name

def kept(f): # what must come out the same: scores, metrics, weights, history without times
    from safetensors.torch import load_file
    history = [{k: v for k,v in r.items() if k!="seconds"} for r in runs.read_history(f/"history.csv", EPOCHS)]
    weights = {k: v.numpy().tobytes() for k,v in load_file(f/"model.safetensors").items()}
    return history, read_json(f/"metrics.json"), {s: {k: v.tobytes() for k,v in load_npz(f/f"scores_{s}.npz").items()} for s in ("val", "test")}, weights

def survived(fault, moment, outcome): SURVIVED.append(dict(fault=fault, moment=moment, outcome=outcome))

def table(): # reports/faults.csv: one line per fault, how often it was tried
    import platform, torch
    rows = {}
    for s in SURVIVED: rows.setdefault((s["fault"], s["outcome"]), []).append(s["moment"])
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    same = dict(commit=git("rev-parse", "HEAD")[:12], date=time.strftime("%Y-%m-%d"), python=platform.python_version(), torch=torch.__version__)
    write_csv(ROOT/"reports"/"faults.csv", [dict(fault=f, times=len(m), moments="; ".join(dict.fromkeys(m)), outcome=o) | same for (f,o),m in rows.items()])

def kill_and_go_on(home, tmp_path, event, number, what):
    at, run, _ = home
    if (at/"data"/"cache").exists() and event!="start": shutil.rmtree(at/"data"/"cache")     # so that the cache's writes are among the moments
    first = trained(at, tmp_path, event, number, what)
    assert first.returncode!=0, "it should have been ended"
    f = folder(at, tmp_path, run)
    for p in f.glob("*.json") if f.exists() else (): read_json(p)                            # whatever has its name is whole
    for p in f.glob("*.npz") if f.exists() else (): load_npz(p)
    again = trained(at, tmp_path)
    assert again.returncode==0, again.stderr
    assert kept(f)==kept(folder(at, at/"whole", run)), "not what an undisturbed run gives"
    assert not (f/"checkpoint.safetensors").exists()

def moments(n, seed=0): # (event, share of the run, signal)
    rng = random.Random(seed)
    return [(("fsync", "replace", "start")[i%3], rng.random(), ("SIGKILL", "SIGTERM", "SIGINT")[(i//3)%3]) for i in range(n)]

def at_moment(home, tmp_path, event, share, what):
    _, _, counts = home
    last = counts["ms"] if event=="start" else counts[event]
    number = max(1, int(share*last*.3)) if event=="start" else 1+int(share*last)          # the undisturbed run also filled the cache
    kill_and_go_on(home, tmp_path, event, number, what)
    word = dict(fsync="before a file is flushed", replace="before a file gets its name", start="at any time")[event]
    survived(f"{what} {word}", f"{number} ms" if event=="start" else f"{event} {number} of {last}", "goes on, ends equal to the last bit")

@pytest.mark.parametrize("event,share,what", moments(3, 7))
def test_killed(home, tmp_path, event, share, what): at_moment(home, tmp_path, event, share, what)

@pytest.mark.faults
@pytest.mark.parametrize("i,event,share,what", [(i, *m) for i,m in enumerate(moments(18, 1))] + [(18, "replace", .9999, "SIGKILL"), (19, "fsync", .9999, "SIGTERM")])
def test_killed_often(home, tmp_path, i, event, share, what): at_moment(home, tmp_path, event, share, what)

def test_killed_between_result_and_end(home, tmp_path):
    "The last write of all: a run is finished or goes on, and its weights are there."
    at_moment(home, tmp_path, "replace", .9999, "SIGKILL")

often = pytest.mark.faults

@pytest.mark.parametrize("share", [.5, pytest.param(.1, marks=often), pytest.param(.95, marks=often)])
def test_disk_full(home, tmp_path, share):
    "No room for a file: one line that names it and says what to do; then the run goes on."
    at, run, counts = home
    shutil.rmtree(at/"data"/"cache")
    first = trained(at, tmp_path, "fsync", 1+int(share*counts["fsync"]), "ENOSPC")
    said = first.stderr.strip().splitlines()[-1]
    assert first.returncode==2 and "No space left" in said and "make room" in said and (str(tmp_path) in said or str(at) in said), first.stderr
    assert not [p for p in tmp_path.rglob("*.tmp")], "half-written files were left"
    assert trained(at, tmp_path).returncode==0 and kept(folder(at, tmp_path, run))==kept(folder(at, at/"whole", run))
    survived("no room for a file", f"write {1+int(share*counts['fsync'])} of {counts['fsync']}", "says which file, goes on, ends equal to the last bit")

@pytest.mark.faults
@pytest.mark.skipif(os.geteuid()!=0, reason="only root may mount a small disk")
@pytest.mark.parametrize("kib", [64, 700, 1500, 2500])
def test_small_disk(home, tmp_path, kib):
    "The reports lie on a disk that fills up."
    at, run, _ = home
    disk = tmp_path/"disk"; disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], check=True)
    try:
        first = trained(at, disk)
        said = (first.stderr.strip() or "nothing").splitlines()[-1]
        assert first.returncode==2 and "make room" in said, first.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert trained(at, disk).returncode==0 and kept(folder(at, disk, run))==kept(folder(at, at/"whole", run))
    finally: subprocess.run(["umount", disk], check=True)
    survived("a disk that fills up", f"{kib} KiB", "says which file, goes on, ends equal to the last bit")

FILES = ("checkpoint.safetensors", "model.safetensors", "history.csv", "config.json", "environment.json", "metrics.json", "scores_val.npz", "scores_test.npz")

def cut(path, share): data = path.read_bytes(); path.write_bytes(data[:int(share*len(data))])

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0., .37, .98])
def test_cut_short(home, tmp_path, name, share, monkeypatch):
    "A file of a run that lost its end is refused by name, never read as a shorter one."
    at, run, _ = home
    shutil.copytree(at/"whole", tmp_path/"r"); f = folder(at, tmp_path/"r", run)
    if name.startswith("checkpoint"): (f/"model.safetensors").rename(f/name); (f/"metrics.json").unlink()
    cut(f/name, share)
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path/"r"))
    def use():
        r = runs.get(run, progress=False)
        for s in ("val", "test"): r.scores(s)
        runs.weights(run)
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as e: use()
    assert "delete" in str(e.value) or "again" in str(e.value), "what to do about it"
    survived(f"{name} cut short", f"{share:.1%}", "refused by name")

@pytest.mark.parametrize("name", FILES[:-1])
def test_not_a_file(home, tmp_path, name, monkeypatch):
    "A folder where a file should be."
    at, run, _ = home
    shutil.copytree(at/"whole", tmp_path/"r"); f = folder(at, tmp_path/"r", run)
    if name.startswith("checkpoint"): (f/"metrics.json").unlink()
    (f/name).unlink(missing_ok=True); (f/name).mkdir()
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path/"r"))
    with pytest.raises((DataError, OSError), match=name.replace(".", r"\.")): runs.weights(run); runs.get(run, progress=False).scores("val")
    survived(f"{name} is a folder", "", "refused by name")

@pytest.mark.parametrize("name,share", [(n,s) for n in ("rgb.npy", "index.json") for s in (0., .4, .98)])
def test_cache_cut_short(home, tmp_path, name, share):
    "A cache that lost its end is made again."
    at, run, _ = home
    data, spec = at/"data"/run.data, run.clip
    place = build_cache(data, "val", spec, folder=tmp_path, progress=False, workers=1)
    before = np.load(place/"rgb.npy").copy()
    cut(place/name, share)
    assert np.array_equal(np.load(build_cache(data, "val", spec, folder=tmp_path, progress=False, workers=1)/"rgb.npy"), before)
    survived(f"the cache's {name} cut short", f"{share:.0%}", "made again")

@pytest.mark.parametrize("part", ["skeletons", "list", "video"])
def test_data_cut_short(home, tmp_path, part):
    "A data set's file that lost its end: a message that names it, or (a list) another data set."
    at, run, _ = home
    data = tmp_path/"data"; shutil.copytree(at/"data"/run.data, data)
    if part=="list":
        f = data/"annotations"/"train_list_videos.txt"; f.write_bytes(f.read_bytes()[:-3])
    else:
        f = next((data/"MA-52_openpose_28kp").glob("*train*")) if part=="skeletons" else sorted((data/"raw_videos"/"train").glob("*.mp4"))[0]
        cut(f, .6)
    with pytest.raises(DataError, match=f.name.replace(".", r"\.")):
        c = Clips(data, "train", replace(run.clip, cache=False), train=True)
        for i in range(len(c)): c[i]
    survived(f"{part} cut short", "", "refused by name")

@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_goes_in_mid_epoch(home, tmp_path, workers):
    at, run, _ = home
    data = tmp_path/"data"; shutil.copytree(at/"data"/run.data, data)
    from pcan.clips import loader
    c = Clips(data, "train", replace(run.clip, cache=False), train=True)
    batches = iter(loader(c, 8, workers=workers))
    next(batches)
    for f in (data/"raw_videos"/"train").glob("*.mp4"): f.unlink()
    with pytest.raises(DataError, match=r"\.mp4: no such video"):
        for _ in batches: pass
    survived("videos removed in mid-epoch", f"{workers} readers", "refused by name")

def test_a_reader_is_killed(home):
    "A reading process that dies ends the epoch with an error; nothing hangs."
    at, run, _ = home
    from pcan.clips import loader
    batches = iter(loader(Clips(at/"data"/run.data, "train", replace(run.clip, cache=False), train=True), 4, workers=2))
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker.*killed|exited unexpectedly"):
        for _ in batches: pass
    survived("a reading process killed", "", "ends with an error that says so")
