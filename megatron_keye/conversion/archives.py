"""Archives of torch.save, one after another in a file, without their values passing through torch.

Values are written from where they lie and mapped where they lie; torch itself makes and reads what is around them.
"""

from __future__ import annotations

import io
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data


@lru_cache(maxsize=1024)
def around(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of a tensor [sizes] of its own.

    The checksum that a zip archive has of its members is 0 there. torch never looks at it, and checksums.json has one of
    every byte.
    """
    sink = _Sink()
    with skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), sink)  # type: ignore[arg-type]  # all it needs is there
    before, *after = (part.getvalue() for part in sink.parts)
    if len(after) != (prod(sizes) > 0) or sink.skipped != prod(sizes) * dtype.itemsize:
        raise RuntimeError(f"torch.save left out {sink.skipped} bytes of {list(sizes)} {dtype} in {len(after)} places")
    return before, b"".join(after)


class _Sink:
    """A file to torch.save, in which values are left out by a seek over them."""

    def __init__(self) -> None:
        self.parts, self.skipped = [io.BytesIO()], 0

    def write(self, data: Any) -> int:
        return self.parts[-1].write(data)

    def seek(self, count: int, whence: int) -> None:
        assert whence == io.SEEK_CUR
        self.parts.append(io.BytesIO())
        self.skipped += count

    def flush(self) -> None:
        """torch calls it at the end."""


class Mapped:
    """Tensors of archives as they lie in their files, from which the kernel drops the pages again as it likes."""

    def __init__(self) -> None:
        self._like: dict[bytes, torch.Tensor] = {}  # an archive's pickle -> its tensor without values

    def tensor(self, path: Path, offset: int, length: int) -> torch.Tensor:
        """To be read only."""
        with path.open("rb") as file:
            archive = _create_file_view(file, offset, length)
            reader = torch._C.PyTorchFileReader(archive)
            pickled = reader.get_record("data.pkl")
            if (like := self._like.get(pickled)) is None:
                archive.seek(0)
                like = self._like[pickled] = torch.load(archive, map_location="meta", weights_only=True)
            start = offset + reader.get_record_offset("data/0")
        values = torch.from_numpy(np.memmap(path, np.uint8, "c", start, (like.untyped_storage().nbytes(),)))
        if values.data_ptr() % like.dtype.itemsize:  # archives begin anywhere
            values = values.clone()
        return values.view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())
