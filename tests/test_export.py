"A network as one ONNX file: it says what PyTorch says, it says what it needs, and nothing else is left behind."
import json, os, subprocess, sys
from dataclasses import replace
import numpy as np, pytest, torch
import onnx
from pcan.augment import ClipSpec, prepare
from pcan.checkpoint import Card
from pcan.export import TOLERANCE, Whole, dense_heatmaps, dense_parts, difference, example, export, metadata, noise, puppets, reference, sampling, session
from pcan.files import DataError
from pcan.heatmap import heatmaps
from pcan.config import make
from pcan.synth import clip as synthetic
from pcan.systems import SYSTEMS

FAST = ("stgcn", "c3d")                               # and pcan, below; all of them: `make test-slow`

def network(system, profile="smoke", **kw):
    torch.manual_seed(0)
    run = make(system, profile, **kw)
    model = SYSTEMS[system].build(run)[0].eval()
    with torch.no_grad():                              # else a new network says the same of everything
        for p in model.parameters():
            if p.ndim>1 and p.shape[0]==52: p.normal_(std=.3)
    return model, run

def check(system, tmp_path, **kw):
    model, run = network(system, **kw)
    return checked(export(model, run, tmp_path/"m.onnx"), model, run)

def checked(made, model, run):
    assert set(made.difference)=={"random", "synthetic"} and max(made.difference.values())<TOLERANCE["float32"]
    net = session(made.path)
    assert [i.name for i in net.get_inputs()]==[n for n,on in (("rgb", run.clip.rgb_frames), ("keypoint", run.clip.pose_frames)) if on]
    assert all(i.shape[0]=="batch" for i in (*net.get_inputs(), *net.get_outputs()))
    for B in (1, 5): assert difference(net, model, run, noise(run, B, seed=B))<TOLERANCE["float32"]
    action, body = net.run(["action", "body"], noise(run, 2))
    assert action.shape==(2,52) and body.shape==(2,7) and np.allclose(action.sum(1), 1, atol=1e-5) and np.allclose(body.sum(1), 1, atol=1e-5)
    assert np.ptp(action)>1e-4, "a network that says the same of everything would agree with anything"
    return made, net

@pytest.mark.parametrize("system", FAST)
def test_export(system, tmp_path): check(system, tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(system, tmp_path):
    check(system, tmp_path, profile="bench")

@pytest.mark.slow
@pytest.mark.parametrize("reading", ["paper", "released"])
def test_the_readings_at_the_papers_size(reading, tmp_path):
    "The whole network, 224 pixels cut down from 256, or 256."
    model, run = network("pcan", "paper", reading=reading)
    assert max(export(model, run, tmp_path/"m.onnx").difference.values())<TOLERANCE["float32"]

@pytest.mark.slow
def test_the_released_reading_tells_before_and_after(tmp_path):
    model, run = network("pcan", reading="released")
    made = export(model, run, tmp_path/"m.onnx")
    x = session(made.path).run(["rgb_plain", "rgb_action"], puppets(run))
    assert np.abs(x[0]-x[1]).max()>1e-3, "the prototypes say nothing"

def test_one_stream(tmp_path):
    made, net = check("pcan", tmp_path, stream="pose")
    assert [o.name for o in net.get_outputs()]==["action", "body", "pose_action", "pose_plain", "pose_body"]

@pytest.fixture(scope="module")
def pcan_file(tmp_path_factory):
    model, run = network("pcan", "bench")
    return export(model, run, tmp_path_factory.mktemp("onnx")/"pcan.onnx", Card(run="mine", synthetic=True)), model, run

def test_pcan(pcan_file):
    made, net = checked(*pcan_file)
    x = puppets(pcan_file[2])
    for s in ("rgb", "pose"):
        before, after = net.run([f"{s}_plain", f"{s}_action"], x)
        assert np.abs(before-after).max()>1e-3, "the prototypes say nothing"

def test_what_it_says_of_itself(pcan_file):
    made, model, run = pcan_file
    said = {k: json.loads(v) for k,v in session(made.path).get_modelmeta().custom_metadata_map.items()}
    assert len(said["actions"])==len(said["parents"])==52 and len(said["bodies"])==7 and len(said["joints"])==28
    assert said["synthetic"] is True and "not for judging people" in said["warning"] and said["card"]["run"]=="mine"
    assert "not for judging people" in made.label and made.label in str(made)
    assert said["side"]==72 and said["sampling"]["rgb"]["frames"]==8 and said["sampling"]["keypoint"]["frames"]==16
    assert said["tensors"]["rgb"]["shape"]==["batch",8,72,72,3] and all(t["meaning"] for t in said["tensors"].values())
    assert list(said["tensors"])==list(made.tensors)

def test_no_path_of_this_machine(pcan_file):
    data = pcan_file[0].path.read_bytes()
    for word in (os.getcwd(), "site-packages", "stack_trace", os.path.expanduser("~")): assert word.encode() not in data, word
    onnx.checker.check_model(str(pcan_file[0].path))

def test_real_data_carries_no_warning():
    model, run = network("stgcn")
    said = metadata(model, replace(run, data="ma52"))
    assert json.loads(said["warning"])=="" and json.loads(said["synthetic"]) is False

def run_example(folder, system_run, file, with_video, **kw):
    from pcan.render import write_mp4
    s = synthetic("smoke", "test", 1)
    np.save(folder/"joints.npy", np.concatenate([s.keypoint, s.score[...,None]], -1))
    write_mp4(folder/"clip.mp4", s.frames)
    text = json.loads(session(file).get_modelmeta().custom_metadata_map["example"])
    assert text==example(system_run)
    tail = '\nfound = [m for m in ("pcan", "torch") if m in sys.modules]\nassert not found, found\nnp.savez("out.npz", action=action, body=net.run(["body"], inputs)[0])\n'
    (folder/"example.py").write_text(text+tail)
    env = {k: v for k,v in os.environ.items() if k not in ("PYTHONPATH", "PCAN_ROOT")}
    done = subprocess.run([sys.executable, "-I", "example.py", str(file), "joints.npy", *(["clip.mp4"] if with_video else [])], cwd=folder,
                          env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode==0, done.stderr
    return s, done.stdout, dict(np.load(folder/"out.npz"))

def test_the_example_needs_neither_pcan_nor_torch(pcan_file, tmp_path):
    "And it says what our own road says of the same frames."
    from pcan.data import Clip
    from pcan.video import person_frames, person_keypoint
    made, model, run = pcan_file
    s, printed, out = run_example(tmp_path, run, made.path, True)
    assert len(printed.strip().splitlines())==5 and "%" in printed
    c, n = Clip("clip", tmp_path/"clip.mp4", -1, s.keypoint, s.score, s.frames.shape[1:3]), len(s.keypoint)
    at = lambda T: (2*np.arange(T)+1)*n//(2*T)
    inputs = dict(rgb=person_frames(c, run.clip, at(8))[None], keypoint=person_keypoint(c, run.clip)[at(16)][None])
    ours = reference(model, run, inputs)
    for k in ("action", "body"): assert np.abs(out[k]-ours[k]).max()<.02, k                 # another decoder, another interpolation

@pytest.fixture
def traced(monkeypatch):
    "Files are made of this graph, without tracing the network again."
    def use(file): monkeypatch.setattr("pcan.export.trace", lambda whole, inputs: onnx.load(str(file)))
    return use

@pytest.fixture(scope="module")
def stgcn_file(tmp_path_factory):
    model, run = network("stgcn")
    return export(model, run, tmp_path_factory.mktemp("onnx")/"stgcn.onnx").path, model, run

@pytest.mark.parametrize("system,video", [("stgcn", False), ("c3d", True)])
def test_the_example_of_other_inputs(system, video, tmp_path):
    model, run = network(system)
    run = replace(run, clip=replace(run.clip, interval=2)) if video else run
    run_example(tmp_path, run, export(model, run, tmp_path/"m.onnx").path, video)

def test_sampling_rules_are_those_of_the_tests():
    from pcan.augment import sample_dense
    for n in (9, 16, 40, 41, 100):
        for T,k in ((8,2), (16,1), (4,5)): assert np.array_equal(sample_dense(n, T, k, 1, True)[0], eval(f"(max(n-{T*k}, 0)//2 + {k}*np.arange({T}))%n"))
    assert "every 2-th" in sampling(ClipSpec(rgb_frames=32, interval=2))["rgb"]["rule"]
    paired = sampling(ClipSpec(rgb_frames=8, pose_frames=8, paired=True))
    assert paired["keypoint"]["rule"]=="the frames of rgb" and paired["keypoint"]["frames"]==8

def test_half(tmp_path, pcan_file, traced):
    made, model, run = pcan_file
    traced(made.path)
    half = export(model, run, tmp_path/"half.onnx", half=True)
    assert half.bytes<.6*made.bytes and 0<max(half.difference.values())<TOLERANCE["float16"]
    assert session(half.path).get_inputs()[0].type=="tensor(uint8)"

@pytest.mark.parametrize("size", [(24,24), (18,31)])
@pytest.mark.parametrize("sigma", [.6, .7, 3.])
def test_dense_heatmaps_are_the_heatmaps(size, sigma):
    g = torch.Generator().manual_seed(1)
    xy, c = torch.rand(3,7,28,2, generator=g)*60-20, torch.rand(3,7,28, generator=g)
    c[c<.1], xy[0,0,:4], xy[1,1,:4,0] = 0, torch.nan, -torch.inf
    xy[2,2] = xy[2,2].round()
    assert torch.equal(dense_heatmaps(xy, c, size, sigma), heatmaps(xy, c, size, sigma))

def test_dense_parts_are_the_parts():
    from pcan.b2c import parts
    xy, c = torch.rand(2,6,28,2)*30-3, torch.rand(2,6,28)
    assert torch.allclose(dense_parts(xy, c, (20,40)), parts(xy, c, (20,40)), atol=1e-6)

def test_bytes_are_scaled_as_prepare_does():
    "A crop that is stored larger than the network's input, and one that is smaller."
    for side in (40, 64, 80):
        spec = replace(make("poseconv3d", "smoke").clip, side=side, rgb_size=64, pose_size=16)
        model, run = network("poseconv3d")
        x = noise(replace(run, clip=spec))
        whole = Whole(model, replace(run, clip=spec))
        batch = {k: torch.from_numpy(v) for k,v in x.items()} | dict(crop=torch.tensor([[0.,0,side,side]]*2), flip=torch.zeros(2, dtype=torch.bool))
        rgb, pose = prepare(batch, spec, False)
        assert torch.allclose(whole.frames(batch["rgb"]), rgb, atol=1e-4) and torch.allclose(whole.pose(batch["keypoint"]), pose, atol=1e-5)

def test_nothing_is_written_that_does_not_agree(tmp_path, stgcn_file, traced):
    traced(stgcn_file[0])
    (model, run), file = network("stgcn"), tmp_path/"m.onnx"
    file.write_text("what was there before")
    with torch.no_grad(): [p for p in model.parameters() if p.shape==(52,)][-1][3] += 1       # no longer what was traced
    with pytest.raises(DataError, match="nothing was written"): export(model, run, file)
    with torch.no_grad(): next(model.parameters()).fill_(torch.nan)       # not a number is not close
    with pytest.raises(DataError, match="nothing was written"): export(model, run, file)
    assert [p.name for p in tmp_path.iterdir()]==["m.onnx"] and file.read_text()=="what was there before"

def test_training_mode_is_left_as_it_was(tmp_path, stgcn_file, traced):
    traced(stgcn_file[0])
    model, run = network("stgcn")
    assert export(model.train(), run, tmp_path/"m.onnx").path.is_file() and model.training

class Fixed(torch.nn.Module):
    def __init__(self, net, how): super().__init__(); self.net, self.how = net, how
    def forward(self, rgb, pose):
        if self.how=="batch" and len(pose)!=2: return self.net(rgb, pose)
        if self.how=="data" and pose.sum().item()>0: pose = pose+1
        return self.net(rgb, pose)

@pytest.mark.parametrize("how,says", [("batch", "fixed number of clips"), ("data", "cannot be written as a graph")])
def test_a_network_that_is_no_graph(how, says, tmp_path):
    model, run = network("stgcn")
    with pytest.raises(DataError, match=says): export(Fixed(model, how), run, tmp_path/"m.onnx")
    assert not list(tmp_path.iterdir())

def test_a_file_that_is_none(tmp_path):
    (tmp_path/"m.onnx").write_bytes(b"not a graph")
    with pytest.raises(DataError, match="cannot load it"): session(tmp_path/"m.onnx")

def test_a_data_set_of_ones_own(tmp_path):
    "Other joints and other classes, one level: the file names them, has no bodies, and is checked with random clips only."
    from pcan.skeleton import Skeleton
    from pcan.tree import ActionTree
    run = make("poseconv3d", "smoke", stream="pose")
    run = replace(run, tree=ActionTree(("all",), ("sit","stand","wave"), (0,0,0)), clip=replace(run.clip, skeleton=Skeleton(("a","b","c"), ((0,1),(1,2)), ())))
    run = replace(run, net=replace(run.net, pose=replace(run.net.pose, in_channels=3)))
    made = export(SYSTEMS["poseconv3d"].build(run)[0].eval(), run, tmp_path/"m.onnx")
    assert list(made.difference)==["random"] and list(made.tensors)==["keypoint", "action", "pose_action"] and made.tensors["keypoint"][2]==3
    said = session(made.path).get_modelmeta().custom_metadata_map
    assert json.loads(said["actions"])==["sit","stand","wave"] and json.loads(said["joints"])==["a","b","c"]

def test_the_command(tmp_path, stgcn_file, traced, capsys):
    from pcan import apply
    from pcan.checkpoint import pack
    _, model, run = stgcn_file
    traced(stgcn_file[0])
    pack(run, model, Card(run="mine", synthetic=True), tmp_path/"mine.safetensors", half=False)
    assert apply.export([str(tmp_path/"mine.safetensors"), "--out", str(tmp_path/"mine.onnx"), "--example"])==0
    out = capsys.readouterr().out
    assert "largest difference of a probability on random clips" in out and "not for judging people" in out and "onnxruntime.InferenceSession" in out
    assert json.loads(session(tmp_path/"mine.onnx").get_modelmeta().custom_metadata_map["card"])["run"]=="mine"
    assert apply.export([str(tmp_path/"none.safetensors"), "--out", str(tmp_path/"none.onnx")])==2
    assert "none.safetensors" in capsys.readouterr().err and not (tmp_path/"none.onnx").exists()

def test_one_number_that_is_none_is_enough(tmp_path):
    "Only the bodies' output of one stream is not a number: the file is not written."
    model, run = network("pcan")
    with torch.no_grad(): model.heads["rgb"].W_b.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="differ by nan"): export(model, run, tmp_path/"m.onnx")
    assert not list(tmp_path.iterdir())

def test_a_folder_is_no_file(tmp_path):
    model, run = network("pcan")
    with pytest.raises(DataError, match="found a folder"): export(model, run, tmp_path)
