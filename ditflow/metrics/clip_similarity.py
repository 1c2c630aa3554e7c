"""CLIP similarities: of a video's frames to its prompt, and of neighbouring frames.

Axis letters: T frames, H rows, W columns of pixels.

The weights are the user's: a folder in the layout of transformers, such as ViT-B/32, with which results are published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from safetensors import SafetensorError
from torch import Tensor

from ditflow.backbones.contract import TextLimit
from ditflow.errors import SettingsError
from ditflow.metrics.base import EvaluatedClip, MetricSettings, Need
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.tracks import check_rgb_frames

BATCH = 32
"""Frames per batch of the image encoder: some 0.15 GB for ViT-B/32."""

PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("tokenizer.json", "vocab.json and merges.txt"),
    ("preprocessor_config.json", "processor_config.json"),
)
"""Parts of a CLIP folder, each with its alternative files or pairs of files."""


class ClipModel:
    """A CLIP model from a local folder, in fp32 on a torch device.

    folder: written by `save_pretrained` of transformers' CLIPModel, tokenizer and image processor, or a hub download.
    Only safetensors are read, no code of the folder is run, and nothing is downloaded. Frames are resized,
    centre-cropped and normalised by PIL as in the folder's preprocessor_config.json, identically on every machine.

    Raises MetricInputError if the folder is missing, incomplete or not a CLIP folder.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        # Late, here and below: transformers takes seconds to import, and every job imports all metrics.
        from transformers import AutoTokenizer

        path = Path(folder)
        _check_folder(path)
        self.device = torch.device(device)
        self._model = _weights(path).to(self.device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self._processor = _image_processor().from_pretrained(path, local_files_only=True)
        _check_vocabulary(path, self._tokenizer, self._model.config.text_config)

    @torch.no_grad()
    def embed_frames(self, frames: np.ndarray) -> Float64[Tensor, "frames embedding"]:
        """Return the normalised embeddings of frames uint8 [T, H, W, 3] RGB, on the CPU."""
        _check_count(frames, 1)
        batches = [self._embed_batch(frames[start : start + BATCH]) for start in range(0, len(frames), BATCH)]
        return _normalize(torch.cat(batches))

    @torch.no_grad()
    def embed_prompt(self, prompt: str) -> Float64[Tensor, " embedding"]:
        """Return the normalised embedding of a prompt, on the CPU.

        It is truncated to the text encoder's positions: 77 in all released CLIPs, start and end tokens included.
        """
        positions = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([prompt], truncation=True, max_length=positions, return_tensors="pt")
        encoded = self._model.text_model(input_ids=tokens["input_ids"].to(self.device))
        return _normalize(self._model.text_projection(encoded.pooler_output))[0]

    def _embed_batch(self, frames: np.ndarray) -> Tensor:
        pixels = self._processor(list(frames), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return self._model.visual_projection(
            self._model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        )


def read_text_limit(folder: str | Path) -> TextLimit:
    """Read the prompt length limit of a CLIP folder without its weights; MetricInputError for another folder."""
    from transformers import AutoConfig, AutoTokenizer

    path = Path(folder)
    _check_folder(path)
    positions = AutoConfig.from_pretrained(path, local_files_only=True).text_config.max_position_embeddings
    return TextLimit(positions, AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))


def prompt_similarity(model: ClipModel, frames: np.ndarray, prompt: str) -> float:
    """Return the mean cosine of the embeddings of frames, uint8 [T, H, W, 3] RGB, and of the prompt.

    The IQ of DiTFlow (arXiv 2412.07776), with ViT-B/32; published are 0.31 to 0.32 for CogVideoX-5B and all methods.
    Long prompts are truncated, see `ClipModel.embed_prompt`. The order of frames does not matter.

    Raises MetricInputError for frames of another type or shape, or none.
    """
    return float((model.embed_frames(frames) @ model.embed_prompt(prompt)).mean())


def frame_consistency(model: ClipModel, frames: np.ndarray) -> float:
    """Return the mean cosine of the embeddings of neighbouring frames, uint8 [T, H, W, 3] RGB; 1 for a static clip.

    Raises MetricInputError for frames of another type or shape, or fewer than 2.
    """
    _check_count(frames, 2)
    embeddings = model.embed_frames(frames)
    return float((embeddings[:-1] * embeddings[1:]).sum(dim=-1).mean())


def _normalize(embeddings: Tensor) -> Float64[Tensor, "rows embedding"]:
    return torch.nn.functional.normalize(embeddings.cpu().double(), dim=-1)


def _image_processor() -> Any:
    try:
        from transformers import CLIPImageProcessorPil
    except ImportError:  # transformers 4, where the processor of this name is the one without torchvision
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    return CLIPImageProcessorPil


def _weights(folder: Path) -> Any:
    from transformers import CLIPModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it is finished at once
    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise MetricInputError(
            f"the weights in {folder} do not load ({error}). Most likely the file is damaged, or belongs to another "
            "config.json; copy the folder again.",
            code="clip-weights-damaged",
            key="metrics.clip",
        ) from error
    if info["missing_keys"]:
        raise MetricInputError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors, such as "
            f"{min(info['missing_keys'])}, which would be left random. Most likely they are of one half of CLIP only; "
            "save the whole CLIPModel.",
            code="clip-weights-incomplete",
            key="metrics.clip",
        )
    return model


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise MetricInputError(
            f"{folder} is not a folder, expected one with a CLIP model. Models are never downloaded; check the path.",
            code="clip-folder-missing",
            key="metrics.clip",
        )
    _check_parts(folder)
    kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if kind != "clip":
        raise MetricInputError(
            f"{folder} is not a CLIP folder: its config.json has the model_type {kind!r}, expected 'clip'. Other "
            "models have other scales; pass CLIP ViT-B/32 to compare with published results.",
            code="clip-folder-wrong-model",
            key="metrics.clip",
        )


def _check_parts(folder: Path) -> None:
    missing = [" or ".join(part) for part in PARTS if not any(_has(folder, files) for files in part)]
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if missing and all(part.startswith("model.safetensors") for part in missing) and pickles:
        raise MetricInputError(
            f"{folder} has its weights only as {pickles[0]}, expected model.safetensors: pickles are not read because "
            "unpickling runs code that they contain. If you trust it, convert it by "
            "CLIPModel.from_pretrained(folder).save_pretrained(folder).",
            code="clip-weights-pickled",
            key="metrics.clip",
        )
    if missing:
        raise MetricInputError(
            f"{folder} is not a CLIP folder: it lacks {'; '.join(missing)}. Pass a folder into which CLIPModel, "
            "tokenizer and image processor were saved, or a complete hub download.",
            code="clip-folder-incomplete",
            key="metrics.clip",
        )


def _has(folder: Path, files: str) -> bool:
    return all((folder / file).is_file() for file in files.split(" and "))


def _check_vocabulary(folder: Path, tokenizer: Any, text: Any) -> None:
    # Without the model's end token in a prompt, CLIP silently embeds the start token alone. 2 is the id in older
    # releases, for which transformers takes the largest id instead.
    if len(tokenizer) > text.vocab_size or text.eos_token_id not in (2, tokenizer.eos_token_id):
        raise MetricInputError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens with {tokenizer.eos_token_id} at the end, its text "
            f"encoder {text.vocab_size} with {text.eos_token_id}. Most likely they are of two models; copy both from "
            "one.",
            code="clip-tokenizer-mismatch",
            key="metrics.clip",
        )


def _check_count(frames: np.ndarray, minimum: int) -> None:
    check_rgb_frames(frames)
    if len(frames) < minimum:
        raise MetricInputError(
            f"{len(frames)} frames came, expected {minimum} or more: one frame has no neighbour, and none has no mean. "
            "Check how the clip was decoded.",
            code="frames-too-few",
        )


@dataclass(frozen=True)
class PromptSimilarity:
    """CLIP similarity of a clip's frames and its prompt."""

    model: ClipModel

    name: ClassVar[str] = "prompt_similarity"
    needs: ClassVar[tuple[Need, ...]] = ("prompt",)
    settings: ClassVar[tuple[str, ...]] = ("clip",)

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> PromptSimilarity:
        """Return the metric with CLIP loaded."""
        return cls(_load_clip(settings))

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return prompt_similarity."""
        assert clip.prompt is not None
        return {"prompt_similarity": prompt_similarity(self.model, clip.generated, clip.prompt)}


@dataclass(frozen=True)
class FrameConsistency:
    """CLIP similarity of a clip's neighbouring frames."""

    model: ClipModel

    name: ClassVar[str] = "frame_consistency"
    needs: ClassVar[tuple[Need, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ("clip",)

    @classmethod
    def from_settings(cls, settings: MetricSettings) -> FrameConsistency:
        """Return the metric with CLIP loaded."""
        return cls(_load_clip(settings))

    def __call__(self, clip: EvaluatedClip) -> dict[str, float]:
        """Return frame_consistency."""
        return {"frame_consistency": frame_consistency(self.model, clip.generated)}


def _load_clip(settings: MetricSettings) -> ClipModel:
    if settings.clip is None:
        raise SettingsError("clip", None, "a folder with a CLIP model, for prompt_similarity and frame_consistency")
    return _load(settings.clip, settings.device)


@cache
def _load(folder: str, device: str) -> ClipModel:
    """Load a CLIP model once for all metrics of a process."""
    return ClipModel(folder, device)
