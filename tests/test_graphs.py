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
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def pair(recomputed: int = 4, limit: int = TOKENS):
    """Two models of the same numbers with recomputed layers; the first one's replay."""
    models = [ready(fused("nf4, double")) for _ in range(2)]
    for model in models:
        model.recompute_layers(recomputed)
    replay_layers(models[0], limit)
    return models


def kept_pair(kind: str = "fp32", loops: int = 2):
    """Two models of the same numbers that keep all for the backward pass; the first one's loops replay."""
    models = [ready(fused(kind, loops=loops)) for _ in range(2)]
    replay_loops(models[0])
    return models


def ready(model):
    refresh(moved(model))
    return model


@pytest.fixture
def replays(monkeypatch):
    """The shapes of the states of which a layer, or all of them, were replayed."""
    calls = []
    for function in (graphs._ReplayedLayer, graphs._ReplayedLoops):
        forward = function.forward
        counted = staticmethod(lambda *a, forward=forward: calls.append(a[3].shape) or forward(*a))
        monkeypatch.setattr(function, "forward", counted)
    return calls


def one_pass(model, batch: dict, **options):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(models, batch: dict, **options) -> None:
    (loss, grads), (expected, expected_grads) = (one_pass(model, batch, **options) for model in models)
    assert_close(loss, expected, 1e-6)
    assert grads.keys() == expected_grads.keys() == {n for n, p in models[0].named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 1e-6 for g in expected_grads.values())
    assert_same_gradients(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("recomputed", [4, 2, 0])
def test_loss_and_gradients_are_those_of_recomputed_layers(replays, recomputed):
    models = pair(recomputed)
    for shape in ((2, 9), (3, 70), (2, 9)):  # a shorter one after a longer one, too
        ids = tokens(*shape)
        assert_same(models, {"input_ids": ids, "labels": ids}, objective="all")
    for batch in (rows([0, 1], [3]), rows([4], [1, 2])):  # with their documents
        assert_same(models, batch)
    assert len(replays) == 5 * 2 * recomputed


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


@pytest.mark.parametrize(("kind", "objective"), [("fp32", "mixture"), ("fp32", "last"), ("nf4, double", "all")])
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
    models, seen = kept_pair(), []

    def count(_, bucket):
        """The sum over processes, of one that is alone."""
        seen.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        watched = DistributedDataParallel(models[0])
        watched.register_comm_hook(None, count)
        for number, batch in enumerate((rows([0, 1], [3]), rows([4], [1, 2]))):
            with watched.no_sync() if number == 0 else nullcontext():
                watched(**batch).loss.backward()
            models[1](**batch).loss.backward()
        assert_same_gradients(gradients(models[0]), gradients(models[1]), 1e-5)
        assert sum(seen) == sum(p.numel() for p in models[0].parameters() if p.requires_grad) and len(replays) == 2
    finally:
        torch.distributed.destroy_process_group()


def assert_same_dropout(models, batches, loss_within: float, gradients_within: float) -> list[tuple[int, ...]]:
    """How far the generator of each model has drawn after each batch."""
    offsets = []
    for number, batch in enumerate(batches):
        results = []
        for model in models:
            torch.manual_seed(number)
            loss, grads = one_pass(model, {name: x.cuda() for name, x in batch.items()})
            results.append((loss, grads, torch.cuda.default_generators[0].get_offset()))
        (loss, grads, drawn), (expected, expected_grads, expected_drawn) = results
        assert_close(loss, expected, loss_within)
        assert_same_gradients(grads, expected_grads, gradients_within)
        offsets.append((drawn, expected_drawn))
    return offsets


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_replayed_layers_draw_the_same_dropout_on_this_gpu(replays, p, compiled):
    models = [model.cuda() for model in (fused("nf4, double", loops=2, lora_dropout=p) for _ in range(2))]
    compiling = {"options": {"max_pointwise_cat_inputs": 0}} if compiled else {}
    for model in models:
        model.recompute_layers(4)
        if compiled:
            model.compile_layers()
    replay_layers(models[0], TOKENS, **compiling)
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(2, 128), tokens(2, 128), tokens(1, 77))]
    assert_same_dropout(models, batches, 1e-5, 1e-4)
    assert len(replays) == 3 * 2 * 4


@gpu
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
    offsets = assert_same_dropout(models, batches, 1e-3, 3e-2)  # bf16
    assert all(drawn == expected for drawn, expected in offsets)
    assert len(replays) == 5
