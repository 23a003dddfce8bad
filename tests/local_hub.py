"""A small Hugging Face Hub on 127.0.0.1, which serves local folders as model and dataset repositories over HTTP.

    hub = LocalHub()
    hub.add("ByteDance/Ouro-2.6B", folder, commit="1ed0...")                     # found at this commit, at no branch
    hub.add("datasets/airesearch/WangchanThaiInstruct", other, branch="main")    # at a made-up commit and at main
    online, offline = Scripts(hub, folder), Scripts(hub, folder, offline=True)   # a copy of the project, one HF_HOME
    code, out, err = online.play("ouro/data/fetch.py", "--only", "model")
    hub.requests                                                                 # what was asked, and how it answered

It follows the real Hub in what huggingface_hub 0.36 reads: large files are redirected to a storage address, with
X-Linked-* headers and a sha256 as ETag; small ones come at once, with a sha1; every answer about a repository names its
commit; `?blobs=true` adds sizes and hashes to the list of files; a 404 says in X-Error-Code whether the repository,
revision or file is missing. To `writers` it lets models be pushed, as the client does it: create, preupload, LFS,
commit. No Range, no Xet, and no folder is listed by itself (tree): transformers asks for one, of additional chat
templates, which no model here has.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import training_sets
import yaml

ROOT = Path(__file__).resolve().parent.parent
LARGE = (".safetensors", ".parquet", ".gz", ".bin", ".pt")  # kept in LFS on the Hub, whatever their size
URL = re.compile(
    r"(/api)?/(models/)?(?P<repo>(datasets/)?[^/]+/[^/]+)"
    r"(/(?P<call>resolve|revision|tree)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)
MISSING = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id: {revision}",
    "EntryNotFound": "Entry not found",
}


class Request(NamedTuple):
    """One request about a repository. `call` is resolve, storage (the content of a large file), tree, revision, or
    info: the main branch's."""

    method: str
    repo: str
    call: str
    revision: str
    path: str
    status: int


class LocalHub:
    """The server, running until `close`. All but `port` and `url` may be changed meanwhile."""

    def __init__(self):
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}  # name -> revision -> commit, folder
        self.requests: list[Request] = []
        self.tokens: set[str] = set()  # all that were sent
        self.storage: dict[str, tuple[str, str, str, Path]] = {}  # sha256 -> repository, commit, path, large file
        self.writers: dict[str, tuple[str, Path]] = {}  # token -> its user, and where what is pushed is kept
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> uploaded content, in a commit or not yet
        self.cut_uploads = False  # connections end in the middle of a large file
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

    def add(self, repo: str, folder: Path, commit: str | None = None, branch: str | None = None) -> str:
        """Serves `folder` as this commit of the repository, and as its branch; other revisions stay as they are."""
        commit = commit or hashlib.sha1(bytes(folder)).hexdigest()
        names = [name for name in (commit, branch) if name]
        self.repositories.setdefault(repo, {}).update(dict.fromkeys(names, (commit, folder)))
        return commit

    def contents(self) -> list[str]:
        """The files whose content was asked for."""
        return [f"{r.repo}/{r.path}" for r in self.requests
                if r.method == "GET" and r.call in ("resolve", "storage") and r.status == 200]  # fmt: skip


@lru_cache
def hashes(file: Path, changed: int) -> tuple[str, str]:
    """Of git and of LFS; `changed` is the file's time, so that a file that was written again is read again."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def sibling(path: str, file: Path, blobs: bool) -> dict:
    """A file as a repository's info lists it."""
    if not blobs:
        return {"rfilename": path}
    size, (sha1, sha256) = file.stat().st_size, hashes(file, file.stat().st_mtime_ns)
    lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 134}} if file.suffix in LARGE else {}
    return {"rfilename": path, "size": size, "blobId": sha1} | lfs


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        blobs = parse_qs(url.query).get("blobs", [""])[0].lower() in ("true", "1")
        self.hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if url.path.startswith("/storage/"):  # where large files are redirected to, outside of any repository
            repo, revision, path, file = self.hub.storage[url.path.removeprefix("/storage/")]
            call, answer = "storage", (200, file.read_bytes(), {})
        else:
            match = URL.fullmatch(url.path)
            asked = match.groupdict() if match else {}
            repo, call = asked.get("repo", url.path), asked.get("call") or "info"
            revision, path = unquote(asked.get("revision") or "main"), unquote(asked.get("path") or "")
            answer = self.answer(repo, call, revision, path, blobs)
        self.hub.requests.append(Request(self.command, repo, call, revision, path, answer[0]))
        self.send(*answer)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """What a push asks: for a repository, what must go to LFS and is not there, and for a commit."""
        body, path = self.rfile.read(int(self.headers["Content-Length"] or 0)), urlsplit(self.path).path
        user, root = self.writer()
        if not user:
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), user, root)
        repo = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?/", path)[1]
        commit, folder = self.hub.repositories[repo]["main"]
        if "/preupload/" in path:
            files = [{"path": file["path"], "shouldIgnore": False, "oid": self.oid(folder / file["path"]),
                      "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.reply(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(body)["objects"]]
            for item in objects:
                if item["oid"] not in self.hub.large:
                    item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        new = {}
        for line in body.splitlines():
            kind, value = json.loads(line).values()
            if kind == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                new[value["path"]] = self.hub.large[value["oid"]]
        place = shutil.copytree(folder, folder.with_name(str(int(folder.name) + 1)))
        commit = self.hub.add(repo, write(place, new), branch="main")
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def create(self, asked: dict, user: str, root: Path) -> None:
        repo = f"{asked['organization'] or user}/{asked['name']}"
        if not repo.startswith(f"{user}/"):
            return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        if repo in self.hub.repositories:
            return self.reply(409, {"url": f"{self.hub.url}/{repo}", "error": "You already created this model repo"})
        self.hub.private[repo] = bool(asked.get("private"))
        self.hub.add(repo, write(root / repo / "0", {".gitattributes": "*.safetensors filter=lfs"}), branch="main")
        self.reply(200, {"url": f"{self.hub.url}/{repo}"})

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.hub.cut_uploads:
            self.rfile.read(size // 2)
            self.connection.close()
            return
        self.hub.large[self.path.removeprefix("/lfs/")] = self.rfile.read(size)
        self.reply(200, {})

    def writer(self) -> tuple[str | None, Path | None]:
        return self.hub.writers.get(self.headers.get("Authorization", "").removeprefix("Bearer "), (None, None))

    def oid(self, file: Path) -> str | None:
        return hashes(file, file.stat().st_mtime_ns)[file.suffix in LARGE] if file.exists() else None

    def reply(self, status: int, answer: dict) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def answer(self, repo: str, call: str, revision: str, path: str, blobs: bool) -> tuple[int, bytes, dict]:
        revisions = self.hub.repositories.get(repo)
        if not revisions or revision not in revisions:
            return self.missing("RevisionNotFound" if revisions else "RepoNotFound", revision)
        commit, root = revisions[revision]
        headers = {"X-Repo-Commit": commit}
        files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
        if call in ("revision", "info"):
            siblings = [sibling(name, file, blobs) for name, file in files.items()]
            result = {"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": siblings,
                      "private": self.hub.private.get(repo, False)}  # fmt: skip
            return 200, json.dumps(result).encode(), headers
        if path not in files:
            return self.missing("EntryNotFound", revision, headers)
        file = files[path]
        sha1, sha256 = hashes(file, file.stat().st_mtime_ns)
        if file.suffix not in LARGE:
            return 200, file.read_bytes(), headers | {"ETag": f'"{sha1}"'}
        self.hub.storage[sha256] = repo, commit, path, file
        headers |= {"Location": f"{self.hub.url}/storage/{sha256}", "X-Linked-ETag": f'"{sha256}"'}
        return 302, b"", headers | {"X-Linked-Size": str(file.stat().st_size)}

    def missing(self, what: str, revision: str, headers: dict | None = None) -> tuple[int, bytes, dict]:
        text = MISSING[what].format(revision=revision)
        return 404, json.dumps({"error": text}).encode(), (headers or {}) | {
            "X-Error-Code": what, "X-Error-Message": text, "Content-Type": "application/json"}  # fmt: skip

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing on stderr: the tests read `requests`."""


# The project's scripts as processes that use the Hub. Importing torch takes each of them seconds, so they are forked
# from one that has done it: the libraries read the Hub's address and HF_HUB_OFFLINE when they are imported.
PARENT = """
import gc, json, os, runpy, sys, time, traceback
import data_config, ouro.evaluate.benchmarks
from ouro.data.report import word_tokenize
word_tokenize("ก")  # reads its dictionary
slept = []
time.sleep = slept.append  # huggingface_hub waits long for a server that is not there; the test counts it
gc.freeze()
for line in sys.stdin:
    sys.argv, environment, out, err, seconds = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate((os.devnull, out, err)):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin = open(0)
        os.environ.update(environment)
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        print(sum(slept), file=open(seconds, "w"), flush=True)
        os._exit(code)  # freeing all that was imported would take a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment(hub: LocalHub, home: Path, offline: bool = False) -> dict[str, str]:
    """Of a process that uses this Hub in place of the real one, and no other settings than the tests'."""
    names = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names) and "PROXY" not in k.upper()}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "60"}  # seconds that an answer may take
    return kept | dict.fromkeys(("CONFIG", "REPORT_TO", "TOTAL_UT_STEPS", "OUTPUT_DIR", "RESULTS_DIR"), "")


def copy_project(folder: Path) -> Path:
    """The scripts with their configs and sample, so that a test may edit configs/ as a user would."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for name in ("configs", "ouro", "sample", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests/smoke.yaml", folder / "tests")
    return folder


class Scripts:
    """A process in folder/project, a copy of the project, that runs its scripts, each in a process of its own."""

    def __init__(self, hub: LocalHub, folder: Path, offline: bool = False):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            env=environment(hub, folder / "cache", offline),
            cwd=folder / "project",
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def play(self, *command: object, **environment: str) -> tuple[str, str, str]:
        """Runs a command: its exit code, stdout and stderr; `slept` are the seconds that it would have slept."""
        logs = [self.folder / f"{self.process.pid}-{name}" for name in ("stdout", "stderr", "slept")]
        for log in logs:
            log.write_bytes(b"")
        line = [[str(part) for part in command], environment, *map(str, logs)]
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        out, err, slept = (log.read_text(encoding="utf-8") for log in logs)
        self.slept = float(slept or 0)
        return code, out, err

    def output(self, *command: object, **environment: str) -> str:
        """What a command that must succeed prints."""
        code, out, err = self.play(*command, **environment)
        assert code == "0", (out, err)
        return out

    def refusal(self, *command: object, **environment: str) -> str:
        """The message, in one line, of a command that must end with one: exit code 2, no traceback."""
        code, out, err = self.play(*command, **environment)
        assert "Traceback" not in err, err
        assert (code, err.count("error: ")) == ("2", 1), (code, out, err)
        return " ".join(err[err.index("error: ") :].split())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def write(folder: Path, files: dict[str, bytes | str | list]) -> Path:
    """Files as `write` of training_sets.py makes them, in a folder that may be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        training_sets.write(folder / name, content)
    return folder


def shards(name: str, rows: list[dict], count: int) -> dict[str, list[dict]]:
    """The rows of `count` Parquet files, named as the Hub's are."""
    edges = [len(rows) * i // count for i in range(count + 1)]
    parts = [rows[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return {f"{name}-{i:05d}-of-{count:05d}.parquet": part for i, part in enumerate(parts)}
