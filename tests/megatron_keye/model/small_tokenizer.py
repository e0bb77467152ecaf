"""A byte-level tokenizer with Keye's special tokens: a vocabulary small enough for whole logits to be compared."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keye_data.tokenizer import ENDOFTEXT, FRAME, IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

SPECIAL = (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, FRAME)
VOCAB = 256 + len(SPECIAL)
IDS = {token: 256 + i for i, token in enumerate(SPECIAL)}


def save_small_tokenizer(folder: Path) -> Path:
    """One token a byte, then the special ones: `VOCAB` in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END, pad_token=ENDOFTEXT)
    tokenizer.save_pretrained(str(folder))
    return folder
