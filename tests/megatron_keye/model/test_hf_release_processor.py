"""The processor that travels with an export: keye_data's own sources, and the same outputs by every way in."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import keye_data
from keye_data.errors import DataError
from keye_data.export import read_settings, save_processor
from keye_data.processor import Processor
from keye_data.settings import DataConfig, ImageConfig, VideoConfig
from keye_data.tokenizer import load_tokenizer
from megatron_keye.hf_release import processing_keye_vl2, shipping
from megatron_keye.hf_release.processing_keye_vl2 import KeyeVL2Processor
from tests.megatron_keye.model.small_tokenizer import save_small_tokenizer

SETTINGS = DataConfig(
    tokenizer="-",
    seq_length=700,
    system_prompt="Look well.",
    image=ImageConfig(4, 12),
    video=VideoConfig(
        fps=1.5, min_frame_tokens=4, max_frame_tokens=6, total_tokens=96, max_frames=7, adaptive_budget=False
    ),
)
FROM = re.compile(r"(\s*)from (\S+) import (.+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    tokenizer = load_tokenizer(save_small_tokenizer(path / "tokenizer"))
    save_processor(tokenizer, SETTINGS, path / "exported")
    shipping.ship_processor(path / "exported")
    return path / "exported"


@pytest.fixture(scope="module")
def processor(folder) -> KeyeVL2Processor:
    return KeyeVL2Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def rules(folder) -> Processor:
    """The stack's own."""
    return Processor(load_tokenizer(folder), SETTINGS)


@pytest.fixture(scope="module")
def picture(tmp_path_factory, make_picture) -> Path:
    path = tmp_path_factory.mktemp("media") / "picture.png"
    path.write_bytes(make_picture(60, 90))
    return path


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("input_ids", "position_ids", "pixel_values", "grid_thw"))


def module_of(imported: str, package: list[str]) -> list[str]:
    """An absolute or relative module name -> its parts."""
    return [*package, *imported[1:].split(".")] if imported.startswith(".") else imported.split(".")


def test_shipped_sources_are_the_packages_own(folder):
    """Line by line; only the module named in an import of keye_data may differ, and it must be the same module, flattened."""
    shipped = {path.name for path in folder.glob("*.py")}
    assert shipped == set(shipping.processor_sources())
    originals: dict[str, tuple[Path, list[str]]] = {"processing_keye_vl2.py": (Path(processing_keye_vl2.__file__), [])}
    root = Path(keye_data.__file__).parent
    for path in root.rglob("*.py"):
        parts = ["keye_data", *path.relative_to(root).with_suffix("").parts]
        package = parts[:-1]
        parts = package if parts[-1] == "__init__" else parts
        originals["_".join(parts) + ".py"] = (path, package)
    assert "keye_data_video_with_pyav.py" in shipped and "keye_data_loader.py" not in shipped
    for name in shipped:
        path, package = originals[name]
        ours = path.read_text(encoding="utf-8").splitlines(keepends=True)
        theirs = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            if mine == other:
                assert not re.match(r"\s*(import keye_data|from (keye_data|\.))", mine), f"{name}: {mine}"
                continue
            mine_match, other_match = FROM.fullmatch(mine.rstrip("\n")), FROM.fullmatch(other.rstrip("\n"))
            assert mine_match and other_match and mine_match[1] == other_match[1] and mine_match[3] == other_match[3]
            assert other_match[2] == "." + "_".join(module_of(mine_match[2], package))
            assert f"{other_match[2][1:]}.py" in shipped


def test_settings_come_back(folder):
    back = read_settings(folder)
    assert (back.image, back.video, back.seq_length, back.system_prompt) == (
        SETTINGS.image, SETTINGS.video, SETTINGS.seq_length, SETTINGS.system_prompt
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "key", "value", "complaint"),
    [
        ("preprocessor_config.json", "patch_size", 16, "preprocessor_config.json: patch_size = 16 is not supported"),
        ("video_preprocessor_config.json", "image_mean", [0.4] * 3, "image_mean"),
        ("video_preprocessor_config.json", "fps", None, "fps"),
    ],
)
def test_configurations_of_another_processor_are_refused(folder, tmp_path, file, key, value, complaint):
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / file).read_text())
    if value is None:
        del content[key]
    else:
        content[key] = value
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=complaint):
        read_settings(tmp_path)


def test_every_way_to_give_a_picture(processor, rules, picture):
    data = picture.read_bytes()
    expected = rules.prompt(user({"type": "image", "image": "p"}), {"p": data})
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for part in (
        {"type": "image", "image": str(picture)},
        {"type": "image", "image": picture},
        {"type": "image", "image": data},
        {"type": "image", "image": Image.open(picture)},
        {"type": "image", "path": str(picture)},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": f"file://{picture}"}},
    ):
        got = processor.apply_chat_template(user(part), tokenize=True, add_generation_prompt=True)
        assert same(got, expected) and bool(got["attention_mask"].all())
    text = processor.apply_chat_template(user({"type": "image", "image": data}), add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nLook well.") and text.endswith("<|im_start|>assistant\n")
    assert same(processor(text=text, images=[Image.open(picture)]), expected)


def test_the_real_vocabulary(tokenizer, picture, tmp_path):
    save_processor(tokenizer, SETTINGS, tmp_path)
    shipping.ship_processor(tmp_path)
    image = {"type": "image", "image": picture.read_bytes()}
    got: Any = KeyeVL2Processor.from_pretrained(tmp_path).apply_chat_template(
        user(image), tokenize=True, add_generation_prompt=True
    )
    named = user({"type": "image", "image": "p"})
    assert same(got, Processor(tokenizer, SETTINGS).prompt(named, {"p": image["image"]}))
    assert got["input_ids"][0].tolist().count(151_655) == 6


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "I;16", "1"])
def test_pil_images_equal_their_files(processor, rules, picture, mode):
    image: Image.Image = Image.open(picture)
    if mode == "I;16":
        image = Image.fromarray(torch.randint(0, 65535, (60, 90)).numpy().astype("uint16"))
    image = image.convert(mode) if image.mode != mode else image
    file = io.BytesIO()
    image.save(file, format="TIFF")
    expected = rules.prompt(user({"type": "image", "image": "p"}), {"p": file.getvalue()})
    got = processor.apply_chat_template(
        user({"type": "image", "image": image}), tokenize=True, add_generation_prompt=True
    )
    assert same(got, expected)


def test_orientation_of_a_pil_image_is_kept(processor, rules, picture):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(picture).save(file, format="JPEG", exif=exif)
    expected = rules.prompt(user({"type": "image", "image": "p"}), {"p": file.getvalue()})
    assert expected["grid_thw"].tolist() == [[1, 6, 4]]
    opened = Image.open(io.BytesIO(file.getvalue()))
    got = processor.apply_chat_template(
        user({"type": "image", "image": opened}), tokenize=True, add_generation_prompt=True
    )
    assert same(got, expected)


def test_clips_pictures_and_batches(processor, rules, picture, make_clip):
    clip, other = make_clip(16), make_clip(8, seed=3)
    rows = [
        user({"type": "video", "video": clip}, {"type": "image", "image": picture}, {"type": "video", "video": other}),
        user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(other).decode()}}),
    ]
    named = [
        user({"type": "video", "video": "a"}, {"type": "image", "image": "p"}, {"type": "video", "video": "b"}),
        user({"type": "video", "video": "b"}),
    ]
    expected = [rules.prompt(row, {"a": clip, "b": other, "p": picture.read_bytes()}) for row in named]
    texts = processor.apply_chat_template(rows, add_generation_prompt=True)
    lengths = [prompt["input_ids"].shape[1] for prompt in expected]
    assert lengths[0] > lengths[1]
    for side in ("left", "right"):
        got = processor.apply_chat_template(rows, tokenize=True, add_generation_prompt=True, padding_side=side)
        by_text = processor(text=texts, images=[picture], videos=[[clip, other], [other]], padding_side=side)
        assert all(torch.equal(got[key], by_text[key]) for key in got)
        start = lengths[0] - lengths[1] if side == "left" else 0
        short = slice(start, start + lengths[1])
        assert torch.equal(got["input_ids"][:1], expected[0]["input_ids"])
        assert torch.equal(got["input_ids"][1:, short], expected[1]["input_ids"])
        assert torch.equal(got["position_ids"][:, 1:, short], expected[1]["position_ids"])
        assert got["attention_mask"].sum(1).tolist() == lengths
        for key in ("pixel_values", "grid_thw"):
            assert torch.equal(got[key], torch.cat([prompt[key] for prompt in expected]))


def test_a_whole_conversation_without_a_prompt_for_more(processor, rules):
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "\n2"}]
    got = processor.apply_chat_template(messages, tokenize=True)
    whole = rules.encode({"messages": messages}, {}, "k", "s")
    assert got["input_ids"][0].tolist() == whole.input_ids.tolist() and "pixel_values" not in got
    text = processor.apply_chat_template(messages)
    assert torch.equal(processor(text=text)["input_ids"], got["input_ids"])


@pytest.mark.parametrize("options", [{}, {"padding": True}, None])
def test_options_as_pipelines_pass_them(processor, picture, options):
    messages = user({"type": "image", "image": str(picture)})
    expected = processor.apply_chat_template(messages, tokenize=True)
    got = processor.apply_chat_template(messages, tokenize=True, continue_final_message=False, processor_kwargs=options)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


def test_what_cannot_be_used_is_refused(processor, folder, picture):
    image = {"type": "image", "image": str(picture)}
    with pytest.raises(DataError, match="addresses are not fetched"):
        processor.apply_chat_template(
            user({"type": "image_url", "image_url": {"url": "ftp://somewhere/a.png"}}), tokenize=True
        )
    with pytest.raises(DataError, match=r"nowhere\.png: cannot be read"):
        processor.apply_chat_template(user({"type": "image", "image": "nowhere.png"}), tokenize=True)
    with pytest.raises(DataError, match="given as int"):
        processor.apply_chat_template(user({"type": "video", "video": 3}), tokenize=True)
    with pytest.raises(DataError, match="truncation = True is not supported"):
        processor.apply_chat_template(user(image), tokenize=True, truncation=True)
    with pytest.raises(DataError, match="truncation = True is not supported"):
        processor.apply_chat_template(user(image), tokenize=True, processor_kwargs={"truncation": True})
    with pytest.raises(DataError, match="2 image placeholders for 1 given"):
        processor(text=processor.apply_chat_template(user(image, image)), images=picture)
    with pytest.raises(DataError, match="more images are given"):
        processor(text=processor.apply_chat_template(user(image)), images=[picture, picture])
    with pytest.raises(DataError, match="holds the control token"):
        processor.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], tokenize=True)
    with pytest.raises(DataError, match="tokens are more than the 700"):
        processor.apply_chat_template([{"role": "user", "content": "x" * 800}], tokenize=True)
    with pytest.raises(DataError, match="max_pixels: not taken here"):
        KeyeVL2Processor.from_pretrained(folder, max_pixels=100)
    with pytest.raises(DataError, match="no exported processor"):
        KeyeVL2Processor.from_pretrained(picture.parent)
