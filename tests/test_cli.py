"Commands from a shell, as a user types them."
import subprocess, sys
from pathlib import Path
import pytest

BIN = Path(sys.executable).parent
def shell(*args): return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], capture_output=True, text=True, timeout=300)

@pytest.mark.parametrize("command", ["pcan_synth", "pcan_train", "pcan_report", "pcan_validate"])
def test_help(command):
    r = shell(command, "--help")
    assert r.returncode==0 and "--" in r.stdout and len(r.stdout) > 200

@pytest.mark.parametrize("args,expected", [
    (("pcan_train", "pcan", "--profile", "fast"), "expected one of smoke, quick, bench, paper"),
    (("pcan_train", "pcam", "--profile", "smoke"), "expected one of poseconv3d, pcan"),
    (("pcan_train", "--config", "/no/such/config.json"), "no such file"),
    (("pcan_report", "--profile", "fast"), "expected one of smoke, quick, bench, paper"),
    (("pcan_synth", "huge"), "there are smoke, quick, bench"),
    (("pcan_validate", "/no/such/folder"), "/no/such/folder"),
    (("pcan_train", "pcan", "--profile", "paper"), "MA-52"),
])
def test_a_mistake_gets_one_helpful_line(args, expected):
    r = shell(*args)
    assert r.returncode==2 and expected in r.stderr and "Traceback" not in r.stderr, r.stderr[-800:]
