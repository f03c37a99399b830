"Differences, intervals and tests: people are drawn, not clips; many comparisons are corrected together."
import time
from math import comb
from pathlib import Path
import numpy as np, pytest
from pcan import config, runs, verdicts
from pcan.files import DataError, read_json
from pcan.tree import MA52
from pcan.verdicts import Predictions, clip_weights, comparisons, difference, flip_test, holm, in_words, mcnemar, predictions, score, subject_weights

RUNS = Path(__file__).resolve().parent.parent/"reports"/"runs"
METRICS = ("action_top1", "action_f1_macro", "body_top1", "f1_mean")

def made(r, who, right): # predictions of all classes, right with probability `right` per clip
    y = np.arange(len(who))%52; p = np.where(r.random(len(who))<right, y, r.integers(0, 52, len(who)))
    par = np.array(MA52.parents); return Predictions(y, par[y], p, par[p], who)

def pair(seed=0, J=12, m=26, seeds=1, gain=.08, spread=.1):
    r = np.random.default_rng(seed); who = np.repeat(np.arange(J), m); g = (gain + spread*r.standard_normal(J))[who]
    return [made(r, who, .5+g) for _ in range(seeds)], [made(r, who, .5) for _ in range(seeds)]

def take(p, i): return Predictions(*(x[i] for x in p))
def loose(p): return p._replace(subject=np.arange(len(p.y_a)))
def ends(d): return np.array([d.value, d.lo, d.hi, d.p])

def test_subjects_from_names_or_as_told():
    y = dict(y_a=np.array([9, 9, 5]), fused_action=np.eye(52)[[9, 5, 5]])
    of = lambda **kw: predictions(y | kw).subject.tolist()
    assert of(name=["0009_01_0001", "0003_01_0002", "0009_02_0003.mp4"])==[1, 0, 1]
    assert of()==of(name=["test0000", "test0001", "test0002"])==[0, 1, 2]
    assert of(name=["test0000", "test0001", "test0002"], subject=[7, 4, 7])==[1, 0, 1], "who is told counts"

@pytest.mark.parametrize("profile", ["quick", "bench"])
def test_stored_scores_know_whose_clips(profile):
    "Of test clips the generator tells; what it tells of val clips is what their names say."
    from pcan.synth import SPECS, cast
    path = next(p.parent for p in sorted(RUNS.glob(f"*-{profile}-*/metrics.json")))
    result = runs.Result(config.from_dict(config.Run, read_json(path/"config.json")), path)
    test, val = result.scores("test"), result.scores("val")
    assert len(set(test["subject"]))==30 and len(set(predictions(test).subject))==30 and "subject" not in val
    assert [int(n.split("_")[0]) for n in val["name"]]==[cast(SPECS[profile], "val", i)[0]+1 for i in range(len(val["name"]))]
    assert not set(test["subject"]+1) & {int(n.split("_")[0]) for n in val["name"]}, "nobody is in two splits"
    with pytest.raises(DataError, match="train the run again"): runs.played_by(result.run.data, "test", test | dict(y_a=test["y_a"][::-1]))

def test_with_one_clip_a_subject_people_are_clips():
    (a,), (b,) = pair(J=1, m=200)
    a, b = loose(a), loose(b); shuffled = np.random.default_rng(1).permutation(200)
    W = np.random.default_rng(5).multinomial(200, np.full(200, 1/200), size=4000).astype(float)   # clips drawn, by hand
    for m in METRICS:
        byhand = (score(a, m, W) - score(b, m, W)).std()
        for who in (a.subject, shuffled):
            d = difference([a._replace(subject=who)], [b._replace(subject=who)], m)
            assert np.isclose((d.hi-d.lo)/2/1.972, byhand, rtol=.06), m
            assert d.subjects==d.clips==200 and "subjects" not in d.base

def test_order_of_the_clips_does_not_matter():
    (a, c), (b, d) = pair(seeds=2); i = np.random.default_rng(3).permutation(len(a.y_a))
    for m in METRICS:
        assert np.allclose(ends(difference([a, c], [b, d], m)), ends(difference([take(a, i), take(c, i)], [take(b, i), take(d, i)], m)), rtol=1e-9), m
    assert np.isclose(flip_test([a], [b]), flip_test([take(a, i)], [take(b, i)])) and mcnemar(a, b)==mcnemar(take(a, i), take(b, i))

def test_duplicated_clips_are_no_new_people():
    (a,), (b,) = pair(); twice = np.repeat(np.arange(len(a.y_a)), 2)
    for m in METRICS: assert np.allclose(ends(difference([a], [b], m)), ends(difference([take(a, twice)], [take(b, twice)], m)), rtol=1e-9), m
    width = lambda p, q: np.ptp(ends(difference([loose(p)], [loose(q)], "action_top1"))[1:3])
    assert width(take(a, twice), take(b, twice))<.8*width(a, b), "clips without subjects would fall for it"
    assert flip_test([a], [b])==flip_test([take(a, twice)], [take(b, twice)])

def test_groups_are_clips_with_equal_weights():
    (a,), _ = pair(); W = subject_weights(12)[:50]
    assert np.array_equal(W[:,a.subject], clip_weights(a)[:50]) and (W.sum(1)==12).all() and (W[0]==1).all()
    for m in METRICS: assert np.allclose(score(a, m, W, a.subject), score(a, m, W[:,a.subject])), m

def test_no_difference_is_none():
    a, _ = pair(seeds=3)
    for n in (1, 3):
        for m in METRICS: assert difference(a[:n], a[:n], m)[:3]==(0, 0, 0) and difference(a[:n], a[:n], m).p==1
    assert mcnemar(a[0], a[0])==(0, 0, 1) and flip_test(a, a)==1

def test_p_and_interval_agree():
    a, b = pair(seeds=3)
    for s in (1, 3):
        p = difference(a[:s], b[:s], "action_top1").p
        for level in (1-p*1.01, 1-p*.99):
            d = difference(a[:s], b[:s], "action_top1", level); assert (d.lo>0 or d.hi<0)==(level<1-p)

def test_people_and_seeds_add_in_quadrature():
    "Seeds that agree leave the interval of the people; a spread of .1 over three seeds adds its own half-width, t(2) = 4.3027."
    (a,), (b,) = pair(); half = lambda d: (d.hi-d.lo)/2
    one, same = difference([a], [b], "action_top1"), difference([a]*3, [b]*3, "action_top1")
    assert np.allclose(ends(one), ends(same)) and (one.seeds, same.seeds)==(1, 3)
    W = subject_weights(12); draws = score(a, "action_top1", W, a.subject) - score(b, "action_top1", W, a.subject)
    apart = verdicts.interval(draws + np.array([[-.1], [0], [.1]]), a)
    assert np.isclose(apart.value, one.value) and np.isclose(half(apart)**2, half(one)**2 + (4.3027*.1/3**.5)**2, rtol=1e-4)
    assert one.base=="1 seed, 12 subjects, 312 clips" and same.base=="3 seeds, 12 subjects, 312 clips"

def test_what_cannot_be_compared():
    (a,), (b,) = pair(); one = lambda p: p._replace(subject=np.zeros(len(p.y_a), int))
    with pytest.raises(ValueError, match="clips of one subject; expected two"): difference([one(a)], [one(b)])
    for other in (loose(b), take(b, slice(0, 100)), take(b, slice(None, None, -1))):
        with pytest.raises(ValueError, match="same seeds scored on the same clips"): difference([a], [other])
        with pytest.raises(ValueError, match="same seeds"): mcnemar(a, other)
    with pytest.raises(ValueError, match="same seeds"): flip_test([], [])
    with pytest.raises(ValueError, match="no comparisons"): in_words({})

@pytest.mark.parametrize("n,m", [(0, 0), (1, 0), (8, 2), (2, 8), (5, 5), (30, 14)])
def test_mcnemar_is_the_binomial(n, m):
    ok = np.zeros((2, 60), bool); ok[0,:n] = True; ok[1,n:n+m] = True; ok[:,50:] = True
    a, b = (predictions(dict(y_a=np.full(60, 9), fused_action=np.eye(52)[np.where(x, 9, 5)])) for x in ok)
    tail = sum(comb(n+m, k) for k in range(max(n, m), n+m+1))/2**(n+m)
    assert mcnemar(a, b)[:2]==(n, m) and np.isclose(mcnemar(a, b).p, min(1, 2*tail))

def test_flips_by_hand_and_at_random():
    y = np.full(6, 9); of = lambda p, who: Predictions(y, y, np.array(p), y, np.array(who))
    all_right, none = [9]*6, [5]*6
    assert flip_test([of(all_right, range(6))], [of(none, range(6))])==2/2**6
    assert flip_test([of(all_right, [0]*3+[1]*3)], [of(none, [0]*3+[1]*3)])==2/2**2, "two people cannot show more"
    a, b = pair(J=10); many = pair(J=14)
    assert abs(flip_test(*many, R=9999, seed=1) - flip_test(*many, R=9999, seed=2))<.02
    assert flip_test(a*3, b*3)==flip_test(a, b), "the same network three times is one network"

def test_holm_by_hand():
    assert np.allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    assert np.allclose(holm([.02]), [.02]) and np.allclose(holm([.9, .8, .001]), [1, 1, .003]) and len(holm([]))==0
    p = np.random.default_rng(0).random(30)**3
    assert (holm(p)<=np.minimum(30*p, 1)+1e-12).all() and (holm(p)>=p).all(), "between no correction and Bonferroni"

def test_a_table_in_words():
    found = comparisons({"good": pair(1, gain=.35, spread=.02), "same, as it were": pair(2, gain=0.)}, ("action_top1", "f1_mean"))
    assert {k: c.adjusted["action_top1"]<.05 for k,c in found.items()}=={"good": True, "same, as it were": False}
    for c in found.values(): assert set(c.mcnemar)==set(c.flips)=={"action_top1"} and len(c.mcnemar["action_top1"])==1
    text = in_words(found); real, noise, reach = text.split("; ")
    assert "for 4 comparisons: “good” (action top-1 +" in real and "“same, as it were”" in noise and "good" not in noise
    assert real.endswith("(taken one at a time, 2 of the 4)") and "one at a time" not in in_words(comparisons({"one": pair(1)}, ("f1_mean",)))
    assert "1 seed, 12 subjects" in reach and "these networks only" in reach and text.count(".")==1 + real.count("+") and text.endswith(".")
    several = in_words(comparisons({"a": pair(2, seeds=3, gain=0.)}, ("action_top1",)))
    assert "these networks only" not in several and "none; not told from noise: all" in several and "3 seeds" in several

def test_ten_comparisons_take_seconds():
    r = np.random.default_rng(0); who = r.integers(0, 30, 1500)
    pairs = {str(i): ([made(r, who, .6) for _ in range(3)], [made(r, who, .58) for _ in range(3)]) for i in range(10)}
    start = time.process_time(); comparisons(pairs, METRICS)
    assert time.process_time()-start<8
