"The page for the browser, asked as a browser or a troublemaker would ask."
import base64, json, os, pickle, re, signal, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from starlette.testclient import TestClient
from pcan.checkpoint import Card, open_checkpoint, pack
from pcan.demo import Limits, Worker, app, host_ok, look, origin_ok, serve
from pcan.files import DataError
from pcan.page import page, shown_name
from pcan.config import make
from pcan.synth import clip as synthetic
from pcan.systems import SYSTEMS
from tinyset import write_video

URL = "http://127.0.0.1:8000"
said = lambda r: re.search(r"did not work.</b> (.*?)</div>", r.text, re.S)[1]

@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    run, file = make("pcan", "smoke"), tmp_path_factory.mktemp("net")/"net.safetensors"
    card = Card(run="untrained", system="PCAN", data=run.data, synthetic=True, seconds=1.5)
    pack(run, SYSTEMS["pcan"].build(run)[0].eval(), card, file)
    return file

@pytest.fixture(scope="module")
def worker(network):
    w = Worker(network, Limits(seconds=100, film_seconds=20))
    yield w
    w.stop()

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A drawn clip as a video and a pickle."
    folder, s = tmp_path_factory.mktemp("files"), synthetic("smoke", "test", 1)
    write_video(folder/"me.mp4", s.frames)
    row = dict(frame_dir="me", total_frames=len(s.keypoint), img_shape=s.frames.shape[1:3], keypoint=s.keypoint[None], keypoint_score=s.score[None])
    (folder/"me.pkl").write_bytes(pickle.dumps([row], protocol=4))
    return folder

@pytest.fixture
def temporary(tmp_path, monkeypatch):
    "Where the page's temporary files would be."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"tmp"))
    (tmp_path/"tmp").mkdir()
    yield tmp_path/"tmp"
    assert not list((tmp_path/"tmp").iterdir()), "something was left behind"

@pytest.fixture
def browser(worker, temporary):
    with TestClient(app(limits=Limits(mb=2), worker=worker), base_url=URL) as c: yield c

def test_the_empty_page(browser):
    r = browser.get("/")
    assert r.status_code==200 and "Network trained on a synthetic benchmark; not for judging people" in r.text
    assert "up to 2 MB" in r.text and r.text.count("<option")==52+3 and r.text.count("<label for=")==4
    for x in re.findall(r'<label for="(\w+)"', r.text): assert f'id="{x}"' in r.text
    assert r.headers["cache-control"]=="no-store" and r.headers["x-content-type-options"]=="nosniff" and "set-cookie" not in r.headers
    policy, nonce = r.headers["content-security-policy"], re.search('nonce="([^"]+)"', r.text)[1]
    assert "default-src 'none'" in policy and f"script-src 'nonce-{nonce}'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert nonce!=re.search('nonce="([^"]+)"', browser.get("/").text)[1]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|style=|onclick", r.text), "nothing comes from elsewhere, and no style or script stands in an attribute"

def test_a_sample(browser):
    r = browser.post("/look", data=dict(sample="rubbing eyes"), files=dict(x=b""))
    assert r.status_code==200 and '<option selected>rubbing eyes' in r.text and "not for judging people" in r.text
    found = dict(re.findall(r'download="([\w.]+)" href="data:[\w/]+;base64,([^"]+)"', r.text))
    assert set(found)=={"prediction.json", "contact_sheet.png"} and base64.b64decode(found["contact_sheet.png"])[:4]==b"\x89PNG"
    p = json.loads(base64.b64decode(found["prediction.json"]))
    assert p["video"]["name"]=="rubbing-eyes" and p["network"]["synthetic"] and "not for judging people" in p["label"]
    assert len(p["actions"])==5 and all(f"<span>{a['name']}</span>" in r.text and f"{a['probability']:.1%}" in r.text for a in p["actions"])
    assert r.text.count('<svg class="bar"')==5 and r.text.count('class="mark"')==5 and "Nearest prototypes" in r.text
    for img in re.findall("<img[^>]*>", r.text): assert 'alt="' in img

def test_a_video_with_joints(browser, files):
    r = browser.post("/look", files=dict(film=("me.mp4", (files/"me.mp4").read_bytes()), joints=("me.pkl", (files/"me.pkl").read_bytes())))
    assert r.status_code==200 and "me.mp4: 24 frames" in r.text and "TRAINED WITH BOTH" not in r.text

def test_a_video_alone_and_joints_alone(browser, files):
    r = browser.post("/look", files=dict(film=("me.mp4", (files/"me.mp4").read_bytes())))
    assert r.status_code==200 and "TRAINED WITH BOTH" in r.text
    r = browser.post("/look", files=dict(film=("", b""), joints=("me.pkl", (files/"me.pkl").read_bytes())))
    assert r.status_code==422 and said(r).startswith("me.pkl: no frames"), "a network whose streams talk says little without frames"
    r = browser.post("/look", files=dict(film=("me.mp4", (files/"me.mp4").read_bytes())), data=dict(stream="pose"))
    assert r.status_code==422 and "no joints" in said(r)

def test_a_long_video(browser, tmp_path):
    frames = np.concatenate([synthetic("smoke", "test", i).frames for i in range(6)])
    write_video(tmp_path/"long.mp4", frames)
    r = browser.post("/look", files=dict(film=("long.mp4", (tmp_path/"long.mp4").read_bytes())))
    assert r.status_code==200 and "What happens when" in r.text and 'download="timeline.png"' in r.text and "<th>from</th>" in r.text

HOSTILE = ["<script>alert(1)<!x>.mp4", '"><img src=x onerror=alert(1)>.mp4', "{{7*7}}.mp4", "a$\\frac$b.mp4", "x"*300+".mp4", "‮evil.mp4", "..", "a\x00b.mp4"]

@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text(browser, files, name):
    for content in ((files/"me.mp4").read_bytes(), b"no video"):
        r = browser.post("/look", files=dict(film=(name, content)))
        assert r.status_code==(422 if content==b"no video" else 200)
        assert "<script>alert" not in r.text and "<img src=x" not in r.text and ">49" not in r.text and "xx"*60 not in r.text
        if name.startswith("<script>"): assert "&lt;script&gt;alert(1)&lt;!x&gt;.mp4" in r.text
        assert "/tmp" not in r.text.split("<script nonce")[0] and "pcan_demo_" not in r.text

def test_labels_are_escaped(worker):
    p = dict(video=dict(name="v", frames=1, seconds=1.), actions=[dict(name="<b>x", body="all", probability=.5, before=None)], bodies=[], notes=["<i>"],
             prototypes={}, sliding=False, windows=[], window=None)
    html = page(dict(tree={"all": ["<b>x", "y"]}, drawn=False, label="<u>", system="<s>", run="", sees=["rgb"]), Limits(),
                dict(prediction=p, pictures=dict(contact_sheet=""), text="<em>", when=[]))
    for x in ("<b>x", "<i>", "<u>", "<s>", "<em>"): assert x not in html and x.replace("<", "&lt;").replace(">", "&gt;") in html
    assert 'id="joints"' not in html and 'id="sample"' not in html and 'class="body"' not in html, "no joints, no samples, one level"

class Evil:
    def __reduce__(self): return os.system, ("touch /tmp/pcan_demo_was_run",)

@pytest.mark.parametrize("film,joints,says", [
    (b"", b"", "found no file"), (b"text", b"", "not a video"), (b"\x00"*999, b"", "not a video"), (pickle.dumps([1]), b"", "not a video"),
    (None, b"text", "not a readable pickle"), (None, pickle.dumps(Evil()), "neither a numpy array nor a plain container"),
    (None, pickle.dumps([dict(frame_dir="me", img_shape=(9,9), keypoint=np.zeros((1,24,17,2)), keypoint_score=np.ones((1,24,17)))]), "17 joints")])
def test_files_that_are_something_else(browser, files, film, joints, says):
    film = (files/"me.mp4").read_bytes() if film is None else film
    r = browser.post("/look", files=dict(film=("me.mp4" if film else "", film), joints=("me.pkl" if joints else "", joints)))
    assert r.status_code==422 and says in said(r) and 'role="alert"' in r.text, said(r)
    assert not Path("/tmp/pcan_demo_was_run").exists()

def test_a_video_cut_short(browser, files):
    r = browser.post("/look", files=dict(film=("me.mp4", (files/"me.mp4").read_bytes()[:900])))
    assert r.status_code==422 and "me.mp4" in said(r)

def test_too_large(browser):
    r = browser.post("/look", files=dict(film=("me.mp4", b"x"*2_200_000)))
    assert r.status_code==413 and "larger than 2 MB" in said(r) and "--max-mb" in said(r)
    assert browser.get("/").status_code==200

def test_too_long_and_too_big(network, files):
    opened, job = open_checkpoint(network), dict(film=str(files/"me.mp4"), name="mine.mp4")
    assert "takes up to 0.5 s" in look(opened, job, Limits(film_seconds=.5))["error"]
    assert "found frames of" in look(opened, job, Limits(pixels=100))["error"]
    assert "takes up to 0.5 s" in look(opened, dict(joints=str(files/"me.pkl"), joints_name="me.pkl"), Limits(film_seconds=.5))["error"]

@pytest.mark.parametrize("body,kind", [(b"sample=waving", "application/x-www-form-urlencoded"), (b"{}", "application/json"), (b"", ""),
                                       (b"--x\r\nbroken", "multipart/form-data; boundary=x"), (b"x", "multipart/form-data")])
def test_what_is_no_form(browser, body, kind):
    r = browser.post("/look", content=body, headers={"content-type": kind})
    assert r.status_code==422 and "found" in said(r)

def test_too_many_parts(browser):
    r = browser.post("/look", files=[("film", ("a.mp4", b"x"))]*5)
    assert r.status_code==422 and "form" in said(r)
    r = browser.post("/look", files=dict(film=b""), data=dict(sample="x"*5000, stream="<script>"))
    assert r.status_code==422 and "<script>" not in r.text

def test_only_this_machine(browser):
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1"):
        r = browser.get("/", headers=dict(host=host))
        assert r.status_code==400 and "judging" not in r.text
    assert browser.get("/", headers=dict(host="localhost:1234")).status_code==200

@pytest.mark.parametrize("more", [dict(origin="https://evil.example"), dict(origin="null"), {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
                                  {"origin": URL, "sec-fetch-site": "cross-site"}, dict(origin="http://127.0.0.1:9999")])
def test_a_form_of_another_page(browser, more):
    r = browser.post("/look", files=dict(film=("a.mp4", b"x")), headers=more)
    assert r.status_code==403 and "not sent by this page" in r.text

def test_a_form_of_this_page(browser):
    r = browser.post("/look", data=dict(sample="waving"), files=dict(x=b""), headers={"origin": URL, "sec-fetch-site": "same-origin"})
    assert r.status_code==200

def test_other_roads(browser):
    assert browser.get("/look").status_code==405 and browser.put("/").status_code==405 and browser.get("/../settings.ini").status_code==404

class Fake:
    "A worker that is told what to do."
    def __init__(self, worker, do): self.about, self.do, self.now, self.most = worker.about, do, 0, 0
    def ask(self, job):
        self.now += 1; self.most = max(self.most, self.now)
        try: return self.do(job)
        finally: self.now -= 1

def test_the_queue(worker, temporary):
    go, began, got = threading.Event(), threading.Event(), []
    fake = Fake(worker, lambda job: (began.set(), go.wait(30), dict(error="done"))[2])
    made = app(limits=Limits(queue=2), worker=fake)
    page_ = made.state
    with TestClient(made, base_url=URL) as c:
        ask = lambda: got.append(c.post("/look", data=dict(sample="waving"), files=dict(x=b"")).status_code)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads: t.start()
        assert began.wait(20)
        end = time.time()+20
        while page_.waiting<3: assert time.time()<end; time.sleep(.02)
        r = c.post("/look", data=dict(sample="waving"), files=dict(x=b""))
        assert r.status_code==503 and "videos are waiting or on their way" in said(r)
        go.set()
        for t in threads: t.join(20)
        assert got==[422]*3 and fake.most==1, "one at a time"
        assert c.post("/look", data=dict(sample="waving"), files=dict(x=b"")).status_code==422, "and then there is room again"

def test_files_are_gone_even_after_a_bug(worker, temporary, files):
    seen = []
    def bug(job): seen.append(Path(job["film"]).is_file()); raise RuntimeError("a bug")
    with TestClient(app(limits=Limits(queue=0), worker=Fake(worker, bug)), base_url=URL, raise_server_exceptions=False) as c:
        for _ in range(2): assert c.post("/look", files=dict(film=("me.mp4", (files/"me.mp4").read_bytes()))).status_code==500    # not 503: the place is free again
    assert seen==[True, True] and not list(temporary.iterdir())

def test_the_time_limit(network):
    w = Worker(network, Limits(seconds=.05))
    try:
        first = w.process.pid
        r = w.ask(dict(sample="waving"))
        assert r["late"] and "stopped after 0.05 s" in r["error"] and w.process.pid!=first and w.process.poll() is None
        with TestClient(app(limits=w.limits, worker=w), base_url=URL) as c:
            r = c.post("/look", data=dict(sample="waving"), files=dict(x=b""))
            assert r.status_code==504 and "stopped after" in said(r)
    finally: w.stop()
    assert w.process.poll() is not None

def test_a_network_that_is_not_there(tmp_path, capsys):
    from pcan import apply
    with pytest.raises(DataError, match="no such file"): Worker(tmp_path/"none.safetensors")
    assert apply.demo(["--checkpoint", str(tmp_path/"none.safetensors"), "--port", "0"])==2
    assert "no such file" in capsys.readouterr().err

def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as s:
        with pytest.raises(DataError, match="--port 0 takes any"): serve(port=s.getsockname()[1])

def test_the_command_serves_until_it_is_interrupted(network):
    p = subprocess.Popen([sys.executable, "-m", "pcan.cli", "demo", "--checkpoint", str(network), "--port", "0", "--max-mb", "3"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        import httpx
        url = p.stdout.readline().split()[0]
        children = [int(c) for c in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()]
        r = httpx.get(url, timeout=60)
        assert url.startswith("http://127.0.0.1:") and r.status_code==200 and "server" not in r.headers
        assert httpx.post(url+"look", files=dict(film=("a.mp4", b"x"*9_000_000)), timeout=60).status_code==413, "read to its end, then refused"
        assert httpx.post(url+"look", files=dict(film=("a.mp4", b"x"*90_000)), timeout=60).status_code==422
        os.killpg(p.pid, signal.SIGINT)                                   # as a terminal does it
        out, err = p.communicate(timeout=30)
        assert not err and p.returncode==0 and children and not any(Path(f"/proc/{c}").exists() for c in children), err
    finally: p.kill(); p.wait(20)

@pytest.mark.parametrize("args", [dict(mb=0), dict(seconds=-1), dict(film_seconds=float("nan"))])
def test_limits_that_cannot_be(args):
    with pytest.raises(ValueError, match="expected more than 0"): Limits(**args)

@pytest.mark.parametrize("name,shown", [("a.mp4", "a.mp4"), ("../../x.mp4", "x.mp4"), ("C:\\f\\x.mp4", "x.mp4"), ("a\nb", "a_b"), ("", ""), ("a$b$", "a_b_")])
def test_names(name, shown): assert shown_name(name)==shown

def test_hosts_and_origins():
    assert host_ok("[::1]:80", "::1") and not host_ok("[::2]", "::1") and host_ok("10.0.0.1", "0.0.0.0") and not host_ok("name", "0.0.0.0")
    for bad in ("[", "a b", "@127.0.0.1:8000@evil.example"): assert not host_ok(bad)
    assert origin_ok({"host": "localhost"}) and not origin_ok({"host": "localhost", "origin": "http://localhost.evil"})

def test_a_worker_that_died_between_two_jobs_blames_nobody(network):
    w = Worker(network)
    try:
        os.kill(w.process.pid, 9); w.process.wait(10)
        assert "prediction" in w.ask(dict(sample="waving"))
        moved = network.with_suffix(".away"); network.rename(moved)
        try:
            os.kill(w.process.pid, 9); w.process.wait(10)
            for _ in range(2): assert "could not be opened again" in w.ask(dict(sample="waving"))["error"]
        finally: moved.rename(network)
        assert "prediction" in w.ask(dict(sample="waving")), "and is tried again"
        w.end()
        assert w.ask(dict(sample="waving"))["error"]=="the page was closed"
    finally: w.stop()

def test_an_open_upload_does_not_hold_the_page(network):
    "Somebody who never finishes an upload, or hangs up, costs no trace and no end."
    p = subprocess.Popen([sys.executable, "-m", "pcan.cli", "demo", "--checkpoint", str(network), "--port", "0"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        port = int(p.stdout.readline().split()[0].rsplit(":", 1)[1].strip("/"))
        head = (f"POST /look HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 99999\r\n\r\n"
                '--x\r\nContent-Disposition: form-data; name="film"; filename="a.mp4"\r\n\r\nabc').encode()
        with socket.create_connection(("127.0.0.1", port)) as gone: gone.sendall(head)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head); time.sleep(.5)
            began = time.time()
            os.killpg(p.pid, signal.SIGINT)
            out, err = p.communicate(timeout=30)
            assert time.time()-began<20 and not err and p.returncode==0, err
    finally: p.kill(); p.wait(20)

def test_a_large_picture_behind_a_small_one(tmp_path, network):
    "A file with two videos is as large as its larger one."
    import av
    with av.open(str(tmp_path/"two.mp4"), "w") as f:
        streams = [f.add_stream("libx264", rate=25) for _ in range(2)]
        for s,(w,h) in zip(streams, ((64,48), (640,480))): s.width, s.height, s.pix_fmt = w, h, "yuv420p"
        for s in streams:
            for _ in range(3): f.mux(s.encode(av.VideoFrame.from_ndarray(np.zeros((s.height,s.width,3), np.uint8), format="rgb24")))
            f.mux(s.encode())
    assert "640 × 480" in look(open_checkpoint(network), dict(film=str(tmp_path/"two.mp4"), name="two.mp4"), Limits(pixels=1e4))["error"]

def test_half_a_character_is_shown(worker):
    assert "?x" in page(worker.about, Limits(), error="\ud800x")
