"""Operations and bytes counted by hand and by torch, and the layers that are recomputed to save memory."""

import dataclasses
import re
from pathlib import Path

from ouro.cluster.plan import predict, typical_lengths
from ouro.data.chats import Tokens, split_row
from ouro.data.sources import HubSession, Unreachable, cache_only
from ouro.files import UserError, read_yaml
from ouro.model.cost import GPUS, REACHED, layers_to_recompute, sizes, training_flops, training_memory
from ouro.model.modeling_ouro import PROJECTIONS, OuroConfig
from ouro.settings import DATASETS, Settings, resolve

import numpy as np
import pytest
import requests
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session, http_backoff
from peft import LoraConfig, get_peft_model
from tiny_ouro import SIZES, tiny, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("in_the_repository")
GIB = 2**30
SEQ = 2048
OURO = OuroConfig()
LORA = Settings(use_qlora=False, max_length=SEQ, per_device_train_batch_size=4, optim="adamw_torch_fused")


def flops_a_token(loops: int) -> float:
    return training_flops(OURO, loops, 16, SEQ, SEQ * (SEQ + 1) / 2, SEQ) / SEQ


def test_flops_are_those_counted_by_hand():
    weights = 4 * 2048 * 2048 + 3 * 2048 * 5632  # of a layer's projections
    adapters = 16 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    layer = 4 * weights + 6 * adapters + 14 * 2048 * (SEQ + 1) / 2
    head = 4 * 2048 * 49152
    for loops, about in ((4, 46.2e9), (1, 11.86e9)):
        assert flops_a_token(loops) == pytest.approx(48 * loops * layer + head, rel=1e-12)
        assert flops_a_token(loops) == pytest.approx(about, rel=2e-3)


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


def memory(recomputed: int = 0, **changes) -> float:
    return training_memory(dataclasses.replace(LORA, **changes), OURO, recomputed)


def test_memory_grows_with_tokens_loops_and_dropout_and_falls_with_recomputed_layers():
    plain = memory()
    assert memory(max_length=2 * SEQ) == memory(per_device_train_batch_size=8) > plain  # tokens are what counts
    assert memory(total_ut_steps=1) < memory(total_ut_steps=2) < plain
    assert memory(lora_dropout=0.0) < plain < memory(r=64)
    assert memory(use_qlora=True) < plain < memory(bf16=False)
    by_layers = [memory(recomputed) for recomputed in range(1, 49)]
    assert by_layers == sorted(by_layers, reverse=True) and by_layers[0] > 2 * by_layers[-1]
    assert len(set(by_layers)) == 48


def test_memory_is_at_least_the_weights_and_the_states_that_must_be_kept():
    """Counted anew: frozen weights, adapters with Adam's two numbers in fp32, and each layer's input in each loop."""
    parameters = 48 * (4 * 2048**2 + 3 * 2048 * 5632)
    ends = 2 * 49152 * 2048
    adapters = 48 * 16 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    states = 4 * 48 * 4 * SEQ * 2048 * 2
    least = 2 * (parameters + ends) + 16 * adapters + states
    assert least < memory(48) < least + 3 * GIB
    saved = memory(48) - memory(48, use_qlora=True)
    assert saved == pytest.approx(parameters * (2 - 0.5 - (1 + 4 / 256) / 64), rel=1e-9)
    double = memory(48, use_qlora=True, bnb_4bit_use_double_quant=False) - memory(48, use_qlora=True)
    assert double / parameters * 8 == pytest.approx(0.373, abs=1e-3)  # bits a weight, QLoRA's own figure


@pytest.mark.parametrize(
    ("loops", "batch", "recomputed", "changes", "measured"),
    [
        (4, 4, 0, {"lora_dropout": 0.0}, 116.1),  # without graphs
        (1, 8, 0, {"lora_dropout": 0.0, "packing": True}, 63.1),
        (4, 4, 0, {"lora_dropout": 0.0, "packing": True}, 118.7),
        (4, 3, 0, {"packing": True}, 131.1),
        (1, 8, 0, {"packing": True}, 89.9),
        (4, 1, 48, {"use_qlora": True, "optim": "paged_adamw_8bit", "packing": True}, 4.4),
        (4, 3, 48, {"use_qlora": True, "optim": "paged_adamw_8bit", "packing": True}, 8.3),
    ],
)
def test_memory_is_within_a_tenth_of_the_measured_peak(loops, batch, recomputed, changes, measured):
    """Peaks in GiB that `bench.py train` found on an H200."""
    size = {"total_ut_steps": loops, "per_device_train_batch_size": batch, "max_length": 2048}
    assert memory(recomputed, **size, **changes) / GIB == pytest.approx(measured, rel=0.1)


def layers(asked: str, free: float | None, compiled: bool = True) -> int:
    return layers_to_recompute(dataclasses.replace(LORA, activation_checkpointing=asked), OURO, free, compiled)


@pytest.mark.parametrize(("asked", "count"), [("none", 0), ("full", 48), ("0", 0), ("7", 7), ("48", 48)])
def test_a_named_number_of_layers_is_taken(asked, count):
    assert layers(asked, None) == layers(asked, 80 * GIB) == count


def test_what_is_no_number_of_layers_is_refused():
    for asked in ("-1", "half", "3.0", ""):
        with pytest.raises(UserError, match="activation_checkpointing must be one of auto, none, full, a number, got"):
            resolve("", ["--activation_checkpointing", asked])
    with pytest.raises(UserError, match="activation_checkpointing = 49, and the model has 48 layers"):
        layers("49", None)


def test_auto_recomputes_as_few_layers_as_fit():
    assert layers("auto", 10_000 * GIB) == 0
    seen = []
    for free in (24, 32, 48, 64, 80, 120):
        count = layers("auto", free * GIB)
        seen.append(count)
        assert memory(count) <= 0.92 * free * GIB
        assert count == 0 or memory(count - 1) > 0.92 * free * GIB
    assert seen == sorted(seen, reverse=True) and len(set(seen)) >= 4
    exact = memory(20) / 0.92
    assert layers("auto", exact * 1.0001) == 20 and layers("auto", exact * 0.9999) == 21


def test_auto_without_a_gpu_or_the_compiler():
    """The estimate is of compiled layers."""
    assert layers("auto", None) == layers("auto", None, compiled=False) == 0
    assert layers("auto", 10_000 * GIB, compiled=False) == 48


def test_auto_refuses_what_does_not_fit_with_figures():
    need = f"about {memory(48) / GIB:.1f} GiB of GPU memory are needed, 9.2 GiB can be used; lower max_length"
    with pytest.raises(UserError, match=need):
        layers("auto", 10 * GIB)


def test_the_default_configuration_fits_a_card_of_10_gb_at_one_loop():
    settings = resolve("", ["--config", "configs/default.yaml", "--exp", "exp2-wangchan-ut1"]).settings
    assert settings.activation_checkpointing == "auto" and settings.max_length == 16384
    assert 0 < layers_to_recompute(settings, OURO, 9.3 * GIB) <= 48


def sample(cache, *argv: str) -> Settings:
    return resolve("", ["--config", "tests/smoke.yaml", "--cache_dir", str(cache), *argv]).settings


def test_hours_are_predicted_from_the_cached_tokens_else_from_the_longest_rows(tmp_path):
    s = sample(tmp_path / "cache", "--num_train_epochs", "2")
    rows = Path("sample/wangchan/train.jsonl").read_text().count("\n")
    most = predict(s, "H100", 1)
    assert most.at_most and most.tokens == rows * s.max_length
    assert not (tmp_path / "cache").exists(), "nothing is tokenised for a prediction"
    made = predict(s, "H100", 1, tokenise=True)
    assert made == predict(s, "H100", 1) and not made.at_most
    assert 0 < made.tokens < most.tokens / 2 and 0 < made.hours < most.hours / 2
    assert made.steps == most.steps == 2 * -(-rows // (2 * 2))

    operations = training_flops(sizes(s), 4, s.r, rows * 1024, rows * 1024 * 1025 / 2, rows * 1024)
    recomputed = 1.5  # tests/smoke.yaml: all layers
    assert most.hours * 3600 * 989e12 * 0.36 == pytest.approx(2 * operations * recomputed, rel=1e-9)


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
    assert predicted.said == "about " and predicted.steps == 3 * 1007 and 7 < predicted.hours < 11
    monkeypatch.setenv("TIME", "24:00:00")
    monkeypatch.setenv("GRACE", "300")
    assert re.fullmatch(r"about \d+\.\d", predicted.told())
    assert predict(dataclasses.replace(s, dataset="r1"), "H100", 4).at_most, "no table of its lengths"
    with pytest.raises(UserError, match="no figures of a GPU 'H10O'; did you mean 'H100'"):
        predict(s, "H10O", 4)
    with pytest.raises(UserError, match="RTX3080, 10 GiB: about .* GiB of GPU memory are needed"):
        predict(s, "RTX3080", 4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"no model in {tmp_path}: .*not a valid JSON"):
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
        with pytest.raises(Unreachable, match="^cannot reach http://127.0.0.1:9: no way$"):
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
