"""Every kind of source: what its records mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from keye_data.errors import DataError
from keye_data.shards import Options, build
from keye_data.shards.json_list import elements
from keye_data.shards.sources import detect

PICTURE, FILM = {"type": "image", "image": "0.png"}, {"type": "video", "video": "1.mp4"}


@pytest.fixture
def folder(tmp_path, make_picture, make_clip) -> Path:
    """a.png, b.png and c.mp4, in a folder for lists."""
    (tmp_path / "in").mkdir()
    for name, data in (("a.png", make_picture(28, 28)), ("b.png", make_picture(28, 56, 1)), ("c.mp4", make_clip(4))):
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def built(source: Path, **options) -> list[dict]:
    """The conversations of a build, in order."""
    out = source.parent / f"out of {source.name}"
    build(source, out, Options(**options))
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    return found


def said(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def write_list(path: Path, records: list[dict], **how) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, **how), encoding="utf-8")
    return path


def test_llava(folder):
    records: list[dict] = [
        {"id": "é", "image": "a.png", "conversations": said(("human", "<image>\nWhat?"), ("gpt", "Größe 猫"))},
        {"video": "c.mp4", "conversations": said(("human", "What?\n<image>"), ("gpt", "x"))},  # LLaVA-Video's way
        {"image": ["a.png", "b.png"], "conversations": said(("human", "<image> or <image>?"), ("gpt", "<b>"))},
        {"id": 7, "conversations": said(("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho"))},
    ]
    source = write_list(folder / "llava.json", records, indent=1)
    assert detect(source) == "llava"
    found = built(source)
    assert found[0]["id"] == "é" and found[0]["messages"] == [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Größe 猫"},
    ]
    film = {"type": "video", "video": "0.mp4"}
    assert found[1]["messages"][0]["content"] == [{"type": "text", "text": "What?"}, film]
    kinds = [part.get("image", part.get("text")) for part in found[2]["messages"][0]["content"]]
    assert kinds == ["0.png", " or ", "1.png", "?"]
    assert [m["role"] for m in found[3]["messages"]] == ["system", "user", "assistant"]
    assert "conversations" not in found[0] and "image" not in found[0]


def test_sharegpt(folder):
    turns = [{"role": "user", "content": "<video><image>Same?"}, {"role": "assistant", "content": "No"}]
    records = [
        {
            "conversations": said(("human", "<image>A<video>"), ("gpt", "B"), ("human", "<image>"))
            + said(("gpt", "C")),
            "images": ["a.png", "b.png"],
            "videos": ["c.mp4"],
            "system": "S",
        },
        {"messages": turns, "images": ["b.png"], "videos": ["c.mp4"]},
    ]
    lines = folder / "share.jsonl"
    lines.write_bytes(
        b"\xef\xbb\xbf\r\n" + b"\r\n".join(json.dumps(r).encode() for r in records) + b"\n\n"
    )  # BOM, CRLF
    assert detect(lines) == "sharegpt"
    first, second = built(lines)
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert first["messages"][1]["content"] == [PICTURE, {"type": "text", "text": "A"}, FILM]
    assert first["messages"][3]["content"] == [{"type": "image", "image": "2.png"}]
    assert second["messages"][0]["content"][:2] == [
        {"type": "video", "video": "0.mp4"},
        {"type": "image", "image": "1.png"},
    ]


def test_media_elsewhere_and_lists_in_json(folder):
    (folder.parent / "lists").mkdir()
    content = [{"type": "image", "image": "a.png"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    write_list(folder.parent / "lists" / "b.json", [{"messages": turns}, {"text": "[{}]"}])
    found = built(folder.parent / "lists", media=folder)
    assert found[0]["messages"][0]["content"] == [PICTURE] and found[1] == {"text": "[{}]"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png", "conversations": said(("human", "What?"))}, "0 <image> placeholders for 1 files"),
        ({"image": "a.png", "conversations": said(("human", "<image><image>"))}, "2 <image> placeholders for 1 files"),
        ({"conversations": said(("human", "<image>"))}, "1 <image> placeholders for 0 files"),
        (
            {"images": ["a.png"], "video": "c.mp4", "conversations": said(("human", "<image>"))},
            "0 <video> placeholders",
        ),
        ({"image": "d.png", "conversations": said(("human", "<image>"))}, r"the media file .*d\.png is missing"),
        ({"image": "../a.png", "conversations": said(("human", "<image>"))}, "must be a path below"),
        ({"image": "x" * 300 + ".png", "conversations": said(("human", "<image>"))}, "is no file name"),
        ({"image": 3, "conversations": said(("human", "<image>"))}, "`image` holds '3'"),
        ({"image": "c.mp4", "conversations": said(("human", "<image>"))}, r"c\.mp4: picture: cannot be decoded"),
        ({"conversations": said(("moon", "?"))}, "turn 0: `from` is 'moon'"),
        ({"conversations": []}, "expected `conversations`"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0: expected text"),
        ({"conversations": said(("human", "\ud800"))}, "not JSON: .*surrogates"),
        ({"conversations": said(("human", "<|im_start|>"))}, "control token"),
    ],
)
def test_bad_records_are_named(folder, record, message):
    good = {"conversations": said(("human", "Hi"), ("gpt", "Ho"))}
    source = folder / "x.json"
    source.write_text(json.dumps([good, record]))
    with pytest.raises(DataError, match=f"x.json, element 2.*{message}"):
        built(source)
    assert [m["messages"][1]["content"] for m in built(source, on_error="skip")] == ["Ho"]
    (bad,) = map(json.loads, (folder / "out of x.json" / "bad.jsonl").read_text().splitlines())
    assert bad["origin"] == "x.json, element 2" and bad["reason"]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ('[{"a": 1}, {"b": ', 1, "element 2: not JSON"),
        ('[{"a": 1} {"b": 2}]', 1, "element 1: expected , or ]"),
        ('[{"a": 1}, 3]', 1, "element 2: expected an object"),
        ('[{"a": 1}', 1, "element 1: expected , or ]"),
        ('[{"a": 1}] x', 1, "something behind the list"),
        ('[{"a": "\xff"}]', 0, "element 1 or after: not UTF-8"),
        ("", 0, "expected a JSON list"),
        ("[]", 0, None),
    ],
)
def test_a_list_is_read_up_to_its_fault(tmp_path, text, count, message):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    found = []
    fault = None
    try:
        for element in elements(path):
            found.append(element)
    except DataError as error:
        fault = str(error)
    assert len(found) == count
    assert re.search(message, fault) if message and fault else message is fault


def test_a_list_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("keye_data.shards.json_list.CHUNK", 7)
    records = [{"i": i, "text": 'é "]}, {[' * (i % 5)} for i in range(50)]
    found = list(elements(write_list(tmp_path / "x.json", records, indent=2)))
    assert [json.loads(text) for text in found] == records


def tar_of(path: Path, members: list[tuple[str, bytes | None]]) -> Path:
    """A tar of files, in order; None makes a link to another."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def test_tars(folder):
    png, film = (folder / "a.png").read_bytes(), (folder / "c.mp4").read_bytes()
    turns = [{"role": "user", "content": [{"type": "video", "video": "7.mp4"}]}, {"role": "assistant", "content": "x"}]
    llava = {"image": "deep/0003.jpg", "conversations": said(("human", "<image>?"), ("gpt", "y"))}
    shards = folder.parent / "tars"
    shards.mkdir()
    tar_of(
        shards / "1.tar",
        [
            ("a/0001.png", png),
            ("a/0001.txt", "Ein Bär\n".encode()),
            ("a/0002.json", json.dumps({"messages": turns}).encode()),
            ("a/0002.7.mp4", film),
            ("__meta__", b"?"),
            ("0003.jpg", png),
            ("0003.json", json.dumps(llava).encode()),
            ("0004.json", b'{"caption": "from json", "width": 3}'),
            ("0004.png", png),
        ],
    )
    tar_of(shards / "2.tar", [("x.txt", b"a document")])
    assert detect(shards) == "webdataset"
    found = built(shards)
    assert [f["messages"][1]["content"] if "messages" in f else f for f in found] == [
        "Ein Bär",
        "x",
        "y",
        "from json",
        {"text": "a document"},
    ]
    assert found[1]["messages"][0]["content"] == [{"type": "video", "video": "0.mp4"}]
    # what was built is a source as well, and its packet tables are made anew
    assert built(folder.parent / "out of tars") == found


def test_bad_tars(folder):
    png = (folder / "a.png").read_bytes()
    shards = folder.parent / "tars"
    shards.mkdir()
    cut = tar_of(shards / "2.tar", [("g.txt", b"good too"), ("h.txt", b"lost" * 600), ("i.txt", b"lost")])
    with tarfile.open(cut) as opened:
        place = opened.getmember("h.txt").offset_data
    cut.write_bytes(cut.read_bytes()[: place + 700])
    tar_of(
        shards / "1.tar",
        [
            ("a.txt", b"good"),
            ("../b.txt", b"evil"),
            ("/c.txt", b"evil"),
            ("d.json", b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "z.png"}]}]}'),
            ("e.txt", None),
            ("f.png", png),
            ("f.png", png),
            ("j.png", png),
            ("k.json", b"{"),
        ],
    )
    (shards / "3.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(
        DataError, match=r"1\.tar, sample \.\./b: the member name '\.\./b\.txt' leads out of the archive"
    ):
        built(shards)
    assert built(shards, on_error="skip") == [{"text": "good"}, {"text": "good too"}]
    lines = [json.loads(x) for x in (folder.parent / "out of tars" / "bad.jsonl").read_text().splitlines()]
    reasons = {line["origin"]: line["message"] for line in lines}
    for origin, message in {
        "1.tar, sample ../b": "leads out",
        "1.tar, sample c": "leads out",
        "1.tar, sample d": "no member for 'z.png'; it has d.json",
        "1.tar, sample e": "is a link",
        "1.tar, sample f": "member 'f.png' twice",
        "1.tar, sample j": "neither a conversation",
        "1.tar, sample k": "not JSON",
        "2.tar, sample h": "cut short in 'h.txt'",
    }.items():
        assert message in reasons.pop(origin)
    assert all("what follows is lost" in message for message in reasons.values()) and len(reasons) == 2
    assert not (folder.parent / "b.txt").exists()


def test_formats_that_do_not_fit(folder):
    with pytest.raises(DataError, match="nothing that --format webdataset fits"):
        built(folder, format="webdataset")
    with pytest.raises(DataError, match=r"expected a folder or a file ending in \.tar"):
        built(write_list(folder / "x.json", []), format="webdataset")
    with pytest.raises(DataError, match="--format captions needs a folder"):
        built(folder / "x.json", format="captions")
    with pytest.raises(DataError, match="expected an object with either"):
        built(write_list(folder / "y.json", [{"conversations": said(("human", "a"))}]), format="openai")
    with pytest.raises(DataError, match="'avro' is none of captions, openai"):
        built(folder, format="avro")
    (folder / "y.json").unlink(), (folder / "x.json").unlink()
    for name in "abc":
        (folder / f"{name}.txt").write_bytes(b"\xef\xbb\xbfcaption")
    (folder / "notes.json").write_text("{}")
    (folder / "notes.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"files of several kinds \(\.json, \.jsonl\); build them apart"):
        detect(folder)
    assert [m["messages"][1]["content"] for m in built(folder, format="captions")] == ["caption"] * 3
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.png: its caption b\.txt is empty"):
        build(folder, folder.parent / "empty", Options(format="captions"))
