"""The losses, their gradients for every parameter, and training through checkpointing and the compiler."""

import functools

from ouro.model import modeling_ouro
from ouro.model.modeling_ouro import IGNORE

import pytest
import reference_ouro as ref
import torch
from tiny_ouro import (
    LAYOUTS,
    MEDIUM,
    SIZES,
    VOCAB,
    assert_close,
    assert_same_gradients,
    documents,
    fused,
    gradients,
    objectives,
    reference,
    rows,
    sizes,
    tiny,
    tokens,
    without,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

layouts = pytest.mark.parametrize("layout", LAYOUTS)
slow = pytest.mark.slow


@functools.cache
def expected_loss(size_index: int, objective: str, used: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's loss over those documents, and its gradient for every weight (zero where there is none)."""
    w, config = reference(tiny(SIZES[size_index]))
    docs = documents()
    loss = ref.loss(w, config, [docs[d] for d in used], objective)
    grads = torch.autograd.grad(loss, list(w.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(w, grads, strict=True))


def assert_reference_loss(model, size, objective, groups, batch):
    used = tuple(sorted(d for group in groups for d in group))
    loss, grads = expected_loss(SIZES.index(size), objective, used)
    out = model(**batch, objective=objective)
    assert out.logits is None
    assert_close(out.loss, loss)
    out.loss.backward()
    assert_same_gradients(gradients(model), grads)
    assert out.trained_tokens == sum(int((documents()[d][1][1:] != IGNORE).sum()) for d in used)
    if objective == "mixture":  # all gradients have something to say; one loop takes all, whatever the gate says
        silent = {name for name, grad in grads.items() if grad.abs().max() < 1e-5}
        assert silent == (set() if size["total_ut_steps"] > 1 else {name for name in grads if "exit_gate" in name})


@layouts
@objectives
def test_loss_and_every_gradient_are_the_references(objective, layout):
    assert_reference_loss(tiny(), MEDIUM, objective, *LAYOUTS[layout])


@objectives
@sizes
def test_loss_and_every_gradient_of_packs_are_the_references_in_every_size(size, objective):
    assert_reference_loss(tiny(size), size, objective, *LAYOUTS["packed, left-padded, mask"])


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
@objectives
def test_loss_does_not_depend_on_the_chunk(monkeypatch, objective, chunk):
    monkeypatch.setattr(modeling_ouro, "CHUNK", chunk)
    assert_reference_loss(tiny(), MEDIUM, objective, *LAYOUTS["packed, padded, mask"])


@objectives
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole_and_scale_with_the_loss(objective, as_tensor):
    model = tiny()
    whole = model(**rows([0], [1], [2], [3]), objective=objective)
    whole.loss.backward()
    expected, number = gradients(model), int(whole.trained_tokens)
    parts = [rows([0], [3]), rows([1, 2])]
    count = torch.tensor(number) if as_tensor else number
    outs = [model(**part, objective=objective, num_items_in_batch=count) for part in parts]
    (-2.5 * sum(out.loss for out in outs)).backward()
    assert len({int(out.trained_tokens) for out in outs}) == 2  # so that a mean of means would differ
    assert_close(sum(out.loss for out in outs), whole.loss)
    assert_same_gradients(gradients(model), {name: -2.5 * grad for name, grad in expected.items()})


@objectives
def test_nothing_trained_gives_zero_loss_and_zero_gradients(objective):
    model, ids = tiny(), tokens(2, 6)
    for count in (None, 7, 0, torch.tensor(0)):
        out = model(ids, labels=torch.full_like(ids, IGNORE), objective=objective, num_items_in_batch=count)
        assert out.loss == 0 and out.trained_tokens == 0 and out.correct_tokens == 0
        out.loss.backward()
        grads = gradients(model)
        assert "lm_head.weight" in grads and all((grad == 0).all() for grad in grads.values())


@objectives
def test_correct_and_trained_tokens_and_loop_losses(objective):
    model = tiny()
    batch = rows([0, 1, 2], [3, 4])
    model.lm_head.weight.data[:] = 0.2 * model.lm_head.weight + model.model.embed_tokens.weight  # some right
    batch["labels"] = torch.where(batch["labels"] == IGNORE, IGNORE, batch["input_ids"].roll(1, 1))
    batch["labels"][:, 0] = IGNORE
    out = model(**batch, objective=objective)
    every = model(**without(batch, "labels"), output_loops=True)
    logits = every.loop_logits[-1]
    if objective == "mixture":
        logits = model(**without(batch, "labels"), use_weighted_exit=True).logits
    begins = batch["position_ids"][:, 1:] == 0
    targets = batch["labels"][:, 1:].masked_fill(begins, IGNORE)
    trained = targets != IGNORE
    right = (logits[:, :-1].argmax(-1) == targets) & trained
    assert out.trained_tokens == trained.sum() and out.correct_tokens == right.sum()
    assert 0 < out.correct_tokens < out.trained_tokens
    if objective != "all":
        assert out.loop_losses is None
    else:
        losses = [cross_entropy(x[:, :-1][trained], targets[trained]) for x in every.loop_logits]
        assert_close(out.loop_losses, torch.stack(losses))
        assert_close(out.loss, out.loop_losses.mean())
        assert out.loop_losses.std() > 0.01 and not out.loop_losses.requires_grad


class Recorder(TorchDispatchMode):
    """Notes the shapes of all float tensors that come to be, other than views of parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(x.shape))
        return out

    def most_logits(self) -> int:
        return max(torch.Size(shape[:-1]).numel() for shape in self.shapes if shape and shape[-1] == VOCAB)


@objectives
def test_logits_of_all_positions_and_gradients_that_nobody_asks_for_never_exist(monkeypatch, objective):
    monkeypatch.setattr(modeling_ouro, "CHUNK", 4)
    model, ids = tiny(), tokens(3, 10)
    head = tuple(model.lm_head.weight.shape)
    with Recorder(model) as training:
        loss = model(ids, labels=ids, objective=objective).loss
        loss.backward()
    with Recorder(model) as evaluating, torch.no_grad():
        assert_close(model(ids, labels=ids, objective=objective).loss, loss)
    with Recorder(model) as scoring:
        model(ids)
    assert training.most_logits() == evaluating.most_logits() == 4 and scoring.most_logits() == 30
    assert head in training.shapes and head not in evaluating.shapes


@sizes
def test_layers_that_are_recomputed_change_nothing(size):
    batch, calls, layers = LAYOUTS["packed, left-padded, mask"][1], [], size["num_hidden_layers"]
    model = tiny(size).train()
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss = model(**batch, objective="mixture").loss
    loss.backward()
    expected = gradients(model)
    for count in (1, layers):
        model.recompute_layers(count)
        calls.clear()
        same_loss = model(**batch, objective="mixture").loss
        same_loss.backward()
        assert len(calls) == size["total_ut_steps"] * (layers + count)
        assert torch.equal(loss, same_loss)
        assert_same_gradients(gradients(model), expected, 1e-12)


def test_reentrant_checkpointing_and_a_cache_under_checkpointing_are_refused():
    model, ids = tiny().train(), tokens(2, 9)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        model(ids, use_cache=True)
    assert model.eval()(ids, use_cache=True).past_key_values.get_seq_length() == 9


@objectives
def test_autocast_trains_close_to_full_precision(objective):
    model = tiny().float()
    batch = LAYOUTS["packed, left-padded, mask"][1]
    loss = model(**batch, objective=objective).loss
    loss.backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch, objective=objective).loss
    rounded.backward()
    assert rounded.dtype == torch.float32 and 0 < abs(rounded - loss) < 0.01 * loss
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32 and (grad - exact[name]).norm() <= 0.15 * exact[name].norm() + 1e-9, name


def test_compiler_translates_one_layer_for_all_layers_loops_and_lengths():
    torch._dynamo.reset()
    models = [fused(size=SIZES[1], loops=3, lora_dropout=0.3) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    for model in models:
        model.gradient_checkpointing_enable()
    for layer in models[1].get_base_model().model.layers:
        layer.compile(backend=counter, dynamic=True)
    for shape in ((2, 9), (3, 14)):
        ids, results = tokens(*shape), []
        for model in models:
            loss = model(input_ids=ids, labels=ids, noise=ids.int() * 12345).loss
            loss.backward()
            results.append((loss.detach(), gradients(model)))
        (loss, grads), (compiled, compiled_grads) = results
        assert_close(compiled, loss, 1e-5)
        assert_same_gradients(compiled_grads, grads, 5e-4)
    assert counter.frame_count == 1


COMPILED = ["packed, padded, mask", *(pytest.param(name, marks=slow) for name in ("unpadded", "left-padded, mask"))]


@pytest.mark.parametrize("layout", COMPILED)
def test_compiled_layers_give_the_same_in_every_layout(layout):
    groups, batch = LAYOUTS[layout]
    counters = []
    for size in (SIZES[1], SIZES[3]):
        torch._dynamo.reset()
        model = tiny(size)
        expected = model(**batch).loss
        counters.append(CompileCounterWithBackend("eager"))
        for layer in model.model.layers:
            layer.compile(backend=counters[-1])
        assert_close(model(**batch).loss, expected, 1e-12)
    assert 1 <= counters[0].frame_count == counters[1].frame_count  # whatever the number of layers and loops


def test_training_stays_compiled_after_generation():
    """Each slot and length of a cache must not use up the compiler's limit of translations of one function."""
    torch._dynamo.reset()
    model, ids, calls = tiny(SIZES[1]), tokens(2, 9), []

    def backend(graph, _):
        return lambda *args: (calls.append(1), graph(*args))[1]

    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
    calls.clear()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 3 * 2
