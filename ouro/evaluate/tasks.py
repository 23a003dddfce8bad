"""Scores a task: its items and prompts, and a model's outcome on them at each depth.

task = load_task("thai_exam", settings, limit=50, subsets=[])
outcomes = score_choices(network, tokenizer, task, [1, 2, 3, 4], 8192, "shown with the progress")
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ouro.data.chats import text_tokens
from ouro.data.thoughts import answer_of
from ouro.evaluate import benchmarks, judge
from ouro.evaluate.benchmarks import Task, digest
from ouro.evaluate.endpoint import Chat, local_chat
from ouro.evaluate.replies import Cache, answer, count_ends
from ouro.evaluate.scoring import Scores, score, to_sequences
from ouro.files import UserError
from ouro.model.generate import Decoder, generate, pick
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Settings

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

DENSE_BATCH = 8  # conversations that a baseline continues together


def load_task(name: str, settings: Settings, limit: int | None, subsets: list[str]) -> Task:
    """A task of evals.yaml with its items and prompts. limit: the first items of each subset; subsets: [] for all.
    Raises UserError: the items cannot be read."""
    spec, prompts, skipped = benchmarks.table()["tasks"][name], [], 0
    benchmark = benchmarks.row_of(name, settings)
    local = settings.paths.get(spec["benchmark"])
    if spec["protocol"] == "mt_bench":
        items = judge.load_questions(spec["benchmark"], benchmark, local, limit, benchmarks.spelling({}, settings))
    else:
        items, skipped = benchmarks.read(name, benchmark, settings, limit, subsets)
    if stripped := sum(item.get("stripped", False) for item in items):
        print(f"  {name}: white space around an option or a question was taken off in {stripped} items")
    if spec["protocol"] in ("ours", "labels", "generate"):
        shots = benchmarks.load_shots(spec, benchmark, settings, dict.fromkeys(item["subset"] for item in items))
        prompts = [benchmarks.item_prompts(item, spec, shots.get(item["subset"], ())) for item in items]
    if skipped:
        print(f"  warning: {name}: {skipped} empty texts are left out")
    part = None
    if wrong := benchmarks.miscounted(items, benchmark):
        known = [benchmark["items"][x] for x in benchmark.get("subsets", benchmark["items"])]
        part = f"{len(items):,} of {sum(known):,} items"
        said = f"{wrong}; has {benchmark.get('hub_id')} changed since configs/evals.yaml was written?"
        if local:
            said = f"{part}: no published score is set beside that of a part"
        if not (limit or subsets):  # then a part was asked for
            print(f"  warning: {name}: {said}")
    return Task(name, spec, items, prompts, benchmark, skipped, part)


@dataclass
class Outcome:
    """A model's outcome on a task at one depth. numbers: for the block "study" of the result; lines: one for each item,
    for items.jsonl; tokens: how many were read, in the one pass that served all depths."""

    numbers: dict
    lines: list[dict]
    tokens: int = 0


def item_lines(task: Task, found: list[dict]) -> list[dict]:
    """The lines of items.jsonl: what was asked about each item, and `found`, what is to be recorded with it."""
    asked = task.prompts or [item["text"] for item in task.items]
    lines = []
    for number, (item, prompts, rest) in enumerate(zip(task.items, asked, found, strict=True)):
        doc = {"id": item["id"], "question": item.get("question", item.get("text"))[:200]}
        lines.append({"doc_id": number, "doc": doc, "target": item.get("gold", ""), "arguments": {}, "id": item["id"],
                      "subset": item["subset"], "prompt_sha256": digest(prompts),
                      **{key: item[key] for key in ("cluster", "stratum") if key in item}, **rest})  # fmt: skip
    return lines


def choice_outcome(task: Task, predictions: list[str | None], found: list[dict], numbers: dict, tokens: int) -> Outcome:
    """The outcome of a task whose items have one right answer."""
    found = [
        rest | {"prediction": prediction, "gold": item["gold"], "value": float(prediction == item["gold"])}
        for item, prediction, rest in zip(task.items, predictions, found, strict=True)
    ]
    return Outcome(benchmarks.accuracy(task.items, predictions, task.spec) | numbers, item_lines(task, found), tokens)


def loop_numbers(scores: Scores, place: int, depth: int) -> dict:
    """What the study block says of the loops at a depth, the `place`-th of those that were scored."""
    exits = scores.exits and scores.exits[place]
    return {"exit_distribution": exits, "state_distance": scores.distances[: depth - 1]}


def positions_of(network: PreTrainedModel) -> int | None:
    """How many tokens a model can read at once; None: it does not say."""
    return getattr(network.config, "max_position_embeddings", None)


def check_numbers(log_p: np.ndarray, items: list[str], depths: list[int], title: str) -> None:
    """That log-probabilities [depth][sequence] are numbers. items: the id of each sequence's.
    Raises UserError: one is NaN or infinite, of which a choice or a mean would be made all the same."""
    if len(bad := np.argwhere(~np.isfinite(log_p))):
        place, number = bad[0]
        what = f"the log-probability of {items[number]} at {depths[place]} loops is {log_p[place, number]}"
        remedy = "nothing of it is saved. Are the weights damaged, or too large for their precision?"
        raise UserError(f"{title}: {what}, and {len(bad) - 1} more are no numbers: {remedy}")


def score_choices(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, depths: list[int], budget: int, title: str
) -> list[Outcome]:
    """By depth: the options or letters with the highest log-probability. budget: tokens a forward pass."""
    longest = positions_of(network)
    questions = [question for prompts in task.prompts for question in prompts]
    sequences, cut = to_sequences(tokenizer, questions, longest)
    if cut:
        print(f"  warning: {task.name}: {cut} prompts are longer than {longest} tokens and lost their beginning")
    scores = score(network, sequences, depths, budget, title)
    pairs = zip(task.items, task.prompts, strict=True)
    owner = [item["id"] for item, prompts in pairs for _, continuations in prompts for _ in continuations]
    check_numbers(scores.log_p, owner, depths, title)
    outcomes = []
    for place, depth in enumerate(depths):
        values, predictions, found = iter(scores.log_p[place].tolist()), [], []
        for item, prompts in zip(task.items, task.prompts, strict=True):
            raw = [[next(values) for _ in continuations] for _, continuations in prompts]
            by_letter, prediction = benchmarks.choose(item, task.spec, raw)
            predictions.append(prediction)
            found.append({"resps": raw, "filtered_resps": list(by_letter.values()), "scores": by_letter})
        outcomes.append(choice_outcome(task, predictions, found, loop_numbers(scores, place, depth), scores.tokens))
    return outcomes


def score_texts(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, depths: list[int], budget: int, title: str
) -> list[Outcome]:
    """By depth: the bits per character of texts, each token scored once. budget: tokens a forward pass."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    window = min(task.spec["window"], positions_of(network) or math.inf)
    stride = min(task.spec["stride"], window // 2)
    sequences, owner, lossy = [], [], 0
    for number, item in enumerate(task.items):
        tokens = text_tokens(item["text"], tokenizer)
        lossy += tokenizer.decode(tokens, clean_up_tokenization_spaces=False).strip() != item["text"].strip()
        pieces = benchmarks.windows(tokens, [first], window, stride)
        sequences += pieces
        owner += [number] * len(pieces)
    if lossy:
        told = f"changes {lossy} of {len(task.items)} texts: its bits are not for all of them"
        print(f"  warning: {title}: the tokenizer {told}")
    scores = score(network, sequences, depths, budget, title)
    check_numbers(scores.log_p, [task.items[number]["id"] for number in owner], depths, title)
    characters = [len(item["text"]) for item in task.items]
    outcomes = []
    for place, depth in enumerate(depths):
        bits = np.zeros(len(task.items))
        np.add.at(bits, owner, -scores.log_p[place] / math.log(2))
        found = []
        for b, c in zip(bits.tolist(), characters, strict=True):
            log_p = -b * math.log(2)
            found.append({"resps": [[log_p]], "filtered_resps": [log_p], "bits": b, "characters": c, "value": b / c})
        numbers = benchmarks.bits_per_character(bits.tolist(), characters) | loop_numbers(scores, place, depth)
        outcomes.append(Outcome(numbers, item_lines(task, found), scores.tokens))
    return outcomes


def score_replies(task: Task, chat: Chat, who: str, cache: Path, title: str) -> Outcome:
    """The choices that the replies to prompts name, outside of thoughts; replies that `cache` holds already are not
    asked for again."""
    conversations = [[{"role": "user", "content": prompts[0][0]}] for prompts in task.prompts]
    with Cache(cache) as saved:
        replies = answer(conversations, chat, saved, title, who)
    answers = [answer_of(text) for text in replies]
    predictions = [None if text is None else benchmarks.parse_choice(text) for text in answers]
    predictions = list(map(benchmarks.settle, task.items, predictions))
    found = [{"resps": [[text]], "filtered_resps": [choice]} for text, choice in zip(replies, predictions, strict=True)]
    return choice_outcome(task, predictions, found, count_ends(replies), 0)


class Sample(LogitsProcessor):
    """Leaves one token in each row, sampled as in generate.py: whatever else is in the batch."""

    def __init__(self, seeds: list[int], width: int, temperature: float, device: torch.device):
        self.seeds, self.width = torch.tensor(seeds, device=device), width
        self.temperature = torch.tensor(temperature, device=device)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = torch.full_like(self.seeds, ids.shape[1] - self.width)
        token = pick(scores, Decoder.noise(self.seeds, place), self.temperature)
        return torch.full_like(scores, -math.inf).scatter_(1, token[:, None], 0.0)


def chat_with(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, depth: int, s: Settings, max_new_tokens: int
) -> Chat:
    """The model at a depth as judge.py calls it: replies to conversations, without the token that ends them."""

    def seeds(prompts: list[list[int]]) -> list[int]:
        """A seed a prompt, from its own tokens: so an interruption, after which fewer are asked for, changes none."""
        return [int(digest([s.seed, prompt])[:15], 16) for prompt in prompts]

    def looped(prompts: list[list[int]], done: Callable[[int, list[int]], None]) -> None:
        stop = set(network.generation_config.eos_token_id)
        generate(network, prompts, depth=depth, max_new_tokens=max_new_tokens, stop=stop, temperature=s.temperature,
                 seed=seeds(prompts), on_end=done)  # fmt: skip

    def dense(prompts: list[list[int]], done: Callable[[int, list[int]], None]) -> None:
        ends = network.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends])
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), DENSE_BATCH):
            chosen = order[at : at + DENSE_BATCH]
            width = max(len(prompts[i]) for i in chosen)
            padding = [[0] * (width - len(prompts[i])) for i in chosen]  # on the left: replies begin at one place
            rows = torch.tensor([pad + prompts[i] for pad, i in zip(padding, chosen, strict=True)])
            mask = torch.tensor([pad + [1] * (width - len(pad)) for pad in padding])
            sample = [Sample(seeds([prompts[i] for i in chosen]), width, s.temperature, network.device)]
            out = network.generate(
                rows.to(network.device), attention_mask=mask.to(network.device), max_new_tokens=max_new_tokens,
                pad_token_id=0, do_sample=False, logits_processor=sample if s.temperature else [],
            )  # fmt: skip
            for i, ids in zip(chosen, out[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stop), len(ids))
                done(i, ids[:end])  # what follows is padding

    ask = looped if isinstance(network, OuroForCausalLM) else dense
    return local_chat(tokenizer, ask, s.system_prompt, max_new_tokens)
