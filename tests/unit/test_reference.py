"""Motion references: what is taken from the video, that a file keeps it bit by bit, and what it is refused for."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import FRAMES, SIZE

from ditflow.artifact import ArtifactError, write_artifact
from ditflow.backbones.contract import NoiseLevel
from ditflow.motion.reference import MotionReference, extract_motion
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import transfer_motion
from ditflow.types import TokenGrid

METHOD = MethodSettings("ditflow", blocks=(0, 1), guided_steps=1, iterations=1)


@pytest.fixture(scope="module")
def reference(backbone, moving_video) -> MotionReference:
    return extract_motion(backbone, moving_video, METHOD)


@pytest.fixture(scope="module")
def rotary_reference(rotary_backbone, moving_video) -> MotionReference:
    return extract_motion(rotary_backbone, moving_video, METHOD)


# ---------------------------------------------------------------------- extraction


def test_motionclones_reference_is_noised_once_to_two_fifths_of_the_timesteps(backbone, moving_video):
    method = MethodSettings("motionclone", blocks=(1,))
    motion = extract_motion(backbone, moving_video, method)
    latents = backbone.encode_video(moving_video)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = backbone.pipeline.scheduler.alphas_cumprod[400]
    noised = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
    grid, level = backbone.layout.grid(latents.shape), NoiseLevel(None, 400, 0.5)
    with torch.no_grad():
        captured = backbone.capture(noised.float(), level, backbone.condition(""), (1,))
    expected = method.make_loss().reference(captured[1], grid)
    torch.testing.assert_close(motion.payloads[1]["attention"], expected["attention"], rtol=1e-4, atol=1e-5)
    again = extract_motion(backbone, moving_video, method)
    assert torch.equal(motion.payloads[1]["attention"], again.payloads[1]["attention"])


def test_the_displacement_is_small_integers_of_every_pair_of_frames(reference):
    grid = reference.grid
    assert list(reference.payloads) == [0, 1]
    for payload in reference.payloads.values():
        displacement = payload["displacement"]
        assert displacement.dtype == torch.int8
        assert displacement.shape == (grid.frames, grid.frames, grid.patches, 2)
        found = displacement + grid.coordinates()
        assert (found >= 0).all() and (found < torch.tensor([grid.width, grid.height])).all()
    assert torch.equal(reference.displacement, reference.payloads[0]["displacement"])


def test_extraction_is_one_pass_with_the_empty_prompt_at_timestep_0(backbone, moving_video, monkeypatch):
    calls, capture = [], backbone.capture

    def record(latents, level, condition, blocks, position=None, injected=None, what=None):
        calls.append((latents, level, condition, blocks, position, injected))
        return capture(latents, level, condition, blocks, position, injected, what)

    monkeypatch.setattr(backbone, "capture", record)
    extract_motion(backbone, moving_video, METHOD)
    ((latents, level, condition, blocks, position, injected),) = calls
    assert torch.equal(latents, backbone.encode_video(moving_video))
    assert level == NoiseLevel(None, 0, 0.0)
    assert torch.equal(condition, backbone.condition(""))
    assert tuple(blocks) == (0, 1)
    assert position is None
    assert injected is None


def test_latents_are_the_vaes_mean_and_no_sample(backbone, moving_video):
    pixels = torch.from_numpy(moving_video).float().div(127.5).sub(1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        distribution = backbone.vae.encode(pixels).latent_dist
    assert distribution.std.max() > 1e-3, "a sample would differ"
    expected = (distribution.mean * backbone.vae.config.scaling_factor).transpose(1, 2)
    latents = backbone.encode_video(moving_video)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(latents, backbone.encode_video(moving_video))


def test_extracting_twice_gives_the_same_bytes(reference, backbone, moving_video):
    torch.manual_seed(99)
    assert extract_motion(backbone, moving_video, METHOD).to_bytes() == reference.to_bytes()


def test_latents_are_kept_for_injection_and_only_then(backbone, moving_video, reference):
    assert torch.equal(reference.latents, backbone.encode_video(moving_video).float())
    without = extract_motion(backbone, moving_video, replace(METHOD, injection=False))
    assert without.latents is None
    assert torch.equal(without.displacement, reference.displacement)
    injection = extract_motion(backbone, moving_video, MethodSettings("injection"))
    assert injection.payloads == {}
    assert injection.loss is None
    assert torch.equal(injection.latents, reference.latents)


# ---------------------------------------------------------------------- files


def test_a_file_keeps_every_bit(reference):
    loaded = MotionReference.from_bytes(reference.to_bytes())
    assert loaded.grid == reference.grid
    assert loaded.model_revision == reference.model_revision
    assert loaded.loss == "ditflow"
    assert torch.equal(loaded.latents, reference.latents)
    assert loaded.latents.dtype == torch.float32
    assert list(loaded.payloads) == list(reference.payloads)
    for block, payload in reference.payloads.items():
        assert loaded.payloads[block]["displacement"].dtype == torch.int8
        assert torch.equal(loaded.payloads[block]["displacement"], payload["displacement"])


def test_blocks_keep_their_order_in_a_file(rotary_backbone, moving_video):
    """The first guidance block's displacement is the one that is shown."""
    reference = extract_motion(rotary_backbone, moving_video, replace(METHOD, blocks=(1, 0)))
    loaded = MotionReference.from_bytes(reference.to_bytes())
    assert list(loaded.payloads) == [1, 0]
    assert torch.equal(loaded.displacement, reference.payloads[1]["displacement"])
    assert not torch.equal(loaded.displacement, reference.payloads[0]["displacement"])


def test_a_reference_without_latents_or_payloads_survives_its_file(rotary_reference):
    for part in (replace(rotary_reference, latents=None), replace(rotary_reference, payloads={}, loss=None)):
        loaded = MotionReference.from_bytes(part.to_bytes())
        assert (loaded.latents is None) == (part.latents is None)
        assert list(loaded.payloads) == list(part.payloads)
        assert loaded.loss == part.loss


def test_the_same_reference_gives_the_same_bytes(rotary_reference):
    data = rotary_reference.to_bytes()
    assert rotary_reference.to_bytes() == data
    assert MotionReference.from_bytes(data).to_bytes() == data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: pickle.dumps({"latents": [0.0]}),
            "clip.safetensors is not a safetensors file.*pickles",
        ),
        (lambda data: data[: len(data) // 2], "clip.safetensors is not a safetensors file.*cut off"),
        (lambda data: b"", "clip.safetensors is not a safetensors file"),
        (lambda data: save({"latents": torch.zeros(1)}), "clip.safetensors is not a motion reference.*other origin"),
        (lambda data: write_artifact("motion bank", 1, {}, {}), "is not a motion reference: it is a motion bank"),
        (lambda data: write_artifact("motion reference", 1000, {}, {}), "format 1000.*reads format.*upgrade ditflow"),
    ],
    ids=["pickle", "truncated", "empty", "foreign", "bank", "newer"],
)
def test_another_file_is_refused_with_what_it_is(rotary_reference, damage, message):
    with pytest.raises(ArtifactError, match=message):
        MotionReference.from_bytes(damage(rotary_reference.to_bytes()), "clip.safetensors")


HEADER = {"grid": [3, 4, 4], "model_revision": "0", "loss": "ditflow", "blocks": [1], "fps": 8.0}


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"grid": "abc"}, {}, "grid 'abc'"),
        ({"grid": [10**6, 4, 4]}, {}, "grid .1000000, 4, 4."),
        ({"blocks": 5}, {}, "blocks 5"),
        ({"blocks": None}, {}, "blocks None"),
        ({"loss": ["ditflow"]}, {}, "loss .'ditflow'."),
        ({"fps": -1}, {}, "fps -1"),
        ({"notes": [1]}, {}, "notes .1."),
        ({}, {"block.2.displacement": (3, 3, 16, 2)}, "'block.2.displacement' .3, 3, 16, 2. of no block"),
        ({}, {"block.one.displacement": (3, 3, 16, 2)}, "of no block"),
        ({}, {"latents": (3, 4)}, "'latents' .3, 4. of no block"),
        ({}, {}, "nothing of a block, expected displacement"),
        ({}, {"block.1.displacement": (3, 3, 17, 2)}, "expected F F P 2 of a"),
        ({}, {"block.1.displacement": (3, 3, 16, 2), "block.1.more": (1,)}, "for more a tensor .1., expected None"),
        ({"loss": "smm"}, {"block.1.means": (100_000, 1)}, "for means a tensor .100000, 1., expected F D of a"),
        ({"loss": "moft"}, {"block.1.channels": (2,), "block.1.features": (3, 16, 5)}, "as the loss moft"),
        ({"loss": "motionclone"}, {"block.1.frame": (2, 16, 3), "block.1.attention": (0, 16, 3)}, "expected H P F"),
    ],
)
def test_shapes_that_are_not_those_of_the_header_are_refused(changes, tensors, message):
    data = write_artifact(
        "motion reference", 2, {**HEADER, **changes}, {name: torch.zeros(shape) for name, shape in tensors.items()}
    )
    with pytest.raises(ArtifactError, match=f"^clip.safetensors has .*{message}"):
        MotionReference.from_bytes(data, "clip.safetensors")


# ---------------------------------------------------------------------- fitting


def test_a_reference_fits_the_setting_it_was_taken_in(reference, backbone):
    reference.check_fits(backbone, reference.grid, METHOD.resolve(backbone.defaults))


def test_another_model_is_refused(rotary_reference, rotary_backbone):
    stranger = replace(rotary_reference, model_revision="other")
    with pytest.raises(ArtifactError) as caught:
        stranger.check_fits(rotary_backbone, stranger.grid, METHOD.resolve(rotary_backbone.defaults))
    assert caught.value.code == "motion-model-revision"


def test_another_grid_is_refused(rotary_reference, rotary_backbone):
    with pytest.raises(ArtifactError) as caught:
        rotary_reference.check_fits(rotary_backbone, TokenGrid(3, 4, 5), METHOD.resolve(rotary_backbone.defaults))
    assert caught.value.code == "motion-token-grid"


def test_another_loss_is_refused(rotary_reference, rotary_backbone):
    other = replace(rotary_reference, loss="other")
    with pytest.raises(ArtifactError) as caught:
        other.check_fits(rotary_backbone, other.grid, METHOD.resolve(rotary_backbone.defaults))
    assert caught.value.code == "motion-loss"


def generate(backbone, reference: MotionReference, method: MethodSettings):
    sampling = SamplingSettings(steps=1, guidance_scale=1.0)
    size = (FRAMES, SIZE, SIZE)
    return transfer_motion(backbone, "a red ball", reference=reference, size=size, method=method, sampling=sampling)


def test_a_reference_for_injection_alone_is_refused_by_a_motion_loss(rotary_backbone, moving_video):
    reference = extract_motion(rotary_backbone, moving_video, MethodSettings("injection"))
    with pytest.raises(ArtifactError) as caught:
        generate(rotary_backbone, reference, METHOD)
    assert caught.value.code == "motion-loss"


def test_a_reference_with_a_motion_loss_serves_injection_alone(rotary_backbone, rotary_reference):
    result = generate(rotary_backbone, rotary_reference, MethodSettings("injection", guided_steps=1))
    assert result.losses == []


def test_a_block_that_was_not_extracted_is_refused(rotary_backbone, moving_video):
    reference = extract_motion(rotary_backbone, moving_video, replace(METHOD, blocks=(0,)))
    with pytest.raises(ArtifactError) as caught:
        generate(rotary_backbone, reference, replace(METHOD, blocks=(1,)))
    assert caught.value.code == "motion-blocks"


def test_injection_without_kept_latents_is_refused_with_both_ways_out(rotary_backbone, rotary_reference):
    kept_without = replace(rotary_reference, latents=None)
    with pytest.raises(ValueError, match="method.injection: false, or extract it .* with injection: true"):
        generate(rotary_backbone, kept_without, METHOD)
    assert generate(rotary_backbone, kept_without, replace(METHOD, injection=False)).video.dtype == np.uint8
