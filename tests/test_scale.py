"One run on many processes: what one process computes, two or three compute too. CPUs and gloo."
import os, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from pcan import config, runs
from pcan.scale import ProcessError, agreed, check_split, launch, make_accelerator, processes, scaled
from pcan.train import Optim, fit, predict

# -- what the processes do: functions of this module, which each process imports

class Noise(torch.utils.data.Dataset):
    "Clip `i` in epoch `e` is what the seed (e,i) gives, whoever reads it."
    epoch = 0
    def __init__(self, n, seen=None): self.n, self.seen = n, seen
    def __len__(self): return self.n
    def set_epoch(self, e): self.epoch = e
    def __getitem__(self, i):
        if self.seen is not None: self.seen.append((self.epoch, i))
        g = torch.Generator().manual_seed(1000*self.epoch+i)
        return dict(x=torch.randn(8, 3, 4, 4, generator=g), label=i%6, index=i)

class Maps(torch.nn.Module):
    "The smallest backbone: one feature map per stream, with a batch norm on the way."
    widths = (5, 5)
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Sequential(torch.nn.Conv3d(8, 5, 1), torch.nn.BatchNorm3d(5)) for _ in range(2))
    def forward(self, rgb, pose): return self.a(rgb), self.b(pose)

def learn(path, reading, epochs, stop=None, n=26, **changes):
    "A training of PCAN on noise; what the process saw goes beside it."
    from pcan.clips import _Order
    from pcan.model import READINGS, fuse, pcan
    from pcan.tree import MA52
    torch.set_num_threads(1); torch.manual_seed(7)
    a, seen, o = make_accelerator(), [], Optim(lr=.01, epochs=epochs, batch=6)
    data = Noise(n, seen); data.clips = range(n)
    model, loss = pcan(Maps(), MA52, replace(READINGS[reading], dropout=0., **changes))
    loader = torch.utils.data.DataLoader(data, 6, sampler=_Order(data, 0, True), drop_last=True)
    inputs = lambda b: (b["x"], b["x"]+1)
    history = fit(model, loss, loader, inputs, o, path, progress=False, accelerator=a, stop_after=stop)
    s = predict(model, a.prepare(torch.utils.data.DataLoader(Noise(10), 6)), a, inputs, lambda out: fuse(out, MA52))
    rank = int(os.environ.get("RANK", 0))
    np.savez(Path(path)/f"process{rank}.npz", seen=np.array(seen), **s)
    return [{k: v for k,v in r.items() if k!="seconds"} for r in history]

def with_changes(path, reading, epochs, changes): return learn(path, reading, epochs, **changes)
def fails(rank):
    make_accelerator()
    if int(os.environ["RANK"])==rank: raise ValueError("found a tree, expected a wood")
    agreed(1)
def trained(run, path): os.environ["PCAN_REPORTS"] = path; runs.get(run, progress=False); return processes()

# -- the tests

def close(a, b, tol=1e-4):
    for k in a: torch.testing.assert_close(a[k], b[k], atol=tol, rtol=tol, msg=lambda m: f"{k}: {m}")

@pytest.mark.parametrize("reading,changes", [("paper", {}), ("released", {}), ("paper", dict(per_batch=None, detach_mu=False, detach_p=False))])
def test_two_processes_learn_what_one_does(tmp_path, reading, changes):
    "Weights, optimiser state (that is: gradients), prototypes and the history of two epochs, batch norms included."
    one, two = tmp_path/"one", tmp_path/"two"
    h = with_changes(one, reading, 2, changes)
    both = launch(2, with_changes, two, reading, 2, changes)
    a, b = (load_file(p/"checkpoint.safetensors") for p in (one, two))
    assert any(k.endswith("P_a.P") for k in a) and any("momentum" in k for k in a)
    close(a, b, 1e-3 if changes else 1e-4)
    assert both[0]==both[1], "the log is the same on all processes"
    for x,y in zip(h, both[0]):
        for k in x: assert x[k]==pytest.approx(y[k], rel=1e-3, abs=1e-4), k

def test_every_clip_once_in_the_same_batches(tmp_path):
    learn(tmp_path/"one", "paper", 2); launch(2, learn, tmp_path/"two", "paper", 2)
    seen = lambda p, r: np.load(tmp_path/p/f"process{r}.npz")["seen"]
    whole, first, second = seen("one", 0), seen("two", 0), seen("two", 1)
    assert len(whole)==2*24 and len({tuple(x) for x in whole})==48, "24 of 26 clips an epoch: the short batch is dropped"
    step = lambda x, b: x.reshape(-1, b, 2)
    assert np.array_equal(step(whole, 6), np.concatenate([step(first, 3), step(second, 3)], 1))

def test_three_processes_score_ten_clips_once(tmp_path):
    learn(tmp_path/"one", "paper", 1); launch(3, learn, tmp_path/"three", "paper", 1)
    a = np.load(tmp_path/"one"/"process0.npz")
    for r in range(3):
        b = np.load(tmp_path/"three"/f"process{r}.npz")
        assert np.array_equal(b["index"], np.arange(10)) and np.array_equal(b["label"], a["label"])
        assert np.allclose(a["fused_action"].astype(float), b["fused_action"].astype(float), atol=2e-3)

def test_goes_on_with_another_number_of_processes(tmp_path):
    whole = learn(tmp_path/"whole", "paper", 3)
    launch(2, learn, tmp_path/"part", "paper", 3, 1)
    assert len((tmp_path/"part"/"history.csv").read_text().splitlines())==2
    rest = learn(tmp_path/"part", "paper", 3)
    close(*(load_file(tmp_path/p/"checkpoint.safetensors") for p in ("whole", "part")))
    assert [r["loss"] for r in rest]==pytest.approx([r["loss"] for r in whole], rel=1e-4)

def test_one_failure_ends_all_with_one_error():
    start = time.monotonic()
    with pytest.raises(ProcessError, match="process 1 of 2, which ends all: .*found a tree, expected a wood"): launch(2, fails, 1)
    assert time.monotonic()-start < 60, "the other process waited"

def test_a_run_of_two_processes(tmp_path):
    "No deadlock at the lock of a run, one writer, and the same kind of folder; dropout makes the numbers others."
    run = config.alone("pcan", "smoke", reading="released")             # begins with a run that is trained first, in the same processes
    config.ensure_data("smoke", progress=False)
    assert launch(2, trained, run, str(tmp_path))==[2, 2]
    folder = tmp_path/"smoke"/"runs"
    assert sorted(p.name for p in folder.iterdir())==sorted([run.name, *(r.name for r in config.begins_with(run))])
    result = runs.Result(run, folder/run.name)
    assert result.environment["processes"]==2 and len(result.scores("test")["y_a"])==104 and len(result.history)==run.optim.epochs
    assert runs.measure(result.scores("test"), run.tree)==result.metrics["test"]

def test_what_cannot_be_shared_is_said():
    with pytest.raises(ValueError, match=r"batches of 10 for 3 processes; expected a number that divides it \(1, 2, 5, 10\)"): check_split(10, 100, 3)
    with pytest.raises(ValueError, match="found 8 training clips"): check_split(10, 8, 2)

def test_larger_batches_are_another_run():
    run = config.make("pcan", "paper")
    o = scaled(run.optim, 8)
    assert (o.batch, o.lr, o.warmup)==(80, pytest.approx(.06), 5.) and scaled(run.optim)==run.optim
    assert scaled(replace(run.optim, warmup=7.), 2).warmup==7 and scaled(Optim(schedule="onecycle"), 2).warmup==0
    with pytest.raises(ValueError, match="found 0"): scaled(run.optim, 0)
