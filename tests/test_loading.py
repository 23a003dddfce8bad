"""Checkpoints, LoRA adapters and NF4: what is saved, and what is accepted."""

import json
from pathlib import Path

from ouro.model import modeling_ouro
from ouro.model.loading import load_ouro
from ouro.model.modeling_ouro import PROJECTIONS, OuroConfig, OuroForCausalLM, OuroModel

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_ouro import MEDIUM, SIZES, VOCAB, assert_close, randomise, tiny, tiny_config, tokens
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s['total_ut_steps']}x{s['num_hidden_layers']}")
IDS = tokens(2, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model, in float32."""
    tiny().float().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------------------------------------- saved and loaded


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_comes_back_bit_equal_without_remote_code(tmp_path, size, dtype):
    model = tiny(size).to(dtype)
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto"),
        load_ouro(str(tmp_path), dtype=dtype),
    ):
        assert type(loaded) is OuroForCausalLM and not loaded.training
        weights, saved = loaded.state_dict(), model.state_dict()
        assert weights.keys() == saved.keys()
        assert all(weights[name].dtype == dtype and torch.equal(weights[name], saved[name]) for name in saved)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is OuroModel


def test_saved_config_holds_what_the_published_code_reads(folder):
    saved = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        "auto_map": {
            "AutoConfig": "ByteDance/Ouro-2.6B--configuration_ouro.OuroConfig",
            "AutoModel": "ByteDance/Ouro-2.6B--modeling_ouro.OuroModel",
            "AutoModelForCausalLM": "ByteDance/Ouro-2.6B--modeling_ouro.OuroForCausalLM",
        },
        "vocab_size": VOCAB,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "initializer_range": 0.3,
        "rms_norm_eps": 0.01,
        "use_cache": True,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "layer_types": ["full_attention"] * 2,
        "attention_dropout": 0.0,
        "total_ut_steps": 3,
        "early_exit_step": None,
        "early_exit_threshold": 1.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "torch_dtype": "float32",
    }
    assert {key: saved.get(key, "missing") for key in expected} == expected


def test_published_layout_loads_without_running_its_code(folder):
    for file in ("modeling_ouro.py", "configuration_ouro.py"):
        (folder / file).write_text("raise RuntimeError('the remote code ran')\n")
    auto_map = {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModel": "modeling_ouro.OuroModel"}
    auto_map["AutoModelForCausalLM"] = "modeling_ouro.OuroForCausalLM"
    change_config(folder, auto_map=auto_map, early_exit_threshold=1.0, chunk_size=2, max_window_layers=2, future=[1])
    (folder / "generation_config.json").unlink()  # as in the published repository
    expected = tiny().float()(IDS).logits
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), load_ouro(str(folder), dtype=torch.float32)):
        assert type(loaded) is OuroForCausalLM and loaded.config.future == [1]
        assert torch.equal(loaded(IDS).logits, expected)
        loaded.save_pretrained(folder.parent / "again")
        config = AutoConfig.from_pretrained(folder.parent / "again")
        assert all(entry.startswith("ByteDance/Ouro-2.6B--") for entry in config.auto_map.values())


@sizes
def test_state_dict_has_the_published_names(size):
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    for i in range(size["num_hidden_layers"]):
        parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
        parts += ["input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"]
        names |= {f"model.layers.{i}.{part}.weight" for part in parts}
    assert tiny(size).state_dict().keys() == names
    assert len(names) == 11 * size["num_hidden_layers"] + 5


@pytest.mark.parametrize(("layers", "tensors", "number"), [(48, 533, 2_667_974_657), (24, 269, 1_434_652_673)])
def test_size_of_the_published_models(layers, tensors, number):
    with torch.device("meta"):
        model = OuroForCausalLM(OuroConfig(num_hidden_layers=layers))
    assert sum(p.numel() for p in model.parameters()) == number
    assert len(model.state_dict()) == tensors
    if layers == 48:
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules=PROJECTIONS), low_cpu_mem_usage=True)
        assert adapted.get_nb_trainable_parameters()[0] == 30_277_632


@pytest.mark.parametrize(
    "value",
    [
        {"num_key_value_heads": 1},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"use_sliding_window": True, "sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"]},
        {"tie_word_embeddings": True},
    ],
    ids=lambda value: next(iter(value)),
)
def test_unsupported_settings_are_refused(folder, value):
    with pytest.raises(ValueError, match=next(iter(value))):
        tiny_config(**value)
    change_config(folder, **value)
    with pytest.raises(ValueError, match=next(iter(value))):
        load_ouro(str(folder))


def test_fresh_weights_follow_the_config():
    model = OuroForCausalLM(OuroConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.numel() > 64:
            assert 0.018 < p.std() < 0.022, name


# ---------------------------------------------------------------------------------------------------------- load_ouro


def rename(weights):
    weights["model.norms.weight"] = weights.pop("model.norm.weight")


def drop(weights):
    del weights["model.layers.1.input_layernorm_2.weight"]


def add(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(12)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [(rename, "model.norms.weight"), (drop, "layers.1.input_layernorm_2.weight"), (add, "q_proj.bias")],
)
def test_checkpoint_with_other_tensor_names_is_refused(folder, spoil, named, nf4):
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named):
        load_ouro(str(folder), dtype=torch.float32, nf4=nf4)


def test_folder_of_another_model_is_refused(folder):
    change_config(folder, model_type="llama")
    with pytest.raises(ValueError, match="'llama' model"):
        load_ouro(str(folder))


def test_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_ouro(str(tmp_path / "nowhere"))


def test_published_repositories_load_at_pinned_revisions(monkeypatch):
    asked = []

    def note(path, revision):
        asked.append((path, revision))
        raise OSError("noted")

    monkeypatch.setattr(modeling_ouro.AutoConfig, "from_pretrained", note)
    for path, revision in (
        ("ByteDance/Ouro-2.6B", None),
        ("ByteDance/Ouro-1.4B", None),
        ("ByteDance/Ouro-2.6B", "abc"),
    ):
        with pytest.raises(OSError, match="noted"):
            load_ouro(path, revision=revision)
    assert asked == [
        ("ByteDance/Ouro-2.6B", "1ed04250da1a9936042725d302e81c8fa2ab5abd"),
        ("ByteDance/Ouro-1.4B", "574fa66cb8bf5abdc979642d01cf2b79b16bfab1"),
        ("ByteDance/Ouro-2.6B", "abc"),
    ]


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_number_of_loops_can_be_set_at_load(folder, loops):
    model = load_ouro(str(folder), total_ut_steps=loops, dtype=torch.float32)
    assert model.config.total_ut_steps == loops
    assert torch.equal(model(IDS).logits, tiny().float()(IDS, total_ut_steps=loops).logits)
    assert len(model(IDS, output_loops=True).loop_logits) == loops


def test_loaded_model_stops_at_the_end_of_a_turn(folder):
    model = load_ouro(str(folder), dtype=torch.float32)
    assert model.generation_config.eos_token_id == [0, 2] and model.generation_config.pad_token_id == 0
    model.lm_head.weight.data[2] = 100 * model(IDS, output_loops=True).loop_hidden_states[-1][0, -1]
    assert model.generate(IDS[:1], max_new_tokens=5, do_sample=False)[0, 9:].tolist() == [2]


# ---------------------------------------------------------------------------------------- NF4, and weights from a seed


@pytest.fixture
def seeded(tmp_path: Path) -> str:
    """A folder with a config that asks for random weights. Sizes are multiples of 64, the block of NF4."""
    size = MEDIUM | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    tiny_config(size, init_seed=7, initializer_range=0.1).save_pretrained(tmp_path)
    return str(tmp_path)


def seeded_model(folder: str, **kwargs) -> OuroForCausalLM:
    return randomise(load_ouro(folder, dtype=torch.float32, **kwargs))


@pytest.mark.parametrize("nf4", [False, True])
def test_weights_from_a_seed_are_the_same_at_every_load(seeded, nf4):
    state = torch.random.get_rng_state()
    first = load_ouro(seeded, dtype=torch.float32, nf4=nf4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    second = load_ouro(seeded, dtype=torch.float32, nf4=nf4)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    change_config(Path(seeded), init_seed=8)
    assert not torch.equal(load_ouro(seeded, dtype=torch.float32, nf4=nf4)(IDS).logits, first(IDS).logits)


def test_saved_weights_win_over_the_seed(folder):
    change_config(folder, init_seed=7)
    assert torch.equal(load_ouro(str(folder), dtype=torch.float32)(IDS).logits, tiny().float()(IDS).logits)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_nf4_quantises_the_projections_only_and_computes_with_what_it_stored(seeded, tmp_path, saved, double_quant):
    plain, source = seeded_model(seeded), seeded
    if saved:  # the same weights, from a file
        source = str(tmp_path / "saved")
        plain.save_pretrained(source)
    model = seeded_model(source, nf4=True, double_quant=double_quant)
    quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert {name.split(".")[-1] for name in quantised} == set(PROJECTIONS) and len(quantised) == 7 * 2
    assert type(model.lm_head) is nn.Linear and type(model.model.early_exit_gate) is nn.Linear
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") in quantised:
            assert p.quant_state.quant_type == "nf4" and p.quant_state.nested == double_quant, name
            assert p.dtype == torch.uint8 and p.numel() == plain.get_parameter(name).numel() // 2, name
            stored = bnb.functional.dequantize_4bit(p.data, p.quant_state)
            assert 0.01 < (stored - plain.get_parameter(name)).norm() / stored.norm() < 0.2, name
            plain.get_parameter(name).data.copy_(stored)
        else:
            assert p.dtype == torch.float32 and torch.equal(p, plain.get_parameter(name)), name
    assert_close(model(IDS).logits, plain(IDS).logits, 1e-5)
    assert_close(model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss, 1e-5)


# --------------------------------------------------------------------------------------------------------------- LoRA


def adapted(model: OuroForCausalLM, random: bool = True) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lora = LoraConfig(r=3, lora_alpha=6, target_modules=PROJECTIONS, init_lora_weights=not random)
        return get_peft_model(model, lora).eval()


@sizes
def test_lora_adapts_the_projections_and_nothing_else(size):
    model = tiny(size).float()
    before = model(IDS).logits
    peft = adapted(model, random=False)
    assert torch.equal(peft(input_ids=IDS).logits, before)
    hidden, inner = model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim
    layer = 4 * 3 * (hidden + inner) + 3 * 3 * (hidden + 28)  # rank 3
    assert peft.get_nb_trainable_parameters()[0] == size["num_hidden_layers"] * layer
    assert type(model.lm_head) is nn.Linear and type(model.model.early_exit_gate) is nn.Linear
    assert all("lora_" in name for name, p in peft.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["last", "mixture", "all"])
@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_reach_every_lora_weight_and_no_other(seeded, nf4, objective, checkpointing):
    model = seeded_model(seeded, nf4=nf4)
    if checkpointing:
        model.gradient_checkpointing_enable()
    peft = adapted(model).train()
    peft(input_ids=IDS, labels=IDS, objective=objective).loss.backward()
    for name, p in peft.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == ("lora_" in name), name


def test_adapter_comes_back_from_disk_and_merges(folder, tmp_path):
    peft = adapted(load_ouro(str(folder), dtype=torch.float32))
    expected, plain = peft(input_ids=IDS).logits, tiny().float()(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_ouro(str(folder), dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, expected)
    with again.disable_adapter():
        assert torch.equal(again(input_ids=IDS).logits, plain)
    merged = again.merge_and_unload()
    assert type(merged) is OuroForCausalLM
    assert_close(merged(IDS).logits, expected, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_ouro(str(tmp_path / "merged"), dtype=torch.float32)(IDS).logits, merged(IDS).logits)


def test_adapted_model_generates_with_and_without_cache():
    peft = adapted(tiny().float())
    arguments = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False}
    cached = peft.generate(**arguments)
    assert torch.equal(cached, peft.generate(**arguments, use_cache=False))
    assert torch.equal(cached, peft.merge_and_unload().generate(**arguments))


@pytest.mark.parametrize("kind", ["LoRA", "NF4"])
def test_loss_refuses_an_adapted_or_quantised_head(kind):
    model = tiny().float()
    if kind == "LoRA":
        get_peft_model(model, LoraConfig(r=2, target_modules=[*PROJECTIONS, "lm_head"]))
    else:
        model.lm_head = bnb.nn.Linear4bit(20, VOCAB, bias=False)
    with pytest.raises(ValueError, match="keep the head out"):
        model(IDS, labels=IDS)
