"The table of systems: twenty rows, their sizes, how they begin, and that all of them train behind one face."
import pytest, torch
from pcan import config, runs, systems
from pcan.model import STREAMS
from pcan.audit import paper_table
from pcan.systems import SYSTEMS, bill, shape_of, shapes_of
from pcan.train import lr_at, make_optimizer

IN_TABLE = [n for n,s in SYSTEMS.items() if s.group]
OTHERS = [n for n in IN_TABLE if not SYSTEMS[n].pathways]

# parameters of the reference implementations with 52 classes, GFLOPs (2 x MAC) of one clip at the size they train with
PUBLISHED = dict(tsn=(23_614_580, 65.394), tin=(23_645_588, 65.396), tsm=(23_614_580, 65.396), manet=(43_235_676 - 10_951_424, 65.535),   # MANet less the convolutions that it never calls
                 c3d=(78_208_820, 77.094), i3d=(27_330_420, 66.255), slowfast=(33_677_148, 55.276), swin=(27_890_458, 175.528), timesformer=(121_298_740, 391.660),
                 uniformer=(21_221_876, 83.325), stgcn=(3_101_564, 6.420), ctrgcn=(1_449_254, 3.381), poseconv3d=(36_144_680, None)) | {"2sagcn": (2*3_472_102, 14.569)}

@pytest.fixture
def store(tmp_path, monkeypatch):
    "A reports folder of its own."
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    return tmp_path

def inputs(run, B=2):
    "Random clips of a run's shapes."
    return [torch.randn(B, *s[1:]) if s else None for s in shapes_of(run).values()]

def test_the_rows_are_the_papers():
    ours = [SYSTEMS[n].label for n in IN_TABLE]
    both = [f"{SYSTEMS[n].label} ({s})" for n in ("poseconv3d", "pcan") for s in ("RGB", "Pose")]
    assert sorted(ours+both)==sorted(paper_table("table1").index)
    assert list(config.plan("systems", "quick"))==[SYSTEMS[n].label for n in OTHERS] and len(OTHERS)==14

@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name):
    n, flops = bill(config.make(name, "paper"))
    assert n==PUBLISHED[name][0]
    if PUBLISHED[name][1]: assert f"{flops/1e9:.3f}"==f"{PUBLISHED[name][1]:.3f}"

@pytest.mark.parametrize("name", IN_TABLE)
def test_trains_behind_one_face(name):
    "Shapes, a finite gradient for whatever learns, and the same answer after saving and loading."
    run = config.make(name, "smoke")
    torch.manual_seed(0)
    model, loss = SYSTEMS[name].build(run)
    x = inputs(run)
    with torch.no_grad(): out = model.eval()(*x)
    assert all(s.final.shape==(2, 52) for s in out.values())
    assert set(out) <= {*STREAMS, "joint", "bone", "both"}
    model.train()
    total, terms = loss(model(*x), torch.tensor([3, 40]))
    total.backward()
    assert total.isfinite() and terms and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    none = [n for n,p in model.named_parameters() if p.grad is None]
    assert not [n for n in none if not n.endswith(("W_b.weight", "W_b.bias"))], none
    again, _ = SYSTEMS[name].build(run)
    again.load_state_dict(model.state_dict())
    with torch.no_grad(): assert all(torch.equal(a.final, b.final) for a,b in zip(model.eval()(*x).values(), again.eval()(*x).values()))

@pytest.mark.parametrize("name", OTHERS)
def test_a_wrong_input_is_named(name):
    run = config.make(name, "smoke")
    model, _ = SYSTEMS[name].build(run)
    bad = [x if x is None else x[:,:1] if i==0 else x[...,:1] for i,x in enumerate(inputs(run))]
    with pytest.raises(ValueError, match=r"shape \(2, .*expected \(B,"): model(*bad)

@pytest.mark.parametrize("name", IN_TABLE)
def test_recipe_of_ma52(name):
    "The published recipe makes an optimiser, whose rate ends lower than it was."
    run = config.make(name, "paper")
    with torch.device("meta"): model, _ = SYSTEMS[name].build(run)
    made = make_optimizer(model, run.optim)
    assert sum(len(g["params"]) for g in made.param_groups)==sum(p.requires_grad for p in model.parameters())
    assert lr_at(run.optim, run.optim.epochs*100-1, 100) < run.optim.lr/5
    assert run.clip.clips_test==10 and (run.start=="random")==(name in ("c3d", "slowfast", "uniformer", "stgcn", "2sagcn", "ctrgcn", "poseconv3d", "pcan"))

def test_b2c_is_three_runs(store):
    "Each branch alone, then a fusion that leaves them as they are."
    run = config.make("b2c", "smoke")
    rgb, pose = config.singles(run)
    assert (rgb.stream, pose.stream, rgb.start, rgb.clip.pose_frames, pose.clip.rgb_frames)==("rgb", "pose", "random", 0, 0)
    assert {rgb.name, pose.name}.isdisjoint({run.name}) and "b2c-rgb-smoke" in rgb.name
    result = runs.get(run, progress=False)
    state = {s: runs.weights(r) for s,r in zip(STREAMS, (rgb, pose))}
    last = runs.weights(run)
    for s in STREAMS:
        learned = [k for k in last if k.startswith(f"net.{s}.") and "running" not in k and "num_batches" not in k]
        assert learned and all(torch.equal(last[k], state[s][k]) for k in learned), "branches take no gradient"
    assert any(not torch.equal(last[k], state["rgb"][k]) for k in last if k.startswith("net.rgb.") and "running_mean" in k), "their running means do move"
    assert result.metrics["test"].keys()=={"both", "fused"} and {"both/ce_a", "both/gate"} <= set(result.history[0])
    real = config.make("b2c", "paper")
    assert (real.start, real.first.lr, real.optim.lr)==("single", pytest.approx(.05*10/6), pytest.approx(.005*10/6))
    assert [r.start for r in config.singles(real)]==["imagenet"]*2 and [r.optim for r in config.singles(real)]==[real.first]*2

@pytest.mark.parametrize("name,kind", [("tsm", "resnet50"), ("i3d", "resnet50"), ("b2c", "resnet18")])
def test_photos_come_in(name, kind, monkeypatch):
    "No download: the same network with random weights."
    from pcan.slowonly import image_models
    net = getattr(image_models(), kind)(weights=None)
    class Models:
        def resnet50(weights): assert (kind, weights)==("resnet50", "IMAGENET1K_V1"); return net
        def resnet18(weights): assert (kind, weights)==("resnet18", "IMAGENET1K_V1"); return net
    monkeypatch.setattr(systems, "image_models", lambda: Models)
    run = config.make(name, "paper", stream="rgb" if name=="b2c" else None)
    model, _ = SYSTEMS[name].build(run)
    before = model.net.fc.weight.clone()
    runs.begin(run, model)
    deep = dict(model.net.named_parameters())
    ours = next(p for n,p in deep.items() if n.endswith("layer3.1.conv2.conv.weight"))
    torch.testing.assert_close(ours.sum(2), net.layer3[1].conv2.weight, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.net.fc.weight, before), "the classifier is ours"

def test_published_weights_come_in(monkeypatch):
    from pcan.attention import VideoSwin
    run = config.make("swin", "paper")
    model, _ = SYSTEMS["swin"].build(run)
    other = {k: v+1 if v.is_floating_point() else v for k,v in model.net.state_dict().items()}
    monkeypatch.setattr(VideoSwin, "published", lambda self: other)
    head = model.net.head
    runs.begin(run, model)
    new = model.net.state_dict()
    assert all(torch.equal(new[k], other[k]) for k in new if not k.startswith(head)) and not all(torch.equal(new[k], other[k]) for k in new if k.startswith(head))

def test_shapes_are_readable():
    assert shape_of(config.make("b2c", "paper"))=="3×16×224×224 + 109×16×56×112"
    assert shape_of(config.make("ctrgcn", "paper"))=="100×28×3"
