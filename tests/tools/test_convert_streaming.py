"""Several GB through import and export: memory stays that of a few tensors, and the time near that of copying files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.large_checkpoint import write

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"
DISK = 20e9  # bytes free: the checkpoint three times over
ANONYMOUS = 3e9  # bytes; pages of mapped files are the kernel's to drop and do not count
PACE = 0.3  # of a copy's


def copied(source: Path, target: Path) -> float:
    """-> seconds of a copy, every file synced to disk as the tool does"""
    start = time.monotonic()
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 22)
            written.flush()
            os.fsync(written.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def convert(*arguments: object) -> tuple[float, int]:
    """The tool as a process of its own -> seconds, and its largest anonymous memory in bytes."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, str(TOOL), *map(str, arguments)]) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, 1024 * int(found[1]) if found else 0)
            time.sleep(0.01)
    assert process.returncode == 0
    return time.monotonic() - start, peak


@pytest.mark.slow  # minutes: 6.4 GB are written six times and read eleven times
def test_memory_and_pace(tmp_path, capfd):
    if (free := shutil.disk_usage(tmp_path).free) < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk under {tmp_path}, and {free / 1e9:.1f} GB are free")
    source, ckpt, back = tmp_path / "hf", tmp_path / "ckpt", tmp_path / "back"
    size = write(source)
    assert size >= 6e9
    copies = [copied(source, tmp_path / "copy")]  # three, around the conversions: disks and neighbours are not even
    imported, import_peak = convert("import", "--hf", source, "--out", ckpt)
    convert("verify", "--hf", source, "--ckpt", ckpt)
    copies.append(copied(source, tmp_path / "copy"))
    shutil.rmtree(source)
    exported, export_peak = convert("export", "--ckpt", ckpt, "--out", back)
    copies.append(copied(back, tmp_path / "copy"))
    convert("verify", "--hf", back, "--ckpt", ckpt)
    mean = sum(copies) / len(copies)
    paces = mean / imported, mean / exported
    with capfd.disabled():
        print(f"\n{size / 1e9:.2f} GB; copies {', '.join(f'{seconds:.1f}' for seconds in copies)} s")
        print(f"import {imported:.1f} s, {paces[0]:.2f} of a copy's pace, {import_peak / 1e9:.2f} GB anonymous")
        print(f"export {exported:.1f} s, {paces[1]:.2f} of a copy's pace, {export_peak / 1e9:.2f} GB anonymous")
    assert import_peak < ANONYMOUS and export_peak < ANONYMOUS
    assert sum(file.stat().st_size for file in back.glob("*.safetensors")) >= size
    if min(paces) < PACE:  # known: about 25 CPU seconds each way, which a fast disk outruns
        pytest.xfail(f"conversion ran at {min(paces):.2f} of a copy's pace; the aim is {PACE}")
