"""What was learned in every guided step, kept small: neighbouring steps and tokens have learned alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StepValues:
    """Values [S, d] of every step, whole, or as the product of two thin factors over tokens and over all steps.

    whole: [n, S, d], or else left: [S, r] and right: [n, d, r]. Any precision; `at` computes in fp32.
    """

    whole: Float[Tensor, "steps tokens channels"] | None = None
    left: Float[Tensor, "tokens rank"] | None = None
    right: Float[Tensor, "steps channels rank"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Steps, tokens and channels."""
        if self.whole is not None:
            steps, tokens, channels = self.whole.shape
            return steps, tokens, channels
        assert self.left is not None and self.right is not None
        return self.right.shape[0], self.left.shape[0], self.right.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Size of what is kept."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def at(self, step: int) -> Float[Tensor, "tokens channels"]:
        """Return the values of one step."""
        if self.whole is not None:
            return self.whole[step].float()
        assert self.left is not None and self.right is not None
        return self.left.float() @ self.right[step].float().T

    def every_step(self) -> Float[Tensor, "steps tokens channels"]:
        """Return the values of all steps."""
        return torch.stack([self.at(step) for step in range(self.shape[0])])

    def compacted(self, error: float) -> StepValues:
        """Return the smallest form whose relative error (of the Frobenius norm, over all steps) is at most `error`."""
        values = self.every_step()
        forms = [StepValues(whole=values.half()), _factors(values, error)]
        close = [form for form in forms if _relative_error(form, values) <= error]
        return min([*close, StepValues(whole=values)], key=lambda form: form.nbytes)


def _factors(values: Float[Tensor, "steps tokens channels"], error: float) -> StepValues:
    """Return the 16-bit factors of least rank that leave at most nine tenths of the error to the rank, the rest to the
    precision."""
    steps, _, channels = values.shape
    matrix = values.transpose(0, 1).flatten(1)
    u, s, v = _singular(matrix)
    whole = matrix.double().square().sum()
    left_out = (whole - s.double().square().cumsum(0)).clamp(min=0).sqrt()
    rank = min(int((left_out > 0.9 * error * whole.sqrt()).sum()) + 1, len(s))
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, v[:, :rank] * root
    return StepValues(left=left.half(), right=right.unflatten(0, (steps, channels)).half())


def _singular(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors and values of a matrix; of a large one, which would take hours, the first ones."""
    if min(matrix.shape) <= _EXACT_RANK:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh.T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # it begins with random directions: always the same
        return torch.svd_lowrank(matrix, q=_MOST_RANK, niter=4)


_EXACT_RANK, _MOST_RANK = 1500, 128


def _relative_error(form: StepValues, values: Float[Tensor, "steps tokens channels"]) -> float:
    wrong = sum((form.at(step) - value).square().sum().item() for step, value in enumerate(values))
    size = values.square().sum().item()
    return (wrong / size) ** 0.5 if size else float(wrong > 0)
