"""What openai sends its requests with, and what of an answer is taken. Imported where a server is asked: openai alone
takes a second of a program's start."""

import contextlib
import time

from ouro.evaluate.endpoint import BROKEN_OFF, RETRIES, NotAsked, Server, finish_of, text_of
from ouro.files import UserError

import httpx2
import openai

TIMEOUT = openai.Timeout(300, connect=10)  # seconds without a byte
LONGEST = 1800  # seconds until an answer is whole: some servers send spaces while a request waits
LARGEST = 16 << 20  # bytes of an answer, unpacked


class BrokenOff(httpx2.DecodingError):
    """A reply of which the server says that it is not whole."""


def connect(server: Server) -> openai.OpenAI:
    """A client of openai's for a server.
    Raises UserError: a proxy or certificate file of the environment cannot be used."""
    try:
        key = server.key or "none"  # openai refuses an empty key; HttpClient does not send this one
        headers = {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        how = {"max_retries": RETRIES, "default_headers": headers, "http_client": HttpClient(server)}
        return openai.OpenAI(base_url=server.url, api_key=key, **how)
    except (ValueError, ImportError, OSError):  # their messages may hold a proxy's password
        what = "a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) or certificate file (SSL_CERT_FILE) of the environment"
        raise UserError(f"{server.kind}: {what} cannot be used") from None


class HttpClient(openai.DefaultHttpxClient):
    """Says what was wrong with an answer, reads no more of one than it may have, stops where waiting cannot help."""

    def __init__(self, server: Server):
        limits = httpx2.Limits(max_connections=server.threads)
        super().__init__(timeout=TIMEOUT, limits=limits, follow_redirects=False)
        self.server = server

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        """One attempt. openai waits and makes another after an httpx2.RequestError and after some statuses."""
        server, problem = self.server, None
        if server.stop.is_set():
            raise NotAsked
        if not server.key:
            request.headers.pop("Authorization", None)
        request.headers["Accept-Encoding"] = "gzip"  # what others unpack to is not known before it is in memory
        try:
            response = self._read(request, options)
            if response.is_success:  # gateways report an overload with status 200, too
                self._check(response)
            elif "insufficient_quota" in response.text:
                raise server.error(server.said(response))
            if response.status_code == 501:  # the server does not know such requests: openai is to give up
                response.headers["x-should-retry"] = "false"
            elif response.status_code in (408, 409, 429) or response.status_code >= 500:
                problem = server.said(response)
            return response
        except httpx2.RequestError as error:
            problem = repr(error)
            raise
        finally:
            if problem:
                attempt = int(request.headers["x-stainless-retry-count"]) + 1
                server.tell(f"{server.kind}: {problem}; attempt {attempt} of {RETRIES + 1}")

    def _read(self, request: httpx2.Request, options: dict) -> httpx2.Response:
        """A whole answer. Raises UserError where it is larger, or takes longer, than any that was asked for."""
        last, content = time.monotonic() + LONGEST, bytearray()
        with contextlib.closing(super().send(request, **options | {"stream": True})) as response:
            packed = response.headers.get("Content-Encoding", "identity").lower()
            if packed not in ("gzip", "identity"):
                raise self.server.error(f"its answer is packed by {packed[:40]}, which was not asked for")
            for part in response.iter_bytes():
                content += part
                if len(content) >= LARGEST:
                    raise self.server.error(f"its answer is larger than {LARGEST >> 20} MB")
                if time.monotonic() > last:
                    raise self.server.error(f"its answer is not whole after {LONGEST} seconds")
        about_the_body = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in about_the_body]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=request)

    def _check(self, response: httpx2.Response) -> None:
        """Raises httpx2.DecodingError, after which openai asks again: an answer is no reply, nor a list of models."""
        finish = ""
        try:
            answer = response.json()
            if response.request.url.path.endswith("/models"):
                whole = all(isinstance(model["id"], str) for model in answer["data"])
            else:
                choice = answer["choices"][0]
                message, finish = {"reasoning_content": None} | choice["message"], finish_of(choice)
                text = message["content" if "content" in message else "reasoning_content"]
                whole = isinstance(text_of(text), str)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise httpx2.DecodingError(f"not the JSON that was asked for, {self.server.said(response)}")
        if finish in BROKEN_OFF:
            raise BrokenOff(f"the reply was broken off (finish_reason {finish})")
