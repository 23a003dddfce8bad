"""From rows on disk to the passes of a step: packs, widths, shares, batches, noise; and that none of it is learnt."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from ouro.data.batches import IGNORE, Pass, Passes, Rows, Steps, noise, pack, room, shares
from ouro.data.cache import CHUNK, prepare
from ouro.model import cost, modeling_ouro
from ouro.model.cost import Plan
from ouro.model.loading import load_tokenizer
from ouro.settings import Settings
from ouro.train.collate import collate
from ouro.train.trainer import LoopTrainer

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import SMALL, in_processes, metrics, trained, write_jsonl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_ouro import adapted, assert_close, assert_same_gradients, fused, gradients, objectives, tiny, without
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from training_sets import Lengths

property_test = hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=200)


pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def sample(tokenizer, tmp_path_factory):
    s = Settings(dataset="sample", overlap="none", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(s, tokenizer, quiet=True)[0]


def lengths_of_rows(count: int, seed: int = 0) -> np.ndarray:
    """As those of WangchanThaiInstruct in Ouro's tokens: half above 4,096, the longest of max_length."""
    drawn = np.random.default_rng(seed).lognormal(8.3, 0.7, count).astype(int)
    return drawn.clip(20, 16384)


def first(rows: Rows, count: int) -> Lengths:
    few = Lengths(rows.lengths[:count])
    few.trained, few.row = rows.trained[:count], rows.row
    return few


# ----------------------------------------------------------------------------------------------------------------------
# packs, passes, shares


limits_and_lengths = st.integers(1, 40).flatmap(
    lambda limit: st.tuples(st.just(limit), st.lists(st.integers(1, limit), min_size=1, max_size=60))
)


@property_test
@given(limits_and_lengths)
def test_packs_are_a_partition_the_same_whatever_the_rows_order(case):
    limit, lengths = case[0], dict(enumerate(case[1]))
    packs = pack(lengths, limit)
    assert sorted(row for members in packs for row in members) == list(lengths)
    assert all(sum(lengths[row] for row in members) <= limit for members in packs)
    assert pack(dict(reversed(lengths.items())), limit) == packs


def test_a_row_longer_than_a_pack_has_one_of_its_own_and_no_rows_are_no_packs():
    assert pack({3: 9, 5: 4, 8: 3}, 7) == [[3], [5, 8]] and pack({}, 7) == []


GRIDS = [Passes(4608), Passes(16384, alone=None), Passes(512), Passes(2048, grain=1), Passes(10**6, grain=1)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda p: f"{p.tokens}-{p.alone}-{p.grain}")


@grids
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_steps_passes_are_shared_out_whole_and_each_row_is_in_one(grid, processes):
    for seed in range(20):
        lengths = {7 * i: int(n) for i, n in enumerate(lengths_of_rows(32, seed) // (1 + 3 * (seed % 2)))}
        passes = grid.of(lengths, processes)
        given = shares(passes, processes, lambda each: each.tokens)
        assert len(given) == processes and sorted(sum(given, []), key=str) == sorted(passes, key=str)
        assert sorted(row for each in passes for row in each.rows) == sorted(lengths)
        for each in passes:
            sizes = [lengths[row] for row in each.rows]
            filled = sum(sizes) if each.packed else max(sizes)
            assert each.width == grid.width(filled) >= filled
            if each.packed:
                assert grid.alone is None or (len(sizes) > 1 and max(sizes) <= grid.alone)
            else:
                assert set(map(grid.width, sizes)) == {each.width}
            assert len(sizes) == 1 or each.tokens <= grid.width(grid.tokens), "only a row alone may be longer"


def test_no_process_has_much_more_to_do_than_another():
    """By Graham's bound the largest share is at most 4/3 of what it must be; here it is far less."""
    for seed in range(20):
        passes = Passes(4608).of(dict(enumerate(lengths_of_rows(64, seed).tolist())), 4)
        loads = [sum(each.tokens for each in share) for share in shares(passes, 4, lambda each: each.tokens)]
        assert max(loads) < 1.1 * sum(loads) / 4


def test_widths_are_few_and_add_at_most_a_sixteenth():
    grid = Passes(1)
    widths = {grid.width(n) for n in range(1, 16385)}
    assert len(widths) == 48 and all(grid.width(width) == width and width % 256 == 0 for width in widths)
    assert all(n <= grid.width(n) <= max(n + 255, n * 17 / 16 + 1) for n in range(1, 16385))
    assert [Passes(1, grain=1).width(n) for n in (1, 777, 5001)] == [1, 777, 5001]


@pytest.mark.parametrize("grid", GRIDS[:2], ids=["apart", "together"])
@pytest.mark.parametrize("processes", [1, 4])
def test_of_lengths_like_the_real_ones_less_than_a_twentieth_is_padding(grid, processes):
    rows = Lengths(lengths_of_rows(3200))
    steps = Steps(rows, 32, 0, grid, collate, lambda each: each.tokens, processes)
    passes = [p for n in range(100) for share in steps.shares_of(n) for p in share]
    padding = 1 - rows.lengths.sum() / sum(p.tokens for p in passes)
    shapes, told = steps.shapes(0, 100)
    assert 0 < padding < 0.05 and told == pytest.approx(padding)
    assert shapes == sorted(shapes, key=lambda shape: -shape[0] * shape[1])
    assert {shape[:2] for shape in shapes} == {(1 if p.packed else len(p.rows), p.width) for p in passes}
    filled = {p: sum(rows.lengths[row] for row in p.rows) for p in passes}
    documents = [len(p.rows) + (filled[p] < p.width) for p in passes if p.packed]  # the padding is one
    assert {shape[2] for shape in shapes if shape[2]} == {max(16, 2 ** math.ceil(math.log2(n))) for n in documents}
    assert {shape[2] > 0 for shape in shapes} == {p.packed for p in passes}
    some, _ = steps.shapes(98, 99)
    assert set(some) <= set(shapes) and len(some) <= 32
    assert set(shapes) < set(steps.shapes(0, 300)[0]), "later epochs have other passes"


@pytest.mark.parametrize("length", [64, 63])
def test_a_pass_of_sixteen_documents_has_the_graphs_that_were_captured_for_it_padded_or_not(length):
    rows = Lengths([length] * 16)
    steps = Steps(rows, 16, 0, Passes(1024), collate, lambda each: each.tokens)
    ((only,),) = steps.shares_of(0)
    batch = collate([(row, *[np.full(length, 7)] * 2) for row in only.rows], only)
    documents = len(batch["documents"]) - 1  # as graphs.py counts them
    assert only.packed and documents == (16 if length == 64 else 17)
    assert steps.shapes(0, 1)[0] == [(*batch["input_ids"].shape, room(documents))]


# ----------------------------------------------------------------------------------------------------------------------
# steps


def steps_of(rows: Rows, per_step: int, seed: int = 42, **options) -> Steps:
    common = {"passes": Passes(600, grain=1), "collate": partial(collate, seed=seed), "cost": lambda each: each.tokens}
    return Steps(rows, per_step, seed, **common | options)


@pytest.mark.parametrize("count", [1, 5, 64, 70])
def test_each_epoch_has_every_row_once_and_is_another_one(count):
    steps = steps_of(Lengths([9] * count), 32)
    assert len(steps) == -(-count // 32)
    epochs = [[steps.rows_of(epoch * len(steps) + at) for at in range(len(steps))] for epoch in range(4)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch[:-1]] == [32] * (len(steps) - 1)
        assert sorted(sum(epoch, [])) == list(range(count))
    assert len({str(epoch) for epoch in epochs}) == (4 if count > 1 else 1)


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    """A run that is repeated a year later, on other hardware, must see its rows in the same order."""
    rows = Lengths(lengths_of_rows(10))
    assert [steps_of(rows, 4).rows_of(n) for n in (4, 0, 2)] == [[3, 1, 2, 9], [5, 6, 0, 7], [1, 8]]
    np.random.seed(5)
    for options in ({"passes": Passes(4096)}, {"processes": 3, "rank": 2}, {"cost": lambda each: 1.0, "even": True}):
        assert [steps_of(rows, 4, **options).rows_of(n) for n in range(9)] == [
            steps_of(rows, 4).rows_of(n) for n in range(9)
        ]
    assert steps_of(rows, 4, seed=43).rows_of(0) != steps_of(rows, 4).rows_of(0)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_shares_of_a_step_are_its_rows_with_what_they_train_and_their_noise(sample, processes):
    """The second step of an epoch of 11 rows has three, fewer than there are processes."""
    few = first(sample, 11)
    ranks = [steps_of(few, 8, processes=processes, rank=rank) for rank in range(processes)]
    for epoch, at in ((0, 0), (0, 1), (1, 1)):
        for steps in ranks:
            steps.set_epoch(epoch)
        items, n = [steps[at] for steps in ranks], 2 * epoch + at
        expected = {row: sample.row(row) for row in ranks[0].rows_of(n)}
        assert len(expected) == (3 if at else 8)
        found = [text for item in items for batch in item["passes"] for text in documents_in(batch)]
        assert sorted(found) == sorted(
            (ids.tolist(), labels.tolist(), noise(42, n, row, len(ids)).tolist())
            for row, (ids, labels) in expected.items()
        )
        targets = sum(int((labels[1:] != IGNORE).sum()) for _, labels in expected.values())
        assert {item["trained"] for item in items} == {targets}
        assert sum(len(batch["trained"]) for item in items for batch in item["passes"]) == targets
        sizes = [len(ids) for ids, _ in expected.values()]
        assert sum(item["seen"] for item in items) == sum(sizes)
        assert sum(item["pairs"] for item in items) == sum(n * (n + 1) // 2 for n in sizes)
        padded = sum(batch["input_ids"].numel() for item in items for batch in item["passes"])
        assert sum(item["padded"] for item in items) == padded


def documents_in(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and noise of each row of a batch, without the padding, which has no noise."""
    found, names = [], ("input_ids", "labels", "noise")
    bounds = (
        batch["documents"].tolist()
        if "documents" in batch
        else range(0, batch["labels"].numel() + 1, batch["labels"].shape[1])
    )
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        drawn = batch["noise"].flatten()[start:stop]
        size = int((drawn != 0).sum())
        assert not drawn[size:].any()
        found.append(tuple(batch[name].flatten()[start : start + size].tolist() for name in names))
    return [document for document in found if document[0]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_even_processes_make_as_many_passes_and_what_is_added_trains_and_counts_nothing(sample, processes):
    few = first(sample, 11)
    for at in (0, 1):
        plain, even = (
            [steps_of(few, 8, processes=processes, rank=rank, even=even)[at] for rank in range(processes)]
            for even in (False, True)
        )
        most = max(len(item["passes"]) for item in plain)
        assert most > 0 and (processes < 7 or at == 0 or any(not item["passes"] for item in plain))
        for a, b in zip(plain, even, strict=True):
            assert len(b["passes"]) == most and {**a, "passes": 0} == {**b, "passes": 0}
            added = b["passes"][len(a["passes"]) :]
            assert not any(len(batch["trained"]) for batch in added)
            assert all(
                torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a["passes"], b["passes"], strict=False)
            )


# ----------------------------------------------------------------------------------------------------------------------
# noise


def test_noise_is_a_function_of_seed_step_row_and_position():
    """The figures are those of the day it was written: a resumed run must draw them again."""
    written = [264245323, -89870854, 1504670794, -1313866248]
    assert noise(42, 3, 17, 4).tolist() == written
    assert noise(42, 3, 17, 900)[:4].tolist() == written and noise(42, 3, 17, 4).dtype == np.int32
    of = [(42, 3, 17), (43, 3, 17), (42, 4, 17), (42, 3, 18), (3, 42, 17), (42, 17, 3), (0, 0, 0), (2**32 - 1, 9**9, 7)]
    drawn = np.concatenate([noise(*numbers, 5000) for numbers in of])
    assert len(np.unique(drawn)) > len(drawn) - 5, "about 0.2 would be alike by chance"
    bits = np.unpackbits(drawn.view(np.uint8)).reshape(-1, 32).mean(0)
    assert abs(bits - 0.5).max() < 5 * 0.5 / len(drawn) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# collate


def row(number: int, *ids: int, trained_from: int = 1) -> tuple[int, np.ndarray, np.ndarray]:
    values = np.array(ids, np.int64)
    return number, values, np.where(np.arange(len(ids)) >= trained_from, values, IGNORE)


def test_rows_of_a_batch_are_padded_on_the_right_to_the_width_of_the_pass():
    assert IGNORE == modeling_ouro.IGNORE == -100, "data cannot import it: torch would come with it"
    batch = collate([row(0, 5, 6, 7, trained_from=2), row(1, 8, 9)], Pass((0, 1), 4, packed=False))
    assert set(batch) == {"input_ids", "labels", "trained"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["trained"].tolist() == [1, 4]  # of 7 and of 9
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7, IGNORE], [IGNORE, 9, IGNORE, IGNORE]]


def test_positions_begin_anew_in_each_row_of_a_pack_and_in_the_padding():
    batch = collate([row(0, 5, 6, 7), row(1, 8), row(2, 9, 10)], Pass((0, 1, 2), 9, packed=True))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE, 10] + 3 * [IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2]]
    assert batch["trained"].tolist() == [0, 1, 4]
    assert batch["documents"].tolist() == [0, 3, 4, 6, 9] and batch["documents"].dtype == torch.int32


# ----------------------------------------------------------------------------------------------------------------------
# rows train alike in every pass


@pytest.fixture(scope="module")
def nine_rows(sample):
    """Of all lengths, so that packs of 600 tokens hold one to three of them and leave different spaces."""
    return np.argsort(sample.lengths, kind="stable")[:: len(sample) // 9][:9].tolist()


LAYOUTS = {
    "alone": Passes(1, alone=0, grain=1),
    "packed": Passes(600, grain=1),
    "packed and padded": Passes(900, alone=10**9),
    "batches": Passes(2400, alone=0, grain=512),
}


def batches_of(sample: Rows, numbers: list[int], layout: str, seed: int | None = None) -> list[dict]:
    passes = LAYOUTS[layout].of({number: int(sample.lengths[number]) for number in numbers})
    return [collate([(n, *sample.row(n)) for n in each.rows], each, 3, seed) for each in passes]


def step_of(model, batches: list[dict], objective: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    trained = sum(len(batch["trained"]) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(**batch, objective=objective, num_items_in_batch=trained).loss
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


@objectives
def test_loss_and_gradients_do_not_depend_on_the_passes(tokenizer, sample, nine_rows, objective):
    model = tiny(vocab_size=len(tokenizer))
    total, grads = step_of(model, batches_of(sample, nine_rows, "alone"), objective)
    for layout in ("packed", "packed and padded", "batches"):
        batches = batches_of(sample, nine_rows, layout)
        assert 2 <= len(batches) < 9 and any("documents" in b for b in batches) == layout.startswith("packed")
        assert layout == "packed" or sum(b["labels"].numel() for b in batches) > sample.lengths[nine_rows].sum()
        other, other_grads = step_of(model, batches, objective)
        assert_close(other, total)
        assert_same_gradients(other_grads, grads)


def test_nor_do_they_with_dropout(sample, nine_rows):
    model = fused("nf4, double", lora_dropout=0.3)
    numbers = nine_rows[:5]
    results = {name: step_of(model, batches_of(sample, numbers, name, seed=42), "last") for name in LAYOUTS}
    total, grads = results.pop("alone")
    for other, other_grads in results.values():
        assert_close(other, total, 1e-5)
        assert_same_gradients(other_grads, grads, 1e-4)
    other, _ = step_of(model, batches_of(sample, numbers, "packed", seed=43), "last")
    assert abs(other - total) > 1e-4 * total, "that a mask is seen"


def test_a_pass_that_trains_nothing_has_no_loss_and_no_gradient(sample, nine_rows):
    """As of a process that must take part: its backward pass goes through all layers."""
    model = adapted("nf4, double")
    (batch,) = batches_of(sample, nine_rows[:1], "alone")
    loss, grads = step_of(model, [batch | {"trained": batch["trained"][:0]}], "last")
    assert loss == 0 and len(grads) == 2 * 7 * 4 and not any(grad.any() for grad in grads.values())


class Waits(TorchDispatchMode):
    """What a GPU would be waited for: operations whose result has a shape, or is a Python number, that it decides."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, called = torch.ops.aten, func.overloadpacket
        by_mask = called is aten.index and any(x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or called in (aten.nonzero, aten._local_scalar_dense):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@objectives
@pytest.mark.parametrize("layout", ["packed", "alone"])
def test_a_training_pass_waits_for_no_gpu(tokenizer, sample, nine_rows, layout, objective, monkeypatch):
    # On a GPU attention inside documents is one kernel.
    monkeypatch.setattr(modeling_ouro, "_attend_each", lambda q, k, v, documents: q + k + v)
    model = tiny(vocab_size=len(tokenizer))
    batch = batches_of(sample, nine_rows, layout)[-1]
    with Waits() as waits:
        model(**batch, objective=objective, num_items_in_batch=100).loss.backward()
    assert not waits.found
    with Waits() as waits:  # that it would be seen
        model(**without(batch, "trained"), objective=objective)
    assert waits.found


# ----------------------------------------------------------------------------------------------------------------------
# rows on disk


def test_the_place_of_a_prepared_row_is_its_file_and_line(tokenizer, tmp_path):
    """Also behind a row that was dropped, and for the pieces of a long one."""
    data = [(f"ถาม {i}", "ยาว" * 200 if i == 7 else f"ตอบ {i}") for i in range(3 * CHUNK // 2)]
    data[5] = ("", "ไม่มีคำถาม")
    s = replace(pairs(tmp_path / "data.jsonl", data), max_length=128, length_policy="split")
    rows, report = prepare(s, tokenizer, quiet=True)
    seen = Counter()
    for i in range(len(rows)):
        number = int(rows.place(i).removeprefix("data.jsonl, line "))
        seen[number] += 1
        ids, labels = rows.row(i)
        assert number == 8 or ids.tolist() == chat_ids(tokenizer, *data[number - 1])
        assert rows.lengths[i] == len(ids) and rows.trained[i] == (labels != IGNORE).sum() > 0
    assert seen.pop(8) > 1 and set(seen.values()) == {1} and 6 not in seen
    assert len(seen) + 1 == report["rows_kept"]
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(index)


def pairs(path: Path, rows: list[tuple[str, str]]) -> Settings:
    """Settings for a data set of these questions and answers, without floors that few short rows would fall through."""
    write_jsonl(path, *({"prompt": prompt, "completion": answer} for prompt, answer in rows))
    return Settings(dataset="pairs", dataset_path=str(path), overlap="none", cache_dir=str(path.parent / "cache"))


def chat_ids(tokenizer, prompt: str, answer: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(chat)


def test_token_ids_above_65535_are_kept(tokenizer, tmp_path):
    """In 16 bits 65,536 would be 0."""
    large, content = copy.deepcopy(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= {f"¤{i}": i for i in range(len(tokenizer), 1 << 16)}
    large._tokenizer = Tokenizer.from_str(json.dumps(content))
    large.add_tokens(["¤65536"])
    for tokens_of, width in ((large, pa.uint32()), (tokenizer, pa.uint16())):
        rows, report = prepare(pairs(tmp_path / "data.jsonl", [("ถาม", "¤65536")]), tokens_of, quiet=True)
        with pa.memory_map(str(Path(report["cache"]) / "rows.arrow")) as file:
            assert pa.ipc.open_file(file).schema.field("input_ids").type == pa.list_(width)
        assert rows.row(0)[0].tolist() == chat_ids(tokens_of, "ถาม", "¤65536")
        assert (65_536 in rows.row(0)[1]) == (tokens_of is large)


# ----------------------------------------------------------------------------------------------------------------------
# training


OPTIONS = ["--use_qlora", "false", "--optim", "adamw_torch", "--eval_steps", "0", "--lora_dropout", "0.05"]
OPTIONS += ["--total_ut_steps", "2", "--activation_checkpointing", "none", "--rows_per_step", "5", "--max_steps", "2"]
OPTIONS += ["--warmup_ratio", "0", "--dataset", "wangchan", "--max_length", "1400"]


def assert_same_learning(run: Path, expected: Path) -> None:
    """But for rounding: Adam divides by the gradient's size, so where that is all noise a step can go either way."""
    for a, b in zip(metrics(run), metrics(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
        for name in ("step", "epoch", "num_tokens", "learning_rate"):
            assert a[name] == b[name]
    ours, theirs = (load_file(folder / "final_adapter/adapter_model.safetensors") for folder in (run, expected))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 4
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() < 5e-3 * weight.norm(), name


@pytest.fixture(scope="module")
def by_one_pass(in_the_repository, tmp_path_factory):
    """A run each of whose steps is one pass of all its short rows, beside those of the longer ones."""
    return trained(tmp_path_factory.mktemp("one"), *OPTIONS, "--pass_tokens", "1000000")


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [("2048", Plan()), ("512", Plan(8, 4))],
    ids=["kept", "waiting"],
)
def test_the_same_is_learnt_by_whatever_passes_and_plans(by_one_pass, tmp_path, monkeypatch, tokens, plan):
    monkeypatch.setattr(cost.Memory, "plan", lambda self, tokens: plan)
    run = trained(tmp_path, *OPTIONS, "--pass_tokens", tokens)
    assert_same_learning(run, by_one_pass)
    assert json.loads((run / "manifest.json").read_text())["pass_tokens"] == int(tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "tokens"), [(2, "512"), (3, "1000000")])
def test_the_same_is_learnt_by_several_processes(by_one_pass, tmp_path, processes, tokens):
    argv = [*SMALL, *OPTIONS, "--pass_tokens", tokens, "--output_dir", str(tmp_path)]
    codes, printed = in_processes(processes, "train_qlora.py", *argv)
    assert codes == [0] * processes, printed
    assert_same_learning(tmp_path / "smoke", by_one_pass)


def test_the_trainer_takes_every_row_of_each_epoch_once_in_its_order(tmp_path, monkeypatch):
    """The epoch is no multiple of the step; the tokens that are counted are those of its rows."""
    seen, step_taken = [], LoopTrainer.training_step

    def recording(self, model, inputs, *rest):
        seen.append(sorted(ids for batch in inputs["passes"] for ids, *_ in documents_in(batch)))
        return step_taken(self, model, inputs, *rest)

    s = pairs(tmp_path / "data.jsonl", [(f"คำถามที่ {i}", "ตอบ" * (i % 7 + 1)) for i in range(14)])
    monkeypatch.setattr(LoopTrainer, "training_step", recording)
    argv = ["--dataset", "pairs", "--dataset_path", s.dataset_path, "--cache_dir", s.cache_dir, *OPTIONS[:6]]
    argv += ["--total_ut_steps", "1", "--num_train_epochs", "2", "--pass_tokens", "150", "--rows_per_step", "4"]
    run = trained(tmp_path, *argv)
    rows, report = prepare(s, load_tokenizer("sample/ouro-tiny"), quiet=True)
    steps = steps_of(rows, 4)
    assert len(rows) == 13 and len(steps) == 4
    assert seen == [sorted(rows.row(i)[0].tolist() for i in steps.rows_of(step)) for step in range(8)]
    lines = metrics(run)
    assert [lines[k]["num_tokens"] for k in (3, 7)] == [report["tokens"], 2 * report["tokens"]]
    assert [lines[k]["epoch"] for k in (3, 7)] == [1, 2]
