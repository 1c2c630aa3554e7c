"""Masks as files: pictures, pictures of several frames, and videos."""

import io

import numpy as np
import pytest
from PIL import Image

from ditflow.media.mask import read_mask
from ditflow.media.video import VideoError, encode_video

SIZE = {"frames": 5, "height": 32, "width": 48}


def objects(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Object 1 moves right, object 2 rests below."""
    mask = np.zeros((frames, height, width), np.uint8)
    for t in range(frames):
        mask[t, 4:12, 4 + 4 * t : 12 + 4 * t] = 1
        mask[t, 20:28, 20:28] = 2
    return mask


def picture(mask: np.ndarray, format: str = "PNG", mode: str = "P") -> bytes:
    def one(frame: np.ndarray) -> Image.Image:
        made = Image.fromarray(frame, "L")
        if mode == "P":
            made.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
            return made
        return made.convert(mode)

    first, *others = [one(frame) for frame in mask]
    file = io.BytesIO()
    first.save(file, format, **({"save_all": True, "append_images": others} if others else {}))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_picture_has_the_numbers_of_its_objects(mode):
    found = read_mask(picture(objects(1), mode=mode), **SIZE)
    assert np.array_equal(found, objects(1))


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_a_picture_of_several_frames_is_a_mask_of_every_frame(format):
    found = read_mask(picture(objects(5), format, "L"), **SIZE)
    assert np.array_equal(found, objects(5))


def test_frames_are_taken_as_those_of_the_reference():
    found = read_mask(picture(objects(12), "TIFF", "L"), **SIZE, start=2, stride=2)
    assert np.array_equal(found, objects(12)[2:11:2])


def test_a_coloured_picture_is_an_object_where_it_is_bright():
    colours = Image.fromarray(np.repeat((objects(1)[0] == 1)[..., None] * np.uint8(255), 3, axis=-1))
    file = io.BytesIO()
    colours.save(file, "PNG")
    assert np.array_equal(read_mask(file.getvalue(), **SIZE), (objects(1) == 1).astype(np.uint8))


def test_a_video_is_an_object_where_it_is_bright():
    mask = objects(5, 64, 96) == 1
    data = encode_video(np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1), 8)
    found = read_mask(data, frames=5, height=64, width=96)
    assert found.shape == (5, 64, 96)
    assert (found != mask).mean() < 0.01


@pytest.mark.parametrize(("fit", "columns"), [("crop", slice(16, 80)), ("stretch", slice(0, 96))])
def test_a_mask_is_cropped_like_its_reference(fit, columns):
    mask = np.zeros((1, 32, 96), np.uint8)
    mask[:, :, columns] = 1
    found = read_mask(picture(mask, mode="L"), frames=5, height=32, width=64, fit=fit)
    assert found.shape == (1, 32, 64)
    assert found.all()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (picture(objects(3), "TIFF", "L"), "mask-too-short"),
        (picture(objects(1))[:90], "mask-undecodable"),
        (picture(objects(1), mode="L")[:80], "mask-undecodable"),
        (b"no picture", "not-a-video"),
    ],
    ids=["short", "cut in its header", "cut", "text"],
)
def test_what_is_no_mask_of_this_reference_is_refused(data, code):
    with pytest.raises(VideoError, match="^the mask") as caught:
        read_mask(data, **SIZE, name="the mask")
    assert caught.value.code == code
