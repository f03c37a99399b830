"The store of runs: trained once, resumed to the same end, failures reported."
import signal, time
from dataclasses import replace
import numpy as np, pytest
from pcan import runs
from pcan.files import write_json

@pytest.fixture
def store(tmp_path, monkeypatch):
    "A reports folder of its own."
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    return tmp_path

def short(epochs=1, **kw):
    r = runs.make("pcan", "smoke", **kw)
    return replace(r, optim=replace(r.optim, epochs=epochs))

def test_trained_once(store):
    run = short()
    first = runs.get(run, progress=False)
    stamp = (first.path/"metrics.json").stat().st_mtime_ns
    again = runs.get(run, progress=False)
    assert (again.path/"metrics.json").stat().st_mtime_ns == stamp
    assert {"config.json", "environment.json", "history.csv", "metrics.json", "scores_val.npz", "scores_test.npz"} <= {p.name for p in first.path.iterdir()}
    assert runs.measure(again.scores("test")) == again.metrics["test"], "metrics can be computed again from the kept scores"
    assert again.environment["commit"] and again.environment["seconds"] > 0
    assert runs.from_dict(runs.Run, again.config) == run

def test_killed_run_ends_where_an_undisturbed_one_does(store, monkeypatch):
    run = short(epochs=3)
    whole = runs.get_all([run], progress=False)[0]
    monkeypatch.setenv("PCAN_REPORTS", str(store/"killed"))
    process = runs.start(run)
    history = run.path/"history.csv"
    while process.poll() is None and not history.exists(): time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    assert history.exists() and not (run.path/"metrics.json").exists(), "it should have been killed between its first epoch and its end"
    resumed = runs.get_all([run], progress=False)[0]
    assert resumed.path != whole.path
    for split in ("val", "test"):
        a, b = whole.scores(split), resumed.scores(split)
        assert all(np.array_equal(a[k], b[k]) for k in a)
    timeless = lambda r: [{k: v for k,v in row.items() if k!="seconds"} for row in r.history]
    assert timeless(whole) == timeless(resumed)

def test_a_failed_run_is_reported_and_the_others_go_on(store, monkeypatch):
    good, bad = short(), replace(short(seed=1), net=replace(runs.THIN, speed_ratio=3))
    with pytest.raises(runs.RunError, match="1 of 2 runs failed") as e: runs.get_all([bad, good], progress=False)
    assert bad.name in str(e.value)
    assert (good.path/"metrics.json").exists() and not (bad.path/"metrics.json").exists()

def test_broken_result_is_named(store):
    run = short(); run.path.mkdir(parents=True)
    for n in ("config", "environment"): write_json(run.path/f"{n}.json", {})
    (run.path/"metrics.json").write_text('{"test": ')
    with pytest.raises(ValueError, match="metrics.json"): runs.get(run)

def test_a_machine_without_video_libraries_trains_the_same(store, monkeypatch, tmp_path):
    "Frames that are drawn instead of decoded: the same run, up to what mp4 compression changes."
    monkeypatch.setenv("PCAN_ROOT", str(tmp_path))
    monkeypatch.setattr(runs, "has_video", lambda: False)
    run = short()
    result = runs.get(run, progress=False)
    assert not list((tmp_path/"data"/"synth"/"smoke").rglob("*.mp4"))
    assert len(result.scores("test")["y_a"]) == 104 and np.isfinite(result.metrics["test"]["fused"]["f1_mean"])
