import pytest
import torch

import losses


@pytest.fixture
def maps():
    torch.manual_seed(0)
    shapes = [(2, 8, 6, 7), (2, 16, 3, 4)]
    return [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]


def test_loss_is_the_sum_of_squared_differences(maps):
    student, teacher = maps
    by_hand = [
        sum(float((a - b) ** 2) for a, b in zip(s.flatten(), t.flatten())) for s, t in zip(*maps)
    ]
    torch.testing.assert_close(losses.squared_errors(student, teacher), torch.tensor(by_hand))
    loss, errors = losses.ghnd_loss(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(sum(by_hand)))
    torch.testing.assert_close(errors, torch.tensor(by_hand))


def test_gradient_is_twice_the_difference(maps):
    student, teacher = maps
    student = [s.requires_grad_() for s in student]
    loss, errors = losses.ghnd_loss(student, teacher)
    assert not errors.requires_grad
    loss.backward()
    for s, t in zip(student, teacher):
        torch.testing.assert_close(s.grad, 2 * (s - t).detach())


def test_relative_error_of_zeros_is_one_whatever_the_size(maps):
    _, teacher = maps
    zeros = [torch.zeros_like(t) for t in teacher]
    torch.testing.assert_close(
        losses.squared_errors(zeros, teacher) / losses.energies(teacher), torch.ones(2)
    )
    torch.testing.assert_close(losses.squared_errors(teacher, teacher), torch.zeros(2))


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_float32_at_least(dtype, expected):
    student, teacher = (
        [torch.full((1, 1, 300, 300), 2, dtype=dtype)],
        [torch.zeros(1, 1, 300, 300, dtype=dtype)],
    )
    errors = losses.squared_errors(student, teacher)
    assert errors.dtype == losses.energies(student).dtype == expected
    assert errors.item() == 360_000  # past float16's range


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 2, 3, 4\)"):
        losses.squared_errors([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="student maps"):
        losses.squared_errors([torch.zeros(1)], [torch.zeros(1)] * 2)
