"""Muon for linear layers and convolutions, AdamW for everything else, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for weights of two or more axes (the first against all others).

    K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch's own does not accept convolutions. Updates
    have the root mean square that Adam's usually have, 0.2 of the learning rate, so that one rate serves both.
    """

    def __init__(self, weights: Iterable[Tensor], momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weight: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - momentum)
        step = orthogonalised(gradient.lerp(state["momentum"], momentum).flatten(1))
        weight.mul_(1 - lr * weight_decay)
        weight.add_(step.view_as(weight), alpha=-0.2 * lr * math.sqrt(max(step.shape)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return approximately U V^T of a matrix U S V^T: five Newton-Schulz iterations.

    They bring the singular values into 0.7 to 1.2.
    """
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    flat = flat / (flat.norm() + 1e-7)
    for _ in range(5):
        square = flat @ flat.T
        flat = 3.4445 * flat + (-4.7750 * square + 2.0315 * square @ square) @ flat
    return flat if matrix.shape[0] <= matrix.shape[1] else flat.T


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the weights of linear layers and convolutions, and AdamW for all others."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    of_layers = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    matrices = [weight for weight in model.parameters() if id(weight) in of_layers]
    others = [weight for weight in model.parameters() if id(weight) not in of_layers]
    return [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model that holds the moving average of its weights, starting with the present ones.

    The average becomes d a + (1 - d) w with each `update_parameters`, where d rises from 0.1 to `decay`.
    """

    def average(mean: Tensor, weight: Tensor, updates: Tensor | int) -> Tensor:
        return mean.lerp(weight, 1 - min(decay, int(updates) / (int(updates) + 9)))

    copied = AveragedModel(model, avg_fn=average)
    copied.update_parameters(model)  # the first call copies the weights and only counts
    return copied
