"""MT-Bench-Thai: the questions, a model's replies to both turns, and a judge's rating of each from 1 to 10.

evaluate.py calls `run_mt_bench`; tools/judge.py rates later what was replied under `--judge none`. The judge is any
server with OpenAI's /chat/completions (endpoint.py says which variables name it); JUDGE_PRICE is its price in dollars
per million tokens in and out.

The protocol is the published one (single-answer grading of FastChat's MT-Bench, English instructions in our own words,
the reference shown wherever there is one, temperature 0) but for this: the last rating counts, and a judgement without
one is asked for once more and then left out, where the published harness takes the first and averages in a -1 for none;
replies are greedy and may have 2,500 characters of Thai, where it samples at temperature 0.2 and cuts at 512 tokens
(about 270 characters); a thought is neither shown to the judge nor to the model in its second turn, so that one that
was cut is rated as the empty answer that it is; what a server refuses to answer or to rate is left out and counted.

Each reply and judgement is appended to a cache file beside the results as soon as it is there: a run that was killed
goes on without paying twice.
"""

import functools
import math
import os
import re
import statistics
from collections import Counter
from itertools import compress
from pathlib import Path

from ouro.data.formats import read_file
from ouro.data.sources import read_benchmark
from ouro.data.thai import CODE, is_thai, normalise, trim
from ouro.data.thoughts import answer_of
from ouro.evaluate.benchmarks import Spell, digest, stripped
from ouro.evaluate.endpoint import AS_PUBLISHED, Chat, Messages, Reply, Server, beginning, find_judge
from ouro.evaluate.replies import Cache, answer, count_ends, fill
from ouro.files import UserError, message, one_line, printable

import numpy as np

TYPICAL_JUDGEMENT = 300  # tokens, for the estimate of the cost
RESAMPLES = 10_000


def load_questions(name: str, spec: dict, local: str | None, limit: int | None, spell: Spell = normalise) -> list[dict]:
    """The benchmark's questions: {id, question_id, category, turns: [2 texts], reference: [2 texts or null] or null}.

    `local` is a folder of the repository's layout, or one JSON or JSONL file. With `limit`, the first of each category.
    Raises UserError: naming file and item: not two turns, no category, a repeated id, a reference of another shape."""
    alone = local is not None and Path(local).is_file()
    rows = read_file(Path(local)) if alone else read_benchmark(name, spec, local, spec["file"])
    questions, seen, taken = [], set(), Counter()
    for place, row in rows:
        number, turns, reference, category = (row.get(x) for x in ("question_id", "turns", "reference", "category"))
        known = trim(str(number))  # 1 and "1" are one id
        rules = {
            "question_id must be a number or text that no other item has":
                type(number) in (int, str) and known and known not in seen,
            "'turns' must be two texts": _two_texts(turns) and all(map(trim, turns)),
            "'reference' must be two texts or null": reference is None or _two_texts(reference, or_null=True),
            "'category' must be a text": isinstance(category, str) and trim(category),
        }  # fmt: skip
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise UserError(f"{place} (question_id {number!r}): {broken[0]}, found {beginning(str(row))}")
        seen.add(known)
        category = trim(category)
        taken[category] += 1
        if limit is not None and taken[category] > limit:
            continue
        reference = [trim(spell(text or "")) or None for text in reference or ()]
        questions.append(
            {"id": one_line(f"{name}-{known}"), "question_id": number, "category": one_line(category),
             "turns": [trim(spell(turn)) for turn in turns],
             "reference": reference if any(reference) else None} | stripped(turns)
        )  # fmt: skip
    if not questions:
        raise UserError(f"{local or spec['hub_id']}, {spec['file']}: no questions in it")
    return questions


def _two_texts(value: object, or_null: bool = False) -> bool:
    kinds = str | None if or_null else str
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, kinds) for text in value)


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


INSTRUCTION = """\
Act as an impartial judge of {what} that an AI assistant gave to {whom}. Weigh how helpful, relevant, accurate, \
deep, creative and detailed the answer is.{extra} Begin with a short explanation of your verdict, and be as objective \
as possible. After the explanation, rate the answer on a scale from 1 to 10, in exactly this format: "[[rating]]", for \
example: "Rating: [[5]]"."""
REFERENCE = " You are also given a reference answer. Compare the two, and find and correct the assistant's mistakes."
SECOND = " Rate the assistant's answer to the second question only."
AGAIN = 'That has no rating that can be read. Give it alone, as one number from 1 to 10, like this: "Rating: [[5]]".'


def judge_prompt(question: dict, replies: list[str], turn: int) -> Messages:
    """What the judge is sent about turn 0 or 1; about the second, it sees both."""
    reference = question["reference"] and question["reference"][turn] and question["reference"]
    extra = REFERENCE * bool(reference) + SECOND * turn
    if turn == 0:
        text = INSTRUCTION.format(what="the answer", whom="the user's question below", extra=extra)
        shown = ({"Reference Answer": reference[0]} if reference else {}) | {"Assistant's Answer": replies[0]}
        parts = [text, f"[Question]\n{question['turns'][0]}"]
        parts += [f"[The Start of {title}]\n{text}\n[The End of {title}]" for title, text in shown.items()]
        return [{"role": "system", "content": "You are a helpful assistant."}, _user("\n\n".join(parts))]
    system = INSTRUCTION.format(what="the answers", whom="the user's questions", extra=extra)
    parts = [_conversation("Assistant's Conversation with User", "Assistant", question["turns"], replies)]
    if reference:
        parts.insert(0, _conversation("Reference Answer", "Reference answer", question["turns"], reference))
    return [{"role": "system", "content": system}, _user("\n\n\n".join(parts))]


def _conversation(title: str, speaker: str, turns: list[str], answers: list[str | None]) -> str:
    pairs = zip(turns, answers, strict=True)
    text = "\n\n".join(f"### User:\n{turn}\n\n### {speaker}:\n{answer or ''}" for turn, answer in pairs)
    return f"<|The Start of {title}|>\n\n{text}\n\n<|The End of {title}|>"


NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
SCALE = re.compile(r"\[\[[01]\]\] ?(?:to|[-–]|ถึง) ?\[\[10\]\]|(?:/|\bof\b|จาก|เต็ม) ?\[\[10\]\]", re.IGNORECASE)
LINE = re.compile(  # that begins with "Rating:"
    r"^[^\w\n]*(?:(?:final|overall|my)\s+)?(?:rating|score|คะแนน)(?: *\([^()\n]*\))?[^\w\n\[]*:"
    rf"[^\w\[]*(?:\[\[{NUMBER}\]\]|\[{NUMBER}\])(?!\()",
    re.IGNORECASE | re.MULTILINE,
)
NAMED = re.compile(  # behind a word for it, before one, or with a line to itself
    rf"(?:\b(?:rat(?:e|ing)|scor(?:e|ing)|give)\b|คะแนน)[^\[\]\d\n]{{0,40}}\[\[{NUMBER}\]\](?!\()"
    rf"|\[\[{NUMBER}\]\]\s*คะแนน|^[^\w\n]*\[\[{NUMBER}\]\](?:\s*/\s*10)?[^\w\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
ANY = re.compile(rf"(?<![A-Za-z0-9_(\[,=])\[\[{NUMBER}\]\](?!\()")  # but an index, an array, or a link
SINGLE = re.compile(rf"\brating\W*:\W*?\[{NUMBER}\]", re.IGNORECASE)
IN_QUOTES = re.compile(rf"[\"'“‘`*]*rating\W*\[\[{NUMBER}\]\]\W*", re.IGNORECASE)
INDENTED = re.compile(r"(?:\A|(?<=\n))[ \t]*\n(?:(?: {4}|\t).*(?:\n|\Z))+")
QUOTATION = re.compile(r'"[^"\n]*"|“[^”\n]*”|«[^»\n]*»|^\s*>.*$', re.MULTILINE)


def parse_rating(text: str) -> float | None:
    """A judgement's rating from 1 to 10, outside of thoughts, code and quotations, which may be the reply's own: the
    first number in brackets of the last line that begins with "Rating:". Without such a line the last [[n]] that is
    called a rating or has a line to itself; else the last [n] behind "Rating:". None if another [[n]] follows that is
    not the scale's: the judge may have changed its mind, or have repeated the reply's own line."""
    text = (answer_of(text) or "").strip()
    own = INDENTED.sub("\n", text)
    for pattern in (CODE, QUOTATION, SCALE):
        own = pattern.sub(" x ", own)
    numbers = [None]
    for pattern in (LINE, NAMED, SINGLE):
        if found := [*pattern.finditer(own)]:
            numbers = [next(filter(None, found[-1].groups())), *ANY.findall(own, found[-1].end())]
            break
    else:
        if alone := IN_QUOTES.fullmatch(text.rpartition("\n")[2]):
            numbers = [alone[1]]
    if numbers[0] is None or len(set(map(float, numbers))) > 1:
        return None
    return rating if 1 <= (rating := float(numbers[0])) <= 10 else None


def _tokens(messages: Messages) -> int:
    """An estimate without the judge's tokenizer: four bytes a token, in English and (0.75 a character) in Thai."""
    return sum(len(message["content"].encode()) for message in messages) // 4


def _cost(grader: Server, calls: int, tokens_in: int) -> str:
    typical, most = calls * TYPICAL_JUDGEMENT, calls * AS_PUBLISHED["max_tokens"]
    text = f"about {tokens_in:,} tokens in and {typical:,} out (at most {most:,})"
    if grader.price:
        a, b = grader.price
        dollars = [(tokens_in * a + out * b) / 1e6 for out in (typical, most)]
        text += f", about ${dollars[0]:,.2f} (at most ${dollars[1]:,.2f})"
    return text


def announce(questions: list[dict], grader: Server | None, results: int, max_new_tokens: float) -> None:
    """Prints what judging so many results will take, if no reply is rated yet and each is as long as it may be."""
    if grader is None:
        print(f"{len(questions)} questions of two turns; the replies are not judged (--judge none)")
        return
    prompts = sum(_tokens(judge_prompt(question, ["", ""], turn)) for question in questions for turn in (0, 1))
    tokens = (prompts + int(3 * max_new_tokens * len(questions))) * results  # the first reply is shown for both turns
    calls = 2 * len(questions) * results
    print(f"judge {grader.model} at {grader.url}: at most {calls:,} calls, {_cost(grader, calls, tokens)}")


def run_mt_bench(
    questions: list[dict], chat: Chat, grader: Server | None, *, who: str, cache: Path, name: str
) -> tuple[dict, list[dict]]:
    """The numbers of one model at one depth, and a line an item, both in the contract of evaluate.py's results.

    `who` names all that the replies depend on besides the questions.
    Raises UserError: the judge or the endpoint fails for good; what it answered before is kept in `cache`."""
    with Cache(cache) as saved:
        conversations = [[_user(question["turns"][0])] for question in questions]
        firsts = answer(conversations, chat, saved, f"{name}, turn 1", who)
        going_on = [not first.end.startswith("refused") for first in firsts]
        conversations = [
            [*conversation, {"role": "assistant", "content": answer_of(first) or ""}, _user(question["turns"][1])]
            for conversation, question, first in zip(conversations, questions, firsts, strict=True)
        ]
        seconds = iter(answer([*compress(conversations, going_on)], chat, saved, f"{name}, turn 2", who))
        replies = [
            [first, next(seconds) if goes_on else Reply("", "refused: as the first turn was")]
            for first, goes_on in zip(firsts, going_on, strict=True)
        ]
        return rate_replies(questions, replies, grader, saved, name)


def rate_replies(
    questions: list[dict], replies: list[list[Reply]], grader: Server | None, saved: Cache, name: str
) -> tuple[dict, list[dict]]:
    """As `run_mt_bench`, of replies that are there, with their thoughts."""
    lines, judgements = [], _ask_judge(questions, replies, grader, saved, name)
    for number, (question, pair) in enumerate(zip(questions, replies, strict=True)):
        answers = [answer_of(reply) or "" for reply in pair]
        turns = [
            {"prompt": prompt, "reply": text, "end": reply.end, "rating": rating,
             "judgement": judgement, "thai": None if reply.end.startswith("refused") else is_thai(text)}
            for prompt, text, reply, (rating, judgement) in zip(
                question["turns"], answers, pair, judgements[2 * number : 2 * number + 2], strict=True
            )
        ]  # fmt: skip
        lines.append(
            {"doc_id": number, "doc": {"question_id": question["question_id"]}, "target": question["reference"],
             "arguments": {}, "resps": [[reply] for reply in pair], "filtered_resps": answers, "id": question["id"],
             "subset": question["category"], "category": question["category"],
             "prompt_sha256": digest(question["turns"]), "turns": turns,
             "value": _mean([turn["rating"] for turn in turns])}
        )  # fmt: skip
    numbers = summarise(lines) | count_ends([reply for pair in replies for reply in pair])
    numbers["refused"] += sum((text or "").startswith("refused") for _, text in judgements)
    told = {"judge": grader.model, "judge_identity": grader.identity} if grader else {"judge": None, "unparsed": 0}
    numbers |= told  # without a judge nothing was asked
    print_summary(name, numbers)
    turns = [(f"{line['id']} turn {n}", turn) for line in lines for n, turn in enumerate(line["turns"], 1)]
    if cut := [name for name, turn in turns if turn["end"] == "cut"]:
        print(f"  cut before their end: {', '.join(cut)}")
    return numbers, lines


def _ask_judge(
    questions: list[dict], replies: list[list[Reply]], grader: Server | None, saved: Cache, name: str
) -> list[tuple[float | None, str | None]]:
    """Rating and judgement of each turn, in the questions' order; what was not replied is not judged."""
    result: list[tuple[float | None, str | None]] = [(None, None)] * (2 * len(questions))
    if grader is None:
        return result
    prompts = {
        2 * number + turn: judge_prompt(question, [answer_of(reply) or "" for reply in pair], turn)
        for number, (question, pair) in enumerate(zip(questions, replies, strict=True))
        for turn in (0, 1)
        if not pair[turn].end.startswith("refused")
    }

    def key(messages: Messages) -> str:
        return digest(["judgement", grader.identity, grader.options, messages])

    jobs = {key(prompt): prompt for prompt in prompts.values()}
    missing = [prompt for k, prompt in jobs.items() if k not in saved.texts]
    if missing:
        cost = _cost(grader, len(missing), sum(map(_tokens, missing)))
        print(f"{name}: {len(missing)} of {len(jobs)} judge calls to make, {cost}", flush=True)
    fill(saved, jobs, grader, f"{name}, judge")
    texts = {n: saved.texts[key(prompt)] for n, prompt in prompts.items()}
    again = {
        n: [*prompts[n], {"role": "assistant", "content": answer_of(text) or "(empty)"}, _user(AGAIN)]
        for n, text in texts.items()
        if parse_rating(text) is None and not text.end.startswith("refused")
    }
    fill(saved, {key(prompt): prompt for prompt in again.values()}, grader, f"{name}, judge again")
    for n, text in texts.items():
        result[n] = parse_rating(text), text or text.end
    for n, prompt in again.items():
        second = saved.texts[key(prompt)]
        second = second or second.end
        result[n] = parse_rating(second), f"{texts[n]}\n\n[asked again]\n{second}"
        if result[n][0] is None:
            question = questions[n // 2]["id"]
            said = printable(beginning(second))
            print(f"{name}: {question}, turn {n % 2 + 1}: no rating from 1 to 10 in {said}; left out")
    return result


def summarise(lines: list[dict]) -> dict:
    """The study block's numbers: `value` is the mean over questions, `macro` that over categories (as published)."""

    def mean_of(some: list[dict], which: tuple[int, ...] = (0, 1)) -> float | None:
        return _mean([line["turns"][turn]["rating"] for line in some for turn in which])

    subsets = {}
    for category in dict.fromkeys(line["category"] for line in lines):
        some = [line for line in lines if line["category"] == category]
        subsets[category] = {"value": mean_of(some), "items": len(some), "chance": None, "majority": None}
    rated = [line["value"] for line in lines if line["value"] is not None]
    interval = stderr = None
    if len(rated) > 1:
        draws = np.random.default_rng(0).integers(0, len(rated), (RESAMPLES, len(rated)))
        interval = np.percentile(np.array(rated)[draws].mean(1), [2.5, 97.5]).tolist()
        stderr = statistics.stdev(rated) / math.sqrt(len(rated))
    turns = [turn for line in lines for turn in line["turns"]]
    return {
        "metric": "rating",
        "higher_is_better": True,
        "items": len(lines),
        "value": _mean(rated),
        "ci95": interval,
        "stderr": stderr,
        "macro": _mean([row["value"] for row in subsets.values()]),
        **dict.fromkeys(("chance", "majority", "macro_chance", "macro_majority", "predicted")),  # of choices alone
        "subsets": subsets,
        "turns": [mean_of(lines, (turn,)) for turn in (0, 1)],
        "unparsed": sum(turn["rating"] is None for turn in turns),
        "thai_share": _mean([turn["thai"] for turn in turns]),
    }


def _mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def print_summary(name: str, numbers: dict) -> None:
    def show(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    share = f"replies in Thai {show(numbers['thai_share'], '.1%')}"
    if numbers["judge"] is None:
        print(f"{name}: {numbers['items']} questions answered, not judged; {share}")
        return
    low, high = numbers["ci95"] or (None, None)
    print(
        f"{name}: rating {show(numbers['value'])} (95 % {show(low)} – {show(high)}), mean of categories "
        f"{show(numbers['macro'])}, turns {' and '.join(map(show, numbers['turns']))}; {share}"
    )
    print("  " + ", ".join(f"{category} {show(row['value'])}" for category, row in numbers["subsets"].items()))
    if numbers["unparsed"]:
        print(f"  {numbers['unparsed']} turns without a rating, asked for twice or refused, are in none of these means")


def result_key(generation_key: str, grader: Server | None) -> str:
    """A result's `key`: what its replies depend on, the judge's address and name, and how it is asked and read."""
    read = SCALE, LINE, NAMED, SINGLE, ANY, IN_QUOTES, INDENTED, QUOTATION
    how = AS_PUBLISHED, INSTRUCTION, REFERENCE, SECOND, AGAIN, *(pattern.pattern for pattern in read)
    return digest([generation_key, grader and [grader.url, grader.model, *how]])


def is_rated(study: dict, choice: str) -> bool:
    """Whether a result has what `--judge` asks for: the ratings of JUDGE_MODEL at JUDGE_BASE_URL, by the model that is
    served there now; without an address those of any judge of that name, and without a name of any."""
    url, model = (os.environ.get(name, "").strip() for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"))
    if choice == "none":
        return True
    if url and model:
        same = study["key"] == result_key(study["generation_key"], find_judge())
        return same and _served_now(url, model) in (study.get("judge_identity"), None)
    return study.get("judge") in ([model] if model else {study.get("judge")} - {None})


@functools.cache
def _served_now(url: str, model: str) -> str | None:
    """The identity of the judge that the environment names; None, with a warning, where it cannot be asked."""
    judge = find_judge()
    judge.client = judge.client.with_options(max_retries=0)
    try:
        return judge.identity
    except UserError as error:
        print(f"warning: {message(error)}")
        print("its ratings are taken as they are: whether it is the same model cannot be asked")
    return None
