import pytest
import torch

import losses


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [[torch.randn(shape) for shape in ((2, 8, 6, 7), (2, 16, 3, 4))] for _ in range(2)]


def test_loss_is_the_sum_of_squared_differences(maps):
    by_hand = torch.tensor([sum(float((a - b) ** 2) for a, b in zip(s.flatten(), t.flatten()))
                            for s, t in zip(*maps, strict=True)])
    torch.testing.assert_close(losses.squared_errors(*maps), by_hand)
    torch.testing.assert_close(losses.ghnd_loss(*maps), (by_hand.sum(), by_hand))


def test_gradient_is_twice_the_difference(maps):
    student, teacher = [s.requires_grad_() for s in maps[0]], maps[1]
    loss, errors = losses.ghnd_loss(student, teacher)
    assert not errors.requires_grad
    loss.backward()
    for s, t in zip(student, teacher, strict=True):
        torch.testing.assert_close(s.grad, 2 * (s - t).detach())


def test_relative_error_of_zeros_is_one_whatever_the_size(maps):
    teacher, zeros = maps[1], [torch.zeros_like(t) for t in maps[1]]
    relative = losses.squared_errors(zeros, teacher) / losses.squared_norms(teacher)
    torch.testing.assert_close(relative, torch.ones(2))
    torch.testing.assert_close(losses.squared_errors(teacher, teacher), torch.zeros(2))


@pytest.mark.parametrize("dtype, expected", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float64, torch.float64)])
def test_sums_are_float32_at_least(dtype, expected):
    twos, zeros = (torch.full((1, 1, 300, 300), value, dtype=dtype) for value in (2, 0))
    for sums in (losses.squared_errors([twos], [zeros]), losses.squared_norms([twos])):
        assert sums.dtype == expected and sums.item() == 360_000  # past float16's range


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 2, 3, 4\)"):
        losses.squared_errors([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="student maps"):
        losses.squared_errors([torch.zeros(1)], [torch.zeros(1)] * 2)
