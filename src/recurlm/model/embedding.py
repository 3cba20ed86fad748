"""Input vectors that are smaller for rarer words (Baevski & Auli 2019), for a head with the same clusters to share."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import embedding

from recurlm.model.layers.base import uniform


class AdaptiveEmbedding(nn.Module):
    """x = e for the words of the shortlist, P_k e for those of tail k, whose e have fewer features."""

    def __init__(self, bounds: tuple[int, ...], sizes: tuple[int, ...], bound: float, generator: Generator):
        super().__init__()
        self.bounds = bounds
        words = [last - first for first, last in pairwise(bounds)]
        self.tables = nn.ParameterList(uniform((n, F), bound, generator) for n, F in zip(words, sizes, strict=False))
        # of a variance that leaves x as large as a word's of the shortlist
        self.projections = nn.ParameterList(
            uniform((sizes[0], F), math.sqrt(3 / F), generator) for F in sizes[1 : len(words)]
        )

    @property
    def words(self) -> int:
        """V."""
        return self.bounds[-1]

    def forward(self, ids_TB: Tensor) -> Tensor:
        """x_TBE. Every cluster looks up every place, for the host does not know which are its own."""
        return functools.reduce(torch.add, (self._of_cluster(n, ids_TB) for n in range(len(self.tables))))

    def _of_cluster(self, n: int, ids_TB: Tensor) -> Tensor:
        """x_TBE of the words of cluster n, 0 elsewhere."""
        first, last = self.bounds[n : n + 2]
        at_TB = ids_TB - first
        inside_TB = (at_TB >= 0) & (at_TB < last - first)
        # places elsewhere look up rows in turn, so that their gradients of zero do not pile up on one row
        e_TBF = embedding(torch.where(inside_TB, at_TB, at_TB % (last - first)), self.tables[n]) * inside_TB[..., None]
        return e_TBF @ self.projections[n - 1].T if n else e_TBF

    def matrix(self) -> Tensor:
        """x_VE of every word."""
        first, *rest = self.tables
        return torch.cat((first, *(e @ p.T for e, p in zip(rest, self.projections, strict=True))))
