"""DiTFlow: training-free motion transfer with video diffusion transformers (arXiv 2412.07776)."""

from ditflow import backbones
from ditflow.banks.bank import MotionBank
from ditflow.motion.reference import MotionReference, extract_motion
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import learn_bank, transfer_latents, transfer_motion

__all__ = [
    "MethodSettings",
    "MotionBank",
    "MotionReference",
    "SamplingSettings",
    "backbones",
    "extract_motion",
    "learn_bank",
    "transfer_latents",
    "transfer_motion",
]
