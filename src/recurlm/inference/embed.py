"""What an embedding matrix (V, E) knows: nearest rows, analogies, a map in the plane. Ids only, no text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-3  # of 3CosMul, as published


def unit_rows(embedding_VE: Tensor) -> Tensor:
    """unit_VE in float32 on the CPU, rows of length one; a row of zeros stays zero."""
    return torch.nn.functional.normalize(embedding_VE.detach().float().cpu(), dim=-1)


def neighbours(unit_VE: Tensor, id: int, k: int, among_V: Tensor) -> tuple[list[float], list[int]]:
    """(cosines, ids) of the k rows nearest to row `id` where `among_V` is true, itself left out, nearest first."""
    return _best(unit_VE @ unit_VE[id], k, among_V, {id})


def analogy(
    unit_VE: Tensor, a: int, b: int, c: int, k: int, among_V: Tensor, multiply: bool = False
) -> tuple[list[float], list[int]]:
    """(scores, ids) of the k best answers d to "a is to b as c is to d" where `among_V` is true, best first.

    The three question words are no answers.

    3CosAdd: cos(d, b - a + c) (Mikolov et al. 2013). With `multiply` 3CosMul: cos(d, b) cos(d, c) / (cos(d, a) + 0.001),
    cosines moved to [0, 1] (Levy & Goldberg 2014, equation 4).
    """
    if multiply:
        near_V3 = (unit_VE @ unit_VE[[a, b, c]].T + 1) / 2
        scores_V = near_V3[:, 1] * near_V3[:, 2] / (near_V3[:, 0] + EPSILON)
    else:
        scores_V = unit_VE @ unit_rows(unit_VE[b] - unit_VE[a] + unit_VE[c])
    return _best(scores_V, k, among_V, {a, b, c})


def _best(scores_V: Tensor, k: int, among_V: Tensor, excluded: set[int]) -> tuple[list[float], list[int]]:
    among_V = among_V.clone()
    among_V[list(excluded)] = False
    best_K = scores_V.where(among_V, -torch.inf).topk(min(k, int(among_V.sum())))
    return best_K.values.tolist(), best_K.indices.tolist()


def principal_plane(rows_NE: Tensor) -> Tensor:
    """xy_N2: the rows in the plane of their two principal components; each axis' longest reach is positive."""
    centred_NE = rows_NE.double() - rows_NE.double().mean(0)
    u_NK, s_K, _ = torch.linalg.svd(centred_NE, full_matrices=False)
    xy_N2 = torch.zeros(len(rows_NE), 2, dtype=torch.double)
    xy_N2[:, : min(2, len(s_K))] = (u_NK * s_K)[:, :2]
    reach_12 = xy_N2.gather(0, xy_N2.abs().argmax(0)[None])
    return xy_N2 * torch.where(reach_12 < 0, -1.0, 1.0)


def neighbour_map(rows_NE: Tensor, perplexity: float = 20.0, steps: int = 500) -> Tensor:
    """xy_N2: a plane in which near rows stay near: t-SNE (van der Maaten & Hinton 2008), exact, from the principal plane.

    Nothing is drawn at random. Time grows with N^2: about a second for 300 rows. At N < 4 it is the principal plane.
    """
    start_N2, n = principal_plane(rows_NE), len(rows_NE)
    if n < 4 or not start_N2.std():
        return start_N2
    square_NN = torch.cdist(rows_NE.double(), rows_NE.double()).square().fill_diagonal_(torch.inf)
    target = math.log(min(perplexity, (n - 1) / 3))
    low_N1, high_N1 = torch.zeros(n, 1).double(), torch.full((n, 1), torch.inf).double()
    precision_N1 = torch.ones(n, 1).double()
    for _ in range(64):  # the precision that gives each row's neighbours that entropy, by bisection
        p_NN = (-square_NN * precision_N1).softmax(1)
        wide_N1 = torch.special.entr(p_NN).sum(1, keepdim=True) > target
        low_N1, high_N1 = torch.where(wide_N1, precision_N1, low_N1), torch.where(wide_N1, high_N1, precision_N1)
        precision_N1 = torch.where(high_N1.isinf(), 2 * precision_N1, (low_N1 + high_N1) / 2)
    p_NN = (p_NN + p_NN.T) / (2 * n)
    y_N2 = start_N2 / start_N2.std() * 1e-4
    move_N2 = torch.zeros_like(y_N2)
    for step in range(steps):
        early = step < steps // 4
        kernel_NN = (1 + torch.cdist(y_N2, y_N2).square()).reciprocal().fill_diagonal_(0)
        force_NN = ((12 if early else 1) * p_NN - kernel_NN / kernel_NN.sum()) * kernel_NN
        gradient_N2 = 4 * (force_NN.sum(1, keepdim=True) * y_N2 - force_NN @ y_N2)
        move_N2 = (0.5 if early else 0.8) * move_N2 - 50 * gradient_N2
        y_N2 = y_N2 + move_N2
    return y_N2
