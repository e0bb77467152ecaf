"""Chain of thought kept in answers or taken out of them, wherever it stands."""

from __future__ import annotations

import pytest

from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.sample import IGNORE
from keye_data.settings import DataConfig

THOUGHT = "Two and two\nmake four."
FORMS = {
    "tags": {"content": f"<think>\n{THOUGHT}\n</think>\n\n4"},
    "field": {"content": "4", "reasoning_content": THOUGHT},
    "no opening tag": {"content": f"{THOUGHT}\n</think>\n\n4"},
    "parts": {"content": [{"type": "text", "text": f"<think>\n{THOUGHT}\n</think>\n\n4"}]},
}


def learned(tokenizer, answer: dict, keep: bool) -> str:
    settings = DataConfig(tokenizer="-", seq_length=256, keep_thinking=keep)
    messages = [{"role": "user", "content": "<think> 2 + 2?"}, {"role": "assistant", **answer}]
    sample = Processor(tokenizer, settings).encode({"messages": messages}, {}, "shard/7", "src")
    assert "<think> 2 + 2?" in tokenizer.decode(sample.input_ids)  # a question is never touched
    return tokenizer.decode(sample.labels[sample.labels != IGNORE])


@pytest.mark.parametrize("form", FORMS)
def test_dropped_in_every_form(tokenizer, form):
    assert learned(tokenizer, FORMS[form], keep=False) == "4<|im_end|>"


@pytest.mark.parametrize("form", ["tags", "field", "parts"])
def test_kept_in_one_form(tokenizer, form):
    assert learned(tokenizer, FORMS[form], keep=True) == f"<think>\n{THOUGHT}\n</think>\n\n4<|im_end|>"


def test_without_thinking_nothing_changes(tokenizer):
    for keep in (True, False):
        assert learned(tokenizer, {"content": " 4 \n"}, keep) == " 4 \n<|im_end|>"


def test_several_thoughts_in_one_answer(tokenizer):
    answer = {"content": "<think>a</think>first <think>b</think>second"}
    assert learned(tokenizer, answer, keep=False) == "first second<|im_end|>"


@pytest.mark.parametrize(
    "answer, message, reason",
    [
        ({"content": "<think>and so on"}, "message 1: <think> without </think>", "malformed conversation"),
        ({"content": "<think>hm</think>\n"}, "nothing is left of the answer", "no answer"),
        ({"content": "", "reasoning_content": "hm"}, "nothing is left of the answer", "no answer"),
        ({"content": "4", "reasoning_content": 4}, "`reasoning_content` must be text", "malformed conversation"),
        ({"content": "4", "reasoning_content": "<|im_end|>"}, r"control token <\|im_end\|>", "control token"),
    ],
)
def test_refused(tokenizer, answer, message, reason):
    with pytest.raises(DataError, match=message) as caught:
        learned(tokenizer, answer, keep=False)
    assert caught.value.reason == reason and "shard/7" in str(caught.value)


def test_an_answer_that_only_calls_a_tool_may_lose_its_thinking():
    from keye_data.thinking import with_thinking

    call = {"role": "assistant", "content": "<think>look it up</think>", "tool_calls": [{"name": "search"}]}
    assert with_thinking([call], "k", keep=False) == [{**call, "content": ""}]
