"""Metrics against the reference evaluation (scikit-learn 1.9.1 and mmaction2's accuracy, run on seeded scores)."""
import json
from pathlib import Path
import numpy as np
import pytest
from pcan.metrics import class_accuracy, confusion, evaluate, f1_mean, f1_scores, majority, mean_class_accuracy, topk
from pcan.tree import MA52, TRAIN_COUNTS

GOLDEN = Path(__file__).parent/"golden"
DATA = np.load(GOLDEN/"metrics.npz")
WANT = json.loads((GOLDEN/"metrics.json").read_text())["report"]
NAMES = dict(body_top1="body_top1", body_f1_macro="f1_macro_body", body_f1_micro="f1_micro_body",
             action_f1_macro="f1_macro_action", action_f1_micro="f1_micro_action", f1_mean="f1_mean")
EPS = 1e-9   # float64 on both sides; only the order of additions differs


def scores(case, stream="fused", body=True):
    rgb, pose = (1, 1) if stream=="fused" else (1, 0) if stream=="rgb" else (0, 1)
    mix = lambda k: (rgb*DATA[f"{case}/rgb{k}"] + pose*DATA[f"{case}/pose{k}"])/(rgb+pose)
    return dict(p_action=mix(""), **(dict(p_body=mix("_coarse")) if body else {}))


@pytest.mark.parametrize("case", WANT)
@pytest.mark.parametrize("body", [True, False])
def test_evaluate(case, body):
    y, yb, want = DATA[f"{case}/y"], DATA[f"{case}/yb"], WANT[case]
    got = evaluate(scores(case, body=body), y, yb, MA52)
    assert list(got)==["body_top1", "action_top1", "action_top5", "body_f1_macro", "body_f1_micro",
                       "action_f1_macro", "action_f1_micro", "f1_mean", "action_mean1"]
    for k in ("action_top1", "action_top5", "action_mean1"): assert got[k]==pytest.approx(want[k], abs=EPS)
    level = want["body_classifier" if body else "body_from_action"]
    for k,n in NAMES.items(): assert got[k]==pytest.approx(level[n], abs=EPS)


@pytest.mark.parametrize("case", WANT)
@pytest.mark.parametrize("stream", ["rgb", "pose"])
def test_streams(case, stream):
    got = evaluate(scores(case, stream), DATA[f"{case}/y"], DATA[f"{case}/yb"], MA52)
    for k,n in dict(action_top1="top1", action_top5="top5", action_mean1="mean1").items():
        assert got[k]==pytest.approx(WANT[case]["AccMetric"][f"{stream}_{n}"], abs=EPS)


@pytest.mark.parametrize("case", WANT)
def test_float16_scores_change_no_decision_here(case):
    s = scores(case)
    half = {k: v.astype(np.float16) for k,v in s.items()}
    y, yb = DATA[f"{case}/y"], DATA[f"{case}/yb"]
    assert evaluate(half, y, yb, MA52)==evaluate(s, y, yb, MA52)


def test_f1_is_sklearns():
    from sklearn import metrics
    rng = np.random.RandomState(0)
    for _ in range(30):
        n, K = rng.randint(1, 200), rng.randint(2, 60)
        y, pred = rng.randint(rng.randint(1, K+1), size=n), rng.randint(K, size=n)
        want = [metrics.f1_score(y, pred, average=a) for a in ("macro", "micro")]
        np.testing.assert_allclose(f1_scores(y, pred, K), want, atol=1e-12)
        np.testing.assert_array_equal(confusion(y, pred, K), metrics.confusion_matrix(y, pred, labels=range(K)))


def test_majority():
    y = np.repeat(np.arange(52), TRAIN_COUNTS)
    got = evaluate(majority(TRAIN_COUNTS, len(y), MA52), y, None, MA52)
    assert got["action_top1"]==pytest.approx(1283/11250) and got["body_top1"]==pytest.approx(4473/11250)


def test_errors_and_corners():
    with pytest.raises(ValueError, match="hidden test labels"): confusion(np.array([-1]), np.array([0]), 3)
    with pytest.raises(ValueError, match="2 labels and 1 predictions"): confusion([0, 1], [0], 3)
    with pytest.raises(ValueError, match="expected ids"): confusion([], [], 3)
    with pytest.raises(ValueError, match="expected ids"): confusion([0], [3], 3)
    one = evaluate(dict(p_action=np.eye(52)[:1]), np.array([0]), None, MA52)
    assert set(one.values())=={1.}
    assert topk(np.ones((2, 52)), np.array([0, 5]), 5)==.5          # ties go by class id
    assert np.isnan(class_accuracy([0], [0], 2)[1]) and mean_class_accuracy([0], [1], 2)==0
    assert f1_mean((1, 0), (1, 0))==.5
