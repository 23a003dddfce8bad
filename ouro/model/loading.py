"""A checkpoint -> model and tokenizer, from a folder or the Hub, at the pinned revision."""

import json
from pathlib import Path

from ouro.data.chats import END_OF_TURN
from ouro.files import UserError
from ouro.model.modeling_ouro import OuroConfig, OuroForCausalLM
from ouro.settings import REVISIONS

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase


def load_tokenizer(path: str, revision: str | None = None, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint (folder or Hub id), at the pinned revision, checked against the model's config.

    Raises:
        UserError: it cannot be read, has no chat template, its vocabulary lacks <|im_end|> or is larger than the
            model's, or `max_length` is more than the model's positions.
    """
    place = Path(path)
    if not place.exists() and (place.is_absolute() or (place.parent.is_dir() and place.parent != Path())):
        raise UserError(f"no folder {path} (and it does not look like a Hub id, org/name)")
    revision = revision or REVISIONS.get(path)
    try:
        config = OuroConfig.from_pretrained(path, revision=revision)  # first: without a network it fails sooner
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the tokenizer of {path}: {' '.join(str(error).split())}\n"
            "without a network: HF_HUB_OFFLINE=1 reads what was downloaded before (make fetch)"
        ) from None
    except (KeyError, ImportError):  # what transformers makes of a missing tokenizer.json
        raise UserError(f"cannot load the tokenizer of {path}: tokenizer.json is missing or damaged") from None
    except Exception as error:  # what the tokenizers library makes of an unreadable one, and nothing more special
        if type(error) is not Exception:
            raise
        raise UserError(f"cannot load the tokenizer of {path}: tokenizer.json is damaged: {error}") from None
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

    Raises:
        OSError: no such folder, repository or file, or no network and no cached copy (the message says which).
        ValueError: the checkpoint is not an Ouro model, or names of its tensors do not fit.
    """
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
    config = AutoConfig.from_pretrained(path, revision=revision)
    if not isinstance(config, OuroConfig):
        raise ValueError(f"{path} is a {config.model_type!r} model, not 'ouro'")
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
