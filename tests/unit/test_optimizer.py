"""Adam with one second moment for each column: what it does by hand, and where it is Adam."""

import pytest
import torch

from ditflow.sampling.optimizer import OPTIMIZERS, AdamMini


def moved(optimizer, start: torch.Tensor, gradients: list[torch.Tensor], rate: float = 0.1) -> torch.Tensor:
    variable = start.clone().requires_grad_()
    made = OPTIMIZERS[optimizer]([variable], lr=rate)
    for gradient in gradients:
        made.zero_grad()
        (variable * gradient).sum().backward()
        made.step()
    return variable.detach() - start


def test_a_first_step_is_the_rate_in_the_mean_square_and_goes_along_the_gradient():
    gradient = torch.tensor([[3.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
    moves = moved("adam-mini", torch.zeros(3, 2), [gradient])
    expected = -0.1 * gradient / gradient.square().mean(dim=0).sqrt()
    torch.testing.assert_close(moves, expected)
    assert moves.square().mean(dim=0).sqrt().tolist() == pytest.approx([0.1, 0.1])


def test_what_matters_little_moves_little_and_adam_moves_it_by_the_rate():
    gradient = torch.tensor([[1.0], [1e-3]])
    mini, plain = (moved(name, torch.zeros(2, 1), [gradient]) for name in ("adam-mini", "adam"))
    assert (mini[1] / mini[0]).item() == pytest.approx(1e-3)
    assert (plain[1] / plain[0]).item() == pytest.approx(1, rel=1e-4)


def test_it_is_adam_for_a_variable_of_one_row():
    gradients = list(torch.randn(7, 1, 3, generator=torch.Generator().manual_seed(1)))
    start = torch.zeros(1, 3)
    torch.testing.assert_close(moved("adam-mini", start, gradients), moved("adam", start, gradients))


def test_moments_decay_as_adams_do():
    """By hand over three steps: means of gradients and of mean squares, each without its start at zero."""
    gradients = list(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2)))
    mean, square, expected = torch.zeros(4, 2), torch.zeros(1, 2), torch.zeros(4, 2)
    for number, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square().mean(dim=0, keepdim=True)
        expected -= 0.1 * (mean / (1 - 0.9**number)) / (square / (1 - 0.999**number)).sqrt()
    torch.testing.assert_close(moved("adam-mini", torch.zeros(4, 2), gradients), expected)


def test_it_finds_the_bottom_of_a_bowl():
    target = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    variable = torch.zeros(2, 2, requires_grad=True)
    optimizer = AdamMini([variable], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (variable - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(variable.detach(), target, atol=0.02, rtol=0)
