"""Models under test: the base, trained runs, adapter folders, baselines, served models."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ouro.evaluate import benchmarks
from ouro.evaluate.benchmarks import digest
from ouro.evaluate.endpoint import find_endpoint
from ouro.evaluate.scoring import readout
from ouro.files import UserError, read_yaml
from ouro.model.cost import product_sizes
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.model.lora import fuse
from ouro.settings import EXPERIMENTS, REVISIONS, Resolved, Settings
from ouro.train.run_folder import recorded_settings, run_settings

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PLAIN = "{{ bos_token or '' }}{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"


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


def trained_subject(run: Resolved, name: str) -> Subject:
    folder, trained = run_settings(run, name)
    experiment = name.rpartition("/")[2]
    subject = Subject(name, "adapter", folder / "final_adapter", folder, trained, experiment)
    wanted = read_yaml(EXPERIMENTS).get(experiment, {})
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
        name = find_endpoint(options.endpoint).model
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
