"""Colour, orientation and size: the same pixels whatever decodes them."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
from PIL import Image

from keye_data import video
from keye_data.errors import DataError
from keye_data.video.with_dali import from_601_to

COLOURS = np.array([[200, 60, 60], [60, 170, 60], [70, 70, 190], [150, 140, 60], [128, 128, 128], [60, 150, 150]])
PATCHES = np.repeat(np.repeat(COLOURS.reshape(2, 3, 3), 32, axis=0), 32, axis=1).astype(np.uint8)  # [64, 96, 3]


def centres(frame: np.ndarray) -> np.ndarray:
    """The colour in the middle of each of the 2 x 3 patches."""
    return frame[16::32, 16::32].reshape(-1, 3).astype(int)


BACKENDS = ["pyav", "dali", *(["torchcodec"] if importlib.util.find_spec("torchcodec") else [])]
LIMITED, FULL = 1, 2  # colour ranges as FFmpeg numbers them
# (encoder, container, pixel format, matrix by H.273: 1 BT.709, 5 and 6 BT.601, 7 SMPTE 240M, 9 BT.2020, range)
VP9, H264 = ("libvpx-vp9", "webm", "yuv420p"), ("libx264", "mp4", "yuv420p")
COLOURED = [(*VP9, space, width) for space in (None, 1, 5, 6, 7, 9) for width in (LIMITED, FULL)]
COLOURED += [(*H264, space, width) for space in (None, 1, 5, 9) for width in (LIMITED, FULL)]
COLOURED += [("libvpx-vp9", "mp4", "yuv420p", 1, FULL), ("libvpx-vp9", "webm", "yuv444p", 1, LIMITED)]
COLOURED += [("libvpx-vp9", "webm", "gbrp", 0, None), ("libvpx", "webm", "yuv420p", None, LIMITED)]
COLOURED += [("mjpeg", "matroska", "yuvj420p", 5, FULL), ("mjpeg", "mov", "yuvj444p", 5, FULL)]
COLOURED += [("libx264", "mp4", "yuv420p10le", 9, LIMITED), ("libx264", "mp4", "yuv420p10le", 1, FULL)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", COLOURED, ids=lambda kind: "-".join(map(str, kind)))
def test_colours_follow_the_streams_matrix_and_range(kind, backend, clip):
    codec, container, pix_fmt, space, width = kind
    data = clip(
        codec, container, 3, (96, 64), pixels=PATCHES, pix_fmt=pix_fmt, colorspace=space, options={}, color_range=width
    )
    unable = backend == "dali" and codec == "libx264"
    # torchcodec would take the full range for the limited one; H.264 of 8 bits has pixel formats that say it
    unsure = backend == "torchcodec" and width == FULL and codec != "mjpeg" and (codec, pix_fmt) != H264[::2]
    if unable or unsure:
        with pytest.raises(DataError, match=f"backend {backend} .*" + ("full range" if unsure else "h264")):
            video.decode(data, [1], backend, device="cpu")
        return
    frame = video.decode(data, [1], backend, device="cpu")[0]
    assert np.abs(centres(frame) - COLOURS).max() <= 6
    by_pyav = video.decode(data, [1])[0]
    assert np.abs(centres(frame) - centres(by_pyav)).max() <= 4
    assert np.abs(frame.astype(int) - by_pyav).mean() <= 3  # edges: DALI interpolates chroma


def test_the_colours_of_the_two_matrices_are_far_enough_apart_for_the_test_above(clip):
    wrong = COLOURS @ from_601_to(1).T
    assert np.abs(wrong - COLOURS).max() > 12
    assert np.abs((COLOURS - 16) * 255 / 219 - COLOURS).max() > 12  # and those of the two ranges


def shown(frame: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """The definition, pixel by pixel: source (x, y) goes to (a x + c y, b x + d y), shifted to begin at 0."""
    height, width, _ = frame.shape
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    out = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    out[to_y, to_x] = frame
    return out


MATRICES = [(s, 0, 0, t) for s, t in itertools.product((1, -1), repeat=2)]
MATRICES += [(0, s, t, 0) for s, t in itertools.product((1, -1), repeat=2)]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    ("codec", "backend"), [("libx264", "pyav"), *(("libvpx-vp9", backend) for backend in BACKENDS)]
)
def test_every_rotation_and_mirror_is_applied(matrix, codec, backend, clip, with_matrix):
    plain = clip(codec, "mp4", 3, (96, 64), pixels=PATCHES)
    turned = with_matrix(plain, *matrix)
    a, b, c, d = matrix
    if backend == "torchcodec" and a * d - b * c < 0:
        with pytest.raises(DataError, match=r"backend torchcodec .* mirrored"):
            video.decode(turned, [1], backend)
        return
    expected = shown(video.decode(plain, [1], backend, device="cpu")[0], *matrix)
    info = video.probe(turned)
    assert (info.height, info.width) == expected.shape[:2]
    np.testing.assert_array_equal(video.decode(turned, [1], backend, device="cpu")[0], expected)
    size = (40, 56)
    assert video.decode(turned, [1], backend, size, device="cpu").shape == (1, *size, 3)


def test_a_phone_held_upright_is_turned_clockwise(clip, with_matrix):
    """The usual matrix of a portrait clip, 90 degrees."""
    plain = clip("libx264", "mp4", 3, (96, 64), pixels=PATCHES)
    turned = video.decode(with_matrix(plain, 0, 1, -1, 0), [1])
    np.testing.assert_array_equal(turned[0], np.rot90(video.decode(plain, [1])[0], -1))


@pytest.mark.parametrize("size", [(28, 28), (56, 140), (200, 100), (181, 323)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resize_is_bicubic_with_antialias(size, backend, clip):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (181, 323, 3)).astype(np.uint8)
    data = clip("libvpx-vp9", "webm", 2, (323, 181), pixels=noise)
    plain = video.decode(data, [1], backend, device="cpu")[0]
    expected = np.asarray(Image.fromarray(plain).resize(size[::-1], Image.Resampling.BICUBIC))
    got = video.decode(data, [1], backend, size, device="cpu")[0]
    assert got.shape == (*size, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_memory_of_a_decode_is_one_native_frame_beyond_the_result(clip):
    """Native frames are resized one at a time: the peak must not hold the 60 of them (60 x 2.8 MB)."""
    import tracemalloc

    data = clip("libx264", "mp4", 60, (1280, 720))
    video.decode(data, [0], size=(28, 56))
    tracemalloc.start()
    video.decode(data, range(60), size=(28, 56))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_dali_decodes_in_chunks(clip, numbers, monkeypatch):
    from keye_data.video import frames

    monkeypatch.setattr(frames, "CHUNK_BYTES", 64 * 64 * 3 * 7)
    data = clip("libvpx-vp9", "webm")
    wanted = [39, *range(30), 2, 2]
    assert numbers(video.decode(data, wanted, "dali", device="cpu")) == wanted
