"""Pictures in every mode come out as upright 8-bit RGB, and broken ones as one error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from keye_data.errors import DataError
from keye_data.images import decode_image

RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_rgb_is_kept():
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(RGB))), RGB)


@pytest.mark.parametrize(("tag", "turn"), [(3, 2), (6, -1), (8, 1)])
def test_exif_rotation(tag, turn):
    exif = Image.Exif()
    exif[0x0112] = tag
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(RGB), exif=exif)), np.rot90(RGB, turn))


def test_grey_palette_transparency_and_sixteen_bits():
    grey = RGB[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey))), three)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257))), three)
    flat = Image.new("P", (4, 4), 1)
    flat.putpalette([0, 0, 0, 200, 10, 20])
    assert (decode_image(encoded(flat)) == [200, 10, 20]).all()
    assert (decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == 255).all()
    assert (decode_image(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG")) == 255).all()


def test_size_is_bicubic_with_antialias():
    got = decode_image(encoded(Image.fromarray(RGB)), (12, 15))
    expected = np.asarray(Image.fromarray(RGB).resize((15, 12), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "data", [b"", b"text", encoded(Image.fromarray(RGB))[:200], encoded(Image.fromarray(RGB), "JPEG")[:400]]
)
def test_damage(data):
    with pytest.raises(DataError, match="picture: cannot be decoded"):
        decode_image(data)


def test_too_large_is_told_from_the_header():
    with pytest.raises(DataError, match="20000 x 10 is larger than the bounds"):
        decode_image(encoded(Image.new("1", (20_000, 10))))
