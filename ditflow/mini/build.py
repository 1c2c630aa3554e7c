"""The architecture of the embedded tiny models, in diffusers' own classes, with random weights.

64x64 pixels, 17 frames: latents 5x16x16 with 16 channels, 8x8 patches, 320 video tokens. Three kinds, like released
models: `mini-rotary` (CogVideoX-5B: rotary embedding, DPM scheduler), `mini-additive` (CogVideoX-2B: sin-cos embedding,
DDIM) and `mini-wan` (Wan 2.1: text by cross-attention, flow matching). `ditflow.mini.training` makes the weights in
`weights/`.
"""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from ditflow.mini.world import VOCABULARY

FRAMES, HEIGHT, WIDTH = 17, 64, 64
TEXT_TOKENS = 32
LAYERS = 6
_TEXT_DIM = 64
_TEXT_ENCODER = {
    "vocab_size": 256,
    "d_model": _TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


def build_pipeline(
    *, rotary: bool, layers: int = LAYERS, temporal_patch: int | None = None, seed: int = 0
) -> CogVideoXPipeline:
    """Build a tiny CogVideoX with random weights from `seed`; `temporal_patch` 2 is the layout of CogVideoX 1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CogVideoXPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=T5EncoderModel(T5Config(**_TEXT_ENCODER)),
            vae=_vae(),
            transformer=_transformer(rotary, layers, temporal_patch),
            scheduler=_scheduler(rotary),
        )


def build_wan_pipeline(*, layers: int = LAYERS, seed: int = 0) -> WanPipeline:
    """Build a tiny Wan 2.1 with random weights from `seed`; its VAE compresses 4x in space, not 8x as the released."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**_TEXT_ENCODER)),
            vae=AutoencoderKLWan(
                base_dim=16,
                z_dim=16,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[True, True],
                latents_mean=[0.0] * 16,
                latents_std=[1.0] * 16,
                scale_factor_spatial=4,
            ),
            transformer=WanTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=32,
                text_dim=_TEXT_DIM,
                freq_dim=64,
                ffn_dim=512,
                num_layers=layers,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def build_tokenizer() -> T5Tokenizer:
    """Whole words of the world's vocabulary; letters for any other word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -1.0) for word in sorted(VOCABULARY)]
    letters = [(letter, -10.0) for letter in string.ascii_lowercase + string.digits + ".,-'"]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=TEXT_TOKENS)


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
