"""The CogVideoX backbone against diffusers' own pipeline and modules."""

import numpy as np
import pytest
import torch
from tiny import FRAMES, LEVEL, SIZE, own_position, tiny_backbone

from ditflow.settings import ExecutionSettings, SamplingSettings
from ditflow.transfer import transfer_motion
from ditflow.types import KeysValues

BLOCKS = (0, 1)


def noise(backbone, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(backbone.layout.latent_shape(frames, SIZE, SIZE))


@pytest.mark.parametrize("kind", ["rotary", "additive", "temporal-patch"])
def test_plain_generation_equals_diffusers_own_pipeline(kind):
    backbone = tiny_backbone(kind)
    sampling = SamplingSettings(steps=4, guidance_scale=3.0, dynamic_guidance_scale=kind == "rotary")
    from ditflow.settings import MethodSettings

    ours = transfer_motion(
        backbone,
        "a red ball",
        size=(FRAMES, SIZE, SIZE),
        method=MethodSettings("none"),
        sampling=sampling,
        seed=3,
    )
    frames = backbone.pipeline(
        prompt="a red ball",
        negative_prompt="",
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        guidance_scale=3.0,
        use_dynamic_cfg=kind == "rotary",
        max_sequence_length=backbone.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    assert ours.video.shape == (FRAMES, SIZE, SIZE, 3)
    assert np.abs(ours.video - np.round(frames * 255)).max() <= 1


def test_serial_and_batched_guidance_agree(backbone):
    latents, position = noise(backbone), own_position(backbone, backbone.layout.grid(noise(backbone).shape))
    embeds = [backbone.condition(p) for p in ("a red ball", "")]
    serial = tiny_backbone(backbone.name.removeprefix("tiny-"), execution=ExecutionSettings(cfg="serial"))
    for one, other in zip(
        backbone.predict(latents, LEVEL, embeds, position),
        serial.predict(latents, LEVEL, embeds, position),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_captured_queries_and_keys_are_those_of_diffusers_processor(backbone, monkeypatch):
    """Record what diffusers' own processor gives to scaled_dot_product_attention, and compare."""
    latents, embeds = noise(backbone), backbone.condition("a red ball")
    grid = backbone.layout.grid(latents.shape)
    position = own_position(backbone, grid)
    captured = backbone.capture(latents, LEVEL, embeds, BLOCKS, position)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        seen.append((query, key))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    rotary = (position["query_cos"], position["query_sin"]) if "query_cos" in position else None
    with torch.no_grad():
        text = backbone.transformer.config.max_text_seq_length
        backbone.transformer(latents, embeds, torch.tensor([500]), image_rotary_emb=rotary)
    for block in BLOCKS:
        for ours, theirs in zip((captured[block].query, captured[block].key), seen[block], strict=True):
            expected = theirs[0, :, text:].transpose(0, 1).flatten(1)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_captured_features_are_the_blocks_output(backbone):
    """Record what diffusers' own blocks hand on, and compare."""
    latents, embeds = noise(backbone), backbone.condition("a red ball")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    captured = backbone.capture(latents, LEVEL, embeds, BLOCKS, position, what="features")
    outputs = []
    blocks = backbone.transformer.transformer_blocks
    handles = [block.register_forward_hook(lambda _, __, output: outputs.append(output[0])) for block in blocks]
    rotary = (position["query_cos"], position["query_sin"]) if "query_cos" in position else None
    try:
        with torch.no_grad():
            backbone.transformer(latents, embeds, torch.tensor([500]), image_rotary_emb=rotary)
    finally:
        for handle in handles:
            handle.remove()
    for block in BLOCKS:
        torch.testing.assert_close(captured[block].tokens, outputs[block][0], rtol=1e-4, atol=1e-5)


def test_capturing_features_computes_nothing_behind_the_block(backbone):
    latents, embeds = noise(backbone), backbone.condition("")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    ran = []
    blocks = backbone.transformer.transformer_blocks
    handles = [block.register_forward_pre_hook(lambda m, *_: ran.append(m)) for block in blocks]
    try:
        backbone.capture(latents, LEVEL, embeds, (0,), position, what="features")
        assert ran == [blocks[0]]
    finally:
        for handle in handles:
            handle.remove()
    assert not blocks[0]._forward_hooks, "the model is as it was"


def test_checkpointing_changes_no_gradient_of_features(backbone):
    gradients, latents = [], noise(backbone).requires_grad_()
    for checkpointing in ("off", "on"):
        model = tiny_backbone(
            backbone.name.removeprefix("tiny-"), execution=ExecutionSettings(checkpointing=checkpointing)
        )
        position = own_position(model, model.layout.grid(latents.shape))
        captured = model.capture(latents, LEVEL, model.condition(""), (1,), position, what="features")
        gradients += torch.autograd.grad(captured[1].tokens.square().sum(), latents)
    torch.testing.assert_close(*gradients)


def test_capture_computes_nothing_behind_the_guidance_block(backbone):
    latents, embeds = noise(backbone), backbone.condition("")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    ran = []
    blocks = backbone.transformer.transformer_blocks
    behind = [
        blocks[0].attn1.to_v,
        blocks[0].attn1.to_out[0],
        blocks[0].ff,
        blocks[1],
        backbone.transformer.proj_out,
    ]
    handles = [module.register_forward_hook(lambda m, *_: ran.append(m)) for module in behind]
    try:
        backbone.capture(latents, LEVEL, embeds, (0,), position)
        assert ran == []
        backbone.predict(latents, LEVEL, [embeds], position)
        assert len(ran) == len(behind)
    finally:
        for handle in handles:
            handle.remove()


def test_first_keys_values_computes_two_projections_of_block_0(backbone):
    latents, embeds = noise(backbone), backbone.condition("")
    ran = []
    attention = backbone.transformer.transformer_blocks[0].attn1
    names = {
        attention.to_q: "q",
        attention.to_k: "k",
        attention.to_v: "v",
        backbone.transformer.proj_out: "out",
    }
    handles = [module.register_forward_hook(lambda m, *_: ran.append(names[m])) for module in names]
    try:
        keys_values = backbone.first_keys_values(latents, LEVEL, embeds)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["k", "v"]
    assert keys_values.key.shape == (1, backbone.layout.grid(latents.shape).tokens, 128)


def test_injecting_a_videos_own_keys_and_values_changes_nothing(backbone):
    latents, embeds = noise(backbone), backbone.condition("a red ball")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    own = backbone.first_keys_values(latents, LEVEL, embeds)
    plain = backbone.predict(latents, LEVEL, [embeds], position)[0]
    torch.testing.assert_close(
        backbone.predict(latents, LEVEL, [embeds], position, own)[0], plain, rtol=1e-4, atol=1e-5
    )
    other = KeysValues(own.key, own.value.flip(1))
    assert (backbone.predict(latents, LEVEL, [embeds], position, other)[0] - plain).abs().max() > 1e-3


def test_injection_reaches_both_guidance_branches(backbone):
    latents = noise(backbone)
    embeds = [backbone.condition(p) for p in ("a red ball", "")]
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    other = backbone.first_keys_values(noise(backbone), LEVEL, embeds[0])
    plain = backbone.predict(latents, LEVEL, embeds, position)
    injected = backbone.predict(latents, LEVEL, embeds, position, other)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, injected, strict=True))


def test_nothing_of_ours_stays_in_the_model(backbone):
    transformer = backbone.transformer
    processors = [block.attn1.processor for block in transformer.transformer_blocks]
    weights = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    latents, embeds = noise(backbone).requires_grad_(), backbone.condition("")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    captured = backbone.capture(latents, LEVEL, embeds, BLOCKS, position)
    captured[1].key.sum().backward()
    with pytest.raises(RuntimeError):
        backbone.predict(torch.randn(1, 3, 5, 8, 8), LEVEL, [embeds], position)
    assert [block.attn1.processor for block in transformer.transformer_blocks] == processors
    assert transformer.patch_embed.use_positional_embeddings == (
        not transformer.config.use_rotary_positional_embeddings
    )
    assert not transformer.patch_embed._forward_hooks
    assert not transformer.gradient_checkpointing
    assert all(torch.equal(weights[name], weight) for name, weight in transformer.state_dict().items())
    assert all(weight.grad is None for weight in transformer.parameters())


def test_every_part_of_the_position_gets_its_own_gradient(backbone):
    latents, embeds = noise(backbone), backbone.condition("")
    position = own_position(backbone, backbone.layout.grid(latents.shape))
    position = {part: value.requires_grad_() for part, value in position.items()}
    captured = backbone.capture(latents, LEVEL, embeds, (1,), position)
    (captured[1].query * captured[1].key.roll(3, 0)).sum().backward()
    gradients = [value.grad for value in position.values()]
    assert all(gradient is not None and gradient.abs().min(dim=1).values.max() > 0 for gradient in gradients)
    assert len({gradient.norm().item() for gradient in gradients}) == len(gradients)


@pytest.mark.parametrize("blocks", [(1,), (0, 1)])
def test_checkpointing_gives_the_same_gradient(backbone, blocks):
    checkpointed = tiny_backbone(backbone.name.removeprefix("tiny-"), execution=ExecutionSettings(checkpointing="on"))
    gradients = []
    start = noise(backbone)
    for model in (backbone, checkpointed):
        latents = start.clone().requires_grad_()
        position = own_position(model, model.layout.grid(latents.shape))
        position = {part: value.requires_grad_() for part, value in position.items()}
        captured = model.capture(latents, LEVEL, model.condition(""), blocks, position)
        sum((captured[b].query * captured[b].key.roll(3, 0)).sum() for b in blocks).backward()
        gradients.append([latents.grad, *(value.grad for value in position.values())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_every_block_before_the_captured_one():
    checkpointed = tiny_backbone("rotary", execution=ExecutionSettings(checkpointing="on"))
    calls = []
    checkpointed.transformer.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(0))
    latents = noise(checkpointed).requires_grad_()
    position = own_position(checkpointed, checkpointed.layout.grid(latents.shape))
    captured = checkpointed.capture(latents, LEVEL, checkpointed.condition(""), (1,), position)
    assert len(calls) == 1
    captured[1].key.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(("frames", "latent_frames"), [(5, 2), (9, 3), (13, 4), (17, 5), (24, 6), (25, 7), (49, 13)])
def test_latents_and_decoded_frames_agree_for_every_allowed_length(rotary_backbone, frames, latent_frames):
    video = np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    latents = rotary_backbone.encode_video(video)
    assert latents.shape == rotary_backbone.layout.latent_shape(frames, 16, 16)
    assert latents.shape[1] == latent_frames
    assert rotary_backbone.decode_latents(latents, frames).shape == video.shape


@pytest.mark.parametrize("frames", [1, 3, 12, 20, 22])
def test_lengths_that_the_vae_would_change_are_refused_with_near_ones(rotary_backbone, frames):
    with pytest.raises(ValueError, match=rf"frames: {frames} is not valid.*near are"):
        rotary_backbone.layout.latent_shape(frames, 16, 16)


def test_sizes_that_do_not_divide_are_refused_with_the_nearest(rotary_backbone):
    with pytest.raises(ValueError, match="height: 60 is not valid.*multiple of 8.*nearest is 64"):
        rotary_backbone.layout.latent_shape(9, 60, 64)


def test_temporal_patches_pad_in_front_and_lose_nothing():
    backbone = tiny_backbone("temporal-patch")
    video = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    latents = backbone.encode_video(video)
    assert latents.shape[1] == 4
    assert torch.equal(latents[:, 0], latents[:, 1])
    assert backbone.layout.grid(latents.shape).frames == 2
    plain = tiny_backbone("rotary")
    plain.pipeline.vae.load_state_dict(backbone.pipeline.vae.state_dict())
    expected = plain.decode_latents(latents[:, 1:], 9)
    assert np.array_equal(backbone.decode_latents(latents, 9), expected)


def test_a_block_that_the_model_lacks_is_named(backbone):
    latents = noise(backbone)
    with pytest.raises(ValueError, match="blocks: 7 is not valid.*0 to 1"):
        backbone.capture(
            latents, LEVEL, backbone.condition(""), (7,), own_position(backbone, backbone.layout.grid(latents.shape))
        )
