"The committed pages in a real browser: `make test-site`. Needs Chromium, and is no part of `make test`."
import json, os, re, shutil, subprocess, time
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.site
REPORTS = Path(__file__).resolve().parent.parent/"reports"
PAGES = sorted(p for p in REPORTS.rglob("*.html") if p.relative_to(REPORTS).parts[0] not in ("smoke", "fresh"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOKS = {"desktop": (1280, "light"), "dark": (1440, "dark"), "phone": (390, "light"), "paper": (718, "print")}


class Browser:
    "One tab of a headless Chromium that can reach no other machine, spoken to over its DevTools socket."
    def __init__(self, program, folder):
        from websocket import create_connection
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen([program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, end = folder/"DevToolsActivePort", time.time() + 60
        while not (port.exists() and "\n" in port.read_text()):
            assert self.process.poll() is None and time.time()<end, f"{program} did not start"
            time.sleep(.1)
        tabs = json.load(urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=20))
        self.socket = create_connection(next(t for t in tabs if t["type"]=="page")["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        self.n, self.events = 0, []
        for domain in ("Page", "Network", "Runtime", "Log"): self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (got := json.loads(self.socket.recv())).get("id")!=self.n: self.events.append(got)
        assert "error" not in got, (method, got)
        return got["result"]

    def eval(self, js): return self("Runtime.evaluate", expression=js, returnByValue=True, awaitPromise=True)["result"].get("value")

    def open(self, path, width, look):
        "Load a page; what it asked for and complained about."
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width<600)
        self("Emulation.setEmulatedMedia", media="print" if look=="print" else "screen", features=[dict(name="prefers-color-scheme", value="dark" if look=="dark" else "light")])
        self("Page.navigate", url=path.as_uri())
        end = time.time() + 30
        while self.eval("document.readyState+location.href")!="complete"+path.as_uri():
            assert time.time()<end, f"{path} does not load"
            time.sleep(.02)
        self.eval("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => 1)")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"]=="Network.requestWillBeSent"]
        said = [e["params"] for e in self.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")]
        return asked, said

    def close(self):
        try: self("Browser.close"); self.process.wait(20)
        except Exception: self.process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not program: pytest.fail(f"no browser: found none of {', '.join(NAMES)}; install one (Debian: apt install chromium) or name it in $CHROMIUM", pytrace=False)
    b = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


def test_the_checks_can_fail(browser, tmp_path):
    "A page with everything wrong: a picture that is missing, one from elsewhere, an error, a block that is too wide."
    (tmp_path/"bad.html").write_text('<meta name="viewport" content="width=device-width"><img src="none.png"><img src="https://example.org/a.png"><script>console.log(1); x()</script><div style="width:2000px">.</div>', encoding="utf-8")
    asked, said = browser.open(tmp_path/"bad.html", *LOOKS["desktop"])
    assert "https://example.org/a.png" in asked and len(said)>=4
    assert browser.eval("[...document.images].filter(i => !i.naturalWidth).length")==2
    assert browser.eval("document.documentElement.scrollWidth - innerWidth")>700


def test_there_are_pages(): assert {"index.html", "README.md"} <= {p.name for p in REPORTS.iterdir()} and len(PAGES)>3


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(REPORTS).as_posix())
def test_page(browser, path, look):
    asked, said = browser.open(path, *LOOKS[look])
    assert not said, f"the console says {said}"
    assert asked and all(u.startswith(("file:", "data:")) for u in asked), [u for u in asked if not u.startswith(("file:", "data:"))]
    assert not browser.eval("[...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 99))"), "images that do not load"
    wide = browser.eval("document.documentElement.scrollWidth - innerWidth")
    assert wide<=0, f"{wide} px wider than the window"
    cut = browser.eval("[...document.querySelectorAll('main>:not(.scroll,figure,pre,.toc)')].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'none').map(e => e.outerHTML.slice(0, 80))")
    assert not cut, f"wider than their column: {cut}"
    rgb = [int(x) for x in re.findall(r"\d+", browser.eval("getComputedStyle(document.body).backgroundColor"))[:3]]
    assert (sum(rgb)<150)==(look=="dark"), rgb


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(REPORTS).as_posix())
def test_links_and_structure(browser, path):
    browser.open(path, *LOOKS["desktop"])
    for url in browser.eval("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
        if url.startswith(("http:", "https:")): continue
        assert url.startswith("file:"), url
        to, anchor = Path(unquote(urlsplit(url).path)), urlsplit(url).fragment
        assert to.exists(), url
        if anchor: assert re.search(rf'id="{re.escape(anchor)}"', to.read_text(encoding="utf-8")), url
    assert browser.eval("document.querySelectorAll('h1').length")==1
    assert browser.eval("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))")==0, "an id twice"
    assert not browser.eval("[...document.images].filter(i => !i.alt).length"), "images without a description"
    assert not browser.eval("[...document.querySelectorAll('math')].filter(m => !m.getBoundingClientRect().width).length"), "formulas that are not drawn"
