"""Correctness before time: the operator against its float64 definition, and sampled rows at the timed sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_clock import kernel_milliseconds
from gpu_inputs import Geometry, causal
from torch import Tensor

from keye_kernels import dsa
from keye_kernels.dsa import reference

NAMES = ("out", "kl", "q", "k", "v", "iq", "ik", "iw")
CASES = (  # mode, neighbours, deterministic
    ("sparse", "apart", False),
    ("sparse", "alike", False),
    ("sparse", "alike", True),
    ("warmup", "apart", False),
)
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative, by norm


def gate(geometry: Geometry, length: int, topk: int, device: torch.device) -> list[dict]:
    """One row a case: greatest relative error of out, kl and every gradient, by norm.

    The indexer's inputs are small integers, so every backend scores exactly and must select exactly. Neighbours that choose
    apart make the operator read whole windows, neighbours that choose alike make it gather: both must have run.
    """
    rows = []
    for dtype in LIMITS:
        # float32 kernels hold two heads a program: with more, each would be compiled three times, a minute in all
        shape = replace(geometry, heads=2 * geometry.kv_heads) if dtype == torch.float32 else geometry
        for mode, neighbours, deterministic in CASES:
            inputs, ranges = _integer_inputs(shape, length, neighbours, dtype, device)
            want = _run(inputs, ranges, topk, mode, "reference", torch.float64)
            got: list[Tensor] = []
            call = lambda: got.extend(_run(inputs, ranges, topk, mode, "triton", dtype, deterministic=deterministic))  # noqa: B023, E731
            kernels = kernel_milliseconds(call, device)
            errors = {name: _relative(a, b) for name, a, b in zip(NAMES, got[1:], want[1:])}
            worst = max(errors, key=errors.__getitem__)
            gathers = any(name.startswith("union_backward") for name in kernels)
            rows.append({
                "row": f"gate {mode} {neighbours} {str(dtype)[6:]}{' deterministic' if deterministic else ''}",
                "error": errors[worst], "worst": worst, "limit": LIMITS[dtype],
                "selection": "equal" if torch.equal(got[0], want[0]) else "differs",
                "path": "gathered" if gathers else "contiguous",
                "expected_path": "gathered" if (mode, neighbours) == ("sparse", "alike") else "contiguous",
            })  # fmt: skip
    return rows


def passed(row: dict) -> bool:
    """A NaN does not pass."""
    return row["selection"] == "equal" and row["error"] <= row["limit"] and row["path"] == row["expected_path"]


def _integer_inputs(g: Geometry, length: int, neighbours: str, dtype: torch.dtype, device: torch.device):
    """apart: every query has an indexer query of its own, in two documents. alike: eight neighbours share one."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=generator).to(dtype)  # noqa: E731
    inputs = [normal(length, g.heads, g.dim), normal(length, g.kv_heads, g.dim), normal(length, g.kv_heads, g.dim)]
    inputs += [whole(length, g.indexer_heads, g.indexer_dim), whole(length, g.indexer_dim)]
    inputs += [whole(length, g.indexer_heads) / 8]
    start, stop = causal(length, torch.device("cpu"))
    if neighbours == "alike":
        shared = torch.arange(length) // 8 * 8
        inputs[3], inputs[5] = inputs[3][shared], inputs[5][shared]
    else:
        start[length // 3 :] = length // 3
    return [x.to(device) for x in inputs], (start.to(device), stop.to(device))


def _run(inputs, ranges, topk, mode, backend, dtype, **options) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out, kl, indices = dsa.dsa_attention(*leaves, *ranges, topk, mode, backend, return_indices=True, **options)
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    torch.autograd.backward((out, kl), (grad_out, torch.rand(kl.shape, generator=generator).to(kl)))
    return [indices, out.detach(), kl.detach(), *(x.grad for x in leaves)]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@torch.no_grad()
def sampled_errors(inputs: list[Tensor], out: Tensor, kl: Tensor, indices: Tensor, rows: list[int]) -> dict[str, float]:
    """Rows of a causal call against the definition in float32 on the same indices, and the indices against the scores.

    "wrong_keys": keys selected, or left out, on the wrong side of the row's threshold by more than 1e-5 of it.
    """
    q, k, v, iq, ik, iw = inputs
    topk, wrong, pairs = indices.shape[1], 0, []
    for t in rows:
        scores = reference.index_scores(iq[t : t + 1].float(), ik[: t + 1].float(), iw[t : t + 1].float())[0]
        chosen = torch.zeros(t + 1, dtype=torch.bool, device=q.device)
        listed = indices[t][indices[t] >= 0].long()
        chosen[listed] = True
        wrong += abs(len(listed) - min(topk, t + 1))
        if t + 1 > topk:
            tau = scores.topk(topk).values[-1]
            margin = 1e-5 * tau.abs()
            wrong += int((chosen & (scores < tau - margin)).sum() + (~chosen & (scores > tau + margin)).sum())
        mask = torch.ones(1, len(listed), dtype=torch.bool, device=q.device)
        want, _, probabilities = reference._attend(
            q[t : t + 1].float(), k[listed].float(), v[listed].float(), mask, None
        )
        want_kl = reference.indexer_kl(reference.teacher(probabilities), scores[None, listed], mask)
        pairs.append((out[t], want[0], kl[t : t + 1], want_kl))
    got_out, want_out, got_kl, want_kl = (torch.stack(x).float() for x in zip(*pairs))
    return {"out": _relative(got_out, want_out), "kl": _relative(got_kl, want_kl), "wrong_keys": wrong}
