"""The cache and `generate`: whatever is kept from earlier tokens, the logits are those of one uncached pass."""

from ouro.model.modeling_ouro import OuroForCausalLM

import pytest
import reference_ouro as ref
import torch
from tiny_ouro import MEDIUM, SIZES, assert_close, pad_rows, reference, tiny, tokens
from torch import Tensor
from transformers import DynamicCache

NEW = 7  # tokens to generate
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s['total_ut_steps']}x{s['num_hidden_layers']}")
splits = pytest.mark.parametrize("split", [[9], [1] * 9, [8, 1], [4, 5], [2, 1, 3, 3]], ids=str)
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])


def fed(model: OuroForCausalLM, ids: Tensor, split: list[int], mask: Tensor | None = None, cache=None, **kwargs):
    """The logits of all positions, with the tokens given in pieces of these lengths, and the cache."""
    cache, logits, end = DynamicCache() if cache is None else cache, [], 0
    for length in split:
        start, end = end, end + length
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, **kwargs)
        assert out.past_key_values is cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


@splits
@sizes
def test_cached_logits_are_the_uncached_ones(size, split):
    model, ids = tiny(size), tokens(2, 9)
    for loops in range(1, size["total_ut_steps"] + 1):
        logits, _ = fed(model, ids, split, total_ut_steps=loops)
        assert_close(logits, model(ids, total_ut_steps=loops).logits)


@splits
@sizes
def test_cached_logits_of_a_left_padded_batch_are_those_of_each_row_alone(size, split):
    model, ids = tiny(size), tokens(3, 9)
    logits, _ = fed(model, ids, split, LEFT_PADDED)
    counted, _ = fed(model, ids, [9], LEFT_PADDED, position_ids=(LEFT_PADDED.cumsum(1) - 1).clamp(min=0))
    assert logits.isfinite().all()
    for row, mask in enumerate(LEFT_PADDED.bool()):
        alone = model(ids[row, mask][None]).logits[0]
        assert_close(logits[row, mask], alone)
        assert_close(counted[row, mask], alone)


@pytest.mark.parametrize("arguments", [{"exit_at_step": 1}, {"exit_threshold": 0.5}, {"use_weighted_exit": True}])
@splits
def test_every_kind_of_exit_works_with_a_cache(split, arguments):
    model, ids = tiny(), tokens(2, 9)
    logits, cache = fed(model, ids, split, **arguments)
    assert_close(logits, model(ids, **arguments).logits)
    assert len(cache.layers) == (2 if "exit_at_step" in arguments else 3) * MEDIUM["num_hidden_layers"]


def test_padding_between_cached_and_new_tokens_is_not_seen():
    """As when a right-padded batch of prompts is answered: the padding stays in the cache."""
    model, ids = tiny(), tokens(2, 9)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    out = model(ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:], past_key_values=cache)
    assert_close(out.logits[:1], model(ids[:1]).logits[:, 5:])
    assert_close(out.logits[1:], model(ids[1:, mask[1].bool()]).logits[:, 3:])


@sizes
def test_cache_holds_one_slot_for_each_loop_and_layer(size):
    model, ids = tiny(size), tokens(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    assert len(cache.layers) == size["total_ut_steps"] * size["num_hidden_layers"]
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    for n, slot in enumerate(cache.layers):
        assert slot.keys.shape == slot.values.shape == (2, heads, 9, dim)
        assert all(not torch.equal(slot.keys, other.keys) for other in cache.layers[:n])


def test_no_cache_unless_asked_for():
    model, ids = tiny(use_cache=True), tokens(2, 9)
    assert model(ids).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)


@sizes
def test_cropped_cache_goes_on_from_where_it_was_cut(size):
    model, ids, other = tiny(size), tokens(2, 9), tokens(2, 5, seed=1)
    _, cache = fed(model, ids, [9])
    cache.crop(6)
    logits, _ = fed(model, other, [1, 4], cache=cache)
    assert_close(logits, model(torch.cat((ids[:, :6], other), dim=1)).logits[:, 6:])


@pytest.mark.parametrize(("filled", "read"), [(1, 3), (2, 3), (3, 2), (3, 1)])
def test_cache_filled_at_another_depth_is_refused(filled, read):
    model, ids = tiny(), tokens(2, 9)
    _, cache = fed(model, ids, [4], total_ut_steps=filled)
    with pytest.raises(ValueError, match="filled at another depth"):
        model(ids[:, 4:], past_key_values=cache, total_ut_steps=read)
    with pytest.raises(ValueError, match="filled at another depth"):
        model(ids[:, 4:], past_key_values=cache, exit_at_step=read - 1)


def test_packed_rows_are_not_cached():
    model, ids = tiny(), tokens(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="cannot be cached"):
        model(ids, position_ids=positions, use_cache=True)


def test_attention_mask_must_cover_the_cached_tokens():
    model, ids = tiny(), tokens(2, 9)
    _, cache = fed(model, ids, [4])
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        model(ids[:, 4:], attention_mask=torch.ones(2, 5), past_key_values=cache)


# --------------------------------------------------------------------------------------------------------- generate


def answer(model: OuroForCausalLM, ids: Tensor, **kwargs) -> Tensor:
    """The new tokens only, (batch, new)."""
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False} | kwargs)[:, ids.shape[1] :]


@sizes
def test_greedy_generation_is_the_references_at_every_exit_and_depth(size):
    model, ids = tiny(size), tokens(2, 5)
    w, config = reference(model)
    for k in range(size["total_ut_steps"]):
        expected = [ref.generate_greedy(w, config, row, NEW, exit_at_step=k) for row in ids]
        arguments = [{"exit_at_step": k}, {"exit_at_step": k, "use_cache": False}, {"total_ut_steps": k + 1}]
        for chosen in [*arguments, *([{}] if k == size["total_ut_steps"] - 1 else [])]:
            assert answer(model, ids, **chosen).tolist() == expected, chosen
    assert len({*map(tuple, expected)}) > 1


@pytest.mark.parametrize("arguments", [{}, {"exit_at_step": 0}, {"use_cache": False}], ids=str)
@sizes
def test_left_padded_prompts_are_answered_as_each_alone(size, arguments):
    model = tiny(size)
    prompts = [tokens(length, seed=length) for length in (2, 6, 3, 1)]
    ids = pad_rows(prompts, 0, left=True)
    mask = pad_rows([torch.ones_like(p) for p in prompts], 0, left=True)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **wanted, **arguments)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **wanted, **arguments)
        assert torch.equal(together.sequences[row, ids.shape[1] :], alone.sequences[0, len(prompt) :])
        for mine, other in zip(together.logits, alone.logits, strict=True):  # generate gives them in float32
            assert_close(mine[row], other[0], 1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "exit_at_step": 1},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "total_ut_steps": 2},
        {"exit_threshold": 0.5},
        {"use_weighted_exit": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_the_same_with_and_without_cache(arguments, padded):
    model, ids = tiny(), tokens(3, 9)
    mask = LEFT_PADDED if padded else torch.ones_like(ids)
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        answers.append(answer(model, ids, attention_mask=mask, use_cache=use_cache, **arguments))
    assert torch.equal(*answers)
    assert not torch.equal(answers[0][:3], answer(model, ids, attention_mask=mask)[:3])  # the arguments act


def test_conversation_goes_on_with_the_cache_of_the_first_answer():
    model, ids, question = tiny(), tokens(1, 5), tokens(1, 4, seed=1)
    first = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, question), dim=1)
    assert first.past_key_values.get_seq_length() == 5 + NEW - 1
    cached = answer(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(cached, answer(model, longer))


def test_generation_from_embeddings_is_that_from_tokens():
    model, ids = tiny(), tokens(2, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False), answer(model, ids))


def test_generation_stops_at_any_end_token_and_pads():
    model, ids = tiny(), tokens(2, 5)
    plain = answer(model, ids)
    ends = [int(plain[0, 2]), int(plain[1, 4])]
    stopped = answer(model, ids, eos_token_id=ends)
    for row, stop in zip(stopped.tolist(), plain.tolist(), strict=True):
        length = 1 + min(stop.index(end) for end in ends if end in stop)
        assert row[:length] == stop[:length] and set(row[length:]) <= {0}
    assert stopped.shape[1] < NEW and (stopped == 0).any()
