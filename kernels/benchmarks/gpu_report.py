"""What the GPU benchmark prints and keeps: one row a measurement, written to disk as it comes; targets and the model."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

K = 1024
# Milliseconds of one layer at u = 4, Keye's geometry, on an H200. A model's predictions, made before any GPU was at hand:
# 450 TFLOP/s for scores, 350 and 300 for attention forward and backward, 3.4 TB/s streams, 4.5 TB/s gathers.
PREDICTED = {
    "scores": {32 * K: 2.4, 64 * K: 10, 128 * K: 39, 256 * K: 156},
    "top-k": {32 * K: 2.2, 64 * K: 9, 128 * K: 35, 256 * K: 142},
    "attention forward": {32 * K: 12, 64 * K: 25, 128 * K: 50, 256 * K: 100},
    "attention backward": {32 * K: 55, 64 * K: 112, 128 * K: 226, 256 * K: 453},
    "loss": {32 * K: 6, 64 * K: 12, 128 * K: 25, 256 * K: 50},
    "indexer backward": {32 * K: 11, 64 * K: 22, 128 * K: 45, 256 * K: 89},
    "dsa forward + backward": {32 * K: 91, 64 * K: 199, 128 * K: 455, 256 * K: 1132},
    "dense forward + backward": {32 * K: 59, 64 * K: 235, 128 * K: 938, 256 * K: 3753},
}
COLUMNS = {
    "row": "{}", "length": "{}", "u": "{:.2f}", "microseconds": "{:.0f}", "tflops": "{:.1f}", "gbs": "{:.0f}", "gib": "{:.2f}",
    "error": "{:.1e}", "path": "{}", "ratio": "{:.2f}", "target": "{}", "met": "{}", "predicted_microseconds": "{:.0f}", "note": "{}",
}  # fmt: skip


class Report:
    """Rows as they are measured; `path` holds a complete JSON document after each."""

    def __init__(self, path: Path, device: torch.device, rehearsal: bool) -> None:
        self.path, self.device = path, device
        self.rows: list[dict] = []
        self.document: dict = {
            "rehearsal": rehearsal,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "complete": False, "rows": self.rows,
        }  # fmt: skip
        about = {name: value for name, value in self.document.items() if name not in ("rows", "complete")}
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        if rehearsal:
            print("REHEARSAL in the interpreter: the times mean nothing")

    def add(self, row: str, *, milliseconds: float | None = None, **values: object) -> None:
        """Prints one row and writes the document. ratio and error get judged against target where a limit is given."""
        entry: dict = {"row": row}
        if milliseconds is not None:
            entry["microseconds"] = milliseconds * 1e3
        entry |= {name: value for name, value in values.items() if value is not None}
        predicted = PREDICTED.get(row, {}).get(entry.get("length", 0))
        if predicted is not None:
            entry["predicted_microseconds"] = predicted * 1e3
        self.rows.append(entry)
        print(
            "  ".join(f"{name}={form.format(entry[name])}" for name, form in COLUMNS.items() if name in entry),
            flush=True,
        )
        self._write()

    def finish(self) -> None:
        self.document["complete"] = True
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")
