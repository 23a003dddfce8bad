"""Operations and bytes counted by hand and by torch, and the layers that are recomputed to save memory."""

import dataclasses
import re
from pathlib import Path

from ouro.cluster import hours, preflight
from ouro.cluster.plan import predict, typical_lengths
from ouro.data.batches import Passes
from ouro.data.cache import prepare
from ouro.data.chats import Tokens, split_row
from ouro.data.sources import HubSession, cache_only
from ouro.files import UserError, read_yaml
from ouro.model.cost import GPUS, REACHED, Memory, Plan, passes_for, training_flops
from ouro.model.loading import load_tokenizer, sizes
from ouro.model.modeling_ouro import PROJECTIONS, OuroConfig
from ouro.settings import DATASETS, EXPERIMENTS, Resolved, Settings, resolve
from ouro.train import machine

import numpy as np
import pytest
import requests
import torch
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session, http_backoff
from peft import LoraConfig, get_peft_model
from tiny_ouro import SIZES, tiny, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("in_the_repository")
GIB = 2**30
OURO = OuroConfig()
LORA = Settings(use_qlora=False, optim="adamw_torch_fused")


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s['total_ut_steps']}x{s['num_hidden_layers']}")
def test_flops_are_those_that_torch_counts(size):
    rank, (batch, seq) = 3, (2, 13)
    model = tiny(size).float()
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=6, lora_dropout=0.0, target_modules=PROJECTIONS))
    model.enable_input_require_grads()
    ids = tokens(batch, seq)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    # Plain attention: all pairs, though half are masked, and the scores are kept: 4 + 8 a pair, not 4 + 10.
    pairs = batch * seq**2 * 12 / 14
    config = model.config
    assert counter.get_total_flops() == training_flops(
        config, config.total_ut_steps, rank, batch * seq, pairs, batch * (seq - 1)
    )


def memory(free: float | None = None, largest: int = 16384, host: float = 64, **changes) -> Memory:
    """Of the published model; free and host: GiB."""
    s = dataclasses.replace(LORA, **changes)
    config = OuroConfig(total_ut_steps=s.total_ut_steps)
    return Memory(s, config, None if free is None else free * GIB, host * GIB, largest)


def test_memory_grows_with_tokens_loops_and_rank_and_falls_with_what_is_computed_twice_or_waits():
    def need(tokens: int = 8192, recomputed: int = 192, **changes) -> float:
        return memory(**changes).of(tokens, Plan(recomputed))

    assert need() < min(need(8192 + 64), need(r=64), need(bf16=False)) and need(use_qlora=True) < need()
    assert need(recomputed=0, total_ut_steps=2) < need(recomputed=0)
    assert need(lora_dropout=0.5) == need(), "a mask is never stored"
    needs = [need(recomputed=count) for count in range(193)]
    least = needs.index(min(needs))  # the last few cost a state each, and free nothing: one layer is always computed
    assert needs[: least + 1] == sorted(needs[: least + 1], reverse=True) and least > 180 and needs[0] > 2 * needs[-1]
    waits = [memory().of(8192, Plan(192, count)) for count in range(3, 193)]
    assert waits == sorted(waits, reverse=True) and waits[0] < needs[-1]


def test_memory_is_at_least_the_weights_and_the_states_that_must_be_kept():
    """Counted anew: frozen weights, adapters with Adam's two numbers in fp32, and each layer call's input."""
    parameters = 48 * (4 * 2048**2 + 3 * 2048 * 5632)
    ends = 2 * 49152 * 2048
    adapters = 48 * 16 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    states = 192 * 8192 * 2048 * 2
    all_twice = memory(largest=8192).of(8192, Plan(192))
    least = 2 * (parameters + ends) + 16 * adapters + states
    assert least < all_twice < least + 6 * GIB
    assert all_twice - memory(largest=8192).of(8192, Plan(192, 192)) == pytest.approx(states * 190 / 192)
    single, double = (memory(use_qlora=True, bnb_4bit_use_double_quant=q).fixed() for q in (False, True))
    assert (single - double) / parameters * 8 == pytest.approx(0.373, abs=1e-3)  # bits a weight, QLoRA's own figure


@pytest.mark.parametrize(("asked", "count"), [("none", 0), ("full", 48), ("0", 0), ("7", 7), ("48", 48)])
def test_a_named_number_of_layers_is_taken_in_every_loop(asked, count):
    for free in (None, 5, 80):
        assert memory(free, activation_checkpointing=asked, total_ut_steps=3).plan(4096) == Plan(3 * count)


@pytest.mark.parametrize(("use_qlora", "frees"), [(False, (16, 20, 32, 48, 78.6, 140)), (True, (9.3, 12, 24, 80))])
def test_auto_computes_twice_and_copies_as_little_as_fits_and_more_for_a_longer_pass(use_qlora, frees):
    for free in frees:
        planned = []
        for size in (512, 2048, 4096, 8192, 16384):
            m = memory(free, use_qlora=use_qlora)
            plan, usable = m.plan(size), free * GIB * 0.97 - 0.7 * GIB
            if plan is None:
                assert m.of(size, Plan(192, 192)) > usable
                break
            assert m.of(size, plan) <= usable
            if plan.waiting > 3:
                assert m.of(size, Plan(192, plan.waiting - 1)) > usable and plan.recomputed == 192
            elif plan.waiting:
                assert m.of(size, Plan(192)) > usable
            elif plan.recomputed:
                assert m.of(size, Plan(plan.recomputed - 1)) > usable
            planned.append((plan.recomputed, plan.waiting))
        assert planned == sorted(planned) and planned
    assert memory(10**6).plan(16384) == Plan()


@pytest.mark.parametrize("free", [40, 60, 78.6])
def test_with_dora_whole_layers_are_computed_twice_in_all_passes_and_no_states_wait(free):
    m = memory(free, use_dora=True)
    plan, usable = m.plan(16384), free * GIB * 0.97 - 0.7 * GIB
    assert plan.recomputed % 4 == 0 == plan.waiting and plan.recomputed > 0
    assert m.of(16384, plan) <= usable < m.of(16384, Plan(plan.recomputed - 4))
    assert m.plan(512) == Plan() and m.plan_run(512) == plan, "the largest pass decides for all"
    with pytest.raises(UserError, match=r"computed twice; 20\.0 GiB of GPU memory are free: set max_length") as told:
        passes_for(memory(20, use_dora=True))
    length = int(str(told.value).rpartition(" ")[2])
    assert passes_for(memory(20, length, use_dora=True)) and memory(20).plan(16384).waiting


def test_auto_without_a_gpu_or_the_compiler():
    """The estimate is of compiled layers."""
    assert memory().plan(8192) == Plan() and passes_for(memory()) == Passes(2048, grain=1)
    plain = dataclasses.replace(memory(10**6), compiled=False)
    assert plain.plan(8192) == Plan(192) and passes_for(plain) == Passes(2048, grain=1)
    assert passes_for(memory(pass_tokens=777)) == Passes(777, grain=1)
    assert passes_for(memory(140, pass_tokens=777)) == Passes(777)


@pytest.mark.parametrize(("config", "free", "host"), [("a100", 78.6, 32), ("default", 9.3, 16)], ids=["80 GB", "10 GB"])
def test_the_studys_longest_rows_fit_the_cards_that_its_configurations_are_for(config, free, host):
    s = resolve("", ["--config", f"configs/{config}.yaml"]).settings
    assert s.activation_checkpointing == "auto" and s.total_ut_steps == 4 and s.max_length == 16384
    m = Memory(s, OURO, free * GIB, host * GIB, s.max_length)
    passes = passes_for(m)
    assert (m.plan(16384).waiting > 0) == s.use_qlora
    if s.use_qlora:  # all is computed twice in any case: as much at once as fits
        assert passes.tokens >= 4096 and m.plan(passes.tokens)
    else:  # as much as needs nothing twice
        assert m.plan(passes.tokens) == Plan() != m.plan(passes.tokens + 512)


def test_preflight_asks_for_the_memory_in_which_states_of_the_longest_rows_wait(monkeypatch):
    """On a card of 10 GB: 175 states of 64 MiB at four loops, in half of what is free; short rows need none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9.3 * GIB, 10 * GIB))
    monkeypatch.setattr(machine, "free_memory", lambda: 20e9)

    def asked(exp: str, *argv: str) -> Resolved:
        return resolve("", ["--config", "configs/default.yaml", "--exp", exp, *argv])

    refused = (
        r"^20\.0 GB for 1 process, 25 GB are needed \(twice the 12 GB in which states of layers wait, for rows of "
    )
    refused += r"16,384 tokens at 4 loops\): end what .*, or set max_length to"
    with pytest.raises(UserError, match=refused) as error:
        preflight.check_memory(asked("exp1-wangchan-ut4"))
    length = str(error.value).rpartition(" ")[2]
    told = preflight.check_memory(asked("exp1-wangchan-ut4", "--max_length", length))
    assert 18 < int(re.match(r"20 GB free, (\d+) GB needed \(twice", told)[1]) <= 20
    assert preflight.check_memory(asked("exp1-wangchan-ut4", "--max_length", "2048")) == "20 GB free, 2 GB needed"
    unknown = preflight.check_memory(asked("own-ut4", "--dataset_path", "sample/wangchan/train.jsonl"))
    assert unknown.startswith("20 GB free, 2 GB needed; were there rows of 16,384 tokens at 4 loops: twice the 12 GB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * GIB, 10 * GIB))
    with pytest.raises(UserError, match=r"4\.0 GiB of GPU memory are free, and 8\.4 GiB of the CPU's"):
        preflight.check_memory(asked("exp1-wangchan-ut4"))


def test_what_does_not_fit_is_refused_with_the_length_that_does():
    for free, host in ((9.3, 1), (6, 64)):
        m = memory(free, host=host, use_qlora=True)
        with pytest.raises(UserError, match=r"rows of 16384 tokens need about [\d.]+ GiB with all layers") as error:
            passes_for(m)
        told = f"{free:.1f} GiB of GPU memory are free, and {host:.1f} GiB of the CPU's for layers' inputs"
        assert told in str(error.value)
        length = int(str(error.value).rpartition("set max_length to ")[2])
        assert 1000 < length < 16384 and passes_for(dataclasses.replace(m, largest=length))
        with pytest.raises(UserError):
            passes_for(dataclasses.replace(m, largest=length + 256))
    with pytest.raises(UserError, match="can wait there: set use_qlora$"):
        passes_for(memory(5))


def sample(cache, *argv: str) -> Settings:
    return resolve("", ["--config", "tests/smoke.yaml", "--cache_dir", str(cache), *argv]).settings


def test_hours_are_predicted_from_the_cached_tokens_else_from_the_longest_rows(tmp_path):
    s = sample(tmp_path / "cache", "--num_train_epochs", "2")
    rows = Path("sample/wangchan/train.jsonl").read_text().count("\n")
    most = predict(s, "H100", 1)
    assert most.said == "at most " and most.tokens == rows * s.max_length
    assert not (tmp_path / "cache").exists(), "nothing is tokenised for a prediction"
    prepare(s, load_tokenizer(s.model_name_or_path, None), quiet=True)
    made = predict(s, "H100", 1)
    assert not made.said
    assert 0 < made.tokens < most.tokens / 2 and 0 < made.hours < most.hours / 2
    assert made.steps == most.steps == 2 * -(-rows // (2 * 2))

    operations = training_flops(sizes(s), 4, s.r, rows * 1024, rows * 1024 * 1025 / 2, rows * 1024)
    recomputed = 1.5  # tests/smoke.yaml: all layers
    assert most.hours * 3600 * 989e12 * REACHED["nf4"] == pytest.approx(2 * operations * recomputed, rel=1e-9)


def test_predicted_hours_follow_gpus_and_steps(tmp_path):
    one = predict(sample(tmp_path), "H100", 1)
    assert predict(sample(tmp_path), "H100", 4).hours == pytest.approx(one.hours / 4)
    assert predict(sample(tmp_path), "A100", 1).hours == pytest.approx(one.hours * GPUS["H100"][0] / GPUS["A100"][0])
    short = predict(sample(tmp_path, "--max_steps", "5"), "H100", 1)
    assert short.steps == 5 and short.hours == pytest.approx(one.hours * 5 / one.steps)
    bf16 = predict(sample(tmp_path, "--use_qlora", "false"), "H100", 1)
    assert bf16.hours == pytest.approx(one.hours * REACHED["nf4"] / REACHED["bf16"])


def test_the_study_on_the_hub_is_predicted_without_asking_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    s = resolve("", ["--config", "configs/a100.yaml", "--cache_dir", str(tmp_path)]).settings
    s.model_name_or_path = "ByteDance/Ouro-2.6B"
    predicted = predict(s, "H100", 4)
    assert predicted.said == "about " and predicted.steps == 3 * 1007 and 6 < predicted.hours < 10
    monkeypatch.setenv("TIME", "24:00:00")
    monkeypatch.setenv("GRACE", "300")
    assert re.fullmatch(r"about \d+\.\d", predicted.told())
    assert predict(dataclasses.replace(s, dataset="r1"), "H100", 4).said == "at most ", "no table of its lengths"
    with pytest.raises(UserError, match="no figures of a GPU 'H10O'; did you mean 'H100'"):
        predict(s, "H10O", 4)
    with pytest.raises(UserError, match="RTX3080, 10 GiB: rows of 16384 tokens need about .* GiB"):
        predict(s, "RTX3080", 4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"cannot load the model {tmp_path}: .*not a valid JSON"):
        sizes(dataclasses.replace(s, model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"fp8 needs a Hopper GPU \(H100 or H200\), not A100; set it to auto"):
        predict(dataclasses.replace(s, frozen_weights="fp8"), "A100", 4)
    s.dataset = "pairs"
    with pytest.raises(UserError, match="dataset pairs is for data of your own"):
        predict(s, "H100", 4)


@pytest.mark.parametrize(
    ("policy", "limit"), [("drop", 2000), ("truncate_prompt", 2000), ("split", 2000), ("drop", 10)]
)
def test_typical_lengths_are_those_that_the_length_policy_leaves(policy, limit):
    given = np.array([500.0, 1500, 2600, 9000])
    s = Settings(max_length=limit, length_policy=policy)
    rows = [Tokens(np.zeros(int(n), np.uint32), [0, int(n)]) for n in given.repeat(3)]
    expected = {
        "drop": [len(row.ids) for row in rows if len(row.ids) <= limit],
        "truncate_prompt": [min(len(row.ids), limit) for row in rows],
        "split": [len(piece.ids) for row in rows for piece in split_row(row, limit)],
    }
    assert sorted(typical_lengths(given, 12, s)) == sorted(expected[policy])


def test_the_tables_of_lengths_have_the_means_that_the_cards_imply():
    """Bytes a row at the 0.6 tokens a byte that Ouro's tokenizer takes for Thai prose."""
    entries = read_yaml(DATASETS)
    for name, size in (("wangchan", 9454), ("synthetic", 5356 - 500)):
        table = entries[name]["tokens"]
        assert len(table) == 20 and table == sorted(table)
        assert np.mean(table) == pytest.approx(0.6 * size, rel=0.03)


def test_with_the_cache_only_nothing_is_asked_of_the_hub_and_where_it_is_not_it_is_asked_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HubSession, "answered", False)
    monkeypatch.setattr(HubSession, "failure", None)
    with cache_only(), pytest.raises(OfflineModeIsEnabled):
        get_session().get("http://127.0.0.1:9")
    assert not constants.HF_HUB_OFFLINE
    asked = []
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", lambda self, request, **_: refuse(asked, request.url))
    for path in ("one", "two"):
        with pytest.raises(OfflineModeIsEnabled, match="^cannot reach http://127.0.0.1:9: no way$"):
            http_backoff("HEAD", f"http://127.0.0.1:9/{path}")
    assert asked == ["http://127.0.0.1:9/one"]
    monkeypatch.setattr(HubSession, "answered", True)
    monkeypatch.setattr(HubSession, "failure", None)
    with pytest.raises(requests.ConnectionError):  # lost on the way: huggingface_hub tries again
        http_backoff("HEAD", "http://127.0.0.1:9/", max_retries=1, base_wait_time=0)
    assert len(asked) == 3


def refuse(asked: list[str], url: str) -> None:
    asked.append(url)
    raise requests.ConnectionError("no way")


def test_the_hours_in_the_readme_are_those_that_make_plan_prints():
    assert hours.table() in Path("README.md").read_text(), "make plan"


def test_what_fits_a_weekend_is_offered_with_what_to_type(monkeypatch, capsys):
    def told(*argv: str) -> str:
        monkeypatch.setattr("sys.argv", ["hours.py", *argv])
        hours.main()
        return capsys.readouterr().out

    offer = told("--gpu", "RTX3080", "--hours", "48")
    tokens, together = re.search(r"--max_tokens (\d+)", offer)[1], re.search(r"together (\d+) h\.", offer)[1]
    assert 40 < int(together) <= 48 and 5e6 < int(tokens) < 2e7
    more = told("--gpu", "RTX3080", "--hours", "72")
    assert int(re.search(r"--max_tokens (\d+)", more)[1]) > 1.4 * int(tokens)
    for words in re.findall(r"EXP=(\S+)", offer):
        assert {name.rpartition("/")[2] for name in words.split(",")} <= {*read_yaml(EXPERIMENTS), "$exp"}
    four = told("--gpu", "H100", "--count", "4", "--hours", "8")
    assert "torchrun --nproc_per_node 4 train_qlora.py --config configs/a100.yaml --exp $exp" in four
    for argv, refusal in (
        (["--gpu", "RTX3080", "--hours", "6"], "6 hours hold too little on 1 x RTX3080: .* are needed for 30 steps"),
        (["--hours", "6"], "for which GPU. --gpu .make plan GPU=….: one of RTX3080"),
        (["--gpu", "H100", "--study", "englsh"], "did you mean 'english'"),
        (["--gpu", "H100", "--study", "core", "--hours", "48"], "give one of them"),
    ):
        with pytest.raises(UserError, match=refusal):
            told(*argv)
    lines = told("--gpu", "H100", "--study", "english", "--total_ut_steps", "2", "--max_steps", "100").splitlines()
    for line in lines[-3:-1]:
        assert line.split()[1:6:4] == ["2", "100"], "loops and steps: the command line comes after the experiment's row"
