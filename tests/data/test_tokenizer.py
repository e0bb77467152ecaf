"""The tokenizer gives Qwen's ids, from the file and from a saved folder."""

from __future__ import annotations

import pytest

from keye_data.errors import DataError
from keye_data.tokenizer import load_tokenizer, read_tiktoken

ADDED = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<tool_call>": 151657,
    "<|fim_prefix|>": 151659,
    "<tool_response>": 151665,
    "<think>": 151667,
    "</think>": 151668,
    "<|frame|>": 151669,
}


def test_ids_are_qwens(tokenizer):
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in ADDED} == ADDED
    assert len(tokenizer) == 151670


def test_digits_stand_alone_and_text_round_trips(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<|frame|>12.5")) == ["<|frame|>", "1", "2", ".", "5"]
    text = "你好，世界 🙂  naïve\n\n\tx"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_folder_loads_equal(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "A picture <|vision_start|><|image_pad|><|vision_end|> at <|frame|>3.0 <think>hm</think>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template


def test_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    broken = tmp_path / "qwen.tiktoken"
    broken.write_text("IQ== 0\nIg== one\n")
    with pytest.raises(DataError, match="line 2"):
        read_tiktoken(broken)
    broken.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="2 tokens, Qwen's vocabulary has 151643"):
        load_tokenizer(broken)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not a readable Hugging Face tokenizer folder"):
        load_tokenizer(tmp_path / "folder")
