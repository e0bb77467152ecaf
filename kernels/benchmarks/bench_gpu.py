"""dsa_attention on a GPU against PyTorch's own causal attention, forward and backward, 8K to 256K tokens.

python kernels/benchmarks/bench_gpu.py [--quick] [--lengths 32768 131072] [--overlaps 4] [--minutes 8]

Needs torch and triton alone. First the correctness gate: nothing is timed unless values, selections and gradients agree with
the float64 definition. Then, at Keye's geometry (32 query and 4 KV heads of 128, indexer 16 x 64, top-k 2048, bf16): the
whole operator against the faster of PyTorch's flash and cuDNN kernels, kernel by kernel, in both backward modes; single
stages; peak memory; where the lengths cross. The indexer's inputs are made so that 16 neighbouring queries really select u
times K different keys (gpu_inputs.py); u is measured on the result. Errors stand in the same rows as times, and the model's
predictions beside them. Every row is on disk, in results/bench_gpu.json, as soon as it is printed; when the minutes are up,
what is left is named and left out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import itertools

from gpu_clock import kernel_milliseconds, milliseconds, peak_bytes
from gpu_dense import Dense, dense_attention
from gpu_gate import gate, passed, sampled_errors
from gpu_inputs import BLOCK, KEYE, TINY, Geometry, causal, make_inputs, union_entries
from gpu_report import Report
from gpu_stages import measure_stages

from keye_kernels import dsa

K = 1024
RESULTS = Path(__file__).resolve().parent / "results" / "bench_gpu.json"
STAGES = {
    "scores": "scores",
    "thresholds": "top-k",
    "union": "union",
    "bits": "union",
    "attention_forward": "attention forward",
    "delta": "attention backward",
    "union_backward": "attention backward",
    "contiguous_backward": "attention backward",
    "teacher": "loss",
    "divergence": "loss",
    "score_gradient": "indexer backward",
    "indexer_backward": "indexer backward",
    "segments": "ordered reduction",
}  # module of a kernel -> stage of the model


class Bench:
    """The measurements, each a method; `dense` and `speedups` are kept for the crossing."""

    def __init__(self, geometry: Geometry, device: torch.device, report: Report, budget: float) -> None:
        self.geometry, self.device, self.report, self.budget = geometry, device, report, budget
        self.dense: dict[int, Dense] = {}
        self.speedups: dict[str, dict[int, float]] = defaultdict(dict)

    def whole(self, length: int, overlap: float, thorough: bool) -> None:
        """The operator at one length and overlap; thorough adds the other modes, memory and the single kernels."""
        inputs = make_inputs(self.geometry, length, overlap, self.device)
        ranges = causal(length, self.device)
        if length not in self.dense:
            self._time_dense(inputs, length)
        dense = self.dense[length]

        with torch.no_grad():
            out, kl, indices = self._forward(inputs, ranges, return_indices=True)
        rows = sorted({0, length - 1, *(int(length * part) for part in (0.2, 0.4, 0.6, 0.8, 0.95))})
        errors = sampled_errors(inputs, out, kl, indices, rows)
        chosen = ranges[1].clamp_max(self.geometry.topk).sum().item()
        u = union_entries(indices).sum().item() * BLOCK / chosen
        outputs = sum(x.nbytes for x in (out, kl, *inputs))  # the results and the gradients
        del out, kl, indices
        note = None if not errors["wrong_keys"] else f"{errors['wrong_keys']} KEYS WRONGLY SELECTED"
        shared = {"length": length, "u": u}

        leaves = [x.requires_grad_() for x in inputs]
        both = self._both(leaves, ranges)
        spent = milliseconds(both, self.device, self.budget)
        ratio = dense.both / spent
        self.speedups[f"forward + backward, u {overlap:g}"][length] = ratio
        self.report.add(
            "dsa forward + backward",
            milliseconds=spent,
            **shared,
            ratio=ratio,
            error=errors["out"],
            note=note,
            **_target(length, ratio),
        )
        if not thorough:
            return
        with torch.no_grad():
            forward = milliseconds(lambda: self._forward(inputs, ranges, return_kl=False), self.device, self.budget / 2)
        self.speedups[f"forward, u {overlap:g}"][length] = dense.forward / forward
        self.report.add(
            "dsa forward",
            milliseconds=forward,
            **shared,
            ratio=dense.forward / forward,
            error=errors["kl"],
            note="without the loss; the error is kl's",
        )
        spent = milliseconds(self._both(leaves, ranges, deterministic=True), self.device, self.budget / 2)
        self.report.add("dsa forward + backward, deterministic", milliseconds=spent, **shared, ratio=dense.both / spent)
        peak = peak_bytes(both, self.device)
        if peak is not None:
            gib = (peak - outputs) / 2**30
            limit = {"target": "< 8 GiB", "met": gib < 8} if length == 256 * K else {}
            self.report.add("peak memory above inputs and outputs", **shared, gib=gib, **limit)
        self._kernels(both, shared)

    def _time_dense(self, inputs: list, length: int) -> None:
        dense = self.dense[length] = dense_attention(*inputs[:3], self.budget)
        g, pairs = self.geometry, length * (length + 1) / 2
        work = 4 * g.heads * g.dim * pairs
        note = f"fastest: {dense.fastest}; {dense.tried}"
        self.report.add("dense forward", length=length, milliseconds=dense.forward, tflops=work / dense.forward / 1e9)
        self.report.add(
            "dense forward + backward",
            length=length,
            milliseconds=dense.both,
            tflops=3.5 * work / dense.both / 1e9,
            note=note,
        )

    def _kernels(self, both: Callable[[], None], shared: dict) -> None:
        """Where the time of one forward and backward goes, kernel by kernel and by the model's stages."""
        stages: dict[str, float] = defaultdict(float)
        for name, spent in kernel_milliseconds(both, self.device).items():
            module = name.partition(".")[0]
            stages[STAGES.get(module, module)] += spent
            self.report.add(f"kernel {name}", milliseconds=spent, **shared)
        for stage, spent in stages.items():
            self.report.add(stage, milliseconds=spent, **shared)

    def warmup(self, length: int) -> None:
        """Dense attention with the dense indexer loss, forward and backward."""
        leaves = [x.requires_grad_() for x in make_inputs(self.geometry, length, 4, self.device)]
        both = self._both(leaves, causal(length, self.device), mode="warmup")
        spent = milliseconds(both, self.device, self.budget)
        self.report.add(
            "warm-up forward + backward", length=length, milliseconds=spent, ratio=self.dense[length].both / spent
        )

    def crossings(self) -> None:
        """The length where the operator overtakes dense attention, on a straight line through logarithms."""
        for name, ratios in self.speedups.items():
            lengths = sorted(ratios)
            for a, b in itertools.pairwise(lengths):
                low, high = math.log(ratios[a]), math.log(ratios[b])
                if low < 0 <= high:
                    at = math.exp(math.log(a) + (math.log(b) - math.log(a)) * -low / (high - low))
                    self.report.add(
                        f"crossing, {name}", length=round(at), note="interpolated; the model says about 50K at u = 4"
                    )

    def _forward(self, inputs, ranges, **options):
        return dsa.dsa_attention(*inputs, *ranges, self.geometry.topk, backend="triton", **options)

    def _both(self, leaves, ranges, **options) -> Callable[[], None]:
        grad_out, grad_kl = (
            torch.randn_like(leaves[0]),
            torch.full(leaves[0].shape[:1], 1 / len(leaves[0]), device=self.device),
        )

        def both() -> None:
            out, kl = self._forward(leaves, ranges, **options)
            torch.autograd.grad((out, kl), leaves, (grad_out, grad_kl))

        return both


def _target(length: int, ratio: float) -> dict[str, object]:
    """What is asked of the whole operator against dense attention, at u of 4 or less."""
    least = {128 * K: 2.5, 256 * K: 4.0}.get(length, 1 / 1.1 if length <= 48 * K else None)
    return {} if least is None else {"target": f">= {least:.2f}", "met": ratio >= least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8K, 32K and 128K at u = 4 only")
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--overlaps", type=float, nargs="+", default=None, help="u; the first at every length")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, interpreted, on a CPU: TRITON_INTERPRET=1; times mean nothing"
    )
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device here: nothing to time")
        sys.exit(2)
    began = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    geometry = TINY if options.rehearse else KEYE
    swept = [64] if options.rehearse else [32 * K, 128 * K]
    lengths = options.lengths or [128 * K, 256 * K, 32 * K, 64 * K, 8 * K, 16 * K]  # what decides comes first
    overlaps = options.overlaps or [4, 1, 2, 6, 8]
    if options.quick:
        lengths, overlaps = [128 * K, 32 * K, 8 * K], [4]
    report = Report(options.json, device, options.rehearse)
    bench = Bench(geometry, device, report, budget=0 if options.rehearse else 1.0)

    size, topk = (90, 4) if options.rehearse else (1100, 64)
    outcomes = [row | {"row": row["row"]} for row in gate(geometry, size, topk, device)]
    for row in outcomes:
        report.add(**row, met=passed(row))
    if not all(map(passed, outcomes)):
        sys.exit("results differ from the definition: not timing a wrong operator")

    measurements: list[tuple[str, Callable[[], None]]] = []
    plan = measurements.append
    for length in lengths:
        plan((f"{length}, u {overlaps[0]:g}", lambda length=length: bench.whole(length, overlaps[0], True)))  # type: ignore[misc]
        plan(
            (
                f"{length}, stages",
                lambda length=length: measure_stages(geometry, length, overlaps[0], report, bench.budget),
            )
        )  # type: ignore[misc]
    for length in set(lengths) & set(swept):
        for overlap in overlaps[1:]:
            plan((f"{length}, u {overlap:g}", lambda length=length, u=overlap: bench.whole(length, u, False)))  # type: ignore[misc]
        plan((f"{length}, warm-up", lambda length=length: bench.warmup(length)))  # type: ignore[misc]
    failed: list[str] = []
    for at, (name, measure) in enumerate(measurements):
        if time.monotonic() - began > options.minutes * 60:
            report.add("left out, the minutes are up", note="; ".join(name for name, _ in measurements[at:]))
            break
        try:
            measure()
        except Exception as error:  # the minutes on a GPU are dear: what fails is named, and the rest is measured
            failed.append(name)
            report.add(name, note=f"FAILED, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bench.crossings()
    report.finish()
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
