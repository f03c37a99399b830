"What an installed package holds, and that it works where there is no checkout."
import importlib, os, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {f"pcan/{p.name}" for p in (ROOT/"pcan").glob("*.py")}

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "What the archives are built from: the checkout, without what lies around in it."
    at = tmp_path_factory.mktemp("source")/"pcan"; at.mkdir()
    for f in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT/f, at)
    shutil.copytree(ROOT/"pcan", at/"pcan", ignore=shutil.ignore_patterns("__pycache__"))
    (at/"data"/"ma52").mkdir(parents=True); (at/"data"/"ma52"/"private.mp4").write_bytes(b"")       # stays at home
    shutil.copytree(ROOT/"tests", at/"tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    return at

def built(source, how): # without network: with the setuptools that is here
    out = source.parent/how
    call = "import sys, os; os.chdir(sys.argv[1]); from setuptools import build_meta as b; os.makedirs(sys.argv[2], exist_ok=True); print(b.build_{}(sys.argv[2]))".format(how)
    subprocess.run([sys.executable, "-c", call, source, out], check=True, capture_output=True, text=True, timeout=120)
    return next(out.iterdir())

@pytest.fixture(scope="module")
def wheel(source): return built(source, "wheel")
@pytest.fixture(scope="module")
def sdist(source): return built(source, "sdist")

def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {n for n in names if ".dist-info/" in n}
    assert names-info==MODULES | {"pcan/weights/thin.safetensors"}
    assert {Path(n).name for n in info}=={"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "LICENSE"}
    assert wheel.stat().st_size<5e6
    said = zipfile.ZipFile(wheel).read(next(n for n in info if n.endswith("METADATA"))).decode()
    assert re.search("^Requires-Python: (<3.13,>=3.11|>=3.11,<3.13)$", said, re.M) and "Provides-Extra: notebook" in said

def test_the_source_archive_holds_what_builds_the_wheel(sdist):
    names = {n.partition("/")[2] for n in tarfile.open(sdist).getnames()}-{""}
    folders = {"pcan", "pcan/weights"} | {n for n in names if n.startswith("pcan.egg-info")}
    assert names-folders==MODULES | {"pcan/weights/thin.safetensors", "setup.py", "setup.cfg", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO"}

def test_commands_exist():
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=["="]); ini.read(ROOT/"settings.ini", encoding="utf-8")
    for line in ini["DEFAULT"]["console_scripts"].split():
        name, at = line.split("=")
        assert at.partition(":")[0] in ("pcan.cli", "pcan.apply") and callable(getattr(importlib.import_module(at.partition(":")[0]), at.partition(":")[2])) and name=="pcan_"+at.partition(":")[2]

@pytest.mark.compat
@pytest.mark.parametrize("what", ["wheel", "sdist"])
def test_installed_and_used_in_an_empty_folder(what, request, tmp_path):
    archive, env, here = request.getfixturevalue(what), tmp_path/"env", tmp_path/"empty"
    here.mkdir()
    clean = {k: v for k,v in os.environ.items() if not k.startswith(("PCAN_", "PYTHON"))} | dict(OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-m", "venv", env], check=True, env=clean)
    def pip(*a):
        done = subprocess.run([env/"bin"/"python", "-m", "pip", "install", "-q", "-c", ROOT/"constraints.txt", *a], cwd=here, env=clean, capture_output=True, text=True)
        assert done.returncode==0, done.stderr[-3000:]
    pip("setuptools", "wheel"); pip("--no-build-isolation", str(archive))
    def call(*a, rc=0):
        done = subprocess.run([env/"bin"/a[0], *a[1:]], cwd=here, env=clean, capture_output=True, text=True, timeout=600)
        assert done.returncode==rc, f"{a}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout+done.stderr
    where = call("python", "-c", "import pcan, pcan.files as f; print(pcan.__file__, f.root())").split()
    assert Path(where[0]).is_relative_to(env) and Path(where[1])==here, "data and reports go into the folder one is in"
    # the bare package: trains, and says in a line what else a command wants
    assert "test:" in call("pcan_train", "pcan", "--profile", "smoke") and (here/"reports"/"smoke"/"runs").is_dir()
    for a,want in ((("pcan_synth", "smoke"), "pcan[notebook]"), (("pcan_predict", "--sample", "waving"), "pcan[notebook]"), (("pcan_export",), "pcan[export]"), (("pcan_demo", "--port", "0"), "pcan[demo]")):
        last = call(*a, rc=2).strip().splitlines()[-1]
        assert want in last, last
    last = call("pcan_report", "--profile", "smoke", rc=2).strip().splitlines()
    assert len(last)==1 and "do not come with the installed package" in last[0], last
    # with what reads and draws
    shutil.rmtree(here); here.mkdir()
    pip(f"{archive}[notebook]")
    call("pcan_synth", "smoke"); call("pcan_train", "pcan", "--profile", "smoke")
    film = next((here/"data"/"synth"/"smoke"/"raw_videos"/"test").glob("*.mp4"))
    call("pcan_predict", film, "--stream", "rgb"); assert list(here.glob("predictions/*/prediction.json")) and list(here.glob("predictions/*/contact_sheet.png"))
    assert "do not come with the installed package" in call("pcan_report", "--profile", "smoke", rc=2)
    assert {p.name for p in here.iterdir()}=={"data", "reports", "predictions"}
