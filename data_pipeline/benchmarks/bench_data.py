"""Decoding, loading and packing, measured side by side:  python data_pipeline/benchmarks/bench_data.py [--quick] [--only PART ...]

Writes results/bench_data.json with settings, machine and date, prints its tables, and puts them into README.md beside it.
Every part checks that frames are the right ones, or samples all there, before it times anything, and stops if they are not.
Needs the film and the tokenizer of tools/fetch_samples.py (60 MB), which it fetches itself, and about twenty CPU minutes;
with --quick generated clips and two minutes, and then neither README.md nor results are touched. Clips are kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import clips, decoders, end_to_end, ffmpeg, fill, nvdec, tables, trimming
from benchmarks.gate import WrongFrames
from benchmarks.measure import machine

RESULTS = Path(__file__).resolve().parent / "results" / "bench_data.json"
PARTS = ("decoders", "loader", "trim", "fill", "nvdec")


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
    out: Path | None = options.out or (None if quick else RESULTS)
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


def measure(parts: tuple[str, ...] | list[str], quick: bool, cache: Path, device: str | None) -> dict[str, Any]:
    """part -> its figures, each with the machine and the date of its run."""
    found: dict[str, Any] = {}
    material = None
    if set(parts) - {"fill"}:
        material = clips.generated(cache / "made") if quick else clips.real(cache, seconds=60, hour=3600)
    torchcodec = ffmpeg.torchcodec(cache) if {"decoders", "nvdec"} & set(parts) else "not asked for"
    repeats = 1 if quick else 3
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        here, result = machine(), None
        if part == "fill":
            result = fill.measure()
        elif material is None:
            continue
        elif part == "decoders":
            result = {"rows": decoders.measure(material, repeats, torchcodec)}
        elif part == "loader":
            tokenizer = clips.tokenizer(cache)
            batches, piece = (1, 2.0) if quick else (3, 10.0)
            result = {"rows": end_to_end.measure(material, tokenizer, repeats, batches, piece)}
        elif part == "trim":
            result = trimming.measure(material, 6 if quick else 128, cache)
        elif part == "nvdec":
            result = nvdec.measure(material, repeats, torchcodec, device, rehearsal=quick)
        found[part] = {"machine": here, "quick": quick, **(result or {})}
    return found


if __name__ == "__main__":
    sys.exit(main())
