"""Builds sample/ouro-tiny: a tiny Ouro's config, and a tokenizer like the published one trained on the sample text;
and sample/openthaieval/data/test.parquet, the layout of the Hub, from the items.jsonl beside it.

    python sample/build.py          # writes the same bytes every time, for it reads the first rows alone

The weights are not stored: `init_seed` in config.json makes `load_ouro` draw them. Like the published tokenizer
(SmolLM2's) this one is a byte-level BPE with single digits, <|endoftext|> = 0 as bos, eos and pad, and ChatML turns
that end with <|im_end|> = 2.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.model.modeling_ouro import OuroConfig

SAMPLE = Path(__file__).resolve().parent

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 1024
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """Every string of these first rows of the sample; the rows that came later and the exam items stay unseen."""
    first = {"wangchan/train": 72, "synthetic/train": 24, "r1/train": 24, "texts/english": 12, "texts/thai": 12}
    rows = [
        json.loads(line)
        for name, count in first.items()
        for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ]
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build(folder: Path) -> None:
    train_tokenizer(corpus(), VOCABULARY).save_pretrained(folder, save_jinja_files=False)
    OuroConfig(
        architectures=["OuroForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.1,  # five times the published one: a frozen random head must be able to tell tokens apart
        init_seed=0,
        torch_dtype="bfloat16",
    ).save_pretrained(folder)


def openthaieval(file: Path) -> None:
    lines = (SAMPLE / "openthaieval/items.jsonl").read_text(encoding="utf-8").splitlines()
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), file, compression="none")


if __name__ == "__main__":
    build(SAMPLE / "ouro-tiny")
    openthaieval(SAMPLE / "openthaieval/data/test.parquet")
