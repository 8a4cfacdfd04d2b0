"""The head-matching loss of GHND (arXiv 2007.15818, Eq. 2) and a scale-free companion."""

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
        F.mse_loss(_wide(s), _wide(t), reduction="sum")
        for s, t in zip(student, teacher, strict=True)
    ])


def ghnd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Add up the squared feature differences of all distilled layers (arXiv 2007.15818, Eq. 2).

    L = sum_j ||s_j - t_j||^2: sums, not means, with weight 1 for each layer, so L grows with
    B * H * W (published runs, B = 4: from 6.5e7 down to 9.5e5). Arguments as squared_errors.
    Returns the loss, a scalar, and its terms, (layers,), detached.
    """
    errors = squared_errors(student, teacher)
    return errors.sum(), errors.detach()


@torch.no_grad()
def energies(teacher: Sequence[Tensor]) -> Tensor:
    """Return ||t_j||^2 of each layer, (layers,): what squared_errors gives for an all-zero student.

    squared_errors / energies is the relative error of each layer, 0 for a perfect student and 1 for
    one that outputs zeros. Unlike the loss it compares across image sizes, batches and data sets.
    """
    return torch.stack([_wide(t).square().sum() for t in teacher])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
