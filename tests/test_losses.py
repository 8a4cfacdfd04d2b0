import pytest
import torch

import losses


def make_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, 6, 7, generator=generator),
            torch.randn(2, 16, 3, 4, generator=generator)]


def test_loss_is_the_weighted_sum_of_squared_differences():
    student_maps, teacher_maps = make_maps(0), make_maps(1)
    by_hand = []
    for s, t in zip(student_maps, teacher_maps, strict=True):
        by_hand.append(sum(float((a - b) ** 2) for a, b in zip(s.flatten(), t.flatten())))
        s.requires_grad_()
    loss, errors = losses.ghnd_loss(student_maps, teacher_maps, (0.5, 3))
    torch.testing.assert_close(errors, torch.tensor(by_hand))
    assert loss.item() == pytest.approx(0.5 * by_hand[0] + 3 * by_hand[1])

    assert not errors.requires_grad
    loss.backward()
    for weight, s, t in zip((0.5, 3), student_maps, teacher_maps, strict=True):
        torch.testing.assert_close(s.grad, weight * 2 * (s - t).detach())
    zeros = [torch.zeros_like(t) for t in teacher_maps]  # their relative error is 1
    errors = losses.squared_errors(zeros, teacher_maps)
    torch.testing.assert_close(errors, losses.squared_norms(teacher_maps))


def test_sums_of_float16_are_float32():
    twos = torch.full((1, 1, 300, 300), 2, dtype=torch.float16)
    for sums in (losses.squared_errors([twos], [0 * twos]), losses.squared_norms([twos])):
        assert sums.dtype == torch.float32 and sums.item() == 360_000  # beyond float16's range


def test_maps_that_do_not_correspond_are_an_error():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\), teacher map \(1, 2, 3, 4\)"):
        losses.squared_errors([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="longer"):
        losses.squared_errors([torch.zeros(1)], [torch.zeros(1)] * 2)
    with pytest.raises(ValueError, match="shorter"):
        losses.ghnd_loss([torch.zeros(1)], [torch.zeros(1)])  # four weights for one layer
