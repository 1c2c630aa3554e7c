"""The frames of reference videos that were used, as small videos beside the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ditflow.media.video import encode_video
from pipeline.job import Job, References
from pipeline.report.folder import ReportFolder
from pipeline.report.rows import UsedReference
from pipeline.stages.read import ChangedInputError, read_clip
from pipeline.store import StoreError, redact


class ReferenceClips:
    """Writes each reference once for all rows that use the same frames of it, at the size at which they were used."""

    def __init__(self, folder: ReportFolder, job: Job, on_step: Callable[[str], None]):
        self._folder, self._job, self._on_step = folder, job, on_step

    def write(self, references: Mapping[str, UsedReference], read: bool) -> dict[str, str | None]:
        """Return a note for every reference that the page has no video of, None for those that it has.

        read: whether to read those that are not there yet.
        """
        notes: dict[str, str | None] = {}
        for number, (its_id, reference) in enumerate(references.items(), 1):
            name = f"references/{its_id}.mp4"
            if self._folder.has(name):
                notes[its_id] = None
            elif not read:
                notes[its_id] = "The report was made without reference videos (--no-references)."
            else:
                self._on_step(f"reference {number} of {len(references)}")
                notes[its_id] = self._write(name, reference)
        return notes

    def _write(self, name: str, reference: UsedReference) -> str | None:
        """Write a reference's frames, or return why there are none: a report is worth having without."""
        settings = replace(self._job.references, **_known(reference.video))
        try:
            clip = read_clip(reference.source, settings, self._job)
            video = encode_video(clip.frames, clip.fps)
        except (ValueError, ChangedInputError, StoreError, OSError) as error:  # VideoErrors, and names that are none
            self._lose_patience(error)
            return redact(f"The reference cannot be shown: {error}")
        self._folder.put(name, video)
        return None

    def _lose_patience(self, error: Exception) -> None:
        """Wait once for storage that is away, not once for each of thousands of references."""
        if isinstance(error, StoreError) and error.transient:
            self._job = replace(self._job, faults=replace(self._job.faults, storage_patience_s=0.0))


def _known(video: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that choose frames; later releases may know more of them."""
    return {key: value for key, value in video.items() if key in References.__dataclass_fields__}
