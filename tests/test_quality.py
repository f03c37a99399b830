"What a reader may count on: short modules, no mistakes a linter sees, nothing unused, every name explained and shown."
import ast, json, re, subprocess, sys
from collections import defaultdict
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT/"pcan").glob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}
TREES = {m: ast.parse(text) for m,text in MODULES.items()}
PAGES = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
each_module = pytest.mark.parametrize("module", MODULES)

# Words that mean the same everywhere are explained here, not at every function.
GLOSSARY = dict(
    run="a `pcan.config.Run`", profile="a name from `PROFILES`", split="train, val or test", stream="rgb, pose or fused", spec="a `ClipSpec`, or a `SynthSpec` of `synth`",
    model="the network, a torch module", argv="what follows a command's name; None: what the shell gave", tree="an `ActionTree`", card="a `Card`", clip="a `Clip`",
    path="of a file", folder="of files", progress="show a bar", workers="processes", seed="of whatever is drawn at random", device="of torch",
    ax="axes to draw on; None: new ones", img="a picture `(h,w,3)`", colour="red, green, blue", caption="a line below", pen="draws on the overview",
    rows="a list of dicts", paper="the paper's numbers", r="a stream of random numbers", x="a tensor `(B,C,T,h,w)`, or a number", endpoint="address of the hub", repo="of the hub")

def cells(page):
    for c in json.loads(page.read_text(encoding="utf-8"))["cells"]: yield c["cell_type"], "".join(c["source"])

def exported(source): return re.search(r"^#\|\s*export\b", source, re.M)

def defined(node): # names that a statement of a module makes
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and n.id not in ("_", "__all__")]

def used(tree): # names that code speaks of: alone, after a dot, in an import, as a keyword, as a string
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        elif isinstance(n, ast.Attribute): yield n.attr
        elif isinstance(n, ast.alias): yield n.name.rpartition(".")[2]
        elif isinstance(n, ast.keyword) and n.arg: yield n.arg
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier(): yield n.value

def functions(module): # (name, node) of what is public: functions, classes, methods
    def inside(body, before=""):
        for n in body:
            if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or n.name.startswith("_"): continue
            yield before+n.name, n
            if isinstance(n, ast.ClassDef): yield from inside(n.body, f"{n.name}.")
    return inside(TREES[module].body)

def test_ruff():
    "The rules stand in ruff.toml."
    said = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "pcan", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode==0, said.stdout+said.stderr

@pytest.fixture(scope="module")
def texts(): return [s for p in PAGES for _,s in cells(p)]

@each_module
def test_short(module): assert MODULES[module].count("\n") <= 400, f"pcan/{module}.py: split its notebook by meaning"

def test_short_cells():
    long = [f"{p.name}, cell {i}" for p in PAGES for i,(kind,text) in enumerate(cells(p)) if kind=="code" and sum(bool(l.strip()) for l in text.split("\n"))>40]
    assert not long, "more than 40 lines"

@pytest.fixture(scope="module")
def uses():
    "name -> where it is used, outside the statement that makes it."
    out = defaultdict(set)
    def note(nodes, where):
        for node in nodes:
            for name in set(used(node))-set(defined(node)): out[name].add(where)
    for m,tree in TREES.items(): note(tree.body, m)
    for p in sorted((ROOT/"tests").glob("*.py")):
        if p.name!=Path(__file__).name: note(ast.parse(p.read_text(encoding="utf-8")).body, p.name)
    for p in PAGES: note((ast.parse(s) for kind,s in cells(p) if kind=="code" and not exported(s)), p.name)
    for name in ("settings.ini", "pcan/__init__.py"):
        for word in re.findall(r"\w+", (ROOT/name).read_text(encoding="utf-8")): out[word].add(name)
    return out

@each_module
def test_nothing_is_unused(module, uses):
    "A public name is used somewhere, a private one in its own module; so are methods, but those that torch or Python calls."
    names = [n for node in TREES[module].body for n in defined(node)]
    dead = [n for n in names if (module not in uses[n] if n.startswith("_") else not uses[n])]
    dead += [n for n,node in functions(module) if "." in n and node.name not in ("forward", "extra_repr") and not uses[node.name]]
    assert not dead, f"pcan/{module}.py: delete {dead}"

@each_module
def test_explained(module):
    "Whatever is public says in one line what it does; a function of one line may do so in a comment. `forward` is explained by its class."
    lines = MODULES[module].split("\n")
    silent = [n for n,node in functions(module) if not ast.get_docstring(node) and node.name not in ("forward", "extra_repr") and
              not (node.body[0].lineno==node.lineno and "#" in lines[node.lineno-1])]
    assert not silent, f"pcan/{module}.py: no docstring: {silent}"

@each_module
def test_parameters_are_explained(module):
    "Every parameter has a comment on its line, or is a word of the glossary."
    lines, silent = MODULES[module].split("\n"), []
    for name,node in functions(module):
        inits = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name=="__init__"] if isinstance(node, ast.ClassDef) else [node]
        for a in (f.args for f in inits if getattr(f, "name", "")!="forward"):
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            silent += [f"{name}({x.arg})" for x in every if x.arg not in ("self", "cls", *GLOSSARY) and "#" not in lines[x.lineno-1]]
    assert not silent, f"pcan/{module}.py: no docment: {silent}"

@each_module
def test_shown(module, texts):
    "Every public function and class appears in a notebook outside the cell that exports it."
    own = lambda name, text: exported(text) and re.search(rf"^(async def|def|class) {name}\b", text, re.M)
    names = [n for n,_ in functions(module) if "." not in n]
    hidden = [n for n in names if not any(re.search(rf"\b{n}\b", s) and not own(n, s) for s in texts)]
    assert not hidden, f"pcan/{module}.py: {hidden} appear in no other cell"
