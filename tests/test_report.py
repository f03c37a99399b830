"Tables, verdicts and pages: same numbers back, same bytes again, nothing fetched from elsewhere."
import re

import numpy as np
import pytest
from nbformat import v4
from sklearn.metrics import f1_score

from pcan import audit, files, report, site, verdicts
from pcan.tree import MA52

NAMES = list(report.METRICS)


@pytest.fixture
def at(tmp_path, monkeypatch):
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"paper").symlink_to(files.root()/"data"/"paper")
    monkeypatch.setenv("PCAN_ROOT", str(tmp_path))
    return tmp_path


def rows(variant, seeds=(0,), start=.5):
    return [dict(experiment="t", variant=variant, stream="fused", seed=s, split="test", metric=m, value=start+.01*i+.001*s, run=f"r{s}")
            for s in seeds for i,m in enumerate(NAMES)]


def preds(y, p): return verdicts.predictions(dict(y_a=np.asarray(y), fused_action=np.eye(52)[np.asarray(p)]))


def test_table_round_trip_and_same_bytes(at):
    want = rows("a", (0, 1)) + rows("b", (0, 1), .6)
    path = report.save_table(want, "t", "quick")
    first = path.read_bytes()
    assert report.save_table(want, "t", "quick").read_bytes()==first and b"\r" not in first
    back = report.read_table("t", "quick")
    assert list(back.columns)==["experiment", "variant", "stream", "seed", "split", "metric", "value", "run"]
    assert np.allclose(back.value, [r["value"] for r in want], atol=1e-6)
    assert report.table_html(back.to_dict("records"), None, "quick", "c")==report.table_html(want, None, "quick", "c")


def test_smoke_lives_apart(at):
    assert report.folder("smoke", "x").relative_to(at).as_posix()=="reports/smoke/x"
    assert report.folder("quick", "x").relative_to(at).as_posix()=="reports/quick/x"
    assert "SMOKE" in report.source_note("smoke") and "ynthetic" in report.source_note("quick") and "MA-52" in report.source_note("paper")


def test_best_is_bold_and_labels_are_text(at):
    t = report.table_html(rows("Majority class", start=.9) + rows("<img src=x>") + rows("b", start=.6), None, "quick", "a & b")
    assert "<img" not in t and "&lt;img" in t and "a &amp; b" in t
    assert re.findall(r"<b>([\d.]+)</b>", t)[:2]==["60.00", "61.00"], "the best of ours, the majority row aside"


@pytest.mark.parametrize("profile, differences", [("quick", False), ("paper", True)])
def test_differences_to_the_paper_only_on_its_data(at, profile, differences):
    t = report.table_html(rows("PCAN"), audit.paper_table("table1").loc[["PCAN"]], profile, "c")
    assert ("minus the paper" in t)==differences and ("orientation" in t)!=differences


def test_paper_tables_have_our_labels(at):
    from pcan.config import plan
    for name in ("table1", "table2", "table3"):
        labels = list(plan(name, "smoke"))
        assert [l for l in labels if l not in audit.paper_table(name).index]==[]
        if name!="table1": assert list(audit.paper_table(name).index)==labels


def test_scores_equal_sklearn():
    r = np.random.default_rng(0)
    for n in (20, 300):
        q = preds(y:=r.integers(0, 52, n), np.where(r.random(n)<.5, y, r.integers(0, 52, n)))
        for level in ("body", "action"):
            a, b = (q.y_b, q.p_b) if level=="body" else (q.y_a, q.p_a)
            for kind in ("macro", "micro"): assert np.isclose(verdicts.score(q, f"{level}_f1_{kind}")[0], f1_score(a, b, average=kind))
            assert np.isclose(verdicts.score(q, f"{level}_top1")[0], (a==b).mean())


def test_weights_are_repeated_clips():
    r = np.random.default_rng(1); y, p = r.integers(0, 52, 40), r.integers(0, 52, 40)
    w = r.multinomial(40, np.full(40, 1/40)); twice = np.repeat(np.arange(40), w)
    for m in ("f1_mean", "action_top1", "body_f1_macro"):
        assert np.isclose(verdicts.score(preds(y, p), m, w[None].astype(float))[0], verdicts.score(preds(y[twice], p[twice]), m)[0])


def test_verdicts_are_cautious():
    y = np.full(200, 9); on = lambda n: preds(y, np.where(np.arange(200)<n, 9, 5))
    d = lambda a, b: verdicts.difference(a, b, "action_top1")
    assert verdicts.judge("", d([on(150)], [on(100)])).outcome=="holds"
    assert verdicts.judge("", d([on(100)], [on(150)])).outcome=="does not hold"
    assert verdicts.judge("", d([on(101)], [on(100)])).outcome=="cannot be told"
    assert verdicts.judge("", d([on(150), on(101)], [on(100), on(100)])).outcome=="cannot be told", "two seeds that disagree"
    one, two = d([on(150)], [on(100)]), d([on(150), on(148)], [on(100)]*2)
    assert two.lo<=one.lo and (two.seeds, two.clips)==(2, 200)
    with pytest.raises(ValueError, match="same seeds"): d([on(1)], [on(1), on(2)])


def test_bootstrap_covers_about_what_it_says():
    "95% intervals of a difference of 5 points contain it in 88 to 99 of 100 experiments."
    r, hits = np.random.default_rng(2), 0
    for _ in range(100):
        a, b = (preds(np.full(150, 9), np.where(r.random(150)<p, 9, 5)) for p in (.6, .55))
        d = verdicts.difference([a], [b], "action_top1"); hits += d.lo<=.05<=d.hi
    assert 88<=hits<=99


def test_page_needs_nothing_else_and_escapes():
    evil = "<script>alert(1)</script>"
    nb = v4.new_notebook(cells=[v4.new_markdown_cell(f"# T {evil}\n\n> Q?\n\n[l](javascript:alert(1))"), v4.new_code_cell(evil, outputs=[
        v4.new_output("stream", name="stdout", text=evil), v4.new_output("stream", name="stderr", text="progress bar"),
        v4.new_output("display_data", {"text/plain": evil}),
        v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata={"pcan": dict(role="figure", name="f", caption=evil, alt='"><script>', width=100)}),
        v4.new_output("display_data", {"text/html": "<p>foot</p>"}, metadata={"pcan": dict(role="provenance")}),
        v4.new_output("display_data", {"text/html": "<p>top</p>"}, metadata={"pcan": dict(role="banner")})])])
    page = site.page(nb, site.menu(["table1", "figure3"], here="table1"))
    assert "<script" not in page and "javascript:" not in page and "progress bar" not in page
    assert not re.search(r'(src|href)="?(https?:)?//', page) and "url(" not in page
    assert page.index("<p>top</p>") < page.index("<h1>") and page.index("<footer>") < page.index("<p>foot</p>")
    assert 'aria-current=page>Table 1' in page and "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    assert site.heading(nb)[1]=="Q?"


def test_overview_prefers_the_serious_profile_and_never_smoke(at):
    import nbformat
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# Table 1\n\n> Q?"), v4.new_code_cell("1")])
    for profile in ("smoke", "bench", "quick"):
        with files.atomic(report.folder(profile, "pages", "table1.ipynb"), "w") as f: f.write(nbformat.writes(nb))
        site.build(profile); site.index(profile)
        assert (at/"reports"/"index.html").exists()==(profile!="smoke")
    top = (at/"reports"/"index.html").read_text(encoding="utf-8")
    assert "bench/pages/table1.html" in top and "quick" not in top.split("</style>")[1] and "smoke" not in top.split("</style>")[1]
    everything = {p: p.read_bytes() for p in (at/"reports").rglob("*.*")}
    site.build("quick"); site.index("quick")
    assert everything=={p: p.read_bytes() for p in (at/"reports").rglob("*.*")}


def test_links_of_the_overview_lead_somewhere(at):
    test_overview_prefers_the_serious_profile_and_never_smoke(at)
    for page in (at/"reports").rglob("*.html"):
        for href in re.findall(r'href="([^"#:]+)"', page.read_text(encoding="utf-8")): assert (page.parent/href).exists(), (page, href)


COMMITTED = sorted(p for p in (files.root()/"reports").rglob("*.html") if p.relative_to(files.root()/"reports").parts[0] not in ("smoke", "fresh"))

@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.relative_to(files.root()/"reports").as_posix())
def test_committed_pages_need_nothing_from_elsewhere(path):
    "No script, nothing loaded from another machine, pictures inside or beside, every link and anchor leads somewhere; a browser looks closer in `make test-site`."
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text and "url(" not in text.split("</style>")[0]
    for tag, attribute, to in re.findall(r'<(\w+)\b[^>]*?\s(src|href|srcset|action)="([^"]*)"', text):
        if to.startswith(("http:", "https:", "//")): assert (tag, attribute)==("a", "href"), to
        elif not to.startswith("data:"):
            file, _, anchor = to.partition("#"); target = path.parent/file if file else path
            assert target.exists(), to
            if anchor: assert f'id="{anchor}"' in target.read_text(encoding="utf-8"), to
    if path.parent.name=="pages": assert all(s.startswith("data:image/png;base64,") for s in re.findall(r'<img[^>]* src="([^"]*)"', text))
    for caption in re.findall(r"<(?:fig)?caption>(.*?)</(?:fig)?caption>", text, re.S): assert re.search("Synthetic benchmark|MA-52, profile|numbers that the paper prints|Our own answers|Counted, not measured", caption), caption
    assert all(w in text.split("<footer>")[1] for w in ("make reports", *(("Commit", "Data", "Seeds", "Versions", "Device", "Training", "config.json", "pcan_report") if path.parent.name=="pages" and path.stem not in ("audit", "speed") else ())))   # the audit is of the paper alone, speed of the machine: no runs
    if path.stem=="speed" and path.parent.name=="pages": assert re.search(r"Commit</th><td[^>]*>[0-9a-f]{12}<", text), "of which commit?"


def test_committed_pages_are_current():
    "Built again from the committed notebooks: the same pages, of all experiments."
    profile = "bench"
    nbs = report.executed(profile)
    assert set(nbs)=={p.stem for p in report.folder(profile, "pages").glob("*.html")}==set(report.EXPERIMENTS)
    for n,nb in nbs.items():
        path = report.folder(profile, "pages", f"{n}.html")
        made = site.page(nb, site.menu(nbs, here=n, up="../index.html", top="../../index.html"), path.parent)
        assert path.read_text(encoding="utf-8")==made, f"{n}: run pcan.site.build({profile!r})"
    assert report.folder(profile, "index.html").read_text(encoding="utf-8").count('class="answer"')==len(nbs)


def test_maths_is_mathml_or_code():
    made = site.markdown("The momentum $\\rho$ and\n\n$$p_k = \\frac{1}{n}\\sum_i F_i$$\n\nbut `$x$` for $5 and $6.")
    assert made.count("<math")==2 and made.count('display="block"')==1 and "<code>$x$</code>" in made and "for $5 and $6." in made
    for evil in (r"\href{javascript:alert(1)}{x}", r"\text{<script>alert(1)</script>}", r"\style{background:url(http://a)}{x}", "x_{"):
        assert site.mathml(evil).startswith("<code>") and "<script" not in site.mathml(evil)


def test_glance_and_contents():
    verdict = '<ul class="verdicts"><li><span class="outcome holds">holds</span> A &lt; b. <span class="why">+1 points</span></li></ul>'
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# T\n\n> Q?\n\nText."), v4.new_markdown_cell("## One"), v4.new_markdown_cell("## One"), v4.new_code_cell("1", outputs=[
        v4.new_output("display_data", {"text/html": verdict}, metadata={"pcan": dict(role="verdict", outcomes=["holds"])})])])
    page = site.page(nb)
    assert page.index("Q?") < page.index('class="glance"') < page.index('href="#one-2"') < page.index("Text.") < page.index('id="one-2"') < page.index('id="claims"')
    assert "+1 points" not in page.split('class="glance"')[1].split("</div>")[0] and site.tally([nb])=="Of 1 claim, 1 holds, 0 do not hold, 0 cannot be told."


def test_no_results_is_one_clear_sentence(at):
    with pytest.raises(files.DataError, match="no executed notebooks.*make reports PROFILE=quick"): site.index("quick")
    with pytest.raises(ValueError, match="expected names from"): report.execute("smoke", ["table9"])


def test_figures_are_stamped_and_stable(at):
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt, pandas as pd
    from pcan.figures import save_figure, style
    style()
    def draw(profile):
        fig, ax = plt.subplots(figsize=(3, 2)); ax.plot([0, 1])
        return {k: p.read_bytes() for k,p in save_figure(fig, "x", profile, pd.DataFrame(dict(a=[0., 1.])), "c").items()}
    assert draw("smoke")==draw("smoke")
    assert b"SMOKE" in draw("smoke")["svg"] and b"SMOKE" not in draw("quick")["svg"]
    assert b"<text" in draw("quick")["svg"], "text stays text"


def test_difficulty_groups_follow_the_paper():
    from pcan.figures import difficulty, level
    assert level([.61, .6, .5, .49, np.nan]).tolist()==[0, 1, 1, 2, -1]
    y = np.repeat([9, 28], 10); a = preds(y, np.where(np.arange(20)%10<np.where(y==9, 8, 2), y, 5))
    n, A, B = difficulty([a], [a]); assert n.tolist()==[1, 0, 1] and np.isnan(A[0,1]) and np.allclose(A, B, equal_nan=True)
    assert np.allclose(A[0,[0,2]], [.8, .2])


def test_ambiguous_actions_by_rule():
    from pcan.figures import ambiguous, answers
    y = np.repeat([9, 28, 40, 13], 10)
    base = preds(y, np.where(np.arange(40)%10<np.repeat([4, 4, 4, 6], 10), y, np.repeat([5, 24, 41, 14], 10)))
    ours = preds(y, np.where(np.arange(40)%10<np.repeat([9, 9, 9, 1], 10), y, np.repeat([5, 24, 41, 14], 10)))
    chosen = ambiguous([base], [ours])
    assert len(chosen)==4 and chosen[-1][0]==13 and "loses" in chosen[-1][2] and len({MA52.parents[k] for k,_,_ in chosen[:3]})==3
    t = answers(9, {"a": [base], "b": [ours]})
    assert t.answer[0]==MA52.actions[9] and np.allclose(t[["a", "b"]].sum(), 1)
