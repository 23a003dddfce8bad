"""Packing, collation, the order of epochs and the rows on disk; training with packs is training without them."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import train_qlora
from ouro.data.batches import IGNORE, EpochOrder, Rows, pack, padding
from ouro.data.cache import CHUNK, prepare
from ouro.model import modeling_ouro
from ouro.model.loading import load_tokenizer
from ouro.settings import Settings
from ouro.train.collate import collate

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from helpers import metrics, trained, write_jsonl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_ouro import assert_close, assert_same_gradients, gradients, objectives, tiny, without
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler
from transformers import AutoTokenizer

property_test = hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=200)


pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def sample(tokenizer, tmp_path_factory):
    s = Settings(dataset="sample", overlap="none", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare(s, tokenizer, quiet=True)[0]


def skewed(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as those of instruction data: most short, few ten times as long."""
    return np.random.default_rng(seed).lognormal(5.5, 0.8, count).astype(int) + 1


# ----------------------------------------------------------------------------------------------------------------------
# pack


def assert_best_fit_decreasing(packs: list[list[int]], lengths: list[int], limit: int) -> None:
    """Follows the packs row by row, longest first: each went where the least space was left, among equals anywhere."""
    place = {row: i for i, members in enumerate(packs) for row in members}
    spaces: dict[int, int] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [space for space in spaces.values() if space >= lengths[row]]
        if fitting:
            assert spaces[place[row]] == min(fitting)
        else:
            assert place[row] not in spaces
            spaces[place[row]] = limit
        spaces[place[row]] -= lengths[row]


limits_and_lengths = st.integers(1, 40).flatmap(
    lambda limit: st.tuples(st.just(limit), st.lists(st.integers(1, limit), min_size=1, max_size=60))
)


@property_test
@given(limits_and_lengths)
def test_packs_are_a_best_fit_decreasing_partition(case):
    limit, lengths = case
    packs = pack(np.array(lengths), limit)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    fills = sorted(sum(lengths[row] for row in members) for members in packs)
    assert fills[-1] <= limit
    assert_best_fit_decreasing(packs, lengths, limit)
    assert pack(np.array(lengths), limit) == packs


def test_packs_of_many_short_rows_are_nearly_full():
    lengths = np.minimum(skewed(5000), 4096)
    packs = pack(lengths, 4096)
    assert len(packs) == -(-int(lengths.sum()) // 4096)
    assert_best_fit_decreasing(packs, lengths.tolist(), 4096)


def test_no_rows_are_no_packs():
    assert pack(np.array([], int), 7) == []


# ----------------------------------------------------------------------------------------------------------------------
# collate


def document(*ids: int, trained_from: int = 1) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(ids, np.int64)
    return values, np.where(np.arange(len(ids)) >= trained_from, values, IGNORE)


def test_collate_pads_on_the_right_and_marks_what_is_padding():
    assert IGNORE == modeling_ouro.IGNORE == -100, "data cannot import it: torch would come with it"
    batch = collate([[document(5, 6, 7, trained_from=2)], [document(8, 9)]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "trained"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["trained"].tolist() == [1, 3]  # of 7 and of 9
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7], [IGNORE, 9, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_collate_counts_positions_anew_in_each_document_of_a_pack():
    batch = collate([[document(5, 6, 7), document(8), document(9, 10)], [document(11, 12, 13)]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE, 10], [IGNORE, 12, 13] + 3 * [IGNORE]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch["position_ids"].dtype == torch.int64
    assert batch["trained"].tolist() == [0, 1, 4, 6, 7]
    assert batch["documents"].tolist() == [0, 3, 4, 6, 9, 12] and batch["documents"].dtype == torch.int32


def test_packs_of_one_document_need_no_positions_and_a_batch_has_the_width_asked_for():
    assert "position_ids" not in collate([[document(5, 6, 7)], [document(8, 9)]])
    batch = collate([[document(5, 6), document(7)]], 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] and batch["labels"].shape == (1, 5)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1]]


def test_an_empty_item_is_padding_alone():
    batch = collate([[], [document(5, 6), document(7)]])
    assert batch["input_ids"].tolist() == [[0, 0, 0], [5, 6, 7]]
    assert batch["labels"].tolist() == [[IGNORE] * 3, [IGNORE, 6, IGNORE]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    nothing = collate([[], []])
    assert set(nothing) == {"input_ids", "labels", "attention_mask", "trained"} and not len(nothing.pop("trained"))
    assert all(value.dtype == torch.int64 and value.shape == (2, 1) for value in nothing.values())
    assert (nothing["labels"] == IGNORE).all() and not nothing["attention_mask"].any()


# ----------------------------------------------------------------------------------------------------------------------
# packed rows train as unpacked ones do


def model_for(tokenizer):
    return tiny(vocab_size=len(tokenizer))


def packed_sample(sample: Rows, limit: int, rows: list[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    return [[sample.row(rows[i]) for i in members] for members in pack(sample.lengths[rows], limit)]


@pytest.fixture(scope="module")
def nine_rows(sample):
    """Of all lengths, so that packs of 600 tokens hold one to three of them and leave different spaces."""
    return np.argsort(sample.lengths, kind="stable")[:: len(sample) // 9][:9].tolist()


def alone(model, documents, objective: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of documents that each have a batch of their own."""
    trained = sum(int((labels[1:] != IGNORE).sum()) for _, labels in documents)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in documents:
        batch = {"input_ids": torch.from_numpy(ids)[None], "labels": torch.from_numpy(labels)[None]}
        loss = model(**batch, objective=objective, num_items_in_batch=trained).loss
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def test_packed_rows_have_the_loss_and_the_gradients_of_unpacked_ones(tokenizer, sample, nine_rows):
    model = model_for(tokenizer)
    packs = packed_sample(sample, 600, nine_rows)
    sizes = Counter(map(len, packs))
    assert len(packs) >= 4 and len(sizes) >= 2 and max(sizes) >= 2
    expected, expected_gradients = alone(model, [sample.row(i) for i in nine_rows], "all")
    batch = collate(packs)
    assert (batch["attention_mask"][:, -1] == 0).any(), "some pack must be padded"
    for inputs in (without(batch, "attention_mask"), batch):  # training leaves the mask out
        out = model(**inputs, objective="all")
        assert out.trained_tokens == sum(int((sample.row(i)[1] != IGNORE).sum()) for i in nine_rows)
        out.loss.backward()
        assert_close(out.loss, expected)
        assert_same_gradients(gradients(model), expected_gradients)


@pytest.mark.parametrize("limit", [600, 1], ids=["packs", "rows"])
def test_what_a_batch_says_of_itself_is_what_the_model_would_find(tokenizer, sample, nine_rows, limit):
    model = model_for(tokenizer)
    batch = without(collate([*packed_sample(sample, limit, nine_rows), []]), "attention_mask")
    found = {name: value for name, value in batch.items() if name not in ("trained", "documents")}
    assert len(batch) == len(found) + (2 if limit == 600 else 1)
    losses = []
    for inputs in (batch, found):
        out = model(**inputs, objective="all")
        out.loss.backward()
        losses.append((out.loss.detach(), out.trained_tokens, out.correct_tokens, gradients(model)))
    (*one, grads), (*other, other_grads) = losses
    assert one == other and all(torch.equal(grads[name], other_grads[name]) for name in grads)


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
@pytest.mark.parametrize("limit", [600, 1], ids=["packs", "rows"])
def test_a_training_pass_waits_for_no_gpu(tokenizer, sample, nine_rows, limit, objective, monkeypatch):
    # On a GPU attention inside documents is one kernel.
    monkeypatch.setattr(modeling_ouro, "_attend_each", lambda q, k, v, documents: q + k + v)
    model = model_for(tokenizer)
    batch = without(collate(packed_sample(sample, limit, nine_rows)), "attention_mask")
    with Waits() as waits:
        model(**batch, objective=objective, num_items_in_batch=torch.tensor(100)).loss.backward()
    assert not waits.found
    with Waits() as waits:  # that it would be seen
        model(**without(batch, "trained"), objective=objective)
    assert waits.found


@objectives
def test_a_step_with_empty_items_has_the_loss_and_the_gradients_of_its_rows(tokenizer, sample, objective):
    model = model_for(tokenizer)
    order = EpochOrder(sample.sizes[:21], 8, seed=0, grouped=True)
    step = list(order)[-8:]
    assert step[5:] == [-1] * 3 and min(step[:5]) >= 0
    expected, expected_gradients = alone(model, [sample.row(i) for i in step[:5]], objective)
    trained = sum(int((sample.row(i)[1] != IGNORE).sum()) for i in step[:5])
    for batch in (1, 4, 8):  # of 1: three are empty
        total = 0
        for at in range(0, 8, batch):
            inputs = without(collate([sample[i] for i in step[at : at + batch]]), "attention_mask")
            loss = model(**inputs, objective=objective, num_items_in_batch=trained).loss
            loss.backward()
            total += loss.detach()
        assert_close(total, expected)
        assert_same_gradients(gradients(model), expected_gradients)


# ----------------------------------------------------------------------------------------------------------------------
# the order of an epoch


def in_epoch(order: EpochOrder, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


grouping = pytest.mark.parametrize("grouped", [False, True], ids=["packs", "rows"])


@grouping
@pytest.mark.parametrize("rows", [0, 1, 70, 96])
def test_each_epoch_has_every_row_once_then_fillers_to_a_whole_step_and_is_another_one(rows, grouped):
    order = EpochOrder(skewed(rows), 32, seed=1, grouped=grouped)
    epochs = [in_epoch(order, epoch) for epoch in range(4)]
    fillers = -rows % 32
    assert len(order) == rows + fillers and len(order) % 32 == 0
    for epoch in epochs:
        assert sorted(epoch[:rows]) == list(range(rows)) and epoch[rows:] == [-1] * fillers
    assert len(set(map(tuple, epochs))) == (4 if rows > 1 else 1)


@grouping
def test_the_order_depends_on_seed_and_epoch_alone(grouped):
    """A run that is repeated a year later must see its rows in the same order."""
    sizes = skewed(300)
    first = EpochOrder(sizes, 8, seed=3, grouped=grouped)
    third = [in_epoch(first, epoch) for epoch in range(3)][2]
    np.random.seed(5)
    torch.manual_seed(5)
    assert in_epoch(EpochOrder(sizes, 8, seed=3, grouped=grouped), 2) == third
    assert in_epoch(EpochOrder(sizes, 8, seed=4, grouped=grouped), 2) != third
    sizes, expected = np.array([5, 3, 9, 1, 7, 2, 8, 4, 6]), [0, 7, 4, 3, 1, 2, 8, 6, 5, -1]
    assert grouped or in_epoch(EpochOrder(sizes, 2, seed=42, grouped=False), 1) == expected


def test_a_step_holds_rows_of_like_length():
    sizes = np.random.default_rng(0).integers(1, 1001, 16 * 32 * 3)
    grouped, shuffled = (
        np.reshape(sizes[in_epoch(EpochOrder(sizes, 32, seed=0, grouped=g), 1)], (-1, 32)) for g in (True, False)
    )
    assert np.ptp(shuffled, axis=1).mean() > 900
    # A span of 16 steps of evenly spread lengths cut into 16 parts: each is a sixteenth of 1,000 wide, a few random.
    assert np.ptp(grouped, axis=1).mean() < 80 and np.ptp(grouped, axis=1).max() < 160
    assert all((np.diff(step) <= 0).all() for step in grouped), "the longest row first within a step"
    sizes = skewed(32 * 16 * 4)
    by_chance, alike = (padding(sizes, EpochOrder(sizes, 32, seed=0, grouped=g), 8) for g in (False, True))
    assert by_chance > 0.4 and alike < by_chance / 8


@pytest.mark.parametrize("rows", [64, 67, 95, 3, 1000])
def test_the_first_step_has_the_longest_row(rows):
    sizes = skewed(rows)
    for epoch in range(30):
        order = in_epoch(EpochOrder(sizes, 32, seed=0, grouped=True), epoch)
        assert sizes[order[:32]].max() == sizes.max(), epoch


def test_padding_is_what_counting_gives():
    sizes, order = [5, 1, 7, 2, 2], [3, 0, 4, 2, 1, -1, -1, -1, -1]
    assert padding(np.array(sizes), order[:5], 2) == pytest.approx(1 - 17 / (2 * 5 + 2 * 7 + 1))
    assert padding(np.array(sizes), order, 3) == pytest.approx(1 - 17 / (3 * 5 + 3 * 7 + 3 * 1))  # a token at least


@grouping
@pytest.mark.parametrize("rows", [192, 193, 203, 5])
def test_the_steps_hold_the_same_rows_on_one_two_and_four_processes(rows, grouped):
    batch, passes = 4, 8  # 32 rows a step
    sizes = skewed(rows)

    def steps(processes: int) -> list[list[int]]:
        shares = []
        for index in range(processes):
            order = EpochOrder(sizes, batch * passes, seed=7, grouped=grouped)
            order.set_epoch(1)
            batches = BatchSampler(order, batch, drop_last=False)
            shares.append(list(BatchSamplerShard(batches, processes, index) if processes > 1 else batches))
        assert {len(share) for share in shares} == {len(order) // batch // processes}
        assert {len(forward) for share in shares for forward in share} == {batch}
        each = passes // processes
        return [
            sorted(row for share in shares for forward in share[at : at + each] for row in forward)
            for at in range(0, len(shares[0]), each)
        ]

    one = steps(1)
    assert len(one) == -(-rows // 32) and all(len(step) == 32 for step in one)
    assert sorted(sum(one, [])) == [-1] * (-rows % 32) + list(range(rows))
    assert steps(2) == steps(4) == one


# ----------------------------------------------------------------------------------------------------------------------
# rows on disk


def write_rows(path: Path, batches: list[list[tuple[list[int], list[int]]]], ids_type=None) -> Path:
    """As data_config.py writes them; row i is from line i + 1 of data.jsonl."""
    types = {"input_ids": pa.list_(ids_type or pa.uint16()), "trained": pa.list_(pa.int32()), "place": pa.string()}
    schema, line = pa.schema(types), 0
    with pa.ipc.new_file(str(path), schema) as writer:
        for rows in batches:
            places = [f"data.jsonl, line {line + i + 1}" for i in range(len(rows))]
            line += len(rows)
            columns = [row[0] for row in rows], [row[1] for row in rows], places
            arrays = [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return path


def test_a_row_is_what_was_written_in_whatever_batch(tmp_path):
    chance = np.random.default_rng(0)
    written = []
    for length in chance.integers(1, 30, 600):
        edges = sorted(chance.choice(length + 1, size=min(2, length + 1), replace=False).tolist())
        written.append((chance.integers(0, 60_000, length).tolist(), edges))
    batches = [written[:256], written[256:257], written[257:513], written[513:]]
    rows = Rows(write_rows(tmp_path / "rows.arrow", batches))
    assert len(rows) == 600 and rows.lengths.tolist() == rows.sizes.tolist() == [len(ids) for ids, _ in written]
    for index, (ids, (start, stop)) in enumerate(written):
        assert rows.places(index) == [f"data.jsonl, line {index + 1}"]
        ((got_ids, labels),) = rows[index]
        assert got_ids.dtype == labels.dtype == np.int64
        assert got_ids.tolist() == ids
        assert labels.tolist() == [x if start <= i < stop else IGNORE for i, x in enumerate(ids)]


def test_row_minus_one_is_empty_and_what_is_not_there_is_refused(tmp_path):
    rows = Rows(write_rows(tmp_path / "rows.arrow", [[([1, 2], [1, 2])], [([3], [0, 1]), ([4, 5, 6], [0, 1, 2, 3])]]))
    assert rows[2][0][1].tolist() == [4, IGNORE, 6]
    for packs in (None, [[2, 0], [1]]):
        rows.packs = packs
        assert len(rows) == (3 if packs is None else 2) and rows[-1] == rows.places(-1) == []
        for read, index in itertools.product((rows.__getitem__, rows.places), (len(rows), -2)):
            with pytest.raises(IndexError):
                read(index)
    assert rows.sizes.tolist() == [5, 1]
    assert [ids.tolist() for ids, _ in rows[0]] == [[4, 5, 6], [1, 2]] and rows[1][0][0].tolist() == [3]
    assert rows.places(0) == ["data.jsonl, line 3", "data.jsonl, line 1"] and rows.places(1) == ["data.jsonl, line 2"]
    none = Rows(write_rows(tmp_path / "none.arrow", []))
    assert len(none) == 0 and none.lengths.tolist() == none.sizes.tolist() == none[-1] == []


@pytest.mark.parametrize("packing", [False, True])
def test_the_place_of_a_prepared_row_is_its_file_and_line(tokenizer, tmp_path, packing):
    """Also behind a row that was dropped, and for the pieces of a long one."""
    data = [(f"ถาม {i}", "ยาว" * 200 if i == 7 else f"ตอบ {i}") for i in range(3 * CHUNK // 2)]
    data[5] = ("", "ไม่มีคำถาม")
    s = replace(pairs(tmp_path / "data.jsonl", data), packing=packing, max_length=128, length_policy="split")
    rows, report = prepare(s, tokenizer, quiet=True)
    seen = Counter()
    for i in range(len(rows)):
        for (ids, _), place in zip(rows[i], rows.places(i), strict=True):
            number = int(place.removeprefix("data.jsonl, line "))
            seen[number] += 1
            assert number == 8 or ids.tolist() == chat_ids(tokenizer, *data[number - 1])
    assert seen.pop(8) > 1 and set(seen.values()) == {1} and 6 not in seen
    assert len(seen) + 1 == report["rows_kept"]
    assert not packing or max(len(rows[i]) for i in range(len(rows))) > 1


def pairs(path: Path, rows: list[tuple[str, str]]) -> Settings:
    """Settings for a data set of these questions and answers, without floors that few short rows would fall through."""
    write_jsonl(path, *({"prompt": prompt, "completion": answer} for prompt, answer in rows))
    return Settings(dataset="pairs", dataset_path=str(path), overlap="none", cache_dir=str(path.parent / "cache"))


def chat_ids(tokenizer, prompt: str, answer: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(chat)


def test_token_ids_above_65535_are_kept(tmp_path):
    folder = shutil.copytree("sample/ouro-tiny", tmp_path / "large")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens |= {f"¤{i}": i for i in range(len(tokens), 1 << 16)}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    large = AutoTokenizer.from_pretrained(folder)
    large.add_tokens(["กาแฟ", "ขนม"])  # ids 65,536 and 65,537, which in 16 bits would be 0 and 1
    s = pairs(tmp_path / "data.jsonl", [(f"ถาม {i}", "กาแฟกับขนม") for i in range(5)])
    for tokens_of, width in ((large, pa.uint32()), (load_tokenizer("sample/ouro-tiny"), pa.uint16())):
        rows, report = prepare(s, tokens_of, quiet=True)
        with pa.memory_map(str(Path(report["cache"]) / "rows.arrow")) as file:
            assert pa.ipc.open_file(file).schema.field("input_ids").type == pa.list_(width)
        assert rows.row(0)[0].tolist() == chat_ids(tokens_of, "ถาม 0", "กาแฟกับขนม")
        assert ({65_536, 65_537} < set(rows.row(0)[1].tolist())) == (tokens_of is large)


# ----------------------------------------------------------------------------------------------------------------------
# training


def short_run(folder: Path, s: Settings, *argv: str) -> Path:
    """Trains on the few rows of `s` in fp32; the run's folder."""
    argv += ("--dataset", "pairs", "--dataset_path", s.dataset_path, "--cache_dir", s.cache_dir, "--eval_steps", "0")
    argv += ("--use_qlora", "false", "--optim", "adamw_torch", "--logging_steps", "1", "--total_ut_steps", "1")
    return trained(folder, *argv)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_trainer_takes_every_row_of_each_epoch_once_in_its_order(tmp_path, monkeypatch, packing):
    """The epoch is no multiple of the step; the tokens that are counted are those of its rows."""
    seen: list[list[int]] = []
    items_seen = 0

    def recording(items, width=1):
        nonlocal items_seen
        batch = collate(items, width)
        items_seen += len(items)
        seen.extend(ids.tolist() for item in items for ids, _ in item)
        return batch

    s = pairs(tmp_path / "data.jsonl", [(f"คำถามที่ {i}", "ตอบ" * (i % 7 + 1)) for i in range(14)])
    s = replace(s, packing=packing == "true", max_length=150)
    monkeypatch.setattr(train_qlora, "collate", recording)
    argv = ["--packing", packing, "--max_length", "150", "--num_train_epochs", "2"]
    run = short_run(tmp_path, s, *argv, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    rows, report = prepare(s, load_tokenizer("sample/ouro-tiny"), quiet=True)
    order = EpochOrder(rows.sizes, 4, seed=42, grouped=packing == "false")
    epochs = [in_epoch(order, epoch) for epoch in (0, 1)]
    assert len(rows) % 4 and -1 in epochs[0] and (len(rows) == 13) == (packing == "false")
    assert seen == [ids.tolist() for epoch in epochs for i in epoch for ids, _ in rows[i]]
    assert items_seen == 2 * len(order) and epochs[0] != epochs[1]
    lines, per_epoch = metrics(run), len(order) // 4
    assert len(lines) == 2 * per_epoch
    assert [lines[k * per_epoch - 1]["num_tokens"] for k in (1, 2)] == [report["tokens"], 2 * report["tokens"]]
    assert [lines[k * per_epoch - 1]["epoch"] for k in (1, 2)] == [1, 2]


def test_eight_batches_of_one_row_train_as_one_batch_of_eight(tmp_path):
    """11 rows: the second step of each epoch has three of them and five fillers."""
    s = pairs(tmp_path / "data.jsonl", [(f"คำถามที่ {i}", "ตอบ" * (i * i % 11 + 1)) for i in range(12)])
    runs = [
        short_run(
            tmp_path / f"{rows} x {passes}", s, "--num_train_epochs", "3", "--lora_dropout", "0",
            "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", passes,
        )
        for rows, passes in (("1", "8"), ("8", "1"))
    ]  # fmt: skip
    split, whole = map(metrics, runs)
    assert len(split) == len(whole) == 6 and split[0]["loss"] - split[-1]["loss"] > 0.5
    for a, b in zip(split, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for name in ("step", "epoch", "num_tokens", "mean_token_accuracy", "learning_rate"):
            assert a[name] == b[name]
    a, b = (load_file(run / "final_adapter/adapter_model.safetensors") for run in runs)
    assert a.keys() == b.keys() and len(a) == 2 * 7 * 4
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)
