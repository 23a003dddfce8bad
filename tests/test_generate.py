"""Generation: the tokens are those of a loop without a cache, whatever runs beside them."""

from ouro.files import UserError
from ouro.model.fp8 import by_row
from ouro.model.generate import Decoder, generate, pick
from ouro.model.loading import load_ouro
from ouro.model.lora import fuse, refresh
from ouro.model.modeling_ouro import OuroConfig, OuroForCausalLM

import pytest
import reference_ouro as ref
import torch
from tiny_ouro import adapted, reference, sizes, tiny, tokens

TINY = "sample/ouro-tiny"
NEW = 20  # tokens, so that a reply takes several bursts
PROMPTS = [tokens(n, seed=n).tolist() for n in (2, 6, 3, 1, 9, 70)]
pytestmark = pytest.mark.usefixtures("in_the_repository")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def theirs(model, prompts: list[list[int]], depth: int, new: int = NEW) -> list[list[int]]:
    """transformers' generate, each prompt by itself."""
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor([p], device=device) for p in prompts]
    answers = [model.generate(input_ids=r, total_ut_steps=depth, **options) for r in rows]
    return [a[0, len(p) :].tolist() for a, p in zip(answers, prompts, strict=True)]


def ours(model, prompts: list[list[int]] = PROMPTS, at_once: int | None = None, **changes) -> list[list[int]]:
    options = {"depth": model.config.total_ut_steps, "max_new_tokens": NEW, "stop": []}
    with pytest.MonkeyPatch.context() as patch:
        if at_once:
            patch.setattr(Decoder, "rows", lambda *_: at_once)
        return generate(model, prompts, **options | changes)


@sizes
def test_greedy_tokens_are_those_of_a_loop_without_a_cache_at_every_depth(size):
    model = tiny(size)
    w, config = reference(model)
    for depth in {1, size["total_ut_steps"]}:
        expected = [ref.generate_greedy(w, config | {"total_ut_steps": depth}, torch.tensor(p), NEW) for p in PROMPTS]
        assert ours(model, depth=depth) == expected
    assert len({*map(tuple, expected)}) > 1


def test_how_many_run_at_once_and_their_order_change_no_token():
    model = tiny().float()
    alone = [ours(model, [p])[0] for p in PROMPTS]
    assert alone == theirs(model, PROMPTS, model.config.total_ut_steps)
    for at_once in (1, 4, 5, None):
        assert ours(model, at_once=at_once) == alone
        assert ours(model, PROMPTS[::-1], at_once=at_once) == alone[::-1]


def test_a_dora_adapter_answers_too():
    """With magnitudes that training has moved, and beside the base, which it answers as when it is off."""
    model = adapted(loops=3, use_dora=True).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.linspace(0.5, 1.5, len(p)))
    expected = theirs(model, PROMPTS, 3)
    assert ours(model) == expected
    with model.disable_adapter():
        assert ours(model) == theirs(model, PROMPTS, 3) != expected


def test_an_adapter_answers_while_it_is_active_and_as_it_is_now():
    model = adapted(loops=3).eval()
    with_adapter = theirs(model, PROMPTS, 3)
    assert ours(model) == with_adapter
    with model.disable_adapter():
        base = ours(model)
        assert base == theirs(model, PROMPTS, 3) != with_adapter
    assert ours(model) == with_adapter
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter *= -1
    assert ours(model) == theirs(model, PROMPTS, 3) != with_adapter
    fuse(model, "bf16")  # the layers of training
    assert ours(model) == theirs(model, PROMPTS, 3)
    model.base_model.disable_adapter_layers()
    refresh(model)
    assert ours(model) == theirs(model, PROMPTS, 3) == base


def test_decoded_nf4_weights_answer_as_the_model_does():
    """The model decodes its weights in each forward pass, generation once."""
    base = load_ouro(TINY, dtype=torch.float32, nf4=True).eval()
    prompts = [[n % 1000 + 3 for n in prompt] for prompt in PROMPTS[:2]]
    assert ours(base, prompts, max_new_tokens=6) == theirs(base, prompts, 4, 6)
    model = adapted("nf4, double", loops=4).eval()
    assert ours(model, prompts, max_new_tokens=6) == theirs(model, prompts, 4, 6)


@torch.no_grad()
def test_fp8_weights_are_decoded_as_the_products_of_training_read_them():
    model = adapted(loops=3).eval()
    parts = {"qkv": "q_proj k_proj v_proj", "o": "o_proj", "gate_up": "gate_proj up_proj", "down": "down_proj"}
    layer = model.get_base_model().model.layers[1]
    modules = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
    expected = {}
    for name, projections in parts.items():
        chosen = [modules[projection] for projection in projections.split()]
        rounded, scale = by_row(torch.cat([p.get_base_layer().weight for p in chosen]))
        expected[name] = rounded.float() * scale + torch.cat([p.get_delta_weight("default") for p in chosen])
    fuse(model, "fp8")
    decoder = Decoder(model.get_base_model())
    decoder.copy_weights()
    for name, matrix in expected.items():
        assert torch.equal(decoder.layers[1][name], matrix), name


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_reply_ends_before_the_stop_token_and_the_next_prompt_comes_in(at_once):
    model, heard = tiny(), {}
    plain = ours(model)
    stop = {plain[0][0], plain[1][3], plain[4][11]}
    expected = [reply[: next((n for n, t in enumerate(reply) if t in stop), NEW)] for reply in plain]
    assert expected[0] == [] and len({len(e) for e in expected}) > 2

    def listen(index: int, new: list[int]) -> None:
        assert new
        heard.setdefault(index, []).extend(new)

    assert ours(model, stop=stop, at_once=at_once, on_tokens=listen) == expected
    assert [heard.get(n, []) for n in range(len(PROMPTS))] == expected


def test_a_reply_has_as_many_tokens_as_asked_for():
    model = tiny()
    longest = ours(model)
    for count in (1, 8, 9):  # 8 are a burst
        assert ours(model, max_new_tokens=count) == [reply[:count] for reply in longest]


def test_an_interrupted_call_leaves_nothing_behind():
    model = tiny()
    expected = ours(model, at_once=4)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours(model, at_once=4, on_tokens=interrupt)
    assert ours(model, at_once=4) == expected


def test_a_sample_depends_on_seed_and_prompt_alone():
    model = tiny()
    first = ours(model, temperature=1.0, seed=3)
    assert first != ours(model)
    for at_once in (1, 2, 5):
        assert ours(model, temperature=1.0, seed=3, at_once=at_once) == first
    assert ours(model, temperature=1.0, seed=4) != first
    same = ours(model, [PROMPTS[1]] * 6, temperature=1.0)
    assert len({*map(tuple, same)}) == 6, "equal prompts of one call are sampled apart"


def test_tokens_are_drawn_with_their_probabilities():
    logits, temperature, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]), 0.7, 40_000
    seeds, positions = torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)
    drawn = pick(logits.expand(draws, -1), Decoder.noise(seeds, positions), torch.tensor(temperature))
    p = (logits / temperature).softmax(-1)
    counts = drawn.bincount(minlength=5)
    chi_square = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert chi_square < 18.5  # 99.9 % of chi-square with 4 degrees of freedom; the draws are the same every time
    steps = drawn.view(200, 200)
    for other in (steps[1:] == steps[:-1], steps[:, 1:] == steps[:, :-1]):  # neighbours in seed or position
        assert other.double().mean() == pytest.approx((p * p).sum().item(), abs=0.01)


def test_what_is_out_of_range_or_does_not_fit_is_refused():
    for changes, message in (
        ({"depth": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(tiny(), **changes)
    model = tiny(max_position_embeddings=64)
    with pytest.raises(UserError, match="a prompt of 70 tokens and max_new_tokens = 20 are more than .* 64 positions"):
        ours(model)
    with pytest.raises(ValueError, match="training mode"):
        ours(model.train(), PROMPTS[:1])
    assert ours(tiny(), []) == []


def test_the_batch_follows_from_free_memory(monkeypatch):
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        model = OuroForCausalLM(OuroConfig())
        torch.set_default_dtype(torch.float32)
    decoder = Decoder(model)
    assert decoder.row_bytes(4, 1024) == 1.5 * 2**30, "1.5 MiB a token at 4 loops"
    decoder.cuda = True
    for free, rows in ((140, 64), (100, 32), (10, 4), (3.5, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * 2**30, 141 * 2**30))
        for name in ("memory_reserved", "memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda _: 0)
        assert decoder.rows(4, 1024, 100) == rows
        assert decoder.rows(4, 1024, 3) == min(rows, 4)
    with pytest.raises(UserError, match="a cache of 4096 tokens at 4 loops takes 6.0 GiB, and 3.5 GiB"):
        decoder.rows(4, 4096, 1)


@gpu
def test_a_captured_step_gives_the_tokens_of_the_model_on_this_gpu():
    model = load_ouro(TINY, dtype=torch.float32, device="cuda").eval()
    prompts = [[n % 1000 + 3 for n in prompt] for prompt in PROMPTS]
    for depth in (1, 4):
        expected = theirs(model, prompts, depth)
        for at_once in (1, 4, None):
            assert ours(model, prompts, depth=depth, at_once=at_once) == expected
    short = ours(model, prompts, stop=[expected[0][3]])
    assert ours(model, prompts[:1], stop=[expected[0][3]]) == short[:1], "with the steps captured before"
