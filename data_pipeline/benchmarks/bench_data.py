"""Decoding, loading and packing, measured side by side:  python data_pipeline/benchmarks/bench_data.py [--quick] [--only PART ...]

Writes results/bench_data.json with settings, machine and date, prints its tables, and puts them into README.md beside it.
Nothing is written unless the frames are right: a decoder's are compared with the clip read from its start before it is timed, the
loader's first batch with the bare decoder's to the bit, those of a trimmed clip with those of the whole; packing may lose no sample.
Needs the film and the tokenizer of tools/fetch_samples.py (60 MB), which it fetches itself, and about twenty CPU minutes;
with --quick generated clips and two minutes, and then neither README.md nor results are touched. Clips are kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import clips, decoders, end_to_end, ffmpeg, fill, nvdec, tables, trimming
from benchmarks.gate import WrongFrames
from benchmarks.measure import machine

RESULTS = Path(__file__).resolve().parent / "results" / "bench_data.json"
PARTS = ("decoders", "loader", "trim", "fill", "nvdec")
Part = Callable[[], dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="generated clips, one round: does it run, are the gates shut?"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cache", type=Path, default=clips.ROOT / "runs" / "bench_data", metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="for nvdec; otherwise a GPU where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    options = parser.parse_args(arguments)
    quick: bool = options.quick
    out: Path | None = options.out.resolve() if options.out else None if quick else RESULTS
    if options.device and "nvdec" not in options.only:
        parser.error("--device: only nvdec has one, and --only leaves it out")
    if quick and out == RESULTS:
        parser.error(f"--out: {options.out} holds the committed figures, which --quick does not make")
    try:
        found = measure(options.only, quick, options.cache, options.device)
    except (WrongFrames, RuntimeError, ValueError) as error:
        print(f"bench_data: stopped, nothing is written: {error}", file=sys.stderr)
        return 1
    known = json.loads(out.read_text()) if out and out.exists() else {}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**known, **found}, indent=1) + "\n")
    print(tables.markdown(found))
    if out == RESULTS:
        tables.fill_readme({**known, **found})
    return 0


def measure(parts: Sequence[str], quick: bool, cache: Path, device: str | None) -> dict[str, Any]:
    """part -> its figures, each with the machine and the date of its run."""
    with_torchcodec = {"decoders", "nvdec"} & set(parts)
    torchcodec = ffmpeg.torchcodec(cache) if with_torchcodec else "not asked for"
    run: dict[str, Part] = {"fill": fill.measure}
    if set(parts) - {"fill"}:
        run |= _on_clips(quick, cache, device, torchcodec)
    found: dict[str, Any] = {}
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        here = machine()
        if part in with_torchcodec and isinstance(torchcodec, dict):
            here["packages"]["torchcodec"] = ffmpeg.version(torchcodec)  # this process need not have it
        found[part] = {"machine": here, "quick": quick, **run[part]()}
    return found


def _on_clips(quick: bool, cache: Path, device: str | None, torchcodec: dict[str, str] | str) -> dict[str, Part]:
    """The parts that decode, with the clips for them made."""
    material = clips.generated(cache / "made") if quick else clips.real(cache, seconds=60, hour=3600)
    repeats, batches, piece, frames = (1, 1, 2.0, 6) if quick else (3, 3, 10.0, 128)
    return {
        "decoders": lambda: {"rows": decoders.measure(material, repeats, torchcodec)},
        "loader": lambda: {"rows": end_to_end.measure(material, clips.tokenizer(cache), repeats, batches, piece)},
        "trim": lambda: trimming.measure(material, frames, cache),
        "nvdec": lambda: nvdec.measure(material, repeats, torchcodec, device, rehearsal=quick),
    }


if __name__ == "__main__":
    sys.exit(main())
