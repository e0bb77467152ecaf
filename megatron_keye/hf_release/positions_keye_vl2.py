"""Where every token stands on the three axes (t, h, w), and which pictures belong to which row of a batch.

Text advances all axes by one. A picture or frame stands at one time, its rows and columns count from the same base; the text
after it goes on above the greatest. Shapes: B rows of T tokens, N pictures and frames.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

MERGE = 2  # patches of a token, down and across


def rope_positions(input_ids: Tensor, grid_thw: Tensor, picture_ids: set[int], is_token: Tensor) -> Tensor:
    """input_ids [B, T], grid_thw [N, 3], is_token bool [B, T] -> int64 [3, B, T], zero at padding."""
    positions = input_ids.new_zeros(3, *input_ids.shape)
    for b, pictures in enumerate(pictures_of_rows(input_ids, grid_thw, picture_ids)):
        row = _row(input_ids[b, is_token[b]].tolist(), grid_thw[pictures].tolist(), picture_ids)
        positions[:, b, is_token[b]] = torch.tensor(row, device=input_ids.device).reshape(-1, 3).T
    return positions


def _row(ids: list[int], grids: list[list[int]], picture_ids: set[int]) -> list[tuple[int, int, int]]:
    positions: list[tuple[int, int, int]] = []
    base, waiting = 0, iter(grids)
    while len(positions) < len(ids):
        token = ids[len(positions)]
        if token not in picture_ids:
            positions.append((base, base, base))
            base += 1
            continue
        _, rows, columns = next(waiting)
        rows, columns = rows // MERGE, columns // MERGE
        if ids[len(positions) : len(positions) + rows * columns] != [token] * (rows * columns):
            raise ValueError(f"a picture of {rows} x {columns} tokens is not in one piece at token {len(positions)}")
        positions += [(base, base + r, base + c) for r in range(rows) for c in range(columns)]
        base += max(rows, columns)
    return positions


def pictures_of_rows(input_ids: Tensor, grid_thw: Tensor, picture_ids: set[int]) -> list[slice]:
    """The pictures of each row; they are dealt out to the rows in order. ValueError where tokens and grids disagree."""
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or (grid_thw[:, 0] != 1).any() or (grid_thw[:, 1:] % MERGE).any():
        raise ValueError(
            f"grid_thw must be [N, 3] rows of (1, even height, even width) in patches: {grid_thw.tolist()}"
        )
    ends = [0, *(grid_thw.prod(-1) // MERGE**2).cumsum(0).tolist()]  # picture tokens before each picture, and in all
    is_picture = torch.isin(input_ids, torch.tensor(sorted(picture_ids), device=input_ids.device))
    row_ends = is_picture.sum(1).cumsum(0).tolist()
    if row_ends[-1] != ends[-1]:
        raise ValueError(f"input_ids have {row_ends[-1]} picture tokens, but grid_thw describes {ends[-1]}")
    if missing := set(row_ends) - set(ends):
        raise ValueError(f"a row of input_ids ends inside a picture, after picture token {min(missing)} of the batch")
    cuts = [0, *(ends.index(end) for end in row_ends)]
    return [slice(a, b) for a, b in pairwise(cuts)]
