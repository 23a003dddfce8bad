"""The one settings layer.

    python train_qlora.py --config configs/default.yaml --exp exp2-wangchan-ut1 --learning_rate 1e-4
    python -m ouro.settings        # all of them as a Markdown table, for docs/

Order, the later one wins: the defaults below, the --config file, the experiment's row in configs/experiments.yaml, the
environment (CONFIG and those of FROM_ENVIRONMENT), the command line. Names are those of TRL's SFTConfig and
PEFT's LoraConfig wherever the setting exists there. A key or an option that is given twice is refused; ARGS of make may
repeat one that make gives.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ouro.files import (
    ROOT,
    Parser,
    UserError,
    call,
    nearest,
    one_line,
    place,
    read_json,
    read_yaml,
    regular,
    yaml_line,
)

REVISIONS = {  # the commits at which the published checkpoints are read
    "ByteDance/Ouro-2.6B": "1ed04250da1a9936042725d302e81c8fa2ab5abd",
    "ByteDance/Ouro-1.4B": "574fa66cb8bf5abdc979642d01cf2b79b16bfab1",
}
CONFIGS = ROOT / "configs"
EXPERIMENTS, STUDIES = CONFIGS / "experiments.yaml", CONFIGS / "studies.yaml"
DATASETS, EVALS = CONFIGS / "datasets.yaml", CONFIGS / "evals.yaml"
TUNED = "tuned"  # a learning rate that is chosen among runs
PLACES = ("model_name_or_path", "dataset_path", "paths", "cache_dir", "output_dir", "results_dir")
FROM_ENVIRONMENT = ("output_dir", "results_dir", "report_to", "total_ut_steps")  # as OUTPUT_DIR, RESULTS_DIR, …


LIMITS = {"at_least": -math.inf, "at_most": sys.float_info.max, "but_not": None, "one_of": (), "or_number": False}


def setting(default, text: str, changes: str = "learning", **limits):
    """A field of Settings; `limits` as in LIMITS: the bounds of a number, or the choices of a text.

    changes: what another value makes of a run.
    learning: other numbers are learnt, so the run is neither continued under it nor compared with others;
    run: its folder would hold another record, or the same numbers but for rounding: not continued, but compared;
    nothing: it may differ."""
    metadata = {"help": text, "changes": changes} | LIMITS | limits
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)


run_setting = functools.partial(setting, changes="run")
free_setting = functools.partial(setting, changes="nothing")
ARMS = ("equal-tokens", "equal-flops", "tuned", "quantised", "rates", "rank", "control")


@dataclasses.dataclass
class Settings:
    arm: str = run_setting("equal-tokens", "part of the study; runs of two arms are never pooled", one_of=ARMS)
    # model
    model_name_or_path: str = setting("ByteDance/Ouro-2.6B", "Hub id or folder of an Ouro checkpoint")
    model_revision: str | None = setting(None, "commit of the checkpoint; none: the pinned one")
    total_ut_steps: int = setting(4, "loops in training", at_least=1)
    loss: str = setting("last", "which loops' logits are trained", one_of=("last", "mixture", "all"))
    use_qlora: bool = setting(True, "frozen weights in NF4; false: in bf16 (fp32 without bf16)")
    frozen_weights: str = setting(
        "auto", "fp8: LoRA beside weights in e4m3 (Hopper and later); auto: as use_qlora says", one_of=("auto", "fp8")
    )
    bnb_4bit_use_double_quant: bool = setting(True, "quantise the NF4 scales too: 0.4 bit less per weight")
    bf16: bool = setting(True, "compute in bfloat16; false: float32, as on a CPU")
    # adapter
    r: int = setting(16, "rank of LoRA on the seven projections", at_least=1, at_most=2048)
    lora_alpha: int = setting(32, "LoRA's scale is lora_alpha / r", at_least=1)
    lora_dropout: float = setting(0.05, "dropout on LoRA's input", at_least=0, at_most=0.9)
    use_rslora: bool = setting(False, "LoRA's scale is lora_alpha / sqrt(r) instead (arXiv 2312.03732)")
    use_dora: bool = setting(False, "adapt direction and magnitude apart (arXiv 2402.09353); slow: PEFT's own layers")
    loraplus_lr_ratio: float = setting(
        1.0, "learning rate of B is this many times A's (LoRA+, arXiv 2402.12354)", at_least=0, but_not=0
    )
    # data
    dataset: str = setting("wangchan", "training set by name, a row of configs/datasets.yaml")
    dataset_path: str | None = run_setting(None, "folder or file in place of its Hub id; for `own` also a Hub id")
    paths: dict = run_setting({}, "the same for several: name=folder of datasets and benchmarks; adds to a config's")
    system_prompt: str | None = setting(None, "system turn of every row; none: as the chat template has it")
    normalise_thai: bool = setting(True, "drop zero-width characters, compose sara am, order marks; scoring too")
    licence: str = setting("all", "rows by their licence, see configs/datasets.yaml", one_of=("all", "permissive"))
    overlap: str = setting(
        "thai_exam,m3exam,openthaieval,mt_bench_thai,belebele,thai_text",
        "benchmarks, and tasks of texts, that no row may repeat, or none",
    )
    max_tokens: str | None = setting(
        None,
        "cut the training set to so many tokens, or as many as the set of this name has, rows evenly spaced",
    )
    shuffle_answers: bool = setting(False, "give each answer to another row's question: a control")
    development: bool = setting(
        False, "hold 2 % of the training rows out for the held-out loss: settings can be chosen by it, the test unseen"
    )
    drop_overlap: bool = setting(True, "drop rows that repeat a benchmark item; false: count them and train them")
    max_length: int = setting(16384, "longest row in tokens; longer ones: length_policy", at_least=8)
    length_policy: str = setting(
        "truncate_prompt",
        "rows longer than max_length: leave out (drop), shorten the question (truncate_prompt), train in pieces, each "
        "after what fits of the text before it (split), lose the answer's end (truncate), or refuse to start (error)",
        one_of=("drop", "truncate_prompt", "split", "truncate", "error"),
    )
    cache_dir: str = free_setting("cache", "tokenised rows are kept here")
    # floors below which training is refused
    max_empty_share: float = run_setting(0.01, "more rows without question or answer: wrong columns", at_least=0)
    max_garbled_share: float = run_setting(0.01, "more rows with U+FFFD or mojibake: wrong encoding", at_least=0)
    max_unbalanced_share: float = run_setting(0.01, "more rows with unpaired <think> tags: wrong format", at_least=0)
    max_too_long_share: float = run_setting(0.2, "more rows dropped or cut by length: wrong max_length", at_least=0)
    min_trained_share: float = run_setting(0.02, "a smaller share of trained tokens: swapped columns", at_least=0)
    min_end_survival: float = run_setting(0.99, "fewer answers trained to their end: a model cannot stop", at_least=0)
    # optimisation
    num_train_epochs: float = setting(3, "passes over the data", at_least=0, at_most=10**6, but_not=0)
    max_steps: int = setting(-1, "optimizer steps; -1: as num_train_epochs says", at_least=-1, at_most=10**9, but_not=0)
    rows_per_step: int = setting(32, "rows of an optimizer step, on any number of GPUs", at_least=1, at_most=10**6)
    pass_tokens: int | None = run_setting(None, "tokens of short rows at once; none: as memory allows", at_least=64)
    learning_rate: float = setting(2e-4, "peak; tuned: best of arm `rates` at this depth", at_least=0, at_most=1e30)
    lr_scheduler_type: str = setting(
        "cosine", "the learning rate after its rise", one_of=("cosine", "linear", "constant", "constant_with_warmup")
    )
    warmup_ratio: float = setting(0.05, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = setting(1.0, "gradient clipping; 0: none", at_least=0)
    optim: str = setting(
        "paged_adamw_8bit", "optimizer", one_of=("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit")
    )
    activation_checkpointing: str = run_setting(
        "auto", "how many layers are computed twice, for less memory and more time; auto: for each pass as few as fit",
        one_of=("auto", "none", "full"), or_number=True,
    )  # fmt: skip
    torch_compile: bool = run_setting(True, "fuse layers and loss into kernels; needs a GPU and a C compiler")
    fsdp: bool = run_setting(False, "share the layers' frozen weights out over the GPUs: less memory, but slow")
    seed: int = run_setting(42, "seed of everything", at_least=0, at_most=2**32 - 1)
    deterministic: bool = run_setting(False, "the same bytes from the same command on a GPU, too; slower")
    # while it runs
    save_steps: int = run_setting(100, "optimizer steps per checkpoint", at_least=1)
    save_total_limit: int = run_setting(2, "checkpoints kept, the newest", at_least=1)
    eval_steps: int = run_setting(100, "optimizer steps per measurement of the held-out loss; 0: never", at_least=0)
    eval_rows: int = run_setting(64, "rows that the held-out loss is measured on", at_least=1)
    # numbers that stop a run
    collapse_steps: int = run_setting(100, "the next two hold up to this step", at_least=0)
    min_loss: float = run_setting(0.02, "a smaller loss so soon: there is nothing to learn in the rows", at_least=0)
    max_token_accuracy: float = run_setting(0.995, "a higher token accuracy so soon: the same", at_least=0)
    max_loss_spike: float = run_setting(3.0, "a loss more than this many times the median of 50 steps", at_least=1)
    # evaluation
    tasks: str = free_setting(
        "thai_exam,thai_exam-helm,thai_exam-leaderboard,m3exam,belebele_thai,belebele_english,parallel_text_thai,"
        "parallel_text_english,thai_text,thai_wikipedia,english_text",
        "what evaluate.py scores, tasks of configs/evals.yaml",
    )
    max_new_tokens: int | None = free_setting(None, "longest reply; none: reply_characters of its task", at_least=1)
    temperature: float = free_setting(0.0, "of replies; 0: the likeliest token; published: 0.2", at_least=0, at_most=10)
    eval_batch_tokens: int = free_setting(8192, "tokens per forward pass in evaluate.py", at_least=1)
    # places and logs
    output_dir: str = free_setting("output", "runs are written to OUTPUT_DIR/<experiment>")
    results_dir: str = free_setting("results", "scores are written to RESULTS_DIR/<experiment>")
    logging_steps: int = run_setting(10, "optimizer steps per line of metrics.jsonl", at_least=1)
    report_to: str = free_setting("none", "where else metrics go", one_of=("none", "tensorboard", "wandb"))


REPLACED = dict.fromkeys(  # settings of TRL's that are none here, and what to write instead
    ("per_device_train_batch_size", "gradient_accumulation_steps", "packing"),
    "rows_per_step says how many rows a step has; how they go through the model is the machine's affair (pass_tokens)",
)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "name=folder, …"}
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
LEARNING = tuple(name for name, field in FIELDS.items() if field.metadata["changes"] == "learning")
TYPES = typing.get_type_hints(Settings)


@dataclasses.dataclass
class Resolved:
    """The settings of one run, where each came from, the run's name, and the script's own options."""

    settings: Settings
    origins: dict[str, str]
    run: str
    config: str | None
    options: argparse.Namespace

    def as_yaml(self) -> str:
        """config.yaml of a run: itself a valid --config file, the origins as comments."""
        lines = [f"# run {self.run}: every setting as resolved, and where it came from"]
        for name, value in dataclasses.asdict(self.settings).items():
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}  # {self.origins[name]}")
        return "".join(f"{yaml_line(line)}\n" for line in lines)


def choices(name: str) -> str:
    """What a setting that has a list of values may be, as a text; of others ""."""
    limits = FIELDS[name].metadata
    return ", ".join((*limits["one_of"], "a number") if limits["or_number"] else limits["one_of"])


def explained(name: str) -> str:
    return FIELDS[name].metadata["help"] + (f"; one of {choices(name)}" if choices(name) else "")


def converted(value: object, kind: type) -> object:
    """`value` (from YAML, the environment or the command line) as a `kind`; raises what `parse` catches."""
    if type(value) in (type(None), bool, dict, list) and type(value) is not kind:
        raise TypeError
    if kind is str and type(value) is float:  # YAML's 1.10 would become 1.1: it needs quotes
        raise TypeError
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if kind is dict:
        if not isinstance(value, dict):  # a folder's name may hold commas
            pairs = [pair.split("=", 1) for pair in re.split(r",\s*(?=[\w-]+=)", value.rstrip(",")) if pair]
            value = dict(pairs) if len(dict(pairs)) == len(pairs) else None
        if not all(isinstance(text, str) for text in (*value, *value.values())):
            raise TypeError
        return value
    if kind is int and not float(value).is_integer():
        raise ValueError
    return int(float(value)) if kind is int else kind(value)  # YAML reads 2e-4 as a text; float() takes both


def parse(name: str, value: object, origin: str) -> object:
    """`value` as the type of setting `name`; of one that may be null, null, none and nothing are null.
    Raises UserError: not of that type, or outside the setting's limits."""
    kind, *optional = typing.get_args(TYPES[name]) or (TYPES[name],)
    if optional and value in (None, "null", "none", ""):
        return None
    limits, refusal = FIELDS[name].metadata, None
    try:
        result = converted(value, kind)
        json.dumps(result, ensure_ascii=False).encode()  # bytes that are no text could not be recorded
        if name in PLACES:
            result = {key: place(path) for key, path in result.items()} if kind is dict else place(result)
    except UserError as error:
        raise UserError(f"{origin}: {name}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        result, refusal = value, f"be {KINDS[kind]}{' or null' if optional else ''}"
    else:
        if limits["one_of"] and result not in limits["one_of"] and not (limits["or_number"] and result.isdecimal()):
            refusal = f"be one of {choices(name)}"
        elif kind in (int, float) and not result >= limits["at_least"]:  # `not >=` also refuses nan
            refusal = f"be at least {limits['at_least']}"
        elif kind in (int, float) and result > limits["at_most"]:
            refusal = f"be at most {limits['at_most']}"
        elif result == limits["but_not"]:
            refusal = f"not be {limits['but_not']} ({limits['help']})"
    if refusal:
        raise UserError(f"{origin}: {name} must {refusal}, got {result!r}")
    return result


def resolve(
    description: str, argv: list[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None, several: bool = False,
) -> Resolved:  # fmt: skip
    """The settings of this call, from all sources in their order; `add_options` adds the script's own options.

    several: --exp may name several runs, comma-separated, then no experiment's row is applied; also seed0/NAME, and
    any run that is in OUTPUT_DIR.
    Raises UserError: an unknown setting (naming the nearest one), a value that does not fit, a missing file, an unknown
    experiment (listing those there are)."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of settings (environment: CONFIG)")
    parser.add_argument("--exp", help="an experiment of configs/experiments.yaml; also names the run's folders")
    if add_options:
        add_options(parser)
    group = parser.add_argument_group("settings, see ouro/settings.py")
    for name, default in vars(Settings()).items():
        kind = getattr(TYPES[name], "__name__", "str")
        text = f"{explained(name)} (default: {default})".replace("%", "%%")  # which argparse would fill in
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=kind.upper(), help=text)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        if (name := unknown[0].lstrip("-").partition("=")[0]) in REPLACED:
            raise UserError(f"command line: {name} is not a setting here: {REPLACED[name]}")
        known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        raise UserError(f"command line: unknown argument {unknown[0]!r}{nearest(unknown[0].lstrip('-'), known)}")

    config = place(options.config or os.environ.get("CONFIG") or "")
    sources: list[tuple[str, dict]] = []
    if config:
        sources.append((config, read_yaml(config, typed=True)))
    experiments = read_yaml(EXPERIMENTS) if options.exp else {}
    experiment = options.exp.rpartition("/")[2] if options.exp and several else options.exp
    if experiment in experiments:
        sources.append((f"experiment {options.exp}", experiments[experiment]))
    given = {name: os.environ.get(name.upper()) for name in FROM_ENVIRONMENT}
    sources += [(f"environment {name.upper()}", {name: value}) for name, value in given.items() if value]
    sources.append(("command line", {name: getattr(options, name) for name in FIELDS if hasattr(options, name)}))

    values, origins = {}, dict.fromkeys(FIELDS, "default")
    for origin, source in sources:
        for name, value in source.items():
            if name in REPLACED:
                raise UserError(f"{origin}: {name} is not a setting here: {REPLACED[name]}")
            if name not in FIELDS:
                raise UserError(f"{origin}: unknown setting {name!r}{nearest(str(name), FIELDS)}")
            tuned = name == "learning_rate" and value == TUNED
            parsed = TUNED if tuned else parse(name, value, origin)
            values[name] = values.get(name, {}) | parsed if isinstance(parsed, dict) else parsed
            origins[name] = origin
    if paths := values.get("paths"):
        evals = read_yaml(EVALS)
        known = {**read_yaml(DATASETS), **evals["benchmarks"], **evals["tasks"]}
        for name in paths.keys() - known.keys():
            raise UserError(f"{origins['paths']}: paths: unknown dataset or benchmark {name!r}{nearest(name, known)}")
    if values.get("learning_rate") == TUNED:
        del values["learning_rate"]  # where several runs may be named, nothing is trained
        if not several:
            chosen = tuned_rate(Settings(**values), read_yaml(EXPERIMENTS))
            values["learning_rate"], origins["learning_rate"] = chosen
    own, s = Path(config).stem if config else "run", Settings(**values)
    if one_line(own) != own:
        raise UserError(
            f"{config!r}: runs are named after this file: rename it without line feeds and control characters"
        )
    if options.exp:
        check_experiments(options.exp.split(",") if several else [options.exp], experiments, own, s, several)
    return Resolved(s, origins, options.exp or own, config, options)


def recorded_settings(folder: Path) -> Settings:
    """The settings in config.yaml of a run's folder.
    Raises UserError: it holds none, or one that cannot be; or it was edited after the run began."""
    recorded, origin = read_yaml(folder / "config.yaml"), f"{folder}/config.yaml"
    if not recorded:
        raise UserError(f"{origin} is empty: restore it from a copy, or train the run again with --overwrite")
    s, begun = Settings(**{n: parse(n, value, origin) for n, value in recorded.items() if n in FIELDS}), None
    with suppress(UserError):  # a manifest that is damaged, or not there yet, is others' to tell
        begun = read_json(folder / "manifest.json").get("settings")
    told = [
        f"{name} is {str(getattr(s, name))[:80]}, and was {str(value)[:80]}"
        for name, value in (begun.items() if isinstance(begun, dict) else ())
        if name in FIELDS and getattr(s, name) != value
    ]
    if told:
        remedy = "put the old values back, or train the run again (train_qlora.py --overwrite)"
        raise UserError(f"{origin} was edited after the run began: {'; '.join(told)}: {remedy}")
    return s


def begun_with(s: Settings) -> dict:
    """For a run's manifest.json, the settings that decide what is learnt, and to which part of the study it belongs.
    Not the places: the manifest has hashes of what lies there."""
    return {name: getattr(s, name) for name in (*LEARNING, "arm", "seed") if name not in PLACES}


def runs_in(folder: Path) -> list[str]:
    """The runs that are there, as --exp names them: NAME, and seed0/NAME."""
    files = [file for above in ("", "seed*/") for file in folder.glob(f"{above}*/config.yaml")]
    return sorted(file.parent.relative_to(folder).as_posix() for file in files)


def check_experiments(names: list[str], rows: dict, own: str, s: Settings, several: bool) -> None:
    """Raises UserError for a name that is no experiment, not the config's own, nor, where `several`, a run's."""
    there = runs_in(Path(s.output_dir)) if several else []
    for name in names:
        if (name.rpartition("/")[2] if several else name) in (*rows, own) or name in there:
            continue
        told, lines = nearest(name.rpartition("/")[2], rows), []
        if told.startswith("; known"):
            plain = [exp for exp, row in rows.items() if "arm" not in row]
            others = f"and {len(rows) - len(plain)} of other arms"
            told, lines = "", [f"configs/experiments.yaml holds: {', '.join(plain)}, {others}"]
        lines += [f"{s.output_dir} holds: {', '.join(there)}"] if there else []
        raise UserError(f"unknown experiment {name!r}{told}", *lines)


def tuned_rate(s: Settings, experiments: dict[str, dict]) -> tuple[float, str]:
    """The learning rate of the completed run of the arm `rates` at this depth and on this training set with the
    smallest held-out loss (the mean of its seeds), and among what it was chosen.
    Raises UserError: runs of that arm are missing, or were trained otherwise than this one will be."""
    here = Path(s.output_dir)
    root = here.parent if re.fullmatch(r"seed\d+", here.name) else here
    wanted = {name: row for name, row in experiments.items() if row.get("arm") == "rates"
              and (row["dataset"], row["total_ut_steps"]) == (s.dataset, s.total_ut_steps)}  # fmt: skip
    losses: dict[tuple[str, float], list[float]] = {}
    for folder in sorted([*root.glob("*/"), *root.glob("seed*/*/")]):
        if folder.name not in wanted or not (folder / "completed").exists():
            continue
        there = vars(recorded_settings(folder))
        own = ("learning_rate", *wanted[folder.name])
        if unlike := [name for name in LEARNING if name not in own and there[name] != getattr(s, name)]:
            trained = f"{folder} was trained with {unlike[0]} = {there[unlike[0]]}"
            raise UserError(f"learning_rate: tuned: {trained}, and this run has {getattr(s, unlike[0])}")
        lines = map(json.loads, regular(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if not (found := [line["held_out_loss"][-1] for line in lines if "held_out_loss" in line]):
            raise UserError(f"learning_rate: tuned: {folder} was trained without a held-out loss (eval_steps = "
                            f"{there['eval_steps']}): train it again, with --overwrite and --eval_steps")  # fmt: skip
        losses.setdefault((folder.name, there["learning_rate"]), []).append(found[-1])
    missing = sorted(wanted.keys() - {name for name, _ in losses})
    if missing or not wanted:
        arm = f"the arm `rates` on {s.dataset} with total_ut_steps = {s.total_ut_steps}"
        lacks = f"in {root} there is no completed {', '.join(missing) or 'run of it'}: make cluster-sweep STUDY=rates"
        raise UserError(f"learning_rate: tuned takes the best of {arm}, and {lacks}")
    means = {key: math.fsum(each) / len(each) for key, each in losses.items()}
    tried = [f"{name} at {rate:g}: {means[name, rate]:.4f}" for name, rate in sorted(means, key=lambda key: key[1])]
    return min(means, key=means.get)[1], f"tuned, by the held-out loss of {', '.join(tried)}"


HEAD = """# Settings

Printed by `python -m ouro.settings`. Another value changes *learning*: other numbers are learnt, so the run is neither
continued under it nor compared with others; the *run*: its folder would hold another record, or numbers that differ by
rounding, so it is compared, but not continued; or *nothing*: it may differ.
"""


def table() -> str:
    """docs/settings.md: of all settings the default, the meaning, and what another value makes of a run."""
    lines = [HEAD, "| setting | default | meaning | changes |", "|---|---|---|---|"]
    for name, default in vars(Settings()).items():
        changes = FIELDS[name].metadata["changes"]
        lines.append(f"| `{name}` | `{json.dumps(default)}` | {explained(name)} | {changes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    call(lambda: print(table(), end=""))
