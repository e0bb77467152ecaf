"""What lies beside the shards: samples.jsonl, a line a sample; bad.jsonl, what was left out and why; duplicates.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLES, BAD, DUPLICATES = "samples.jsonl", "bad.jsonl", "duplicates.json"


def report_duplicates(samples: Path, target: Path) -> tuple[int, int]:
    """Writes which samples share media, and which are identical: {"media": {sha256: [keys]}, "samples": {sha256: [keys]}}.

    Returns the number of shared files, and of samples that repeat an earlier one. Digests of single files are all that it
    keeps of those: some 100 bytes for each of them.
    """
    report: dict[str, dict[str, list[str]]] = {"media": {}, "samples": {}}
    for name, digests in (("media", _media), ("samples", _whole)):
        once: set[bytes] = set()
        for _, digest in digests(samples):
            short = bytes.fromhex(digest)[:16]
            if short in once:
                report[name][digest] = []
            once.add(short)
        for key, digest in digests(samples):
            if digest in report[name]:
                report[name][digest].append(key)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return len(report["media"]), sum(len(keys) - 1 for keys in report["samples"].values())


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a list."""
    with path.open("rb") as file:
        yield from map(json.loads, file)


def _media(samples: Path) -> Iterator[tuple[str, str]]:
    for line in lines(samples):
        for digest in sorted({entry["sha256"] for entry in line["media"]}):
            yield line["key"], digest


def _whole(samples: Path) -> Iterator[tuple[str, str]]:
    return ((line["key"], line["sha256"]) for line in lines(samples))
