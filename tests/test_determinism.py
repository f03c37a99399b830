"Same run, same machine: the same bits, whoever reads the clips; what is random has a stream of its own."
import numpy as np
import pytest
import torch
from dataclasses import replace
from pcan import config, runs
from pcan.clips import Clips, loader
from pcan.systems import SYSTEMS
from pcan.train import seed_epoch

@pytest.fixture(scope="module")
def short(): return config.make("pcan", "smoke", epochs=2)

def trained(run, folder, monkeypatch, workers):
    monkeypatch.setenv("PCAN_REPORTS", str(folder))
    return runs.get(run, progress=False, workers=workers)

def test_trained_again_with_any_number_of_readers(short, tmp_path, monkeypatch):
    "Metrics, scores, history and weights: twice with no reader, then with one and two."
    made = [trained(short, tmp_path/str(i), monkeypatch, w) for i,w in enumerate((0, 0, 1, 2))]
    from safetensors.torch import load_file
    timeless = lambda r: [{k: v for k,v in row.items() if k!="seconds"} for row in r.history]
    weights = [load_file(r.path/"model.safetensors") for r in made]
    for r,w in zip(made[1:], weights[1:]):
        assert r.metrics==made[0].metrics and timeless(r)==timeless(made[0])
        for s in ("val", "test"):
            a, b = made[0].scores(s), r.scores(s)
            assert all(np.array_equal(a[k], b[k]) for k in a)
        assert all(torch.equal(weights[0][k], w[k]) for k in w)

def batches(run, epoch=0, seed=0):
    clips = Clips(config.data_root(run), "train", run.clip, train=True, seed=seed); clips.set_epoch(epoch)
    return list(loader(clips, 16))

def same(a, b): return all(torch.equal(x[k], y[k]) for x,y in zip(a, b) for k in x if torch.is_tensor(x[k]))

def test_streams_apart(short):
    "Order and augmentation know the seed, the epoch and the clip, not what torch drew before; first weights know the seed only; dropout the seed and the epoch."
    config.ensure_data("smoke", progress=False)
    torch.manual_seed(1); a = batches(short)
    torch.manual_seed(2); torch.rand(100); b = batches(short)
    assert same(a, b) and not same(a, batches(short, epoch=1)) and not same(a, batches(short, seed=1))
    def weights(seed):
        seed_epoch(seed, -1); return SYSTEMS["pcan"].build(replace(short, seed=seed))[0].state_dict()
    first = weights(0); batches(short); again = weights(0); other = weights(1)
    assert all(torch.equal(first[k], again[k]) for k in first) and not all(torch.equal(first[k], other[k]) for k in first)
    def mask(seed, epoch): seed_epoch(seed, epoch); return torch.nn.functional.dropout(torch.ones(99))
    assert torch.equal(mask(0, 3), mask(0, 3)) and not torch.equal(mask(0, 3), mask(0, 4)) and not torch.equal(mask(0, 3), mask(1, 3))

def test_threads_change_rounding_only(short):
    "One training step on one and on two threads: the loss agrees to five digits, the gradient to one part in a hundred (batch norms amplify rounding). Runs use one thread."
    from pcan.augment import prepare
    batch, before = batches(short)[0], torch.get_num_threads()
    def step(threads):
        torch.set_num_threads(threads); seed_epoch(0, -1)
        model, loss = SYSTEMS["pcan"].build(short)
        total, _ = loss(model.train()(*prepare(batch, short.clip, True)), batch["label"])
        total.backward()
        return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    try: (a, ga), (b, gb) = step(1), step(2)
    finally: torch.set_num_threads(before)
    assert a==pytest.approx(b, rel=1e-5) and (ga-gb).norm()<=1e-2*ga.norm()
