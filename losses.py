"""The head-matching loss of GHND (arXiv 2007.15818, Eq. 2), and the relative error beside it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ghnd_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    layer_weights: Sequence[float] = (1, 1, 1, 1),
) -> tuple[Tensor, Tensor]:
    """Return the loss of GHND, L, a scalar; and, detached, the squared errors that it adds up.

    L = sum_j w_j ||s_j - t_j||^2 (arXiv 2007.15818, Eq. 2). Nothing is averaged, so L grows with
    B * H * W: in Faster R-CNN's published log, for 4 images, it falls from 6.5e7 to 9.5e5.

    student_maps, teacher_maps: as in squared_errors; teacher maps need no gradient.
    layer_weights: w_j, as many as maps; by default those of GHND, for layer1 to layer4.
    Raises ValueError if the numbers of weights and maps differ, or as squared_errors does.
    """
    errors = squared_errors(student_maps, teacher_maps)
    terms = [weight * error for weight, error in zip(layer_weights, errors, strict=True)]
    return sum(terms), errors.detach()


def squared_errors(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return ||s_j - t_j||^2 of each layer j, summed over batch, channels and pixels: (layers,).

    student_maps, teacher_maps: (B, C_j, H_j, W_j) feature maps, in the same order.
    Raises ValueError if the numbers of maps or the shapes of two maps differ.
    """
    errors = []
    for s, t in zip(student_maps, teacher_maps, strict=True):
        if s.shape != t.shape:
            raise ValueError(f"student map is {tuple(s.shape)}, teacher map {tuple(t.shape)}")
        errors.append(F.mse_loss(at_least_float32(s), at_least_float32(t), reduction="sum"))
    return torch.stack(errors)


@torch.no_grad()
def squared_norms(teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return ||t_j||^2 of each layer, (layers,): the squared errors of a student that gives zeros.

    squared_errors / squared_norms is each layer's relative error: 0 is perfect, 1 is useless.
    Unlike the loss, it can be compared across image sizes, batch sizes and data sets.
    """
    return torch.stack([at_least_float32(t).square().sum() for t in teacher_maps])


def at_least_float32(x: Tensor) -> Tensor:
    """Widen float16 and bfloat16: sums over a map exceed float16's largest number, 65,504."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
