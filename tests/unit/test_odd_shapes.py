"""Clips of any length and shape: nothing knows a number of frames, of text tokens or of patches by heart."""

from collections.abc import Iterator
from itertools import cycle, pairwise

import numpy as np
import pytest
import torch
from running import write_spec
from tiny import KINDS, own_position, tiny_backbone

from ditflow.artifact import ArtifactError
from ditflow.backbones.cogvideox import CogVideoX, layout_of
from ditflow.backbones.contract import CLEAN, NoiseLevel
from ditflow.banks.bank import BankMismatchError, MotionBank
from ditflow.errors import SettingsError
from ditflow.layout import LatentLayout
from ditflow.losses import MOTION_LOSSES
from ditflow.mini import build
from ditflow.motion.amf import hard_displacement
from ditflow.motion.reference import MotionReference, extract_motion, reference_from_latents
from ditflow.sampling.guidance import Generation, Guidance
from ditflow.sampling.positions import PositionVariable
from ditflow.settings import MethodSettings, SamplingSettings
from ditflow.transfer import learn_bank, transfer_latents, transfer_motion
from ditflow.types import QueriesKeys, TokenGrid
from jobs.spec import SpecError, load_spec

MODELS = (*KINDS, "temporal-patch")
LENGTHS = {13: 4, 17: 5, 24: 6, 25: 7, 49: 13, 81: 21}
"""Frames, and the latent frames that they make."""
SIZES = {"landscape": (32, 48), "portrait": (48, 32), "tower": (72, 16), "default-height": (64, 32), "strip": (8, 80)}
"""Height and width in pixels; the tiny models' own size is 64x64, a patch is 8x8."""
CLIPS = [(frames, *size) for frames, size in zip(LENGTHS, cycle(SIZES.values()), strict=False)]
METHOD = MethodSettings("ditflow", "position", blocks=(1,), guided_steps=2, iterations=1, learning_rate=(0.05, 0.02))
SAMPLING = SamplingSettings(steps=3, guidance_scale=2.0)
clips = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: "x".join(map(str, clip)))


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> CogVideoX:
    return tiny_backbone(request.param)


@pytest.fixture(params=[3, 226])
def text_tokens(request, monkeypatch) -> int:
    """As many tokens in a prompt as in the released models, or hardly any."""
    monkeypatch.setattr(build, "TEXT_TOKENS", request.param)
    return request.param


def sliding(frames: int, height: int, width: int) -> np.ndarray:
    """A coarse texture that slides a pixel a frame, down and to the right."""
    cells = (max(height, width) + frames) // 4 + 1
    texture = np.random.default_rng(0).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((4, 4, 1), np.uint8))
    starts = range(frames - 1, -1, -1)
    return np.stack([texture[start : start + height, start : start + width] for start in starts])


def grid_of(model: CogVideoX, frames: int, height: int, width: int) -> TokenGrid:
    """The token grid by its definition: latent frames in pairs for the 1.5 layout, 8x8 pixels a patch."""
    latent_frames = LENGTHS[frames]
    token_frames = (latent_frames + 1) // 2 if model.name == "tiny-temporal-patch" else latent_frames
    return TokenGrid(token_frames, height // 8, width // 8)


def rows_left_alone(value: torch.Tensor, original: torch.Tensor) -> int:
    """How many rows of the last axis are bit by bit the same."""
    return int((value == original).all(dim=-1).sum())


# ---------------------------------------------------------------------- what is supported


@clips
def test_a_clip_fills_its_grid_and_comes_back_in_its_length_and_size(model, clip):
    video = sliding(*clip)
    latents = model.encode_video(video)
    assert latents.shape == model.layout.latent_shape(*clip)
    assert model.layout.grid(latents.shape) == grid_of(model, *clip)
    assert model.decode_latents(latents, clip[0]).shape == video.shape


@clips
def test_the_flow_leads_to_the_best_match_within_each_frame(model, clip):
    """Against the definition: all heads' logits, and coordinates counted by hand."""
    grid = grid_of(model, *clip)
    latents, embeds = torch.randn(model.layout.latent_shape(*clip)), model.condition("")
    flow = reference_from_latents(model, latents, embeds, METHOD.resolve(model.defaults)).displacement
    assert flow.shape == (grid.frames, grid.frames, grid.patches, 2)
    with torch.no_grad():
        attention = model.capture(latents, CLEAN, embeds, (1,))[1]
    query, key = (part.unflatten(1, (attention.heads, -1)) for part in (attention.query, attention.key))
    logits = torch.einsum("shd,thd->st", query, key).view(grid.frames, grid.patches, grid.frames, grid.patches)
    row, column = np.divmod(np.arange(grid.patches), clip[2] // 8)
    x, y = flow[..., 0].numpy() + column, flow[..., 1].numpy() + row
    assert (0 <= x).all() and (x < clip[2] // 8).all()
    assert (0 <= y).all() and (y < clip[1] // 8).all()
    match = torch.from_numpy(y * (clip[2] // 8) + x).long().transpose(1, 2)
    torch.testing.assert_close(logits.gather(-1, match[..., None])[..., 0], logits.amax(dim=-1), rtol=1e-4, atol=1e-4)


@clips
@pytest.mark.parametrize("optimize", ["latent", "position", "coordinates"])
@pytest.mark.parametrize("loss", sorted(MOTION_LOSSES))
def test_every_loss_guides_every_frame_and_place(model, clip, loss, optimize):
    """By block 0, which sees the others' keys and values of the reference: no place moves for another one's sake."""
    method = MethodSettings(loss, optimize, blocks=(0,), guided_steps=1, iterations=1, learning_rate=(0.05, 0.05))
    method, embeds = method.resolve(model.defaults), model.condition("a red ball")
    reference_latents, noise = torch.randn(2, *model.layout.latent_shape(*clip))
    reference = reference_from_latents(model, reference_latents, embeds, method)
    reference = MotionReference.from_bytes(reference.to_bytes())
    grid = grid_of(model, *clip)
    kind = "coordinates" if optimize == "coordinates" else "position"
    variable, own = PositionVariable(model.positions(grid), kind, grid), own_position(model, grid)
    guidance = Guidance(model, method, 1, 1, variable, reference)
    generation = Generation(noise, [embeds], model.schedule(2, grid), torch.Generator())
    guided = guidance.guide(0, NoiseLevel(0, 999, 1.0), [generation], [noise], None)
    assert len(guided.losses) == 1
    if optimize == "latent":
        assert rows_left_alone(*(latents.movedim(2, -1) for latents in (guided.latents[0], noise))) == 0
    else:
        assert all(rows_left_alone(guided.position[part], own[part]) == 0 for part in own)


@clips
@pytest.mark.parametrize("loss", sorted(MOTION_LOSSES))
def test_every_loss_samples_a_whole_clip(model, clip, loss):
    shape, embeds = model.layout.latent_shape(*clip), model.condition("a red ball")
    result = transfer_latents(
        model,
        reference_latents=torch.randn(shape),
        initial_latents=torch.randn(shape),
        prompt_embeds=embeds,
        negative_prompt_embeds=None,
        source_embeds=embeds,
        method=MethodSettings(loss, blocks=(0, 1), guided_steps=1, iterations=1),
        sampling=SamplingSettings(steps=2, guidance_scale=1.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert result.latents.shape == shape
    assert result.latents.isfinite().all()
    assert [len(losses) for losses in result.losses] == [1]


@clips
def test_a_bank_is_learned_written_read_and_reused_with_another_prompt(model, clip):
    reference = extract_motion(model, sliding(*clip), METHOD)
    settings = {"size": clip, "method": METHOD, "sampling": SAMPLING, "seed": 1}
    learned = learn_bank(model, "a red ball", reference=reference, **settings).bank
    bank = MotionBank.from_bytes(learned.to_bytes())
    grid = grid_of(model, *clip)
    assert bank.header.grid == (grid.frames, grid.height, grid.width)
    assert bank.header.provenance["size"] == list(clip)
    default = own_position(model, grid)
    for changes, written in ((bank.offsets(step), learned.offsets(step)) for step in range(2)):
        assert all(torch.equal(changes[part], written[part]) for part in written)
        assert all(rows_left_alone(changes[part], torch.zeros_like(default[part])) == 0 for part in default)
    reused = transfer_motion(model, "a green star", reference=bank, **settings)
    assert reused.video.shape == (*clip, 3)
    assert reused.losses == []


def test_prompts_of_any_length_leave_the_video_tokens_alone(text_tokens):
    clip = (24, 48, 32)
    for kind in MODELS:
        model = tiny_backbone(kind)
        assert model.condition("a red ball").shape[1] == text_tokens
        motion = extract_motion(model, sliding(*clip), METHOD)
        assert motion.displacement.shape[2] == 24
        settings = {"size": clip, "method": METHOD, "sampling": SAMPLING, "seed": 1}
        bank = transfer_motion(model, "a red ball", reference=motion, **settings).bank
        bank = MotionBank.from_bytes(bank.to_bytes())
        for part, value in own_position(model, motion.grid).items():
            assert bank.offsets(0)[part].shape == value.shape == (motion.grid.tokens, value.shape[1])
        assert transfer_motion(model, "a green star", reference=bank, **settings).video.shape == (*clip, 3)


def test_embeddings_may_be_shorter_than_the_models_prompts(model):
    """Text embeddings without their padding, of other lengths for the prompt and for the reference."""
    shape, words = model.layout.latent_shape(13, 48, 32), model.condition("a red ball")
    result = transfer_latents(
        model,
        reference_latents=torch.randn(shape),
        initial_latents=torch.randn(shape),
        prompt_embeds=words[:, :5],
        negative_prompt_embeds=words[:, 5:10],
        source_embeds=words[:, -2:],
        method=METHOD,
        sampling=SAMPLING,
        generator=torch.Generator().manual_seed(0),
    )
    assert result.latents.shape == shape
    assert [len(losses) for losses in result.losses] == [1, 1]


def test_positions_of_the_1_5_layout_do_not_end_at_the_size_it_was_trained_on():
    """They are the patches' coordinates, counted from the corner: a small clip's are the larger one's first ones."""
    model = tiny_backbone("temporal-patch")
    assert model.layout.trained_size[1:] == (64, 64)
    large, small = TokenGrid(3, 12, 9), TokenGrid(3, 8, 8)
    positions = own_position(model, large), own_position(model, small)
    for part, expected in positions[1].items():
        corner = positions[0][part].unflatten(0, (3, 12, 9))[:, :8, :8]
        assert torch.equal(corner.flatten(0, 2), expected)


def test_a_side_may_have_more_patches_than_a_byte_can_count():
    """Matches 150 patches away, to the left in one direction and to the right in the other."""
    grid = TokenGrid(2, 1, 200)
    texture = torch.eye(grid.patches)
    tokens = torch.cat([texture, texture.roll(150, 0)])
    flow = hard_displacement(QueriesKeys(tokens, tokens, heads=1), grid)
    assert flow[0, 1, 0].tolist() == [150, 0]
    assert flow[1, 0, 199].tolist() == [-150, 0]
    payload = {"displacement": flow}
    read = MotionReference.from_bytes(MotionReference(grid, "model", "ditflow", {0: payload}, None).to_bytes())
    assert torch.equal(read.displacement, flow)


# ---------------------------------------------------------------------- what is planned, and what is refused


def released(rotary: bool = True, side: tuple[int, int] = (60, 90), temporal_patch: int | None = None) -> LatentLayout:
    """The layout of a released model, by what its configuration says."""
    transformer = {
        "use_rotary_positional_embeddings": rotary,
        "num_layers": 42 if rotary else 30,
        "in_channels": 16,
        "patch_size": 2,
        "patch_size_t": temporal_patch,
        "sample_frames": 49,
        "sample_height": side[0],
        "sample_width": side[1],
    }
    vae = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
    return layout_of("CogVideoX", transformer, vae)


def test_the_published_clips_fill_the_published_grids():
    for layout in (released(rotary=True), released(rotary=False)):
        grids = [layout.grid(layout.latent_shape(*clip)) for clip in ((24, 480, 720), (49, 480, 720))]
        assert [(grid.frames, grid.patches) for grid in grids] == [(6, 1350), (13, 1350)]
    newer = released(side=(96, 170), temporal_patch=2)
    for height, width in ((768, 1360), (1360, 768)):
        assert newer.grid(newer.latent_shape(81, height, width)) == TokenGrid(11, height // 16, width // 16)


def valid_lengths(layout: LatentLayout, most: int) -> Iterator[int]:
    for frames in range(2, most):
        try:
            layout.latent_shape(frames, 480, 720)
        except SettingsError:
            continue
        yield frames


@pytest.mark.parametrize("temporal_patch", [None, 2])
def test_every_length_is_supported_or_refused_with_its_neighbours(temporal_patch):
    """4k + 1 frames or a multiple of 8; an error names the nearest shorter and the nearest longer one."""
    layout = released(temporal_patch=temporal_patch)
    valid = list(valid_lengths(layout, 140))
    assert valid == [frames for frames in range(5, 140) if frames % 4 == 1 or frames % 8 == 0]
    for below, above in pairwise(valid):
        for frames in range(below + 1, above):
            with pytest.raises(SettingsError, match=rf"frames: {frames} is not valid.*; near are {below} and {above}$"):
                layout.latent_shape(frames, 480, 720)
    for frames in (1, 2, 3, 4):
        with pytest.raises(SettingsError, match=rf"frames: {frames} is not valid.*; near are 5 and 8$"):
            layout.latent_shape(frames, 480, 720)


@pytest.mark.parametrize(
    ("frames", "near"), [(11, "9 and 13"), (23, "21 and 24"), (50, "49 and 53"), (82, "81 and 85")]
)
def test_an_impossible_length_is_refused_before_any_work(model, frames, near, monkeypatch):
    monkeypatch.setattr(model.vae, "encode", lambda *_: pytest.fail("the VAE was asked"))
    video = sliding(frames, 48, 32)
    with pytest.raises(SettingsError, match=f"frames: {frames} is not valid.*near are {near}"):
        transfer_motion(model, "a red ball", reference=video, method=METHOD, sampling=SAMPLING)
    with pytest.raises(SettingsError, match=f"frames: {frames} is not valid.*near are {near}"):
        transfer_motion(model, "", size=video.shape[:3], method=MethodSettings("none"), sampling=SAMPLING)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_job_takes_every_length_that_its_model_can_make_and_names_the_others(tmp_path, size):
    for frames in LENGTHS:
        references = {"uri": str(tmp_path), "frames": frames, "height": size[0], "width": size[1]}
        assert load_spec(write_spec(tmp_path, references=references)).job.references.size == (frames, *size)
    with pytest.raises(SpecError, match=r"job.yaml:\d+: references.frames: 23 is not valid.*near are 21 and 24"):
        load_spec(write_spec(tmp_path, references=references | {"frames": 23}))


def test_a_portrait_is_no_landscape_though_it_has_as_many_tokens(model):
    landscape, portrait = (24, 32, 48), (24, 48, 32)
    reference = extract_motion(model, sliding(*landscape), METHOD)
    settings = {"method": METHOD, "sampling": SAMPLING}
    bank = learn_bank(model, "", reference=reference, size=landscape, **settings).bank
    assert grid_of(model, *landscape).tokens == grid_of(model, *portrait).tokens
    frames = reference.grid.frames
    with pytest.raises(ArtifactError, match=f"token grid is {frames}x4x6, needed is {frames}x6x4"):
        transfer_motion(model, "", reference=reference, size=portrait, **settings)
    with pytest.raises(BankMismatchError, match=f"token grid is {frames}x4x6, the generation's is {frames}x6x4"):
        transfer_motion(model, "", reference=bank, size=portrait, **settings)


@pytest.mark.parametrize("longer", [49, 81])
def test_a_bank_does_not_serve_another_length(model, longer):
    """The rows of a longer clip must not be cut off, nor a shorter one's repeated."""
    reference = extract_motion(model, sliding(17, 48, 32), METHOD)
    bank = learn_bank(model, "", reference=reference, size=(17, 48, 32), method=METHOD, sampling=SAMPLING).bank
    with pytest.raises(BankMismatchError, match="token grid is"):
        transfer_motion(model, "", reference=bank, size=(longer, 48, 32), method=METHOD, sampling=SAMPLING)
