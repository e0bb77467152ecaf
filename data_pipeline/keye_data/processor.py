"""From a conversation and its media to tokens, positions and pixels: one object for training, evaluation and export.

Token layout. A picture: `<|vision_start|>` + `<|image_pad|>` x n + `<|vision_end|>`. A clip: for each frame its timestamp
as text, then `<|vision_start|>` + `<|video_pad|>` x n + `<|vision_end|>`. That frames are encoded one by one behind a
natural-language timestamp is published for Keye-VL-2.0; the timestamp's wording, and that each frame has its own
start and end tokens, are not: our default. Shapes: L tokens, P patches, N pictures and frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye_data.budget import TooSmallBudget, plan_frames, smart_resize, tokens_of, video_budget
from keye_data.conversation import CONTROL_TOKENS, MALFORMED, media_names, normalise
from keye_data.errors import DataError
from keye_data.export import save_processor
from keye_data.images import decode_image
from keye_data.pixels import PATCH, broken, decode_pixels, media_grid
from keye_data.positions import mrope_positions
from keye_data.sample import IGNORE, EncodedSample, Media, pixel_values
from keye_data.settings import DataConfig
from keye_data.stretch import Blob, content
from keye_data.thinking import with_thinking
from keye_data.tokenizer import ENDOFTEXT, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from keye_data.video import Part, StoredClip
from keye_data.video.stored import TABLE

PLACEHOLDER = re.compile(r"<\|vision_start\|>(<\|image_pad\|>|<\|video_pad\|>)<\|vision_end\|>")
# What the model has to write: from behind the header up to the end token, which it must learn too.
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
KINDS = {IMAGE_PAD: "image", VIDEO_PAD: "video"}


@dataclass
class _Piece:
    """A stretch of tokens: text, or one picture or clip (`media` set)."""

    ids: list[int] = field(default_factory=list)
    learn: bool = False
    media: Media | None = None


class Processor:
    """`tokenizer` from load_tokenizer, `settings` the recipe's data section. Picklable; holds no open file."""

    def __init__(self, tokenizer: Any, settings: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        if settings.train_on not in ("answers", "all"):
            raise DataError(f"data.train_on: {settings.train_on!r} is neither answers nor all")
        if settings.too_long not in ("skip", "cut"):
            raise DataError(f"data.too_long: {settings.too_long!r} is neither skip nor cut")
        self._check_timestamp()
        self.image_token_id, self.video_token_id, self.start_id, self.end_id, self.eod_id = (
            tokenizer.convert_tokens_to_ids(t) for t in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, ENDOFTEXT)
        )

    # ---- tokens

    def encode(self, conversation: dict[str, Any], media: Mapping[str, Blob], key: str, source: str) -> EncodedSample:
        """One training sample. Of its clips no more is read than their packet tables, where `media` holds those.

        `conversation` is {"messages": [...]} or {"text": ...}; `media` maps the names used in it to encoded files, or to
        members of a shard as `StoredClip` takes them.
        Raises DataError naming `key`: malformed, broken media, nothing to learn, longer than seq_length.
        """
        if "text" in conversation:
            if not isinstance(conversation["text"], str):
                raise DataError(f"{key}: `text` must be text", MALFORMED)
            # a document may speak of any token; here it is only text
            ids = self.tokenizer.encode(conversation["text"], add_special_tokens=False, split_special_tokens=True)
            ids.append(self.eod_id)
            if self.settings.too_long == "cut":
                ids = ids[: self.settings.seq_length]  # without its end: the model must not learn that it ends there
            pieces = [_Piece(ids, learn=True)]
        else:
            pieces = self._pieces(conversation, media, key, add_generation_prompt=False)
            if not any(piece.learn for piece in pieces):
                raise DataError(f"{key}: no assistant message, nothing to learn from", "no answer")
        return self._sample(pieces, key, source, self.settings.seq_length)

    def prompt(
        self,
        messages: list[dict[str, Any]],
        media: Mapping[str, Blob] | None = None,
        *,
        reserve: int = 0,
        add_generation_prompt: bool = True,
        tools: list[Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the model takes to answer `messages`: the header of the answer is appended, unless told otherwise.

        input_ids int64 [1, L], position_ids int64 [3, 1, L], pixel_values fp32 [P, 3, 14, 14], grid_thw int64 [N, 3].
        `reserve` tokens of seq_length are kept free for the answer.
        """
        conversation = {"messages": messages, "tools": tools}
        pieces = self._pieces(
            conversation, media or {}, "prompt", add_generation_prompt=add_generation_prompt, reserve=reserve
        )
        return self._prompt(pieces, reserve)

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text, one placeholder for each picture and clip."""
        return self._render({"messages": messages, "tools": tools}, "prompt", add_generation_prompt)[0]

    @staticmethod
    def placeholders(text: str, kind: str) -> int:
        """How many pictures ("image") or clips ("video") a rendered text asks for."""
        return sum(KINDS[match[1]] == kind for match in PLACEHOLDER.finditer(text))

    def prompt_of_text(
        self, text: str, pictures: Sequence[bytes] = (), clips: Sequence[bytes] = (), *, reserve: int = 0
    ) -> dict[str, torch.Tensor]:
        """As `prompt`, of text that `render` wrote; `pictures` and `clips` in the order of their placeholders."""
        kinds = [KINDS[match[1]] for match in PLACEHOLDER.finditer(text)]
        given = {"image": list(pictures), "video": list(clips)}
        for kind, data in given.items():
            if kinds.count(kind) != len(data):
                raise DataError(
                    f"prompt: the text has {kinds.count(kind)} {kind} placeholders for {len(data)} given", MALFORMED
                )
        names = [(kind, f"{kind} {kinds[:i].count(kind)}") for i, kind in enumerate(kinds)]
        media = {f"{kind} {i}": data for kind, files in given.items() for i, data in enumerate(files)}
        spans = [match.span() for match in ANSWER.finditer(text)]  # where tokens are cut, as in `prompt`
        return self._prompt(self._cut(text, names, media, "prompt", spans, reserve), reserve)

    def timestamp(self, seconds: float) -> str:
        return self.settings.video.timestamp_format.format(seconds=seconds)

    # ---- pixels

    def pixels(self, media: Media) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes and resizes: uint8 [P, 3, 14, 14] in raster order inside a frame, and int64 grid [N, 2] in patches.

        Part by part and chunk by chunk: of the film and of frames at their own size little is in memory at a time.
        """
        return decode_pixels(media, self.settings.video)

    @staticmethod
    def normalise(patches: torch.Tensor) -> torch.Tensor:
        """uint8 -> fp32 in -1..1: 1/255, mean = std = 0.5."""
        return pixel_values(patches)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, chat_template.jinja and the processor's configurations."""
        save_processor(self.tokenizer, self.settings, Path(folder))

    # ---- inside

    def _check_timestamp(self) -> None:
        what = f"data.video.timestamp_format: {self.settings.video.timestamp_format!r}"
        try:
            stamps = self.timestamp(0.0), self.timestamp(3661.5)
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{what} must format {{seconds}}: {error!r}") from error
        if stamps[0] == stamps[1]:
            raise DataError(f"{what} tells no time: it must format {{seconds}}")
        for token in CONTROL_TOKENS:
            if token in stamps[0]:
                raise DataError(f"{what} holds the control token {token}, which would change the structure of the row")

    def _pieces(
        self,
        conversation: dict[str, Any],
        media: Mapping[str, Blob],
        key: str,
        *,
        add_generation_prompt: bool,
        reserve: int = 0,
    ) -> list[_Piece]:
        rendered, messages = self._render(conversation, key, add_generation_prompt)
        spans = [match.span() for match in ANSWER.finditer(rendered)]
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != answers:
            raise DataError(
                f"{key}: the chat template does not write <|im_start|>assistant ... <|im_end|>; use one that does"
            )
        return self._cut(rendered, media_names(messages), media, key, spans, reserve)

    def _cut(
        self,
        rendered: str,
        names: list[tuple[str, str]],
        media: Mapping[str, Blob],
        key: str,
        spans: Sequence[tuple[int, int]] = (),
        reserve: int = 0,
    ) -> list[_Piece]:
        """Rendered text cut at its pictures and clips, (kind, name) in order, and at the `spans` to learn."""
        found = list(PLACEHOLDER.finditer(rendered))
        if [KINDS[match[1]] for match in found] != [kind for kind, _ in names]:
            raise DataError(
                f"{key}: the chat template wrote {len(found)} pictures and clips for the {len(names)} given", MALFORMED
            )
        marks = {match.start(): (match.end(), name) for match, (_, name) in zip(found, names)}
        cuts = sorted(
            {0, len(rendered), *marks, *(end for end, _ in marks.values()), *(x for span in spans for x in span)}
        )
        pieces: list[_Piece] = []
        clips: list[tuple[_Piece, str]] = []
        for begin, end in pairwise(cuts):
            if begin in marks:
                piece = _Piece()
                name = marks[begin][1]
                if name not in media and f"{name}.{TABLE}" not in media:
                    raise DataError(f"{key}: it has no member named {name}", "missing media")
                if rendered[begin:end].find(IMAGE_PAD) >= 0:
                    self._picture(piece, media[name], f"{key}: {name}")
                else:
                    clips.append((piece, name))
            else:
                learn = self.settings.train_on == "all" or any(a <= begin and end <= b for a, b in spans)
                piece = _Piece(self.tokenizer.encode(rendered[begin:end], add_special_tokens=False), learn)
            pieces.append(piece)
        room = self.settings.seq_length - reserve - sum(len(piece.ids) for piece in pieces)
        for piece, name in clips:
            self._clip(piece, StoredClip(media, name), f"{key}: {name}", room // len(clips), len(clips))
        return pieces

    def _render(self, conversation: dict[str, Any], key: str, prompt: bool) -> tuple[str, list[dict[str, Any]]]:
        """-> the text, and the messages it was made of."""
        messages = with_thinking(normalise(conversation.get("messages"), key), key, self.settings.keep_thinking)
        if self.settings.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.settings.system_prompt})
        tools = conversation.get("tools")
        if (tools or any("tool_calls" in m for m in messages)) and "tool" not in self.tokenizer.chat_template:
            raise DataError(
                f"{key}: it uses tools and the chat template knows none; use a tokenizer folder whose template does"
            )
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return text, messages

    def _picture(self, piece: _Piece, data: Blob, name: str) -> None:
        with broken("image", name):
            height, width, _ = decode_image(
                content(data)
            ).shape  # decoded here too: a broken one is skipped, not masked
            size = smart_resize(height, width, self.settings.image.min_tokens, self.settings.image.max_tokens)
        piece.media = Media("image", [Part(data, [0])], size)
        piece.ids = [self.start_id, *[self.image_token_id] * tokens_of(size), self.end_id]

    def _clip(self, piece: _Piece, clip: StoredClip, name: str, room: int, clips: int) -> None:
        """Plans the frames of one of `clips` clips, which has `room` tokens of the sequence for itself."""
        limits = self.settings.video
        with broken("video", name):
            info = clip.info
            marker = len(self.tokenizer.encode(self.timestamp(info.duration), add_special_tokens=False)) + 2
            budget = video_budget(info.duration, limits, clips)
            try:
                plan = plan_frames(
                    info.n_frames,
                    info.duration,
                    info.height,
                    info.width,
                    limits,
                    budget=budget,
                    room=room,
                    marker_tokens=marker,
                )
            except TooSmallBudget as error:
                raise DataError(f"{name}: {error} of seq_length {self.settings.seq_length}", "too long") from error
            parts = clip.parts(plan.indices)
        piece.media = Media("video", parts, plan.size)
        pads = [self.start_id, *[self.video_token_id] * tokens_of(plan.size), self.end_id]
        stamps = [self.timestamp(float(info.timestamps[index])) for index in plan.indices]
        for ids in self.tokenizer(stamps, add_special_tokens=False)["input_ids"]:  # all at once: thousands, for a film
            piece.ids += [*ids, *pads]

    def _prompt(self, pieces: list[_Piece], reserve: int) -> dict[str, torch.Tensor]:
        sample = self._sample(pieces, "prompt", "prompt", self.settings.seq_length - reserve)
        patches = [torch.empty(0, 3, PATCH, PATCH, dtype=torch.uint8)]
        grids = [torch.empty(0, 2, dtype=torch.int64)]
        for item in sample.media:
            pixels, grid = self.pixels(item)
            patches.append(pixels)
            grids.append(grid)
        return {
            "input_ids": torch.from_numpy(sample.input_ids)[None],
            "position_ids": torch.from_numpy(sample.position_ids)[:, None],
            "pixel_values": self.normalise(torch.cat(patches)),
            "grid_thw": torch.nn.functional.pad(torch.cat(grids), (1, 0), value=1),
        }

    def _sample(self, pieces: list[_Piece], key: str, source: str, limit: int) -> EncodedSample:
        input_ids = np.array([i for piece in pieces for i in piece.ids], dtype=np.int64)
        if len(input_ids) > limit:
            raise DataError(
                f"{key}: {len(input_ids)} tokens are more than the {limit} of data.seq_length; shorten it or raise that",
                "too long",
            )
        learn = np.repeat([piece.learn for piece in pieces], [len(piece.ids) for piece in pieces])
        media = [piece.media for piece in pieces if piece.media is not None]
        grids = np.concatenate([media_grid(item).numpy() for item in media]) if media else None
        positions = mrope_positions(input_ids, grids, self.image_token_id, self.video_token_id)
        return EncodedSample(key, source, input_ids, np.where(learn, input_ids, IGNORE), positions, media)
