"""Which rows a mixture of experts computes together: assignments sorted into tiles of one expert each.

    T tokens, k experts per token, E experts, tiles of P rows; N = tiles · P rows in all

Shapes follow from (T, k, E, P) alone and nothing is read back by the host, so that a GPU never waits; the
order of rows depends on the choices alone.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    tile_expert: Tensor  # (tiles,) the expert of each tile
    row_token: Tensor    # (N,) the token that a row reads; 0 in a padding row
    row_choice: Tensor   # (N,) the assignment, token · k + choice, of a row; T · k in a padding row
    place: Tensor        # (T, k) where a token's rows are


def tile_rows(assignments: int, num_experts: int) -> int:
    """P: the largest power of two, from 8 to 128, for which the padding, at most E · (P - 1) rows and about
    half of that at an even load, is at most a tenth of the assignments; 8 if there is none."""
    rows = 128
    while rows > 8 and num_experts * (rows - 1) > assignments // 10:
        rows //= 2
    return rows


def make_plan(experts: Tensor, num_experts: int, rows: int) -> Plan:
    """The plan for experts (T, k), tokens' choices among num_experts, in tiles of `rows` rows."""
    T, k = experts.shape
    device, N = experts.device, T * k
    tiles = (N + num_experts * (rows - 1)) // rows  # Σ ceil(n_e / P) is never more
    # order: (T·k,) assignments by expert; a radix sort of short integers makes few passes
    by_expert, order = experts.flatten().to(torch.int16).sort(stable=True)
    by_expert = by_expert.long()
    end = torch.searchsorted(by_expert, torch.arange(num_experts, device=device), right=True)  # (E,) in order
    start = F.pad(end[:-1], (1, 0))
    tiles_of_each = (end - start + rows - 1).div(rows, rounding_mode="floor")
    tile_end = tiles_of_each.cumsum(0)  # (E,) in tiles
    # an expert's rows move from the end of the expert before it to the beginning of its first tile
    moved = (tile_end - tiles_of_each) * rows - start
    row = torch.arange(N, device=device) + moved[by_expert]  # (T·k,)
    row_choice = torch.full((tiles * rows,), N, device=device).scatter_(0, row, order)
    row_token = torch.where(row_choice < N, row_choice, 0).div(k, rounding_mode="floor")
    place = torch.empty_like(order).scatter_(0, order, row).view(T, k)
    tile = torch.arange(tiles, device=device)
    tile_expert = torch.searchsorted(tile_end, tile, right=True).clamp_(max=num_experts - 1)
    return Plan(tile_expert, row_token, row_choice, place)
