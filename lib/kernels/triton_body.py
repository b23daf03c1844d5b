"""The einsum operator on CUDA in bfloat16, float16 and float32: Triton kernels.

Letters are those of the contraction, as in torch_body.py, and each of the two cores is one *side* of it:

             groups U   repeats V   rows K      z N
    first    g          b           a           (r, f, d)
    second   f          d           e           (g, r, b)

For every group u and repeat v, a side maps a row's K numbers to N numbers of z, or back:

    rows_to_z        z[n, p] = Σ_k core[u, n, k] · row[p; u, v, k]        x -> z, and dy -> dz
    z_to_rows        row[p; u, v, k] = Σ_n core[u, n, k] · z[n, p]        z -> y, and dz -> dx
    core_gradient    dcore[u, n, k] = Σ_{p, v} z[n, p] · row[p; u, v, k]

for tiles of P rows p, each with the core of one expert. A row lies in memory as [u, v, k], and z as (tile, g,
b, r, f, d, P), so that what a program reads is contiguous, for either side. Two more kernels, route
and place, and a cumulative sum between them make the plan (plan.py says what that is); combine sums a token's
k rows, and route_gradient is the backward of the gates. There are no atomics and nothing is read back:
results are deterministic, and the host never waits.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, which tests them; not in bfloat16, which Triton's
interpreter multiplies wrongly.
"""
import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lib.kernels.plan import tile_rows
from lib.kernels.routing import router_logits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# {bytes of a number: (most rows of a tile, largest block in N and K)}: more would spill registers
BLOCKS = {2: (128, 64), 4: (32, 32)}
PROGRAMS = 1024  # programs to divide core_gradient into, where there is work for so many


# ---- Kernels -----------------------------------------------------------------------------------------------

@triton.jit
def _z_offsets(n, N1: tl.constexpr, N2: tl.constexpr, Z0: tl.constexpr, Z1: tl.constexpr, Z2: tl.constexpr):
    """Where entry n = (n0, n1, n2) of a side's z is, in units of P."""
    return n // (N1 * N2) * Z0 + n // N2 % N1 * Z1 + n % N2 * Z2


@triton.jit
def _tokens(row, row_token, T, PLANNED: tl.constexpr):
    """The token that each row reads, and whether there is one."""
    if PLANNED:
        token = tl.load(row_token + row)
        return tl.maximum(token, 0).to(tl.int64), token >= 0
    return row.to(tl.int64), row < T


@triton.jit
def _work(pid, U: tl.constexpr, V: tl.constexpr, blocks: tl.constexpr):
    """The work of a program: its tile, group, repeat and block. Programs of a tile are neighbours."""
    return pid // (blocks * V * U), pid // (blocks * V) % U, pid // blocks % V, pid % blocks


@triton.jit
def rows_to_z_kernel(rows, core, z, row_token, row_gate, tile_expert, T,
                     U: tl.constexpr, V: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                     N1: tl.constexpr, N2: tl.constexpr, Z0: tl.constexpr, Z1: tl.constexpr,
                     Z2: tl.constexpr, ZU: tl.constexpr, ZV: tl.constexpr, CU: tl.constexpr,
                     CN: tl.constexpr, CK: tl.constexpr, Z: tl.constexpr, P: tl.constexpr,
                     BN: tl.constexpr, BK: tl.constexpr, PLANNED: tl.constexpr, GATED: tl.constexpr,
                     PRECISION: tl.constexpr):
    """One program per tile, group, repeat and block of N. Rows are read where their tokens are, and are
    multiplied by their gates."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (N + BN - 1) // BN
    tile, u, v, block = _work(pid, U, V, blocks)
    expert = 0
    if PLANNED:
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
    p = tl.arange(0, P)
    token, there = _tokens(tile * P + p, row_token, T, PLANNED)
    n = block * BN + tl.arange(0, BN)
    rows += token * (U * V * K) + (u * V + v) * K
    core += expert.to(tl.int64) * (U * N * K) + u * CU if PLANNED else u * CU
    acc = tl.zeros((BN, P), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(core + n[:, None] * CN + k[None, :] * CK, (n[:, None] < N) & (k[None, :] < K), 0.0)
        x = tl.load(rows[None, :] + k[:, None], there[None, :] & (k[:, None] < K), 0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if GATED:
        acc *= tl.load(row_gate + tile * P + p)[None, :]
    z += (tile.to(tl.int64) * Z + u * ZU + v * ZV) * P
    tl.store(z + _z_offsets(n, N1, N2, Z0, Z1, Z2)[:, None] * P + p[None, :],
             acc.to(z.dtype.element_ty), n[:, None] < N)


@triton.jit
def z_to_rows_kernel(z, core, rows, tile_expert, T,
                     U: tl.constexpr, V: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                     N1: tl.constexpr, N2: tl.constexpr, Z0: tl.constexpr, Z1: tl.constexpr,
                     Z2: tl.constexpr, ZU: tl.constexpr, ZV: tl.constexpr, CU: tl.constexpr,
                     CN: tl.constexpr, CK: tl.constexpr, Z: tl.constexpr, P: tl.constexpr,
                     BN: tl.constexpr, BK: tl.constexpr, PLANNED: tl.constexpr, PRECISION: tl.constexpr):
    """One program per tile, group, repeat and block of K. Rows are written in the order of the plan."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (K + BK - 1) // BK
    tile, u, v, block = _work(pid, U, V, blocks)
    expert = 0
    if PLANNED:
        expert = tl.load(tile_expert + tile)
        if expert < 0:
            return
    p = tl.arange(0, P)
    k = block * BK + tl.arange(0, BK)
    z += (tile.to(tl.int64) * Z + u * ZU + v * ZV) * P
    core += expert.to(tl.int64) * (U * N * K) + u * CU if PLANNED else u * CU
    acc = tl.zeros((P, BK), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        w = tl.load(core + n[:, None] * CN + k[None, :] * CK, (n[:, None] < N) & (k[None, :] < K), 0.0)
        t = tl.load(z + _z_offsets(n, N1, N2, Z0, Z1, Z2)[None, :] * P + p[:, None], n[None, :] < N, 0.0)
        acc = tl.dot(t, w, acc, input_precision=PRECISION)
    row = tile * P + p
    there = (row < T) | PLANNED  # the plan's padding rows are rows of their own
    out = rows + row.to(tl.int64)[:, None] * (U * V * K) + (u * V + v) * K + k[None, :]
    tl.store(out, acc.to(rows.dtype.element_ty), there[:, None] & (k[None, :] < K))


@triton.jit
def core_gradient_kernel(z, rows, dcore, row_token, row_gate, tile_end, T,
                         U: tl.constexpr, V: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                         N1: tl.constexpr, N2: tl.constexpr, Z0: tl.constexpr, Z1: tl.constexpr,
                         Z2: tl.constexpr, ZU: tl.constexpr, ZV: tl.constexpr, CU: tl.constexpr,
                         CN: tl.constexpr, CK: tl.constexpr, Z: tl.constexpr, P: tl.constexpr,
                         BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, PLANNED: tl.constexpr,
                         GATED: tl.constexpr, PRECISION: tl.constexpr):
    """One program per expert, part of its tiles, group and block of the core: dcore is (E, SPLITS, core), to
    be summed over the parts. An expert without tiles gets zeros."""
    pid = tl.program_id(0)
    n_blocks: tl.constexpr = (N + BN - 1) // BN
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    part = pid // (n_blocks * k_blocks * U)  # (expert, split)
    u = pid // (n_blocks * k_blocks) % U
    n = pid // k_blocks % n_blocks * BN + tl.arange(0, BN)
    k = pid % k_blocks * BK + tl.arange(0, BK)
    expert, split = part // SPLITS, part % SPLITS
    begin, end = 0, (T + P - 1) // P
    if PLANNED:
        end = tl.load(tile_end + expert)
        begin = tl.load(tile_end + expert - 1, expert > 0, 0)
    share = (end - begin + SPLITS - 1) // SPLITS
    first, last = begin + split * share, tl.minimum(begin + split * share + share, end)
    p = tl.arange(0, P)
    z_offsets = _z_offsets(n, N1, N2, Z0, Z1, Z2)[:, None] * P + p[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    for step in range(0, (last - first) * V):
        tile, v = first + step // V, step % V
        token, there = _tokens(tile * P + p, row_token, T, PLANNED)
        t = tl.load(z + (tile.to(tl.int64) * Z + u * ZU + v * ZV) * P + z_offsets, n[:, None] < N, 0.0)
        at = rows + token[:, None] * (U * V * K) + (u * V + v) * K + k[None, :]
        x = tl.load(at, there[:, None] & (k[None, :] < K), 0.0)
        if GATED:
            x = (x * tl.load(row_gate + tile * P + p)[:, None]).to(x.dtype)
        acc = tl.dot(t, x, acc, input_precision=PRECISION)
    dcore += part.to(tl.int64) * (U * N * K) + u * CU
    tl.store(dcore + n[:, None] * CN + k[None, :] * CK, acc.to(dcore.dtype.element_ty),
             (n[:, None] < N) & (k[None, :] < K))


@triton.jit
def combine_kernel(rows, place, gates, y, x, s, width, k: tl.constexpr, KP: tl.constexpr,
                   BLOCK: tl.constexpr, GATED: tl.constexpr, DOTS: tl.constexpr):
    """One program per token: y is the sum of its k rows, times their gates; s, rows times x."""
    t = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    dots = tl.zeros((KP,), tl.float32)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        if DOTS:
            other = tl.load(x + t * width + j, j < width, 0.0).to(tl.float32)
        for i in tl.static_range(k):
            row = tl.load(place + t * k + i).to(tl.int64)
            values = tl.load(rows + row * width + j, j < width, 0.0).to(tl.float32)
            if DOTS:
                dots += tl.where(choice == i, tl.sum(values * other), 0.0)
            if GATED:
                values *= tl.load(gates + t * k + i)
            acc += values
        tl.store(y + t * width + j, acc.to(y.dtype.element_ty), j < width)
    if DOTS:
        tl.store(s + t * k + choice, dots, choice < k)


@triton.jit
def route_kernel(logits, balance, chosen, gates, counts, T, E: tl.constexpr, k: tl.constexpr,
                 EP: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, GIVEN: tl.constexpr,
                 GATED: tl.constexpr):
    """One program per ROWS tokens: their choices (given, or the largest of logits + balance), the gates of
    routing.gate_weights, and how many of these tokens' assignments each expert gets, counts (programs, E)."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e, choice = tl.arange(0, EP), tl.arange(0, KP)
    there = t < T
    taken = tl.zeros((EP,), tl.int32)
    if GATED:
        inside = there[:, None] & (e[None, :] < E)
        logit = tl.load(logits + t[:, None] * E + e[None, :], inside, float("-inf"))
        if not GIVEN:
            score = logit + tl.load(balance + e, e < E, 0.0)[None, :]
        picked = tl.full((ROWS, KP), float("-inf"), tl.float32)
    for i in tl.static_range(k):
        if GIVEN:
            best = tl.load(chosen + t * k + i, there, 0).to(tl.int32)
        else:
            best = tl.minimum(tl.argmax(score, 1), E - 1)  # a valid expert even if all are NaN
            tl.store(chosen + t * k + i, best.to(tl.int64), there)
        hit = e[None, :] == best[:, None]
        taken += tl.sum((hit & there[:, None]).to(tl.int32), 0)
        if GATED:
            value = tl.sum(tl.where(hit, logit, 0.0), 1)
            picked = tl.where(choice[None, :] == i, value[:, None], picked)
            if not GIVEN:
                score = tl.where(hit, float("-inf"), score)
    tl.store(counts + tl.program_id(0) * E + e, taken, e < E)
    if GATED:
        top = tl.max(logit, 1) if k == 1 else tl.max(picked, 1)
        top = tl.where(there, top, 0.0)
        terms = tl.exp(picked - top[:, None])
        total = tl.sum(tl.exp(logit - top[:, None]), 1) if k == 1 else tl.sum(terms, 1)
        tl.store(gates + t[:, None] * k + choice[None, :], terms / total[:, None],
                 there[:, None] & (choice[None, :] < k))


@triton.jit
def place_kernel(chosen, gates, sums, row_token, row_gate, place, tile_expert, tile_end, T, programs,
                 tiles, E: tl.constexpr, k: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
                 ROWS: tl.constexpr, P: tl.constexpr, GATED: tl.constexpr):
    """The rows of a plan: one program per ROWS tokens, and then one per expert, for its tiles and padding
    rows. sums (programs, E): how many assignments each expert has up to a program's last token."""
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    total = tl.load(sums + (programs - 1) * E + e, e < E, 0)
    ends = tl.cumsum((total + P - 1) // P, 0)  # of each expert's tiles
    starts = ends - (total + P - 1) // P
    if pid < programs:
        t = pid * ROWS + tl.arange(0, ROWS)
        choice = tl.arange(0, KP)
        there = (t[:, None] < T) & (choice[None, :] < k)
        assignment = tl.reshape(t[:, None] * k + choice[None, :], (ROWS * KP,))
        there = tl.reshape(there, (ROWS * KP,))
        before = tl.load(sums + (pid - 1) * E + e, (pid > 0) & (e < E), 0)
        expert = tl.load(chosen + assignment, there, 0).to(tl.int32)
        hit = ((e[None, :] == expert[:, None]) & there[:, None]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - 1 + before[None, :] + starts[None, :] * P
        row = tl.sum(hit * rank, 1)
        tl.store(row_token + row, assignment // k, there)
        tl.store(place + assignment, row, there)
        if GATED:
            tl.store(row_gate + row, tl.load(gates + assignment, there, 0.0), there)
    else:
        own = e == pid - programs
        count, begin = tl.sum(tl.where(own, total, 0)), tl.sum(tl.where(own, starts, 0))
        end = tl.sum(tl.where(own, ends, 0))
        p = tl.arange(0, P)
        padding = begin * P + count + p
        tl.store(row_token + padding, -1, padding < end * P)
        if GATED:
            tl.store(row_gate + padding, 0.0, padding < end * P)
        tl.store(tile_end + pid - programs, end)
        for start in range(begin, end, 64):
            i = start + tl.arange(0, 64)
            tl.store(tile_expert + i, pid - programs, i < end)
        if pid - programs == E - 1:
            for start in range(end, tiles, 64):
                i = start + tl.arange(0, 64)
                tl.store(tile_expert + i, -1, i < tiles)


@triton.jit
def route_gradient_kernel(logits, chosen, gates, s, dlogits, out, T, E: tl.constexpr, k: tl.constexpr,
                          EP: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr):
    """routing.logits_gradient, plus dlogits: one program per ROWS tokens."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    there = t < T
    inside = there[:, None] & (e[None, :] < E)
    at = t[:, None] * E + e[None, :]
    grad = tl.zeros((ROWS, EP), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(k):
        total += tl.load(s + t * k + i, there, 0.0)
    if k == 1:
        logit = tl.load(logits + at, inside, float("-inf"))
        top = tl.where(there, tl.max(logit, 1), 0.0)
        p = tl.exp(logit - top[:, None])
        grad -= total[:, None] * p / tl.where(there, tl.sum(p, 1), 1.0)[:, None]
    for i in tl.static_range(k):
        best = tl.load(chosen + t * k + i, there, 0).to(tl.int32)
        own = tl.load(s + t * k + i, there, 0.0)
        if k > 1:
            own -= tl.load(gates + t * k + i, there, 0.0) * total
        grad += tl.where(e[None, :] == best[:, None], own[:, None], 0.0)
    if ADDED:
        grad += tl.load(dlogits + at, inside, 0.0)
    tl.store(out + at, grad, inside)


# ---- Launches ----------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """As plan.Plan, on the device, with what the kernels need of it. Tiles without rows have expert -1."""
    tile_expert: Tensor  # (tiles,) int32
    tile_end: Tensor     # (E,) int32: where each expert's tiles end
    row_token: Tensor    # (tiles · P,) int32; -1 in a padding row
    row_gate: Tensor | None  # (tiles · P,) float32; 0 in a padding row
    place: Tensor        # (T, k) int32
    gates: Tensor | None  # (T, k) float32


class Problem(NamedTuple):
    """The sizes of a call that its launches share."""
    T: int           # tokens
    E: int           # experts
    P: int           # rows of a tile
    sides: tuple     # keywords of the kernels for the first and the second core
    tiles: int
    precision: str   # of a float32 dot: 'ieee' or 'tf32', as torch's own products


def make_sides(sizes, block: int) -> tuple[dict, dict]:
    """The kernels' constants for both cores: sizes, blocks, and strides in z and in the core."""
    a, b, g, d, e, f, r = sizes
    first = dict(U=g, V=b, K=a, N=r * f * d, N1=f, N2=d, Z0=f * d, Z1=d, Z2=1, ZU=b * r * f * d,
                 ZV=r * f * d, CU=r * f * d * a, CN=a, CK=1)
    second = dict(U=f, V=d, K=e, N=g * r * b, N1=r, N2=b, Z0=b * r * f * d, Z1=f * d, Z2=r * f * d, ZU=d,
                  ZV=1, CU=e * g * r * b, CN=1, CK=g * r * b)
    for side in (first, second):
        side.update(Z=g * b * r * f * d, **{name: min(block, max(16, triton.next_power_of_2(side[size])))
                                            for name, size in (("BN", "N"), ("BK", "K"))})
    return first, second


def _problem(T: int, k: int, core: Tensor, planned: bool, sizes) -> Problem:
    E, (most, block) = len(core), BLOCKS[core.element_size()]
    P = min(most, max(16, tile_rows(T * k, E) if planned else min(64, triton.next_power_of_2(T))))
    tiles = (T * k + E * (P - 1)) // P if planned else -(-T // P)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Problem(T, E, P, make_sides(sizes, block), tiles, "tf32" if tf32 else "ieee")


def make_plan(problem: Problem, chosen: Tensor, logits: Tensor | None, balance: Tensor | None) -> Plan:
    """The plan for chosen (T, k), which is filled in where balance is given, with gates where logits are."""
    T, E, P, tiles = problem.T, problem.E, problem.P, problem.tiles
    k = chosen.shape[1]
    EP, KP = triton.next_power_of_2(E), triton.next_power_of_2(k)
    # so many that a program's (ROWS, KP, EP) fits into registers and shared memory
    ROWS = min(128, max(1, min(16, 16384 // (EP * KP)), 4096 // (EP * KP)))
    programs, gated = -(-T // ROWS), logits is not None
    int32 = dict(dtype=torch.int32, device=chosen.device)
    counts = torch.empty(programs, E, **int32)
    gates = torch.empty(T, k, dtype=torch.float32, device=chosen.device) if gated else None
    row_gate = torch.empty(tiles * P, dtype=torch.float32, device=chosen.device) if gated else None
    plan = Plan(torch.empty(tiles, **int32), torch.empty(E, **int32), torch.empty(tiles * P, **int32),
                row_gate, torch.empty(T, k, **int32), gates)
    route_kernel[(programs,)](logits, balance, chosen, gates, counts, T, E, k, EP, KP, ROWS,
                              balance is None, gated)
    sums = counts.cumsum(0, dtype=torch.int32)
    place_kernel[(programs + E,)](chosen, gates, sums, plan.row_token, row_gate, plan.place,
                                  plan.tile_expert, plan.tile_end, T, programs, tiles, E, k, EP, KP, ROWS, P,
                                  gated)
    return plan


def rows_to_z(problem: Problem, side: dict, rows: Tensor, core: Tensor, plan: Plan | None,
              gated: bool = False) -> Tensor:
    """rows (T, U·V·K), core of every expert -> z (tiles, Z, P)."""
    z = rows.new_empty(problem.tiles, side["Z"], problem.P)
    grid = (problem.tiles * side["U"] * side["V"] * triton.cdiv(side["N"], side["BN"]),)
    rows_to_z_kernel[grid](rows, core, z, plan and plan.row_token, plan.row_gate if gated else None,
                           plan and plan.tile_expert, problem.T, **side, P=problem.P,
                           PLANNED=plan is not None, GATED=gated, PRECISION=problem.precision)
    return z


def z_to_rows(problem: Problem, side: dict, z: Tensor, core: Tensor, plan: Plan | None) -> Tensor:
    """z (tiles, Z, P), core of every expert -> rows (tiles · P, U·V·K) of the plan; without, (T, U·V·K)."""
    rows = z.new_empty(problem.tiles * problem.P if plan else problem.T, side["U"] * side["V"] * side["K"])
    grid = (problem.tiles * side["U"] * side["V"] * triton.cdiv(side["K"], side["BK"]),)
    z_to_rows_kernel[grid](z, core, rows, plan and plan.tile_expert, problem.T, **side, P=problem.P,
                           PLANNED=plan is not None, PRECISION=problem.precision)
    return rows


def core_gradient(problem: Problem, side: dict, z: Tensor, rows: Tensor, core: Tensor, plan: Plan | None,
                  gated: bool = False) -> Tensor:
    """z (tiles, Z, P), rows (T, U·V·K) -> the gradient of a core, of its shape and type; float32 inside."""
    blocks = side["U"] * triton.cdiv(side["N"], side["BN"]) * triton.cdiv(side["K"], side["BK"])
    splits = max(1, min(PROGRAMS // (problem.E * blocks), problem.tiles // problem.E // 2))
    parts = core.new_empty(problem.E, splits, core.numel() // problem.E,
                           dtype=core.dtype if splits == 1 else torch.float32)
    core_gradient_kernel[(problem.E * splits * blocks,)](
        z, rows, parts, plan and plan.row_token, plan.row_gate if gated else None, plan and plan.tile_end,
        problem.T, **side, P=problem.P, SPLITS=splits, PLANNED=plan is not None, GATED=gated,
        PRECISION=problem.precision)
    return parts.sum(1).to(core.dtype).view_as(core) if splits > 1 else parts.view_as(core)


def combine(plan: Plan, rows: Tensor, dtype: torch.dtype, gated: bool, x: Tensor | None = None):
    """rows (tiles · P, d) -> the sums of each token's rows (T, d), and their products with x (T, k)."""
    (T, k), width = plan.place.shape, rows.shape[1]
    y = rows.new_empty(T, width, dtype=dtype)
    s = None if x is None else rows.new_empty(T, k, dtype=torch.float32)
    combine_kernel[(T,)](rows, plan.place, plan.gates if gated else None, y, x, s, width, k,
                         triton.next_power_of_2(k), min(1024, triton.next_power_of_2(width)), gated,
                         x is not None)
    return y, s


def route_gradient(plan: Plan, logits: Tensor, chosen: Tensor, s: Tensor, dlogits: Tensor | None) -> Tensor:
    """The gradient of the logits (T, E): see routing.logits_gradient."""
    T, E = logits.shape
    EP = triton.next_power_of_2(E)
    ROWS = min(128, max(16, 4096 // EP))
    out = torch.empty_like(logits)
    route_gradient_kernel[(-(-T // ROWS),)](logits, chosen, plan.gates, s, dlogits, out, T, E,
                                            chosen.shape[1], EP, ROWS, dlogits is not None)
    return out


# ---- The body ----------------------------------------------------------------------------------------------

def _turned(rows: Tensor, groups: int, outer: int, inner: int) -> Tensor:
    """rows[u, i, j] -> rows[u, j, i]: kernels read and write the K numbers of a repeat side by side; the
    caller may have them apart (torch_body.py says when). A view where i or j has one value, else a copy."""
    return rows.view(len(rows), groups, outer, inner).mT.reshape(len(rows), groups * outer * inner)


def _device(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def forward(x, first, second, router, balance, experts, top_k, sizes, swapped, logits=None):
    """See operators.einsum. All tensors are contiguous; the router and its logits are float32."""
    with _device(x):
        chosen = experts
        if router is not None:
            logits = router_logits(x, router)
        if logits is not None:
            chosen = torch.empty(len(x), top_k, dtype=torch.int64, device=x.device)
        x = x.to(first.dtype)  # the router has seen it as it was
        a, b, g, d, e, f, _ = sizes
        if swapped:
            x = _turned(x, g, a, b)
        problem = _problem(len(x), top_k, first, chosen is not None, sizes)
        plan = None if chosen is None else make_plan(problem, chosen, logits, balance)
        side1, side2 = problem.sides
        z = rows_to_z(problem, side1, x, first, plan)
        y = z_to_rows(problem, side2, z, second, plan)
        if plan is not None:
            y, _ = combine(plan, y, y.dtype, gated=logits is not None)
        return y if swapped else _turned(y, f, d, e), logits, chosen


def try_out(device_type: str, dtype: torch.dtype) -> None:
    """Computes one small product, with whatever Triton raises where it cannot build or launch a kernel. At
    its first launch it needs a C compiler."""
    x, first, second = (torch.ones(shape, device=device_type, dtype=dtype)
                        for shape in ((16, 16), (1, 1, 1, 16), (1, 1, 16, 1)))
    forward(x, first, second, None, None, None, 1, (16, 1, 1, 1, 16, 1, 1), False)


def backward(dy, dlogits, x, first, second, router, experts, logits, chosen, sizes, swapped):
    """See torch_body.backward."""
    with _device(x):
        x_seen, x = x, x.to(first.dtype)
        chosen, gated = experts if logits is None else chosen, logits is not None
        a, b, g, d, e, f, _ = sizes
        x, dy = (_turned(x, g, a, b), dy) if swapped else (x, _turned(dy, f, e, d))
        problem = _problem(len(x), 1 if chosen is None else chosen.shape[1], first, chosen is not None, sizes)
        plan = None if chosen is None else make_plan(problem, chosen, logits, None)
        side1, side2 = problem.sides
        z = rows_to_z(problem, side1, x, first, plan)
        dsecond = core_gradient(problem, side2, z, dy, second, plan, gated)
        dz = rows_to_z(problem, side2, dy, second, plan, gated)
        dfirst = core_gradient(problem, side1, dz, x, first, plan)
        dx = z_to_rows(problem, side1, dz, first, plan)
        if plan is not None:  # gate · its gradient is the product of a row's input with the input's gradient
            dx, s = combine(plan, dx, x_seen.dtype, gated=False, x=x if gated else None)
        if swapped:
            dx = _turned(dx, g, b, a)
        if not gated:
            return dx.to(x_seen.dtype), dfirst, dsecond, None
        dlogit = route_gradient(plan, logits, chosen, s, dlogits)
        if router is None:
            return dx, dfirst, dsecond, dlogit
        dx += (dlogit @ router).to(dx.dtype)
        return dx, dfirst, dsecond, dlogit.T @ x_seen.to(router.dtype)
