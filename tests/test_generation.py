"""The cache and `generate`: whatever is kept from earlier tokens, the logits are those of one uncached pass."""

from ouro.model.modeling_ouro import OuroForCausalLM

import pytest
import reference_ouro as ref
import torch
from tiny_ouro import MEDIUM, assert_close, pad_rows, reference, sizes, tiny, tokens
from torch import Tensor
from transformers import DynamicCache

NEW = 7  # tokens to generate
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
def test_cached_logits_of_a_left_padded_batch_are_those_of_each_row_alone(split):
    model, ids = tiny(), tokens(3, 9)
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


def test_no_cache_unless_asked_for():
    model, ids = tiny(use_cache=True), tokens(2, 9)
    assert model(ids).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)


@pytest.mark.parametrize(("filled", "read"), [(1, 3), (3, 2)])
def test_cache_filled_at_another_depth_is_refused(filled, read):
    model, ids = tiny(), tokens(2, 9)
    _, cache = fed(model, ids, [4], total_ut_steps=filled)
    for arguments in ({"total_ut_steps": read}, {"exit_at_step": read - 1}):
        with pytest.raises(ValueError, match="filled at another depth"):
            model(ids[:, 4:], past_key_values=cache, **arguments)


def test_packed_rows_and_a_mask_that_leaves_out_cached_tokens_are_refused():
    model, ids = tiny(), tokens(2, 9)
    with pytest.raises(ValueError, match="cannot be cached"):
        model(ids, position_ids=torch.arange(9).expand(2, 9) % 5, use_cache=True)
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
        expected = [ref.generate_greedy(w, config | {"total_ut_steps": k + 1}, row, NEW) for row in ids]
        arguments = [{"exit_at_step": k}, {"exit_at_step": k, "use_cache": False}, {"total_ut_steps": k + 1}]
        for chosen in [*arguments, *([{}] if k == size["total_ut_steps"] - 1 else [])]:
            assert answer(model, ids, **chosen).tolist() == expected, chosen
    assert len({*map(tuple, expected)}) > 1


@pytest.mark.parametrize("arguments", [{}, {"exit_at_step": 0}, {"use_cache": False}], ids=str)
def test_left_padded_prompts_are_answered_as_each_alone(arguments):
    model = tiny()
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
        {"num_beams": 4, "num_return_sequences": 2, "exit_at_step": 1},
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5, "total_ut_steps": 2},
        {"exit_threshold": 0.5},
        {"use_weighted_exit": True},
    ],
    ids=str,
)
def test_generation_is_the_same_with_and_without_cache(arguments):
    model, ids = tiny(), tokens(3, 9)
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        answers.append(answer(model, ids, attention_mask=LEFT_PADDED, use_cache=use_cache, **arguments))
    assert torch.equal(*answers)
    assert not torch.equal(answers[0][:3], answer(model, ids, attention_mask=LEFT_PADDED)[:3])  # the arguments act
