"""Builds sample/ouro-nano: a small looped model of Ouro's architecture, pre-trained on freely licensed English only.

    apt-get install bible-kjv bible-kjv-text wordnet-base sword-text-web diatheke dict-jargon   # the text, on Debian 12
    python sample/pretrain.py text --text cache/nano.jsonl.gz                          # documents, 2 % of them held out
    python sample/pretrain.py train --text cache/nano.jsonl.gz --out sample/ouro-nano  # tokenizer and weights, on a GPU
    python sample/pretrain.py widen --text cache/nano.jsonl.gz --out sample/ouro-nano  # other scripts' bytes, on a CPU

Seeded, with deterministic kernels. The objective is that of the paper's first stage (arXiv 2510.25741): for every token
the expected cross-entropy over the loops it may leave at, minus beta times the entropy of the exit distribution. Rows
of 512 tokens are cut from the stream of shuffled documents, which see each other.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts; sums in a fixed order
os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # read at import; kernels chosen by rule, not by their measured speed

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ouro.files import UserError, call, write_atomic
from ouro.model.loading import load_ouro
from ouro.model.modeling_ouro import OuroConfig, OuroForCausalLM, exit_distribution

from build import train_tokenizer

PASSAGE = 1400  # characters of a passage, about 350 tokens
VOCABULARY = 8192
ROW, ROWS = 512, 128  # tokens of a row, rows of a step
STEPS, WARMUP, RATE = 1800, 200, 2e-3
BETAS = 0.1, 0.05  # weight of the exit distribution's entropy in the first and the second half of the steps
WIDEN_STEPS, WIDEN_RATE = 160, 5e-4  # second stage
WIDEN_ROWS = 6, 2  # English, in other letters
RESPELLED = 160  # characters of a passage in other letters: 480 bytes, as many tokens
HELD_OUT = 50  # one in so many groups of documents
PARTS = {"noun": "a noun", "verb": "a verb", "adj": "an adjective", "adv": "an adverb"}
KJV = r"([1-3]?[A-Z][A-Za-z]*)(\d+):\d+ (.*)"  # as `bible` prints a verse: 1Sm3:4 And the LORD …
WEB = r"\s*((?:I+ )?[A-Z][A-Za-z ]+) (\d+):\d+: (.*)"  # as diatheke does: I Samuel 3:4: Yahweh …
Row = dict  # "source", "group" (held out together), and "text" or "messages"


# ---- text ----


def strings(row: Row) -> list[str]:
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; install the packages that {__file__} names first") from None


def straight(text: str) -> str:
    return " ".join(text.translate(str.maketrans("“”‘’´`", "\"\"''''")).split())


def passages(pieces: list[str], joint: str) -> Iterator[str]:
    """Neighbouring pieces joined until a passage is long enough; a longer piece stays whole."""
    kept = []
    for piece in pieces:
        kept.append(piece)
        if sum(map(len, kept)) >= PASSAGE:
            yield joint.join(kept)
            kept = []
    if kept:
        yield joint.join(kept)


def bible(source: str, text: str, reference: str) -> Iterator[Row]:
    """Passages of one chapter each. A chapter is held out in every translation or in none."""
    books, chapters = [], {}
    for line in text.splitlines():
        if found := re.match(reference, line):
            book, chapter, verse = found.groups()
            if book not in books:
                books.append(book)
            chapters.setdefault((books.index(book), int(chapter)), []).append(straight(verse))
    if len(books) < 66:
        raise UserError(f"{source}: found {len(books)} books, a Bible has 66 or, with the Apocrypha in between, more")
    for (book, chapter), verses in chapters.items():
        book = book if book < 39 else book - len(books)  # the New Testament counted from the end
        for passage in passages([verse for verse in verses if verse], " "):
            yield {"source": source, "group": f"bible {book} {chapter}", "text": passage}


def wordnet(folder: Path) -> Iterator[Row]:
    """Definitions and examples, neighbours (which are related) together; every fifth group as questions and answers."""
    for part, name in PARTS.items():
        lines, chats = [], {}
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            words = [re.sub(r"\(.*", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            meaning, *examples = re.split(r'; (?=")', straight(gloss).rstrip(";"))
            said = f" For example: {'; '.join(examples)}." if examples else ""
            also = f" or {words[1]}" if len(words) > 1 else ""
            lines.append(f"{words[0]}{also}, {name}: {meaning}.{said}")
            chats[lines[-1]] = (words[0], f"{meaning[:1].upper()}{meaning[1:]}.{said}")
        for index, passage in enumerate(passages(lines, "\n")):
            row = {"source": "wordnet", "group": f"wordnet {part} {index}", "text": passage}
            if index % 5 == 4:
                row = row | {"source": "chat", "messages": []}
                for line in row.pop("text").split("\n"):
                    word, answer = chats[line]
                    row["messages"] += [{"role": "user", "content": f'What does "{word}" mean?'}]
                    row["messages"] += [{"role": "assistant", "content": answer}]
            yield row


def jargon(text: str) -> Iterator[Row]:
    """The Jargon File's entries without headwords' pronunciation and cross-reference marks."""
    for index, entry in enumerate(re.split(r"\n\n(?=\S)", text)):
        head, *body = re.split(r"\n\n +", entry)
        if head.startswith("00-") or not body:
            continue
        word = straight(head.split("\n")[0])
        paragraphs = [straight(re.sub(r"[{}]", "", paragraph)) for paragraph in body]
        for passage in passages([f"{word}: {paragraphs[0]}", *paragraphs[1:]], "\n"):
            yield {"source": "jargon", "group": f"jargon {index}", "text": passage}


def write_text(path: Path) -> None:
    verses = run("diatheke", "-b", "engWEB2015eb", "-k", "Gen-Rev")
    verses = re.sub(r"<title.*?</title>|<note.*?</note>", "", verses).replace("</w><w", "</w> <w")
    verses = re.sub(r"<[^>]*>", "", verses)
    rows = [
        *bible("kjv", run("bible", "-f", "-l9999", "gen1:1-rev22:21"), KJV),
        *bible("web", verses, WEB),
        *wordnet(Path("/usr/share/wordnet")),
        *jargon(gzip.decompress(Path("/usr/share/dictd/jargon.dict.dz").read_bytes()).decode()),
    ]
    sizes: dict[tuple[str, bool], list[int]] = {}
    for row in rows:
        group = row.pop("group")
        row["held_out"] = int(hashlib.sha256(group.encode()).hexdigest(), 16) % HELD_OUT == 0
        sizes.setdefault((row["source"], row["held_out"]), []).append(sum(map(len, strings(row))))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))
    for (source, held_out), lengths in sorted(sizes.items()):
        part = "held out" if held_out else "training"
        print(f"{source:8} {part} {len(lengths):7,} documents {sum(lengths):11,} characters")


# ---- training ----


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Tensor]:
    """Token ids of each document, after one <|endoftext|>."""
    chat = tokenizer.apply_chat_template
    texts = [row["text"] if "text" in row else chat(row["messages"], tokenize=False) for row in rows]
    return [torch.tensor([0, *ids]) for ids in tokenizer(texts)["input_ids"]]


def batches(documents: list[Tensor], seed: int, rows: int) -> Iterator[Tensor]:
    """(rows, ROW + 1) token ids, endlessly: each epoch in an order of its own; a row ends with the next one's first."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.empty(0, dtype=torch.int64)
    size = rows * ROW
    while True:
        while len(stream) <= size:
            order = torch.randperm(len(documents), generator=generator).tolist()
            stream = torch.cat([stream, *(documents[i] for i in order)])
        yield stream[: size + 1].unfold(0, ROW + 1, ROW)
        stream = stream[size:]


def respelled(text: str, seed: int) -> str:
    """English in the letters of a random Unicode block that is not Thai's, most spaces left out, as in Thai: it has the
    bytes that English lacks, and teaches no other language."""
    draw = random.Random(seed)
    start = draw.choice([block for block in range(0x800, 0xD780, 0x80) if block != 0x0E00])
    letters = draw.sample([chr(code) for code in range(start, start + 0x80)], 26)
    words = text.lower().translate(str.maketrans(string.ascii_lowercase, "".join(letters))).split()
    return "".join(word + " " * (draw.random() < 0.15) for word in words)


def objective(states: tuple[Tensor, ...], gates: Tensor, head: Tensor, targets: Tensor, beta: float):
    """The stage-1 loss, and each loop's mean cross-entropy and exit probability."""
    losses = [F.cross_entropy(F.linear(h, head).flatten(0, 1).float(), targets, reduction="none") for h in states]
    losses = torch.stack(losses)  # (loops, tokens)
    leave = exit_distribution(gates.flatten(1))
    entropy = -(leave * leave.clamp(min=1e-12).log()).sum(0)
    loss = ((leave * losses).sum(0) - beta * entropy).mean()
    return loss, losses.detach().mean(1), leave.detach().mean(1)


@torch.no_grad()
def draw_unseen(model: OuroForCausalLM, documents: list[Tensor]) -> None:
    """Tokens that no document holds (most bytes of other scripts) get rows drawn from the distribution of the others'.
    Training only pushed them away, all in one direction, where an adapter could hardly tell them apart."""
    unseen = torch.cat(documents).bincount(minlength=VOCABULARY) == 0
    generator = torch.Generator().manual_seed(0)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        seen = weight[~unseen].float()
        noise = torch.randn(int(unseen.sum()), weight.shape[1], generator=generator)
        weight[unseen] = (seen.mean(0) + seen.std(0) * noise).to(weight.dtype)


def bits_per_character(folder: Path, rows: list[Row], device: str) -> dict[str, list[float]]:
    """By source: bits a character at each depth, of each document after one <|endoftext|>, in fp32, as it is saved."""
    model = load_ouro(str(folder), dtype=torch.float32, device=device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = sorted((row for row in rows if "text" in row), key=lambda row: len(row["text"]))
    bits: dict[str, Tensor] = {}
    characters: dict[str, int] = {}
    for start in range(0, len(rows), 16):
        here = rows[start : start + 16]
        ids = torch.nn.utils.rnn.pad_sequence(encode(tokenizer, here), batch_first=True, padding_value=-100).to(device)
        with torch.inference_mode():
            logits = model(ids[:, :-1].clamp(min=0), output_loops=True).loop_logits
        losses = [F.cross_entropy(x.transpose(1, 2), ids[:, 1:], reduction="none").double().sum(1) for x in logits]
        for row, bit in zip(here, torch.stack(losses, 1).cpu() / math.log(2), strict=True):
            for source in (row["source"], "all"):
                bits[source] = bits.get(source, 0) + bit
                characters[source] = characters.get(source, 0) + len(row["text"])
    return {source: (bits[source] / characters[source]).tolist() for source in sorted(bits)}


def read(text: Path) -> tuple[list[Row], list[Row]]:
    """The documents to train on, and those held out."""
    try:
        rows = [json.loads(line) for line in gzip.decompress(text.read_bytes()).splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {text}: {error.strerror or error}; `pretrain.py text` writes it") from None
    return [row for row in rows if not row["held_out"]], [row for row in rows if row["held_out"]]


def fit(model: OuroForCausalLM, source: Iterator[Tensor], probe: Tensor, steps: int, warmup: int, peak: float) -> None:
    """AdamW, the rate by cosine from `peak` to a twentieth; `probe`, a batch, is read every hundred steps."""
    device, loss_of = model.device.type, objective
    if device == "cuda":
        model.compile_layers()
        loss_of = torch.compile(objective, dynamic=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )

    def forward(batch: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            states = model.model(batch[:, :-1]).loop_hidden_states
            return loss_of(states, model.gate_logits(states), model.lm_head.weight, batch[:, 1:].flatten(), beta)

    started = time.monotonic()
    for step in range(1, steps + 1):
        rate = peak * min(1, step / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        beta = torch.tensor(BETAS[2 * step > steps], device=device)
        loss, losses, leave = forward(next(source), beta)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == 1:
            with torch.no_grad():
                unseen = forward(probe, beta)[1]
            by_loop = [" ".join(f"{x:.3f}" for x in values.tolist()) for values in (losses, unseen, leave)]
            print(
                f"step {step} loss by loop {by_loop[0]} held out {by_loop[1]} exit {by_loop[2]} norm {norm:.2f} "
                f"{step / (time.monotonic() - started):.2f} steps/s",
                flush=True,
            )


def train(text: Path, out: Path) -> None:
    rows, held_out = read(text)
    tokenizer = train_tokenizer((text for row in rows for text in strings(row)), VOCABULARY)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    documents = encode(tokenizer, rows)
    probe = next(batches(encode(tokenizer, held_out), 0, ROWS))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    config = OuroConfig(
        architectures=["OuroForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        torch_dtype="bfloat16",
    )
    model = OuroForCausalLM(config).to(device)
    tokens = sum(map(len, documents))
    print(
        f"{model.num_parameters():,} parameters, {tokens:,} tokens, {STEPS * ROWS * ROW / tokens:.1f} epochs",
        flush=True,
    )
    fit(model, batches(documents, 1, ROWS), probe, STEPS, WARMUP, RATE)
    model.to("cpu", torch.bfloat16)
    draw_unseen(model, documents)
    model.save_pretrained(out)
    few = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out[::16] if "text" in row)
    write_atomic(out / "heldout.jsonl", few)
    print_bits(out, held_out, device)


def widen(text: Path, out: Path) -> None:
    """Goes on with English, a quarter of it in other letters: to a base that has seen none of Thai's bytes, an adapter
    would teach little else than that they exist."""
    rows, held_out = read(text)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    torch.use_deterministic_algorithms(True)
    model = load_ouro(str(out), dtype=torch.float32)
    passages = [row["text"][:RESPELLED] for row in rows if "text" in row]
    needed = WIDEN_STEPS * WIDEN_ROWS[1]  # a row each
    foreign = encode(tokenizer, [{"text": respelled(passages[i * len(passages) // needed], i)} for i in range(needed)])
    english = batches(encode(tokenizer, rows), 2, WIDEN_ROWS[0])
    others = batches(foreign, 3, WIDEN_ROWS[1])
    source = (torch.cat(pair) for pair in zip(english, others, strict=True))
    probe = next(batches(encode(tokenizer, held_out), 0, sum(WIDEN_ROWS)))
    fit(model, source, probe, WIDEN_STEPS, WIDEN_STEPS // 10, WIDEN_RATE)
    model.to(torch.bfloat16).save_pretrained(out)
    print_bits(out, held_out, "cpu")


def print_bits(out: Path, held_out: list[Row], device: str) -> None:
    torch.use_deterministic_algorithms(False)
    for name, values in bits_per_character(out, held_out, device).items():
        print(f"bits per character, {name:8}", " ".join(f"{value:.4f}" for value in values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("text", "train", "widen"):
        commands.add_parser(name).add_argument("--text", type=Path, required=True, help="the documents, .jsonl.gz")
        if name != "text":
            commands.choices[name].add_argument("--out", type=Path, required=True, help="folder of the model")
    options = parser.parse_args()
    if options.command == "text":
        write_text(options.text)
    else:
        {"train": train, "widen": widen}[options.command](options.text, options.out)


if __name__ == "__main__":
    call(main)
