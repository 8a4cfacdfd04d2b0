"""The head-matching loss of GHND (arXiv 2007.15818, Eq. 2) and its scale-free companion."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum (s_j - t_j)^2 over batch, channels and pixels, for each distilled layer j by itself.

    student, teacher: (B, C_j, H_j, W_j) maps in the same order; teacher maps need no gradient.
    Returns (layers,), in float32 at least: the sums pass float16's largest number, 65,504.
    Raises ValueError, naming both lists of shapes, if they differ.
    """
    shapes = [tuple(s.shape) for s in student], [tuple(t.shape) for t in teacher]
    if shapes[0] != shapes[1]:
        raise ValueError(f"student maps are {shapes[0]}, teacher maps {shapes[1]}")
    return torch.stack([
        F.mse_loss(widened(s), widened(t), reduction="sum") for s, t in zip(student, teacher)])


def ghnd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float] = (1, 1, 1, 1)
) -> tuple[Tensor, Tensor]:
    """Add up the weighted squared errors of all distilled layers (arXiv 2007.15818, Eq. 2).

    L = sum_j w_j ||s_j - t_j||^2: sums, not means, so L grows with B * H * W. Returns the loss, a
    scalar, and its terms without their weights, (layers,), detached.
    """
    errors = squared_errors(student, teacher)
    return errors @ errors.new_tensor(weights), errors.detach()


@torch.no_grad()
def squared_norms(maps: Sequence[Tensor]) -> Tensor:
    """Return ||t_j||^2 of each layer, (layers,): the squared errors of a student that is all zeros.

    squared_errors / squared_norms of the teacher's maps is each layer's relative error: 0 is
    perfect, 1 useless. Unlike the loss it compares across image sizes, batches and data sets.
    """
    return torch.stack([widened(t).square().sum() for t in maps])


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
