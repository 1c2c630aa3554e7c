"""Motion banks by hand: small, sound, and quickly made."""

from typing import Any

import torch

from ditflow.banks.bank import BankHeader, MotionBank

GRID, SIZE = (3, 2, 2), (9, 16, 16)


def handmade_bank(move: tuple[int, int] = (1, 0), **header: Any) -> MotionBank:
    """A bank of two guided steps whose reference moves by `move` patches a latent frame, with changes of its header."""
    values = {
        "model": "mini",
        "model_revision": "0123",
        "grid": GRID,
        "steps": 4,
        "timesteps": (999, 749),
        "positions": "rotary",
        "optimize": "coordinates",
        "method": {"name": "ditflow", "optimize": "coordinates"},
        "prompt": "a ball",
        "losses": ((1.0, 0.5), (0.4, 0.25)),
        "provenance": {
            "size": list(SIZE),
            "fps": 8.0,
            "reference_fps": 16.0,
            "reference_uri": "file:///a.mp4",
            "seed": 7,
        },
    }
    tokens, patches = GRID[0] * GRID[1] * GRID[2], GRID[1] * GRID[2]
    changes = [{"query": torch.full((tokens, 3), 0.5), "key": torch.ones(tokens, 3)} for _ in range(2)]
    flow = torch.tensor(move, dtype=torch.int8).expand(GRID[0] - 1, patches, 2)
    return MotionBank.from_steps(BankHeader(**{**values, **header}), changes, None, flow)
