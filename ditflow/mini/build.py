"""The embedded tiny CogVideoX models, built by code through diffusers' own classes.

64x64 pixels, 17 frames: latents 5x16x16 with 16 channels, 8x8 patches, 320 video tokens. Two kinds, like the released
models: `mini-rotary` (5B: rotary embedding, DPM scheduler) and `mini-additive` (2B: sin-cos embedding, DDIM).
The weights are random, drawn from a fixed seed: the models move pixels, they do not yet know what a video looks like.
"""

from __future__ import annotations

import os
import shutil
import string
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils.logging import disable_progress_bar

from ditflow.cache import cache_folder
from ditflow.mini.world import VOCABULARY

FRAMES, HEIGHT, WIDTH = 17, 64, 64
TEXT_TOKENS = 32
LAYERS = 6
_TEXT_DIM = 64
_FORMAT = 2
"""Raised whenever the recipe below changes, so that cached folders of older recipes are not used."""


def mini_folder(name: str) -> Path:
    """Return the folder of an embedded model, built on the first call (about a second)."""
    kind = "mini-rotary" if name == "mini" else name
    folder = cache_folder() / f"{kind}-v{_FORMAT}"
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        disable_progress_bar()
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        build_pipeline(rotary=kind == "mini-rotary").save_pretrained(temporary)
        _publish(temporary, folder)
    return folder


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place; when another process was faster, its folder is the same as ours."""
    try:
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        assert (folder / "model_index.json").is_file(), f"{folder} is in the way: remove it"


def build_pipeline(
    *, rotary: bool, layers: int = LAYERS, temporal_patch: int | None = None, seed: int = 0
) -> CogVideoXPipeline:
    """Build a tiny CogVideoX with random weights from `seed`; `temporal_patch` 2 is the layout of CogVideoX 1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CogVideoXPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(),
            vae=_vae(),
            transformer=_transformer(rotary, layers, temporal_patch),
            scheduler=_scheduler(rotary),
        )


def _tokenizer() -> T5Tokenizer:
    """Whole words of the world's vocabulary; letters for any other word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -1.0) for word in sorted(VOCABULARY)]
    letters = [(letter, -10.0) for letter in string.ascii_lowercase + string.digits + ".,-'"]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=TEXT_TOKENS)


def _text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=256,
        d_model=_TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _vae() -> AutoencoderKLCogVideoX:
    """Compresses 4x in space and in time."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_height=HEIGHT,
        sample_width=WIDTH,
    )


def _transformer(rotary: bool, layers: int, temporal_patch: int | None) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=layers,
        text_embed_dim=_TEXT_DIM,
        time_embed_dim=64,
        sample_width=WIDTH // 4,
        sample_height=HEIGHT // 4,
        sample_frames=FRAMES,
        patch_size_t=temporal_patch,
        patch_bias=temporal_patch is None,
        max_text_seq_length=TEXT_TOKENS,
        spatial_interpolation_scale=1.0,
        use_rotary_positional_embeddings=rotary,
    )


def _scheduler(rotary: bool) -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
    """Build the released models' noise schedules (5B with DPM, 2B with DDIM)."""
    scheduler = CogVideoXDPMScheduler if rotary else CogVideoXDDIMScheduler
    return scheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
    )
