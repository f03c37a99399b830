"The store of runs: trained once, resumed to the same end, failures reported."
import signal, time
from dataclasses import replace
import numpy as np, pytest, torch
from pcan import config, runs
from pcan.files import DataError, read_json, write_json

@pytest.fixture
def store(tmp_path, monkeypatch):
    "A reports folder of its own."
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    return tmp_path

def short(epochs=1, **kw):
    r = config.make("pcan", "smoke", **kw)
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
    assert config.from_dict(config.Run, again.config) == run

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
    good, bad = short(), replace(short(seed=1), net=replace(config.THIN, speed_ratio=3))
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
    for m in (config, runs): monkeypatch.setattr(m, "has_video", lambda: False)
    run = short()
    result = runs.get(run, progress=False)
    assert not list((tmp_path/"data"/"synth"/"smoke").rglob("*.mp4"))
    assert len(result.scores("test")["y_a"]) == 104 and np.isfinite(result.metrics["test"]["fused"]["f1_mean"])

def test_a_one_stream_run_goes_on_from_one(store):
    "The backbone begins with PoseConv3D's of the same stream, which is trained first."
    run = config.alone("pcan", "smoke", reading="released")
    first, = config.singles(run)
    assert (first.system, first.stream, first.method, first.start)==("poseconv3d", "pose", None, "random")
    state = runs.weights(first)
    runs.seed_epoch(0, -1); model, _ = config.SYSTEMS["pcan"].build(run); runs.begin(run, model)
    assert all(torch.equal(v, state[f"backbone.{k}"]) for k,v in model.backbone.state_dict().items())
    assert runs.get(run, progress=False).metrics["test"].keys()=={"pose", "fused"}
    (first.path/"model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights of this finished run"): runs.weights(first)

def test_two_streams_begin_as_the_two_they_are_made_of(store):
    run = config.make("poseconv3d", "smoke", start="single")
    runs.get_all(config.singles(run), jobs=1, progress=False)
    model, _ = config.SYSTEMS["poseconv3d"].build(run); runs.begin(run, model); model.eval()
    rgb, pose = torch.randn(2, 6, 4, 32, 32), torch.rand(2, 28, 8, 12, 12)
    both = model.backbone(rgb, pose)
    for s,x,y in zip(config.STREAMS, (rgb, pose), both):
        one, _ = config.SYSTEMS["poseconv3d"].build(next(r for r in config.singles(run) if r.stream==s))
        one.load_state_dict(runs.weights(next(r for r in config.singles(run) if r.stream==s)))
        torch.testing.assert_close(one.backbone.eval()(x), y, atol=1e-4, rtol=1e-4)

def test_imagenet_weights_come_in_inflated(store, monkeypatch):
    from pcan import slowonly, systems
    net = slowonly.image_models().resnet50(weights=None)
    class Models:                                              # no download: the same network with random weights
        def resnet50(weights): assert weights=="IMAGENET1K_V1"; return net
    monkeypatch.setattr(systems, "image_models", lambda: Models)
    run = config.make("poseconv3d", "paper", start="imagenet", stream="rgb")
    model, _ = config.SYSTEMS["poseconv3d"].build(run); runs.begin(run, model)
    got = model.backbone.layer3[0].conv1.conv.weight
    assert got.shape[2]==3 and torch.equal(got[:,:,1], net.layer3[0].conv1.weight[:,:,0,0][...,None,None]) and not got[:,:,[0,2]].any()
    with pytest.raises(ValueError, match="does not fit the pathway"):
        thin = config.make("poseconv3d", "smoke", start="imagenet"); runs.begin(thin, config.SYSTEMS["poseconv3d"].build(thin)[0])

def test_read_outs_share_a_training(store):
    plain, voted = config.alone("repaired", "smoke", vote=0.), config.alone("repaired", "smoke", vote=5., adjust=.5)
    assert config.trained_as(voted)==plain and voted.name!=plain.name
    b = runs.get(voted, progress=False)                        # trains what it shares, too
    a = runs.get(plain, progress=False)
    assert b.environment["trained_as"]==plain.name and "trained_as" not in a.environment
    assert [r["loss"] for r in a.history]==[r["loss"] for r in b.history]
    assert not np.array_equal(a.scores("test")["pose_action"], b.scores("test")["pose_action"])
    assert not (b.path/"model.safetensors").exists()

def test_time_is_up_and_nothing_is_lost(store):
    run = short(epochs=2)
    with pytest.raises(runs.TimeUp, match="0 of 1 runs were finished.*goes on with the others"): runs.get_all([run], progress=False, minutes=0)
    assert not (run.path/"metrics.json").exists()
    assert len(runs.get_all([run], progress=False)[0].history)==2

def test_a_changed_default_is_noticed(store):
    "Names tell what differs from the defaults; the folder tells all of it."
    run = short(); runs.get(run, progress=False)
    config = read_json(run.path/"config.json"); config["method"]["beta"] = 4.; write_json(run.path/"config.json", config)
    with pytest.raises(DataError, match="a default has changed since, so raise RECIPE"): runs.get(run)

def test_the_released_reading_at_paper_size_is_the_released_setting():
    run = config.make("pcan", "paper", reading="released")
    assert run.net.interaction and run.start=="single" and run.clip.test_size==256 and not run.clip.flip_fingers
    assert (run.optim.epochs, run.optim.milestones)==(30, (10,20)) and run.method==config.READINGS["released"]
    assert not any(s.net.interaction for s in config.singles(run))

def test_what_a_run_begins_with_comes_first(store, monkeypatch):
    "Nothing else waits; what begins with a failed run is reported with it."
    other, fused = short(seed=3), config.make("b2c", "smoke")
    rgb, pose = config.singles(fused)
    assert runs.unfinished([fused, other, fused])==[rgb, pose, fused, other]
    order = []
    class Fake:                                                # finishes at once; the RGB branch fails
        def __init__(self, r): order.append(r); self.returncode = int(r.stream=="rgb"); r.path.mkdir(parents=True, exist_ok=True); (r.path/"log.txt").write_text("no luck")
        def poll(self): return self.returncode
        def terminate(self): pass
    monkeypatch.setattr(runs, "start", Fake)
    with pytest.raises(runs.RunError, match="2 of 4 runs failed") as e: runs.get_all([fused, other], jobs=2, progress=False)
    assert order==[rgb, pose, other] and "no luck" in str(e.value) and f"it begins with {rgb.name}, which failed" in str(e.value)
