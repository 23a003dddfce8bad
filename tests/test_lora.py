"""LoRA in groups gives what PEFT's own layers give: values, gradients, files and training, beside all weights."""

from pathlib import Path

from ouro.data.batches import noise
from ouro.files import UserError
from ouro.model import loading
from ouro.model.dropout import GOLDEN, dropout, hashed, signed
from ouro.model.fp8 import by_row
from ouro.model.lora import Group, fuse, refresh
from ouro.model.nf4 import nf4_state, nf4_weight
from ouro.train import build

import bitsandbytes
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from helpers import resolved, trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_ouro import (
    KINDS,
    SIZES,
    adapted,
    assert_close,
    assert_same_gradients,
    fused,
    gradients,
    loss_and_gradients,
    moved,
    rows,
    tokens,
)
from torch import Tensor, nn

NOISE = 5e-4  # of fp32 sums in another order, relative to the largest number
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("in_the_repository")


def assert_same_training(model: PeftModel, expected: PeftModel, objective: str = "last") -> None:
    (loss, grads), (theirs, their_grads) = (loss_and_gradients(m, objective) for m in (model, expected))
    assert_close(loss, theirs, 1e-5)
    adapters = {name for name, p in expected.named_parameters() if p.requires_grad}
    assert grads.keys() == their_grads.keys() == adapters
    assert all(g.abs().max() > 1e-6 for g in their_grads.values())  # each has something to say
    assert_same_gradients(grads, their_grads, NOISE)


@pytest.mark.parametrize("loops", [1, 3])
@kinds
def test_loss_and_every_adapter_gradient_are_pefts(kind, loops):
    assert_same_training(fused(kind, loops=loops), adapted(kind, loops=loops), "all")


def test_rslora_scales_by_the_root_of_the_rank():
    assert_same_training(fused(use_rslora=True), adapted(use_rslora=True))
    assert abs(loss_and_gradients(fused(use_rslora=True))[0] - loss_and_gradients(fused())[0]) > 1e-3  # that it is seen


@kinds
def test_state_dict_and_saved_files_do_not_know_of_groups(kind, tmp_path):
    model, (before, after) = adapted(kind), (tmp_path / "before", tmp_path / "after")
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    model.save_pretrained(before)
    fuse(model, KINDS[kind][1])
    model.save_pretrained(after)
    assert list(model.state_dict()) == list(expected)
    assert [name for name, _ in model.named_parameters()] == parameters
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    assert {p.name: p.read_bytes() for p in before.iterdir()} == {p.name: p.read_bytes() for p in after.iterdir()}


@kinds
def test_refresh_takes_over_what_an_optimizer_step_changed(kind):
    model, expected = moved(fused(kind)), moved(adapted(kind))
    batch = rows([0, 1], [3])
    with torch.no_grad():
        stale, right = model(**batch).loss, expected(**batch).loss
    assert_close(stale, adapted(kind)(**batch).loss.detach(), 1e-5)
    assert abs(stale - right) > 1e-3
    refresh(model)
    assert_same_training(model, expected)


# One group by itself


def group_of(*outs: int, width: int = 64, kind: str = "bf16", dtype=torch.float64, **config) -> tuple[Group, nn.Module]:
    """A group of projections of those sizes, and PEFT's model of the same numbers."""
    models = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.ModuleDict({f"p{k}": nn.Linear(width, out, bias=False) for k, out in enumerate(outs)}).to(dtype)
            for layer in layers.values():  # rows and columns of very different sizes
                layer.weight.data *= torch.logspace(-1, 1, width) * torch.logspace(1, -1, layer.out_features)[:, None]
            common = {"r": 4, "lora_alpha": 6, "target_modules": r"p\d", "init_lora_weights": False}
            models.append(get_peft_model(layers, LoraConfig(**common | config)).base_model.model)
    one, other = models
    one["p0"].group = group = Group(list(one.values()), kind, number=3)
    refresh(one)
    return group.train(), other


def test_dropout_masks_like_peft_with_that_mask():
    """PEFT's layers, their dropout replaced by the mask that the group has drawn."""
    group, peft = group_of(5, 7, lora_dropout=0.4)
    x, noise = torch.randn(6, 64, dtype=torch.float64), drawn(6)
    kept = mask(noise, group.salt, 64, 0.4).double() / 0.6
    for layer in peft.values():
        layer.lora_dropout["default"].forward = lambda inputs: inputs * kept
    assert all(torch.equal(*ys) for ys in zip(group.eval()(x), group.eval()(x, noise), strict=True))
    with pytest.raises(ValueError, match="dropout is drawn from noise, a number a token"):
        group.train()(x)
    results = []
    for layers in (lambda inputs: group(inputs, noise), lambda inputs: [layer(inputs) for layer in peft.values()]):
        inputs = x.clone().requires_grad_()
        ys = layers(inputs)
        sum((y**2).sum() for y in ys).backward()
        results.append((*ys, inputs.grad))
    adapters = [getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B") for layer in peft.values()]
    for ours, theirs in zip(results[0], results[1], strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(group.adapters(), adapters, strict=True):
        assert_close(ours.grad, theirs.grad, 1e-6)  # the gradients of adapters are rounded to fp32


def drawn(tokens: int, row: int = 7) -> Tensor:
    return torch.from_numpy(noise(42, 3, row, tokens))


def mask(noise: Tensor, salt: Tensor, columns: int, p: float) -> Tensor:
    """Which numbers dropout keeps, bool (tokens, columns)."""
    return dropout(torch.ones(len(noise), columns), hashed(noise ^ salt), p) != 0


def assert_independent(series: Tensor) -> None:
    """Rows of bool (many, n): no two have more in common than chance gives (correlations are about normal)."""
    x = series.double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    r = (x @ x.T / x.shape[1])[*torch.triu_indices(len(x), len(x), 1)] * x.shape[1] ** 0.5
    assert r.abs().max() < 6 and abs(r.square().mean() - 1) < 6 * (2 / len(r)) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_dropout_leaves_out_its_share_each_number_for_itself(p):
    """Between tokens, columns, loops, and all groups of all layers of the published model."""
    salts = [torch.tensor(signed(number * GOLDEN), dtype=torch.int32) for number in range(4 * 48)]
    one = mask(drawn(2048), salts[5], 2048, p)
    counted = torch.stack((one.sum(1), one.sum(0))).double()
    assert abs(one.double().mean() - (1 - p)) < 5 * (p * (1 - p) / one.numel()) ** 0.5
    variance = 2048 * p * (1 - p)  # of a token's or a column's count
    assert (counted - 2048 * (1 - p)).abs().max() < 6 * variance**0.5
    assert abs(counted.var(1) / variance - 1).max() < 6 * (2 / 2048) ** 0.5
    assert_independent(one[:512])
    assert_independent(one.T[::4])
    assert_independent(torch.stack([one[:, :1024].flatten(), one[:, 1024:].flatten()]))  # of one hash
    assert_independent(torch.stack([mask(drawn(256) + loop, salts[5], 128, p).flatten() for loop in range(4)]))
    assert_independent(torch.stack([mask(drawn(256), salt, 128, p).flatten() for salt in salts]))
    assert_independent(torch.stack([mask(drawn(256, row), salts[5], 128, p).flatten() for row in range(64)]))


def test_the_groups_of_a_model_and_its_loops_drop_other_numbers():
    model = fused(lora_dropout=0.3, loops=2)
    groups = [module for module in model.modules() if isinstance(module, Group)]
    assert len({int(group.salt) for group in groups}) == len(groups) == 4 * 2
    seen = []
    for group in groups:
        group.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batch = rows([0], [4]) | {"noise": drawn(12).view(2, 6)}
    model(**batch)
    assert len(seen) == 2 * len(groups)
    for at, given in enumerate(seen):
        assert torch.equal(given, batch["noise"] + at // len(groups))


# NF4


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_weight_is_bitsandbytes_own_to_the_bit(dtype, double):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(96, 320, generator=generator) * torch.logspace(-2, 1, 96)[:, None] + 0.1  # 480 scales: two blocks
    options = {"quant_type": "nf4", "compress_statistics": double, "requires_grad": False}
    weight = bitsandbytes.nn.Params4bit(w.to(dtype), **options).to("cpu")
    assert weight.quant_state.nested == double and weight.quant_state.quant_type == "nf4"
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    decoded = nf4_weight(nf4_state(weight), weight.quant_state.code, 320, dtype)
    assert decoded.dtype == dtype and torch.equal(decoded, expected)


@pytest.mark.parametrize("options", [{"blocksize": 128}, {"quant_type": "fp4"}], ids=str)
def test_another_quantisation_is_refused(options):
    weight = bitsandbytes.nn.Params4bit(torch.randn(8, 128), requires_grad=False, **{"quant_type": "nf4"} | options)
    with pytest.raises(ValueError, match=r"NF4 in blocks of 64 \(and 256\) is supported, this is (nf4, 128|fp4, 64)"):
        nf4_state(weight.to("cpu"))


# fp8


def test_by_row_keeps_e4m3s_precision_in_rows_of_any_size():
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 20)[:, None]
    x8, scale = by_row(x)
    assert x8.dtype == torch.float8_e4m3fn and scale.shape == (20, 1) and scale.dtype == torch.float32
    error = (x8.float() * scale - x).abs()
    assert (error <= x.abs() / 16 * 1.001 + scale / 1024).all()  # 3 bits after the leading one; 2**-9 apart near zero
    assert (x8.float().abs().amax(1) == 448).all()
    zeros = torch.zeros(1, 16, dtype=torch.bfloat16)
    x8, scale = by_row(zeros)
    assert torch.equal(x8.float() * scale, zeros.float())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("outs", [(48,), (48, 32), (48, 32, 16)], ids=str)
def test_fp8_values_and_gradients_are_close_to_exact_ones(scaled_mm, outs, p):
    results = []
    for kind in ("fp8", "bf16"):
        group, _ = group_of(*outs, kind=kind, lora_dropout=p, dtype=torch.float32)
        torch.manual_seed(1)
        x = (torch.randn(40, 64) * torch.logspace(-2, 2, 40)[:, None]).requires_grad_()
        dys = [torch.randn(40, out) for out in outs]
        ys = group(x, drawn(40))
        sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True)).backward()
        results.append([*ys, x.grad, *(parameter.grad for parameter in group.adapters())])
        weights = [projection.base_layer.weight for projection in group.projections]
        assert all((weight.numel() == 0) == (kind == "fp8") for weight in weights), "nothing is kept twice"
    for number, (y, exact) in enumerate(zip(*results, strict=True)):
        error = (y - exact).norm(dim=-1) / exact.norm(dim=-1)  # row by row
        if number <= len(outs):
            assert 1e-3 < error.mean() < 0.05 and error.max() < 0.1, number
        else:  # adapters' gradients do not pass through fp8
            assert error.max() < 1e-4, number


# Compiled


@pytest.mark.slow  # test_losses.py has the same translation, whose operations torch then computes one by one
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compiled_layers_give_the_same_gradients_from_one_translation(monkeypatch, tmp_path):
    """While this was written, a form of the code had other gradients of k_proj and v_proj compiled than eager."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    size = SIZES[0] | {"hidden_size": 8, "head_dim": 4, "num_attention_heads": 2}
    eager, compiled = (fused(size=size, loops=2, lora_dropout=0.3, r=2) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The patch of dynamo's settings puts back what compile_layers sets; kernels without vector instructions: half the
    # time to translate
    patches = torch._inductor.config.patch({"force_disable_caches": True, "cpp.simdlen": 1})
    with patches, torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        compiled.compile_layers()
        for shape in ((2, 9), (3, 14), (2, 23)):
            ids, results = tokens(*shape), []
            for model in (eager, compiled):
                loss = model(input_ids=ids, labels=ids, noise=drawn(ids.numel()).view_as(ids)).loss
                loss.backward()
                results.append((loss.detach(), gradients(model)))
            assert_close(results[1][0], results[0][0], 1e-5)
            assert all(grad.abs().max() > 0 for grad in results[0][1].values())
            assert_same_gradients(results[1][1], results[0][1], NOISE)
            # one of a layer and one of the loss, for all layers, loops and lengths
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@kinds
def test_a_compiled_layer_keeps_no_decoded_weight_for_the_backward_pass(kind):
    """While this was written, torch kept the halves of NF4's bytes: 50 MB a layer call of the published model."""
    model = fused(kind, lora_dropout=0.3)
    decoder, noise = model.get_base_model().model, torch.zeros(1, 29, dtype=torch.int32)
    layer, kept = decoder.layers[0], []
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    x = torch.randn(1, 29, decoder.config.hidden_size, requires_grad=True)
    cos, sin = decoder.rotations(torch.arange(29)[None], x.dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled = torch.compile(layer.forward, backend="aot_eager_decomp_partition")  # no kernels
        compiled(x, cos, sin, None, True, None, None, None, noise).sum().backward()
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert len(kept) > 5 and all(29 in t.shape for t in kept if t.numel() > 64)
    torch._dynamo.reset()


# DoRA and what is refused


def test_dora_is_refused_by_fuse():
    with pytest.raises(ValueError, match="DoRA's products are not plain LoRA's: leave this model as PEFT made it"):
        fuse(adapted(use_dora=True), "bf16")


ARGV = ["--total_ut_steps", "2", "--rows_per_step", "2", "--eval_steps", "0", "--warmup_ratio", "0"]
ARGV += ["--activation_checkpointing", "2"]


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final_adapter/adapter_model.safetensors")


def test_training_ends_with_the_adapter_that_pefts_layers_give(tmp_path, monkeypatch):
    argv = [*ARGV, "--max_steps", "4", "--lora_dropout", "0", "--optim", "adamw_torch", "--use_qlora", "false"]
    ours = adapter(trained(tmp_path / "ours", *argv))
    monkeypatch.setattr(loading, "fuse", lambda *_: None)
    monkeypatch.setattr(build, "run_by_plan", lambda *_, **__: None)
    theirs = adapter(trained(tmp_path / "theirs", *argv))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if "lora_B" in name:
            assert expected.abs().max() > 2e-3  # Adam has gone that far: it began at 0
        # Adam divides by the gradient's size, so where that is all noise a step can go either way
        assert (ours[name] - expected).norm() < 5e-3 * expected.norm(), name


def test_dora_trains_by_pefts_own_layers(tmp_path):
    weights = adapter(trained(tmp_path, *ARGV, "--use_dora", "true", "--max_steps", "2", "--use_qlora", "false"))
    assert len([name for name in weights if "lora_magnitude_vector" in name]) == 7 * 4
    assert all(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--use_qlora", "false"], "frozen_weights: fp8 is for bf16 LoRA"),  # bf16 is false in smoke.yaml
        (["--use_qlora", "false", "--bf16", "true"], r"fp8 needs a Hopper GPU \(H100, H200\)"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be(monkeypatch, argv, message):
    monkeypatch.setattr(build, "has_fp8", lambda: False)
    with pytest.raises(UserError, match=message):
        build.check_frozen(resolved("--frozen_weights", "fp8", *argv).settings)
