"""Shards from folders: members, index, determinism, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from keye_data.errors import DataError
from keye_data.shards import build_shards

ROOT = Path(__file__).resolve().parents[2]


def write_jsonl(folder: Path, records: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def ask(*parts: dict) -> dict:
    return {
        "id": 3,
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "!"},
        ],
    }


def image(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": name}}


def members(out: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{m.name}": tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    return found


def test_conversations_become_members(tmp_path):
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    (tmp_path / "in" / "pictures" / "a.PNG").write_bytes(b"aaa")
    (tmp_path / "in" / "b.mp4").write_bytes(b"bbb")
    video = {"type": "video", "video": "b.mp4"}
    records = [ask(image("pictures/a.PNG"), video, image("pictures/a.PNG")), {"text": "Grüße"}, "", ask()]
    source = write_jsonl(tmp_path / "in", records)
    assert build_shards(source, tmp_path / "out", samples_per_shard=2) == (3, 2)
    found = members(tmp_path / "out")
    assert list(found) == [
        "shard-000000.tar/000000000.0.png",
        "shard-000000.tar/000000000.1.mp4",
        "shard-000000.tar/000000000.json",
        "shard-000000.tar/000000001.json",
        "shard-000001.tar/000000002.json",
    ]
    assert found["shard-000000.tar/000000000.0.png"] == b"aaa"
    first = json.loads(found["shard-000000.tar/000000000.json"])
    assert first["id"] == 3 and first["messages"][0]["content"] == [
        {"type": "image", "image": "0.png"},
        {"type": "video", "video": "1.mp4"},
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "?"},
    ]
    assert json.loads(found["shard-000000.tar/000000001.json"]) == {"text": "Grüße"}
    info = json.loads((tmp_path / "out" / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {"shard-000000.tar": 2, "shard-000001.tar": 1}
    assert str(tmp_path) not in (tmp_path / "out" / ".nv-meta" / "split.yaml").read_text()
    # the folder, too, is a source; and the same source gives the same bytes
    build_shards(tmp_path / "in", tmp_path / "again", samples_per_shard=2)
    for path in (tmp_path / "out").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_captions(tmp_path):
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"a")
    (folder / "a.txt").write_text("A dog.\n")
    (tmp_path / "in" / "c.webm").write_bytes(b"c")
    (tmp_path / "in" / "c.txt").write_text("A run.")
    build_shards(tmp_path / "in", tmp_path / "out")
    found = members(tmp_path / "out")
    texts = [json.loads(v)["messages"] for k, v in found.items() if k.endswith(".json")]
    assert [m[1]["content"] for m in texts] == ["A run.", "A dog."]
    assert [m[0]["content"][0]["type"] for m in texts] == ["video", "image"]
    (folder / "b.png").write_bytes(b"b")
    with pytest.raises(DataError, match=r"b\.png: its caption b\.txt is missing"):
        build_shards(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ask(image("none.png")), r"data\.jsonl, line 2: the media file .*none\.png is missing"),
        (ask(image("/etc/passwd")), "line 2: '/etc/passwd' must be a path below"),
        (ask(image("../x.png")), r"line 2: '\.\./x\.png' must be a path below"),
        (ask(image("http://x/y.png")), "line 2: .* must be a path below"),
        (ask(image("link.png")), "line 2: 'link.png' leads out of"),
        (ask(image("plain")), "line 2: 'plain' needs an extension"),
        ("{", "line 2: not JSON"),
        ({"prompt": "x"}, "line 2: expected an object with either `messages` or `text`"),
        ({"messages": [{"role": "me", "content": ""}]}, "line 2, message 0: `role`"),
    ],
)
def test_refusals_name_the_line_and_leave_nothing(tmp_path, record, message):
    (tmp_path / "x.png").write_bytes(b"x")
    source = write_jsonl(tmp_path / "in", [{"text": "fine"}, record])
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "in" / "plain").write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        build_shards(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "x.png"]


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        build_shards(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match="neither"):
        build_shards(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="holds no sample"):
        build_shards(write_jsonl(tmp_path / "in", []), tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        build_shards(write_jsonl(tmp_path / "in", [{"text": "x"}]), tmp_path / "in")


def test_command(tmp_path):
    source = write_jsonl(tmp_path / "in", [{"text": "x"}])
    command = [sys.executable, str(ROOT / "tools" / "build_shards.py"), str(source), "--out"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and "1 samples in 1 shards" in done.stdout
    done = subprocess.run(
        [*command, str(tmp_path / "out")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1 and "exists already" in done.stderr and "Traceback" not in done.stderr
