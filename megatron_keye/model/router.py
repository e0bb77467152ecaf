"""Megatron's router, with the balance loss taken row by row, and padding sent to no expert.

Megatron takes the loss over the rows of a micro-batch together and, where loss is counted per token, weighs it by the
tokens of one row: with b rows its gradient would be 1/b of what b micro-batches of one row give. It leaves padding out of
that loss, but would have it computed by experts like any token.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter


class RowRouter(TopKRouter):
    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [s, b, experts], padding_mask bool [s, b], True on padding -> probs, bool map: both [s * b, experts]"""
        probs, picks = super().routing(logits, padding_mask)
        if padding_mask is None:
            return probs, picks
        real = ~padding_mask.reshape(-1, 1)
        return probs * real, picks & real

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,  # [s * b, experts]
        scores_for_aux_loss: torch.Tensor,  # [s * b, experts]
        routing_map: torch.Tensor,  # bool [s * b, experts]
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """-> probs, which carry each row's loss times its real tokens."""
        scores, picks = (x.unflatten(0, (seq_length, bsz)) for x in (scores_for_aux_loss, routing_map))
        for row in range(bsz):
            probs = super()._apply_seq_aux_loss(
                probs, scores[:, row], picks[:, row], seq_length, 1, with_padding_mask=with_padding_mask
            )
        return probs
