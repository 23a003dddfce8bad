"""Replies and judgements that are paid for once: kept in a file, asked for where it lacks them."""

import fcntl
import json
import os
import threading
from pathlib import Path

from ouro.data.thoughts import answer_of, usual_beginning, with_beginning
from ouro.evaluate.benchmarks import digest
from ouro.evaluate.endpoint import Chat, Messages, Reply
from ouro.files import Progress, UserError, lock, one_line, regular, sync_folder


class Cache:
    """Texts by key, in a file of JSON lines; each is on the disk when `add` returns.

    One process at a time: another waits, and then finds what the first one has paid for."""

    def __init__(self, path: Path):
        self.path, self.texts, self.lock = Path(path), {}, threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(regular(self.path), "a+b", buffering=0)  # noqa: SIM115
        try:
            if not lock(self.file):
                print(f"waiting for another process that is at work on {one_line(self.path)}", flush=True)
                fcntl.lockf(self.file, fcntl.LOCK_EX)
        except OSError:
            print(f"warning: no locks on this file system: let one process at a time work on {one_line(self.path)}")
        sync_folder(self.path.parent)
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        if lines[-1]:  # torn when its process was killed
            self.file.truncate(os.fstat(self.file.fileno()).st_size - len(lines[-1]))
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                self.texts[entry["key"]] = Reply(entry["text"], entry.get("end", ""))
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{self.path}, line {number} is damaged: delete the line, or the file") from None

    def add(self, key: str, text: str) -> None:
        reply = Reply(text)
        entry = {"key": key, "text": reply} | ({"end": reply.end} if reply.end else {})
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        with self.lock:
            descriptor = self.file.fileno()
            end = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, end)
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            self.texts[key] = reply

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def fill(cache: Cache, jobs: dict[str, Messages], chat: Chat, what: str) -> None:
    """Puts into the cache what it lacks of `jobs`, each text as soon as it is there.
    Raises UserError: the server's or the disk's errors; what came before is in the cache."""
    missing = {key: messages for key, messages in jobs.items() if key not in cache.texts}
    if not missing:
        return
    keys = list(missing)
    try:
        with Progress(what, len(missing), "replies") as progress:

            def done(number: int, text: str) -> None:
                cache.add(keys[number], text)
                progress.update()

            chat(list(missing.values()), done)
    except UserError as error:
        kept = sum(key in cache.texts for key in jobs)
        goes_on = f"{kept} of {len(jobs)} are saved in {cache.path}: the same command goes on from there"
        raise UserError(*error.args, *([goes_on] if kept else [])) from None


def answer(conversations: list[Messages], chat: Chat, saved: Cache, what: str, who: str) -> list[Reply]:
    """A model's next turn in each conversation; `who` names all else that the replies depend on. Errors as `fill`."""
    keys = [digest(["reply", who, messages]) for messages in conversations]
    fill(saved, dict(zip(keys, conversations, strict=True)), chat, what)
    replies = [saved.texts[key] for key in keys]
    begun = usual_beginning(replies, [not reply.end for reply in replies])
    return [Reply(with_beginning(text, begun), text.end) if text else text for text in replies]


def count_ends(replies: list[Reply]) -> dict[str, int]:
    """How many replies were cut at their limit, hold a thought alone, or were refused by the server."""
    cut, refused = (sum(reply.end.startswith(end) for reply in replies) for end in ("cut", "refused"))
    return {"cut": cut, "unfinished_thoughts": sum(answer_of(r) is None for r in replies), "refused": refused}
