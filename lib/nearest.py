"""The nearest structured matrix to a given one in the Frobenius norm, plain or weighted: docs/project.md.

Letters as in structured.py: W (d_out x d_in) is W[φ, ε, δ, γ, β, α] (f e d g b a), A[γ, α, δ, φ, ρ] and
B[γ, β, ε, φ, ρ]. What is minimized over the structure's matrices M is ‖(W - M) C^½‖, for the second moments
C (d_in x d_in) of the inputs; without C, ‖W - M‖. All is computed in float64.
"""
import math

import torch
from torch import Tensor

UNKNOWNS = 1024  # that one system of equations may have; larger cores are updated in parts


def relative_error(W: Tensor, M: Tensor, C: Tensor | None = None) -> float:
    """‖(W - M) C^½‖ / ‖W C^½‖; 0 where both are 0."""
    W, R = W.double(), W.double() - M.double()
    error, scale = (math.sqrt(_squared(X, C)) for X in (R, W))
    return error / scale if scale else math.inf if error else 0.0


def _squared(R: Tensor, C: Tensor | None) -> float:
    """‖R C^½‖² = tr(R C Rᵀ); NaN where R or C has one."""
    value = ((R if C is None else R @ C.double()) * R).sum().item()
    return 0.0 if value < 0 else value

# ---- The two-factor einsum ---------------------------------------------------------------------------------

def nearest_einsum(W: Tensor, sizes: tuple, C: Tensor | None = None, sweeps: int = 100,
                   tolerance: float = 1e-5) -> tuple[Tensor, Tensor, list[float]]:
    """Cores A[γ, α, δ, φ, ρ] and B[γ, β, ε, φ, ρ] of the nearest matrix, and squared errors ‖(W - M) C^½‖².

    Without C it is exact, an SVD of each slice (γ, φ); with C too where γ = 1 and α or β = 1. Otherwise the
    plain solution is improved by alternating least squares, until a sweep over both cores lowers the squared
    error by less than the fraction `tolerance`, or for `sweeps`; errors: before, and after each sweep.
    """
    a, b, g, d, e, f, r = sizes
    W = W.double()
    W6 = W.reshape(f, e, d, g, b, a)
    A, B = _by_slices(W6, r)
    C = None if C is None else C.double()
    errors, scale = [_squared(W - matrix_of(A, B), C)], _squared(W, C)
    if C is None or errors[0] <= 1e-28 * scale:
        return A, B, errors
    if g == 1 and (a == 1 or b == 1):  # C belongs to one core alone
        root, inverse = _root(C)
        A, B = _by_slices((W @ root).view_as(W6), r)
        if b == 1:
            A = torch.einsum("gadfr,ac->gcdfr", A, inverse)
        else:
            B = torch.einsum("gbefr,bc->gcefr", B, inverse)
        return A, B, [_squared(W - matrix_of(A, B), C)]
    R, C6 = W6 - matrix_of(A, B).view_as(W6), C.view(g, b, a, g, b, a)
    while len(errors) <= sweeps:
        # B's update is A's with the letters exchanged: A ↔ B, α ↔ β, δ ↔ ε
        _improve(B, A, R.transpose(1, 2).transpose(4, 5), C6.permute(0, 2, 1, 3, 5, 4))
        _improve(A, B, R, C6)
        errors.append(_squared(R.reshape_as(W), C))
        if not errors[-2] - errors[-1] > tolerance * errors[-2]:  # NaN ends it too
            break
    return A, B, errors


def matrix_of(A: Tensor, B: Tensor) -> Tensor:
    """The matrix of two cores: (d_out, d_in)."""
    W6 = torch.einsum("gadfr,gbefr->fedgba", A, B)
    return W6.reshape(math.prod(W6.shape[:3]), -1)


def _by_slices(W6: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Nearest cores to W6[φ, ε, δ, γ, β, α]: A and B of one (γ, φ) are a rank-ρ factorization of the slice
    (αδ, βε), whatever the other slices are. Singular values are shared equally; ranks beyond
    those of the slice are 0."""
    f, e, d, g, b, a = W6.shape
    slices = W6.permute(3, 0, 5, 2, 4, 1).reshape(g, f, a * d, b * e)
    U, S, Vh = torch.linalg.svd(slices, full_matrices=False)
    k, S = min(r, S.shape[-1]), S[..., None, :r].sqrt()
    A, B = W6.new_zeros(g, f, a * d, r), W6.new_zeros(g, f, b * e, r)
    A[..., :k], B[..., :k] = U[..., :k] * S, Vh.mT[..., :k] * S
    return (A.view(g, f, a, d, r).permute(0, 2, 3, 1, 4).contiguous(),
            B.view(g, f, b, e, r).permute(0, 2, 3, 1, 4).contiguous())


def _root(C: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and its pseudo-inverse."""
    values, Q = torch.linalg.eigh(C)
    seen = values > 1e-13 * values[-1]
    root = torch.where(seen, values, 0).sqrt()
    return Q * root @ Q.T, Q * torch.where(seen, 1 / root, 0) @ Q.T


def _improve(A: Tensor, B: Tensor, R: Tensor, C: Tensor) -> None:
    """Adds to A the step that minimizes tr(R C Rᵀ) for this B, and keeps R[φ, ε, δ, γ, β, α] = W - M.

    The steps of each (φ, δ) are separate problems, which share one matrix for all δ. Where γαρ are too many
    unknowns, parts of γ, then of ρ, take turns. None increases the error.

    C: (γ, β, α, γ, β, α)
    """
    g, a, d, f, r = A.shape
    of_gamma = max(1, UNKNOWNS // (a * r))
    of_rho = min(r, max(1, UNKNOWNS // a))
    flat = C.reshape(math.prod(C.shape[:3]), *C.shape[3:])  # (d_in, γ, β, α)
    for i in range(f):
        for s in range(0, g, of_gamma):
            for u in range(0, r, of_rho):
                part = slice(s, s + of_gamma)
                core = B[part, :, :, i, u:u + of_rho]  # (γ, β, ε, ρ)
                gram = torch.einsum("gber,hkes->gbrhks", core, core)
                H = torch.einsum("gbrhks,gbahkc->garhcs", gram, C[part, :, :, part])
                e, (G, _, _, rho) = R.shape[1], core.shape
                weighted = R[i].reshape(e * d, -1) @ flat[:, part].reshape(len(flat), -1)  # (εδ, γβα)
                slope = torch.einsum("gber,edgba->gard", core, weighted.view(e, d, G, -1, a))
                step = _solve(H.reshape(G * a * rho, -1), slope.reshape(G * a * rho, d))
                step = step.view(G, a, rho, d)
                A[part, :, :, i, u:u + of_rho] += step.permute(0, 1, 3, 2)
                R[i, :, :, part] -= torch.einsum("gard,gber->edgba", step, core)


def _solve(H: Tensor, slope: Tensor) -> Tensor:
    """(H + λ)⁻¹ slope for H positive semidefinite and the least λ of a series that makes it definite: a step
    that does not increase the error, for every λ > 0."""
    ridge, eye = 1e-14 * H.diagonal().max().item(), torch.eye(len(H), dtype=H.dtype)
    while ridge > 0:
        factor, failed = torch.linalg.cholesky_ex(H + ridge * eye)
        if not failed:
            return torch.cholesky_solve(slope, factor)
        ridge *= 100
    return torch.zeros_like(slope)

# ---- DYAD --------------------------------------------------------------------------------------------------

def nearest_sum(W: Tensor, places, C: Tensor | None = None) -> list[Tensor]:
    """Exact cores of the nearest matrix that is a sum of cores with their entries at these places: all other
    entries are 0, and an entry that several cores have is shared equally.

    places: for each core, the (rows, columns) of its entries, tensors of the core's shape (structured.Dyad).
    """
    W, count = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for rows, columns in places:
        count[rows, columns] += 1
    M = torch.where(count > 0, W, 0)
    patterns, pattern_of = (count > 0).unique(dim=0, return_inverse=True)
    for n, free in enumerate(patterns):
        if C is not None and not free.all():  # what the free entries can do for those that must be 0
            seen, alike = C.double()[free], pattern_of == n
            rest = seen[:, ~free] @ W[alike][:, ~free].T
            M[alike.nonzero(), free.nonzero().T] += torch.linalg.lstsq(
                seen[:, free], rest, driver="gelsd").solution.T
    M /= count.clamp(min=1)
    return [M[rows, columns] for rows, columns in places]
