"""The forward pass against golden outputs of the published code and against a plain reference, alone and in a batch.

Where the reference is the judge all is float64, so that the allowance of 1e-9 leaves no room for a small mistake.
"""

import functools
import json
from pathlib import Path

from ouro.model.modeling_ouro import OuroConfig, OuroForCausalLM, OuroRMSNorm, exit_distribution

import pytest
import reference_ouro as ref
import torch
from safetensors.torch import load_file
from tiny_ouro import (
    LAYOUTS,
    MEDIUM,
    SIZES,
    assert_close,
    documents,
    objectives,
    reference,
    rows,
    sizes,
    tiny,
    tokens,
    without,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

GOLDEN = Path(__file__).parent / "parity"


# ---------------------------------------------------------------------------------------------------- published code


@functools.cache
def golden(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{case}.outputs.safetensors")


def native(case: str) -> dict[str, Tensor]:
    """What this code gives for every key of the golden outputs, in float32 as they are."""
    config = OuroConfig(**json.loads((GOLDEN / f"{case}.config.json").read_text()))
    model = OuroForCausalLM(config).eval()
    model.load_state_dict(load_file(GOLDEN / f"{case}.weights.safetensors"))
    ids, labels, mask = (golden(case)[key] for key in ("input_ids", "labels", "left_padded_mask"))
    out = {}
    for k in range(config.total_ut_steps):
        out[f"logits.exit{k}"] = model(ids, exit_at_step=k).logits
        out[f"padded_logits.exit{k}"] = model(ids, mask, exit_at_step=k).logits * mask[..., None]
    for threshold in (0.3, 0.7):
        out[f"logits.threshold{threshold}"] = model(ids, exit_threshold=threshold).logits
    out["mixture.logits"] = model(ids, use_weighted_exit=True).logits
    out["mixture.loss"] = model(ids, labels=labels, objective="mixture").loss
    out["mixture.loss"].backward()
    out |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return out


@pytest.mark.parametrize("case", ["a", "b"])
def test_outputs_are_those_of_the_published_code(case):
    found, expected = native(case), golden(case)
    assert found.keys() == expected.keys() - {"input_ids", "labels", "left_padded_mask"}
    for key, value in found.items():
        assert_close(value, expected[key], 1e-5, key)


# ---------------------------------------------------------------------------------------------- forward, one document


def states_of(model: OuroForCausalLM, ids: Tensor) -> tuple[ref.Weights, list[list[Tensor]]]:
    """The reference's weights and, for each row of ids, its state after every loop."""
    w, config = reference(model)
    with torch.no_grad():
        return w, [ref.loop_states(w, config, row) for row in ids]


def stacked(function, w: ref.Weights, rows: list[list[Tensor]], *args) -> Tensor:
    return torch.stack([function(w, states, *args) for states in rows])


@sizes
def test_one_pass_gives_states_logits_and_gates_of_every_loop(size):
    model, ids = tiny(size), tokens(2, 9)
    w, rows = states_of(model, ids)
    out = model(ids, output_loops=True)
    assert len(out.loop_hidden_states) == len(out.loop_logits) == len(out.gate_logits) == size["total_ut_steps"]
    for k in range(size["total_ut_steps"]):
        assert_close(out.loop_hidden_states[k], torch.stack([states[k] for states in rows]))
        assert_close(out.loop_logits[k], stacked(ref.logits_at, w, rows, k))
        assert_close(out.gate_logits[k], torch.stack([ref.gate_logits(w, states)[k] for states in rows]))
        assert_close(model(ids, exit_at_step=k).logits, out.loop_logits[k])
        assert_close(model(ids, exit_at_step=k, output_loops=True).logits, out.loop_logits[k])
    expected = torch.stack([ref.exit_pdf(ref.gate_logits(w, states)) for states in rows], dim=1)
    assert_close(exit_distribution(out.gate_logits), expected)
    assert_close(out.logits, out.loop_logits[-1])
    last = model(ids)
    assert_close(last.logits, out.logits)
    assert last.loop_logits is None and last.gate_logits is None


@sizes
def test_threshold_picks_the_first_loop_that_reaches_it(size):
    model, ids = tiny(size), tokens(3, 11)
    w, rows = states_of(model, ids)
    thresholds = (0.0, 0.2, 0.45, 0.6, 0.8, 0.95, 1.0, 1.5)
    for threshold in thresholds:
        expected = stacked(ref.logits_threshold, w, rows, threshold if threshold < 1 else 2.0)
        assert_close(model(ids, exit_threshold=threshold).logits, expected)
    assert_close(model(ids, exit_threshold=0.45, output_loops=True).logits, model(ids, exit_threshold=0.45).logits)
    # With gates that all say the same nothing would be compared.
    cumulative = exit_distribution(model(ids, output_loops=True).gate_logits).cumsum(0)[:-1]
    loops = [(cumulative < threshold).sum(0).unique().tolist() for threshold in thresholds[1:-2]]
    assert sorted({k for chosen in loops for k in chosen}) == list(range(size["total_ut_steps"]))
    assert size["total_ut_steps"] == 1 or max(map(len, loops)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threshold_that_is_just_reached_counts_as_reached(dtype):
    """Gates that say 0 leave with 1/2, 1/4 and 1/8, which every dtype holds exactly."""
    model, ids = tiny(SIZES[3]).to(dtype), tokens(2, 9)
    for p in model.model.early_exit_gate.parameters():
        p.data.zero_()
    for threshold, loop in ((0.0, 0), (0.5, 0), (0.51, 1), (0.75, 1), (0.875, 2), (0.88, 3)):
        assert torch.equal(model(ids, exit_threshold=threshold).logits, model(ids, exit_at_step=loop).logits)


@sizes
def test_weighted_exit_is_the_gate_weighted_mean_of_the_logits(size):
    model, ids = tiny(size), tokens(2, 9)
    expected = stacked(ref.logits_mixture, *states_of(model, ids))
    assert_close(model(ids, use_weighted_exit=True).logits, expected)
    assert_close(model(ids, use_weighted_exit=True, output_loops=True).logits, expected)


def test_config_chooses_the_exit_and_arguments_override_it():
    ids = tokens(2, 9)
    plain = tiny(SIZES[3])
    at = [plain(ids, exit_at_step=k).logits for k in range(4)]
    step = tiny(SIZES[3], early_exit_step=1, early_exit_threshold=0.45)
    assert torch.equal(step(ids).logits, at[1])
    assert torch.equal(step(ids, exit_at_step=2).logits, at[2])
    assert torch.equal(step(ids, exit_threshold=0.6).logits, plain(ids, exit_threshold=0.6).logits)
    assert torch.equal(step(ids, use_weighted_exit=True).logits, plain(ids, use_weighted_exit=True).logits)
    threshold = tiny(SIZES[3], early_exit_threshold=0.45)
    assert torch.equal(threshold(ids).logits, plain(ids, exit_threshold=0.45).logits)
    assert not torch.equal(threshold(ids).logits, at[3])
    assert torch.equal(threshold(ids, exit_threshold=1.0).logits, at[3])
    assert torch.equal(threshold(ids, exit_at_step=0).logits, at[0])
    assert torch.equal(tiny(SIZES[3], early_exit_threshold=None)(ids).logits, at[3])
    assert torch.equal(step(ids, labels=ids).loss, plain(ids, labels=ids).loss), "the loss is not touched"


def test_exit_probabilities_are_exact_for_gates_that_are_sure():
    gates = torch.tensor(
        [[-80.0, 80.0, -80.0, 0.0], [5.0, -80.0, -80.0, 0.0], [7.0, 7.0, 7.0, 7.0]], requires_grad=True
    )
    p = exit_distribution(gates)
    expected = torch.stack(list(ref.exit_pdf(list(gates.double()))))
    assert_close(p.sum(0), torch.ones(4), 1e-6)
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-30)
    (p * torch.arange(12.0).view(3, 4)).sum().backward()
    assert gates.grad.isfinite().all()
    assert (gates.grad[2] == 0).all() and (gates.grad[:2] != 0).any()  # what the last gate says is not read


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_number_of_loops_can_be_set_at_call_and_in_the_config(loops):
    ids = tokens(2, 9)
    configured = tiny(MEDIUM | {"total_ut_steps": loops})
    expected = stacked(ref.logits_at, *states_of(configured, ids), loops - 1)
    assert_close(configured(ids).logits, expected)
    assert_close(tiny()(ids, total_ut_steps=loops).logits, expected)
    labels = tokens(2, 9, seed=1)
    loss = ref.loss(*reference(configured), list(zip(ids, labels, strict=True)), "all")
    assert_close(tiny()(ids, labels=labels, objective="all", total_ut_steps=loops).loss, loss)


@pytest.mark.parametrize("exit_arguments", [{}, {"exit_threshold": 0.5}, {"use_weighted_exit": True}], ids=str)
def test_logits_to_keep_selects_positions(exit_arguments):
    model, ids = tiny(), tokens(2, 9)
    full = model(ids, output_loops=True, **exit_arguments)
    for keep in (0, 1, 4, torch.tensor([0, 3, 7])):
        chosen = keep if isinstance(keep, Tensor) else torch.arange(9)[-keep:]
        kept = model(ids, output_loops=True, logits_to_keep=keep, **exit_arguments)
        assert_close(kept.logits, full.logits[:, chosen])
        assert_close(torch.stack(kept.loop_logits), torch.stack(full.loop_logits)[:, :, chosen])
        assert torch.equal(kept.gate_logits, full.gate_logits)


@sizes
def test_exit_at_step_runs_no_later_loop(size):
    model, ids, calls = tiny(size), tokens(1, 5), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    for k in range(size["total_ut_steps"]):
        for arguments, loops in (({}, k + 1), ({"output_loops": True}, size["total_ut_steps"])):
            calls.clear()
            model(ids, exit_at_step=k, **arguments)
            assert len(calls) == loops * size["num_hidden_layers"]


def test_embeddings_can_be_given_instead_of_tokens_and_a_tuple_asked_for():
    model, ids = tiny(), tokens(2, 9)
    (logits,) = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
    assert torch.equal(logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------------------- bf16


def test_bf16_default_answers_from_the_last_loop_where_the_published_threshold_does_not():
    """With sure gates the sum of exit probabilities rounds up to 1.0 in bf16 before the last loop."""
    model, ids = tiny(SIZES[3]), tokens(2, 9)
    model.model.early_exit_gate.bias.data.fill_(8.0)
    model.bfloat16()
    last = model(ids, exit_at_step=3).logits
    out = model(ids, output_loops=True)
    leave = torch.sigmoid(out.gate_logits)
    published = leave[0] + leave[1] * (1 - leave[0])  # in bf16, as the published code adds it up
    assert (published >= 1.0).any() and out.gate_logits.dtype == torch.bfloat16
    assert torch.equal(out.logits, last) and torch.equal(model(ids).logits, last)
    assert torch.equal(model(ids, exit_threshold=1.0).logits, last)
    assert not torch.equal(model(ids, exit_threshold=0.9).logits, last)
    assert exit_distribution(out.gate_logits).dtype == torch.float32
    assert_close(exit_distribution(out.gate_logits), exit_distribution(out.gate_logits.double()), 1e-6)


def test_bf16_keeps_the_angles_of_rotations_exact_at_late_positions():
    """Angles rounded to bf16 would be off by whole turns here."""
    model, ids = tiny().bfloat16(), tokens(2, 9)
    late = model(ids, position_ids=torch.arange(9)[None] + 4001).logits.float()
    near = model(ids).logits.float()
    exact = tiny()(ids).logits
    assert (late - near).norm() < 0.05 * near.norm()
    assert (late - exact).norm() < 0.05 * exact.norm()
    cos, sin = model.model.rotations(torch.arange(4096)[None], torch.bfloat16)
    wide_cos, wide_sin = model.model.rotations(torch.arange(4096)[None], torch.float32)
    assert torch.equal(cos, wide_cos.bfloat16()) and torch.equal(sin, wide_sin.bfloat16())


def test_norm_is_computed_wide_and_rounded_before_the_weight():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = OuroRMSNorm(32, 1e-6).bfloat16()
    norm.weight.data.copy_(torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5)
    scaled = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), norm.weight * scaled.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * scaled).bfloat16())


@objectives
def test_bf16_loss_is_computed_in_fp32_from_the_bf16_logits(objective):
    model, ids = tiny().bfloat16(), tokens(2, 9)
    loss = model(ids, labels=ids, objective=objective).loss
    out = model(ids, output_loops=True)
    logits = {"last": out.loop_logits[-1:], "all": out.loop_logits}.get(objective)
    logits = logits or [model(ids, use_weighted_exit=True).logits]
    terms = [cross_entropy(x[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()) for x in logits]
    assert loss.dtype == torch.float32
    assert_close(loss, torch.stack(terms).mean(), 1e-6)


# -------------------------------------------------------------------------------------- padding and packing of a batch


def expected_logits(model: OuroForCausalLM, groups: list[list[int]], exit_at_step: int = -1) -> list[Tensor]:
    """For each row the reference's logits of its documents, each computed alone: (tokens, vocab)."""
    w, config = reference(model)
    docs, exit_at_step = documents(), exit_at_step % config["total_ut_steps"]
    with torch.no_grad():
        alone = {d: ref.loop_states(w, config, docs[d][0]) for group in groups for d in group}
        return [torch.cat([ref.logits_at(w, alone[d], exit_at_step) for d in group]) for group in groups]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_packing_do_not_change_logits(layout):
    model = tiny()
    groups, batch = LAYOUTS[layout]
    logits = model(**without(batch, "labels")).logits
    assert logits.isfinite().all()
    for row, expected in enumerate(expected_logits(model, groups)):
        real = rows(*groups, left="left" in layout)["attention_mask"][row].bool()
        assert_close(logits[row, real], expected)


def test_padding_on_the_left_sees_only_itself():
    """It must see something: a softmax over nothing is not a number, and spreads through the gradients."""
    _, batch = LAYOUTS["left-padded, mask"]
    logits = tiny()(**without(batch, "labels")).logits
    padding = logits[batch["attention_mask"] == 0]
    assert_close(padding, tiny()(torch.zeros(1, 1, dtype=torch.long)).logits[0].expand(len(padding), -1))


def test_documents_stay_apart_across_padding_between_them():
    model, (first, _), (second, _) = tiny(), documents()[0], documents()[3]
    pad = torch.zeros(2, dtype=torch.long)
    batch = {
        "input_ids": torch.cat((first, pad, second)),
        "attention_mask": torch.cat((first > 0, pad, second > 0)),
        "position_ids": torch.cat((torch.arange(6), pad, torch.arange(7))),
    }
    logits = model(**{name: value[None] for name, value in batch.items()}).logits[0]
    assert_close(logits[:6], expected_logits(model, [[0]])[0])
    assert_close(logits[8:], expected_logits(model, [[3]])[0])


@pytest.mark.parametrize("use_cache", [False, True])
def test_one_document_may_have_padding_inside(use_cache):
    """Its positions go on behind the gap; in the gap they are 1, as transformers counts them."""
    model, ids = tiny(), tokens(1, 9)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = model(ids, mask, positions, use_cache=use_cache).logits[:, mask[0].bool()]
    assert_close(logits, model(ids[:, mask[0].bool()]).logits)


# ------------------------------------------------------------------------------------------------- refused arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 8)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask must be"),
        ({"inputs_embeds": torch.zeros(2, 9, 20, dtype=torch.float64)}, "either input_ids or inputs_embeds"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"exit_threshold": 0.5, "use_weighted_exit": True}, "at most one"),
        ({"exit_at_step": 3}, "not one of the 3 loops"),
        ({"exit_at_step": -1}, "not one of the 3 loops"),
        ({"exit_at_step": 2, "total_ut_steps": 2}, "not one of the 2 loops"),
        ({"labels": tokens(2, 9), "exit_at_step": 0}, "labels train"),
        ({"labels": tokens(2, 9), "use_weighted_exit": True}, "labels train"),
        ({"labels": tokens(2, 9), "objective": "first"}, "objective='first'"),
        ({"total_ut_steps": 0}, "at least one loop"),
        ({"output_attentions": True}, "not available"),
    ],
)
def test_contradictory_or_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**{"input_ids": tokens(2, 9)} | arguments)
