"""A Hugging Face hub of three routes on this machine: may I read a data set, what does it hold, give me a file (or the rest of one)."""
import hashlib, json, re, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Hub:
    "What the hub holds and how it behaves; `requests` is what it was asked."
    def __init__(self, repos, token="hf_granted"):
        self.repos, self.token, self.commit = repos, token, "c0ffee" + "0"*34   # repos: {"owner/name": {path: bytes}}
        self.known = {token, "hf_stranger"}  # the second has an account, but no access
        self.cut = {}                        # path -> after how many bytes the connection breaks, once
        self.down = False                    # answer 503 to all transfers
        self.requests = []                   # (path, Range or None, Authorization or None)

    def refusal(self, authorization):
        token = (authorization or "").removeprefix("Bearer ")
        if not token: return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset is restricted."}
        if token not in self.known: return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if token!=self.token: return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."}

    def listing(self, repo):
        def row(path, b):
            git = hashlib.sha1(b"blob %d\0" % len(b) + b).hexdigest()
            large = dict(lfs=dict(sha256=hashlib.sha256(b).hexdigest(), size=len(b), pointerSize=130)) if path.endswith((".zip", ".pkl")) else {}
            return dict(rfilename=path, size=len(b), blobId=git, **large)
        return dict(id=repo, sha=self.commit, siblings=[row(*f) for f in self.repos[repo].items()])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for k,v in ({"Content-Length": len(body)} | headers).items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server.hub, self.path.split("?")[0]
        hub.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if m:=re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path): return self.file(hub, *m.groups())   # a signed address: no token wanted
        m = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(auth-check|revision/[^/]+|resolve/([^/]+)/(.+)))?", path)
        if not m or m[1] not in hub.repos: return self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        is_api, what = path.startswith("/api/"), m[2] or ""
        if (what=="auth-check" or not is_api) and (no:=hub.refusal(self.headers.get("Authorization"))): return self.answer(no[0], **no[1])
        if what=="auth-check": return self.answer(200)
        if is_api:
            if what not in ("", "revision/main", f"revision/{hub.commit}"): return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps(hub.listing(m[1])).encode(), **{"Content-Type": "application/json"})
        if hub.down: return self.answer(503)
        if m[4] not in hub.repos[m[1]]: return self.answer(404, **{"X-Error-Code": "EntryNotFound"})
        self.answer(302, Location=f"http://localhost:{self.server.server_port}/cdn/{m[1]}/{m[4]}", **{"X-Repo-Commit": hub.commit})

    def file(self, hub, repo, path):
        body, start = hub.repos[repo][path], 0
        if r:=self.headers.get("Range"): start = int(re.fullmatch(r"bytes=(\d+)-", r)[1])
        rest = body[start:]
        self.send_response(206 if r else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if r: self.send_header("Content-Range", f"bytes {start}-{len(body)-1}/{len(body)}")
        self.end_headers()
        cut = hub.cut.pop(path, None)
        self.wfile.write(rest[:cut])
        if cut is not None: self.close_connection = True

@contextmanager
def serve(hub): # its address
    "A hub that answers on loopback."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = hub, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown(); server.server_close()
