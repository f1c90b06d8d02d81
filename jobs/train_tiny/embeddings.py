"""Word vectors from co-occurrence: where the embedding and the head start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WINDOW = 8
SMOOTHING = 0.75
"""Exponent on the context counts (Levy et al. 2015): keeps rare contexts from dominating."""


def ppmi_vectors(sequences: Sequence[Sequence[int]], vocab_size: int, size: int, seed: int) -> Tensor:
    """Piece vectors, (vocab_size, size), float32: U·sqrt(S) of the positive pointwise mutual information.

    Rows are scaled together to a root mean square of 1; a piece that never occurs has a zero row.
    """
    counts = _cooccurrence(sequences, vocab_size)
    torch.manual_seed(seed)  # the range finder of svd_lowrank starts from random vectors
    u, s, _ = torch.svd_lowrank(torch.from_numpy(_ppmi(counts)), q=size + 32, niter=4)
    vectors = u[:, :size] * s[:size].sqrt()
    seen = torch.from_numpy(counts.any(axis=1))
    vectors[~seen] = 0.0  # the decomposition leaves rounding errors there
    return vectors / vectors[seen].square().mean().sqrt()


def _cooccurrence(sequences: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """How often two pieces stand within ``WINDOW`` of each other, weighted by 1/distance, symmetric."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float64)
    gap = np.full(WINDOW, -1, dtype=np.int64)  # no window reaches over the end of a review
    stream = np.concatenate([np.concatenate([np.asarray(s, dtype=np.int64), gap]) for s in sequences])
    for distance in range(1, WINDOW + 1):
        left, right = stream[:-distance], stream[distance:]
        both = (left >= 0) & (right >= 0)
        pairs = left[both] * vocab_size + right[both]
        counts += np.bincount(pairs, minlength=counts.size) / distance
    square = counts.reshape(vocab_size, vocab_size)
    return square + square.T


def _ppmi(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    rows = counts.sum(axis=1) / total
    contexts = counts.sum(axis=0) ** SMOOTHING
    contexts /= contexts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(counts / total) - np.log(rows)[:, None] - np.log(contexts)[None, :]
    return np.where(counts > 0, np.maximum(pmi, 0.0), 0.0).astype(np.float32)
