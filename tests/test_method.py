"""Sets, prototypes, losses, rectification: the authors' code where the paper reads the same, slow loops, corners, 1 process = 2."""
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from pcan.ambiguity import ambiguous_sets, one_hot, shares
from pcan.losses import calibration_loss, diversity_loss, hierarchical_loss
from pcan.model import CELoss, Method, Scores, best_child, fuse, pcan, poseconv3d, pool, rectify, stream_terms
from pcan.prototypes import Prototypes, cosine, unit
from pcan.tree import MA52

GOLDEN = Path(__file__).parent/"golden"


@pytest.fixture(scope="module")
def head(): return {k: torch.from_numpy(v) for k,v in np.load(GOLDEN/"method.npz").items()}


@pytest.fixture(scope="module")
def rect(): return {k: torch.from_numpy(v) for k,v in np.load(GOLDEN/"rectify.npz").items()}


# ---- parity with the released code, in what the two readings share

@pytest.mark.parametrize("tag", ["", "N64/"])
def test_sets_are_the_released_masks(head, tag):
    g = lambda n: head[tag+n]
    s = ambiguous_sets(g("logit_coarse"), g("logit_fine"), g("yb"), g("y"))
    # the released code's fn_2 is the paper's third set, its fn_3 the second
    for ours, theirs in dict(tp_a="tp", fn_a1="fn1", fn_a2="fn3", fn_a3="fn2", fp_a="fp").items():
        assert torch.equal(getattr(s, ours).float(), g(f"mask_{theirs}"))


@pytest.mark.parametrize("tag", ["", "N64/"])
def test_hierarchical_loss_is_the_released_tree_loss(head, tag):
    zb, za = (head[tag+n].clone().requires_grad_() for n in ("logit_coarse", "logit_fine"))
    loss = hierarchical_loss(zb, za, head[tag+"y"], MA52.parent)
    loss.backward()
    torch.testing.assert_close(loss, head[tag+"tree_loss"].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(zb.grad, head[tag+"tree_grad_coarse"], atol=1e-6, rtol=0)
    torch.testing.assert_close(za.grad, head[tag+"tree_grad_fine"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", ["fine", "coarse"])
def test_prototypes_move_like_the_released_ones(head, level):
    f = head["raw"].amax((2, 3)) @ head[f"{level}_cl_fc_w"].T + head[f"{level}_cl_fc_b"]     # their feature
    s = ambiguous_sets(head["logit_coarse"], head["logit_fine"], head["yb"], head["y"])
    K = 52 if level=="fine" else 7
    p = Prototypes(K, f.shape[1]); p.P = head[f"{level}_proto_before"].T.clone()            # theirs are columns
    p(f, s.tp_a if level=="fine" else s.tp_b)
    torch.testing.assert_close(p.P, head[f"{level}_proto_after"].T, atol=1e-6, rtol=0)


def test_frobenius_is_the_released_diversity(head):
    torch.testing.assert_close(diversity_loss(head["fine_proto_after"].T, "frobenius"), head["fine_diversity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stream,gamma", [("rgb", 5.), ("pose", 1.)])      # the released gammas
def test_rectify(rect, stream, gamma):
    W = lambda n: rect[f"weights/{n}.weight/u"] @ rect[f"weights/{n}.weight/v"]*.05
    b = lambda n: rect[f"weights/{n}.bias"]
    F = rect["f_rgb"] if stream=="rgb" else pool(rect["x_pose"])
    cl = f"fr_{stream}.spatio_cl_net.cl_fc"
    lin = lambda n: F @ W(n).T + b(n)
    got = rectify(lin(f"fc_{stream}"), lin(cl), rect[f"weights/fr_{stream}.spatio_cl_net.avg_f"].T, gamma)
    torch.testing.assert_close(got, rect[f"scores/{stream}"], atol=2e-5, rtol=0)
    body = lin(f"fc_{stream}_coarse")
    torch.testing.assert_close(body, rect[f"scores/{stream}_coarse"], atol=2e-5, rtol=0)
    p_a, p_b = fuse({stream: Scores(got, got, body)}, MA52, clips=3)[stream]
    torch.testing.assert_close(p_a, rect[f"avg3clips/{stream}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(p_b, rect[f"avg3clips/{stream}_coarse"], atol=1e-5, rtol=0)


# ---- our own reading: loops, limits, corners

def batch(B, C=16, seed=0, classes=8):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (B,), generator=g)
    za = torch.randn(B, 52, generator=g) + 5*one_hot((y + torch.randint(2, (B,), generator=g))%classes, 52)
    zb = torch.randn(B, 7, generator=g) + 2*one_hot(MA52.parent[y], 7)
    return torch.randn(B, C, generator=g), zb, za, y


def slow_pcc(F, P, z, fn, fp, alpha, tau):
    q, total = z.softmax(1), 0.
    unit_ = lambda v: v/v.norm()
    for m,a,sign in [*zip(fn, alpha, [-1]*len(fn)), (fp, 1., 1)]:
        for i,k in m.nonzero().tolist():
            mu = torch.stack([F[j] for j in range(len(F)) if m[j,k]]).mean(0)
            psi = 1 + sign*(unit_(F[i]) @ unit_(mu)).item()
            e = [math.exp(tau*(unit_(F[i]) @ unit_(p)).item() - (l==k)*(1 - q[i,k].item())*psi) for l,p in enumerate(P)]
            total -= a*math.log(e[k]/sum(e))
    return total*10/len(F)


@pytest.mark.parametrize("B", [1, 2, 10, 40])
@pytest.mark.parametrize("tau", [.125, 8.])
def test_pcc_is_the_slow_loop(B, tau):
    F, zb, za, y = batch(B, seed=B)
    P, s = torch.randn(52, 16), ambiguous_sets(zb, za, MA52.parent[y], y)
    fn, alpha = (s.fn_a1, s.fn_a2, s.fn_a3), (1., .5, .1)
    got = calibration_loss(F, P, za, y, fn, s.fp_a, alpha, tau).item()
    assert got==pytest.approx(slow_pcc(F, P, za, fn, s.fp_a, alpha, tau), abs=1e-3)
    got = calibration_loss(F, P[:7], zb, MA52.parent[y], (s.fn_b,), s.fp_b, tau=tau).item()
    assert got==pytest.approx(slow_pcc(F, P[:7], zb, (s.fn_b,), s.fp_b, (1.,), tau), abs=1e-3)


def test_pcc_gradient_is_numerical():
    F, zb, za, y = batch(12)
    s, P = ambiguous_sets(zb, za, MA52.parent[y], y), torch.randn(52, 16)
    f = F.clone().requires_grad_()
    fn = s.fn_a1, s.fn_a2, s.fn_a3
    loss = lambda x: calibration_loss(x, P, za, y, fn, s.fp_a, (1., .5, .1), detach_mu=False)
    loss(f).backward()
    d = torch.randn_like(F); d /= d.norm()
    num = (loss(F + 1e-2*d) - loss(F - 1e-2*d))/2e-2
    assert num.item()==pytest.approx((f.grad*d).sum().item(), abs=5e-3)


def test_sets_partition_any_batch():
    for seed in range(5):
        _, zb, za, y = batch(64, seed=seed)
        s = ambiguous_sets(zb, za, MA52.parent[y], y)
        assert torch.equal(s.tp_a.int() + s.fn_a1.int() + s.fn_a2.int() + s.fn_a3.int(), one_hot(y, 52).int())
        assert torch.equal(s.tp_b ^ s.fn_b, one_hot(MA52.parent[y], 7))
        sh = shares(s)
        assert sum(sh[k].item() for k in ("tp_a", "fn_a1", "fn_a2", "fn_a3"))==pytest.approx(1)


def test_zero_vectors_have_no_direction_and_no_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    cosine(x, torch.randn(4, 3)).sum().backward()
    assert not x.grad.any() and not unit(torch.zeros(3)).any()


class Toy(nn.Module):
    widths = (16, 12)
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 16, 1), nn.Conv3d(28, 12, 1)
    def forward(self, rgb, pose): return self.a(rgb).relu(), self.b(pose).relu()


def inputs(B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 2, 4, 4, generator=g), torch.randn(B, 28, 2, 4, 4, generator=g), torch.randint(10, (B,), generator=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    torch.manual_seed(0)
    model, loss = pcan(Toy(), MA52)
    rgb, pose, y = inputs(8)
    with torch.autocast("cpu", dtype):
        total, log = loss(model(rgb, pose), y)
    total.backward()
    assert total.dtype==torch.float32 and total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(h.P_a.P.dtype==torch.float32 for h in model.heads.values())


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("kind", ["random", "right", "wrong"])
def test_terms_are_finite_in_every_corner(B, kind):
    F, zb, za, y = batch(B)
    yb = MA52.parent[y]
    if kind=="right": zb, za = 20.*one_hot(yb, 7), 20.*one_hot(y, 52)
    if kind=="wrong": zb, za = 20.*one_hot((yb+1)%7, 7), 20.*one_hot((y+20)%52, 52)
    other = Method(form="frobenius", fp_target="truth", fp_sign=-1, prob="softmax", per_batch=None,
                   detach_q=False, detach_mu=False, detach_p=False)
    for m in (Method(), other):
        leaves = [t.clone().requires_grad_() for t in (F, zb, za)]
        f, b, a = leaves
        terms, _ = stream_terms(Scores(a, a, b, f, f), Prototypes(7, 16), Prototypes(52, 16), yb, y, MA52.parent, 5., m)
        sum(terms.values()).backward()
        assert all(v.isfinite() for v in terms.values()) and all(t.grad.isfinite().all() for t in leaves)
        if kind=="right": assert terms["pcc_a"]==0 and terms["pcc_b"]==0


def test_checkpoint_holds_both_prototype_tables():
    model, loss = pcan(Toy(), MA52)
    rgb, pose, y = inputs(64)
    for _ in range(3): loss(model(rgb, pose), y)
    fresh, _ = pcan(Toy(), MA52); fresh.load_state_dict(model.state_dict())
    names = [n for n in model.state_dict() if n.endswith(".P")]
    assert sorted(names)==["heads.pose.P_a.P", "heads.pose.P_b.P", "heads.rgb.P_a.P", "heads.rgb.P_b.P"]
    model.eval(); fresh.eval()
    for k in ("rgb", "pose"): torch.testing.assert_close(model(rgb, pose)[k].final, fresh(rgb, pose)[k].final)


def test_loss_belongs_to_its_model():
    model, loss = pcan(Toy(), MA52)
    assert not list(loss.parameters()) and not loss.state_dict()
    before = model.heads["rgb"].P_b.P.clone()
    model.eval(); rgb, pose, y = inputs(64); loss(model(rgb, pose), y)
    assert torch.equal(before, model.heads["rgb"].P_b.P)


def test_total_is_the_weighted_history():
    torch.manual_seed(0)
    model, loss = pcan(Toy(), MA52, Method(beta=.3, hp=2., pcc=.5))
    total, log = loss(model(*inputs(8)[:2]), inputs(8)[2])
    assert total.item()==pytest.approx(sum(log[k]*log[f"{k}_weight"] for k in log if f"{k}_weight" in log).item(), rel=1e-5)
    assert not any(v.requires_grad for v in log.values())


def test_only_pda_sends_gradient_through_the_prototypes():
    F, zb, za, y = batch(32)
    za = 9.*one_hot(y, 52); zb = 9.*one_hot(MA52.parent[y], 7)      # all right: every other loss leaves F alone
    for detach in (False, True):
        f = F.clone().requires_grad_()
        terms, _ = stream_terms(Scores(za, za, zb, f, F), Prototypes(7, 16), Prototypes(52, 16), MA52.parent[y], y,
                                MA52.parent, 1., Method(detach_pda=detach))
        total = sum(terms.values())
        g, = torch.autograd.grad(total, f, allow_unused=True) if total.requires_grad else (None,)
        assert (g is not None and g.any()) != detach


def test_a_step_reads_nothing_back():
    "The meta device has shapes but no values: whatever waits for a value fails there, as it would make a GPU wait."
    with torch.device("meta"):
        model, loss = pcan(Toy(), MA52)
        rgb, pose, y = torch.empty(8, 3, 2, 4, 4), torch.empty(8, 28, 2, 4, 4), torch.empty(8, dtype=torch.long)
        total, log = loss.to("meta")(model(rgb, pose), y)
        total.backward()
    assert total.is_meta and all(v.is_meta for v in log.values())


def test_best_child_agrees_with_the_tree():
    p = torch.randn(2000, 52, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    for q in (p, p.half().float(), torch.full((3, 52), 1/52)):
        b = best_child(q, MA52)
        assert torch.equal(b.argmax(1), MA52.parent[q.argmax(1)])
        torch.testing.assert_close(b.sum(1), torch.ones(len(q)))


def test_poseconv3d_head():
    model, loss = poseconv3d(Toy(), MA52)
    rgb, pose, y = inputs(8)
    total, log = loss(model(rgb, pose), y)
    total.backward()
    assert list(log)==["rgb/ce_a", "pose/ce_a"] and total.item()==pytest.approx(sum(log.values()).item())
    assert isinstance(loss, CELoss) and all(p.grad is not None for p in model.parameters())


def test_method_is_plain_and_strict():
    m = Method()
    assert Method(**asdict(m))==m and hash(m) and pickle.loads(pickle.dumps(m))==m and replace(m, lam=0.).lam==0
    for kw in (dict(reading="released"), dict(reading="both"), dict(form="x"), dict(alpha=(1,)), dict(gamma=(1,))):
        with pytest.raises(ValueError): Method(**kw)
    with pytest.raises(TypeError): Method(temperature=1)


# ---- several processes

def _step(rank, world, path, B=16):
    torch.set_num_threads(1)
    dist = torch.distributed
    if world>1: dist.init_process_group("gloo", init_method=f"file://{path}/sync", rank=rank, world_size=world)
    torch.manual_seed(0)
    model, loss = pcan(Toy(), MA52, Method(dropout=0., detach_mu=False, detach_p=False, form="frobenius"))
    rgb, pose, y = inputs(B)
    W = {n: torch.randn(52, c, generator=torch.Generator().manual_seed(1)) for n,c in zip(("rgb", "pose"), Toy.widths)}
    for n,h in model.heads.items(): h.W1.weight.data.copy_(W[n])
    with torch.no_grad():                                    # labels such that about a third is right
        pred = model(rgb, pose)["rgb"].action.argmax(1)
        for h in model.heads.values(): h.W_b.weight.normal_(generator=torch.Generator().manual_seed(2))
    y = torch.where(torch.arange(B)%3==0, pred, y)
    mine = slice(rank*B//world, (rank+1)*B//world)
    for _ in range(2):
        model.zero_grad()
        total, _ = loss(model(rgb[mine], pose[mine]), y[mine])
        total.backward()
    out = [model.state_dict()["heads.rgb.P_a.P"], model.state_dict()["heads.pose.P_b.P"], total.detach()[None],
           *[p.grad for p in model.parameters()]]
    if world>1:
        for t in out[2:]: dist.all_reduce(t); t /= world           # what DDP does to gradients
        dist.barrier(); dist.destroy_process_group()
    if rank==0: torch.save(out, f"{path}/world{world}.pt")


def test_two_processes_are_one(tmp_path):
    _step(0, 1, tmp_path)
    torch.multiprocessing.spawn(_step, args=(2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path/f"world{w}.pt", weights_only=True) for w in (1, 2))
    for a,b in zip(one, two): torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
