"""Benchmarks at any loop depths, from one forward pass: trained runs beside the base at the same depth, and baselines.

    python evaluate.py --config configs/smoke.yaml                             # the run that `make smoke` trained
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4 --ut_steps 1,2,3,4 --limit 50
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4,seed1/exp2-wangchan-ut1 --tasks thai_exam
    python evaluate.py --config configs/a100.yaml --base                       # the base alone; --adapter FOLDER
    python evaluate.py --config configs/a100.yaml --model typhoon2-3b          # a baseline of evals.yaml, any Hub id

Writes RESULTS_DIR/<run>/<task>-ut<k>.json, in lm-evaluation-harness's shape with a block "study" of ours, one line an
item in <task>-ut<k>.items.jsonl, and manifest.json; the base's results, which all runs share, are in base-<precision>/.
What is there already is not computed again, unless something that its numbers depend on has changed.
"""

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from settings import (
    FIELDS,
    Resolved,
    Settings,
    UserError,
    call,
    code_version,
    parse,
    read_yaml,
    resolve,
    write_atomic,
    write_json,
)

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import benchmarks
import judge
import tables
from data_config import load_tokenizer
from generate import Decoder, generate, pick
from lora import fuse
from modeling_ouro import REVISIONS, OuroForCausalLM, load_ouro
from plan import product_sizes
from scoring import Scores, encode, readout, score
from sources import read_file

FORMAT = 1  # of the result files
VERSION = {"ours": 1, "labels": 1, "generate": 1, "text": 1}  # of each protocol's code: a new one scores anew
PLAIN = "{{ bos_token or '' }}{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
DENSE_BATCH = 8  # conversations that a baseline continues together
REPLIES = ("generate", "mt_bench")  # protocols of tasks that a model answers in words
LANGUAGES = ("belebele_thai", "belebele_english")  # tasks of the same questions


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Task:
    """A row of `tasks` in evals.yaml with its items and the prompts that are made of them."""

    name: str
    spec: dict
    items: list[dict]
    prompts: list[list[tuple[str, list[str]]]]  # of each item; none for texts
    benchmark: dict  # its row of `benchmarks`, at the commit that it was read at
    skipped: int = 0  # empty texts

    @property
    def sha256(self) -> str:
        return digest(
            [[self.prompts[i] if self.prompts else item, item.get("gold")] for i, item in enumerate(self.items)]
        )


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def load_task(name: str, settings: Settings, limit: int | None, subsets: list[str]) -> Task:
    spec, prompts, skipped = benchmarks.table()["tasks"][name], [], 0
    benchmark = benchmarks.row_of(name, spec, settings)
    local = settings.paths.get(spec["benchmark"])
    if spec["protocol"] == "mt_bench":
        items = judge.load_questions(spec["benchmark"], benchmark, local, limit, settings.normalise_thai)
    else:
        items, skipped = benchmarks.read(name, benchmark, settings, limit, subsets)
    if spec["protocol"] in ("ours", "labels", "generate"):
        shots = benchmarks.load_shots(spec, benchmark, settings, dict.fromkeys(item["subset"] for item in items))
        prompts = [benchmarks.render(item, spec, shots.get(item["subset"], ())) for item in items]
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
) -> judge.Chat:
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

    return judge.local_chat(tokenizer, looped if isinstance(model, OuroForCausalLM) else dense, s.system_prompt)


def score_replies(task: Task, chat: judge.Chat, who: str, cache: Path, name: str, temperature: float) -> Outcome:
    """The choices that the replies to prompts name; replies that `cache` holds already are not asked for again."""
    conversations = [[{"role": "user", "content": question[0][0]}] for question in task.prompts]
    with judge.Cache(cache) as saved:
        replies = judge.answer(
            conversations,
            chat,
            saved,
            name,
            who=who,
            max_new_tokens=task.spec["max_new_tokens"],
            temperature=temperature,
        )
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


# ----------------------------------------------------------------------------------------------------------------------
# What is scored


@dataclass
class Subject:
    """A model whose results are in RESULTS_DIR/<run>: the base, the base with an adapter, or a baseline."""

    run: str
    kind: str
    adapter: Path | None = None  # folder in PEFT format
    folder: Path | None = None  # of the training run
    trained: Settings | None = None
    experiment: str | None = None
    published: tuple[dict, ...] = ()

    def study(self) -> dict:
        """The part of the study block that is the same for all tasks and depths."""
        report = self.folder and self.folder / "data_report.json"
        s = self.trained
        return {
            "run": self.run,
            "kind": self.kind,
            "experiment": self.experiment,
            "seed": s and s.seed,
            "dataset": s and s.dataset,
            "loss": s and s.loss,
            "trained_ut_steps": s and s.total_ut_steps,
            "adapter_sha256": self.adapter and file_sha256(self.adapter / "adapter_model.safetensors"),
            "data_report_sha256": file_sha256(report) if report and report.exists() else None,
            "published": self.published,
        }


def file_sha256(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def read_config(path: str, revision: str | None) -> PretrainedConfig:
    try:
        if Path(path).is_dir() and not Path(path, "config.json").exists():  # transformers would guess by the name
            raise OSError("there is no config.json in it")
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path}: {' '.join(str(error).split())}") from None


def fingerprint(path: str, revision: str | None) -> str:
    """Of a model on the Hub its commit, of a folder its files' contents."""
    if not Path(path).is_dir():
        return f"{path} {revision}"
    files = sorted(f for f in Path(path).iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".txt"))
    return digest([[file.name, file_sha256(file)] for file in files])


@dataclass
class Model:
    """What is loaded once: an Ouro base or a baseline."""

    path: str
    revision: str | None
    precision: str
    double_quant: bool = True
    looped: bool = True
    endpoint: str | None = None  # address of a server that has it loaded

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.looped:
            return load_tokenizer(self.path, self.revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the tokenizer of {self.path}: {' '.join(str(error).split())}") from None
        if tokenizer.chat_template is None:  # a model that was never taught one
            tokenizer.chat_template = PLAIN
        return tokenizer

    def load(self, dtype: torch.dtype, compiled: bool) -> PreTrainedModel:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            if self.looped:
                model = load_ouro(
                    self.path, self.revision, dtype=dtype, nf4=self.precision == "nf4",
                    double_quant=self.double_quant, device=device,
                )  # fmt: skip
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    self.path, revision=self.revision, torch_dtype=dtype, use_safetensors=True,
                    trust_remote_code=False, device_map={"": device},
                )  # fmt: skip
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load {self.path}: {' '.join(str(error).split())}") from None
        model.eval()
        if compiled and self.looped and device == "cuda":
            model.compile_layers()
        if not self.looped:
            check_readout(model)
        return model


@torch.no_grad()
def check_readout(model: PreTrainedModel) -> None:
    """That state times head is what the model itself answers: some architectures scale their logits.

    Raises:
        UserError: it is not.
    """
    ids = torch.arange(8, device=model.device)[None]
    ours = readout(model, model.base_model(input_ids=ids).last_hidden_state[0])
    theirs = model(input_ids=ids).logits[0].to(ours.dtype).log_softmax(-1)
    if not torch.allclose(ours, theirs, atol=0.05):
        raise UserError(
            f"{model.config.model_type}: its logits are not its head times its state, which is not supported"
        )


def run_settings(run: Resolved, name: str | None = None) -> tuple[Path, Settings]:
    """The folder of a trained run, and the settings it was trained with.

    Raises:
        UserError: it is not trained yet; the message holds the command that does it.
    """
    name = name or run.run
    folder = Path(run.settings.output_dir) / name
    if not (folder / "completed").exists():
        state = "has been started but not finished" if folder.exists() else "has not been trained"
        config = f" --config {run.config}" if run.config else ""
        seed, _, experiment = name.rpartition("/")
        exp = f" --exp {experiment}" if run.options.exp else ""
        exp += f" --seed {seed.removeprefix('seed')}" if seed else ""
        exp += f" --output_dir {folder.parent}" if seed or run.origins["output_dir"] == "command line" else ""
        raise UserError(f"{name} {state}: no {folder / 'completed'}\ntrain it: python train_qlora.py{config}{exp}")
    return folder, recorded_settings(folder)


def recorded_settings(folder: Path) -> Settings:
    recorded, origin = read_yaml(folder / "config.yaml"), f"{folder}/config.yaml"
    return Settings(**{name: parse(name, value, origin) for name, value in recorded.items() if name in FIELDS})


def trained_subject(run: Resolved, name: str) -> Subject:
    folder, trained = run_settings(run, name)
    experiment = name.rpartition("/")[2]
    subject = Subject(name, "adapter", folder / "final_adapter", folder, trained, experiment)
    wanted = read_yaml(Path(__file__).parent / "configs" / "experiments.yaml").get(experiment, {})
    for key in ("total_ut_steps", "dataset"):
        asked, where = wanted.get(key, getattr(trained, key)), f"{experiment} of configs/experiments.yaml"
        if run.origins[key].startswith(("command line", "environment")):
            asked, where = getattr(run.settings, key), f"the {run.origins[key]}"
        if asked != getattr(trained, key):
            raise UserError(
                f"{folder} was trained with {key} = {getattr(trained, key)}, and {where} says {asked}: train it under "
                "another name, or into another --output_dir"
            )
    return subject


def adapter_subject(run: Resolved, place: str) -> Subject:
    """Any folder in PEFT format; one that train_qlora.py wrote brings its run's settings."""
    adapter = Path(place)
    if not (adapter / "adapter_config.json").exists() and (adapter / "final_adapter").exists():
        adapter /= "final_adapter"
    folder = adapter.parent if (adapter.parent / "config.yaml").exists() else None
    whole = adapter.resolve()
    name = whole.parent.name if whole.name == "final_adapter" else whole.name
    trained = recorded_settings(folder) if folder else None
    # The end tells folders of one name apart, as seed0/exp2 and seed1/exp2.
    return Subject(f"adapter-{name}-{digest(str(whole))[:8]}", "adapter", adapter, folder, trained)


def check_adapter(subject: Subject, model: Model) -> None:
    """That an adapter belongs to the base, and to its run's record.

    Raises:
        UserError: a missing or broken file, another rank or base than recorded, other sizes than the base's.
    """
    place = subject.adapter
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(place / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{place} is no adapter in PEFT format: {error}") from None
    rank = config.get("r") if isinstance(config, dict) else None
    if not isinstance(rank, int):
        raise UserError(f"{place} is no adapter in PEFT format: adapter_config.json holds no rank, 'r'")
    if subject.trained and rank != subject.trained.r:
        raise UserError(f"{place} has rank {rank}, its run's config.yaml says {subject.trained.r}")
    base = config.get("base_model_name_or_path")
    if base != model.path:
        origin = "its run's config.yaml says" if subject.trained else "model_name_or_path is"
        raise UserError(f"{place} was made for {base}, {origin} {model.path}")
    base = read_config(model.path, model.revision)
    widths = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                      product_sizes(base), strict=True))  # fmt: skip
    for name, shape in shapes.items():
        parts = name.split(".")
        projection = next((p for p in parts if p in widths), None)
        number = name.partition(".layers.")[2].partition(".")[0]
        if projection is None or not number.isdecimal() or int(number) >= base.num_hidden_layers:
            raise UserError(f"{place}: {name} has no place in {model.path} ({base.num_hidden_layers} layers)")
        into, out = widths[projection]
        wanted = {"lora_A": [rank, into], "lora_B": [out, rank]}
        kind = next((k for k in wanted if k in parts), None)
        if kind and list(shape) != wanted[kind]:
            raise UserError(f"{place} does not fit {model.path}: {name} is {list(shape)}, {wanted[kind]} is needed")


def find_subjects(run: Resolved) -> tuple[Model, torch.dtype, list[Subject]]:
    """What the command asks to score, the base first.

    Raises:
        UserError: an unknown or untrained experiment, or several that do not share a base.
    """
    options, s = run.options, run.settings
    if sum(bool(x) for x in (options.exp, options.adapter, options.model, options.base, options.endpoint)) > 1:
        raise UserError("give one of --exp, --adapter, --model, --base and --endpoint")
    if options.endpoint:
        name = judge.find_endpoint(options.endpoint).model
        model = Model(name, None, "served", looped=False, endpoint=options.endpoint)
        return model, torch.float32, [Subject(f"baseline-{name.strip('/').replace('/', '--')}", "baseline")]
    if options.model:
        rows = benchmarks.table()["baselines"]
        row = rows.get(options.model, {"hub_id": options.model})
        if options.model not in rows and "/" not in options.model and not Path(options.model).exists():
            raise UserError(f"unknown baseline {options.model!r}: neither a folder nor one of {', '.join(rows)}")
        name = options.model.rstrip("/").replace("/", "--") if options.model not in rows else options.model
        cuda = torch.cuda.is_available()
        dtype = getattr(torch, row.get("dtype", "bfloat16")) if cuda and s.bf16 else torch.float32
        path, revision = row["hub_id"], row.get("revision") or REVISIONS.get(row["hub_id"])
        looped = read_config(path, revision).model_type == "ouro"  # an Ouro of the Hub, or what make merge wrote
        model = Model(path, revision, PRECISION[dtype], looped=looped)
        return model, dtype, [Subject(f"baseline-{name}", "baseline", published=tuple(row.get("published", ())))]
    if options.base:
        subjects = []
    elif options.adapter:
        subjects = [adapter_subject(run, options.adapter)]
    else:
        subjects = [trained_subject(run, name) for name in dict.fromkeys((options.exp or run.run).split(","))]
    bases = {}
    for subject in subjects or [Subject("base", "base")]:
        t = subject.trained or s
        key = t.model_name_or_path, t.model_revision, t.use_qlora, t.bf16, t.bnb_4bit_use_double_quant
        bases.setdefault((*key, t.normalise_thai), []).append(subject.run)
    if len(bases) > 1:
        several = "; ".join(
            f"{', '.join(names)}: {key[0]}, nf4 {key[2]}, bf16 {key[3]}" for key, names in bases.items()
        )
        raise UserError(f"these do not share a base, precision and spelling; score them apart: {several}")
    path, revision, nf4, bf16, double_quant, spelling = next(iter(bases))
    if spelling != s.normalise_thai:
        raise UserError(f"trained with normalise_thai {spelling}: add --normalise_thai {str(spelling).lower()}")
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = Model(path, revision or REVISIONS.get(path), "nf4" if nf4 else PRECISION[dtype], double_quant)
    if bf16 and not torch.cuda.is_available():
        who = f"{subjects[0].run} was trained" if subjects else f"{path} is asked for"
        raise UserError(f"{who} in bf16 on a GPU, and no CUDA GPU is found here")
    for subject in subjects:
        check_adapter(subject, model)
    return model, dtype, [Subject(f"base-{model.precision}", "base"), *subjects]


PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


# ----------------------------------------------------------------------------------------------------------------------
# Results


def forward_flops(model: PreTrainedModel, depth: int) -> int:
    """Floating-point operations of a token's products, attention's own not counted: two a weight."""
    config = model.config
    if not isinstance(model, OuroForCausalLM):
        return 2 * (model.num_parameters(exclude_embeddings=True) + config.hidden_size * config.vocab_size)
    layer = sum(i * o for i, o in product_sizes(config))
    return 2 * (depth * config.num_hidden_layers * layer + config.hidden_size * config.vocab_size)


METRIC = {"ours": "accuracy", "labels": "accuracy", "generate": "accuracy", "text": "bits_per_character",
          "mt_bench": "rating"}  # fmt: skip


def result(task: Task, study: dict, model: Model) -> dict:
    """The file's content: what lm-evaluation-harness writes, and our block."""
    name, metric = task.name, {"accuracy": "acc"}.get(study["metric"], study["metric"])
    numbers = {name: {"alias": name, "sample_len": study["items"], f"{metric},none": study["value"],
                      f"{metric}_stderr,none": "N/A" if study["stderr"] is None else study["stderr"]}}  # fmt: skip
    subsets = {f"{name}_{key}": row for key, row in study["subsets"].items()}
    for key, row in subsets.items():
        numbers[key] = {"alias": f" - {key}", "sample_len": row["items"], f"{metric},none": row["value"]}
    every = list(numbers)
    spec = {key: value for key, value in task.spec.items() if key != "protocol"}
    return {
        "results": numbers,
        "group_subtasks": {name: list(subsets)},
        "configs": {key: {"task": key, "metadata": {"version": VERSION.get(task.spec["protocol"], 1)}, **spec}
                    for key in every},
        "versions": dict.fromkeys(every, VERSION.get(task.spec["protocol"], 1)),
        "n-shot": dict.fromkeys(every, task.spec.get("shots", 0)),
        "higher_is_better": {key: {metric: study["higher_is_better"]} for key in every},
        "n-samples": {key: dict.fromkeys(("original", "effective"), numbers[key]["sample_len"]) for key in every},
        "config": {"model": "ouro" if model.looped else "hf", "limit": study["limit"],
                   "model_args": f"pretrained={model.path},revision={model.revision},dtype={model.precision},"
                                 f"total_ut_steps={study['total_ut_steps']}"},
        "git_hash": None,
        "task_hashes": {name: study["prompt_sha256"]},
        "study": study,
    }  # fmt: skip


def result_file(results: Path, subject: Subject, task: Task, depth: int) -> Path:
    return results / subject.run / f"{task.name}-ut{depth}.json"


def read_result(file: Path) -> dict | None:
    """The study block of a file that is there and whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["study"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(results: Path, subject: Subject, task: Task, depth: int, content: dict, lines: list[dict]) -> None:
    file = result_file(results, subject, task, depth)
    file.unlink(missing_ok=True)  # of other items than those that are written now
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        write_atomic(file.with_suffix(".items.jsonl"), text)
        write_json(file, content)  # last: its presence says that the items are there
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; what was finished before is kept") from None


def note(results: Path, subject: Subject, task: Task, seconds: float, tokens: int, model: Model, seed: int) -> None:
    """RESULTS_DIR/<run>/manifest.json: what is not the same each time, and what each task was."""
    file = results / subject.run / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    manifest["run"] = subject.run
    manifest.setdefault("tasks", {})[task.name] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "items_per_second": round(len(task.items) / seconds, 2),
        "tokens": tokens,
        "model": asdict(model),
        "benchmark_revision": task.benchmark["revision"],
        "prompt_sha256": task.sha256,
        "seed": seed,
        **code_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        write_json(file, manifest)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def find_depths(asked: list[int] | None, model: Model) -> list[int]:
    """The depths to score.

    Raises:
        UserError: they are not of this model: one that does not loop has one, and so has a served one.
    """
    if model.looped:
        return asked or [1, 2, 3, 4]
    if model.endpoint and (asked is None or len(asked) > 1):
        raise UserError(
            f"{model.endpoint} answers at one depth and does not say which: name it by --ut_steps, as --ut_steps 4 "
            "(--ut_steps 1 for a model that does not loop)"
        )
    if not model.endpoint and asked not in (None, [1]):
        raise UserError(f"{model.path} does not loop, so it has one depth: leave --ut_steps out")
    return asked or [1]


def find_grader(wanted: list[tuple[Task, list[int], dict]], choice: str, max_new_tokens: int) -> judge.Server | None:
    """The judge, after telling what it will cost and one call that shows that it is there; None if nothing is to be
    rated. Errors as judge.py's."""
    spoken = [(task, stale) for task, stale, _ in wanted if task.spec["protocol"] == "mt_bench"]
    if not spoken:
        return None
    grader = judge.find_judge(choice)
    judge.announce(spoken[0][0].items, grader, sum(len(stale) for _, stale in spoken), max_new_tokens)
    if grader:
        grader.check()
    return grader


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--results_dir {folder}: nothing can be written there: {error.strerror}") from None


def evaluate(run: Resolved) -> None:
    """Scores what the command asks for, and prints the tables.

    Raises:
        UserError: a mistake in the command, the configuration or the data.
    """
    options, s = run.options, run.settings
    asked = None if options.ut_steps is None else parse_depths(options.ut_steps)
    table = benchmarks.table()
    names = benchmarks.task_names(s.tasks, table["tasks"])
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    model, dtype, subjects = find_subjects(run)
    depths = find_depths(asked, model)
    spoken = {name for name in names if table["tasks"][name]["protocol"] in REPLIES}
    if model.endpoint and (silent := [name for name in names if name not in spoken]):
        raise UserError(
            f"a served model gives no log-probabilities; {', '.join(silent)} needs them: --tasks openthaieval"
        )
    subsets = benchmarks.subset_names(options.subsets, [table["tasks"][name] for name in names])
    tasks = [load_task(name, s, options.limit, subsets) for name in names]
    results = Path(s.results_dir)
    if not model.endpoint:  # main is read once: what is loaded below is of this commit
        model.revision = read_config(model.path, model.revision)._commit_hash or model.revision
    base = {"model": model.path, "model_revision": model.revision, "precision": model.precision}
    identity = base | {"weights": fingerprint(model.path, model.revision), "double_quant": model.double_quant,
                       "normalise_thai": s.normalise_thai, "system_prompt": s.system_prompt}  # fmt: skip
    plan = []
    for subject in subjects:
        study = subject.study() | base
        adapter = subject.adapter and file_sha256(subject.adapter / "adapter_config.json")
        known = identity | {"adapter": study["adapter_sha256"], "adapter_config": adapter}
        wanted = []
        for task in tasks:
            keys = {d: key_of(task, known, d, run) for d in depths}
            files = {d: result_file(results, subject, task, d) for d in depths}
            stale = [d for d in depths if not is_current(files[d], task, keys[d], options.judge)]
            if stale:
                spare_the_fuller(results, subject, task, stale, run)
                wanted.append((task, stale, keys))
        plan.append((subject, study, wanted))
        done = len(tasks) - len(wanted)
        if done:
            print(f"{subject.run}: {done} of {len(tasks)} tasks are complete already")
    everything = [part for _, _, wanted in plan for part in wanted]
    if everything:
        check_writable(results)
    grader = find_grader(everything, options.judge, s.max_new_tokens)
    tokenizer = model.tokenizer() if everything and not model.endpoint else None
    loaded, started = None, time.monotonic()
    for number, (subject, study, wanted) in enumerate(plan):
        if not wanted:
            continue
        if loaded is None and not model.endpoint:
            loaded = model.load(dtype, s.torch_compile)
        adapted = attach(loaded, subject, model)
        for task, stale, keys in wanted:
            begin = time.monotonic()
            tokens = score_task(task, stale, keys, subject, loaded, tokenizer, model, study, run, grader)
            seconds = time.monotonic() - begin
            note(results, subject, task, seconds, tokens, model, s.seed)
            where = f"model {number + 1} of {len(subjects)}, {time.monotonic() - started:.0f} s so far"
            print(f"{subject.run}: {task.name}, {len(task.items)} items in {seconds:.1f} s ({where})", flush=True)
        if adapted is not None:
            adapted.unload()
    print_results(results, subjects, tasks, depths)


def print_results(results: Path, subjects: list[Subject], tasks: list[Task], depths: list[int]) -> None:
    for subject in subjects:
        if subject.folder:
            tables.print_training(subject)
    for task in tasks:
        found = {(x.run, d): read_result(result_file(results, x, task, d)) for x in subjects for d in depths}
        tables.print_task(task, subjects, found, depths)
    if any(task.name in LANGUAGES for task in tasks):  # the other language may have been scored before
        rows = []
        for subject, depth in ((subject, depth) for subject in subjects for depth in depths):
            files = [results / subject.run / f"{name}-ut{depth}.items.jsonl" for name in LANGUAGES]
            if all(file.exists() for file in files):
                rows.append((subject.run, depth, *([line for _, line in read_file(file)] for file in files)))
        if rows:
            tables.print_gaps(rows)
    for subject in subjects:
        print(f"files: {results / subject.run}/" + (f" and {subject.folder}/" if subject.folder else ""))


def key_of(task: Task, known: dict, depth: int, run: Resolved) -> str:
    """SHA-256 of all that the numbers of a result depend on, but for a judge."""
    protocol, s = task.spec["protocol"], run.settings
    parts = {"format": FORMAT, "version": VERSION.get(protocol), "task": task.spec, "prompts": task.sha256,
             "revision": task.benchmark["revision"], "depth": depth, "limit": run.options.limit}  # fmt: skip
    if protocol in REPLIES:
        parts |= {"temperature": s.temperature, "seed": s.seed, "max_new_tokens": s.max_new_tokens}
    return digest(parts | known)


def is_current(file: Path, task: Task, key: str, choice: str) -> bool:
    """Whether a result is there, with its items, and of these inputs, rated as --judge says. One that is rated is not
    replaced by one that is not."""
    study = read_result(file) or {}
    if not file.with_suffix(".items.jsonl").exists():
        return False
    if task.spec["protocol"] == "mt_bench":
        return study.get("generation_key") == key and judge.is_rated(study, choice)
    return study.get("key") == key


def spare_the_fuller(results: Path, subject: Subject, task: Task, depths: list[int], run: Resolved) -> None:
    """Raises UserError where results of some items, asked for by --limit or --subsets, would replace those of more."""
    if not (run.options.limit or run.options.subsets):
        return
    for file in (result_file(results, subject, task, depth) for depth in depths):
        items = (read_result(file) or {}).get("items", 0)
        if items > len(task.items):
            raise UserError(
                f"{file} holds {items} items, and {len(task.items)} of them would replace it: name another folder by "
                "--results_dir, or move that one away"
            )


def attach(base: PreTrainedModel, subject: Subject, model: Model) -> PeftModel | None:
    """Puts the subject's adapter into the base's layers, computing as in training; None if it has none."""
    if subject.adapter is None:
        return None
    try:
        adapted = PeftModel.from_pretrained(base, subject.adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {subject.adapter}: {' '.join(str(error).split())}") from None
    if not any(config.use_dora for config in adapted.peft_config.values()):
        fuse(adapted, "nf4" if model.precision == "nf4" else "bf16")
    return adapted


def score_task(
    task: Task, depths: list[int], keys: dict, subject: Subject, loaded: PreTrainedModel | None, tokenizer,
    model: Model, study: dict, run: Resolved, grader: judge.Server | None,
) -> int:  # fmt: skip
    """Scores a task at some depths and saves each; the number of tokens that were read."""
    s, protocol = run.settings, task.spec["protocol"]
    scores, cut, longest = None, 0, None
    if protocol in REPLIES:
        outcomes = (
            replied(task, depth, keys[depth], subject, loaded, tokenizer, model, run, grader) for depth in depths
        )
    else:
        longest = None if model.looped else getattr(loaded.config, "max_position_embeddings", None)
        function = score_texts if protocol == "text" else score_choices
        outcomes, scores, cut = function(loaded, tokenizer, task, depths, s.eval_batch_tokens, longest, subject.run)
    if cut:
        print(f"  warning: {task.name}: {cut} prompts are longer than {longest} tokens and lost their beginning")
    for d, (depth, outcome) in enumerate(zip(depths, outcomes, strict=True)):
        block = {
            "format": FORMAT,
            **study,
            "total_ut_steps": depth,
            "task": task.name,
            "benchmark": task.spec["benchmark"],
            "protocol": task.spec.get("name", protocol),
            "aspect": task.spec["aspect"],
            "primary": task.spec.get("primary", False),
            "metric": METRIC[protocol],
            "higher_is_better": protocol != "text",
            "benchmark_revision": task.benchmark["revision"],
            "split": task.benchmark.get("split"),
            "limit": run.options.limit,
            "skipped": task.skipped,
            "replies_seed": s.seed if protocol in REPLIES else None,  # `seed` is the training's
            "prompt_sha256": task.sha256,
            "key": keys[depth],
            "exit_distribution": scores and scores.exits and scores.exits[d],
            "state_distance": scores.distances[: depth - 1] if scores else [],
            "inference_flops_per_token": loaded and forward_flops(loaded, depth),
            "thai_share": None,
            "judge": None,
            **outcome.numbers,
        }
        save(Path(s.results_dir), subject, task, depth, result(task, block, model), outcome.lines)
    return scores.tokens if scores else 0


def replied(
    task: Task, depth: int, key: str, subject: Subject, loaded: PreTrainedModel | None, tokenizer, model: Model,
    run: Resolved, grader: judge.Server | None,
) -> Outcome:  # fmt: skip
    """A task of replies at one depth. What was replied, and rated, before a process died is not asked for again."""
    s, who = run.settings, f"{subject.run} at {depth} loops, {task.name}"
    length = task.spec.get("max_new_tokens", s.max_new_tokens)
    if model.endpoint:
        chat = judge.find_endpoint(model.endpoint, length, s.temperature, s.seed, s.system_prompt)
    else:
        chat = chat_with(loaded, tokenizer, depth, s, length)
    cache = result_file(Path(s.results_dir), subject, task, depth).with_suffix(".cache.jsonl")
    cache = cache.with_name(f".{cache.name}")
    if task.spec["protocol"] == "generate":
        return score_replies(task, chat, key, cache, who, s.temperature)
    numbers, lines = judge.run_mt_bench(
        task.items, chat, grader, who=key, cache=cache, max_new_tokens=length, temperature=s.temperature, name=who
    )
    return Outcome(numbers | {"generation_key": key, "key": judge.result_key(key, grader and grader.model)}, lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_depths(text: str) -> list[int]:
    depths = sorted({int(part) for part in text.split(",") if part.strip().isdigit()})
    if not depths or depths[0] < 1 or len(depths) != len(text.split(",")):
        raise UserError(f"--ut_steps must be different loop counts like 1,2,3,4, got {text!r}")
    return depths


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ut_steps", help="loop depths to score (default: 1,2,3,4)")
    parser.add_argument("--limit", type=int, help="only the first items of each subset")
    parser.add_argument("--subsets", help="only these, as onet,ic where a local copy has no more")
    parser.add_argument("--base", action="store_true", help="the base alone")
    parser.add_argument("--adapter", help="a folder in PEFT format in place of an experiment")
    parser.add_argument("--endpoint", help="address of a served model (…/v1), for tasks of replies, with --ut_steps")
    parser.add_argument(
        "--judge", default="api", help="api: JUDGE_BASE_URL, JUDGE_MODEL, JUDGE_API_KEY; none: no ratings"
    )
    parser.add_argument("--model", help="a baseline of configs/evals.yaml, or a causal model: Hub id or folder")


def main() -> None:
    evaluate(resolve(__doc__, add_options=options, several=True))


if __name__ == "__main__":
    call(main)
