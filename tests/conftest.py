"""Shapes are checked in every test: jaxtyping's annotations become runtime checks before ditflow is imported."""

from jaxtyping import install_import_hook

install_import_hook("ditflow", "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import FRAMES, KINDS, SIZE, tiny_backbone  # noqa: E402

from ditflow.backbones.cogvideox import CogVideoX  # noqa: E402


@pytest.fixture(scope="session", params=KINDS)
def backbone(request) -> CogVideoX:
    return tiny_backbone(request.param)


@pytest.fixture(scope="session")
def rotary_backbone() -> CogVideoX:
    return tiny_backbone("rotary")


@pytest.fixture(scope="session")
def moving_video() -> np.ndarray:
    """Nine frames of a texture that slides two pixels a frame."""
    texture = np.random.default_rng(0).integers(0, 256, (SIZE // 4, SIZE // 2, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((4, 4, 1), np.uint8))
    return np.stack([texture[:, 2 * t : 2 * t + SIZE] for t in range(FRAMES)])


# Tiny matrices: threads cost more than they give, and sums keep one order on every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
