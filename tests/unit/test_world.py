"""The synthetic world: what it draws, and that the motion it tells is the motion it shows."""

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from ditflow.mini.world import (
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    VOCABULARY,
    Appearance,
    Background,
    Camera,
    Path,
    Scene,
    Sprite,
    WorldClip,
    WorldError,
    ground_texture,
    latent_frame_times,
    prompt_of,
    render,
    sample_pair,
    sample_scene,
    swap_appearance,
)

TIMES = np.array([0.0, 2.5, 6.5, 10.5, 14.5])
BALL = Appearance("ball", "red", "striped")


def scene_of(*paths: Path, camera: Camera | None = None, look: Appearance = BALL) -> Scene:
    return Scene(tuple(Sprite(look, path) for path in paths), Background("grass"), camera or Camera())


def time_gaps() -> np.ndarray:
    """[F, F]: pixel frames from latent frame i to latent frame j of a clip of 17."""
    return TIMES[None, :] - TIMES[:, None]


def colours_after_motion(clip: WorldClip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the pixels of the first frame that are visible in the last: their colours, the last frame's colours
    where the truth says they went, and the last frame's colours where they were; each [N, 3]."""
    frames, height, width = clip.frames.shape[:3]
    truth = clip.displacement(frames, height, width, temporal_compression=1)
    way = truth.displacement[0, -1].reshape(height, width, 2)
    rows, columns = np.indices((height, width), np.float32)
    first, last = clip.frames[0].astype(np.float32), clip.frames[-1].astype(np.float32)
    moved = cv2.remap(last, columns + way[..., 0], rows + way[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE)
    seen = truth.visible[0, -1].reshape(height, width)
    return first[seen], moved[seen], last[seen]


def test_a_seed_gives_the_same_scene_and_bytes_and_another_seed_others():
    clip, again, other = (render(sample_scene(seed)) for seed in (7, 7, 8))
    assert clip.scene == again.scene
    assert clip.frames.tobytes() == again.frames.tobytes()
    assert clip.masks.tobytes() == again.masks.tobytes()
    assert clip.frames.tobytes() != other.frames.tobytes()


def test_the_ground_is_painted_the_same_every_time():
    painted = ground_texture("stone").copy()
    ground_texture.cache_clear()
    np.testing.assert_array_equal(ground_texture("stone"), painted)


def test_train_and_eval_share_no_scene():
    train = {sample_scene(seed, "train") for seed in range(200)}
    evaluation = {sample_scene(seed, "eval") for seed in range(200)}
    assert len(train) == len(evaluation) == 200
    assert not train & evaluation


def test_a_clip_has_the_asked_size_and_its_truth_scales_with_it():
    scene = sample_scene(3, sprites=2)
    small, large = render(scene, frames=9), render(scene, frames=9, height=128, width=192)
    assert large.frames.shape == (9, 128, 192, 3)
    assert large.frames.dtype == np.uint8
    assert large.masks.shape == (2, 9, 128, 192)
    np.testing.assert_allclose(large.trajectories - [95.5, 63.5], 2 * (small.trajectories - 31.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_a_masks_centroid_follows_the_trajectory(shape: str, texture: str):
    path = Path((-14.3, 8.1), (25.0, -16.7), bend=5.0, acceleration=0.8, radius=(9.0, 13.0))
    clip = render(scene_of(path, look=Appearance(shape, "blue", texture)))
    for mask, centre in zip(clip.masks[0], clip.trajectories[0], strict=True):
        rows, columns = np.nonzero(mask)
        np.testing.assert_allclose([columns.mean(), rows.mean()], centre, rtol=0, atol=0.5)


def test_two_sprites_have_each_their_own_mask_and_trajectory():
    clip = render(scene_of(Path((-18.0, -15.0), (30.0, 0.0)), Path((15.0, 14.0), (-30.0, 4.0))))
    for mask, centre in zip(clip.masks, clip.trajectories, strict=True):
        rows, columns = np.nonzero(mask[8])
        np.testing.assert_allclose([columns.mean(), rows.mean()], centre[8], rtol=0, atol=0.5)


def test_the_pixels_of_a_mask_show_the_sprites_colour():
    for colour, (rgb, _) in COLOURS.items():
        clip = render(scene_of(Path((0.0, 0.0)), look=Appearance("ball", colour)), frames=1)
        shown = clip.frames[0][cv2.erode(clip.masks[0, 0].astype(np.uint8), np.ones((7, 7))) > 0]
        assert np.abs(shown.mean(axis=0) - 0.88 * np.array(rgb)).max() < 20, "in the middle, 0.88 of the full light"


def test_sampled_sprites_are_large_travel_far_and_stay_in_the_picture():
    for seed in range(100):
        for sprite in sample_scene(seed).sprites:
            assert all(10 <= radius <= 18 for radius in sprite.path.radius)
            assert 15 <= np.hypot(*sprite.path.travel) <= 40
            assert np.abs(sprite.path.centre(np.linspace(0, 1, 17))).max() < 32


def test_the_vocabulary_has_every_word_of_every_prompt_once():
    prompts = [prompt_of(sample_scene(seed), motion) for seed in range(300) for motion in (False, True)]
    said = {word for prompt in prompts for word in re.findall(r"\w+|,", prompt)}
    assert said == set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_a_prompt_tells_looks_and_only_when_asked_motion():
    ball = Sprite(BALL, Path((-20.0, 0.0), (30.0, 0.0)))
    star = Sprite(Appearance("star", "orange"), Path((0.0, 20.0), (-20.0, -21.0), radius=(9.0, 13.0)))
    scene = Scene((ball, star), Background("night sky"), Camera(pan=(-20.0, 0.0)))
    looks = "a red striped ball and an orange star moving over the night sky"
    assert prompt_of(scene) == render(scene, frames=1).prompt == looks
    assert prompt_of(replace(scene, camera=Camera(zoom=2.0))) == looks
    assert prompt_of(scene, motion=True) == (
        "a red striped ball moving right and an orange star moving up left and growing over the night sky, "
        "camera panning left"
    )


def test_borrowed_looks_change_the_prompt_and_keep_the_motion():
    scene, other = sample_scene(1, sprites=2, shot="pan"), sample_scene(2, "eval", sprites=2, shot="rest")
    dressed = swap_appearance(scene, other)
    before, after = render(scene), render(dressed)
    np.testing.assert_array_equal(before.trajectories, after.trajectories)
    assert dressed.camera == scene.camera
    assert after.prompt == prompt_of(other) != before.prompt
    with pytest.raises(WorldError, match="1 sprites, the one with the other appearance 2"):
        swap_appearance(sample_scene(1, sprites=1), other)


def test_a_pair_shares_its_motion_and_none_of_its_looks():
    for seed in range(40):
        reference, target = sample_pair(seed, "eval")
        assert reference == sample_scene(seed, "eval")
        assert swap_appearance(target, reference) == reference
        assert reference.background.name != target.background.name
        for one, other in zip(reference.sprites, target.sprites, strict=True):
            assert one.appearance.shape != other.appearance.shape
            assert one.appearance.colour != other.appearance.colour


def test_a_latent_frame_stands_in_the_middle_of_its_pixel_frames():
    np.testing.assert_array_equal(latent_frame_times(5), TIMES)
    np.testing.assert_array_equal(latent_frame_times(4, temporal_compression=1), [0, 1, 2, 3])


def test_a_straight_path_moves_its_patches_by_velocity_times_time():
    velocity = np.array([2.0, -1.0])
    truth = render(scene_of(Path((-16.0, 8.0), tuple((16 * velocity).tolist())))).displacement(5, 8, 8)
    expected = time_gaps()[..., None] * velocity / 8
    for i in range(5):
        patches = truth.owner[i] == 0
        assert patches.sum() >= 4
        for j in range(5):
            moved = truth.displacement[i, j, patches]
            np.testing.assert_allclose(moved, np.broadcast_to(expected[i, j], moved.shape), rtol=0, atol=1e-5)


def test_displacement_is_measured_in_patches_along_each_axis():
    truth = render(scene_of(Path((-16.0, 8.0), (32.0, -16.0)))).displacement(5, 16, 8)
    moved = truth.displacement[0, 1, truth.owner[0] == 0]
    np.testing.assert_allclose(moved, np.broadcast_to([2.5 * 2 / 8, -2.5 / 4], moved.shape), rtol=0, atol=1e-5)


def test_growth_moves_a_sprites_points_away_from_its_centre():
    truth = render(scene_of(Path((0.0, 0.0), radius=(10.0, 20.0)))).displacement(5, 8, 8)
    column, row = 4, 3
    patch = row * 8 + column
    factor = 2 ** (14.5 / 16) - 1
    np.testing.assert_allclose(truth.displacement[0, 4, patch], [0.5 * factor, -0.5 * factor], rtol=0, atol=1e-6)


def test_under_a_resting_camera_the_background_stays_exactly():
    for seed in range(5):
        truth = render(sample_scene(seed, shot="rest")).displacement(5, 8, 8)
        for i in range(5):
            assert not truth.displacement[i][:, truth.owner[i] < 0].any()


def test_under_a_pan_the_background_moves_against_the_camera():
    pan = np.array([24, -10.0])
    truth = render(scene_of(Path((0.0, 0.0)), camera=Camera(pan=tuple(pan.tolist())))).displacement(5, 8, 8)
    expected = -time_gaps()[..., None] * pan / 16 / 8
    for i, j in np.ndindex(5, 5):
        moved = truth.displacement[i, j, truth.owner[i] < 0]
        np.testing.assert_allclose(moved, np.broadcast_to(expected[i, j], moved.shape), rtol=0, atol=1e-5)


def test_a_frame_to_itself_is_no_motion_and_all_visible():
    for seed in range(8):
        truth = render(sample_scene(seed)).displacement(5, 8, 8)
        for i in range(5):
            assert not truth.displacement[i, i].any()
            assert truth.visible[i, i].all()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_pan_by_whole_pixels_shows_the_same_colours_where_the_truth_says(background: str):
    camera = Camera(pan=(12.0, -8.0))
    before, moved, unmoved = colours_after_motion(
        render(Scene((), Background(background, (5.3, 7.8)), camera), frames=5)
    )
    np.testing.assert_array_equal(moved, before)
    assert np.abs(unmoved - before).mean() > 5


@pytest.mark.parametrize("shot", ["rest", "pan", "zoom"])
def test_the_truth_carries_the_colours_of_sprites_and_background(shot: str):
    for seed in range(4):
        clip = render(sample_scene(seed, "eval", shot=shot), frames=5)
        before, moved, unmoved = colours_after_motion(clip)
        assert np.abs(moved - before).mean() < 0.5 * np.abs(unmoved - before).mean()
        assert np.abs(moved - before).mean() < 7


def test_a_later_sprite_covers_an_earlier_one():
    below, above = Path((0.0, 0.0), radius=(14.0, 14.0)), Path((-28.0, 4.0), (56.0, 0.0), radius=(9.0, 9.0))
    clip = render(scene_of(below, above))
    truth = clip.displacement(5, 8, 8)
    under_the_crossing = 4 * 8 + 3
    assert not (clip.masks[0] & clip.masks[1]).any()
    assert clip.masks[0, 0].sum() - clip.masks[0, 8].sum() > 200
    assert truth.owner[:, under_the_crossing].tolist() == [0, 0, 1, 0, 0]
    assert truth.visible[0, :, under_the_crossing].tolist() == [True, True, False, True, True]


def test_a_point_outside_the_picture_is_not_visible():
    truth = render(scene_of(Path((0.0, 0.0)), camera=Camera(pan=(32.0, 0.0)))).displacement(5, 8, 8)
    assert truth.visible[0, 4, :8].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (lambda: Appearance("cube", "red"), "world-word-unknown", "'cube' is not a shape .* it has ball, square"),
        (lambda: sample_scene(0, "test"), "world-word-unknown", "'test' is not a split .* train, eval"),
        (lambda: sample_scene(0, shot="tilt"), "world-word-unknown", "'tilt' is not a shot .* rest, pan, zoom"),
        (lambda: sample_scene(0, sprites=0), "world-sprites-invalid", "0 sprites came, expected 1 or 2"),
        (
            lambda: render(sample_scene(0)).displacement(4, 8, 8),
            "world-grid-mismatch",
            "4 latent frames .* expected 5 latent frames",
        ),
    ],
)
def test_wrong_requests_name_what_is_valid(request_, code, message):
    with pytest.raises(WorldError, match=message) as caught:
        request_()
    assert caught.value.code == code


def test_a_pair_may_stay_on_its_ground_in_colours_that_stand_out_there():
    for seed in range(40):
        reference, target = sample_pair(seed, "eval", same_ground=True)
        assert target.background == reference.background
        for sprite, other in zip(reference.sprites, target.sprites, strict=True):
            assert sprite.appearance.colour != other.appearance.colour
            assert sprite.appearance.shape != other.appearance.shape
            assert other.appearance.colour not in GROUNDS[target.background.name].hidden_colours
