"""Adam, and Adam-mini (one second moment per column)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class AdamMini(torch.optim.Optimizer):
    """Adam with one second moment for each column of a variable [S, N], the mean over its rows.

    Adam moves every value by about the learning rate, however small its gradient. Here the size of a row's step is
    proportional to its gradient: over all rows, the root mean square of the first step is the learning rate. After
    Adam-mini (arXiv 2406.16793), which has one second moment per block of weights.
    """

    def __init__(
        self,
        variables: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(variables, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the variables; `closure` is not supported."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for variable in group["params"]:
                assert variable.grad is not None, "backward() first"
                self._step(variable, variable.grad, self.state[variable], group)

    def _step(self, variable: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        of_mean, of_square = group["betas"]
        if not state:
            state |= {"steps": 0, "mean": torch.zeros_like(variable), "square": torch.zeros_like(variable[:1])}
        state["steps"] += 1
        state["mean"].lerp_(gradient, 1 - of_mean)
        state["square"].lerp_(gradient.square().mean(dim=0, keepdim=True), 1 - of_square)
        mean = state["mean"] / (1 - of_mean ** state["steps"])
        square = state["square"] / (1 - of_square ** state["steps"])
        variable -= group["lr"] * mean / (square.sqrt() + group["eps"])


OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adam-mini": AdamMini}
