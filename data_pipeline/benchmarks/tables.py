"""What results/bench_data.json holds as tables, and README.md filled with them:  python data_pipeline/benchmarks/tables.py"""

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
        what = [row["decoder"], row["codec"], row["form"], f"{found['settings']['frames']} of {row['of_frames']}"]
        rows.append([*what, *seconds, f"{ratio:.1f}" if ratio else "", target])
    head = ["decoder", "codec", "clip", "frames", "CPU s", "wall s", "peak MiB", "whole / trimmed, CPU", "target"]
    return _table(head, rows) + _where(found)


def fill(found: dict[str, Any]) -> str:
    """Fill by buffer and tokens of a row."""
    settings = found["settings"]
    by_row = {int(row): one for row, one in found["other_rows"].items()} | {settings["row"]: found}
    columns = [by_row[row] for row in sorted(by_row)]
    rows = [["above an eighth of the row", *(f"{one['share_above_an_eighth']:.0%}" for one in columns)]]
    for buffer in found["fill"]:
        name = f"**{buffer}**, the default" if buffer == str(settings["default_buffer"]) else buffer
        rows.append([name, *(f"{one['fill'][buffer]:.3f}" for one in columns)])
    much = f"{settings['lengths']} lengths a column; target >= {found['target']} by the default in rows of "
    much += f"{settings['row']:,}. "
    return _table(["packing buffer", *(f"rows of {row:,}" for row in sorted(by_row))], rows) + _where(found, much)


def nvdec(found: dict[str, Any]) -> str:
    """Frames per second by threads."""
    rows = []
    for row in found["rows"]:
        if "unverified" in row:
            rows.append([row["decoder"], "", f"{row['unverified']}: unverified"])
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
    fill_readme(json.loads((HERE / "results" / "bench_data.json").read_text()))


if __name__ == "__main__":
    main()
