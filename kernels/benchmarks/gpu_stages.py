"""Single stages on the last chunk of a causal sequence, where every row sees nearly all keys: rates in TFLOP/s and GB/s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_clock import milliseconds
from gpu_inputs import BLOCK, Geometry, causal, make_inputs
from gpu_report import Report
from torch import Tensor

from keye_kernels.dsa.triton_backend.attention_forward import forward
from keye_kernels.dsa.triton_backend.blocks import block_windows, chunks_of
from keye_kernels.dsa.triton_backend.scores import scores
from keye_kernels.dsa.triton_backend.thresholds import thresholds
from keye_kernels.dsa.triton_backend.union import union, words
from keye_kernels.dsa.triton_backend.union_backward import union_backward
from keye_kernels.dsa.triton_backend.views import View


def measure_stages(geometry: Geometry, length: int, overlap: float, device: torch.device, report: Report) -> None:
    """Adds one row a stage. Each is timed by itself on the results of the stages before it."""
    g = geometry
    q, k, v, iq, ik, iw = make_inputs(g, length, overlap, device)
    ranges = causal(length, device)
    windows = block_windows(*ranges)
    chunk = chunks_of(windows, length)[-1]
    pairs = int(ranges[1][chunk.rows].sum())
    shared = {"length": length, "note": f"{chunk.num_rows} queries x {chunk.width} keys"}

    def timed(name: str, call: Callable[[], object], flops: float = 0, size: float = 0, **values: object) -> float:
        spent = milliseconds(call, device, 0.3)
        rates = {"tflops": flops / spent / 1e9 or None, "gbs": size / spent / 1e6 or None}
        report.add(f"stage {name}", milliseconds=spent, **(shared | rates | values))
        return spent

    timed("scores", lambda: scores(iq, ik, iw, *ranges, chunk), 2 * g.indexer_heads * g.indexer_dim * pairs, 4 * pairs)
    logits = scores(iq, ik, iw, *ranges, chunk)
    tau, cut = _compare_topk(logits, ranges, chunk, g.topk, timed)

    marks, counts = words(logits, tau, cut, *ranges, windows, chunk)
    timed("words", lambda: words(logits, tau, cut, *ranges, windows, chunk), size=4 * pairs)
    joined = union(marks, counts, windows, chunk)
    timed("union", lambda: union(marks, counts, windows, chunk), size=marks.nbytes)

    entries = len(joined.keys)
    u = entries * BLOCK / int(ranges[1][chunk.rows].clamp_max(g.topk).sum())
    issued = 4.0 * g.heads * g.dim * BLOCK * entries
    gathered = 2 * k.element_size() * g.kv_heads * g.dim * entries
    shared["u"] = u
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=device)
    view, scale = View(chunk, windows, union=joined), g.dim**-0.5
    call = lambda: forward(q, k, v, scale, view, out, lse)  # noqa: E731
    rate = issued / milliseconds(call, device, 0.1) / 1e9
    note = f"TFLOP/s issued; useful {rate / u:.1f}"
    timed("attention forward, union", call, issued, gathered, note=note, target=">= 300 TFLOP/s", met=rate >= 300)
    masked = View(chunk, windows, words=marks)
    window_work = 4.0 * g.heads * g.dim * BLOCK * chunk.window_entries
    timed("attention forward, masked window", lambda: forward(q, k, v, scale, masked, out, lse), window_work)

    grad = torch.randn_like(q)
    delta = (out.float() * grad.float()).sum(-1)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(q),
        torch.zeros_like(k, dtype=torch.float32),
        torch.zeros_like(v, dtype=torch.float32),
    )
    for deterministic in (False, True):
        name = f"attention backward, union, {'deterministic' if deterministic else 'fast'}"
        run = lambda ordered=deterministic: union_backward(  # noqa: E731
            grad, q, k, v, lse, delta, scale, view, grad_q, grad_k, grad_v, ordered
        )  # fmt: skip
        timed(name, run, 2.5 * issued)


def _compare_topk(logits: Tensor, ranges: tuple[Tensor, Tensor], chunk, topk: int, timed) -> tuple[Tensor, Tensor]:
    """Thresholds against torch.topk and against one plain read of the same scores -> tau, cut."""
    size = 4 * logits.numel()
    column = torch.arange(chunk.keys.start, chunk.keys.stop, dtype=torch.int32, device=logits.device)
    start, stop = (x[chunk.rows, None] for x in ranges)
    logits.masked_fill_((column < start) | (column >= stop), -torch.inf)  # torch.topk knows no ranges
    read = min(
        timed("one read of the scores (sum)", lambda: logits.sum(-1), size=size),
        timed("one read of the scores (max)", lambda: logits.amax(-1), size=size),
    )
    exact = timed("torch.topk", lambda: logits.topk(min(topk, chunk.width), sorted=False), size=size)
    tau, cut = thresholds(logits, *ranges, chunk, topk)
    call = lambda: thresholds(logits, *ranges, chunk, topk)  # noqa: E731
    spent = milliseconds(call, logits.device, 0.1)
    judged = {"target": "<= 3 reads", "met": spent <= 3 * read} if chunk.width >= 128 * 1024 else {}
    note = f"{spent / read:.2f} reads; torch.topk takes {exact / read:.2f}"
    timed("top-k thresholds", call, size=size, ratio=exact / spent, note=note, **judged)
    return tau, cut
