"""How a model lays out a clip: latent shape, token grid, valid sizes and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from ditflow.errors import SettingsError
from ditflow.types import TokenGrid


@dataclass(frozen=True)
class LatentLayout:
    """Latent shape, token grid and valid sizes of a model's clips, from its configuration alone.

    name: of the model, for messages. blocks: transformer blocks. channels: latent channels C.
    compression: of the VAE, along time and along each side. patch: of the transformer, along t, y and x.
    also_multiples_of: clip lengths that the VAE preserves besides `k * compression[0] + 1`; 0: none.
    trained_size: frames, height and width in pixels.
    """

    name: str
    blocks: int
    channels: int
    compression: tuple[int, int]
    patch: tuple[int, int, int]
    trained_size: tuple[int, int, int]
    also_multiples_of: int = 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Return the shape [1, F, C, h, w] of a clip's latents; SettingsError for an invalid size."""
        spatial = self.compression[1]
        for side, pixels, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            multiple = spatial * patch
            if pixels < multiple or pixels % multiple:
                near = max(multiple, round(pixels / multiple) * multiple)
                rule = f"a multiple of {multiple} for {self.name} (VAE {spatial} x patch {patch})"
                raise SettingsError(side, pixels, f"{rule}; the nearest is {near}")
        return (1, self._latent_frames(frames), self.channels, height // spatial, width // spatial)

    def grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        """Return the token grid of latents [1, F, C, h, w]."""
        _, frames, _, height, width = latent_shape
        return TokenGrid(frames // self.patch[0], height // self.patch[1], width // self.patch[2])

    def frames_of_tokens(self, frames: int) -> list[list[int]]:
        """Return the video frames that each token frame stands for.

        The VAE is causal: its first latent frame is the first video frame alone, and every further one the next
        `compression[0]` frames; a clip whose length is a multiple of the compression has no such first frame. Latent
        frames are padded at the beginning to whole temporal patches.
        """
        temporal, depth = self.compression[0], self.patch[0]
        first = frames % temporal or temporal
        groups = [[*range(first)]] + [[*range(at, at + temporal)] for at in range(first, frames, temporal)]
        groups = groups[:1] * (-len(groups) % depth) + groups
        return [sorted({*chain.from_iterable(groups[n : n + depth])}) for n in range(0, len(groups), depth)]

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise SettingsError for a guidance block that the model does not have."""
        if max(blocks) >= self.blocks:
            raise SettingsError("blocks", max(blocks), f"0 to {self.blocks - 1} for {self.name}")

    def _latent_frames(self, frames: int) -> int:
        """Return the latent frames of a clip, padded to whole temporal patches.

        Lengths that the VAE does not preserve are refused.
        """
        temporal, depth = self.compression[0], self.patch[0]
        if not self._is_preserved(frames):
            other = f", or a multiple of {self.also_multiples_of}," if self.also_multiples_of else ""
            near = self._nearest_lengths(frames)
            rule = f"{temporal}k + 1 frames{other} for {self.name}'s VAE"
            raise SettingsError("frames", frames, f"{rule}; near are {near[0]} and {near[1]}")
        latent_frames = -(-frames // temporal)
        return -(-latent_frames // depth) * depth

    def _is_preserved(self, frames: int) -> bool:
        """Return whether a clip of this length has it again after encoding and decoding."""
        also = self.also_multiples_of
        return frames >= 2 and (frames % self.compression[0] == 1 or (also > 0 and frames % also == 0))

    def _nearest_lengths(self, frames: int) -> list[int]:
        """Return the next shorter and the next longer valid length, or the two shortest of all."""
        temporal = self.compression[0]
        lengths = [n for n in range(frames - temporal, max(frames, 0) + 3 * temporal) if self._is_preserved(n)]
        below, above = [n for n in lengths if n < frames], [n for n in lengths if n > frames]
        return [*below[-1:], *above][:2]
