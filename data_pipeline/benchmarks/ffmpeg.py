"""torchcodec without a system FFmpeg: the libraries that PyAV's wheel carries, under the names that torchcodec looks for.

It also makes the comparison clean: both decoders then run the same FFmpeg.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = "torchcodec==0.13.0"  # the last that imports beside a CPU build of torch; later ones link CUDA
LIBRARY = re.compile(r"lib(av\w+|sw\w+)-[0-9a-f]+\.so\.(\d+)")


def torchcodec(cache: Path) -> dict[str, str] | str:
    """Environment variables with which a process can import torchcodec, or why there are none.

    What is installed is taken as it is where it imports; otherwise it gets PyAV's FFmpeg. Where it is not installed pip fetches
    it into `cache`, which no other program sees.
    """
    at: dict[str, str] = {}
    if importlib.util.find_spec("torchcodec") is None:
        target = cache / PACKAGE.replace("==", "-")
        if not (target / "torchcodec").is_dir():
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target), PACKAGE]
            command = [sys.executable, "-m", "pip", "install", *options]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return "not installed"
        at["PYTHONPATH"] = _before(target, "PYTHONPATH")
    problem = _imports(at)
    if problem is None:
        return at
    at["LD_LIBRARY_PATH"] = _before(_link(cache / "ffmpeg"), "LD_LIBRARY_PATH")
    problem = _imports(at)
    return at if problem is None else f"cannot be imported: {problem}"


def version(environment: dict[str, str]) -> str:
    """Of the torchcodec that a process with these variables imports."""
    command = [sys.executable, "-c", "from importlib.metadata import version; print(version('torchcodec'))"]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


def _before(folder: Path | str, variable: str) -> str:
    known = os.environ.get(variable)
    return f"{folder}{os.pathsep}{known}" if known else str(folder)


def _imports(environment: dict[str, str]) -> str | None:
    """None, or the last line of what importing says."""
    command = [sys.executable, "-c", "from torchcodec.decoders import VideoDecoder"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it fails"])[-1]


def _link(folder: Path) -> str:
    """A search path with links like libavcodec.so.62 to PyAV's libraries, and with what those need in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    package = importlib.util.find_spec("av")
    carried = Path(package.origin).parents[1] / "av.libs" if package and package.origin else Path("av.libs")
    for library in carried.glob("lib*.so.*"):
        if found := LIBRARY.match(library.name):
            link = folder / f"lib{found[1]}.so.{found[2]}"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return f"{folder}{os.pathsep}{carried}"
