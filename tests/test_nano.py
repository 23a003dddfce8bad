"""sample/ouro-nano, the small model that has learned English: what it is, what it knows, and how it was trained."""

import math

from ouro.files import ROOT
from ouro.model.loading import load_ouro

import pytest
import torch
import torch.nn.functional as F
from helpers import read_jsonl
from transformers import AutoTokenizer

NANO = ROOT / "sample/ouro-nano"
THAI = [chr(c) for c in (*range(0x0E01, 0x0E3B), *range(0x0E3F, 0x0E5C))]


@pytest.fixture(scope="module")
def pretrain():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "sample"))
        import pretrain

        yield pretrain


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


def test_it_is_small_and_loads_like_the_large_one():
    model = load_ouro(str(NANO))
    assert (NANO / "model.safetensors").stat().st_size <= 12 * 2**20
    assert 4e6 <= model.num_parameters() <= 8e6
    assert model.config.total_ut_steps == 4
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_its_tokenizer_has_no_merges_in_thai_and_single_digits(tokenizer):
    assert all(len(tokenizer.encode(c, add_special_tokens=False)) == 3 for c in THAI)
    assert len(tokenizer.encode("".join(THAI))) == 3 * len(THAI)
    assert tokenizer.decode(tokenizer.encode("ภาษาไทย ๑๒๓")) == "ภาษาไทย ๑๒๓"
    assert len(tokenizer.encode("2026")) == 4
    assert len(tokenizer.encode("In the beginning God created the heaven")) <= 8
    tiny = AutoTokenizer.from_pretrained(ROOT / "sample/ouro-tiny")
    assert (tokenizer.chat_template, tokenizer.special_tokens_map) == (tiny.chat_template, tiny.special_tokens_map)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_depth_matters_on_english_that_it_has_not_seen(pretrain):
    rows = read_jsonl(NANO / "heldout.jsonl")
    assert all(row["held_out"] for row in rows) and len({row["source"] for row in rows}) >= 4
    bits = pretrain.bits_per_character(NANO, rows[::2], "cpu")["all"]
    assert bits[0] >= bits[3] + 0.10
    assert bits[0] > bits[1] > bits[2]
    assert bits[3] < 1.5  # it has learned something: a random model needs about 3.5


def test_it_has_learned_when_an_answer_ends(tokenizer):
    model = load_ouro(str(NANO), dtype=torch.float32)
    chat = [{"role": "user", "content": 'What does "tiger" mean?'}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False)
    assert answer[0, -1] == 2


def test_its_objective_is_the_expected_loss_less_the_entropy_of_leaving(pretrain):
    torch.manual_seed(0)
    states, gates = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    head, targets = torch.randn(11, 8), torch.randint(11, (8,))
    expected = []
    for token in range(8):
        g = [1 / (1 + math.exp(-x)) for x in gates.flatten(1)[:, token].tolist()]
        leave = [g[0], (1 - g[0]) * g[1], (1 - g[0]) * (1 - g[1])]
        losses = [-F.log_softmax(head @ h, 0)[targets[token]].item() for h in states.flatten(1, 2)[:, token]]
        entropy = -sum(p * math.log(p) for p in leave)
        expected.append(sum(p * x for p, x in zip(leave, losses, strict=True)) - 0.1 * entropy)
    loss, _, mean = pretrain.objective(tuple(states), gates, head, targets, 0.1)
    assert loss.item() == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert mean.sum().item() == pytest.approx(1)


def test_english_in_other_letters_is_not_thai_and_has_hardly_a_merge(pretrain, tokenizer):
    text = "And God said, Let there be light: and there was light."
    found = [pretrain.respelled(text, seed) for seed in range(300)]
    assert found == [pretrain.respelled(text, seed) for seed in range(300)] and len(set(found)) == 300
    plain = [c for c in text.lower() if c not in " ,:."]
    for other in found:
        letters = [c for c in other if c not in " ,:."]
        assert all(0x800 <= ord(c) < 0xD800 and not 0xE00 <= ord(c) < 0xE80 for c in letters)
        assert len(letters) == len(plain) and len(set(zip(letters, plain, strict=True))) == len(set(plain))
    tokens = [len(tokenizer.encode(other)) / len(other.encode()) for other in found]
    assert sum(tokens) / len(tokens) > 0.97, "as many tokens as bytes, as in Thai; but for blocks with English dashes"


def test_the_base_reads_bytes_that_it_has_not_seen_as_bytes(pretrain):
    """In Thai it is surer than of bytes at random (24 bits a character), but knows nothing of the language yet."""
    rows = read_jsonl(ROOT / "sample/texts/thai.jsonl")
    bits = pretrain.bits_per_character(NANO, [{"source": "thai", "text": row["text"]} for row in rows[:1]], "cpu")
    assert all(10 < value < 24 for value in bits["thai"])


def test_a_chapter_is_held_out_in_every_translation(pretrain):
    names = [f"Book {chr(65 + i // 26)}{chr(97 + i % 26)}" for i in range(68)]
    kjv = "\n".join(f"{name[5:]}1:{verse} And it came to pass." for name in names[:66] for verse in (1, 2))
    web = "\n".join(f"I{name[4:]} {chapter}:1: It happened." for name in names for chapter in (1, 2))
    kjv, web = list(pretrain.bible("kjv", kjv, pretrain.KJV)), list(pretrain.bible("web", web, pretrain.WEB))
    assert kjv[0]["text"] == "And it came to pass. And it came to pass."
    assert len({row["group"] for row in kjv}) == len(kjv) == 66
    assert {row["group"] for row in kjv} <= {row["group"] for row in web}
    # two books more, between the Testaments: the last book of both is the same one
    assert kjv[-1]["group"] == web[-2]["group"] == "bible -1 1"
