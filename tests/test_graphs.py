"""A pass gives the same by every plan, with and without graphs. On a CPU the same work runs without CUDA."""

from ouro.model import graphs
from ouro.model.cost import Plan
from ouro.model.graphs import run_by_plan
from ouro.model.lora import fuse, refresh

import pytest
import torch
from tiny_ouro import (
    SIZES,
    adapted,
    assert_close,
    assert_same_gradients,
    fused,
    gradients,
    moved,
    rows,
    tokens,
)

LARGEST = 4 * 128
KEPT = Plan()
PLANS = [KEPT, Plan(1), Plan(3), Plan(6), Plan(6, 3), Plan(6, 6), Plan(4, 4)]  # of six layer calls
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def pair(plan: Plan = KEPT, made: bool = True, last: bool = True, kind: str = "fp32", **config):
    """Two models of the same numbers with dropout; the first one's passes run by the plan, as graphs if `made`."""
    models = [fused(kind, loops=3, lora_dropout=0.3, **config) for _ in range(2)]
    for model in models:
        refresh(moved(model))
    run_by_plan(models[0], lambda tokens: plan, LARGEST, last, made)
    return models


@pytest.fixture
def replays(monkeypatch):
    """A 1 for each pass that was replayed."""
    calls, forward = [], graphs._Replayed.forward
    monkeypatch.setattr(graphs._Replayed, "forward", lambda *a: calls.append(1) or forward(*a))
    return calls


def batch_of(*shape: int) -> dict:
    ids = tokens(*shape)
    return {"input_ids": ids, "labels": ids}


def with_noise(batch: dict, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, batch["input_ids"].shape, generator=generator, dtype=torch.int32)
    return batch | {"noise": drawn}


def one_pass(model, batch: dict, **options):
    """Loss and gradients."""
    loss = model(**with_noise(batch), **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(models, batch: dict, loss_within: float = 1e-6, gradients_within: float = 1e-5, **options) -> None:
    (loss, grads), (expected, expected_grads) = (one_pass(model, batch, **options) for model in models)
    assert_close(loss, expected, loss_within)
    assert grads.keys() == expected_grads.keys() == {n for n, p in models[0].named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 1e-6 for g in expected_grads.values())
    assert_same_gradients(grads, expected_grads, gradients_within)


@pytest.mark.parametrize("made", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.recomputed}-{p.waiting}")
def test_loss_and_gradients_are_the_same_by_every_plan(replays, plan, made):
    models = pair(plan, made)
    for batch in (batch_of(2, 9), batch_of(1, 128), batch_of(3, 70), batch_of(2, 9), rows([0, 1], [3])):
        assert_same(models, batch)
    assert len(replays) == 5 * made


@pytest.mark.parametrize("objective", ["all", "mixture"])
@pytest.mark.parametrize("kind", ["fp32", "nf4, double"])
def test_with_a_loss_of_all_loops_each_ones_state_has_its_gradient(replays, kind, objective):
    models = pair(Plan(4, 3), last=False, kind=kind)
    for batch in (batch_of(2, 9), rows([4], [1, 2])):
        assert_same(models, batch, objective=objective)
    assert len(replays) == 2


def test_a_pass_has_the_plan_of_its_size(monkeypatch):
    calls, forward = [], graphs._Recomputed.forward
    monkeypatch.setattr(graphs._Recomputed, "forward", lambda *a: calls.append(a[4] and a[4][1]) or forward(*a))
    model = pair()[0].eval().train()
    run_by_plan(model, {18: Plan(1), 30: Plan(2), LARGEST: Plan(4, 2)}.get, LARGEST, True, graphs=False)
    for shape, expected in (((2, 9), [None]), ((3, 10), [None] * 2), ((4, 128), [0, 1, None, None])):
        one_pass(model, batch_of(*shape))
        assert calls == expected
        calls.clear()


def test_graphs_are_made_once_for_a_shape_and_room_for_documents_also_before_the_first_pass(monkeypatch):
    made, init = [], graphs.Captured.__init__
    monkeypatch.setattr(graphs.Captured, "__init__", lambda *a: made.append((*a[3].shape[:2], a[5])) or init(*a))
    models = pair(Plan(2))
    prepare = models[0].get_base_model().model.prepare
    prepare(2, 9, 0, True).capture()
    prepare(1, 100, 3, True)
    assert_same(models, batch_of(2, 9))
    for count in (2, 20, 1, 4, 20, 5, 1):  # documents of one row of 100 tokens
        assert_same(models, batch_of(1, 100) | {"position_ids": torch.arange(100)[None] % (100 // count)})
    assert made == [(2, 9, 0), (1, 100, 16), (1, 100, 32), (1, 100, 0)]
    assert pair(made=False)[0].get_base_model().model.prepare is None


@pytest.mark.parametrize("made", [False, True], ids=["plain", "graphs"])
def test_evaluation_and_masked_batches_run_as_before(replays, made):
    models = pair(Plan(6, 3), made)
    assert_same(models, rows([0], [1, 2], [3], left=True))  # padding on the left takes a mask
    with torch.no_grad():
        models[0](**with_noise(batch_of(2, 9)))
    for model in models:
        model.eval()
    assert_same(models, batch_of(2, 9))
    assert not replays


def test_a_backward_pass_after_another_forward_pass_is_refused():
    model, _ = pair()
    first = model(**with_noise(batch_of(2, 9))).loss
    second = model(**with_noise(batch_of(1, 9))).loss  # of another shape too: the memory is the same
    with pytest.raises(RuntimeError, match="another forward pass"):
        first.backward()
    second.backward()


@pytest.mark.parametrize("plan", [Plan(), Plan(6, 3)], ids=["kept", "waiting"])
def test_steps_of_the_optimizer_reach_the_graphs_and_gradients_are_added_up(plan):
    models = pair(plan)
    for _ in range(2):
        for model in models:
            model(**with_noise(batch_of(2, 9))).loss.backward()
        (loss, grads), (expected_loss, expected) = (one_pass(model, rows([0, 1], [3])) for model in models)
        assert_close(loss, expected_loss, 1e-6)
        assert_same_gradients(grads, expected, 1e-5)
        for model in models:
            refresh(moved(model))


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", [Plan(), Plan(3), Plan(4, 4)], ids=["kept", "computed twice", "waiting"])
def test_replayed_passes_are_those_of_layers_on_this_gpu(replays, plan, compiled):
    models = []
    for _ in range(2):
        model = adapted(size=SIZES[0], lora_dropout=0.4).cuda()  # flash attention wants heads of 8, 16, ...
        for name, weight in model.named_parameters():
            weight.data = weight.data if "lora" in name else weight.data.bfloat16()
        fuse(model, "bf16")
        if compiled:
            model.compile_layers(one_size=True)
        models.append(model)
    run_by_plan(models[0], lambda tokens: plan, LARGEST, True, True)
    for batch in (rows([0, 1], [3]), rows([0], [3]), rows([0, 1], [3]), rows([1, 2], [4]), rows([0, 1, 3, 2])):
        on_gpu = {name: x.cuda() for name, x in with_noise(batch).items()}
        results = []
        for model in models:
            loss = model(**on_gpu).loss
            loss.backward()
            results.append((loss.detach(), gradients(model)))
        assert_close(results[0][0], results[1][0], 1e-3)  # bf16
        assert_same_gradients(results[0][1], results[1][1], 3e-2)
    assert len(replays) == 5
