"""Writes what results/*.json hold into the tables of keye_kernels/dsa/README.md.

python kernels/benchmarks/readme_tables.py [--check]

compiled.json fills the table of kernels, bench_cpu.json and bench_gpu.json those of times; where a GPU has not been measured
the table says `unverified` and gives the model's prediction as such. --check writes nothing and fails if the README is behind.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from gpu_report import PREDICTED, K

HERE = Path(__file__).resolve().parent
README = HERE.parent / "keye_kernels" / "dsa" / "README.md"
UNITS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def compiled_table(document: dict) -> str:
    """A row a kernel; a cell a target: registers / spills / KiB of shared memory, and the matrix unit if it is used."""
    kernels: dict[str, dict[str, dict]] = {}
    for entry in document["kernels"]:
        targets = kernels.setdefault(entry["label"], {})
        known = targets.get(entry["target"], entry)  # alike but for what is known of its arguments: the worse is shown
        targets[entry["target"]] = max(known, entry, key=lambda e: (e.get("spills", 0), e.get("registers", 0)))
    lines = [f"| kernel | warps | {' | '.join(UNITS)} |", "|---|---|" + "---|" * len(UNITS)]
    for name, targets in kernels.items():
        warps = next(iter(targets.values())).get("num_warps", "")
        lines.append(f"| `{name}` | {warps} | {' | '.join(_cell(targets[target]) for target in UNITS)} |")
    return "\n".join(lines)


def _cell(entry: dict) -> str:
    if "error" in entry:
        return "does not compile"
    unit = UNITS[entry["target"]]
    figures = f"{entry['registers']} / {entry['spills']} / {entry['shared'] / 1024:.0f}"
    return figures + (f" {unit}" if entry[unit] else "")


def cpu_table(document: dict) -> str:
    """The torch backend against the definition."""
    torch_seconds, reference = document["torch_seconds"], document["reference_seconds"]
    small, large = document["peak_mib"].values()
    machine = document["machine"]
    return "\n".join([
        "| what | measured | target |", "|---|---|---|",
        f"| `torch`, forward + backward, CPU seconds | {torch_seconds['forward']:.1f} + {torch_seconds['backward']:.1f} | |",
        f"| `reference`, the same | {reference['forward']:.1f} + {reference['backward']:.1f} | |",
        f"| ratio | {document['ratio']:.1f} | >= 3 |",
        f"| memory added at 8K, at 16K | {small} MiB, {large} MiB: x {document['peak_growth']:.2f} | < x 2.3 |",
        "",
        f"{machine['processor']}, 1 thread, torch {machine['torch']}, {document.get('date', 'undated')}.",
    ])  # fmt: skip


def gpu_table(document: dict | None) -> str:
    """Predicted milliseconds, and the measured ones if there are any."""
    lengths = [32 * K, 64 * K, 128 * K, 256 * K]
    measured = {
        (r["row"], r.get("length")): r["microseconds"] / 1e3
        for r in (document or {}).get("rows", [])
        if "microseconds" in r
    }
    head = " | ".join(f"{length // K}K" for length in lengths)
    lines = [f"| milliseconds, predicted / measured | {head} |", "|---|" + "---|" * len(lengths)]
    for row, predictions in PREDICTED.items():
        cells = []
        for length in lengths:
            found = measured.get((row, length))
            cells.append(f"{predictions[length]:g} / {'`unverified`' if found is None else f'{found:.1f}'}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if document:
        lines += [
            "",
            f"{document['device']}, torch {document['torch']}, triton {document['triton']}, {document['date'][:10]}.",
        ]
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README's text with every table brought up to date."""
    results = {path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")}
    tables = {
        "compiled": compiled_table(results["compiled"]),
        "cpu": cpu_table(results["bench_cpu"]),
        "gpu": gpu_table(results.get("bench_gpu")),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            sys.exit(f"{README.name}: has no place for the table {name!r}")
    return text


def main() -> None:
    text = README.read_text()
    if "--check" in sys.argv:
        sys.exit(
            0 if filled(text) == text else "README.md is behind the results: run kernels/benchmarks/readme_tables.py"
        )
    README.write_text(filled(text))


if __name__ == "__main__":
    main()
