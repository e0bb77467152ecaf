"""The `data` section: sources, packing, pixels and frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# How OmegaConf marks a key that has no default; written out, so that an exported processor does not need OmegaConf.
MISSING: Any = "???"


@dataclass
class SourceConfig:
    path: str = MISSING  # a folder made by tools/build_shards.py
    weight: float = 1.0  # share of samples drawn from it
    kind: str = "short"  # short | long, for data.long_short_ratio


@dataclass
class ImageConfig:
    min_tokens: int = 4  # after the 2x2 merge
    max_tokens: int = 20_480


@dataclass
class VideoConfig:
    fps: float = 2.0
    min_frame_tokens: int = 64
    max_frame_tokens: int = 256
    total_tokens: int = 184_320  # for all videos of a sample together
    max_frames: int = 2_880
    adaptive_budget: bool = True  # up to 256 / 512 / 1024 s: 1/8, 1/4, 1/2 of the budget
    timestamp_format: str = "<|frame|>{seconds:.1f}"  # written before each frame; not published; Keye 1.5's form
    backend: str = "pyav"  # pyav | dali | torchcodec
    device: str = "auto"  # where DALI decodes: cpu | gpu | auto


@dataclass
class DecodeServiceConfig:
    """Decoding on other machines, for trainers that outgrow their own CPUs."""

    address: str | None = None  # null: decoded in this process; a Ray cluster, host:port or auto; local: started here
    actors: int = 4  # decoders for each data-parallel rank
    cpus_per_actor: int = 1


@dataclass
class DataConfig:
    tokenizer: str = MISSING  # a Hugging Face folder, or a qwen.tiktoken file
    sources: list[SourceConfig] = field(default_factory=list)
    # Samples drawn from the long sources together for each one from the short ones; weights then share within a kind.
    long_short_ratio: float | None = None  # null: weights alone decide
    seq_length: int = 8192  # tokens of one packed row
    too_long: str = "skip"  # skip | cut: plain documents lose their end; conversations and media are skipped even so
    packing: bool = True
    packing_buffer: int = 64  # samples waiting to be packed: at rows of 32,768, half over 1/8 of it, 0.98 full
    shuffle_buffer: int = 100
    workers: int = 2  # loader processes per data-parallel rank
    prefetch: int = 2  # batches decoded ahead, in a thread, while the step runs; 0: decoded when they are asked for
    system_prompt: str | None = None
    train_on: str = "answers"  # answers | all
    keep_thinking: bool = True  # false: chain of thought is taken out of answers before they are cut into tokens
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    decode_service: DecodeServiceConfig = field(default_factory=DecodeServiceConfig)
    max_failures_in_a_row: int = 100  # broken samples one after another before the run stops
