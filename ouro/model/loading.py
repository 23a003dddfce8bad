"""A checkpoint and, if there is one, an adapter -> the model as it was trained, and its tokenizer.

    model = load_ouro("ByteDance/Ouro-2.6B")                                   # a checkpoint alone, pinned revision
    model = load_run_model(settings, folder / "final_adapter", device="cuda")  # a run's: chat, evaluation, export
    model = load_run_model(settings, LoraConfig(...), device="cuda")           # with a new adapter: training

How a run keeps its frozen weights (nf4, bf16, fp32, fp8) follows from its settings, and its model is read beside the
same weights: `frozen_here` says where a machine cannot do that.
"""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ouro.data.chats import END_OF_TURN
from ouro.files import WHOLE, Progress, UserError, file_sha256, from_json, one_line, regular
from ouro.model.cost import product_sizes
from ouro.model.lora import fuse
from ouro.model.modeling_ouro import PROJECTIONS, OuroConfig, OuroForCausalLM
from ouro.settings import REVISIONS, Settings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

Frozen = Literal["nf4", "bf16", "fp32", "fp8"]  # how frozen weights are kept
WEIGHTS = "adapter_model.safetensors"
# What transformers makes of JSON that it did not write.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError, RecursionError)
LARGEST = {"vocab_size": 1 << 20, "hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 1024,
           "num_attention_heads": 1024, "head_dim": 4096, "total_ut_steps": 256,
           "max_position_embeddings": 1 << 24}  # fmt: skip


@contextmanager
def loading(what: str, kinds: tuple[type[Exception], ...] = (OSError, ValueError, SafetensorError)) -> Iterator[None]:
    """Tells that it is being loaded, and makes of what goes wrong inside one UserError, "cannot load …"."""
    try:
        with Progress(f"loading {what}"):
            yield
    except Exception as error:
        if not isinstance(error, kinds) and type(error) is not Exception:  # which the library tokenizers raises
            raise
        why = " ".join(str(error).split())
        if "trust_remote_code" in why:
            why = "it needs code of its own, and code of a model's folder is never run"
        elif not isinstance(error, OSError | ValueError | SafetensorError):
            why = f"a file of it is missing or damaged ({type(error).__name__}: {why})"
        raise UserError(f"cannot load {what}: {why[:400]}") from None


def warn_of_depth(asked: int, known: int) -> None:
    if asked > known:
        print(f"warning: {asked} loops, and this model was made for {known}: deeper ones read worse in Ouro's paper")


def check_folder(path: str) -> None:
    """Raises UserError: a folder that is not there, and would be asked for on the Hub under that name."""
    place = Path(path)
    looks_local = path.startswith(("/", "./")) or (place.parent.is_dir() and place.parent != Path())
    if not place.exists() and looks_local:
        raise UserError(f"no folder {path} (and it does not look like a Hub id, org/name)")


def read_config(path: str, revision: str | None) -> PretrainedConfig:
    """The config.json of a folder or Hub id, of any causal model.
    Raises UserError: there is none, it asks for code of its own, or it has sizes that no model has (lists of so many
    layers, and then the layers, would be made before any weights are found not to fit)."""
    check_folder(path)
    revision = revision or REVISIONS.get(path)
    with loading(f"the model {path}", BROKEN):
        if Path(path).is_dir() and not Path(path, "config.json").exists():  # transformers would guess by the name
            raise OSError("there is no config.json in it")
        for file in Path(path).glob("*"):  # none of a Hub id
            regular(file, WHOLE if file.suffix in (".json", ".jinja", ".txt") else None)
        found, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        for name, most in LARGEST.items():
            size = found.get(name)
            may_lack = name not in found or name == "head_dim" and size is None
            if not may_lack and (type(size) is not int or not 1 <= size <= most):
                raise ValueError(f"config.json: {name} must be a whole number from 1 to {most:,}, found {size!r:.99}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if type(number := found.get(name, 1)) not in (int, float) or not 0 <= number < math.inf:
                raise ValueError(f"config.json: {name} must be a number, found {number!r:.99}")
        if (index := Path(path, "model.safetensors.index.json")).exists():  # model_files sees no others
            for name in set(json.loads(index.read_bytes())["weight_map"].values()):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(f"{index.name} names {name!r:.99}, which is no .safetensors file beside it")
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)


def model_files(path: str, revision: str | None) -> dict[str, str]:
    """What a model is: of one on the Hub its commit, of a folder the SHA-256 of each file that is read of it."""
    if not Path(path).is_dir():
        return {"commit": read_config(path, revision)._commit_hash or revision or "unknown"}
    files = (f for f in Path(path).iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".txt"))
    return {file.name: file_sha256(file) for file in sorted(files)}


def ouro_config(path: str, revision: str | None = None) -> OuroConfig:
    """As `read_config`, of an Ouro model. Raises UserError: it is another model, too."""
    config = read_config(path, revision)
    if not isinstance(config, OuroConfig):
        raise UserError(f"{path} is a {config.model_type!r} model, not 'ouro'")
    return config


def sizes(s: Settings) -> OuroConfig:
    """Of the settings' model if that is a folder, else of Ouro-2.6B. Errors as `ouro_config`."""
    return ouro_config(s.model_name_or_path) if Path(s.model_name_or_path).is_dir() else OuroConfig()


def load_tokenizer(path: str, revision: str | None = None, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint (folder or Hub id), at the pinned revision, checked against the model's config.
    Raises UserError: it cannot be read, has no chat template, its vocabulary lacks <|im_end|> or is larger than the
    model's, or `max_length` is more than the model's positions."""
    check_folder(path)
    revision = revision or REVISIONS.get(path)
    try:
        config = ouro_config(path, revision)  # first: without a network it fails sooner
        with loading(f"the tokenizer of {path}", BROKEN):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except UserError as error:
        advice = "without a network: HF_HUB_OFFLINE=1 reads what was downloaded before (make fetch)"
        raise UserError(*error.args, *([] if Path(path).exists() else [advice])) from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template (tokenizer_config.json: chat_template)")
    if END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {path} has no token {END_OF_TURN}: it is not Ouro's")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer of {path} has {len(tokenizer)} tokens, its model only {config.vocab_size}")
    if max_length and max_length > config.max_position_embeddings:
        raise UserError(
            f"max_length = {max_length} is more than the {config.max_position_embeddings} positions of {path}"
        )
    tokenizer.model_max_length = config.max_position_embeddings  # the published tokenizer claims twice as many
    return tokenizer


def load_ouro(
    path: str,
    revision: str | None = None,
    total_ut_steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    nf4: bool = False,
    double_quant: bool = True,
    device: str | int | torch.device = "cpu",
) -> OuroForCausalLM:
    """Loads an Ouro checkpoint from a folder or the Hub onto one device, in `dtype` or with NF4 frozen weights.

    The published repositories load at the revisions pinned in REVISIONS unless another is given. With `nf4` the layers'
    projections are quantised (bitsandbytes, computing in `dtype`); embeddings, norms, head and exit gate keep `dtype`.
    A folder whose config.json holds `init_seed` and that has no weights gives a random model, the same at every call.
    Raises UserError: as `ouro_config` does; OSError: no such file, or no network and no cached copy (the message says
    which); ValueError: names of its tensors do not fit."""
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
            # This list replaces the library's own, which names the head; the gate would be quantised without it.
            llm_int8_skip_modules=["lm_head", "early_exit_gate"],
        )
    revision = revision or REVISIONS.get(path)
    config = ouro_config(path, revision)
    if total_ut_steps is not None:
        config.total_ut_steps = total_ut_steps
    seed = getattr(config, "init_seed", None)
    state_dict = None
    if seed is not None and not list(Path(path).glob("*.safetensors")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state_dict = OuroForCausalLM(config).state_dict()
    model, info = OuroForCausalLM.from_pretrained(
        None if state_dict else path,
        config=config,
        state_dict=state_dict,
        revision=None if state_dict else revision,
        torch_dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        output_loading_info=True,
        use_safetensors=True,
        adapter_kwargs={"revision": revision},
    )
    wrong = {key: sorted(names)[:3] for key, names in info.items() if names}
    if wrong:
        raise ValueError(f"the tensors of {path} do not fit an Ouro model of its config.json: {json.dumps(wrong)}")
    for module in model.modules():
        # On CPUs with bf16 instructions bitsandbytes would, at the first forward in eval mode, round the scales to bf16
        # for good and compute in bf16: scores would belong to another model than the one trained, and vary by machine.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.name_or_path = model.config._name_or_path = path
    model.generation_config.eos_token_id = [0, 2]  # a turn ends with <|im_end|> = 2, the published config says only 0
    model.generation_config.pad_token_id = 0
    return model


def frozen_kind(s: Settings) -> Frozen:
    """How a run of these settings keeps its frozen weights."""
    if s.frozen_weights == "fp8":
        return "fp8"
    return "nf4" if s.use_qlora else "bf16" if s.bf16 else "fp32"


def has_fp8() -> bool:
    """Whether this machine's GPU multiplies in fp8: a Hopper, or a later one."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def frozen_here(s: Settings, who: str) -> Frozen:
    """The frozen weights beside which this machine can read a run: its own, or, with a warning, bf16 in place of fp8.
    Raises UserError: bf16 without a GPU."""
    if s.bf16 and not torch.cuda.is_available():
        raise UserError(f"{who} computes in bf16 on a GPU, and no CUDA GPU is found here")
    kind = frozen_kind(s)
    if kind == "fp8" and not has_fp8():
        print(
            f"warning: {one_line(who)} has frozen weights in fp8, which need a Hopper GPU (H100, H200) or a later "
            "one; here it is read beside bf16 weights, which are nearly the same"
        )
        return "bf16"
    return kind


def adapter_shapes(config: OuroConfig, rank: int, dora: bool) -> dict[str, list[int]]:
    """Name and shape of every tensor of an adapter of these layers' projections."""
    shapes = {}
    products = list(zip(PROJECTIONS, product_sizes(config), strict=True))
    for layer, (name, (into, out)) in itertools.product(range(config.num_hidden_layers), products):
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        place = f"base_model.model.model.layers.{layer}.{block}.{name}"
        shapes |= {f"{place}.lora_A.weight": [rank, into], f"{place}.lora_B.weight": [out, rank]}
        if dora:
            shapes[f"{place}.lora_magnitude_vector"] = [out]
    return shapes


# What a saved adapter computes follows from these alone, here and in a run's config.yaml; PEFT is told no more.
COMPUTED = ("r", "lora_alpha", "use_rslora", "use_dora")
# What adapter_config.json may say besides. Any other key, of a later PEFT too, must be null, false or empty: it would
# train other tensors, change the base (layer_replication, PiSSA's and OLoRA's first weights) or the products.
BESIDES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (None, True, False, "gaussian")}
WITHOUT_MEANING = ("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode",
                   "lora_dropout", "megatron_core", "qalora_group_size", "target_modules")  # fmt: skip


def adapter_config(adapter: Path) -> tuple[LoraConfig, str | None]:
    """A saved LoRA adapter of all projections as PEFT is to load it, and the base that it was made for.
    Raises UserError: a missing or broken file, naming the key that is wrong or stands twice."""
    try:
        found = from_json(regular(adapter / "adapter_config.json", WHOLE).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{adapter} is no adapter in PEFT format: adapter_config.json: {error}") from None
    if not isinstance(found, dict) or type(found.get("r")) is not int:
        raise UserError(f"{adapter} is no adapter in PEFT format: adapter_config.json holds no rank, 'r'")
    values = {"use_rslora": False, "use_dora": False} | found
    names, alpha = found.get("target_modules"), found.get("lora_alpha")
    right = {key: found.get(key) in allowed for key, allowed in BESIDES.items()}
    right["bias"] |= "bias" not in found
    right["target_modules"] = isinstance(names, list) and sorted(map(str, names)) == sorted(PROJECTIONS)
    right["lora_alpha"] = type(alpha) in (int, float) and 0 < alpha < math.inf
    right |= {key: isinstance(values[key], bool) for key in ("use_rslora", "use_dora")}
    right |= {key: not found[key] for key in found.keys() - {*right, *COMPUTED, *WITHOUT_MEANING}}
    if wrong := [key for key, fits in right.items() if not fits]:
        said = json.dumps(found.get(wrong[0]), ensure_ascii=False)
        raise UserError(
            f"{adapter} is no LoRA adapter in PEFT format of all projections: adapter_config.json has "
            f"{wrong[0]} = {said if wrong[0] in found else 'nothing'}"
        )
    config = LoraConfig(**{key: values[key] for key in COMPUTED}, target_modules=names, task_type="CAUSAL_LM")
    return config, found.get("base_model_name_or_path")


def check_adapter(adapter: Path, s: Settings, trained: Settings | None) -> None:
    """That an adapter belongs to the settings' base, tensor by tensor, and to its run's settings (None: of no run).
    Raises UserError: a missing or broken file, another base or scale than recorded, other tensors than the base's
    layers take (PEFT would leave them out, and begin anew where some are missing), or one that is no number anywhere or
    zero everywhere, with which it would score as the base."""
    config, made_for = adapter_config(adapter)
    for key in COMPUTED:
        if trained and getattr(trained, key) != getattr(config, key):
            here, there = getattr(config, key), getattr(trained, key)
            raise UserError(f"{adapter} has {key} = {here}, and its run's config.yaml says {key}: {there}")
    try:
        with safe_open(regular(adapter / WEIGHTS), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{adapter} is no adapter in PEFT format: {WEIGHTS}: {error}") from None
    there = {name: list(tensor.shape) for name, tensor in tensors.items()}
    base = s.model_name_or_path
    if made_for != base:
        raise UserError(f"{adapter} was made for {made_for}, model_name_or_path is {base}")
    layers = read_config(base, s.model_revision)
    wanted = adapter_shapes(layers, config.r, config.use_dora)
    for name in (*there, *wanted):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{adapter} does not fit {base} ({layers.num_hidden_layers} layers): {name} is "
                f"{there.get(name, 'missing')}, and {wanted.get(name, 'no such tensor')} belongs there"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{adapter}: {name} is in {tensor.dtype}; float32, bfloat16 or float16 can be read")
        if not tensor.isfinite().all():
            raise UserError(f"{adapter}: {name} holds NaN or infinity: training diverged, or the file is damaged")
    zero = [name for name, tensor in tensors.items() if not tensor.any()]
    if zero and zero == [name for name in tensors if "lora_B" in name]:
        print(
            f"warning: {one_line(adapter)} adds nothing to the base: every lora_B is zero, as before the first "
            "step that trains"
        )
    elif zero:
        raise UserError(f"{adapter}: {zero[0]} is all zero, others are not: the file is damaged")


def put_adapter(
    model: OuroForCausalLM, adapter: Path | LoraConfig | None, frozen: Frozen, fused: bool = True
) -> OuroForCausalLM | PeftModel:
    """Puts a saved or a new adapter into the model's layers, in place; None: the model computes without one.

    fused: groups of projections compute together, which is how they are trained; DoRA is left to PEFT's own layers.
    Raises UserError: the adapter cannot be read, or not beside such weights."""
    if adapter is None:
        if frozen != "fp8":
            return model
        adapter = LoraConfig(r=8, target_modules=PROJECTIONS)  # groups compute in fp8; a new B is zero, adds nothing
        return put_adapter(model, adapter, frozen).eval()
    if isinstance(adapter, LoraConfig):
        adapted = get_peft_model(model, adapter)
    else:
        config, _ = adapter_config(adapter)
        with loading(f"the adapter {adapter}"):
            device = str(model.device)
            adapted = PeftModel.from_pretrained(model, adapter, config=config, torch_device=device).eval()
    dora = any(config.use_dora for config in adapted.peft_config.values())
    if dora and frozen == "fp8":
        raise UserError(f"{adapter}: DoRA is trained and read beside bf16 or NF4 weights, not fp8")
    if fused and not dora:
        fuse(adapted, "bf16" if frozen == "fp32" else frozen)
    return adapted


@contextmanager
def with_adapter(model: OuroForCausalLM, adapter: Path | None, frozen: Frozen) -> Iterator[None]:
    """`put_adapter` for the length of a `with` block: afterwards the model is as it was, ready for another adapter."""
    kept = [(p, p.data) for p in model.parameters()] if frozen == "fp8" else []  # `fuse` empties some
    adapted = put_adapter(model, adapter, frozen)
    yield
    if adapted is not model:
        adapted.unload()
    for parameter, data in kept:
        parameter.data = data


def load_run_model(
    s: Settings,
    adapter: Path | LoraConfig | None = None,
    *,
    frozen: Frozen | None = None,
    device: str | int | torch.device = "cpu",
    total_ut_steps: int | None = None,
    fused: bool = True,
) -> OuroForCausalLM | PeftModel:
    """The model of a run with these settings, on one device, as training, evaluation, chat and export need it.

    adapter: a saved one, a new one, or none. frozen: the kind of the frozen weights; None: as in the run's training.
    fused: see `put_adapter`. total_ut_steps: loops; None: as the checkpoint says.
    Raises UserError: base or adapter cannot be read, or they do not belong together."""
    if isinstance(adapter, Path):
        check_adapter(adapter, s, s)
    frozen = frozen or frozen_kind(s)
    with loading(f"the model {s.model_name_or_path}"):
        model = load_ouro(
            s.model_name_or_path,
            s.model_revision,
            total_ut_steps=total_ut_steps,
            dtype=torch.bfloat16 if s.bf16 else torch.float32,
            nf4=frozen == "nf4",
            double_quant=s.bnb_4bit_use_double_quant,
            device=device,
        )
    return put_adapter(model, adapter, frozen, fused)
