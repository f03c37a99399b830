"""Sets, prototypes, losses, rectification: the authors' code to float32 rounding, slow loops, corners, 1 process = 2.

tests/golden/method.npz keeps what the authors' code gave for five batches, forward and backward: N10 and N64 samples, 32 channels or
64 (`_C64`), about half of them wrong, or all right (`_right`). Their prototypes are columns, ours rows; of those after a step the file
keeps the classes that moved, and of the weights' gradients every eighth row. Run as a script under torchrun, this file is one of several processes."""
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from pcan.ambiguity import ambiguous_sets, one_hot, shares
from pcan.losses import CHOICES, calibrate, calibration_loss, diversity_loss, hierarchical_loss
from pcan.model import READINGS, RELEASED, CELoss, Method, PCANHead, PCANLoss, Scores, best_child, fuse, pcan, poseconv3d, pool, rectify, stream_terms
from pcan.prototypes import Prototypes, cosine, unit
from pcan.repaired import Repair, RepairedHead, repaired, repaired_terms
from pcan.tree import MA52

GOLDEN = Path(__file__).parent/"golden"
BATCHES = ["N10", "N10_C64", "N10_right", "N64", "N64_C64"]
close = torch.testing.assert_close


class Batch:
    "One batch of the golden file: `g(name)`, and what batches share."
    def __init__(self, file, tag): self.file, self.tag, self.C = file, tag, 64 if "C64" in tag else 32
    def __call__(self, name):
        if name=="raw": return self.file[f"{self.tag.removesuffix('_right')}/raw"]
        for key in (f"{self.tag}/{name}", f"C{self.C}/{name}", name):
            if key in self.file: return self.file[key].long() if name in ("y", "yb") else self.file[key]
        raise KeyError(name)
    def sets(self): return ambiguous_sets(self("logit_coarse"), self("logit_fine"), self("yb"), self("y"))
    def labels(self): return dict(fine=self("y"), coarse=self("yb"))
    def moved(self, P, level, after, atol=1e-6): # prototypes `(K,C)` are theirs after a step
        every = 4 if after.endswith("2") else 1
        m = self(f"{level}_moved")
        close(P[m].T[::every], self(f"{level}_proto_{after}"), atol=atol, rtol=0)
        assert torch.equal(P[~m].T, self(f"{level}_proto_before")[:,~m])


@pytest.fixture(scope="module")
def file(): return {k: torch.from_numpy(v) for k,v in np.load(GOLDEN/"method.npz").items()}


@pytest.fixture(params=BATCHES)
def g(file, request): return Batch(file, request.param)


@pytest.fixture(scope="module")
def rect(): return {k: torch.from_numpy(v) for k,v in np.load(GOLDEN/"rectify.npz").items()}


# ---- parity with the released code, piece by piece

def test_sets_are_the_released_masks(g):
    s = g.sets()
    # the released code's fn_2 is the paper's third set, its fn_3 the second
    for ours, theirs in dict(tp_a="tp", fn_a1="fn1", fn_a2="fn3", fn_a3="fn2", fp_a="fp").items():
        assert torch.equal(getattr(s, ours), g(f"mask_{theirs}"))


def test_hierarchical_loss_is_the_released_tree_loss(g):
    zb, za = (g(n).clone().requires_grad_() for n in ("logit_coarse", "logit_fine"))
    loss = hierarchical_loss(zb, za, g("y"), MA52.parent)
    loss.backward()
    close(loss, g("tree_loss").float(), atol=1e-5, rtol=0)
    close(zb.grad, g("tree_grad_coarse"), atol=1e-6, rtol=0)
    close(za.grad, g("tree_grad_fine"), atol=1e-6, rtol=0)


LEVELS = dict(fine=("tp_a", ("fn_a1", "fn_a2", "fn_a3"), "fp_a", RELEASED.alpha), coarse=("tp_b", ("fn_b",), "fp_b", (1.,)))


def released_step(g, level, P, raw, w, z):
    "Their feature, their prototypes, their loss: what `stream_terms` does at one level, from the pieces."
    tp, fn, fp, alpha = LEVELS[level]
    s, kw = g.sets(), {k: getattr(RELEASED, k) for k in ("tau", "per_batch", "detach_q", "detach_mu", "detach_p", *CHOICES)}
    f = pool(raw[:,:,None], RELEASED.pool) @ w.T + g(f"{level}_cl_fc_b")
    p = P(f, getattr(s, tp))
    loss = calibration_loss(f, p, z, g.labels()[level], tuple(getattr(s, n) for n in fn), getattr(s, fp), alpha, **kw)
    return loss + (diversity_loss(p.detach(), RELEASED.form) if level=="fine" else 0.), f, p


@pytest.mark.parametrize("level", LEVELS)
def test_calibration_and_prototypes_are_the_released_ones(g, level):
    "Loss, gradients and prototypes; then a second step from where the first one left the prototypes."
    before = g(f"{level}_proto_before").T
    P = Prototypes(*before.shape); P.P = before
    raw, w, z = (t.clone().requires_grad_() for t in (g("raw"), g(f"{level}_cl_fc_w"), g(f"logit_{level}")))
    loss, _, _ = released_step(g, level, P, raw, w, z)
    loss.backward()
    close(loss, g(f"{level}_loss"), atol=5e-6, rtol=0)
    close(raw.grad, g(f"{level}_grad_raw"), atol=2e-7, rtol=0)
    close(w.grad[::8], g(f"{level}_grad_w"), atol=5e-7, rtol=0)
    close(z.grad, g("fine_grad_logit_fine" if level=="fine" else "coarse_grad_logit"), atol=2e-7, rtol=0)
    g.moved(P.P, level, "after")
    with torch.no_grad(): again, _, _ = released_step(g, level, P, raw, w, z)
    close(again, g(f"{level}_loss_step2"), atol=5e-6, rtol=0)
    g.moved(P.P, level, "after2")


def test_four_terms_of_every_sample_are_the_released_ones(g):
    before = g("fine_proto_before").T
    P = Prototypes(*before.shape); P.P = before
    _, f, p = released_step(g, "fine", P, g("raw"), g("fine_cl_fc_w"), g("logit_fine"))
    s, y, q = g.sets(), g("y"), g("logit_fine").softmax(1)
    a1, a2, a3 = RELEASED.alpha
    kw = dict(tau=RELEASED.tau, target=y, centre=y, members=RELEASED.members, penalty=RELEASED.penalty)
    terms = [calibrate(f, p, q, m, sign, scale=a, **kw)
             for m,a,sign in ((s.fn_a1,a1,-1), (s.fn_a3,a3,-1), (s.fn_a2,a2,-1), (s.fp_a,1.,1))]       # in their order
    close(torch.stack(terms), g("fine_terms_perSample"), atol=5e-6, rtol=0)
    close(diversity_loss(p, RELEASED.form), g("fine_diversity"), atol=1e-5, rtol=0)
    again, f, p = released_step(g, "fine", P, g("raw"), g("fine_cl_fc_w"), g("logit_fine"))
    close(diversity_loss(p, RELEASED.form), g("fine_diversity_step2"), atol=1e-5, rtol=0)
    close(g("fine_terms_mean_step2").sum() + g("fine_diversity_step2"), again, atol=1e-5, rtol=0)


# ---- ... and as a whole: head, loss, gradients

def released_head(g):
    "A head of the released reading with their weights and prototypes."
    h = PCANHead(g.C, MA52, RELEASED.gamma[0], RELEASED)
    with torch.no_grad():
        for ours,level in ((h.W2, "fine"), (h.W2_b, "coarse")):
            ours.weight.copy_(g(f"{level}_cl_fc_w")); ours.bias.copy_(g(f"{level}_cl_fc_b"))
    h.P_a.P, h.P_b.P = g("fine_proto_before").T.clone(), g("coarse_proto_before").T.clone()
    return h


def test_released_head_and_loss_are_theirs_end_to_end(g):
    "A feature map goes in, Eq. 12 comes out: two cross-entropies, the tree loss, and PCC and PDA divided by 5."
    h, y = released_head(g), g("y")
    loss = PCANLoss({"rgb": h}, MA52, RELEASED)
    raw, zb, za = (g(n).clone().requires_grad_() for n in ("raw", "logit_coarse", "logit_fine"))
    x = torch.stack([raw+1, raw-1], 2)                                        # (B,C,2,3,3); its mean over time is `raw`
    for step in ("", "_step2"):
        h.zero_grad(); raw.grad = zb.grad = za.grad = None
        total, log = loss({"rgb": h(x)._replace(action=za, body=zb)}, y)
        total.backward(retain_graph=True)
        close(log["rgb/pcc_b"], g(f"coarse_loss{step}"), atol=1e-5, rtol=0)
        close(log["rgb/pcc_a"] + log["rgb/pda"], g(f"fine_loss{step}"), atol=1e-5, rtol=0)
        ce = cross_entropy(za, y) + cross_entropy(zb, g("yb"))                # on the plain logits
        close(total, ce + g("tree_loss").float() + (g(f"coarse_loss{step}") + g(f"fine_loss{step}"))/5, atol=2e-5, rtol=0)
        if step: continue
        close(raw.grad, (g("coarse_grad_raw") + g("fine_grad_raw"))/5, atol=2e-7, rtol=0)
        close(h.W2.weight.grad[::8], g("fine_grad_w")/5, atol=2e-7, rtol=0)
        close(h.W2_b.weight.grad[::8], g("coarse_grad_w")/5, atol=2e-7, rtol=0)
        by_ce = torch.autograd.grad(ce, (zb, za))
        assert not g("fine_grad_logit_coarse").any()                          # the action's PCC leaves the body's logits alone
        close(zb.grad, by_ce[0] + g("tree_grad_coarse") + g("coarse_grad_logit")/5, atol=5e-7, rtol=0)
        close(za.grad, by_ce[1] + g("tree_grad_fine") + g("fine_grad_logit_fine")/5, atol=5e-7, rtol=0)
        g.moved(h.P_a.P, "fine", "after"); g.moved(h.P_b.P, "coarse", "after")
    g.moved(h.P_a.P, "fine", "after2"); g.moved(h.P_b.P, "coarse", "after2")
    assert {k: log[f"rgb/{k}_weight"].item() for k in loss.weights}==dict(ce_a=1, ce_b=1, hp=1, pcc_b=pytest.approx(.2), pcc_a=pytest.approx(.2), pda=pytest.approx(.2))


@pytest.mark.parametrize("reading,trains", [("paper", True), ("released", False)])
def test_diversity_trains_nothing_in_the_released_reading(file, reading, trains):
    g, m = Batch(file, "N10"), READINGS[reading]
    h = PCANHead(g.C, MA52, 1., m)
    s = h(g("raw")[:,:,None].clone().requires_grad_())._replace(action=g("logit_fine"), body=g("logit_coarse"))
    terms, _ = stream_terms(s, h.P_b, h.P_a, g("yb"), g("y"), MA52.parent, 1., m)
    assert terms["pda"]>1 and terms["pda"].requires_grad==trains


@pytest.mark.parametrize("reading", READINGS)
def test_who_rectifies_in_training(file, reading):
    "The paper's cross-entropy sees rectified logits, the released code's does not."
    g, m = Batch(file, "N10"), READINGS[reading]
    h = PCANHead(g.C, MA52, 5., m)
    s = h(g("raw")[:,:,None])._replace(action=g("logit_fine"), body=g("logit_coarse"))
    terms, _ = stream_terms(s, h.P_b, h.P_a, g("yb"), g("y"), MA52.parent, 5., m)
    plain, final = (cross_entropy(z, g("y")) for z in (s.action, rectify(s.action, s.match, h.P_a.P, 5.)))
    close(terms["ce_a"], final if reading=="paper" else plain)
    assert (final-plain).abs()>1e-3


@pytest.mark.parametrize("i,stream", [(0, "rgb"), (1, "pose")])
def test_rectify(rect, i, stream):
    "At the test a released head gives the released scores, with gamma 5 for RGB and 1 for Pose."
    W = lambda n: rect[f"weights/{n}.weight/u"] @ rect[f"weights/{n}.weight/v"]*.05
    b = lambda n: rect[f"weights/{n}.bias"]
    x = rect["f_rgb"][:,:,None,None,None] if stream=="rgb" else rect["x_pose"]
    cl = f"fr_{stream}.spatio_cl_net.cl_fc"
    h = PCANHead(x.shape[1], MA52, RELEASED.gamma[i], RELEASED).eval()
    with torch.no_grad():
        for ours,n in ((h.W1, f"fc_{stream}"), (h.W_b, f"fc_{stream}_coarse"), (h.W2, cl)): ours.weight.copy_(W(n)); ours.bias.copy_(b(n))
        h.P_a.P = rect[f"weights/fr_{stream}.spatio_cl_net.avg_f"].T
        s = h(x)
    close(s.final, rect[f"scores/{stream}"], atol=2e-5, rtol=0)
    close(s.body, rect[f"scores/{stream}_coarse"], atol=2e-5, rtol=0)
    p_a, p_b = fuse({stream: s}, MA52, clips=3)[stream]
    close(p_a, rect[f"avg3clips/{stream}"], atol=1e-5, rtol=0)
    close(p_b, rect[f"avg3clips/{stream}_coarse"], atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("reading", READINGS)
def test_pcc_gradient_is_numerical(reading):
    F, zb, za, y = batch(12)
    s, P, m = ambiguous_sets(zb, za, MA52.parent[y], y), torch.randn(52, 16), READINGS[reading]
    kw = {k: getattr(m, k) for k in ("alpha", "tau", "per_batch", *CHOICES)}
    f = F.clone().requires_grad_()
    loss = lambda x: calibration_loss(x, P, za, y, (s.fn_a1, s.fn_a2, s.fn_a3), s.fp_a, detach_mu=False, **kw)
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


LIVE = dict(detach_q=False, detach_mu=False, detach_p=False)
SYSTEMS = dict(paper=Method(), released=RELEASED, live=Method(form="frobenius", **LIVE), repaired=Repair())


def system(name, **kw):
    "Model and loss of a reading, late in the training; `kw` replace its numbers."
    m = replace(SYSTEMS[name], **kw)
    model, loss = (repaired if name=="repaired" else pcan)(Toy(), MA52, m)
    if name=="repaired": loss.progress = .8
    return model, loss


def inputs(B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 2, 4, 4, generator=g), torch.randn(B, 28, 2, 4, 4, generator=g), torch.randint(10, (B,), generator=g)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype, name):
    torch.manual_seed(0)
    model, loss = system(name)
    rgb, pose, y = inputs(8)
    with torch.autocast("cpu", dtype):
        total, log = loss(model(rgb, pose), y)
    total.backward()
    assert total.dtype==torch.float32 and total.isfinite() and all(v.isfinite() for v in log.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.dtype==torch.float32 for n,b in model.named_buffers() if not n.endswith("parent"))
    exact, _ = loss(model.eval()(rgb, pose), y)
    with torch.autocast("cpu", dtype): near, _ = loss(model(rgb, pose), y)
    assert near.item()==pytest.approx(exact.item(), rel=.02)


@pytest.mark.parametrize("name", ["paper", "released", "live", "repaired"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_train(dtype, name):
    "The loss stands outside of autocast and takes the model's scores as they come."
    model, loss = system(name)
    rgb, pose, y = inputs(8)
    with torch.autocast("cpu", dtype): out = model(rgb, pose)
    assert out["rgb"].feature.dtype==dtype
    total, _ = loss(out, y)
    total.backward()
    assert total.dtype==torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


def corners(B, kind):
    F, zb, za, y = batch(B)
    yb = MA52.parent[y]
    if kind=="right": zb, za = 20.*one_hot(yb, 7), 20.*one_hot(y, 52)
    if kind=="wrong": zb, za = 20.*one_hot((yb+1)%7, 7), 20.*one_hot((y+20)%52, 52)
    if kind=="sure": zb, za = 1e4*one_hot((yb+1)%7, 7), 1e4*one_hot((y+20)%52, 52)
    if kind=="zero": F = 0*F
    return F, zb, za, y


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("kind", ["random", "right", "wrong", "sure", "zero"])
@pytest.mark.parametrize("name", [*SYSTEMS, "other"])
def test_terms_are_finite_in_every_corner(B, kind, name):
    F, zb, za, y = corners(B, kind)
    other = Method(form="frobenius", fp_target="truth", fp_sign=-1, prob="softmax", per_batch=None, **LIVE)
    leaves = [t.clone().requires_grad_() for t in (F, zb, za)]
    f, b, a = leaves
    s = Scores(a, a, b, f, f)
    if name=="repaired":
        h = RepairedHead(16, MA52, replace(SYSTEMS[name], width=16))
        for _ in range(2): terms, _ = repaired_terms(s, h, y, MA52.parent)           # memories empty, then not
        leaves.append(h.p)
    else: terms, _ = stream_terms(s, Prototypes(7, 16), Prototypes(52, 16), MA52.parent[y], y, MA52.parent, 5., SYSTEMS.get(name, other))
    sum(terms.values()).backward()
    assert all(v.isfinite() for v in terms.values()) and all(t.grad.isfinite().all() for t in leaves)
    if kind=="right" and name in ("paper", "live", "other"): assert terms["pcc_a"]==0 and terms["pcc_b"]==0
    if kind=="right" and name=="released": assert terms["pcc_a"]>0 and terms["pcc_b"]>0


@pytest.mark.parametrize("name,kept", [("paper", ("P_a.P", "P_b.P")), ("released", ("P_a.P", "P_b.P")), ("repaired", ("counts", "fn.P", "fp.P", "memory.P"))])
def test_checkpoint_holds_all_memories(name, kept):
    model, loss = system(name)
    rgb, pose, y = inputs(64)
    for _ in range(3): loss(model(rgb, pose), y)
    fresh, again = system(name); fresh.load_state_dict(model.state_dict())
    weights = {n for n,_ in model.named_parameters()}
    assert sorted(n for n in model.state_dict() if n not in weights)==sorted(f"heads.{s}.{n}" for s in ("rgb", "pose") for n in kept)
    model.eval(); fresh.eval()
    for k in ("rgb", "pose"): close(model(rgb, pose)[k].final, fresh(rgb, pose)[k].final)
    close(loss(model(rgb, pose), y)[0], again(fresh(rgb, pose), y)[0])


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_belongs_to_its_model(name):
    model, loss = system(name)
    assert not list(loss.parameters()) and not loss.state_dict()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    model.eval(); rgb, pose, y = inputs(64); loss(model(rgb, pose), y)
    assert all(torch.equal(before[k], v) for k,v in model.state_dict().items())
    model.train(); loss(model(rgb, pose), y)
    moved = {k for k,v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert moved and moved <= {n for n,_ in model.named_buffers()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_total_is_the_weighted_history(name):
    torch.manual_seed(0)
    model, loss = system(name, **({} if name=="repaired" else dict(beta=.3, hp=2., pcc=.5)))
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


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_reads_nothing_back(name):
    "The meta device has shapes but no values: whatever waits for a value fails there, as it would make a GPU wait."
    with torch.device("meta"):
        model, loss = system(name)
        rgb, pose, y = torch.empty(8, 3, 2, 4, 4), torch.empty(8, 28, 2, 4, 4), torch.empty(8, dtype=torch.long)
        total, log = loss.to("meta")(model(rgb, pose), y)
        total.backward()
        out = model.eval()(rgb, pose)
    assert total.is_meta and all(v.is_meta for v in log.values()) and all(s.final.is_meta for s in out.values())


def test_best_child_agrees_with_the_tree():
    p = torch.randn(2000, 52, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    for q in (p, p.half().float(), torch.full((3, 52), 1/52)):
        b = best_child(q, MA52)
        assert torch.equal(b.argmax(1), MA52.parent[q.argmax(1)])
        close(b.sum(1), torch.ones(len(q)))


def test_poseconv3d_head():
    model, loss = poseconv3d(Toy(), MA52)
    rgb, pose, y = inputs(8)
    total, log = loss(model(rgb, pose), y)
    total.backward()
    assert list(log)==["rgb/ce_a", "pose/ce_a"] and total.item()==pytest.approx(sum(log.values()).item())
    assert isinstance(loss, CELoss) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_method_is_plain_and_strict(reading):
    m = READINGS[reading]
    assert Method(**asdict(m))==m and hash(m) and pickle.loads(pickle.dumps(m))==m and replace(m, lam=0.).lam==0
    assert Method(alpha=[1,2,3], gamma=[0,1], width=[8,9])==Method(alpha=(1,2,3), gamma=(0,1), width=(8,9))


@pytest.mark.parametrize("wrong", [dict(form="x"), dict(prob="tanh"), dict(pool="sum"), dict(members="some"), dict(alpha_on="loss"), dict(penalty="all"),
    dict(fp_target="other"), dict(fp_centre="other"), dict(alpha=(1,)), dict(alpha=(1,2,3,4)), dict(gamma=(1,)), dict(rectified_ce=False)], ids=str)
def test_method_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Method(**wrong)


def test_method_has_no_other_fields():
    for kw in (dict(temperature=1), dict(reading="released")):
        with pytest.raises(TypeError): Method(**kw)
    assert Method(rectified_ce=False, gamma=(0,0)).rectified_ce is False            # nothing to rectify with: fine
    assert CHOICES.keys() <= asdict(Method()).keys()


# ---- several processes

KINDS = "tp_a", "fn_a1", "fn_a2", "fn_a3"


def shared_batch(model, B=24):
    "Inputs, and labels such that all four sets of the RGB stream hold somebody."
    rgb, pose, _ = inputs(B)
    with torch.no_grad():
        for h in model.heads.values():
            h.W1.weight.normal_(std=.5, generator=torch.Generator().manual_seed(2)); h.W_b.weight.copy_(h.W1.weight[[0,5,11,24,32,38,48]]*2)
        s = model(rgb, pose)["rgb"]
    a, b = s.action.argmax(1), s.body.argmax(1)
    other = lambda i, ok: next(k for k in range(52) if k!=a[i] and ok(MA52.parents[k]==b[i]))      # an action of, or not of, the predicted body
    y = [other(i, bool) if i%3==0 else other(i, lambda same: not same) if i%3==1 else a[i].item() for i in range(B)]
    return rgb, pose, torch.tensor(y)


def steps(name, rank=0, world=1):
    "Two training steps on this process's share of a batch. What must not depend on the number of processes, by name."
    torch.manual_seed(0)
    model, loss = system(name, dropout=0.)
    rgb, pose, y = shared_batch(model)
    net = torch.nn.parallel.DistributedDataParallel(model) if world>1 else model
    opt, mine = torch.optim.SGD(model.parameters(), .01), slice(rank*len(y)//world, (rank+1)*len(y)//world)
    out = {}
    for i in range(2):
        opt.zero_grad()
        total, log = loss(net(rgb[mine], pose[mine]), y[mine])
        total.backward()
        for k,v in {"total": total.detach(), **log}.items():
            if world>1: v = v.clone(); torch.distributed.all_reduce(v); v /= world
            out[f"{i}/{k}"] = v
        out |= {f"{i}/grad/{n}": p.grad.clone() for n,p in model.named_parameters()}
        opt.step()
        out |= {f"{i}/{k}": v.clone() for k,v in model.state_dict().items()}
    return out


def test_two_processes_are_one(tmp_path):
    "torchrun with two processes and half a batch each: the same losses, gradients, weights and prototypes as one process with all of it."
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = subprocess.run(run, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120)
    assert done.returncode==0, done.stderr[-2000:]
    for name in SYSTEMS:
        one, two = steps(name), torch.load(tmp_path/f"{name}.pt", weights_only=True)
        assert all(0 < one[f"0/rgb/share_{k}"] < 1 for k in KINDS)
        assert one.keys()==two.keys()
        for k in one: close(two[k], one[k], atol=2e-5, rtol=2e-5, msg=lambda m: f"{name}, {k}: {m}")


def main(folder):
    "One of several processes."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in SYSTEMS:
        out = steps(name, rank, world)
        if rank==0: torch.save(out, Path(folder)/f"{name}.pt")
    torch.distributed.barrier()
    os._exit(0)                       # at once: gloo's threads now and then abort a process that takes itself apart




@pytest.mark.parametrize("reading", READINGS)
def test_compiles_whole(reading, file):
    "The losses are one graph without a break; compiled and plain agree, and the prototypes move the same way."
    g, m = Batch(file, "N10"), READINGS[reading]
    losses, total = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        h = PCANHead(g.C, MA52, 1., replace(m, dropout=0.))
        losses.append(PCANLoss({"rgb": h}, MA52, m))
        step = lambda raw, za, zb, y, loss=losses[-1], h=h: loss({"rgb": h(raw[:,:,None])._replace(action=za, body=zb)}, y)
        if compiled: step = torch.compile(step, fullgraph=True, backend="aot_eager")
        total.append(step(g("raw"), g("logit_fine"), g("logit_coarse"), g("y"))[0])
    close(*total)
    (_, a), (_, b) = losses[0].owners[0], losses[1].owners[0]
    torch.manual_seed(0); start = PCANHead(g.C, MA52, 1., replace(m, dropout=0.)).P_a.P
    close(a.P_a.P, b.P_a.P); close(a.P_b.P, b.P_b.P); assert not torch.equal(a.P_a.P, start)


if __name__=="__main__": main(sys.argv[1])
