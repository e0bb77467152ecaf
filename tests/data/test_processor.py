"""Token layout, labels, budgets and pixels of encoded samples."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from keye_data import images, video
from keye_data.errors import DataError
from keye_data.processor import Processor
from keye_data.sample import IGNORE
from keye_data.settings import DataConfig, ImageConfig, VideoConfig
from keye_data.tokenizer import load_tokenizer

USER, ANSWER = "What is it?", "A grey <think>well</think> square."


def settings(**changes) -> DataConfig:
    video = changes.pop("video", VideoConfig(min_frame_tokens=4, max_frame_tokens=6))
    return DataConfig(tokenizer="-", seq_length=changes.pop("seq_length", 512), video=video, **changes)


def chat(*parts: dict, answer: str = ANSWER) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, text(USER)]}, {"role": "assistant", "content": answer}]}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def test_text_conversation_equals_the_template_and_learns_answers_only(tokenizer):
    processor = Processor(tokenizer, settings())
    conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    sample = processor.encode(conversation, {}, "shard/7", "src")
    whole = tokenizer.apply_chat_template(conversation["messages"], tokenize=True)["input_ids"]
    assert sample.input_ids.tolist() == whole
    learned = sample.labels[sample.labels != IGNORE]
    assert tokenizer.decode(learned) == "2<|im_end|>Yes.<|im_end|>"
    assert (sample.labels[sample.labels != IGNORE] == sample.input_ids[sample.labels != IGNORE]).all()
    assert (sample.position_ids == np.arange(len(sample))).all()


def test_system_prompt_is_put_first_unless_there_is_one(tokenizer):
    processor = Processor(tokenizer, settings(system_prompt="Look well."))
    ids = processor.encode(chat(), {}, "k", "s").input_ids
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nLook well.<|im_end|>\n<|im_start|>user\n")
    own = {"messages": [{"role": "system", "content": "Mine."}, *chat()["messages"]]}
    assert "Look well" not in tokenizer.decode(processor.encode(own, {}, "k", "s").input_ids)


def test_plain_document_learns_everything_and_reads_control_tokens_as_text(tokenizer):
    sample = Processor(tokenizer, settings()).encode({"text": "a <|im_end|> b"}, {}, "k", "s")
    assert 151645 not in sample.input_ids and sample.input_ids[-1] == 151643
    assert (sample.labels == sample.input_ids).all()
    assert tokenizer.decode(sample.input_ids[:-1]) == "a <|im_end|> b"


def test_picture_layout(tokenizer, make_picture):
    processor = Processor(tokenizer, settings(image=ImageConfig(4, 100)))
    part = {"type": "image_url", "image_url": {"url": "0.png"}}
    sample = processor.encode(chat(part), {"0.png": make_picture(60, 90)}, "k", "s")
    start = sample.input_ids.tolist().index(151652)
    assert sample.input_ids[start : start + 8].tolist() == [151652, *[151655] * 6, 151653]  # 2 x 3 tokens
    assert sample.media[0].size == (56, 84) and sample.media[0].tokens_per_frame == 6
    assert sample.position_ids[:, start + 1 : start + 9].tolist() == [
        [start + 1] * 6 + [start + 4, start + 5],
        [start + 1 + d for d in (0, 0, 0, 1, 1, 1, 3, 4)],
        [start + 1 + d for d in (0, 1, 2, 0, 1, 2, 3, 4)],
    ]


def test_clip_layout_and_times(tokenizer, make_clip):
    processor = Processor(tokenizer, settings())
    clip = make_clip(40, fps=4)  # ten seconds: 20 frames wanted at 2 fps
    sample = processor.encode(chat({"type": "video", "video": "0.mp4"}), {"0.mp4": clip}, "k", "s")
    (media,) = sample.media
    assert media.n_frames == 20 and media.size == (56, 84)
    decoded = tokenizer.decode(sample.input_ids)
    first = "<|frame|>0.0<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    assert decoded.startswith("<|im_start|>user\n" + first + "<|frame|>0.5<|vision_start|>")
    assert decoded.count("<|video_pad|>") == 120
    wanted = np.linspace(0, 39, 20).round().astype(int)
    stamps = [part.split("<|vision_start|>")[0] for part in decoded.split("<|frame|>")[1:]]
    assert stamps == [f"{i / 4:.1f}" for i in wanted]
    (part,) = media.parts
    assert (video.decode(part.data, part.frames) == video.decode(clip, wanted)).all()


def test_timestamp_format_is_a_setting(tokenizer, make_clip):
    layout = VideoConfig(min_frame_tokens=4, max_frame_tokens=4, timestamp_format="at {seconds:.2f} s: ")
    sample = Processor(tokenizer, settings(video=layout)).encode(
        chat({"type": "video", "video": "v"}), {"v": make_clip(4)}, "k", "s"
    )
    assert "at 0.75 s: <|vision_start|>" in tokenizer.decode(sample.input_ids)
    for wrong, message in (
        ("{minutes}", "must format {seconds}"),
        ("frame", "tells no time"),
        ("<|vision_end|>{seconds}", "control token"),
    ):
        with pytest.raises(DataError, match=f"data.video.timestamp_format: .*{message}"):
            Processor(tokenizer, settings(video=VideoConfig(timestamp_format=wrong)))


def test_clips_are_fitted_into_the_sequence(tokenizer, make_clip):
    clip = make_clip(80, fps=4)
    parts = [{"type": "video", "video": "a"}, {"type": "video", "video": "b"}]
    wide = Processor(tokenizer, settings(seq_length=4096)).encode(chat(*parts), {"a": clip, "b": clip}, "k", "s")
    assert [m.n_frames for m in wide.media] == [40, 40]
    tight = Processor(tokenizer, settings(seq_length=256)).encode(chat(*parts), {"a": clip, "b": clip}, "k", "s")
    assert len(tight) <= 256 and tight.media[0].n_frames == tight.media[1].n_frames > 3
    with pytest.raises(DataError, match=r"shard/7: b?.*seq_length 40") as error:
        Processor(tokenizer, settings(seq_length=40)).encode(chat(*parts), {"a": clip, "b": clip}, "shard/7", "s")
    assert error.value.reason == "too long"


def test_train_on_all_leaves_media_out(tokenizer, make_picture):
    processor = Processor(tokenizer, settings(train_on="all"))
    sample = processor.encode(chat({"type": "image", "image": "i"}), {"i": make_picture(56, 56)}, "k", "s")
    vision = np.isin(sample.input_ids, [151652, 151653, 151655])
    assert vision.sum() == 6 and (sample.labels[vision] == IGNORE).all()
    assert (sample.labels[~vision] == sample.input_ids[~vision]).all()


def test_pixels_are_in_raster_order(tokenizer, make_picture, make_clip):
    processor = Processor(tokenizer, settings(image=ImageConfig(4, 100)))
    data = make_picture(56, 84)
    media = processor.encode(chat({"type": "image", "image": "i"}), {"i": data}, "k", "s").media[0]
    patches, grid = processor.pixels(media)
    assert patches.shape == (24, 3, 14, 14) and patches.dtype == torch.uint8 and grid.tolist() == [[4, 6]]
    picture = images.decode_image(data)  # of the right size already, so nothing is resampled
    for row, column in [(0, 0), (1, 4), (3, 5)]:
        tile = picture[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        assert (patches[row * 6 + column].permute(1, 2, 0).numpy() == tile).all()
    values = processor.normalise(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0] and values.dtype == torch.float32

    clip = processor.encode(chat({"type": "video", "video": "v"}), {"v": make_clip(12)}, "k", "s").media[0]
    patches, grid = processor.pixels(clip)
    assert grid.tolist() == [[4, 6]] * 6 and patches.shape[0] == 6 * 24
    shades = patches.reshape(6, -1).float().mean(1)
    assert (shades.diff() > 5).all()  # frames in order: each shade is brighter than the last


def test_prompt(tokenizer, make_picture, make_clip):
    processor = Processor(tokenizer, settings())
    content = [{"type": "image", "image": "i"}, {"type": "video", "video": "v"}, text("Compare.")]
    media = {"i": make_picture(56, 56), "v": make_clip(8)}
    out = processor.prompt([{"role": "user", "content": content}], media)
    length = out["input_ids"].shape[1]
    assert out["position_ids"].shape == (3, 1, length) and out["input_ids"].dtype == torch.int64
    assert tokenizer.decode(out["input_ids"][0]).endswith("Compare.<|im_end|>\n<|im_start|>assistant\n")
    assert out["grid_thw"].tolist() == [[1, 4, 4], *[[1, 4, 6]] * 4]
    assert out["pixel_values"].shape == (16 + 4 * 24, 3, 14, 14) and out["pixel_values"].abs().max() <= 1
    text_only = processor.prompt([{"role": "user", "content": "Hi"}])
    assert text_only["pixel_values"].shape == (0, 3, 14, 14) and text_only["grid_thw"].shape == (0, 3)


@pytest.mark.parametrize(
    ("conversation", "media", "reason", "message"),
    [
        ({}, {}, "malformed conversation", "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, {}, "malformed conversation", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "malformed conversation", "content"),
        ({"text": 3}, {}, "malformed conversation", "text"),
        (chat({"type": "audio"}), {}, "malformed conversation", "part 0"),
        (chat(answer="<|im_start|>user"), {}, "control token", "message 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no answer", "nothing to learn"),
        (chat({"type": "image", "image": "i"}), {}, "missing media", "no member named i"),
        (chat({"type": "image", "image": "i"}), {"i": b"junk"}, "undecodable picture", ": i"),
        (chat({"type": "video", "video": "v"}), {"v": b"junk" * 99}, "corrupt clip", ": v"),
        ({"text": "word " * 600}, {}, "too long", r"60\d tokens are more than the 512"),
        ({**chat(), "tools": [{"type": "function"}]}, {}, "unusable sample", "tools"),
    ],
)
def test_unusable_samples_are_named(tokenizer, conversation, media, reason, message):
    with pytest.raises(DataError, match=message) as error:
        Processor(tokenizer, settings()).encode(conversation, media, "shard/7", "src")
    assert str(error.value).startswith("shard/7") and error.value.reason == reason
    assert pickle.loads(pickle.dumps(error.value)).reason == reason


def test_truncated_picture_is_found_before_packing(tokenizer, make_picture):
    data = make_picture(64, 64, format="JPEG")
    with pytest.raises(DataError) as error:
        Processor(tokenizer, settings()).encode(
            chat({"type": "image", "image": "i"}), {"i": data[: len(data) // 2]}, "k", "s"
        )
    assert error.value.reason == "undecodable picture"


def test_save_pretrained(tokenizer, tmp_path):
    Processor(tokenizer, settings()).save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"} <= names
    picture = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    clip = json.loads((tmp_path / "out" / "video_preprocessor_config.json").read_text())
    assert picture["patch_size"] == 14 and picture["max_pixels"] == 20_480 * 784
    assert clip["fps"] == 2.0 and clip["timestamp_format"] == "<|frame|>{seconds:.1f}"
    again = Processor(load_tokenizer(tmp_path / "out"), settings())
    want = Processor(tokenizer, settings()).encode(chat(), {}, "k", "s")
    assert (again.encode(chat(), {}, "k", "s").input_ids == want.input_ids).all()


def test_bad_train_on(tokenizer):
    with pytest.raises(DataError, match="train_on"):
        Processor(tokenizer, settings(train_on="some"))


def test_a_backend_that_lacks_the_codec_is_no_broken_sample(tokenizer, make_clip):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    video_settings = VideoConfig(min_frame_tokens=4, max_frame_tokens=6, backend="dali", device="cpu")
    processor = Processor(tokenizer, settings(video=video_settings))
    conversation = chat({"type": "video", "video": "v"})
    media = processor.encode(conversation, {"v": make_clip(8)}, "k", "s").media[0]
    with pytest.raises(video.UnsupportedCodec, match="dali on cpu cannot decode h264"):
        processor.pixels(media)
