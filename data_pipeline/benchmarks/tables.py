"""What results/bench_data.json holds as tables, and README.md filled with them:  python data_pipeline/benchmarks/tables.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def markdown(document: dict[str, Any]) -> str:
    """Every part that the document holds, one after another."""
    return "\n\n".join(TABLES[part](document[part]) for part in TABLES if part in document)


def decoders(found: dict[str, Any]) -> str:
    """A row per codec, choice of frames and decoder."""
    rows = []
    for row in found["rows"]:
        what = [row["codec"], row["frames"], row["decoder"]]
        if "unverified" in row:
            rows.append([*what, f"{row['unverified']}: unverified", "", "", ""])
            continue
        ratio = f"{row['ratio']:.2f} / {row['wall_ratio']:.2f}"
        speed, memory = f"{row['frames_per_cpu_second']:.1f}", f"{row['peak_mib']:.0f}"
        rows.append([*what, speed, ratio, f"{row['worst_difference']:.1f}", memory])
    base = next((row["ratio_to"] for row in found["rows"] if "ratio_to" in row), "")
    head = ["codec", "frames", "decoder", "frames / CPU s", f"to {base}, CPU / wall", "difference of 255", "peak MiB"]
    return _table(head, rows) + _where(found)


def loader(found: dict[str, Any]) -> str:
    """Frames per second of the loader and of the bare decoder."""
    rows = [
        [
            row["backend"],
            f"{row['loader_frames_per_second']:.1f}",
            f"{row['bare_frames_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['decoding_cpu_ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f">= {row['target']}",
        ]
        for row in found["rows"]
    ]
    head = [
        "backend",
        "loader, frames / s",
        "bare decoder",
        "ratio",
        "of its decoding process, CPU",
        "with workers, CPU",
        "target of the ratio",
    ]
    return _table(head, rows) + _where(found)


def trim(found: dict[str, Any]) -> str:
    """CPU seconds of an hour with and without trim."""
    rows = []
    for row in found["rows"]:
        ratio = found["ratio"].get(row["decoder"]) if row["form"] == "trimmed" else None
        target = f">= {found['target']:g}" if ratio else ""
        seconds = [f"{row['cpu']:.1f}", f"{row['wall']:.1f}", f"{row['peak_mib']:.0f}"]
        rows.append([row["decoder"], row["codec"], row["form"], *seconds, f"{ratio:.1f}" if ratio else "", target])
    head = ["decoder", "codec", "clip", "CPU s", "wall s", "peak MiB", "whole / trimmed, CPU", "target"]
    frames = f"{found['settings']['frames']} frames of {found['rows'][0]['of_frames']}. "
    return _table(head, rows) + _where(found, frames)


def fill(found: dict[str, Any]) -> str:
    """Fill by buffer."""
    default = str(found["settings"]["default_buffer"])
    rows = [
        ["**" + buffer + "**, the default" if buffer == default else buffer, f"{share:.4f}"]
        for buffer, share in found["fill"].items()
    ]
    much = f"{found['settings']['lengths']} lengths, {found['share_above_an_eighth']:.0%} of them above an eighth of "
    much += f"{found['settings']['row']} tokens; target >= {found['target']}. "
    return _table(["packing buffer", "fill"], rows) + _where(found, much)


def nvdec(found: dict[str, Any]) -> str:
    """Frames per second by threads."""
    rows = []
    for row in found["rows"]:
        if "unverified" in row:
            rows.append([row["decoder"], str(row.get("threads", "")), f"{row['unverified']}: unverified"])
        else:
            rows.append([row["decoder"], str(row["threads"]), f"{row['frames_per_second']:.0f}"])
    speed = "frames / s" if found["device"] == "gpu" else "frames / s on a CPU: a rehearsal, GPU `unverified`"
    return _table(["decoder", "threads", speed], rows) + _where(found)


TABLES = {"decoders": decoders, "loader": loader, "trim": trim, "fill": fill, "nvdec": nvdec}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _where(found: dict[str, Any], first: str = "") -> str:
    here = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    clips = "Generated clips. " if found["quick"] and "fill" not in found else ""
    return (
        f"\n\n{first}{clips}{here['processor']}, {here['cores']} cores, load {here['load_at_start']} at the start, "
        f"{packages}, {here['date']}."
    )


def filled(text: str, document: dict[str, Any]) -> str:
    """The README's text with the tables of the document between its marks."""
    for name, table in TABLES.items():
        if name not in document:
            continue
        content = table(document[name])
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, partial(_between, content), text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{README.name}: has no place for the table {name!r}")
    return text


def _between(content: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{content}\n{marks[2]}"


def fill_readme(document: dict[str, Any]) -> None:
    README.write_text(filled(README.read_text(), document))


def main() -> None:
    document = json.loads((HERE / "results" / "bench_data.json").read_text())
    if "--check" in sys.argv:
        behind = filled(README.read_text(), document) != README.read_text()
        sys.exit("README.md is behind the results: run data_pipeline/benchmarks/tables.py" if behind else 0)
    fill_readme(document)


if __name__ == "__main__":
    main()
