"""Talk to a run in the terminal, at any depth.

    python tools/chat.py --config configs/smoke.yaml --exp exp2-wangchan-ut1      # after training it
    python tools/chat.py --config configs/default.yaml --base                    # the model as published
    make chat EXP=exp2-wangchan-ut1 CONFIG=configs/default.yaml

/depth 2 answers from the second loop, /base switches the adapter off and on, /reset forgets the conversation, /quit
ends it; Ctrl-C ends a reply. Lines can also come from a file or a pipe.
"""

import argparse
import codecs
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.data.thai import normalise
from ouro.files import UserError, call
from ouro.model.generate import generate
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Resolved, Settings, resolve
from tools.export import finished

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

COMMANDS = "/depth 1…{loops}, /base (adapter off and on), /reset (forget), /quit"


class Utf8Stream:
    """Tokens of a byte-level vocabulary -> text, as soon as its characters are complete.

    Bytes that belong to no character are left out, and so are special tokens and what would steer a terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self.bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def feed(self, tokens: list[int]) -> str:
        """The text that is complete with these tokens."""
        # The model may have more outputs than there are tokens: they are None.
        pieces = self.tokenizer.convert_ids_to_tokens([t for t in tokens if t not in self.special])
        text = self.decoder.decode(bytes(self.bytes[c] for piece in pieces if piece for c in piece))
        return "".join(c for c in text if c.isprintable() or c in "\n\t")


def load(run: Resolved) -> tuple[PeftModel | OuroForCausalLM, PreTrainedTokenizerBase, Settings]:
    """The model, its tokenizer, and the settings it was trained with.

    Raises:
        UserError: the run is not trained, its adapter is damaged, or its model cannot be loaded.
    """
    folder, s, adapter = (None, run.settings, None) if run.options.base else finished(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if s.bf16 and device == "cpu":
        raise UserError(f"{s.model_name_or_path} would be read in bf16, and no CUDA GPU is found here")
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision)
    dtype = torch.bfloat16 if s.bf16 else torch.float32
    nf4 = {"nf4": s.use_qlora, "double_quant": s.bnb_4bit_use_double_quant}
    try:
        model = load_ouro(s.model_name_or_path, s.model_revision, dtype=dtype, device=device, **nf4)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {s.model_name_or_path}{f' with {folder}' if folder else ''}: {error}") from None
    return model.eval(), tokenizer, s


class Conversation:
    """A model, its depth, and what has been said."""

    def __init__(
        self,
        model: PeftModel | OuroForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        s: Settings,
        sampling: Settings,
    ):
        self.model, self.tokenizer, self.settings, self.depth = model, tokenizer, s, s.total_ut_steps
        self.sampling, self.adapted, self.replies = sampling, True, 0
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
            if not value.strip().isdecimal() or not 1 <= int(value) <= loops:
                return f"/depth takes a number from 1 to {loops}"
            self.depth = int(value)
            return f"answers from loop {self.depth}"
        if name == "/base":
            if not isinstance(self.model, PeftModel):
                return "this is the base model, there is no adapter to switch"
            self.adapted = not self.adapted
            layers = self.model.base_model
            (layers.enable_adapter_layers if self.adapted else layers.disable_adapter_layers)()
            return "adapter on" if self.adapted else "adapter off: the base model answers"
        return f"unknown command {name}: {COMMANDS.format(loops=loops)}"

    def reply(self, text: str, write: Callable[[str], None]) -> None:
        """Answers, writing the text as it comes; an interrupted answer counts as far as it came.

        Raises:
            UserError: the conversation is longer than the model or its memory allows; the new turn is forgotten.
        """
        text = normalise(text) if self.settings.normalise_thai else text  # as the training rows
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        stream, said = Utf8Stream(self.tokenizer), []

        def on_tokens(_: int, tokens: list[int]) -> None:
            said.append(stream.feed(tokens))
            write(said[-1])

        self.replies += 1
        try:
            generate(
                self.model,
                [ids],
                depth=self.depth,
                max_new_tokens=self.sampling.max_new_tokens,
                stop=self.stop,
                temperature=self.sampling.temperature,
                seed=self.sampling.seed + self.replies,
                on_tokens=on_tokens,
            )
        except KeyboardInterrupt:
            write(" …")
        self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]


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
    if not (run.options.base or run.options.exp or run.config):
        raise UserError("name a run: --exp exp2-wangchan-ut1 (configs/experiments.yaml), or --base")
    model, tokenizer, s = load(run)
    sys.stdout.reconfigure(encoding="utf-8")
    talk = Conversation(model, tokenizer, s, run.settings)
    who = s.model_name_or_path if run.options.base else run.run
    write(f"{who} at depth {talk.depth}; {COMMANDS.format(loops=model.config.total_ut_steps)}\n")
    for line in map(str.strip, lines()):
        if line.startswith("/"):
            answer = talk.command(line)
            if answer is None:
                break
            write(f"[{answer}]\n")
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
