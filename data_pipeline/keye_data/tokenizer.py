"""The Qwen3 byte-level BPE tokenizer with Keye's tokens, from a Hugging Face folder or from `qwen.tiktoken`."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from keye_data.errors import DataError

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
FRAME = "<|frame|>"

REGULAR_TOKENS = 151_643
# Qwen3's added tokens in Qwen3's order, from id 151643 on. The second part is matched in text but is not "special":
# decoding keeps it.
SPECIAL_TOKENS = [
    ENDOFTEXT,
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
]
PLAIN_ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
# How Qwen2 and Qwen3 cut text before BPE: single digits, unlike GPT-4's groups of three.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer from a Hugging Face folder (no remote code is run) or from a `qwen.tiktoken` file.

    A folder without a chat template, and the file, get the Qwen-style one shipped with this package.
    Raises DataError when the path is missing, unreadable, or lacks a token that Keye's layout needs.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        tokenizer = _from_folder(path)
    elif path.is_file():
        tokenizer = _from_tiktoken(path)
    else:
        raise DataError(f"tokenizer {path}: no such file or folder; give a Hugging Face folder or a qwen.tiktoken file")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    vocabulary = tokenizer.get_vocab()
    missing = [
        t for t in (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD) if t not in vocabulary
    ]
    if missing:
        raise DataError(f"tokenizer {path}: it lacks {', '.join(missing)}; Keye needs a Qwen2-VL or Qwen3 vocabulary")
    return tokenizer


def _from_folder(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        # Where the folder names its tokenizer's class, the model's configuration, which may be remote code, is not asked.
        own = path / "tokenizer_config.json"
        named = own.is_file() and "tokenizer_class" in json.loads(own.read_text(encoding="utf-8"))
        config = PreTrainedConfig() if named else None
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, config=config)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tokenizer {path}: not a readable Hugging Face tokenizer folder: {error}") from error


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """token bytes -> rank, from lines of `base64 rank`."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"tokenizer {path}, line {number}: expected `base64 rank`, found {line[:60]!r}") from error
    return ranks


def _from_tiktoken(path: Path) -> Any:
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Reads the file itself: transformers would want the tiktoken package, only for this."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_tiktoken(Path(tiktoken_url))

    backend = Converter(vocab_file=str(path), pattern=QWEN_PATTERN).converted()
    if backend.get_vocab_size() != REGULAR_TOKENS:
        raise DataError(f"tokenizer {path}: {backend.get_vocab_size()} tokens, Qwen's vocabulary has {REGULAR_TOKENS}")
    backend.normalizer = normalizers.NFC()  # as Qwen2 and Qwen3 do
    backend.add_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN_ADDED_TOKENS])
    # Keye writes `<|frame|>` before each frame; its id is not published: the next free one is our default.
    backend.add_tokens([AddedToken(FRAME, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        model_max_length=262_144,
        clean_up_tokenization_spaces=False,
    )
