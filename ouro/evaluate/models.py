"""Models under test: the base, trained runs, adapter folders, baselines, served models.

All that one command scores share their weights, which are loaded once: `Weights` and, upon them, each `ModelUnderTest`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ouro.evaluate import benchmarks
from ouro.evaluate.benchmarks import digest
from ouro.evaluate.endpoint import DEPTHS, find_endpoint
from ouro.evaluate.scoring import readout
from ouro.files import SUMS, UserError, file_sha256, one_line, read_json, read_yaml
from ouro.model.loading import (
    BROKEN,
    check_adapter,
    frozen_here,
    frozen_kind,
    load_run_model,
    load_tokenizer,
    loading,
    read_config,
)
from ouro.settings import EXPERIMENTS, REVISIONS, Resolved, Settings, recorded_settings
from ouro.train.run_folder import RETRAIN, run_settings, whole

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PLAIN = "{{ bos_token or '' }}{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"


@dataclass
class ModelUnderTest:
    """A model whose results are in RESULTS_DIR/<run>: the base, the base with an adapter, or a baseline."""

    run: str
    kind: str  # base, adapter or baseline
    adapter: Path | None = None  # folder in PEFT format
    folder: Path | None = None  # of the training run
    trained: Settings | None = None
    experiment: str | None = None
    published: tuple[dict, ...] = ()

    def study(self) -> dict:
        """The part of the study block that is the same for all tasks and depths."""
        report, language = self.folder and self.folder / "data_report.json", None
        if report and report.exists():
            language = read_json(report).get("language")
        s = self.trained
        return {
            "run": self.run,
            "kind": self.kind,
            "experiment": self.experiment,
            **{name: getattr(s, name, None) for name in ("seed", "arm", "dataset", "loss")},
            "language": language,  # of the training set
            "trained_ut_steps": s and s.total_ut_steps,
            "trained_precision": s and frozen_kind(s),  # of the frozen weights; `precision` is what they are read in
            "adapter_sha256": self.adapter and file_sha256(self.adapter / "adapter_model.safetensors"),
            "data_report_sha256": file_sha256(report) if report and report.exists() else None,
            "published": self.published,
        }


@dataclass
class Weights:
    """The weights that all models under test of a command share, an Ouro base or a baseline; or a served model's
    name."""

    path: str
    revision: str | None
    precision: str
    double_quant: bool = True
    looped: bool = True
    endpoint: str | None = None  # address of a server that has it loaded
    served_depths: list[int] = field(default_factory=list)  # where the server tells

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.looped:
            return load_tokenizer(self.path, self.revision)
        with loading(f"the tokenizer of {self.path}", BROKEN):
            tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision, trust_remote_code=False)
        if tokenizer.chat_template is None:  # a model that was never taught one
            tokenizer.chat_template = PLAIN
        return tokenizer

    def load(self, s: Settings) -> PreTrainedModel:
        """The base or baseline without an adapter. s: the settings that a base belongs to."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not self.looped:
            with loading(f"the model {self.path}"):
                how = {"torch_dtype": torch.bfloat16 if s.bf16 else torch.float32, "device_map": {"": device}}
                how |= {"revision": self.revision, "use_safetensors": True}
                network = AutoModelForCausalLM.from_pretrained(self.path, trust_remote_code=False, **how)
            check_readout(network.eval())
            return network
        s = replace(s, model_name_or_path=self.path, model_revision=self.revision)
        # `with_adapter` makes the fp8 weights, with each adapter: there they are kept in groups.
        network = load_run_model(s, frozen="bf16" if self.precision == "fp8" else self.precision, device=device)
        if s.torch_compile and device == "cuda":
            network.compile_layers()
            print("its layers are compiled while the first batch is read", flush=True)
        return network


@torch.no_grad()
def check_readout(network: PreTrainedModel) -> None:
    """Refuses a model whose logits are not its head times its last state, as some architectures scale them.
    Raises UserError: so it is, or they are NaN."""
    ids = torch.arange(8, device=network.device)[None]
    ours = readout(network, network.base_model(input_ids=ids).last_hidden_state[0])
    theirs = network(input_ids=ids).logits[0].to(ours.dtype).log_softmax(-1)
    if not theirs.isfinite().all():
        raise UserError(f"{network.name_or_path}: its log-probabilities are no numbers (NaN): are its weights damaged?")
    if not torch.allclose(ours, theirs, atol=0.05):
        name = network.config.model_type
        raise UserError(f"{name}: its logits are not its head times its state, which is not supported")


def find_models(run: Resolved) -> tuple[Weights, Settings, list[ModelUnderTest]]:
    """What the command asks to score, the base first; and the settings under which the weights are loaded.
    Raises UserError: an unknown or untrained experiment, or several that do not share a base."""
    options, s = run.options, run.settings
    if sum(bool(x) for x in (options.exp, options.adapter, options.model, options.base, options.endpoint)) > 1:
        raise UserError("give one of --exp, --adapter, --model, --base and --endpoint")
    if options.endpoint:
        server = find_endpoint(options.endpoint, s.max_new_tokens, s.temperature, s.seed, s.system_prompt)
        name, depths = server.model, server.depths()
        identity, url = server.identity, options.endpoint
        weights = Weights(name, identity, "served", looped=False, endpoint=url, served_depths=depths)
        name = DEPTHS.sub("", name) if depths else name  # the names of its results tell them
        return weights, s, [ModelUnderTest(f"baseline-{name.strip('/').replace('/', '--')}", "baseline")]
    if options.model:
        return find_baseline(options.model, s)
    if options.base:
        return upon_one_base(run, [])
    if options.adapter:
        return upon_one_base(run, [find_adapter(options.adapter)])
    names = dict.fromkeys((options.exp or run.run).split(","))
    return upon_one_base(run, [find_run(run, name) for name in names])


def find_baseline(name: str, s: Settings) -> tuple[Weights, Settings, list[ModelUnderTest]]:
    """A row of evals.yaml, a folder, or a Hub id."""
    rows = benchmarks.table()["baselines"]
    if name not in rows and "/" not in name and not Path(name).exists():
        raise UserError(f"unknown baseline {name!r}: neither a folder nor one of {', '.join(rows)}")
    row = rows.get(name, {"hub_id": name})
    path, revision = row["hub_id"], row.get("revision") or REVISIONS.get(row["hub_id"])
    s = replace(s, bf16=s.bf16 and torch.cuda.is_available(), use_qlora=False, frozen_weights="auto")
    looped = read_config(path, revision).model_type == "ouro"  # an Ouro of the Hub, or what make merge wrote
    run, published = f"baseline-{one_line(name).rstrip('/').replace('/', '--')}", tuple(row.get("published", ()))
    model = ModelUnderTest(run, "baseline", published=published)
    return Weights(path, revision, frozen_kind(s), looped=looped), s, [model]


def find_run(run: Resolved, name: str) -> ModelUnderTest:
    """A run that train_qlora.py has completed, NAME or seed0/NAME.
    Raises UserError: there is none, or it was trained at another depth or on another set than its experiment now says.
    """
    folder, trained = run_settings(run, name)
    experiment = name.rpartition("/")[2]
    wanted = read_yaml(EXPERIMENTS).get(experiment, {})
    for key in ("total_ut_steps", "dataset"):
        asked, where = wanted.get(key, getattr(trained, key)), f"{experiment} of configs/experiments.yaml"
        if run.origins[key].startswith(("command line", "environment")):
            asked, where = getattr(run.settings, key), f"the {run.origins[key]}"
        if asked != getattr(trained, key):
            had, remedy = getattr(trained, key), "train it under another name, or into another --output_dir"
            raise UserError(f"{folder} was trained with {key} = {had}, and {where} says {asked}: {remedy}")
    return ModelUnderTest(name, "adapter", folder / "final_adapter", folder, trained, experiment)


def find_adapter(place: str) -> ModelUnderTest:
    """Any folder in PEFT format; one that train_qlora.py wrote brings its run's settings."""
    adapter = Path(place)
    if not (adapter / "adapter_config.json").exists() and (adapter / "final_adapter").exists():
        adapter /= "final_adapter"
    folder = adapter.parent if (adapter.parent / "config.yaml").exists() else None
    whole = adapter.resolve()
    name = one_line(whole.parent.name if whole.name == "final_adapter" else whole.name)
    trained = recorded_settings(folder) if folder else None
    # The hash tells folders of one name apart, as seed0/exp2 and seed1/exp2.
    return ModelUnderTest(f"adapter-{name}-{digest(str(whole))[:8]}", "adapter", adapter, folder, trained)


def upon_one_base(run: Resolved, adapted: list[ModelUnderTest]) -> tuple[Weights, Settings, list[ModelUnderTest]]:
    """The base that the adapters share, as weights and as the first of the models under test.
    Raises UserError: they do not share one, or an adapter does not fit it."""
    s, bases = run.settings, {}  # bases: what all models must share -> the runs that have it
    for model in adapted or [ModelUnderTest(f"the base {s.model_name_or_path}", "base")]:
        t = model.trained or s
        key = t.model_name_or_path, t.model_revision, frozen_here(t, model.run), t.bf16, t.bnb_4bit_use_double_quant
        bases.setdefault((*key, t.normalise_thai), []).append(model.run)
    if len(bases) > 1:
        several = "; ".join(f"{', '.join(names)}: {key[0]}, {key[2]}, bf16 {key[3]}" for key, names in bases.items())
        raise UserError(f"these do not share a base, precision and spelling; score them apart: {several}")
    path, revision, precision, _, double_quant, spelling = next(iter(bases))
    if spelling != s.normalise_thai:
        raise UserError(f"trained with normalise_thai {spelling}: add --normalise_thai {str(spelling).lower()}")
    base = replace((adapted and adapted[0].trained) or s, torch_compile=s.torch_compile)
    for model in adapted:
        if (model.adapter / SUMS).exists():  # which training writes
            whole(model.adapter, f"restore it from a copy, or {RETRAIN}")
        check_adapter(model.adapter, base, model.trained)
    weights = Weights(path, revision or REVISIONS.get(path), precision, double_quant)
    return weights, base, [ModelUnderTest(f"base-{precision}", "base"), *adapted]
