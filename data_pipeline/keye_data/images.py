"""Pictures: bytes in, pixels out."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keye_data.errors import DataError
from keye_data.video.container import check_size
from keye_data.video.frames import resize


def decode_image(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3], turned as its EXIF data says, transparency on white; `size` (height, width) as for video.

    DataError for what is no picture, is damaged or is larger than the bounds (told from its header, before decoding).
    """
    try:
        # The bound is ours and is an error; Pillow's own warning about large pictures says nothing more.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(data))
            check_size(picture.width, picture.height, "picture")
            pixels = np.array(_rgb(ImageOps.exif_transpose(picture)))  # a copy: Pillow's own cannot be written to
    except DataError:
        raise
    except UnidentifiedImageError as error:  # its own text holds an address in memory
        raise DataError("picture: cannot be decoded (no known format)", "damaged picture") from error
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise DataError(f"picture: cannot be decoded ({error})", "damaged picture") from error
    return resize(pixels[None], size)[0]


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # 16-bit grey, which convert() would clip
        return Image.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
