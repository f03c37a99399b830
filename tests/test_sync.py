"Notebooks are the source: the package is what they export, they are clean, and the README is the index."
import filecmp, os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the project in which `nbdev_export` and `nbdev_clean` were run."
    dst = tmp_path_factory.mktemp("copy")/"pcan"
    skip = shutil.ignore_patterns(".git", ".venv*", "data", "reports", "tests", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, dst, ignore=skip)
    env = os.environ | {"PYTHONPATH": str(dst)}
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN/tool], cwd=dst, env=env, check=True, capture_output=True, text=True, timeout=300)
    return dst

def files(folder, pattern): return sorted(p.relative_to(folder) for p in folder.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts)

@pytest.mark.parametrize("folder,pattern", [("pcan", "*.py"), ("nbs", "*.ipynb")])
def test_in_sync(copy, folder, pattern):
    "Exporting and cleaning changes nothing: what is committed is what the notebooks say."
    assert files(ROOT/folder, pattern) == files(copy/folder, pattern), "files appear or disappear: run nbdev_export"
    differ = [str(p) for p in files(ROOT/folder, pattern) if not filecmp.cmp(ROOT/folder/p, copy/folder/p, shallow=False)]
    assert not differ, f"run nbdev_export and nbdev_clean, then commit: {differ}"

def test_readme_is_the_index():
    from pcan.docs import readme
    assert (ROOT/"README.md").read_text(encoding="utf-8") == readme(), "run make readme"

def test_overview_is_what_the_code_draws():
    "The committed figure holds the texts and as many of each kind of element as the code draws; bytes may differ with matplotlib's version."
    import re
    from collections import Counter
    from pcan.overview import method_svg
    committed, drawn = (ROOT/"nbs"/"method.svg").read_bytes(), method_svg()
    parts = lambda svg: (re.findall(r"<text[^>]*>([^<]*)<", svg.decode()), Counter(re.findall(r"<(text|path|image|use)\b", svg.decode())))
    assert parts(committed)==parts(drawn), "run make readme"
    assert len(committed) < 150_000
    assert b"<dc:date>" not in committed

def test_component_notebooks_show_something():
    "A component notebook is committed with its outputs, without errors, under 300 KB."
    import nbformat
    for p in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        nb = nbformat.read(p, 4)
        code = [c for c in nb.cells if c.cell_type=="code"]
        outputs = [o for c in code for o in c.outputs]
        assert outputs, f"{p.name} has no outputs: execute it"
        assert not any(o.output_type=="error" for o in outputs), f"{p.name} holds an error"
        assert p.stat().st_size < 300_000, f"{p.name} is {p.stat().st_size} bytes"
