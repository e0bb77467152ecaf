"""The processor's files in an exported Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keye_data.budget import FACTOR
from keye_data.settings import DataConfig


def save_processor(tokenizer: Any, settings: DataConfig, folder: Path) -> None:
    """Writes tokenizer files, chat_template.jinja, preprocessor_config.json and video_preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    common = {
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
    pixels = FACTOR**2
    image = {"min_pixels": settings.image.min_tokens * pixels, "max_pixels": settings.image.max_tokens * pixels}
    video = {
        "fps": settings.video.fps,
        "min_pixels": settings.video.min_frame_tokens * pixels,
        "max_pixels": settings.video.max_frame_tokens * pixels,
        "total_pixels": settings.video.total_tokens * pixels,
        "max_frames": settings.video.max_frames,
        "adaptive_budget": settings.video.adaptive_budget,
        "timestamp_format": settings.video.timestamp_format,
    }
    _write(folder / "preprocessor_config.json", {**common, **image})
    _write(folder / "video_preprocessor_config.json", {**common, **video})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
