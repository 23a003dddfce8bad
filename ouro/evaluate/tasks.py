"""A benchmark under a protocol -> prompts -> outcomes, of one model at any depths."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ouro.evaluate import benchmarks, judge
from ouro.evaluate.benchmarks import Task, digest
from ouro.evaluate.endpoint import Chat, local_chat
from ouro.evaluate.replies import Cache, answer
from ouro.evaluate.scoring import Scores, encode, score
from ouro.model.generate import Decoder, generate, pick
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Settings

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

DENSE_BATCH = 8  # conversations that a baseline continues together


def load_task(name: str, settings: Settings, limit: int | None, subsets: list[str]) -> Task:
    spec, prompts, skipped = benchmarks.table()["tasks"][name], [], 0
    benchmark = benchmarks.row_of(name, settings)
    local = settings.paths.get(spec["benchmark"])
    if spec["protocol"] == "mt_bench":
        items = judge.load_questions(spec["benchmark"], benchmark, local, limit, settings.normalise_thai)
    else:
        items, skipped = benchmarks.read(name, benchmark, settings, limit, subsets)
    if spec["protocol"] in ("ours", "labels", "generate"):
        shots = benchmarks.load_shots(spec, benchmark, settings, dict.fromkeys(item["subset"] for item in items))
        prompts = [benchmarks.item_prompts(item, spec, shots.get(item["subset"], ())) for item in items]
    if skipped:
        print(f"  warning: {name}: {skipped} empty texts are left out")
    wrong = None if limit or subsets or local else benchmarks.miscounted(items, benchmark)
    if wrong:
        print(f"  warning: {name}: {wrong}; has {benchmark['hub_id']} changed since configs/evals.yaml was written?")
    return Task(name, spec, items, prompts, benchmark, skipped)


@dataclass
class Outcome:
    """What a task gives at one depth: the numbers of the study block, and a line an item."""

    numbers: dict
    lines: list[dict]


def line_of(number: int, item: dict, prompt_sha256: str, rest: dict) -> dict:
    question = item.get("question", item.get("text", ""))
    line = {"doc_id": number, "doc": {"id": item["id"], "question": question[:200]}, "target": item.get("gold", ""),
            "arguments": {}, "id": item["id"], "subset": item["subset"], "prompt_sha256": prompt_sha256}  # fmt: skip
    return line | rest


def score_choices(
    model: PreTrainedModel, tokenizer, task: Task, depths: list[int], budget: int, longest: int | None, who: str
) -> tuple[list[Outcome], Scores, int]:
    questions = [question for item in task.prompts for question in item]
    sequences, cut = encode(tokenizer, questions, longest)
    scores = score(model, sequences, depths, budget, f"{who}, {task.name}")
    outcomes = []
    for values in scores.log_p.tolist():
        at, lines, predictions = iter(values), [], []
        for number, (item, prompts) in enumerate(zip(task.items, task.prompts, strict=True)):
            raw = [[next(at) for _ in continuations] for _, continuations in prompts]
            by_letter, prediction = benchmarks.choose(item, task.spec, raw)
            predictions.append(prediction)
            lines.append(
                line_of(number, item, digest(prompts), {
                    "resps": raw, "filtered_resps": list(by_letter.values()), "scores": by_letter,
                    "prediction": prediction, "gold": item["gold"], "value": float(prediction == item["gold"]),
                })
            )  # fmt: skip
        outcomes.append(Outcome(benchmarks.accuracy(task.items, predictions, task.spec), lines))
    return outcomes, scores, cut


def score_texts(
    model: PreTrainedModel, tokenizer, task: Task, depths: list[int], budget: int, longest: int | None, who: str
) -> tuple[list[Outcome], Scores, int]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    window = min(task.spec["window"], longest or math.inf)
    stride = min(task.spec["stride"], window // 2)
    sequences, owner, lossy = [], [], 0
    for number, item in enumerate(task.items):
        tokens = tokenizer(item["text"], add_special_tokens=False).input_ids
        lossy += tokenizer.decode(tokens, clean_up_tokenization_spaces=False).strip() != item["text"].strip()
        pieces = benchmarks.windows(tokens, [first], window, stride)
        sequences += pieces
        owner += [number] * len(pieces)
    if lossy:
        print(
            f"  warning: {who}'s tokenizer changes {lossy} of {len(task.items)} texts: its bits are not for all of them"
        )
    scores = score(model, sequences, depths, budget, f"{who}, {task.name}")
    characters = [len(item["text"]) for item in task.items]
    outcomes = []
    for values in scores.log_p:
        bits = np.zeros(len(task.items))
        np.add.at(bits, owner, -values / math.log(2))
        lines = [
            line_of(n, item, digest(item["text"]), {
                "resps": [[float(-b * math.log(2))]], "filtered_resps": [float(-b * math.log(2))],
                "bits": float(b), "characters": c, "value": float(b) / c,
            })
            for n, (item, b, c) in enumerate(zip(task.items, bits, characters, strict=True))
        ]  # fmt: skip
        outcomes.append(Outcome(benchmarks.bits_per_character(bits.tolist(), characters), lines))
    return outcomes, scores, 0


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, depth: int, s: Settings, max_new_tokens: int
) -> Chat:
    """The model at a depth as judge.py calls it: replies to conversations, without the token that ends them."""

    def seeds(prompts: list[list[int]]) -> list[int]:
        """Of the prompts' own tokens: after an interruption the rest is asked for as all would have been."""
        return [int(digest([s.seed, prompt])[:15], 16) for prompt in prompts]

    def looped(prompts: list[list[int]], done: Callable[[int, list[int]], None]) -> None:
        stop = set(model.generation_config.eos_token_id)
        generate(model, prompts, depth=depth, max_new_tokens=max_new_tokens, stop=stop, temperature=s.temperature,
                 seed=seeds(prompts), on_end=done)  # fmt: skip

    def dense(prompts: list[list[int]], done: Callable[[int, list[int]], None]) -> None:
        ends = model.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends])
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), DENSE_BATCH):
            chosen = order[at : at + DENSE_BATCH]
            width = max(len(prompts[i]) for i in chosen)
            rows = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
            sample = [Sample(seeds([prompts[i] for i in chosen]), width, s.temperature, model.device)]
            out = model.generate(
                rows, attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens, pad_token_id=0,
                do_sample=False, logits_processor=sample if s.temperature else [],
            )  # fmt: skip
            for i, ids in zip(chosen, out[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stop), len(ids))
                done(i, ids[:end])  # what follows is padding

    return local_chat(tokenizer, looped if isinstance(model, OuroForCausalLM) else dense, s.system_prompt)


def score_replies(task: Task, chat: Chat, who: str, cache: Path, name: str) -> Outcome:
    """The choices that the replies to prompts name; replies that `cache` holds already are not asked for again."""
    conversations = [[{"role": "user", "content": question[0][0]}] for question in task.prompts]
    with Cache(cache) as saved:
        replies = answer(conversations, chat, saved, name, who)
    predictions = [benchmarks.parse_choice(text) for text in replies]
    lines = [
        line_of(n, item, digest(prompt), {
            "resps": [[text]], "filtered_resps": [choice], "prediction": choice, "gold": item["gold"],
            "value": float(choice == item["gold"]),
        })
        for n, (item, prompt, text, choice) in enumerate(
            zip(task.items, task.prompts, replies, predictions, strict=True)
        )
    ]  # fmt: skip
    return Outcome(benchmarks.accuracy(task.items, predictions, task.spec), lines)
