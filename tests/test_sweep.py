"Many runs as jobs: on this machine, and what SLURM would be asked for."
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
from pcan import config, runs
from pcan.files import DataError
from pcan.sweep import Job, executor, job_of, sweep

@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    config.ensure_data("smoke", progress=False)
    return tmp_path

def pose(seed=0, **kw): return config.make("poseconv3d", "smoke", seed, stream="pose", **kw)

SWEEP = """
import sys; from pcan.config import make; from pcan.sweep import executor, sweep
runs = [make("poseconv3d", "smoke", s, stream="pose") for s in (0, 1)]
sys.exit(bool(sweep(runs, executor("local"))))
"""

def test_two_sweeps_at_once_train_every_run_once(store):
    both = [subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.wait(120) for p in both]==[0, 0]
    for p in both: p.stdout.close()
    for r in (pose(0), pose(1)):
        result = runs.Result(r, r.path)
        rows = (r.path/"history.csv").read_text().splitlines()
        assert len(rows)==2 and (r.path/"model.safetensors").exists() and result.metrics["test"]
        assert not (r.path/"checkpoint.safetensors").exists()

def test_a_preempted_job_goes_on(store):
    "The signal of a cluster: the job is asked for again, and goes on from its last epoch."
    run = pose(epochs=40)
    e = executor("local"); job = e.submit(job_of(run))
    while runs.epochs_done(run)<1: assert not job.done(), job.stderr(); time.sleep(.02)
    pid = job.job_id                                           # of the one who minds the task; the signal is for the task
    os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]), signal.SIGUSR2)
    job.results()
    assert "preempted" in job.stderr() and job.stdout().count("Starting")==2, job.stdout()+job.stderr()
    assert len(runs.Result(run, run.path).history)==40

def test_two_tasks_train_one_run(store):
    run = pose()
    failed = sweep([run], executor("local", gpus=0), say=lambda s: None)
    assert not failed
    e = executor("local"); e.update_parameters(tasks_per_node=2)
    two = pose(1)
    assert not sweep([two], e, say=lambda s: None)
    assert [runs.Result(r, r.path).environment["processes"] for r in (run, two)]==[1, 2]

def test_what_begins_with_a_failed_run_fails_with_it(store):
    fused = replace(config.make("poseconv3d", "smoke", start="single"), net=replace(config.THIN, pose=replace(config.THIN.pose, in_channels=5)))
    rgb, bad = config.singles(fused)
    failed = sweep([fused], executor("local"), say=lambda s: None)
    assert set(failed)=={bad, fused} and failed[fused]==f"it begins with {bad.name}, which failed"
    assert "Error" in failed[bad] and (rgb.path/"metrics.json").exists()

def test_what_slurm_is_asked_for(store, monkeypatch):
    "A stand-in for sbatch keeps the script; SLURM itself was not there."
    bin = store/"bin"; bin.mkdir()
    for name,text in dict(srun="", sacct="echo 'JobID|State|NodeList'; echo '7|COMPLETED|a'", sbatch=f"cp $1 {store}/script; echo Submitted batch job 7").items():
        (bin/name).write_text(f"#!/bin/sh\n{text}\n"); (bin/name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    run = pose()
    e = executor(gpus=4, nodes=2, minutes=90, slurm_partition="long", mem_gb=64, cpus_per_task=8)
    e.update_parameters(name=run.name); e.submit(job_of(run))
    script = (store/"script").read_text()
    for line in (f"--job-name={run.name}", "--dependency=singleton", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=90",
                 "--partition=long", "--mem=64GB", "--cpus-per-task=8", "--signal=USR2@90", "--open-mode=append"):
        assert f"#SBATCH {line}" in script, script
    assert "--kill-on-bad-exit=1" in script

def test_a_job_takes_its_store_along(store):
    job = job_of(pose())
    assert job.where["PCAN_REPORTS"]==str(store) and job.checkpoint().function==job and isinstance(job, Job)

def test_mistakes(store, capsys, monkeypatch):
    from pcan import cli
    with pytest.raises(DataError, match="expected slurm, local or debug"): executor("pbs")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="found no slurm here"): executor("slurm")
    assert cli.sweep(["table9", "--profile", "smoke"])==2 and "found 'table9'" in capsys.readouterr().err
    assert cli.sweep(["table2", "--profile", "smoke", "--dry-run"])==0
    out = capsys.readouterr().out
    assert "4 runs to train" in out and out.count("pcan-smoke")==4 and not (store/"smoke").exists()
    assert cli.sweep(["table2", "--profile", "smoke", "--dry-run", "--scale", "2"])==0 and not set(out.split()) & {w for w in capsys.readouterr().out.split() if w.startswith("pcan-")}
