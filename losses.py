"""The head-matching loss of GHND (arXiv 2007.15818, Eq. 2) and its scale-free companion."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum (s_j - t_j)^2 over batch, channels and pixels, for each distilled layer j by itself.

    student, teacher: (B, C_j, H_j, W_j) maps in the same order; ValueError if shapes differ.
    Returns (layers,), in float32 at least: the sums pass float16's largest number, 65,504.
    """
    ours, theirs = ([tuple(x.shape) for x in maps] for maps in (student, teacher))
    if ours != theirs:
        raise ValueError(f"student maps are {ours}, teacher maps {theirs}")
    return torch.stack([
        F.mse_loss(widened(s), widened(t), reduction="sum") for s, t in zip(student, teacher)])


def ghnd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Add up the weighted squared errors of all distilled layers (arXiv 2007.15818, Eq. 2).

    L = sum_j w_j ||s_j - t_j||^2, w_j = 1 by default. Returns L and its terms without w_j.
    """
    errors = squared_errors(student, teacher)
    pairs = zip(weights or [1] * len(errors), errors.unbind(), strict=True)
    return sum(weight * error for weight, error in pairs), errors.detach()


@torch.no_grad()
def squared_norms(maps: Sequence[Tensor]) -> Tensor:
    """Return ||t_j||^2 of each layer, (layers,): the squared errors of a student that is all zeros.

    squared_errors / squared_norms of the teacher is each layer's relative error: 0 is perfect, 1
    useless. Unlike the loss it compares across image sizes, batches and data sets.
    """
    return torch.stack([widened(t).square().sum() for t in maps])


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
