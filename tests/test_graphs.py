"""Layers that replay graphs give what layers give. On a CPU the same work runs without graphs."""

from contextlib import nullcontext

from ouro.model import graphs
from ouro.model.graphs import replay_layers, replay_loops
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
    loss_and_gradients,
    moved,
    rows,
    tokens,
)
from torch.nn.parallel import DistributedDataParallel

TOKENS = 4 * 128


def pair(recomputed: int = 4, loops: int = 2, limit: int = TOKENS, **config):
    """Two models of the same numbers with recomputed layers; the first one's replay."""
    models = [fused("nf4, double", loops=loops, **config) for _ in range(2)]
    for model in models:
        moved(model)
        refresh(model)
        model.recompute_layers(recomputed)
    replay_layers(models[0], limit)
    return models


def kept_pair(kind: str = "fp32", loops: int = 2, **config):
    """Two models of the same numbers that keep all for the backward pass; the first one's loops replay."""
    models = [fused(kind, loops=loops, **config) for _ in range(2)]
    for model in models:
        moved(model)
        refresh(model)
        model.train()
    replay_loops(models[0])
    return models


@pytest.fixture
def replays(monkeypatch):
    """The shapes of the states of which a layer, or all of them, were replayed."""
    calls = []
    for function in (graphs._ReplayedLayer, graphs._ReplayedLoops):
        forward = function.forward
        counted = staticmethod(lambda *a, forward=forward: calls.append(a[3].shape) or forward(*a))
        monkeypatch.setattr(function, "forward", counted)
    return calls


def assert_same(models, batch: dict, **options) -> None:
    results = []
    for model in models:
        model.zero_grad()
        loss = model(**batch, **options).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, grads), (expected, expected_grads) = results
    assert_close(loss, expected, 1e-6)
    assert grads.keys() == expected_grads.keys() == {n for n, p in models[0].named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 1e-6 for g in expected_grads.values())
    assert_same_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("recomputed", [4, 2])
def test_loss_and_gradients_are_those_of_recomputed_layers(replays, recomputed):
    models = pair(recomputed, loops=3)
    for shape in ((2, 9), (1, 128), (3, 70), (2, 9)):  # shorter ones after longer ones, too
        ids = tokens(*shape)
        assert_same(models, {"input_ids": ids, "labels": ids}, objective="all")
    assert len(replays) == 4 * 3 * recomputed


def test_packed_rows_are_replayed_with_their_documents(replays):
    models = pair()
    for batch in (rows([0, 1], [3]), rows([4], [1, 2]), rows([0, 1], [3])):
        assert_same(models, batch)
    assert len(replays) == 3 * 2 * 4


def test_what_the_graphs_have_no_room_for_is_recomputed_without_them(replays, monkeypatch):
    models = pair(limit=16)
    ids = tokens(2, 9)
    assert_same(models, {"input_ids": ids, "labels": ids})
    monkeypatch.setattr(graphs, "DOCUMENTS", 1)
    assert_same(models, rows([0, 1, 3]))
    assert_same(models, rows([0], [1, 2], [3], left=True))  # padding on the left takes a mask
    assert not replays


def test_the_model_does_not_know_of_graphs(tmp_path):
    model, plain = pair()[0], moved(adapted("nf4, double"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in model.state_dict().items())
    fuse(plain, "nf4")
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def test_without_recomputed_layers_nothing_changes(replays):
    models = pair(recomputed=0)
    assert_same(models, rows([0, 1], [3]))
    assert not replays


@pytest.mark.parametrize("kind", ["fp32", "nf4, double"])
@pytest.mark.parametrize("objective", ["last", "mixture", "all"])
def test_loss_and_gradients_of_replayed_loops_are_those_without_graphs(replays, kind, objective):
    models = kept_pair(kind, loops=3)
    for shape in ((2, 9), (1, 128), (3, 70), (2, 9)):
        ids = tokens(*shape)
        assert_same(models, {"input_ids": ids, "labels": ids}, objective=objective)
    assert len(replays) == 4


def test_loops_replay_packed_rows_with_however_many_documents(replays, monkeypatch):
    models = kept_pair()
    batches = [rows([0, 1], [3]), rows([4], [1, 2]), rows([0, 1], [3])]
    monkeypatch.setattr(graphs, "DOCUMENTS", 1)
    for batch in (*batches, rows([0, 1, 3, 2]), rows([0, 1, 3, 2, 0, 1, 3])):
        assert_same(models, batch)
    assert len(replays) == 5


def test_a_batch_replays_the_graphs_of_its_shape_and_documents(monkeypatch):
    made = []
    init = graphs.CapturedLoops.__init__
    monkeypatch.setattr(graphs.CapturedLoops, "__init__", lambda self, *a: made.append(a[-1]) or init(self, *a))
    model, _ = kept_pair()
    monkeypatch.setattr(graphs, "DOCUMENTS", 2)
    for count in (2, 4, 1, 8, 4, 2, 1):  # documents of one row of 40 tokens
        ids = tokens(1, 40)
        model(input_ids=ids, labels=ids, position_ids=torch.arange(40)[None] % (40 // count)).loss.backward()
    assert made == [2, 4, 0, 8]


def test_evaluation_and_masked_batches_are_not_replayed(replays):
    models = kept_pair()
    ids = tokens(2, 9)
    assert_same(models, rows([0], [1, 2], [3], left=True))  # padding on the left takes a mask
    with torch.no_grad():
        models[0](input_ids=ids)
    for model in models:
        model.eval()
    assert_same(models, {"input_ids": ids, "labels": ids})
    assert not replays


def test_a_backward_pass_after_another_forward_pass_is_refused():
    model, _ = kept_pair()
    ids = tokens(2, 9)
    first = model(input_ids=ids, labels=ids).loss
    second = model(input_ids=ids[:1], labels=ids[:1]).loss  # of another shape too: the memory is the same
    with pytest.raises(RuntimeError, match="another forward pass"):
        first.backward()
    second.backward()


@pytest.mark.parametrize("made", [pair, kept_pair])
def test_steps_of_the_optimizer_reach_the_graphs_and_gradients_are_added_up(made):
    models = made()
    for _ in range(2):
        for model in models:
            loss_and_gradients(model)
        (loss, grads), (expected_loss, expected) = (loss_and_gradients(model) for model in models)
        assert_close(loss, expected_loss, 1e-6)
        assert_same_gradients(grads, expected, 1e-5)
        for model in models:
            moved(model)
            refresh(model)
            model.zero_grad()


def test_ddp_sees_the_gradients_of_replayed_loops(replays):
    models = kept_pair()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        watched, seen = DistributedDataParallel(models[0]), []
        watched.register_comm_hook(None, lambda _, bucket: sums(seen, bucket))
        for number, batch in enumerate((rows([0, 1], [3]), rows([4], [1, 2]))):
            with watched.no_sync() if number == 0 else nullcontext():
                watched(**batch).loss.backward()
            models[1](**batch).loss.backward()
        assert_same_gradients(gradients(models[0]), gradients(models[1]), 1e-5)
        assert sum(seen) == sum(p.numel() for p in models[0].parameters() if p.requires_grad) and len(replays) == 2
    finally:
        torch.distributed.destroy_process_group()


def sums(seen: list[int], bucket) -> torch.futures.Future:
    """Of a process that is alone; counts the numbers."""
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_graphs_draw_the_same_dropout_and_give_the_same_gradients_on_this_gpu(replays, p, compiled):
    models = [model.cuda() for model in (fused("nf4, double", loops=2, lora_dropout=p) for _ in range(2))]
    compiling = {"options": {"max_pointwise_cat_inputs": 0}} if compiled else {}
    for model in models:
        model.recompute_layers(4)
        if compiled:
            model.compile_layers()
    replay_layers(models[0], TOKENS, **compiling)
    for shape in ((2, 128), (2, 128), (1, 77)):
        ids, results = tokens(*shape).cuda(), []
        for model in models:
            torch.manual_seed(1)
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            results.append((loss.detach(), gradients(model), torch.cuda.default_generators[0].get_offset()))
        assert_close(results[0][0], results[1][0], 1e-5)
        assert_same_gradients(results[0][1], results[1][1], 1e-4)
        assert all(torch.isfinite(g).all() for g in results[0][1].values())
    assert len(replays) == 3 * 2 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_replayed_loops_draw_the_same_dropout_on_this_gpu(replays, monkeypatch, p, compiled):
    models = []
    for _ in range(2):
        model = adapted(size=SIZES[0], lora_dropout=p).cuda()  # flash attention wants heads of 8, 16, ...
        for name, weight in model.named_parameters():
            weight.data = weight.data if "lora" in name else weight.data.bfloat16()
        fuse(model, "bf16")
        if compiled:
            model.compile_layers(one_size=True)
        models.append(model)
    replay_loops(models[0])
    monkeypatch.setattr(graphs, "DOCUMENTS", 1)
    batches = rows([0, 1], [3]), rows([0], [3]), rows([0, 1], [3]), rows([1, 2], [4]), rows([0, 1, 3, 2])
    for number, batch in enumerate(batches):
        batch, results = {name: x.cuda() for name, x in batch.items()}, []
        for model in models:
            torch.manual_seed(number)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), gradients(model), torch.cuda.default_generators[0].get_offset()))
        assert_close(results[0][0], results[1][0], 1e-3)  # bf16
        assert_same_gradients(results[0][1], results[1][1], 3e-2)
        assert results[0][2] == results[1][2]
    assert len(replays) == 5
