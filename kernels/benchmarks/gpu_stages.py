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
from keye_kernels.dsa.triton_backend.delta import delta
from keye_kernels.dsa.triton_backend.divergence import divergence
from keye_kernels.dsa.triton_backend.indexer_backward import indexer_backward
from keye_kernels.dsa.triton_backend.score_gradient import score_gradient
from keye_kernels.dsa.triton_backend.scores import scores
from keye_kernels.dsa.triton_backend.teacher import teacher
from keye_kernels.dsa.triton_backend.thresholds import thresholds
from keye_kernels.dsa.triton_backend.union import union, words
from keye_kernels.dsa.triton_backend.union_backward import union_backward
from keye_kernels.dsa.triton_backend.views import View

Call = Callable[[], object]
Judge = Callable[[float], dict]  # milliseconds -> what else the row says


def measure_stages(geometry: Geometry, length: int, overlap: float, report: Report, budget: float) -> None:
    """Adds one row a stage. Each is timed by itself on the results of the stages before it."""
    g, device = geometry, report.device
    q, k, v, iq, ik, iw = make_inputs(g, length, overlap, device)
    ranges = causal(length, device)
    windows = block_windows(*ranges)
    chunk = chunks_of(windows, length)[-1]
    pairs = int(ranges[1][chunk.rows].sum())
    shared = {"length": length, "note": f"{chunk.num_rows} queries x {chunk.width} keys"}

    def timed(name: str, call: Call, flops: float = 0, size: float = 0, judge: Judge = lambda spent: {}) -> float:
        spent = milliseconds(call, device, budget / 3)
        rates = {"tflops": flops / spent / 1e9 or None, "gbs": size / spent / 1e6 or None}
        report.add(f"stage {name}", milliseconds=spent, **(shared | rates | judge(spent)))
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

    def judge(spent: float) -> dict:
        rate = issued / spent / 1e9
        return {
            "target": ">= 300 TFLOP/s",
            "met": rate >= 300,
            "note": f"TFLOP/s issued, useful {rate / u:.1f}; GB/s gathered",
        }

    timed("attention forward, union", lambda: forward(q, k, v, scale, view, out, lse), issued, gathered, judge)
    masked = View(chunk, windows, words=marks)
    window_work = 4.0 * g.heads * g.dim * BLOCK * chunk.window_entries
    timed("attention forward, masked window", lambda: forward(q, k, v, scale, masked, out, lse), window_work)

    grad = torch.randn_like(q)
    sums, grad_q = delta(out, grad), torch.zeros_like(q)
    grad_k, grad_v = (torch.zeros(k.shape, device=device) for _ in range(2))
    for deterministic in (False, True):
        timed(
            f"attention backward, union, {_speed(deterministic)}",
            lambda ordered=deterministic: union_backward(
                grad, q, k, v, lse, sums, scale, view, grad_q, grad_k, grad_v, ordered
            ),
            2.5 * issued,
        )

    timed("teacher", lambda: teacher(q, k, lse, scale, *ranges, windows, chunk, joined), issued / 2)
    p = teacher(q, k, lse, scale, *ranges, windows, chunk, joined)
    kl, student_lse = torch.zeros(2, length, device=device)
    timed("divergence", lambda: divergence(p, logits, g.heads, *ranges, windows, chunk, kl, student_lse, joined))
    grad_kl, scored = torch.ones(length, device=device), 2.0 * g.indexer_heads * g.indexer_dim * BLOCK * entries
    arguments = (g.heads, iq, ik, iw, student_lse, grad_kl, *ranges, windows, chunk, joined)
    timed("score gradient", lambda: score_gradient(p, *arguments), scored)
    gradients = torch.zeros_like(iq), torch.zeros_like(iw), torch.zeros(ik.shape, device=device)
    for deterministic in (False, True):
        timed(
            f"indexer backward, union, {_speed(deterministic)}",
            lambda ordered=deterministic: indexer_backward(p, iq, ik, iw, windows, chunk, *gradients, joined, ordered),
            3 * scored,
        )


def _speed(deterministic: bool) -> str:
    return "deterministic" if deterministic else "fast"


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

    def judge(spent: float) -> dict:
        wide = chunk.width >= 128 * 1024
        target = {"target": "<= 3 reads", "met": spent <= 3 * read} if wide else {}
        note = f"{spent / read:.2f} reads; torch.topk takes {exact / read:.2f}"
        return target | {"ratio": exact / spent, "note": note}

    timed("top-k thresholds", lambda: thresholds(logits, *ranges, chunk, topk), size=size, judge=judge)
    return thresholds(logits, *ranges, chunk, topk)
