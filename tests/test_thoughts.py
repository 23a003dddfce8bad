"""What of a reply is a thought: one rule for exams, the judge, conversations and training."""

import copy

from ouro.data.thoughts import PAIRS, answer_of, begun_by, usual_beginning, with_beginning
from ouro.evaluate.endpoint import local_chat

import pytest
from judging import says

CHANNEL = "<|start|>assistant<|channel|>"
REPLIES = {  # what is replied -> the answer in it
    " (2)\n": "(2)",
    "<think>\nไม่ใช่ (1)\n</think>\n\n(2)": "(2)",
    "<think>ก</think>": "",
    "<think>ก</think><think>(1)</think>(2)": "(2)",
    "<think>ก</think>(2)\n<THINKING>เดี๋ยวก่อน</Thinking>(3)": "(3)",
    # The template wrote the beginning.
    "ไม่ใช่ (1)\n</think>\n\n(2)": "(2)",
    "ไม่ใช่ (1)\n</thinking>\n(2)": "(2)",
    "ไม่ใช่ `</think>` (1)</think>(2)": "(2)",
    # Tags in the text of a thought, and of an answer.
    "<think>แท็ก <think> กับ </think> คือ</think>(2)": "(2)",
    "<think>ก</think>แท็ก </think> ปิดความคิด (2)": "แท็ก </think> ปิดความคิด (2)",
    "<think>ก</think>`<think>` (2)": "`<think>` (2)",
    "<think>ก</think>\n```\n<think>\n```\n(2)": "```\n<think>\n```\n(2)",
    "<think>\n```py\nx\n</think>\n```py\ny\n```\n(2)": "```py\ny\n```\n(2)",
    "แท็ก <think> และ </think> ครอบความคิด": "แท็ก <think> และ </think> ครอบความคิด",
    # A thought that is closed twice ends at a line's beginning; another pair's tag, or HTML's, is text there.
    "<think>ก</think>\nรอก่อน (1)\n</think>\n\n(2)": "(2)",
    "<think>ก</think>(2)\n</think>": "(2)\n</think>",
    "<details>\nก\n</details>\n(2)": "<details>\nก\n</details>\n(2)",
    '<details type="reasoning">ก</details>(2)\n<details>ข\n</details>': "(2)\n<details>ข\n</details>",
    # What stands before a tag and is not seen, or was not decoded; tags as some write them.
    "\ufeff<think>ไม่ใช่ (1)</think>(2)\u200b": "(2)",
    "\u200b\n<think>ไม่ใช่ (1)</think>\ufeff\n<think>(1)</think>(2)": "(2)",
    "<s>[THINK]ไม่ใช่ (1)[/THINK](2)": "(2)",
    "<s>ผิด</s> ถูก": "<s>ผิด</s> ถูก",
    "< think >\n(1)\n< / think >\n(2)": "(2)",
    '<think duration="3s">(1)</think>(2)': "(2)",
    '<details type="reasoning" done="true">\n<summary>ก</summary>\n> (1)\n</details>\n(2)': "(2)",
    '<details type="reasoning" done="false">\n> (1)': None,
    "<|think|>(1)<|end|><|begin|>assistant<|content|>(2)": "(2)",
    # Several messages of one reply.
    f"<|channel|>analysis<|message|>ก<|end|>{CHANNEL}analysis<|message|>ข<|end|>{CHANNEL}final<|message|>(2)<|return|>":
        "(2)",
    "<|channel|>final<|message|>(2)": "(2)",
    # Thoughts that do not end.
    "<think>\nไม่ใช่ (1)": None,
    "<think>ก</think>(2)\n<think>ไม่ใช่ (1)": None,
    "<think>ก <think>ข</think> (1)": None,
    "<think>ถามว่า `</think>` คืออะไร (1)": None,
    f"<|channel|>analysis<|message|>ก<|end|>{CHANNEL}analysis<|message|>(1)": None,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "answer"), REPLIES.items())
def test_the_answer_is_what_stands_behind_the_last_thought(reply, answer):
    assert answer_of(reply) == answer


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_all_pairs_of_tags_are_read_alike(opening, closing):
    assert answer_of(f"{opening}\n(1){closing.upper()}(2)") == "(2)"
    assert answer_of(f"(1)\n{closing}(2)") == ("(2)" if closing != "</details>" else f"(1)\n{closing}(2)")
    assert answer_of(f"{opening}(1)") is None
    assert begun_by(f"<|im_start|>assistant\n{opening}\n") == opening and begun_by(f"{opening}\n\n{closing}\n") == ""
    assert with_beginning("(1)", opening) == with_beginning(f"{opening}\n(1)", opening) == f"{opening}\n(1)"
    assert with_beginning(f"\ufeff<s>{opening}\n(1)", opening) == f"\ufeff<s>{opening}\n(1)"


@pytest.mark.parametrize(
    ("replies", "beginning"),
    [
        (["ก</think>(2)", "ข</think>(1)", "ค"], "<think>"),
        (["ก[/THINK](2)", "ข"], ""),
        (["แท็ก </think> (2)", "(2)", "(1)", "ค"], ""),  # one of them speaks of a tag
        (["<think>ก</think>(2)", "ข"], ""),
        ([], ""),
    ],
)
def test_that_the_template_begins_each_thought_is_told_from_most_replies(replies, beginning):
    assert usual_beginning(replies, [True] * len(replies)) == beginning


def test_tags_that_are_special_tokens_of_a_tokenizer_are_not_lost(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<|mark|>"]})

    def generate(prompts, done):
        done(0, tokenizer("[THINK]ไม่ใช่ (1)[/THINK](2)<|mark|>").input_ids)

    assert says(local_chat(tokenizer, generate, None), [[{"role": "user", "content": "?"}]]) == [
        "[THINK]ไม่ใช่ (1)[/THINK](2)"
    ]
