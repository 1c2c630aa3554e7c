"""Low-rank compression of the per-step position offsets; neighbouring steps and tokens have similar offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StepOffsets:
    """Offsets [S, d] of every step, either in full or as the product of two low-rank factors over tokens and steps.

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
        """The stored tensors by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def at(self, step: int) -> Float[Tensor, "tokens channels"]:
        """Return the offsets of one step."""
        if self.whole is not None:
            return self.whole[step].float()
        assert self.left is not None and self.right is not None
        return self.left.float() @ self.right[step].float().T

    def all_steps(self) -> Float[Tensor, "steps tokens channels"]:
        """Return the offsets of all steps."""
        return torch.stack([self.at(step) for step in range(self.shape[0])])

    def compressed(self, error: float) -> StepOffsets:
        """Return the smallest form whose relative error (Frobenius norm over all steps) is at most `error`."""
        values = self.all_steps()
        forms = [StepOffsets(whole=values.half()), _factorize(values, error)]
        close = [form for form in forms if _relative_error(form, values) <= error]
        return min([*close, StepOffsets(whole=values)], key=lambda form: form.nbytes)


def _factorize(values: Float[Tensor, "steps tokens channels"], error: float) -> StepOffsets:
    """Return 16-bit factors of the least rank that takes at most 90 % of the error; the rest is left to rounding."""
    steps, _, channels = values.shape
    matrix = values.transpose(0, 1).flatten(1)
    u, s, v = _svd(matrix)
    total = matrix.double().square().sum()
    residual = (total - s.double().square().cumsum(0)).clamp(min=0).sqrt()
    rank = min(int((residual > 0.9 * error * total.sqrt()).sum()) + 1, len(s))
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, v[:, :rank] * root
    return StepOffsets(left=left.half(), right=right.unflatten(0, (steps, channels)).half())


def _svd(matrix: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition; of a large matrix a truncated one, since all of it would take hours."""
    if min(matrix.shape) <= _MAX_EXACT_RANK:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh.T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # svd_lowrank starts from random directions
        return torch.svd_lowrank(matrix, q=_MAX_TRUNCATED_RANK, niter=4)


_MAX_EXACT_RANK, _MAX_TRUNCATED_RANK = 1500, 128


def _relative_error(form: StepOffsets, values: Float[Tensor, "steps tokens channels"]) -> float:
    squared_error = sum((form.at(step) - value).square().sum().item() for step, value in enumerate(values))
    squared_norm = values.square().sum().item()
    return (squared_error / squared_norm) ** 0.5 if squared_norm else float(squared_error > 0)
