"""Chat: text that is shown whole, a conversation through the template at any depth, and what it refuses."""

import copy
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from ouro.files import UserError, latest, seal
from ouro.model.generate import generate
from ouro.model.loading import load_ouro, load_run_model, load_tokenizer
from ouro.model.modeling_ouro import PROJECTIONS
from ouro.settings import Settings, resolve
from ouro.train.run_folder import finished_run
from tools import chat

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

ARGV = ["--config", "tests/smoke.yaml", "--max_new_tokens", "30"]
EXP = "exp2-wangchan-ut1"
TEXT = "ภาษาไทย ก็ได้ 😀 é \n ok"
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def tokenizer(in_the_repository):
    return load_tokenizer("sample/ouro-tiny")


def by_byte(tokenizer, data: bytes) -> list[int]:
    """A token for each byte, as a byte-level vocabulary always has."""
    return tokenizer.convert_tokens_to_ids([bytes_to_unicode()[b] for b in data])


def test_no_piece_of_a_character_is_ever_shown(tokenizer):
    stream = chat.TextStream(tokenizer)
    shown = [stream.feed([token]) for token in by_byte(tokenizer, TEXT.encode())]
    assert "".join(shown) == TEXT and "" in shown
    assert all(len(piece) <= 1 for piece in shown)
    assert "".join(map(chat.TextStream(tokenizer).feed, [[t] for t in tokenizer(TEXT).input_ids])) == TEXT


def test_broken_bytes_special_tokens_and_escape_sequences_are_left_out(tokenizer):
    data = by_byte(tokenizer, b"a\xe0\xb8b\xffc\x1b[2Jd\xe0")
    no_token = 5000  # a model may have more outputs than there are tokens
    assert chat.TextStream(tokenizer).feed([1, *data, 0, 2, no_token, *by_byte(tokenizer, b"e")]) == "abc[2Jde"


@pytest.fixture(scope="module")
def output(tmp_path_factory, in_the_repository) -> Path:
    """What training leaves behind, as far as chat reads it."""
    run = resolve("", [*ARGV, "--exp", EXP, "--output_dir", str(tmp_path_factory.mktemp("output"))])
    folder = Path(run.settings.output_dir) / EXP
    folder.mkdir()
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(load_ouro("sample/ouro-tiny", dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "final_adapter")
    seal(folder / "final_adapter")
    run.settings.r, run.settings.lora_alpha = 3, 6
    (folder / "config.yaml").write_text(run.as_yaml())
    (folder / "completed").touch()
    return folder.parent


@pytest.fixture
def talk(monkeypatch):
    """Says these lines to a run, as through a pipe; gives what is printed."""

    def play(*argv: str, said: str) -> str:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
        chat.chat(resolve("", latest([*ARGV, *argv]), add_options=chat.options, several=True))
        return out.getvalue().decode()  # fails on broken UTF-8

    return play


def test_a_conversation_goes_through_the_template_at_the_depth_asked_for(talk, output, tokenizer):
    said = "สวัสดีครับ\nแล้วไง\n/depth 3\n/reset\nสวัสดีครับ\n/depth 5\n/base\n/reset\nสวัสดีครับ\n\n/quit\nno more\n"
    argv = ["--exp", EXP, "--output_dir", str(output)]
    header, small, rest = talk(*argv, said=said).split("\n", 2)
    assert header.startswith(f"{EXP} at depth 1; /depth 1…4") and "so that it babbles" in small

    _, s, adapter = finished_run(resolve("", [*ARGV, *argv]))
    with_adapter, base = load_run_model(s, adapter), load_run_model(s)

    def reply(model, depth: int, *turns: str) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        new = generate(model, [ids], depth=depth, max_new_tokens=30, stop=[0, 2])[0]
        return chat.TextStream(tokenizer).feed(new)

    first = reply(with_adapter, 1, "สวัสดีครับ")
    expected = [first, reply(with_adapter, 1, "สวัสดีครับ", first, "แล้วไง"), "[answers from loop 3]", "[forgotten]",
                reply(with_adapter, 3, "สวัสดีครับ"), "[/depth takes a number from 1 to 4]",
                "[adapter off: the base model answers]", "[forgotten]", reply(base, 3, "สวัสดีครับ")]  # fmt: skip
    assert len(set(expected)) == len(expected) - 1
    assert rest == "\n".join(expected) + "\n"


def test_a_thought_is_not_fed_into_the_next_turn(monkeypatch, tokenizer):
    s, model = Settings(), SimpleNamespace(config=SimpleNamespace(total_ut_steps=1))
    tokenizer = copy.deepcopy(tokenizer)
    talk = chat.Conversation(model, tokenizer, s, s, has_adapter=False)
    for said, kept, begun in (
        ("<think>ก</think>\n\nข", "ข", ""),
        ("<think>ก", "", ""),
        ("ข", "ข", ""),
        ("ก", "", "<think>\n"),
        ("", "", ""),
    ):
        tokenizer.chat_template += begun
        answers = tokenizer(said, add_special_tokens=False).input_ids
        monkeypatch.setattr(chat, "generate", lambda *_, on_tokens, ids=answers, **__: on_tokens(0, ids))
        shown = []
        talk.reply("ถาม", shown.append)
        assert "".join(shown).strip(), "no empty line is shown for a reply"
        assert talk.turns[-1] == {"role": "assistant", "content": kept}


def test_a_conversation_too_long_for_the_model_says_so_and_goes_on(talk):
    printed = talk("--base", "--max_new_tokens", "8190", said="hello there\n/base\n/reset\n")
    assert "8192 positions; /reset forgets the conversation]\n[this is the base" in printed


def test_a_terminal_obeys_nothing_in_a_command_that_is_not_known(talk):
    told = talk("--base", said="/x\x1b[2J\n/quit\n")
    assert "[unknown command /x\\x1b[2J: " in told and "\x1b" not in told


def test_runs_that_cannot_answer_are_refused(talk, output, tmp_path):
    with pytest.raises(UserError, match="train it: python train_qlora.py"):
        talk("--exp", EXP, "--output_dir", str(tmp_path / "nothing"), said="")
    folder = shutil.copytree(output / EXP, tmp_path / EXP)
    (folder / "final_adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="final_adapter is damaged or was changed"):
        talk("--exp", EXP, "--output_dir", str(tmp_path), said="")
