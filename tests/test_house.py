"What a newcomer walks into: links that lead somewhere, commands that exist, pages that are on the list, numbers that code wrote."
import json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in (*ROOT.glob("*.md"), ROOT/"reports"/"README.md", ROOT/"data"/"README.md")}
TEXTS |= {p.relative_to(ROOT).as_posix(): "\n\n".join("".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"]=="markdown") for p in PAGES}
MAKE = (ROOT/"Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKE, re.M))

@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[page], flags=re.S)
    lost = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link and not (ROOT/page).parent.joinpath(link).exists()]
    assert not lost, f"{page}: {lost}"

def test_commands_exist():
    "What texts, help and workflows call with `make` is a target, and every target but files is in the help or calls itself by its name."
    said = {w for t in (*TEXTS.values(), MAKE) for w in re.findall(r"(?:^|`|# )make ([a-z][a-z-]*)", t, re.M)}
    for p in (ROOT/".github"/"workflows").glob("*.yml"):
        text = p.read_text(encoding="utf-8")
        said |= set(re.findall(r"run: make ([a-z][a-z-]*)", text)) | {w for row in re.findall(r"target: \[(.*)\]", text) for w in row.split(", ")}
    assert said - {"sure"} <= TARGETS, said-TARGETS
    hidden = TARGETS - said - {"help", "notebooks", "data", "clean", "install", "readme"}
    assert not hidden, f"give a line of help: {hidden}"

def test_every_page_is_on_the_list():
    index = TEXTS["nbs/index.ipynb"]
    lost = [p.name for p in PAGES if p.stem!="index" and not p.stem.startswith("_") and p.relative_to(ROOT/"nbs").as_posix() not in index]
    assert not lost, f"no row in the reading order of nbs/index.ipynb: {lost}"

def test_readme_has_no_typed_measurements():
    "Whatever was measured comes from a cell of code. Numbers that a person wrote are names: of papers, versions, layouts, sizes of the paper's."
    known = {"2412.14719", "3.11", "3.12", "0.9", "0.125", "2.0", "1.6"}    # arXiv, Python, rho, tau, Apache, GB of .venv-pose
    typed = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r"\]\([^)]*\)", "]", TEXTS["nbs/index.ipynb"]))) - known
    assert not typed, f"written by hand in nbs/index.ipynb: {typed}"
