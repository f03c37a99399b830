"The overview figure: it names every equation, and nothing in it lies on anything else."
import re
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from pcan.overview import RC, SETS, plot_method

@pytest.fixture(scope="module")
def drawn():
    "The figure, its texts and where each stands, in pixels."
    with plt.rc_context(RC):
        fig = plot_method(); fig.set_dpi(96); fig.canvas.draw()
        texts = [(t, t.get_window_extent()) for t in fig.findobj(Text) if t.get_text()]
    yield fig, texts
    plt.close(fig)

def test_names_all_equations(drawn):
    spans = [re.fullmatch(r"Eq\. (\d+)(?:–(\d+))?", t.get_text()) for t,_ in drawn[1] if t.get_text().startswith("Eq.")]
    assert sorted(n for m in spans for n in range(int(m[1]), int(m[2] or m[1])+1))==list(range(1, 13))

def test_texts_can_be_read(drawn):
    fig, texts = drawn
    width, height = fig.canvas.get_width_height()
    assert (width, height)==(900, 640)
    for i,(t,b) in enumerate(texts):
        word = t.get_text()
        assert t.get_fontsize()>=8, f"{word!r} is too small for a README"
        assert 4<=b.x0 and b.x1<=width-4 and 4<=b.y0 and b.y1<=height-4, f"{word!r} leaves the canvas"
        for u,c in texts[:i]: assert not b.overlaps(c), f"{word!r} lies on {u.get_text()!r}"

def test_no_line_runs_through_a_text(drawn):
    "Neither a line nor the edge of a box."
    fig, texts = drawn
    ax = fig.axes[0]
    edges = [p for p in ax.patches if isinstance(p, FancyBboxPatch) and p.get_edgecolor()[3]>0]
    paths = [(l.get_path(), l.get_transform()) for l in ax.lines] + [(p.get_path(), p.get_transform()) for p in edges]
    for path in (transform.transform_path(path) for path,transform in paths):
        for t,b in texts: assert not path.intersects_bbox(b, filled=False), f"a line runs through {t.get_text()!r}"

def test_no_arrow_runs_through_a_box(drawn):
    "An arrow lies inside a box or outside. Boxes are those with a title of their own: frames that hold other boxes may be crossed."
    fig = drawn[0]
    boxes = [p.get_window_extent().padded(-2) for p in fig.axes[0].patches if isinstance(p, FancyBboxPatch)]
    holds = lambda b, c: b is not c and c.width>50 and b.x0<=c.x0 and c.x1<=b.x1 and b.y0<=c.y0 and c.y1<=b.y1
    boxes = [b for b in boxes if not any(holds(b, c) for c in boxes)]
    arrows = [l for l in fig.axes[0].lines if l.get_linewidth()==1.2]
    assert len(boxes)>=12 and len(arrows)>=20
    for a in arrows:
        xy = a.get_transform().transform(a.get_xydata())
        along = np.concatenate([p + np.linspace(0, 1, 100)[:,None]*(q-p) for p,q in zip(xy, xy[1:])])
        for b in boxes: assert len({b.contains(*p) for p in along})==1, f"an arrow enters the box at {b.bounds}"

def test_sets_have_the_colours_of_their_page():
    "The same five colours in the page on ambiguity."
    from pcan.files import root
    page = (root()/"nbs"/"30_ambiguity.ipynb").read_text(encoding="utf-8")
    assert all(c in page for c in SETS.values())
