"Errors: what a confusion table, F1 per action, thirds and prototypes must satisfy whatever the numbers, on runs made by hand."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pcan import errors, files
from pcan.metrics import f1_scores
from pcan.tree import MA52, TRAIN_COUNTS
from pcan.verdicts import clip_weights, predictions

K, PARENTS = MA52.K_A, np.array(MA52.parents)


def made(seed, n=500, right=.5, few=K):
    r = np.random.default_rng(seed); y = np.random.default_rng(0).integers(0, few, n)
    return predictions(dict(y_a=y, fused_action=np.eye(K)[np.where(r.random(n)<right, y, r.integers(0, K, n))], subject=np.arange(n)%10))


@pytest.mark.parametrize("few", [K, 9])
def test_rows_sum_to_one_and_clips_are_kept(few):
    runs = [made(1, few=few), made(2, few=few)]
    t = errors.confusions({"a": runs}); C = errors.matrix(t); seen = np.bincount(runs[0].y_a, minlength=K)>0
    assert np.allclose(C.sum(1), seen) and C.min()>=0
    assert np.allclose(errors.matrix(t, "clips").sum(1), np.bincount(runs[0].y_a, minlength=K)) and (t.clips>0).all()


def test_a_perfect_system():
    p = made(1, right=1.); W = clip_weights(p, R=20)
    assert (errors.matrix(errors.confusions({"a": [p]}))==np.eye(K)).all() and np.nanmin(errors.class_f1(p, W))==1
    assert np.isnan(errors.inside(p, W)).all() and np.isnan(errors.by_luck(p))
    assert errors.follows([p], TRAIN_COUNTS, W) is None, "F1 that is the same everywhere follows nothing"
    assert errors.plain(None)=="no value"


def test_inside_against_a_loop():
    p = made(3); wrong = [(y, q) for y,q in zip(p.y_a, p.p_a) if y!=q]
    assert np.isclose(errors.inside(p)[0], np.mean([PARENTS[y]==PARENTS[q] for y,q in wrong]))
    share = np.bincount(p.p_a, minlength=K)/len(p.p_a)
    luck = np.mean([sum(share[k] for k in range(K) if k!=y and PARENTS[k]==PARENTS[y])/sum(share[k] for k in range(K) if k!=y) for y,_ in wrong])
    assert np.isclose(errors.by_luck(p), luck) and abs(errors.inside(p)[0] - luck)<.06, "these errors are luck"


def test_f1_of_every_action():
    p = made(4); assert np.isclose(errors.class_f1(p).mean(), f1_scores(p.y_a, p.p_a, K)[0])
    assert np.allclose(errors.class_f1(p, np.full((1, 500), 3.)), errors.class_f1(p))
    few = made(4, few=9); assert np.isnan(errors.class_f1(few)[0,9:]).all() and np.isfinite(errors.class_f1(few)[0,:9]).all()


def test_thirds_are_thirds():
    third = errors.thirds(TRAIN_COUNTS); c = np.array(TRAIN_COUNTS)
    assert sorted(np.bincount(third))==[17, 17, 18] and c[third==0].min()>=c[third==1].max() and c[third==1].min()>=c[third==2].max()
    a, b = made(5), made(6, right=.7); W = clip_weights(a, R=200)
    assert all(d[:3]==(0, 0, 0) for d in errors.third_gains([a], [a], TRAIN_COUNTS, W))
    one, other = (errors.third_gains(*x, TRAIN_COUNTS, W) for x in (([a], [b]), ([b], [a])))
    assert np.allclose([d.value for d in one], [-d.value for d in other])
    t = errors.third_table(dict(PoseConv3D=[a], PCAN=[b]), TRAIN_COUNTS, one)
    assert np.allclose(t.PCAN - t.PoseConv3D, t.value) and t.actions.sum()==K


def test_an_empty_third_has_no_interval():
    a = made(7, few=9); W = clip_weights(a, R=50); gone = np.arange(K)
    assert errors.third_gains([a], [a], gone, W)[0] is None, "ids 0 to 8 only: nobody plays the most frequent third"
    assert np.isnan(errors.third_table(dict(PoseConv3D=[a], PCAN=[a]), gone, [None]*3).value).all()


def test_rank_correlation_finds_what_was_put_in():
    y = np.repeat(np.arange(K), 20); order = np.arange(K); said = np.where(np.arange(len(y))%20<=order[y]*19//K, y, (y+1)%K)
    p = predictions(dict(y_a=y, fused_action=np.eye(K)[said], subject=np.arange(len(y))%20)); W = clip_weights(p, R=100)
    up, down = errors.follows([p], order+1, W), errors.follows([p], K-order, W)
    assert up.lo>.5 and np.isclose(up.value, -down.value)


def test_start_that_is_left():
    torch.manual_seed(0); P = torch.randn(40, 512)
    assert np.allclose(errors.start_left(P), 1, atol=.15) and errors.start_left(P.abs()).max()==0
    moved = .9**5*P + (1-.9**5)*torch.rand(40, 512)
    assert (errors.start_left(moved)<=.9**5*errors.start_left(P)+1e-6).all(), "an estimate from below"


def test_clips_are_spread_over_actions():
    y = np.repeat([1, 2, 3], [50, 5, 1]); at = errors.spread_out(y, 12)
    assert len(at)==12 and list(np.bincount(y[at])[1:])==[6, 5, 1] and len(errors.spread_out(y, 999))==56


def test_shuffles_see_blocks_and_nothing_else():
    same = np.equal.outer(PARENTS, PARENTS).astype(float)
    assert errors.alike(same, PARENTS, 99)==(1., .01) and errors.alike(-same, PARENTS, 99)==(-1., .01)
    assert np.isnan(errors.alike(same[:1,:1], PARENTS[:1], 9)[0])
    r = np.random.default_rng(0); p = [errors.alike((x := r.normal(size=(K, K))) + x.T, PARENTS, 99, i)[1] for i in range(40)]
    assert np.mean(np.array(p)<=.05)<.2


def table(sign, left=0.):
    C = sign*np.equal.outer(PARENTS, PARENTS).astype(float)
    return pd.concat([pd.DataFrame(C, columns=MA52.actions).assign(stream=s, left=left) for s in ("rgb", "pose")])

@pytest.mark.parametrize("sign,outcome", [(1, "holds"), (-1, "does not hold"), (0, "cannot be told")])
def test_verdict_on_prototypes(sign, outcome):
    v = errors.judge_alike("A.", table(sign), R=99); assert v.outcome==outcome and "of the 52 that moved" in v.why
    assert "that moved" not in errors.judge_alike("A.", table(sign, 1.), R=99).why


def test_prototypes_are_kept_and_belong_to_a_run(tmp_path, monkeypatch):
    torch.manual_seed(0); F, P, run, y = torch.rand(20, 8), torch.randn(K, 8), SimpleNamespace(name="r"), np.arange(20)
    monkeypatch.setattr(errors, "folder", lambda *a: tmp_path/a[-1])
    monkeypatch.setattr(errors, "features", lambda run, split, pick: (y[pick(y)], {s: (F[pick(y)], P) for s in ("rgb", "pose")}))
    fresh = errors.kept_prototypes(run, "test", ("a", "b"), "quick")
    assert len(fresh[0])==2*K and len(fresh[1])==2*(20+K) and np.allclose(np.diag(fresh[0][list(MA52.actions)][:K]), 1)
    for t,n in zip(fresh, "ab"): t.to_csv(tmp_path/f"{n}.csv", index=False, float_format="%.6f")
    def no_weights(*a): raise files.DataError("no weights")
    monkeypatch.setattr(errors, "features", no_weights)
    for a,b in zip(fresh, errors.kept_prototypes(run, "test", ("a", "b"), "quick")): pd.testing.assert_frame_equal(a, b, check_dtype=False)
    assert errors.kept_prototypes(SimpleNamespace(name="other"), "test", ("a", "b"), "quick") is None
    assert errors.kept_prototypes(run, "test", ("a", "c"), "quick") is None


def test_features_with_negative_numbers_say_nothing_about_the_start(monkeypatch):
    monkeypatch.setattr(errors, "features", lambda run, split, pick: (np.arange(5), {"rgb": (torch.randn(5, 8), torch.randn(K, 8))}))
    t, _ = errors.prototypes(SimpleNamespace(name="r"), "test"); assert t.left.isna().all()
    errors.plot_cosines(t)


def test_figures_of_very_little():
    "A smoke run has a handful of clips; every drawing still comes out."
    import matplotlib.pyplot as plt
    p = {s: [made(i, n=6, few=3)] for i,s in enumerate(("PoseConv3D", "PCAN"))}; W = clip_weights(p["PCAN"][0], R=20); counts = np.eye(K, dtype=int)[0]*3
    errors.plot_confusions(errors.confusions(p)); errors.plot_confusions(errors.confusions({"a": [made(0, n=6, right=1., few=3)]}))
    errors.plot_frequency(errors.frequency_table(p, counts), {s: errors.plain(errors.follows(q, counts, W)) for s,q in p.items()})
    errors.plot_thirds(errors.third_table(p, counts, errors.third_gains(*p.values(), counts, W))); plt.close("all")
