"""Talk to a run in the terminal, at any depth.

    python tools/chat.py --config configs/smoke.yaml --exp exp2-wangchan-ut1      # after training it
    python tools/chat.py --config configs/default.yaml --base                    # the model as published
    make chat EXP=exp2-wangchan-ut1 CONFIG=configs/default.yaml

/depth 2 answers from the second loop, /base switches the adapter off and on, /reset forgets the conversation, /quit
ends it; Ctrl-C ends a reply. Lines can also come from a file or a pipe.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.data.chats import prompt_tokens
from ouro.data.thai import normalise
from ouro.data.thoughts import answer_of, begun_by, with_beginning
from ouro.files import UserError, call, one_line
from ouro.model.cost import forward_flops
from ouro.model.generate import generate
from ouro.model.loading import frozen_here, load_run_model, load_tokenizer
from ouro.model.lora import refresh
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Resolved, Settings, resolve
from ouro.train.run_folder import finished_run
from ouro.verdict.study import TEXTS, why_it_babbles

import torch
from peft import PeftModel
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

COMMANDS = "/depth 1…{loops}, /base (adapter off and on), /reset (forget), /quit"


class TextStream:
    """Tokens -> text, as soon as its characters are complete.

    Bytes that belong to no character are left out, and so are special tokens and what would steer a terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.decoder = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=True)

    def feed(self, tokens: list[int]) -> str:
        """The text that is complete with these tokens."""
        text = "".join(self.decoder.step(self.tokenizer, token) or "" for token in tokens)
        return "".join(c for c in text if (c.isprintable() and c != "\N{REPLACEMENT CHARACTER}") or c in "\n\t")


class Conversation:
    """A model, its depth, and what has been said.

    s: the settings it was trained with; sampling: those that say how it answers now."""

    def __init__(
        self, model: PeftModel | OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, s: Settings, sampling: Settings,
        has_adapter: bool,
    ):  # fmt: skip
        self.model, self.tokenizer, self.settings, self.sampling = model, tokenizer, s, sampling
        self.depth, self.has_adapter, self.adapter_on, self.replies = s.total_ut_steps, has_adapter, has_adapter, 0
        self.stop = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
        self.reset()

    def reset(self) -> None:
        system = self.settings.system_prompt
        self.turns = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> str | None:
        """What a line that starts with / does, and says; None ends the conversation."""
        name, _, value = line.partition(" ")
        loops = self.model.config.total_ut_steps
        if name == "/quit":
            return None
        if name == "/reset":
            self.reset()
            return "forgotten"
        if name == "/depth":
            if value.strip() not in map(str, range(1, loops + 1)):
                return f"/depth takes a number from 1 to {loops}"
            self.depth = int(value)
            return f"answers from loop {self.depth}"
        if name == "/base":
            if not self.has_adapter:
                return "this is the base model, there is no adapter to switch"
            self.adapter_on = not self.adapter_on
            layers = self.model.base_model
            (layers.enable_adapter_layers if self.adapter_on else layers.disable_adapter_layers)()
            refresh(self.model)
            return "adapter on" if self.adapter_on else "adapter off: the base model answers"
        return f"unknown command {name}: {COMMANDS.format(loops=loops)}"

    def reply(self, text: str, write: Callable[[str], None]) -> None:
        """Answers, writing the text as it comes; an interrupted answer counts as far as it came.
        Raises UserError: the conversation is longer than the model or its memory allows; the new turn is forgotten."""
        text = normalise(text) if self.settings.normalise_thai else text  # as the training rows
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = prompt_tokens(turns, self.tokenizer)
        stream, said = TextStream(self.tokenizer), []

        def on_tokens(_: int, tokens: list[int]) -> None:
            said.append(stream.feed(tokens))
            write(said[-1])

        self.replies += 1
        try:
            how = {"temperature": self.sampling.temperature, "seed": self.sampling.seed + self.replies}
            length = self.sampling.max_new_tokens or 1024
            generate(
                self.model, [ids], depth=self.depth, max_new_tokens=length, stop=self.stop, on_tokens=on_tokens, **how
            )
        except KeyboardInterrupt:
            write(" …")
        if not "".join(said).strip():
            write(TEXTS["answers"]["empty"])
        reply = with_beginning("".join(said), begun_by(self.tokenizer.decode(ids[-16:])))
        self.turns = [*turns, {"role": "assistant", "content": answer_of(reply) or ""}]  # without its thought


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def lines() -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    if not sys.stdin.isatty():
        # The model could not be given bytes that are no UTF-8.
        sys.stdin.reconfigure(encoding="utf-8", errors="ignore")
        yield from sys.stdin
        return
    import readline  # noqa: F401 - editing and history for input()

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def chat(run: Resolved) -> None:
    """Loads the run's model, or the base, and answers line by line.
    Raises UserError: no run is named, it is not trained, its adapter is damaged, or its model cannot be loaded."""
    if not (run.options.base or run.options.exp or run.config):
        raise UserError("name a run: --exp exp2-wangchan-ut1 (configs/experiments.yaml), or --base")
    s, adapter = (run.settings, None) if run.options.base else finished_run(run)[1:]
    who = s.model_name_or_path if run.options.base else run.run
    frozen = frozen_here(s, who)
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_run_model(s, adapter, frozen=frozen, device=device)
    sys.stdout.reconfigure(encoding="utf-8")
    talk = Conversation(model, tokenizer, s, run.settings, has_adapter=adapter is not None)
    write(f"{one_line(who)} at depth {talk.depth}; {COMMANDS.format(loops=model.config.total_ut_steps)}\n")
    base = model.get_base_model() if adapter else model
    if small := why_it_babbles(forward_flops(base, 1)):
        write(f"{small}\n")
    for line in map(str.strip, lines()):
        if line.startswith("/"):
            answer = talk.command(line)
            if answer is None:
                break
            write(f"[{one_line(answer)}]\n")
        elif line:
            try:
                talk.reply(line, write)
                write("\n")
            except UserError as error:
                write(f"[{error}; /reset forgets the conversation]\n")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", action="store_true", help="the model without an adapter")


def main() -> None:
    chat(resolve(__doc__, add_options=options, several=True))


if __name__ == "__main__":
    call(main)
