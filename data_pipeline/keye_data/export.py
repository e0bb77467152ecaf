"""The processor's files in an exported Hugging Face folder, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keye_data.budget import FACTOR
from keye_data.errors import DataError
from keye_data.settings import DataConfig, ImageConfig, VideoConfig

PICTURES, CLIPS, PROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
PIXELS = FACTOR**2  # of a token
# What the processor always does; a file that says otherwise was written for another one.
FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": FACTOR // 2,
    "temporal_patch_size": 1,
    "merge_size": 2,
}


def save_processor(tokenizer: Any, settings: DataConfig, folder: Path) -> None:
    """Writes tokenizer files, chat_template.jinja and the three configurations of the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    pictures = {"min_pixels": settings.image.min_tokens * PIXELS, "max_pixels": settings.image.max_tokens * PIXELS}
    clips = {
        "fps": settings.video.fps,
        "min_pixels": settings.video.min_frame_tokens * PIXELS,
        "max_pixels": settings.video.max_frame_tokens * PIXELS,
        "total_pixels": settings.video.total_tokens * PIXELS,
        "max_frames": settings.video.max_frames,
        "adaptive_budget": settings.video.adaptive_budget,
        "timestamp_format": settings.video.timestamp_format,
    }
    _write(folder / PICTURES, {**FIXED, **pictures})
    _write(folder / CLIPS, {**FIXED, **clips})
    _write(folder / PROCESSOR, {"seq_length": settings.seq_length, "system_prompt": settings.system_prompt})


def read_settings(folder: Path) -> DataConfig:
    """The settings that `save_processor` wrote, from its three configurations. DataError naming a file and key that do not fit."""
    pictures, clips, rest = (_read(folder / name) for name in (PICTURES, CLIPS, PROCESSOR))
    for name, content in ((PICTURES, pictures), (CLIPS, clips)):
        for key, value in FIXED.items():
            if content.get(key, value) != value:
                raise DataError(
                    f"{folder / name}: {key} = {content[key]!r} is not supported; this processor has {value!r}"
                )
    try:
        return DataConfig(
            tokenizer=str(folder),
            seq_length=rest["seq_length"],
            system_prompt=rest["system_prompt"],
            image=ImageConfig(pictures["min_pixels"] // PIXELS, pictures["max_pixels"] // PIXELS),
            video=VideoConfig(
                fps=clips["fps"],
                min_frame_tokens=clips["min_pixels"] // PIXELS,
                max_frame_tokens=clips["max_pixels"] // PIXELS,
                total_tokens=clips["total_pixels"] // PIXELS,
                max_frames=clips["max_frames"],
                adaptive_budget=clips["adaptive_budget"],
                timestamp_format=clips["timestamp_format"],
            ),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}: the processor's configurations lack {error}; export them again") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
