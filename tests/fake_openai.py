"""A server with OpenAI's /v1/chat/completions and /v1/models on this machine: the judge, or a served model."""

import contextlib
import json
import sys
import threading
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import PATIENCE


def rate(messages: list[dict]) -> str:
    """A judgement whose rating depends on all that was sent."""
    text = json.dumps(messages, ensure_ascii=False)
    return f"It is an answer.\n\nRating: [[{1 + zlib.crc32(text.encode()) % 10}]]"


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeServer:
    """OpenAI's /v1/chat/completions. `faults` are used up by the first requests, `answer` makes the others' text, or a
    whole choice; `refuse` names what is wrong with a request's body, if anything."""

    def __init__(self, port: int = 0):
        self.bodies, self.headers, self.faults, self.answer, self.models = [], [], [], rate, ["tiny"]
        self.refuse = lambda body: None
        self.lock, self.quiet = threading.Lock(), threading.Event()
        self.server = Quiet(("127.0.0.1", port), type("Bound", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.quiet.set()
        self.server.shutdown()
        self.server.server_close()

    def keys(self) -> set[str | None]:
        return {headers["Authorization"] for headers in self.headers}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.wfile.write(body)

    def do_GET(self):
        found = self.path == "/v1/models"
        models = [model if isinstance(model, dict) else {"id": model} for model in self.fake.models]
        data = {"object": "list", "data": [{"permission": [{"id": uuid.uuid4().hex}]} | model for model in models]}
        self.send(200 if found else 404, json.dumps(data).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.fake
        with fake.lock:
            fake.bodies.append(body)
            fake.headers.append(self.headers)
            fault = fake.faults.pop(0) if fake.faults else None
        if self.path != "/v1/chat/completions":
            self.send(404, b"no such page")
        elif fault is None and (problem := fake.refuse(body)):
            self.send(400, json.dumps({"error": {"message": problem}}).encode())
        elif fault is None:
            answer = fake.answer(body["messages"])
            choice = answer if isinstance(answer, dict) else {"message": {"role": "assistant", "content": answer}}
            self.send(200, json.dumps({"choices": [{"index": 0} | choice]}).encode())
        elif fault == "says nothing":
            fake.quiet.wait(PATIENCE)
            self.close_connection = True
        elif fault == "drips":
            self.send(200, b" ", length=1000)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while not fake.quiet.wait(0.05):
                    self.wfile.write(b" ")
            self.close_connection = True
        elif fault == "closes the connection":
            self.close_connection = True
        elif fault == "closes it in mid-body":
            self.send(200, b'{"choices": [{"mess', length=1000)
            self.close_connection = True
        else:
            self.send(*fault)


FAULTS = {
    "429": (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "408": (408, b"too late"),
    "409": (409, b"locked"),
    "500": (500, b"oh dear"),
    "503 without a body": (503, b""),
    "nonsense": (200, b"<html>hello</html>"),
    "deep nonsense": (200, b"[" * 100_000),
    "an empty choice list": (200, b'{"choices": []}'),
    "an error that says 200": (200, b'{"error": {"message": "overloaded"}}'),
    "content of another type": (200, b'{"choices": [{"message": {"content": {"a": 1}}}]}'),
    "closes the connection": "closes the connection",
    "closes it in mid-body": "closes it in mid-body",
}
