"""k and v that arrive late: the operator reads neither before it has waited, and it waits once."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import dsa
from keye_kernels.dsa.torch_backend import chunks


@pytest.mark.parametrize("name", ["causal", "ragged", "blind"])
@pytest.mark.parametrize("mode", ["sparse", "warmup"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_late_keys_change_nothing(backend, mode, name, layout, make_inputs, run_all, monkeypatch):
    monkeypatch.setattr(chunks, "PAIRS_PER_CHUNK", 500)  # several chunks
    num_queries, num_keys, start, stop = layout(name)
    inputs = make_inputs(num_queries, num_keys)
    indices, expected = run_all(backend, inputs, start, stop, 9, mode)
    calls = []

    class Late(torch.autograd.Function):
        """k and v as a gather that has only begun hands them over."""

        @staticmethod
        def forward(ctx, k, v):
            late = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)

            def wait():
                calls.append("wait")
                with torch.no_grad():
                    late[0].copy_(k)
                    late[1].copy_(v)

            return *late, wait

        @staticmethod
        def backward(ctx, grad_k, grad_v, _):
            return grad_k, grad_v

    whole = dsa.dsa_attention

    def late_attention(q, k, v, *rest, **options):
        *late, wait = Late.apply(k, v)
        return whole(q, *late, *rest, wait=wait, **options)

    monkeypatch.setattr(dsa, "dsa_attention", late_attention)
    late_indices, got = run_all(backend, inputs, start, stop, 9, mode)
    assert calls == ["wait"]
    assert torch.equal(late_indices, indices)
    for tensor_name, tensor in expected.items():
        assert torch.equal(got[tensor_name], tensor), tensor_name


def test_shapes_are_checked_before_the_wait(make_inputs):
    inputs = [x.float() for x in make_inputs(6, 9)]
    start, stop = torch.zeros(6).int(), torch.full((6,), 9).int()
    with pytest.raises(ValueError, match=r"^v: "):
        dsa.dsa_attention(*inputs[:2], inputs[2][:5], *inputs[3:], start, stop, 3, wait=pytest.fail)
    with pytest.raises(TypeError, match=r"^wait: expected a function"):
        dsa.dsa_attention(*inputs, start, stop, 3, wait=torch.ones(1))
