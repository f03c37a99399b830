"Every experiment notebook: has its parameter, keeps no outputs, is on the list, and runs as a smoke run."
import os, re, shutil

import nbformat
import pytest

from pcan.files import root
from pcan.report import EXPERIMENTS, OWN, execute, executed, folder, roles
from pcan.site import build, index

HERE = root()/"nbs"/"experiments"
NAMES = sorted(p.stem for p in HERE.glob("*.ipynb") if not p.name.startswith("_"))


def test_all_are_listed():
    assert NAMES==sorted([*EXPERIMENTS, *OWN])
    assert (HERE/".notest").exists(), "else nbdev_test runs them a second time"


@pytest.mark.parametrize("name", NAMES)
def test_source(name):
    nb = nbformat.read(HERE/f"{name}.ipynb", as_version=4)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged)==1 and tagged[0].source.strip()=='profile = "smoke"'
    assert not any(c.get("outputs") or c.get("execution_count") for c in nb.cells), "experiment notebooks are committed without outputs"
    code = [c.source for c in nb.cells if c.cell_type=="code"]
    assert not any(s.startswith("#|") for s in code), "experiments export nothing"
    assert "banner(profile)" in code[1] and code[-1].startswith("provenance(") and sum("conclude(" in s for s in code)>=1
    first = nb.cells[0].source
    assert re.match(r"# .+\n\n> .+\?$", "\n".join(first.split("\n")[:3])), "a title and one question"
    from pcan.audit import paper_table
    from pcan.report import METRICS
    typed = {f"{v:.2f}" for t in ("table1", "table2", "table3") for v in paper_table(t)[list(METRICS)].values.ravel()}
    text = "\n".join(c.source for c in nb.cells)
    assert not typed & set(re.findall(r"\b\d\d\.\d\d\b", text)), "the paper's numbers come from data/paper only"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A root of its own, with one data set and one set of runs for all notebooks."
    at, old = tmp_path_factory.mktemp("smoke"), os.environ.get("PCAN_ROOT")
    (at/"data").mkdir()
    shutil.copytree(root()/"data"/"paper", at/"data"/"paper")
    shutil.copy(root()/"data"/"reproducibility.csv", at/"data")
    shutil.copytree(HERE, at/"nbs"/"experiments")
    shutil.copy(root()/"settings.ini", at)
    os.environ["PCAN_ROOT"] = str(at)
    from pcan.report import runs_of
    from pcan.config import ensure_data
    from pcan.runs import get_all
    ensure_data("smoke", progress=False); get_all(runs_of("smoke"), progress=False)
    yield at
    os.environ.pop("PCAN_ROOT") if old is None else os.environ.update(PCAN_ROOT=old)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_smoke_run(smoke, name):
    execute("smoke", name)
    nb = executed("smoke")[name]
    for role in ("banner", "data", "verdict", "provenance"): assert len(list(roles(nb, role)))==1, role
    assert "SMOKE" in next(roles(nb, "banner")).data["text/html"]
    for v in roles(nb, "verdict"): assert set(v.metadata["pcan"]["outcomes"])=={"cannot be told"}, "a smoke run decides nothing"
    for o in [*roles(nb, "figure"), *roles(nb, "table")]: assert "SMOKE" in o.metadata["pcan"]["caption"]
    assert name[:5] not in ("table", "figur") or list(roles(nb, name[:5] if name[:5]=="table" else "figure"))
    noise = [o.text for c in nb.cells for o in c.get("outputs", []) if o.output_type=="stream"]
    assert not noise, noise


def test_report_of_the_smoke_run(smoke):
    if missing := set(EXPERIMENTS) - set(executed("smoke")): execute("smoke", sorted(missing))
    build("smoke"); overview = index("smoke").read_text(encoding="utf-8")
    assert "SMOKE" in overview and not (smoke/"reports"/"index.html").exists()
    for page in [folder("smoke", "index.html"), *folder("smoke", "pages").glob("*.html")]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(src|href)="(https?:)?//', text) and str(smoke) not in text
        for link in re.findall(r'(?:href|src)="([^"#:]+)"', text): assert (page.parent/link).exists(), (page.name, link)
    for d, ends in (("figures", {".png", ".svg", ".csv"}), ("tables", {".csv"})): assert {p.suffix for p in folder("smoke", d).iterdir()}==ends


def test_executing_twice_gives_the_same_notebook(smoke):
    first = execute("smoke", "table2")[0].read_bytes()
    assert execute("smoke", "table2")[0].read_bytes()==first
