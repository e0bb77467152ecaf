"""dsa_attention on a CPU, forward and backward with the indexer's loss, against the whole-matrix definition.

python kernels/benchmarks/bench_cpu.py [--length 8192] [--repeats 3]

One thread, fp32, Hq 4, Hkv 2, D 64, indexer 4 x 32, top-k 512, one causal sequence. Results are compared at length 1024
first; a difference stops the benchmark. The definition needs about 7 GiB at 8192 and is run once. Prints the ratio of
CPU seconds and the peak memory at 8K and 16K, writes results/bench_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keye_kernels import dsa

TOPK = 512
RESULTS = Path(__file__).resolve().parent / "results" / "bench_cpu.json"


def make_inputs(length: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """q, k, v, iq, ik, iw and the causal ranges."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 4, 64), (length, 2, 64), (length, 2, 64), (length, 4, 32), (length, 32), (length, 4)]
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    return inputs, (torch.zeros(length, dtype=torch.int32), torch.arange(1, length + 1, dtype=torch.int32))


def step(length: int, backend: str) -> tuple[dict[str, float], list[Tensor]]:
    """CPU seconds of one forward and backward, and the results with all gradients."""
    inputs, ranges = make_inputs(length)
    q, k, v, iq, ik, iw = inputs
    begin = time.process_time()
    out, kl = dsa.dsa_attention(q, k, v, iq, ik, iw, *ranges, TOPK, "sparse", backend)
    middle = time.process_time()
    torch.autograd.backward((out, kl), (torch.ones_like(out), torch.ones_like(kl)))
    end = time.process_time()
    seconds = {"forward": middle - begin, "backward": end - middle, "total": end - begin}
    return seconds, [out.detach(), kl.detach(), *(x.grad for x in inputs if x.grad is not None)]


def gate(length: int = 1024, tolerance: float = 1e-4) -> float:
    """Greatest relative difference between the two, by norm; stops the benchmark above the tolerance."""
    pairs = zip(step(length, "torch")[1], step(length, "reference")[1])
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if worst > tolerance:
        sys.exit(f"results differ by {worst:.1e} at length {length}: not timing a wrong operator")
    return worst


def peak_mib(length: int) -> float:
    """MiB of resident memory that one step adds, in a process of its own."""
    command = [sys.executable, __file__, "--peak", "--length", str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_mib() -> float:
    """Greatest resident size of this process; ru_maxrss would count what the parent held before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def report_peak(length: int) -> None:
    step(64, "torch")  # what the libraries load on first use is not the operator's
    before = resident_mib()
    step(length, "torch")
    print(resident_mib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3, help="of the torch backend, best taken, after one to warm up")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return report_peak(options.length)

    result: dict = {"length": options.length, "topk": TOPK, "worst_relative_difference_at_1024": gate()}
    peaks = {length: peak_mib(length) for length in (options.length, 2 * options.length)}
    runs = [step(options.length, "torch")[0] for _ in range(options.repeats + 1)][1:]
    result["torch_seconds"] = min(runs, key=lambda run: run["total"])
    result["reference_seconds"] = step(options.length, "reference")[0]
    result["ratio"] = result["reference_seconds"]["total"] / result["torch_seconds"]["total"]
    result["peak_mib"] = {str(length): round(mib) for length, mib in peaks.items()}
    result["peak_growth"] = peaks[2 * options.length] / peaks[options.length]
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
    }
    result["date"] = date.today().isoformat()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"torch     {result['torch_seconds']}")
    print(f"reference {result['reference_seconds']}")
    print(f"ratio {result['ratio']:.2f} (target 3), peak growth {result['peak_growth']:.2f} (limit 2.3)")


if __name__ == "__main__":
    main()
