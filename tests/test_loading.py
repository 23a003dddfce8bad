"""Checkpoints, adapters and frozen weights: what is saved, what is accepted, and how a run's model is loaded."""

import dataclasses
import json
import math
import os
from pathlib import Path

import evaluate
from ouro.evaluate.models import find_models
from ouro.files import UserError
from ouro.model import loading, modeling_ouro
from ouro.model.loading import load_ouro
from ouro.model.lora import Group
from ouro.model.modeling_ouro import PROJECTIONS, OuroConfig, OuroForCausalLM, OuroModel
from ouro.settings import Settings, resolve

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_ouro import MEDIUM, SIZES, VOCAB, assert_close, randomise, tiny, tiny_config, tokens
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

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


@pytest.mark.parametrize("size", [SIZES[0], SIZES[1]], ids=["one loop", "two loops"])
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
        assert all(entry.startswith("modeling_ouro.Ouro") for entry in config.auto_map.values())
        assert (folder.parent / "again/modeling_ouro.py").read_bytes() == Path(modeling_ouro.__file__).read_bytes()


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
    with pytest.raises(UserError, match=next(iter(value))):
        load_ouro(str(folder))


# ---------------------------------------------------------------------------------------------------------- load_ouro


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.update({"model.norms.weight": w.pop("model.norm.weight")}), "model.norms.weight"),
        (lambda w: w.pop("model.layers.1.input_layernorm_2.weight"), "layers.1.input_layernorm_2.weight"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(12)}), "q_proj.bias"),
    ],
    ids=["renamed", "missing", "added"],
)
def test_checkpoint_with_other_tensor_names_is_refused(folder, change, named, nf4):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named):
        load_ouro(str(folder), dtype=torch.float32, nf4=nf4)


def test_folders_of_another_model_or_of_none_are_refused(folder):
    change_config(folder, model_type="llama")
    with pytest.raises(UserError, match="'llama' model"):
        load_ouro(str(folder))
    with pytest.raises(UserError, match="nowhere"):
        load_ouro(str(folder / "nowhere"))


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


@pytest.mark.parametrize("kind", ["LoRA", "NF4"])
def test_loss_refuses_an_adapted_or_quantised_head(kind):
    model = tiny().float()
    if kind == "LoRA":
        get_peft_model(model, LoraConfig(r=2, target_modules=[*PROJECTIONS, "lm_head"]))
    else:
        model.lm_head = bnb.nn.Linear4bit(20, VOCAB, bias=False)
    with pytest.raises(ValueError, match="keep the head out"):
        model(IDS, labels=IDS)


# -------------------------------------------------------------------------------------------------------- a run's model

EXP = "exp2-wangchan-ut1"
FP8 = {"use_qlora": False, "bf16": True, "frozen_weights": "fp8"}


@pytest.fixture
def run(tmp_path, in_the_repository):
    """Gives a run's folder with an adapter that matters, and its settings."""

    def make(name: str = EXP, **changes) -> tuple[Path, Settings]:
        made = resolve("", ["--config", "tests/smoke.yaml", "--exp", name, "--output_dir", str(tmp_path / "output")])
        s = made.settings = dataclasses.replace(made.settings, r=3, lora_alpha=8, **changes)
        adapter = tmp_path / "output" / name / "final_adapter"
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            like = {key: getattr(s, key) for key in loading.COMPUTED}
            lora = LoraConfig(**like, target_modules=PROJECTIONS, init_lora_weights=False)
            get_peft_model(load_ouro(s.model_name_or_path, dtype=torch.float32), lora).save_pretrained(adapter)
        (adapter.parent / "config.yaml").write_text(made.as_yaml())
        (adapter.parent / "completed").touch()
        return adapter.parent, s

    return make


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, "nf4"), ({"use_qlora": False}, "fp32"), ({"use_qlora": False, "bf16": True}, "bf16"), (FP8, "fp8")],
)
def test_the_settings_say_how_frozen_weights_are_kept_and_the_groups_keep_them_so(changes, kind, run, monkeypatch):
    folder, s = run(**changes)
    assert loading.frozen_kind(s) == kind
    fused = []
    monkeypatch.setattr(loading, "fuse", lambda model, how: fused.append(how))
    for adapter in (folder / "final_adapter", LoraConfig(r=2, target_modules=PROJECTIONS)):
        loading.load_run_model(s, adapter)
    loading.load_run_model(s, folder / "final_adapter", fused=False)
    assert fused == ["bf16" if kind == "fp32" else kind] * 2


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_runs_model_is_the_base_with_its_adapter_and_afterwards_the_base(run, nf4, dora):
    folder, s = run(use_qlora=nf4, use_dora=dora)
    adapter, ids = folder / "final_adapter", tokens(2, 9)
    base = load_ouro(s.model_name_or_path, dtype=torch.float32, nf4=nf4).eval()
    plain = base(ids).logits
    loaded = loading.load_run_model(s, adapter)
    assert any(isinstance(module, Group) for module in loaded.modules()) != dora
    with loading.with_adapter(base, adapter, loading.frozen_kind(s)):
        assert torch.equal(base(ids).logits, loaded(input_ids=ids).logits)
    assert torch.equal(base(ids).logits, plain)
    expected = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    assert_close(loaded(input_ids=ids).logits, expected, 1e-4)


def test_beside_fp8_weights_base_and_adapters_are_read_in_turn(run, scaled_mm):
    folder, s = run()
    base, ids = load_ouro(s.model_name_or_path, dtype=torch.float32).eval(), tokens(2, 9)
    plain, seen = base(ids).logits, []
    for adapter in (None, folder / "final_adapter", None):
        with loading.with_adapter(base, adapter, "fp8"):
            seen.append(base(ids).logits)
        assert torch.equal(base(ids).logits, plain), "the other weights are back"
    assert torch.equal(seen[0], seen[2])
    assert 0 < (seen[0] - plain).norm() < 0.4 * plain.norm() < (seen[1] - plain).norm()


@pytest.mark.parametrize(("capability", "label"), [((9, 0), "fp8"), ((8, 0), "bf16")], ids=["H200", "A100"])
def test_a_result_says_beside_which_weights_an_fp8_run_was_read(run, monkeypatch, capsys, capability, label):
    folder, s = run(**FP8)
    argv = ["--config", "tests/smoke.yaml", "--exp", EXP, "--output_dir", str(folder.parent)]
    asked = resolve("", argv, add_options=evaluate.options, several=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    model, base, (first, subject) = find_models(asked)
    assert (model.precision, first.run, subject.study()["trained_precision"]) == (label, f"base-{label}", "fp8")
    assert base.frozen_weights == "fp8" and base.bf16 and not base.use_qlora
    assert (f"warning: {EXP} has frozen weights in fp8" in capsys.readouterr().out) == (label == "bf16")


def test_bf16_without_a_gpu_and_dora_beside_fp8_are_refused(run):
    _, s = run(use_qlora=False, bf16=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="mine computes in bf16 .* no CUDA GPU"):
            loading.frozen_here(s, "mine")
    folder, s = run("exp3a-wangchan-ut2", **FP8, use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        loading.load_run_model(s, folder / "final_adapter")


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
STRAY = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(FIRST), f"{FIRST} is missing"),
        (lambda w: w.update({STRAY: torch.zeros(2, 128)}), r"lm_head.lora_A.weight is .2, 128., and no such tensor"),
        (lambda w: w.update({FIRST: w[FIRST][:2].clone()}), r"is \[2, 384\], and \[3, 384\] belongs there"),
        (lambda w: w.update({FIRST: w[FIRST].to(torch.int8)}), f"{FIRST} is in torch.int8"),
        (lambda w: w.update({FIRST: w[FIRST] * math.nan}), f"{FIRST} holds NaN or infinity"),
        (lambda w: w.update({FIRST: w[FIRST] * 0}), f"{FIRST} is all zero"),
        (lambda w: w.update({FIRST.replace("_A", "_B"): w[FIRST.replace("_A", "_B")] * 0}), "lora_B.* is all zero"),
    ],
    ids=["missing", "added", "smaller", "int8", "NaN", "A zero", "B zero"],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused(run, change, said):
    folder, s = run()
    file = folder / "final_adapter/adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(UserError, match=said):
        loading.load_run_model(s, folder / "final_adapter")


def test_an_adapter_of_another_rank_or_base_and_a_base_that_is_not_there_or_truncated_are_refused(run, tmp_path):
    folder, s = run()
    for changes, said in (({"r": 16}, "has r = 3"), ({"model_name_or_path": "sample/ouro-nano"}, "was made for")):
        with pytest.raises(UserError, match=said):
            loading.load_run_model(dataclasses.replace(s, **changes), folder / "final_adapter")
    tiny().save_pretrained(tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 1000)
    cut = str(tmp_path / "cut")
    for name, said in (("sample/nowhere", "no folder "), (cut, f"cannot load the model {cut}: .*deserializing header")):
        with pytest.raises(UserError, match=f"^{said}"):
            loading.load_run_model(dataclasses.replace(s, model_name_or_path=name))


REFUSED = {  # what adapter_config.json says beside or in place of what was saved
    "no rank": ({"r": None}, "adapter_config.json holds no rank, 'r'|has r = null"),
    "another kind": ({"peft_type": "VERA"}, 'has peft_type = "VERA"'),
    "no scale": ({"lora_alpha": None}, "has lora_alpha = null"),
    "a head": ({"target_modules": [*PROJECTIONS, "lm_head"]}, "has target_modules = "),
    "another scale": ({"lora_alpha": 33}, "has lora_alpha = 33, and its run's config.yaml says lora_alpha: 8"),
    "a scale of another kind": ({"use_rslora": True}, "has use_rslora = True, and its run's config.yaml says"),
    "no truth value": ({"use_rslora": "false"}, 'adapter_config.json has use_rslora = "false"'),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication = "),
    "a changed base": ({"init_lora_weights": "pissa"}, 'has init_lora_weights = "pissa"'),
    "a later PEFT's": ({"a_new_kind_of_lora": True}, "has a_new_kind_of_lora = true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_would_compute_something_else_is_refused(run, case):
    folder, s = run()
    file, (changes, said) = folder / "final_adapter/adapter_config.json", REFUSED[case]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        loading.load_run_model(s, folder / "final_adapter")


def test_an_adapter_that_is_as_new_is_read_with_a_warning(run, capsys):
    folder, s = run()
    file = folder / "final_adapter/adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    loading.load_run_model(s, folder / "final_adapter")
    assert "final_adapter adds nothing to the base: every lora_B is zero" in capsys.readouterr().out


def test_a_config_of_another_editor_or_a_later_peft_is_read_and_a_key_that_stands_twice_is_not(run):
    folder, s = run()
    file = folder / "final_adapter/adapter_config.json"
    expected, text = loading.load_run_model(s, folder / "final_adapter")(IDS).logits, file.read_text()
    later = text.replace("{", '{"ก_of_a_later_peft": null, "another": {},', 1)
    file.write_bytes(later.encode("utf-8-sig"))
    assert torch.equal(loading.load_run_model(s, folder / "final_adapter")(IDS).logits, expected)
    file.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 64, "lora_alpha": 8'))
    with pytest.raises(UserError, match="adapter_config.json: 'lora_alpha' stands twice"):
        loading.load_run_model(s, folder / "final_adapter")


def test_more_loops_than_a_model_was_made_for_are_warned_of(capsys):
    for asked in (4, 5):
        loading.warn_of_depth(asked, 4)
    assert capsys.readouterr().out.startswith("warning: 5 loops, and this model was made for 4: deeper ones read worse")
