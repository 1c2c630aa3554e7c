"""Compression of position offsets: the requested error, by an exact or a truncated decomposition."""

import pytest
import torch

from ditflow.banks import compression
from ditflow.banks.compression import StepOffsets


def smooth(steps: int, tokens: int, channels: int, rank: int, noise: float) -> torch.Tensor:
    """Values of a known rank, with some noise on them."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(tokens, rank, generator=generator)
    right = torch.randn(steps, channels, rank, generator=generator)
    values = left @ right.transpose(1, 2)
    return values + noise * values.std() * torch.randn(values.shape, generator=generator)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "large"])
@pytest.mark.parametrize("error", [0.01, 0.1])
def test_the_error_is_kept_with_the_least_rank(monkeypatch, exact, error):
    monkeypatch.setattr(compression, "_MAX_EXACT_RANK", 1500 if exact else 10)
    values = smooth(steps=4, tokens=300, channels=40, rank=3, noise=error / 20)
    kept = StepOffsets(whole=values).compressed(error)
    assert kept.left is not None and kept.left.shape == (300, 3)
    reached = torch.stack([kept.at(step) for step in range(4)])
    assert ((reached - values).norm() / values.norm()).item() <= error
    assert kept.nbytes == 2 * 3 * (300 + 4 * 40)


def test_values_without_structure_are_kept_in_16_bits(monkeypatch):
    monkeypatch.setattr(compression, "_MAX_EXACT_RANK", 10)
    monkeypatch.setattr(compression, "_MAX_TRUNCATED_RANK", 8)
    values = torch.randn(4, 100, 30, generator=torch.Generator().manual_seed(1))
    kept = StepOffsets(whole=values).compressed(0.01)
    assert kept.whole is not None and kept.whole.dtype == torch.float16


def test_large_values_are_compressed_reproducibly_and_without_the_global_random_state(monkeypatch):
    monkeypatch.setattr(compression, "_MAX_EXACT_RANK", 10)
    values = smooth(steps=2, tokens=200, channels=40, rank=3, noise=0.001)
    before = torch.get_rng_state()
    one, other = (StepOffsets(whole=values).compressed(0.05) for _ in range(2))
    assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    assert torch.equal(torch.get_rng_state(), before)
