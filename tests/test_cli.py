"Commands from a shell, as a user types them."
import subprocess, sys
from pathlib import Path
import pytest

BIN = Path(sys.executable).parent
def shell(*args): return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], capture_output=True, text=True, timeout=300)

@pytest.mark.parametrize("command", ["pcan_synth", "pcan_train", "pcan_report", "pcan_validate", "pcan_verify"])
def test_help(command):
    r = shell(command, "--help")
    assert r.returncode==0 and "--" in r.stdout and len(r.stdout) > 200

@pytest.mark.parametrize("args,expected", [
    (("pcan_train", "pcan", "--profile", "fast"), "expected one of smoke, quick, bench, paper"),
    (("pcan_train", "pcam", "--profile", "smoke"), "expected one of tsn, tin"),
    (("pcan_train", "--config", "/no/such/config.json"), "no such file"),
    (("pcan_report", "--profile", "fast"), "expected one of smoke, quick, bench, paper"),
    (("pcan_synth", "huge"), "there are smoke, quick, bench"),
    (("pcan_validate", "/no/such/folder"), "/no/such/folder"),
    (("pcan_train", "pcan", "--profile", "paper"), "MA-52"),
])
def test_a_mistake_gets_one_helpful_line(args, expected):
    r = shell(*args)
    assert r.returncode==2 and expected in r.stderr and "Traceback" not in r.stderr, r.stderr[-800:]

def test_a_table_in_pieces(tmp_path, monkeypatch, capsys):
    "`--minutes` stops in time, says how far it came, and the next call goes on."
    from pcan import cli, config
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path))
    run = config.alone("poseconv3d", "smoke")
    monkeypatch.setattr(config, "plan", lambda table, profile, seeds: {"one": [run]})
    args = ["--table", "readings", "--profile", "smoke"]
    assert cli.train([*args, "--minutes", "0"])==3
    assert "0 of 2 runs were finished when the time was up; the same command goes on" in capsys.readouterr().out
    assert cli.train(args)==0 and run.name in capsys.readouterr().out

def test_every_command_is_a_function():
    "What settings.ini promises is there, also as `python -m pcan.cli NAME`."
    import re
    from pcan import cli
    root = Path(__file__).resolve().parent.parent
    scripts = dict(re.findall(r"(pcan_\w+)=pcan\.cli:(\w+)", (root/"settings.ini").read_text()))
    assert len(scripts)>=6 and all(callable(getattr(cli, f)) and n==f"pcan_{f.rstrip('_')}" for n,f in scripts.items())
    r = subprocess.run([sys.executable, "-m", "pcan.cli"], capture_output=True, text=True, timeout=300)
    assert all(f"{n[5:]}" in r.stderr for n in scripts), r.stderr

@pytest.mark.parametrize("command", ["ma52", "test", "submit", "pose", "pack", "predict", "export", "demo"])
def test_help_of_the_road_to_ma52(command):
    r = subprocess.run([sys.executable, "-m", "pcan.cli", command, "--help"], capture_output=True, text=True, timeout=300)
    assert r.returncode==0 and f"usage: pcan_{command}" in r.stdout and len(r.stdout)>400
