"What strangers can put into a file, a name or a parameter: it comes out as text, stays in its folder, or is refused in a sentence. `test_fuzz` looks for more of it."
import json, os, stat, warnings, zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
import nbformat, numpy as np, pandas as pd, pytest
from pcan import checkpoint, config, data, files, ma52, own, report, runs, site, submit
from pcan.files import DataError
from pcan.tree import ActionTree

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "a' onmouseover='alert(1)", "two\nlines | and a bar", "\u202egpj.exe", "</td></table><iframe src=//x>", "$\\frac{", "[x](javascript:alert(1))", "&lt;b&gt;"]

class Tags(HTMLParser): # what a browser would take for elements and attributes
    def __init__(self): super().__init__(); self.tags, self.attrs, self.text = [], [], []
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attrs += attrs
    def handle_data(self, d): self.text.append(d)

def seen(html):
    t = Tags(); t.feed(html); t.close()
    assert not set(t.tags) & {"script", "iframe", "object", "embed", "link", "form"}-{"link"} and not [a for a,_ in t.attrs if a.startswith("on")], (t.tags, t.attrs)
    assert not [v for a,v in t.attrs if a in ("href", "src") and v and v.strip().lower().startswith(("javascript:", "//", "http:"))]
    return "".join(t.text)

# ---------- names become text in pages

@pytest.fixture
def page(monkeypatch, tmp_path):
    "A page of everything that code writes with names in it."
    monkeypatch.setenv("PCAN_REPORTS", str(tmp_path)); cells = []
    def emit(role, html, markdown="", **meta): cells.append(nbformat.v4.new_output("display_data", {"text/html": html, "text/markdown": markdown or "x"}, metadata=dict(pcan=dict(role=role, **meta))))
    monkeypatch.setattr(report, "emit", emit)
    def made():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\n> Question?"), nbformat.v4.new_code_cell("pass", outputs=cells)])
        return site.page(nb), cells
    return made

def test_names_in_reports(page):
    report.facts({n: n for n in NAMES}, NAMES[0], "quick")
    for n in NAMES: report.note(n)
    report.show_texts(pd.DataFrame({"clips": NAMES}, index=NAMES), "t", "quick", NAMES[1])
    report.show_table([dict(experiment="t", variant=n, stream="fused", seed=0, split="test", metric="action_top1", value=.5, run="r") for n in NAMES], "u", "quick", NAMES[2])
    from pcan.verdicts import Verdict
    report.conclude([Verdict(n, "holds", n) for n in NAMES], "quick")
    html, cells = page()
    text = seen(html)
    for n in NAMES: assert text.count(n)>=4, n
    for o in cells:                                                # the Markdown form: a row stays a row, no tag in it
        rows = [l for l in o.data["text/markdown"].splitlines() if l.startswith("|")]
        assert len({l.replace("\\|", "").count("|") for l in rows})<=1, rows
    tables = [site.markdown(o.data["text/markdown"]) for o in cells if o.data["text/markdown"].startswith("|")]
    assert len(tables)==2
    for t in tables: seen(t)

def test_names_in_markdown_and_maths():
    for n in NAMES: seen(site.markdown(n)); seen(site.markdown(f"# {n}\n\n| {n} |\n|--|\n| {n} |\n\n${n}$ and `{n}`"))
    for tex in (r"\href{javascript:alert(1)}{x}", r"\style{x}{y}", "<script>", "\\unicode{x}", "a"*10_000): seen(site.mathml(tex))

def test_names_in_the_demo_and_on_paper(tmp_path):
    from pcan import demo, film as films, pictures, predict
    from pcan.page import page
    opened = checkpoint.open_checkpoint()
    many = [f"{n} {i}" for i in range(9) for n in NAMES]
    opened = replace(opened, run=replace(opened.run, tree=ActionTree(tuple(NAMES[:7]), tuple(many[:52]), opened.tree.parents)))
    film = replace(films.sample("waving"), name=NAMES[0]+NAMES[3]+NAMES[6])
    p = predict.predict(film, opened)
    written = pictures.save(p, tmp_path/"out")
    assert json.loads(written[0].read_text(encoding="utf-8"))["actions"][0]["name"] in many
    t = opened.tree
    about = dict(label=NAMES[0], system=NAMES[1], run=NAMES[2], sees=opened.sees, drawn=True, tree={b: [t.actions[k] for k in t.children(i)] for i,b in enumerate(t.bodies)})
    html = page(about, demo.Limits(), dict(prediction=p.as_dict(), text=str(p), when=[], pictures=dict(contact_sheet="")), error=NAMES[0], chosen=NAMES[1], nonce="n")
    own_script = "<script nonce=\"n\">"
    assert html.count("<script")==html.count(own_script)==1
    text = seen(html.replace(html[html.index(own_script):html.index("</script>")+9], "").replace("<form", "<div"))
    assert p.as_dict()["actions"][0]["name"] in text

def test_names_in_a_shell(tmp_path, capsys):
    from pcan import apply
    bad = tmp_path/"\x1b]0;title\x07\x1b[2J\u202e.mp4"; bad.write_bytes(b"no film")
    assert apply.predict([str(bad)])==2
    said = capsys.readouterr().err
    assert "not a video" in said and all(c.isprintable() or c=="\n" for c in said), said
    o = checkpoint.open_checkpoint(); o = replace(o, card=replace(o.card, note="\x1b[2J<script>|"))
    assert "\x1b" not in checkpoint.card_text(o) and "<script>" not in o._repr_markdown_() and "\\|" in o._repr_markdown_()

# ---------- names stay in their folders

def archive(path, *members, size=10):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name,mode in members:
            m = zipfile.ZipInfo("x"); m.filename = m.orig_filename = name; m.external_attr = mode<<16
            z.writestr(m, b"0"*size, zipfile.ZIP_DEFLATED)
    return path

@pytest.mark.parametrize("name,mode,why", [("../a.mp4", 0, "leads out"), ("train/../../a.mp4", 0, "leads out"), ("/etc/a.mp4", 0, "absolute"), ("C:\\a.mp4", 0, "drive letter"), ("..\\..\\a.mp4", 0, "leads out"),
    ("train/a.mp4", stat.S_IFLNK|0o777, "a link"), ("train/a.mp4", stat.S_IFIFO|0o644, "a special file"), ("train/"+"a"*300+".mp4", 0, "longer than a disk"), ("", 0, "no name"), ("train/\x1b[2J/../a.mp4", 0, "leads out")])
def test_members_that_escape(tmp_path, name, mode, why):
    home = tmp_path/"home"/"ma52"
    with pytest.raises(DataError, match=why) as e: ma52.unpack(archive(tmp_path/"a.zip", ("train/good.mp4", 0), (name, mode)), home, "train", progress=False)
    assert str(tmp_path/"a.zip") in str(e.value) and str(e.value).isprintable() and len(str(e.value))<600+len(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()}=={"a.zip", "home"} and not list(home.rglob("*.mp4")), "nothing was unpacked"

def test_archives_that_grow(tmp_path):
    z = archive(tmp_path/"a.zip", ("train/a.mp4", 0), size=10**6)
    raw = bytearray(z.read_bytes())
    for at in (raw.find(b"PK\1\2")+24,): raw[at:at+4] = (2**32-2).to_bytes(4, "little")     # says four gigabytes
    z.write_bytes(raw)
    with pytest.raises(DataError, match="nothing was unpacked"):
        with zipfile.ZipFile(z) as f: ma52.members(f, free=10**9)
    raw[at:at+4] = (10).to_bytes(4, "little"); z.write_bytes(raw)                           # says ten bytes, holds a million
    with pytest.raises(DataError, match="not a readable zip"): ma52.unpack(z, tmp_path/"to", "train", progress=False)
    sub = archive(tmp_path/"sub.zip", ("prediction.csv", 0), size=60*10**6)
    with pytest.raises(DataError, match="expected less than a megabyte"): submit.open_csv(sub)

@pytest.mark.parametrize("video", ["../secret.mp4", "/etc/passwd", "a/../../secret.mp4", "..\\secret.mp4"])
def test_tables_name_videos_of_their_folder_only(tmp_path, video):
    (tmp_path/"clips").mkdir(); (tmp_path/"secret.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match="leaves"): own.find_video(tmp_path/"clips", video)
    names = own.clip_names([own.Row(n+".mp4", "a") for n in (*NAMES, video, "...", "")])
    assert len(set(names))==len(names) and all(n and n==Path(n).name and n.isprintable() and not n.startswith(".") and not set(n) & set("<>\"'|/\\ ") for n in names)

def test_predictions_stay_below_their_folder(tmp_path):
    from types import SimpleNamespace as S
    from pcan.apply import _folder
    for n in (*NAMES, "../../x", "..", "/abs", "\0"):
        made = S(as_dict=lambda: dict(video={}), film=S(name=n))
        assert _folder(tmp_path, made, set()).resolve().parent==tmp_path.resolve()

# ---------- parameters of notebooks and commands

BOOKS = sorted(p for p in (ROOT/"nbs"/"experiments").glob("*.ipynb"))
BAD = ["../../x", "nope", "", "quick@../../x", "quick@", "quick@a/b", "smoke\n", 3, None]

@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_parameters_of_experiments(path):
    "The first thing that a notebook does with its parameter says what is wrong with it."
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type=="code"]
    for profile in BAD:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="(profile|data set): found .*expected"): exec(cells[1], dict(profile=profile))

def test_parameters_elsewhere(capsys):
    from pcan import cli
    for profile in BAD[:-2]:
        with pytest.raises(ValueError, match="expected"): report.execute(profile, "table1")
        with pytest.raises(ValueError, match="expected"): config.make("pcan", profile)
        assert cli.train(["pcan", "--profile", profile])==2 and cli.report(["--profile", profile])==2
    for seed in ("a", 1.5, None, True):
        with pytest.raises(ValueError, match="Run.seed: found .*expected a whole number"): config.make("pcan", "smoke", seed)
    with pytest.raises(ValueError, match="expected names from"): report.execute("smoke", "../../x")

@pytest.mark.parametrize("change,says", [(dict(data="../../x"), "Run.data"), (dict(profile="../x"), "Run.profile"), (dict(system="../x"), "Run.system"), (dict(seed="a"), "Run.seed"), (dict(optim=dict(epochs="many")), "Optim.epochs"),
    (dict(net=[1]), "Run.net"), (dict(method=dict(alpha={"a": 1})), "Method.alpha"), (dict(tree=dict(bodies=["a"])), "ActionTree"), (dict(nope=1), "unknown field nope"), ([], "found \\[\\]")])
def test_configurations(tmp_path, change, says):
    files.write_json(tmp_path/"config.json", change)
    with pytest.raises(DataError, match=says) as e: runs.read_run(tmp_path/"config.json")
    assert str(tmp_path/"config.json") in str(e.value)

# ---------- what the fuzz target found

def repacked(tmp_path, **changes): # the network that comes with the package, with another configuration
    from safetensors.torch import save
    meta, tensors = checkpoint._read(checkpoint.default_checkpoint())
    run = json.loads(meta["run"])
    for k,v in changes.items():
        at, *path, last = (run, *k.split("__")); 
        for p in path: at = at[p]
        at[last] = v
    (tmp_path/"net.safetensors").write_bytes(save(tensors, metadata=meta | dict(run=json.dumps(run))))
    return tmp_path/"net.safetensors"

@pytest.mark.parametrize("changes,says", [(dict(net__rgb__base=10**9), "a size above"), (dict(net__rgb__blocks=[10**4]*4), "more blocks than"), (dict(net__pose__in_channels=-1), "no such network"), (dict(net__rgb__base=8192), "of another shape"),
    (dict(data="../../x"), "Run.data"), (dict(system="nope"), "this version knows"), (dict(seed=float("nan")), "Run.seed")])
def test_a_header_that_asks_for_another_network(tmp_path, changes, says):
    with pytest.raises(DataError, match=says) as e: checkpoint.open_checkpoint(repacked(tmp_path, **changes))
    assert "net.safetensors" in str(e.value)

@pytest.mark.parametrize("text", ["9"*5000, "[" * 100_000, "\ud800", "{\"a\": 1e999999"])
def test_json(tmp_path, text):
    (tmp_path/"x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="not readable as JSON"): files.read_json(tmp_path/"x.json")

@pytest.mark.parametrize("label", ["²", "٣", "9"*5000, "1e3", "-1", "0x1", "\x001"])
def test_labels_of_lists(tmp_path, label):
    (tmp_path/"l.txt").write_text(f"a.mp4 {label}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: found") as e: data.read_list(tmp_path/"l.txt")
    assert len(str(e.value))<400+len(str(tmp_path))

@pytest.mark.parametrize("raw", [b"\xff\xfe", b"clip,seconds\na,soon\n", b"clip,seconds\na,nan\n", b"clip,seconds\na,-1\n", b"name\na\n", b"clip,seconds\n,1\n"])
def test_clips_of_a_data_set(tmp_path, raw):
    (tmp_path/"annotations").mkdir(); (tmp_path/"annotations"/"clips.csv").write_bytes(raw)
    for f in (data.people, data.lengths):
        with pytest.raises(DataError, match="clips.csv: found .*run `pcan_own` again"): f(tmp_path)

@pytest.mark.parametrize("said", [dict(bodies="arm", actions=["a"], parents=[0]), dict(bodies=["arm"], actions=[1], parents=[0]), dict(bodies=["arm"], actions=["a"], parents=[True]), dict(bodies=[], actions=[], parents=[])])
def test_trees(tmp_path, said):
    files.write_json(tmp_path/"dataset.json", said | dict(skeleton="coco17"))
    with pytest.raises(DataError, match="dataset.json: not a declaration.*expected"): data.declared(tmp_path)

def test_scores(tmp_path):
    l = submit.Listed(Path("list"), ["a", "b"], None)
    good = dict(name=np.array(["a", "b"]), rgb_action=np.full((2,52), 1/52, np.float32), rgb_body=np.full((2,7), 1/7, np.float32))
    for change,says in ((dict(rgb_action=np.full((2,52), np.nan, np.float32)), "finite"), (dict(rgb_action=np.zeros(2, np.float32)), "of shape"), (dict(rgb_body=np.zeros((2,8), np.float32)), "8 bodies"), (dict(name=np.array(["a", "b", "c"])), "each of 3"),
                        (dict(rgb_action=np.array([["x"]*52]*2)), "finite"), (dict(pose_action=np.zeros((2,5), np.float32)), "5 and 52 actions"), (dict(name=np.array([{}, {}], object)), "Object arrays")):
        np.savez(tmp_path/"s.npz", **good | change)
        with pytest.raises(DataError, match=says) as e: submit.read_scores(tmp_path/"s.npz", l)
        assert "s.npz" in str(e.value)
    np.savez_compressed(tmp_path/"s.npz", big=np.zeros(2**28)); assert (tmp_path/"s.npz").stat().st_size<4e6
    with pytest.raises(DataError, match="says it unpacks to"): submit.read_scores(tmp_path/"s.npz", l)

def film_that_lies(path): # its header says three billion frames: decord reserves memory for them, and ends the process if there is none
    from test_own import encode
    raw = bytearray(encode(path, T=8).read_bytes())
    at = raw.index(b"stts")+12                                          # after version and number of entries: how many frames last as long
    assert int.from_bytes(raw[at:at+4], "big")==8
    raw[at:at+4] = (3*10**9).to_bytes(4, "big")
    path.write_bytes(raw)
    return path

def test_a_film_that_lies(tmp_path):
    from pcan.predict import open_film
    with pytest.raises(DataError, match="a.mp4: no frame of it can be decoded .*3,000,000,000 frames"): open_film(film_that_lies(tmp_path/"a.mp4"))

def test_a_process_that_dies_is_not_waited_for():
    with pytest.raises(DataError, match="ended in the middle of its work"):
        with files.pool(2) as p: p.map(os._exit, [3, 3])
    with files.pool(2) as p: assert list(p.imap(abs, range(-9, 0), chunksize=4))==list(range(9, 0, -1))

def test_pickles_are_opened_in_one_place_only():
    "Whoever wants to open a pickle, a torch file or arrays goes through the two functions that know how."
    import re
    for p in (ROOT/"pcan").glob("*.py"):
        text = p.read_text(encoding="utf-8")
        assert p.name=="files.py" or not re.search(r"pickle\.(load|loads|Unpickler)\(|read_pickle|joblib|yaml|\beval\(|\bexec\(|shelve|marshal", re.sub(r"\.eval\(\)", "", text)), p
        for m in re.finditer(r"torch\.load\((?!path, weights_only=False\)\['state_dict'\])", text): assert "weights_only=True" in text[m.start():m.start()+120], (p, text[m.start():m.start()+120])
        for m in re.finditer(r"np\.load\(", text):
            call = text[m.start():text.index(")", m.start())]
            assert "allow_pickle=True" not in call
        assert not re.search(r"extractall|\.extract\(|shell=True", text) or p.name=="docs.py", p
