"""The guards of a run: what stops it, what it names, what stays on the disk; held-out loss and log, recounted; what its
settings do to optimizer, precision and GPUs."""

import json
import math
import os
import re
import shutil
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import train_qlora
from ouro.data.batches import Passes, Rows, Steps
from ouro.data.cache import prepare
from ouro.files import UserError, call, latest
from ouro.model import cost, loading
from ouro.model.loading import WEIGHTS, load_ouro, load_tokenizer, sizes
from ouro.model.modeling_ouro import IGNORE, PROJECTIONS
from ouro.settings import FROM_ENVIRONMENT, Settings
from ouro.train import build, machine, run_folder, trainer
from ouro.train.trainer import LoopTrainer

import pytest
import torch
from bitsandbytes.nn import Params4bit
from helpers import ROOT, SMALL, metrics, repeatable, resolved, trained, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_sets import Lengths

MODEL = "sample/ouro-tiny"
PLAIN = ["--use_qlora", "false", "--optim", "adamw_torch", "--activation_checkpointing", "none"]
FOUR = ["--rows_per_step", "4"]
RARE = "๛"  # a sign that is in one row only


pytestmark = pytest.mark.usefixtures("in_the_repository")


def pairs(path: Path, rows: list[tuple[str, str]]) -> list[str]:
    """The arguments that train on these questions and answers, at one loop."""
    write_jsonl(path, *({"prompt": prompt, "completion": answer} for prompt, answer in rows))
    return ["--dataset", "pairs", "--dataset_path", str(path), "--total_ut_steps", "1"]


def prepared(*argv: str) -> Rows:
    return prepare(resolved(*argv).settings, load_tokenizer(MODEL), quiet=True)[0]


def rows_of(rows: Rows, step: int, per_step: int) -> list[int]:
    """The rows of a step, counted from 1, in an order made anew."""
    return Steps(rows, per_step, 42, Passes(64), None, None).rows_of(step - 1)


def places_of(rows: Rows, step: int, per_step: int) -> set[str]:
    return {rows.place(i) for i in rows_of(rows, step, per_step)}


def named_rows(told: object) -> set[str]:
    """The rows that an error names, each once."""
    (line,) = (line for line in str(told).splitlines() if line.startswith("its rows: "))
    places = re.findall(r"data\.jsonl, line \d+", line)
    assert line == f"its rows: {', '.join(places)}" and len(places) == len(set(places))
    return set(places)


def checkpoints(run: Path) -> list[str]:
    """By step; also unfinished ones, whatever their names."""
    return sorted((path.name for path in run.rglob("*checkpoint*")), key=lambda name: (len(name), name))


# ----------------------------------------------------------------------------------------------------------------------
# a loss or a gradient that is no number


def broken_model(folder: Path, token: int) -> Path:
    """The tiny model with NaN in the embedding of a token: rows without it do not meet it."""
    model = load_ouro(MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    return folder


def rare_token() -> int:
    """A token of the rare sign that no other text here has."""
    tokenizer = load_tokenizer(MODEL)
    usual = set(tokenizer("".join(f"{q} {a}" for q, a in QUESTIONS), add_special_tokens=False).input_ids)
    usual |= set(tokenizer.apply_chat_template([{"role": "user", "content": "x"}]))
    return next(i for i in tokenizer(RARE, add_special_tokens=False).input_ids if i not in usual)


QUESTIONS = [(f"คำถามที่ {i}", "ตอบ" * (i * i % 7 + 1)) for i in range(18)]


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(tmp_path, monkeypatch, capsys):
    """Saving is due in that step: the numbers are looked at before. The same command continues, and ends at the same
    step."""
    file, rows = tmp_path / "data.jsonl", list(QUESTIONS)
    whole = prepared(*pairs(file, rows))
    bad = int(whole.place(rows_of(whole, 3, 4)[0]).rpartition(" ")[2])
    rows[bad - 1] = (rows[bad - 1][0], rows[bad - 1][1][:-1] + RARE)
    model = ["--model_name_or_path", str(broken_model(tmp_path / "model", rare_token()))]
    argv = [*pairs(file, rows), *model, *PLAIN, *FOUR, "--max_steps", "8", "--eval_steps", "0", "--save_steps", "1"]
    argv += ["--logging_steps", "10", "--output_dir", str(tmp_path / "out")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["train_qlora.py", *latest([*SMALL, *argv])])
        with pytest.raises(SystemExit) as ended:
            call(train_qlora.main)
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.count("\n") == 3
        assert (
            "\nthe same command continues from checkpoint-2, most likely to this again; other settings, --seed" in told
        )
        assert told.startswith("error: step 3: the loss is nan, the gradient's norm nan; lower learning_rate")
        assert f"data.jsonl, line {bad}" in named_rows(told) == places_of(whole, 3, 4)
        run = tmp_path / "out/smoke"
        assert checkpoints(run) == ["checkpoint-1", "checkpoint-2"]
        assert not (run / "final_adapter").exists() and not (run / "completed").exists()
        assert [line["step"] for line in metrics(run)] == [1]
    with pytest.raises(UserError, match="a run with other settings"):
        trained(tmp_path / "out", *argv[:-2], "--learning_rate", "1e-5")
    with pytest.raises(UserError, match="began with .*; rows_sha256"):
        pairs(file, QUESTIONS)
        trained(tmp_path / "out", *argv[:-2])
    changed = trained(tmp_path / "out", *argv[:-2], "--overwrite", "--max_steps", "3", "--learning_rate", "1e-5")
    assert [line["step"] for line in metrics(changed)] == [1, 3], "what the message says works"


def test_of_a_model_that_gives_nan_neither_the_learning_rate_nor_a_checkpoint_is_told(tmp_path):
    """The first step's numbers come before any weight has changed, and nothing is saved yet."""
    token = load_tokenizer(MODEL)("<|im_start|>", add_special_tokens=False).input_ids[0]  # which each row begins with
    model = ["--model_name_or_path", str(broken_model(tmp_path / "model", token))]
    with pytest.raises(UserError) as told:
        trained(tmp_path, *pairs(tmp_path / "data.jsonl", QUESTIONS), *model, *PLAIN, *FOUR, "--eval_steps", "0")
    first, _, last = str(told.value).splitlines()
    assert (
        first.startswith("step 1: the loss is nan")
        and "the model itself gives it" in first
        and "learning_rate" not in first
    )
    assert last.startswith(
        "the same command begins anew, most likely to this again; other settings or --seed: with --ov"
    )


def test_a_held_out_loss_of_the_base_that_is_no_number_is_told_and_not_recorded(tmp_path):
    token = load_tokenizer(MODEL)("<|im_start|>", add_special_tokens=False).input_ids[0]
    model = ["--model_name_or_path", str(broken_model(tmp_path / "model", token))]
    told = r"before the first step the held-out loss is nan: the model itself gives it \(are its weights whole\?\)"
    with pytest.raises(UserError, match=told):
        trained(tmp_path, *model, *PLAIN, *FOUR, "--dataset", "sample", "--eval_rows", "2", "--eval_steps", "1")
    (manifest,) = tmp_path.rglob("manifest.json")
    assert "base_held_out_loss" not in json.loads(manifest.read_text())


# ----------------------------------------------------------------------------------------------------------------------
# thresholds


def bare_trainer(recent=(), rates=(), **settings) -> LoopTrainer:
    """What the guards look at, without a model."""
    trainer = LoopTrainer.__new__(LoopTrainer)
    trainer.settings = Settings(**settings)
    trainer._recent, trainer._rates, trainer._measured_from = deque(recent, maxlen=50), list(rates), 0
    trainer._rows_of = lambda step: [f"rows of {step}"]
    return trainer


LOSSES = [2.0] * 25 + [4.0] * 24 + [100.0]  # median 3, mean 4.9
ABOVE = math.nextafter(3 * 2.5, 1e9)


@pytest.mark.parametrize(
    ("step", "loss", "accuracy", "norm", "recent", "told"),
    [
        (1, 2.0, 0.5, 1.0, [], None),
        (
            1,
            math.nan,
            0.5,
            1.0,
            [],
            "the loss is nan, the gradient's norm 1; the model itself gives it (are its weights whole?), or a row",
        ),
        (2, math.nan, 0.5, 1.0, [], "the loss is nan, the gradient's norm 1; lower learning_rate"),
        (1, -math.inf, 0.5, 1.0, [], "the loss is -inf, the gradient's norm 1"),
        (1, 2.0, 0.5, math.inf, [], "the loss is 2, the gradient's norm inf"),
        (200, 3 * 2.5, 0.5, 1.0, LOSSES, None),
        (200, ABOVE, 0.5, 1.0, LOSSES, "max_loss_spike = 2.5 times the median 3.0000 of the 50 steps before"),
        (200, 1e9, 0.5, 1.0, LOSSES[:49], None),
        (100, 0.02, 0.995, 1.0, [], None),
        (100, math.nextafter(0.02, 0), 0.5, 1.0, [], "(min_loss = 0.02)"),
        (100, 2.0, math.nextafter(0.995, 1), 1.0, [], "(max_token_accuracy = 0.995) before step 100"),
        (101, 0.0, 1.0, 1.0, [], None),
    ],
)
def test_numbers_that_lose_a_run_are_beyond_a_threshold(step, loss, accuracy, norm, recent, told):
    reason = bare_trainer(recent, max_loss_spike=2.5)._lost(step, loss, accuracy, norm)
    assert told in reason if told else reason is None


@pytest.fixture
def kept(monkeypatch) -> list[LoopTrainer]:
    """The trainers that are made."""
    kept, made = [], LoopTrainer.__init__

    def keep(self, *args, **kwargs):
        kept.append(self)
        made(self, *args, **kwargs)

    monkeypatch.setattr(LoopTrainer, "__init__", keep)
    return kept


def test_in_every_epoch_a_step_has_one_loss_to_measure_spikes_by_and_rows_to_name(tmp_path, monkeypatch, kept):
    seen, lost = [], LoopTrainer._lost
    monkeypatch.setattr(
        LoopTrainer, "_lost", lambda self, *args: seen.append((*args, list(self._recent))) or lost(self, *args)
    )
    data = pairs(tmp_path / "data.jsonl", QUESTIONS[:7])
    argv = [*data, *PLAIN, *FOUR, "--num_train_epochs", "3", "--eval_steps", "0", "--logging_steps", "1"]
    lines, rows = metrics(trained(tmp_path, *argv)), prepared(*data)
    assert len(lines) == len(seen) == 3 * math.ceil(len(rows) / 4)
    losses = [line["loss"] for line in lines]
    for i, (step, loss, accuracy, norm, before) in enumerate(seen):
        assert (step, accuracy) == (i + 1, pytest.approx(lines[i]["mean_token_accuracy"], abs=1e-4))
        assert (loss, norm) == pytest.approx((losses[i], lines[i]["grad_norm"]), abs=1e-6)
        assert before == pytest.approx(losses[:i], abs=1e-6)
        assert sorted(kept[0]._rows_of(step)) == sorted(places_of(rows, step, 4))


def test_rows_with_nothing_to_learn_stop_the_run_early(tmp_path):
    data = pairs(tmp_path / "data.jsonl", [(question, "ก") for question, _ in QUESTIONS])
    argv = [*data, *PLAIN, *FOUR, "--learning_rate", "2e-3", "--eval_steps", "0", "--save_steps", "1"]
    argv += ["--max_steps", "30", "--logging_steps", "1", "--lr_scheduler_type", "constant", "--warmup_ratio", "0"]
    with pytest.raises(UserError, match=r"step \d+: collapsed, there is nothing to learn: .* data_report.json") as e:
        trained(tmp_path, *argv, "--min_loss", "0.5")
    step, run = int(re.match(r"step (\d+)", str(e.value))[1]), tmp_path / "smoke"
    assert named_rows(e.value) == places_of(prepared(*data), step, 4) and (run / "data_report.json").exists()
    assert len(metrics(run)) == step - 1 and all(line["loss"] >= 0.5 for line in metrics(run))
    assert checkpoints(run) == [f"checkpoint-{k}" for k in (step - 2, step - 1)]


def test_a_machine_that_became_slow_is_warned_of_below_half_the_median_of_the_first_fifty_steps(capsys):
    trainer, rare = bare_trainer(), bare_trainer()
    # Step 47 is slow, but not more than a step of the first fifty; the first step compiles, and is no measure.
    for step, rate in ((46, 100.0), (47, 1.0), (48, 900.0), (49, 100.0), (50, 100.0), (51, 50.0)):
        trainer._watch(step, rate)
    for step, rate in ((1, 1.0), (100, 100.0), (200, 90.0)):  # logging_steps: 100
        rare._watch(step, rate)
    assert capsys.readouterr().out == ""
    trainer._watch(52, math.nextafter(50, 0))
    rare._watch(300, 49.0)
    warned = capsys.readouterr().out.splitlines()
    assert warned[0].startswith("warning: step 52: 50 tokens/s, less than half of the 100 of the first 50 steps")
    assert len(warned) == 2 and "step 300: 49 tokens/s, less than half of the 100" in warned[1]


# ----------------------------------------------------------------------------------------------------------------------
# the held-out loss


def cross_entropy(adapter: Path | None, loops: int, documents) -> tuple[float, int, int]:
    """Of the rows by torch, each alone: the sum, the predictions that were right, and the trained tokens."""
    model = load_ouro(MODEL, total_ut_steps=loops, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    total, correct, count = 0.0, 0, 0
    for ids, labels in documents:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].double()
        targets = torch.from_numpy(labels)[1:]
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += int((targets != IGNORE).sum())
    return total, correct, count


def test_the_held_out_loss_is_the_cross_entropy_of_the_held_out_rows_after_each_loop(tmp_path):
    argv = [*PLAIN, "--total_ut_steps", "2", "--dataset", "sample"]
    steps = ["--max_steps", "2", "--rows_per_step", "2"]
    run = trained(tmp_path, *argv, *steps, "--eval_rows", "5", "--eval_steps", "1", "--warmup_ratio", "0")
    s, tokenizer = resolved(*argv).settings, load_tokenizer(MODEL)
    held_out, _ = prepare(s, tokenizer, "held_out", quiet=True)
    training = prepared(*argv)
    known = {tuple(training.row(i)[0]) for i in range(len(training))}
    rows = [held_out.row(i * 42 // 5) for i in range(5)]
    assert len(held_out) == 42 and len(known) == 204 and not any(tuple(ids) in known for ids, _ in rows)
    lines = metrics(run)
    assert [len(line["held_out_loss"]) for line in lines] == [2, 2]
    for loops in (1, 2):
        total, _, count = cross_entropy(run / "final_adapter", loops, rows)
        assert lines[-1]["held_out_loss"][loops - 1] == pytest.approx(total / count, abs=1e-4)
    assert lines[0]["held_out_loss"] != lines[1]["held_out_loss"]
    for loops, loss in enumerate(json.loads((run / "manifest.json").read_text())["base_held_out_loss"], 1):
        total, _, count = cross_entropy(None, loops, rows)
        assert loss == pytest.approx(total / count, abs=1e-4)
    # other rows would give another number, so the equality above says which were taken
    total, _, count = cross_entropy(run / "final_adapter", 2, [held_out.row(i) for i in range(5)])
    assert abs(lines[-1]["held_out_loss"][1] - total / count) > 1e-3


def test_measuring_the_held_out_loss_does_not_disturb_training(tmp_path, capsys):
    """The dropout masks and the NF4 weights of the steps after it are what they would have been."""
    argv = ["--max_steps", "4", "--rows_per_step", "1", "--lora_dropout", "0.3", "--total_ut_steps", "1"]
    argv += ["--dataset", "sample", "--eval_rows", "2", "--logging_steps", "1", "--warmup_ratio", "0"]
    without, measured = (trained(tmp_path / steps, *argv, "--eval_steps", steps) for steps in ("0", "2"))
    lines = repeatable(measured)
    assert ["held_out_loss" in line for line in lines] == [False, True, False, True]
    assert [{name: x for name, x in line.items() if name != "held_out_loss"} for line in lines] == repeatable(without)
    weights = [(run / "final_adapter/adapter_model.safetensors").read_bytes() for run in (without, measured)]
    assert weights[0] == weights[1]
    assert capsys.readouterr().out.count("held out ") == 2


@pytest.mark.parametrize("why", ["no split", "no rows"])
def test_without_a_held_out_part_one_line_says_so(tmp_path, capsys, why):
    if why == "no split":
        shutil.copy(ROOT / "sample/wangchan/train.jsonl", tmp_path / "data.jsonl")
        data = ["--dataset", "sample", "--dataset_path", str(tmp_path / "data.jsonl")]
    else:
        data = pairs(tmp_path / "data.jsonl", QUESTIONS[:3])
    argv = [*data, *PLAIN]
    assert train_qlora.held_out_rows(resolved(*argv).settings, load_tokenizer(MODEL)) is None
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no held-out loss: ")]
    reason = "has no split 'test'" if why == "no split" else "its held-out part has no rows"
    assert len(said) == 1 and reason in said[0]


# ----------------------------------------------------------------------------------------------------------------------
# the log


def test_each_line_of_the_log_is_the_mean_over_its_steps_and_a_recount_of_their_rows(tmp_path):
    data = pairs(tmp_path / "data.jsonl", QUESTIONS)
    argv = [*data, *PLAIN, *FOUR, "--lora_dropout", "0", "--lr_scheduler_type", "constant", "--eval_steps", "0"]
    argv += ["--warmup_ratio", "0", "--learning_rate", "1e-2"]
    each = metrics(trained(tmp_path / "each", *argv, "--max_steps", "10", "--logging_steps", "1"))
    third = metrics(trained(tmp_path / "third", *argv, "--max_steps", "10", "--logging_steps", "3"))
    before = trained(tmp_path / "before", *argv, "--max_steps", "6") / "final_adapter"  # the weights of step 7
    assert [line["step"] for line in each] == list(range(1, 11))
    assert [line["step"] for line in third] == [1, 3, 6, 9, 10]
    rows = prepared(*data)
    assert any(len(rows_of(rows, step, 4)) < 4 for step in (4, 5, 6)), "an epoch's last step is among them"
    tokens, correct, trained_tokens = [], [], []
    for line in each:
        documents = [rows.row(i) for i in rows_of(rows, line["step"], 4)]
        tokens.append(sum(len(ids) for ids, _ in documents))
        trained_tokens.append(sum(int((labels[1:] != IGNORE).sum()) for _, labels in documents))
        correct.append(line["mean_token_accuracy"] * trained_tokens[-1])
        assert line["num_tokens"] == sum(tokens)
        assert correct[-1] == pytest.approx(round(correct[-1]), abs=0.01), "a whole number of right predictions"
    start = 0
    for line in third:
        span, start = slice(start, line["step"]), line["step"]
        losses = [other["loss"] for other in each[span]]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-6)
        accuracy = sum(map(round, correct[span])) / sum(trained_tokens[span])
        assert line["mean_token_accuracy"] == pytest.approx(accuracy, abs=6e-5)
        assert line["num_tokens"] == sum(tokens[: line["step"]])
    seventh = [rows.row(i) for i in rows_of(rows, 7, 4)]
    total, right, count = cross_entropy(before, 1, seventh)
    assert each[6]["mean_token_accuracy"] == round(right / count, 4) > 0
    assert each[6]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_model_flop_use_is_what_the_rows_take_of_the_rate_measured(tmp_path, monkeypatch):
    """Padding and recomputation are not counted; with two losses the head is used twice."""
    made = LoopTrainer.__init__
    monkeypatch.setattr(LoopTrainer, "__init__", lambda *args, **kwargs: made(*args, **kwargs | {"flops": 1e6}))
    data = pairs(tmp_path / "data.jsonl", QUESTIONS)
    argv = [*data, *PLAIN, *FOUR, "--eval_steps", "0", "--total_ut_steps", "2", "--loss", "all"]
    lines = metrics(trained(tmp_path, *argv, "--max_steps", "4", "--logging_steps", "2", "--r", "8"))
    rows, config, step = prepared(*argv), load_ouro(MODEL).config, 0
    assert [line["step"] for line in lines] == [1, 2, 4]
    for line in lines:
        taken = range(step + 1, line["step"] + 1)
        documents = [rows.row(i) for k in taken for i in rows_of(rows, k, 4)]
        tokens, step = sum(len(ids) for ids, _ in documents), line["step"]
        pairs_of = sum(len(ids) * (len(ids) + 1) // 2 for ids, _ in documents)
        targets = sum(int((labels[1:] != IGNORE).sum()) for _, labels in documents)
        flops = cost.training_flops(config, 2, 8, tokens, pairs_of, 2 * targets)
        spent = tokens / line["tokens_per_second"]
        assert line["model_flop_use"] == pytest.approx(flops / spent / 1e6, rel=1e-3)
        padded = tokens / (1 - line["padding"])
        assert line["padded_tokens_per_second"] == pytest.approx(padded / spent, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# what settings do


def test_lora_plus_gives_b_its_own_learning_rate_and_both_their_weight_decay(tmp_path, kept):
    data = pairs(tmp_path / "data.jsonl", QUESTIONS[:4])
    argv = [*data, *PLAIN, *FOUR, "--lr_scheduler_type", "constant", "--learning_rate", "0.1", "--max_steps", "1"]
    argv += ["--eval_steps", "0"]
    plain, plus = (
        load_file(trained(tmp_path / ratio, *argv, *more, "--loraplus_lr_ratio", ratio) / "final_adapter" / WEIGHTS)
        for ratio, more in (("1", []), ("4", ["--weight_decay", "0.5"]))
    )
    trainer, seen = kept[-1], 0
    names = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            seen += 1
            assert group["lr"] == pytest.approx(0.4 if "lora_B" in names[id(p)] else 0.1)
            assert group["weight_decay"] == 0.5
    assert seen == len(names) == len(plain)
    for name, weight in plain.items():
        if "lora_B" in name:  # from zero, in AdamW's first step, which is as long as the learning rate
            assert weight.abs().max() > 0
            torch.testing.assert_close(plus[name], 4 * weight)
        else:  # which has no gradient while B is zero
            torch.testing.assert_close(plus[name], weight * (1 - 0.1 * 0.5))


def test_without_clipping_the_gradients_norm_is_watched_all_the_same(tmp_path, monkeypatch):
    data = pairs(tmp_path / "data.jsonl", QUESTIONS)
    argv = [*data, *PLAIN, *FOUR, "--eval_steps", "0", "--max_steps", "2", "--logging_steps", "1"]
    runs = [trained(tmp_path / norm, *argv, "--max_grad_norm", norm) for norm in ("0", "1e9")]
    a, b = ((run / "final_adapter/adapter_model.safetensors").read_bytes() for run in runs)
    assert a == b and [[line["grad_norm"] for line in metrics(run)] for run in runs][0][1] > 0

    def spoil(parameters) -> None:  # called after the backward passes
        if steps.append(1) or len(steps) == 2:
            next(p for p in parameters if p.grad is not None).grad.fill_(math.inf)

    steps = []
    monkeypatch.setattr(trainer, "add_over_processes", spoil)
    with pytest.raises(UserError, match=r"^step 2: the loss is \d[\d.]*, the gradient's norm inf"):
        trained(tmp_path / "spoilt", *argv, "--max_grad_norm", "0")


@pytest.fixture
def hidden_4_bit():
    """TRL asks for the device of a weight of this name, and on a CPU leaves the model as it is."""
    Params4bit.__name__ = "other"
    yield
    Params4bit.__name__ = "Params4bit"


def test_a_4_bit_model_keeps_the_precision_of_what_is_not_in_4_bits(tmp_path, hidden_4_bit):
    """TRL's own preparation would make embeddings, norms and head fp32."""
    model = load_ouro(MODEL, dtype=torch.bfloat16, nf4=True)
    model = get_peft_model(model, LoraConfig(target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    before = {name: p.dtype for name, p in model.named_parameters()}
    run, rows = resolved("--optim", "adamw_torch"), prepared("--dataset", "sample")
    arguments = machine.trainer_arguments(run, tmp_path, use_cpu=True)
    arguments.bf16 = True
    trainer = LoopTrainer(
        model=model, settings=run.settings, held_out=None, flops=None, stopper=None, args=arguments,
        train_dataset=machine.plan_steps(run.settings, rows, "cpu")[0], processing_class=load_tokenizer(MODEL),
    )  # fmt: skip
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == before
    for name, dtype in before.items():
        if "lora_" in name or "norm" in name or "embed" in name or "lm_head" in name:
            assert dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


def test_a_process_uses_one_gpu_whatever_it_sees(tmp_path, monkeypatch):
    """Else transformers splits each batch over all of them, in this process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = machine.trainer_arguments(resolved(*FOUR), tmp_path, use_cpu=False)
    assert arguments.n_gpu == arguments.train_batch_size == arguments.gradient_accumulation_steps == 1


def test_what_does_nothing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--exp", "a b"])
    monkeypatch.setattr(sys, "executable", "python")
    for name in ("CONFIG", *map(str.upper, FROM_ENVIRONMENT)):
        monkeypatch.delenv(name, raising=False)
    started = "python -m torch.distributed.run --nproc_per_node 4 train_qlora.py --exp 'a b'"
    assert machine.unused(Settings(), 0) == [f"3 of the 4 GPUs here are idle; all of them: {started}"]
    monkeypatch.setenv("CONFIG", "my configs/a100.yaml")  # as make gives it
    assert machine.unused(Settings(), 0)[0].endswith(f": CONFIG='my configs/a100.yaml' {started}")
    assert machine.unused(Settings(fsdp=True), "cpu") == ["fsdp: true does nothing with one process"]
    monkeypatch.setattr(machine, "WORLD_SIZE", 4)
    monkeypatch.setattr(machine, "LOCAL_WORLD_SIZE", 4)
    assert machine.unused(Settings(), 0) == machine.unused(Settings(fsdp=True, torch_compile=False), 0) == []
    assert machine.unused(Settings(fsdp=True), 0) == ["torch_compile: true does nothing with fsdp"]


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ({"processes": 3}, r"^3 processes on \S+ and 1 GPUs: start one for each GPU$"),
        ({"capability": (7, 5)}, "^T4 has no bfloat16"),
        ({"compiler": None}, "^torch_compile needs a C compiler"),
        ({"header": "nowhere"}, "^torch_compile needs nowhere/Python.h: apt-get install python3-dev"),
    ],
)
def test_a_machine_that_cannot_do_what_is_asked_is_refused(tmp_path, monkeypatch, here, told):
    def seem(processes=1, capability=(9, 0), compiler="/usr/bin/cc", header=str(tmp_path)) -> None:
        answers = {"is_available": True, "device_count": 1, "set_device": None, "get_device_name": "T4"}
        for name, value in (answers | {"get_device_capability": capability}).items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        monkeypatch.setattr(machine.shutil, "which", lambda name: compiler)
        monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": header})
        monkeypatch.setattr(machine, "LOCAL_WORLD_SIZE", processes)

    (tmp_path / "Python.h").touch()
    seem()
    assert machine.check_device(Settings()) == 0
    seem(**here)
    with pytest.raises(UserError, match=told):
        machine.check_device(Settings())


def test_the_plans_of_the_passes_are_printed_and_kept(monkeypatch, capsys):
    """Of the published model's sizes on a GPU of 80 GB, with the longest row first."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (78 * 2**30, 80 * 2**30))
    s = Settings(use_qlora=False, rows_per_step=4, model_name_or_path="ByteDance/Ouro-2.6B")
    steps, memory, told = machine.plan_steps(s, Lengths([300, 9000, 15000, 700, 5000]), 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"passes: of {told['pass_tokens']:,} tokens where rows are shorter, ")
    assert memory.largest == told["plans"][-1]["tokens"] == 15360 and memory.shapes == told["pass_shapes"]
    assert len(told["plans"]) == len(lines) - 1 >= 3
    for plan, line in zip(told["plans"], lines[1:], strict=True):
        assert line == (
            f"memory: a pass of {plan['tokens']:>6,} tokens computes {plan['recomputed']} of 192 layer calls twice; "
            f"estimate {plan['estimated_gib']} GiB of 78.0 free"
        )
    assert told["plans"][-1]["recomputed"] > told["plans"][0]["recomputed"]
    before = {"pass_tokens": 1234, "pass_grain": 1024}
    steps, _, told = machine.plan_steps(s, Lengths([300, 9000]), 0, before)
    assert (steps.passes.tokens, steps.passes.grain) == (1234, 1024), "a run goes on with the passes it began with"
    assert told.items() >= before.items()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * 2**30, 80 * 2**30))
    for begun, advice in (
        (None, "set use_qlora$"),
        (before, "set use_qlora, with --overwrite or another --output_dir"),
    ):
        with pytest.raises(UserError, match=advice):
            machine.plan_steps(s, Lengths([9000]), 0, begun)


def test_where_the_graphs_of_all_widths_do_not_fit_the_widths_are_fewer(monkeypatch):
    """Rows of all lengths by the defaults, on a card of 10 GB."""
    monkeypatch.setattr(machine, "host_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9.3 * 2**30, 10 * 2**30))
    s = Settings(rows_per_step=1, model_name_or_path="ByteDance/Ouro-2.6B")
    steps, memory, told = machine.plan_steps(s, Lengths(range(1000, 16385, 50)), 0)
    assert memory.plan(memory.largest) and steps.passes.grain >= 512 and told["pass_shapes"] < 40
    assert not replace(memory, shapes=60).plan(memory.largest), "as with the finest grain"


def test_deterministic_asks_for_sums_in_one_order_and_does_not_only_warn():
    s = Settings(model_name_or_path=MODEL, use_qlora=False, bf16=False)
    memory = cost.Memory(s, sizes(s), None)
    build.build(s, "cpu", memory)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        build.build(replace(s, deterministic=True), "cpu", memory)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. Of the allocated memory 70 GiB are …"


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [  # while saving it is no full disk
        (loading, "load_ouro", "^CUDA out .* GiB free.: does another process use this GPU"),
        (trainer, "add_over_processes", "^step 1: CUDA out .* GiB free.\n.*the same command begins anew\n"),
        (trainer, "seal", "^step 2: CUDA out .* GiB free.\n.*the same command begins anew\n"),
    ],
)
def test_a_gpu_that_is_full_is_said_with_what_can_be_lowered(tmp_path, monkeypatch, module, name, told):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(FULL)

    argv = [*pairs(tmp_path / "data.jsonl", QUESTIONS), *PLAIN, *FOUR, "--eval_steps", "0", "--max_length", "512"]
    with monkeypatch.context() as patch, pytest.raises(UserError, match=told) as error:
        patch.setattr(module, name, full)
        trained(tmp_path, *argv, "--max_steps", "1")
    if module is loading:  # the run has not begun
        return
    advice = (
        "else set activation_checkpointing to full, or lower max_length (512), with --overwrite or another --output"
    )
    assert str(error.value).splitlines()[2].startswith(advice)
    argv += ["--max_steps", "1", "--activation_checkpointing", "full"]
    with pytest.raises(UserError, match="a run with other settings"):
        trained(tmp_path, *argv)
    assert (trained(tmp_path, *argv, "--overwrite") / "completed").exists()


def test_a_gpu_too_full_for_the_graphs_is_said_with_what_then_works(tmp_path):
    def full(*args):
        raise torch.OutOfMemoryError(FULL)

    (tmp_path / "checkpoint-3").mkdir()
    decoder = SimpleNamespace(prepare=full)
    model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(model=decoder))
    s = Settings(max_length=512)
    steps = Steps(Lengths([300]), 1, 0, Passes(512), None, None)
    with pytest.raises(UserError) as told:
        machine.capture_graphs(model, steps, s, tmp_path, 0)
    assert str(told.value) == (
        "passes of up to 1 x 512 tokens: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.\n"
        "if another process uses this GPU (nvidia-smi), end it: the same command continues from checkpoint-3\n"
        "else set activation_checkpointing to full, or lower max_length (512), with --overwrite or another "
        "--output_dir (a run keeps what it began with)"
    )


def test_of_a_command_that_would_delete_or_refuse_the_checkpoints_it_is_said_what_to_leave_out(tmp_path, monkeypatch):
    argv = ["train_qlora.py", "--overwrite", "--resume", "never"]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_folder.what_next(tmp_path) == "the same command begins anew"
    (tmp_path / "checkpoint-3").mkdir()
    told = "the same command without --overwrite and --resume never continues from checkpoint-3"
    assert run_folder.what_next(tmp_path) == told
    monkeypatch.setattr(sys, "argv", argv[:1])
    assert run_folder.what_next(tmp_path) == "the same command continues from checkpoint-3"
