"""Keye-VL-2.0's processor for `transformers`: keye_data's own, behind the usual interface.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    model.generate(**inputs)

Messages are OpenAI's: {"role", "content": text or parts}. A part is {"type": "text", "text"}, {"type": "image", "image"},
{"type": "video", "video"}, or image_url / video_url with {"url"}; "path" and "url" may stand for "image" and "video". A picture
is a PIL image, a path, bytes or a data: URL; a clip is a path, bytes or a data: URL. Nothing is fetched from the network.

In an exported folder the keye_data_*.py files beside this one are the training stack's sources, their imports made relative.
Shapes: B rows of at most L tokens, padded on the left unless told otherwise; P patches, N pictures and frames of all rows.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from keye_data.errors import DataError
from keye_data.export import CLIPS, PICTURES, PROCESSOR, read_settings
from keye_data.processor import Processor
from keye_data.settings import DataConfig
from keye_data.tokenizer import ENDOFTEXT, load_tokenizer

KINDS = ("image", "video")
FILES = (PICTURES, CLIPS, PROCESSOR, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What Auto classes and hub downloads pass along.
HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# Of the code and the model, which pipelines tell every part of.
IGNORED = ("trust_remote_code", "code_revision", "dtype", "torch_dtype", "device_map")


def name_code(folder: Path) -> None:
    """Says in the folder's configurations that this file holds its processor."""
    for name in (PROCESSOR, PICTURES, "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8"))
        config["processor_class"] = "KeyeVL2Processor"
        config["auto_map"] = {**config.get("auto_map", {}), "AutoProcessor": "processing_keye_vl2.KeyeVL2Processor"}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class KeyeVL2Processor(ProcessorMixin):
    """`settings`: budgets of pictures and clips, the longest prompt, the system prompt; `rules` is keye_data's Processor."""

    def __init__(self, tokenizer: Any = None, settings: DataConfig | None = None, **_: Any) -> None:
        if tokenizer is None or settings is None:
            raise DataError("KeyeVL2Processor needs a tokenizer and settings; use from_pretrained")
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)
        self.rules = Processor(tokenizer, settings)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> KeyeVL2Processor:
        """From an exported folder (or hub repository). DataError for files that are missing or another processor's."""
        hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
        if unknown := sorted(key for key in kwargs if key not in IGNORED and not key.startswith("_")):
            raise DataError(f"{', '.join(unknown)}: not taken here; change {PICTURES}, {CLIPS} or {PROCESSOR} instead")
        try:
            files = [cached_file(pretrained_model_name_or_path, name, **hub) for name in FILES]
        except OSError as error:
            raise DataError(f"{pretrained_model_name_or_path}: no exported processor ({error})") from error
        folder = Path(files[0]).parent
        return cls(load_tokenizer(folder), read_settings(folder))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **_: Any) -> None:
        """The tokenizer, the configurations and, of a processor that Auto classes loaded, this code."""
        if push_to_hub:
            raise DataError("push_to_hub is not supported; upload the folder")
        self.rules.save_pretrained(Path(save_directory))
        if self._auto_class is not None:
            custom_object_save(self, save_directory)
            name_code(Path(save_directory))

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """One conversation or a list of them -> text, or with `tokenize` what the model takes.

        input_ids and attention_mask int64 [B, L], position_ids int64 [3, B, L], and with pictures or clips pixel_values fp32
        [P, 3, 14, 14] and grid_thw int64 [N, 3]. Raises DataError for malformed messages and unreadable media.
        """
        self._refuse({**kwargs, "chat_template": chat_template})
        if tokenize and not (return_dict and return_tensors == "pt"):
            raise DataError("apply_chat_template: tokens are returned as a dictionary of torch tensors only")
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        rows: list[Any] = conversation if is_batch else [conversation]
        if not tokenize:
            texts = [
                self.rules.render(_named(row)[0], tools=tools, add_generation_prompt=add_generation_prompt)
                for row in rows
            ]
            return texts if is_batch else texts[0]
        prompts = [
            self.rules.prompt(*_named(row), tools=tools, add_generation_prompt=add_generation_prompt) for row in rows
        ]
        return self._batch(prompts, padding_side)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Text that apply_chat_template wrote, and its media: flat lists in the order of the placeholders of all rows.

        Returns the same as apply_chat_template with `tokenize`.
        """
        self._refuse(kwargs)
        if text is None:
            raise DataError("the processor needs text; pictures stand in it as placeholders")
        rows = [text] if isinstance(text, str) else list(text)
        given = {kind: iter(_flat(media)) for kind, media in zip(KINDS, (images, videos))}
        prompts = []
        for row in rows:
            pictures, clips = (
                [_bytes(data, kind) for _, data in zip(range(self.rules.placeholders(row, kind)), given[kind])]
                for kind in KINDS
            )
            prompts.append(self.rules.prompt_of_text(row, pictures, clips))
        if left := [kind for kind in KINDS if next(given[kind], None) is not None]:
            raise DataError(f"more {left[0]}s are given than the text has placeholders")
        return self._batch(prompts, padding_side)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Options that would change nothing here are errors; padding is always done, to the longest row."""
        harmless = {"padding": (True, "longest"), "return_tensors": ("pt",), "add_special_tokens": (False,)}
        for key, value in (kwargs | (kwargs.get("processor_kwargs") or {})).items():
            if key != "processor_kwargs" and value not in (None, False, *harmless.get(key, ())):
                raise DataError(f"{key} = {value!r} is not supported by Keye-VL-2.0's processor")

    def _batch(self, prompts: list[dict[str, torch.Tensor]], side: str) -> BatchFeature:
        if side not in ("left", "right"):
            raise DataError(f"padding_side = {side!r} is neither 'left', which generate needs, nor 'right'")
        longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
        padding = self.tokenizer.convert_tokens_to_ids(ENDOFTEXT)
        rows = []
        for prompt in prompts:
            missing = longest - prompt["input_ids"].shape[1]
            sides = (missing, 0) if side == "left" else (0, missing)
            ids = prompt["input_ids"]
            pad = torch.nn.functional.pad
            rows.append(
                (pad(ids, sides, value=padding), pad(torch.ones_like(ids), sides), pad(prompt["position_ids"], sides))
            )
        ids, mask, positions = zip(*rows)
        data = {
            "input_ids": torch.cat(ids),
            "attention_mask": torch.cat(mask),
            "position_ids": torch.cat(positions, dim=1),
        }
        if any(len(prompt["grid_thw"]) for prompt in prompts):
            data |= {key: torch.cat([prompt[key] for prompt in prompts]) for key in ("pixel_values", "grid_thw")}
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", "pixel_values", "grid_thw"]


def _flat(media: Any) -> list[Any]:
    """One picture, a list, or a list for each row -> a list."""
    if media is None:
        return []
    if not isinstance(media, (list, tuple)):
        return [media]
    return [item for part in media for item in (part if isinstance(part, (list, tuple)) else [part])]


def _named(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Messages with the media taken out: each is replaced by a name under which its bytes are returned."""
    media: dict[str, bytes] = {}

    def part(given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in ("image", "image_url", "video", "video_url"):
            return given
        value = next((given[key] for key in (kind, "path", "url") if key in given), None)
        if isinstance(value, dict):
            value = value.get("url")
        short = kind.removesuffix("_url")
        name = f"{short} {len(media)}"
        media[name] = _bytes(value, short)
        return {"type": short, short: name}

    named = [
        {**message, "content": [part(p) for p in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    return named, media


def _bytes(value: Any, kind: str) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if kind == "image" and isinstance(value, Image.Image):
        file = io.BytesIO()
        # PNG knows neither CMYK nor YCbCr; everything it knows it keeps to the bit, orientation included.
        value = value if value.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16") else value.convert("RGB")
        value.save(file, format="PNG", exif=value.getexif(), compress_level=1)
        return file.getvalue()
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError(f"{kind} {value[:40]}...: not base64 ({error})") from error
    if isinstance(value, (str, os.PathLike)):
        name = os.fspath(value)
        if "://" in name and not name.startswith("file://"):
            raise DataError(f"{kind} {name}: addresses are not fetched; download it and give the file")
        try:
            return Path(name.removeprefix("file://")).read_bytes()
        except OSError as error:
            raise DataError(f"{kind} {name}: cannot be read ({error.strerror or error})", "missing media") from error
    raise DataError(f"a {kind} is given as {type(value).__name__}; give a path, bytes or (pictures) a PIL image")
