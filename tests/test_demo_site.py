"The page of `pcan_demo` in a real browser: `make test-site`."
import json, re, subprocess, sys, time
import pytest
from test_demo import files, network
from test_site import LOOKS, browser

pytestmark = pytest.mark.site

@pytest.fixture(scope="module")
def url(network):
    p = subprocess.Popen([sys.executable, "-m", "pcan.cli", "demo", "--checkpoint", str(network), "--port", "0", "--max-mb", "1"], stdout=subprocess.PIPE, text=True)
    yield p.stdout.readline().split()[0]
    p.terminate(); p.wait(20)

def until(browser, js, seconds=60):
    end = time.time()+seconds
    while not browser.eval(js):
        assert time.time()<end, (js, browser.eval("document.body.innerText")[:500])
        time.sleep(.05)

@pytest.fixture(params=["desktop", "dark", "phone"])
def tab(browser, url, request):
    "The empty page; in the end nothing was asked of another machine and the console is empty."
    width, look = LOOKS[request.param]
    browser.events.clear()
    browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width<600)
    browser("Emulation.setEmulatedMedia", media="screen", features=[dict(name="prefers-color-scheme", value=look)])
    browser("Page.navigate", url=url)
    until(browser, f"document.readyState=='complete' && location.href=='{url}'")
    browser.look = look
    yield browser
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"]=="Network.requestWillBeSent"]
    assert asked and all(u.startswith((url, "data:")) for u in asked), [u for u in asked if not u.startswith((url, "data:"))]
    told = [e["params"] for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
    told = [t for t in told if "422" not in json.dumps(t)]              # Chromium logs the status of our own refusals
    assert not told, told

def looks_right(tab):
    wide = tab.eval("document.documentElement.scrollWidth - innerWidth")
    assert wide<=0, f"{wide} px wider than the window"
    rgb = [int(x) for x in re.findall(r"\d+", tab.eval("getComputedStyle(document.body).backgroundColor"))[:3]]
    assert (sum(rgb)<150)==(tab.look=="dark"), rgb
    assert tab.eval("document.querySelectorAll('h1').length")==1
    assert tab.eval("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))")==0, "an id twice"
    assert tab.eval("[...document.querySelectorAll('input,select')].every(e => e.labels.length==1)"), "a field without a label"
    assert tab.eval("[...document.images].every(i => i.alt && i.naturalWidth)"), "a picture that is not there, or says nothing"
    pale = tab.eval("""(() => { const l = c => { const v = c.match(/[\\d.]+/g).slice(0,3).map(x => x/255).map(x => x<=.03928 ? x/12.92 : ((x+.055)/1.055)**2.4); return .2126*v[0]+.7152*v[1]+.0722*v[2] };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c } return 'rgb(255,255,255)' };
      return [...document.querySelectorAll('.label,.soft,.before,h1,p,label,button,li,td,.error,a,summary')].filter(e => e.innerText && e.innerText.trim()).map(e => {
        const a = l(getComputedStyle(e).color), b = l(ground(e)); return [(Math.max(a,b)+.05)/(Math.min(a,b)+.05), e.outerHTML.slice(0,80)] }).filter(x => x[0]<4.5) })()""")
    assert not pale, pale
    tab.eval("scrollTo(0, document.body.scrollHeight)")
    assert tab.eval("(r => r.top>=0 && r.bottom<=innerHeight && r.height>0)(document.querySelector('.label').getBoundingClientRect())"), "the label is out of sight"

def put(tab, field, *paths):
    node = tab("DOM.querySelector", nodeId=tab("DOM.getDocument")["root"]["nodeId"], selector=f"#{field}")["nodeId"]
    tab("DOM.setFileInputFiles", nodeId=node, files=[str(p) for p in paths])

def test_a_sample_by_keyboard(tab):
    looks_right(tab)
    tab.eval("document.getElementById('sample').focus()")
    tab.eval("document.getElementById('sample').value = 'nodding'")
    for key,code in (("Tab", 9), ("Enter", 13)):
        for kind in ("keyDown", "keyUp"): tab("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **(dict(text="\r") if key=="Enter" and kind=="keyDown" else {}))
    until(tab, "!!document.querySelector('article#result')")
    assert tab.eval("document.activeElement.id")=="result" and tab.eval("document.getElementById('sample').value")=="nodding"
    assert tab.eval("document.querySelectorAll('.tree li li').length")==5
    assert tab.eval("[...document.querySelectorAll('svg.bar')].every(s => s.getBoundingClientRect().width>60)")
    looks_right(tab)

def test_an_upload(tab, files):
    put(tab, "film", files/"me.mp4"); put(tab, "joints", files/"me.pkl")
    tab.eval("document.forms[0].requestSubmit()")
    said = tab.eval("document.querySelector('.status').textContent")         # None while the answer is being loaded
    assert said is None or said.startswith("Looking at it") or tab.eval("!!document.querySelector('article#result')")
    until(tab, "!!document.querySelector('article#result')")
    assert "me.mp4: 24 frames" in tab.eval("document.querySelector('article').innerText")
    assert tab.eval("document.querySelector('a[download=\"prediction.json\"]').href.startsWith('data:application/json')")
    looks_right(tab)

def test_what_goes_wrong(tab, files, tmp_path):
    tab.eval("document.forms[0].requestSubmit()")
    assert tab.eval("document.querySelector('.status').textContent")=="Choose a video first."
    (tmp_path/"large.mp4").write_bytes(b"x"*1_500_000)
    put(tab, "film", tmp_path/"large.mp4")
    tab.eval("document.forms[0].requestSubmit()")
    assert "these files have" in tab.eval("document.querySelector('.status').textContent").lower()
    bad = tmp_path/"<img src=x onerror=console.log(1)>.mp4"
    bad.write_bytes(b"no video")
    put(tab, "film", bad)
    tab.eval("document.forms[0].requestSubmit()")
    until(tab, "!!document.querySelector('.error')")
    assert "<img src=x onerror=console.log(1)>.mp4: not a video" in tab.eval("document.querySelector('.error').innerText")
    looks_right(tab)

def test_another_page_cannot_use_it(browser, url, tmp_path):
    "A page from elsewhere sends a form: the browser says so, and it is refused."
    (tmp_path/"evil.html").write_text(f'<form method="post" action="{url}look" enctype="multipart/form-data"><input name="sample" value="waving"></form><script>document.forms[0].submit()</script>')
    browser("Page.navigate", url=(tmp_path/"evil.html").as_uri())
    until(browser, f"location.href=='{url}look'")
    until(browser, "document.body && document.body.innerText.includes('not sent by this page')")
