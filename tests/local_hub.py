"""A small Hugging Face Hub on 127.0.0.1, which serves local folders as model and dataset repositories over HTTP.

    hub = LocalHub()
    hub.add("ByteDance/Ouro-2.6B", folder, commit="1ed0...")                     # found at this commit, at no branch
    hub.add("datasets/airesearch/WangchanThaiInstruct", other, branch="main")    # at a made-up commit and at main
    subprocess.run(..., env={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", ...})
    hub.requests                                                                 # what was asked, and how it answered

It follows the real Hub in what huggingface_hub 0.36 reads: large files are redirected to a storage address, with
X-Linked-* headers and a sha256 as ETag; small ones come at once, with a sha1; every answer about a repository names
its commit; a 404 says in X-Error-Code whether repository, revision or file is missing. Read-only; no Range, no Xet.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gz")  # kept in LFS on the Hub, whatever their size
URL = re.compile(
    r"(/api)?/(models/)?(?P<repo>(datasets/)?[^/]+/[^/]+)"
    r"(/(?P<call>resolve|revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)


class Request(NamedTuple):
    """One request about a repository. `call` is resolve, tree, paths-info, revision, or info: the main branch's."""

    method: str
    repo: str
    call: str
    revision: str
    path: str
    status: int


class LocalHub:
    """The server, running until `close`. `repositories` and `requests` may be changed meanwhile."""

    def __init__(self):
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}  # name -> revision -> commit, folder
        self.requests: list[Request] = []
        self.storage: dict[str, Path] = {}  # sha256 -> large file
        self.port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """From now on connections are refused, until `open` is called again."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, folder: Path, commit: str | None = None, branch: str | None = None) -> None:
        """Serves `folder` as this commit of the repository, and as its branch; other revisions stay as they are."""
        commit = commit or hashlib.sha1(bytes(folder)).hexdigest()
        names = [name for name in (commit, branch) if name]
        self.repositories.setdefault(repo, {}).update(dict.fromkeys(names, (commit, folder)))


def entry(path: str, file: Path) -> dict:
    """A file or folder as the tree and paths-info endpoints describe it."""
    if file.is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    content = file.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    found = {"type": "file", "path": path, "size": len(content), "oid": sha1}
    return found | ({"lfs": lfs} if file.suffix in LARGE else {})


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode() or url.query)
        if url.path.startswith("/storage/"):  # where large files are redirected to, outside of any repository
            return self.send(200, self.hub.storage[url.path.removeprefix("/storage/")].read_bytes(), {})
        match = URL.fullmatch(url.path)
        asked = match.groupdict() if match else {}
        repo, call = asked.get("repo", url.path), asked.get("call") or "info"
        revision, path = unquote(asked.get("revision") or "main"), unquote(asked.get("path") or "")
        answer = self.answer(repo, call, revision, path, form)
        self.hub.requests.append(Request(self.command, repo, call, revision, path, answer[0]))
        self.send(*answer)

    do_HEAD = do_POST = do_GET

    def answer(self, repo: str, call: str, revision: str, path: str, form: dict) -> tuple[int, bytes, dict]:
        revisions = self.hub.repositories.get(repo)
        if not revisions or revision not in revisions:
            return 404, b"", {"X-Error-Code": "RevisionNotFound" if revisions else "RepoNotFound"}
        commit, root = revisions[revision]
        headers = {"X-Repo-Commit": commit}
        files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*"))}
        if call in ("revision", "info"):
            siblings = [{"rfilename": name} for name, file in files.items() if file.is_file()]
            result = {"id": repo.removeprefix("datasets/"), "sha": commit, "private": False, "siblings": siblings}
        elif call == "paths-info":
            result = [entry(name, files[name]) for name in form["paths"] if name in files]
        elif path and path not in files:
            return 404, b"", headers | {"X-Error-Code": "EntryNotFound"}
        elif call == "tree":
            below = [name for name in files if name.startswith(f"{path}/" if path else "")]
            direct = [name for name in below if files[name].parent == root / path]
            result = [entry(name, files[name]) for name in (below if form["recursive"] == ["True"] else direct)]
        else:
            found = entry(path, files[path])
            if "lfs" not in found:
                return 200, files[path].read_bytes(), headers | {"ETag": f'"{found["oid"]}"'}
            sha256 = found["lfs"]["oid"]
            self.hub.storage[sha256] = files[path]
            headers |= {"Location": f"{self.hub.url}/storage/{sha256}", "X-Linked-ETag": f'"{sha256}"'}
            return 302, b"", headers | {"X-Linked-Size": str(found["size"])}
        return 200, json.dumps(result).encode(), headers

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing on stderr: the tests read `requests`."""
