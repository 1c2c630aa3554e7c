"""Reading and writing video, on real files that the tests make with FFmpeg's own encoders."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ditflow.media import video
from ditflow.media.video import (
    CorruptVideoError,
    OversizedVideoError,
    TooShortVideoError,
    UndecodableVideoError,
    VideoError,
    encode_video,
    probe_video,
    read_video,
    write_video,
)

RED, GREEN, BLUE, WHITE = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)
STEP = 6
"""Frame i of `counting` has the grey level STEP * i, so every decoded frame tells its own index."""


def counting(frames=24, height=48, width=64):
    levels = np.arange(frames, dtype=np.uint8) * STEP
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def moving(frames=24, height=96, width=128):
    """Smooth texture in colour that drifts to the right, 2 pixels a frame."""
    y, x = np.mgrid[0:height, 0:width] / 20
    shifts = [x - 2 * t / 20 for t in range(frames)]
    waves = [np.stack([np.sin(s + y), np.cos(s - y), np.sin(s) * np.cos(y)], -1) for s in shifts]
    return np.rint(127.5 + 110 * np.stack(waves)).astype(np.uint8)


def rough(frames=24, height=96, width=128):
    """`moving` under noise: every frame takes many bytes, so that damage to a file hits pictures."""
    noise = np.random.default_rng(0).integers(0, 128, (frames, height, width, 3), np.uint8)
    return moving(frames, height, width) // 2 + noise


def quarters(height=48, width=64, colours=(RED, GREEN, BLUE, WHITE)):
    """A picture without any symmetry: top left, top right, bottom left, bottom right."""
    picture = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(colours):
        rows = slice(0, height // 2) if index < 2 else slice(height // 2, None)
        columns = slice(0, width // 2) if index % 2 == 0 else slice(width // 2, None)
        picture[rows, columns] = colour
    return picture


def quarter_colours(picture):
    """The four colours at the middles of the quarters, rounded to 0 or 250."""
    height, width = picture.shape[:2]
    spots = [picture[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return tuple(tuple(250 if level > 125 else 0 for level in spot) for spot in spots)


def save(path, frames, codec="libx264", pixels="yuv420p", prepare=lambda stream: None, times=None, **options):
    """Encode frames at 10 frames a second, or at the given times in tenths of a second."""
    with av.open(str(path), "w", container_options=options.pop("container_options", None)) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        prepare(stream)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pixels)
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def indices(clip):
    """Which frames of `counting` these are."""
    return [round(float(frame.mean()) / STEP) for frame in clip.frames]


def psnr(left, right):
    return 10 * np.log10(255**2 / np.mean((left.astype(float) - right.astype(float)) ** 2))


def read(source, frames=24, height=48, width=64, **more):
    return read_video(source, frames=frames, height=height, width=width, **more)


# --- which frames


def test_frames_are_those_asked_for_by_start_and_stride(tmp_path):
    path = save(tmp_path / "a.mp4", counting())
    clip = read(path, frames=5, start=3, stride=4)
    assert indices(clip) == [3, 7, 11, 15, 19]
    assert clip.fps == 2.5
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (5, 48, 64, 3)


def test_the_last_frame_can_be_asked_for(tmp_path):
    path = save(tmp_path / "a.mp4", counting(17))
    assert indices(read(path, frames=1, start=16)) == [16]


def test_frames_are_counted_whatever_their_times(tmp_path):
    times = [0, 1, 2, 10, 11, 30, 31, 32]
    path = save(tmp_path / "a.mkv", counting(8), times=times)
    assert indices(read(path, frames=8)) == list(range(8))


def test_bytes_and_path_give_the_same_clip(tmp_path):
    path = save(tmp_path / "a.mp4", counting(4))
    from_path, from_text, from_bytes = read(path, 4), read(str(path), 4), read(path.read_bytes(), 4)
    np.testing.assert_array_equal(from_path.frames, from_bytes.frames)
    np.testing.assert_array_equal(from_path.frames, from_text.frames)


def test_decoding_stops_with_the_last_wanted_frame(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mkv", counting(), codec="ffv1")
    decoded = []
    original = video._Video._decode_packet
    monkeypatch.setattr(
        video._Video, "_decode_packet", lambda self, packet: decoded.append(packet) or original(self, packet)
    )
    read(path, frames=5)
    assert len(decoded) <= 6


def test_no_frame_is_kept_once_its_picture_is_taken(tmp_path):
    """Without the help of the garbage collector, which may not come by for a hundred frames."""
    content = save(tmp_path / "a.mp4", counting()).read_bytes()
    gc.collect()
    gc.disable()
    try:
        read(content)
        kept = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert kept == 0


# --- containers, codecs, pixel formats


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p"),
        ("a.mkv", "libx264", "yuv420p10le"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "gray"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mkv", "mjpeg", "yuvj420p"),
        ("a.mov", "png", "rgb24"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_common_containers_codecs_and_pixel_formats_are_read(tmp_path, name, codec, pixels):
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no {codec}")
    options = {"qmax": "3"} if codec == "mpeg4" else {}
    path = save(tmp_path / name, counting(8) + 40, codec, pixels, prepare=_full_range_if_gray, **options)
    clip = read(path, frames=8)
    # rgb8 of a gif has 4 to 8 levels per channel, so only the rough brightness survives
    tolerance = 25 if codec == "gif" else 4
    np.testing.assert_allclose(clip.frames.mean((1, 2, 3)), 40 + STEP * np.arange(8), atol=tolerance)


def _full_range_if_gray(stream):
    if stream.pix_fmt == "gray":  # swscale's gray goes from 0 to 255, and the file must say so
        stream.codec_context.color_range = 2


@pytest.mark.parametrize("codec", ["ffv1", "mjpeg"])
def test_odd_sizes_are_read(tmp_path, codec):
    pixels = "yuv420p" if codec == "ffv1" else "yuvj420p"
    path = save(tmp_path / "odd.mkv", [quarters(35, 51)] * 3, codec=codec, pixels=pixels)
    assert (probe_video(path).height, probe_video(path).width) == (35, 51)
    clip = read(path, frames=3, height=35, width=51)
    assert quarter_colours(clip.frames[2]) == (RED, GREEN, BLUE, WHITE)


def test_transparency_is_dropped(tmp_path):
    path = tmp_path / "alpha.mkv"
    rgba = np.dstack([quarters(), np.full((48, 64), 10, np.uint8)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgra"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="bgra")))
        container.mux(stream.encode(None))
    assert quarter_colours(read(path, frames=1).frames[0]) == (RED, GREEN, BLUE, WHITE)


# --- upright, cropped, resized


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("degrees", "mirror", "expected"),
    [
        (90, {}, (GREEN, WHITE, RED, BLUE)),  # counterclockwise: the right edge comes to the top
        (180, {}, (WHITE, BLUE, GREEN, RED)),
        (-90, {}, (BLUE, RED, WHITE, GREEN)),
        (0, {"hflip": True}, (GREEN, RED, WHITE, BLUE)),
        (0, {"vflip": True}, (BLUE, WHITE, RED, GREEN)),
        (90, {"hflip": True}, (WHITE, GREEN, BLUE, RED)),
    ],
)
def test_pictures_are_turned_upright_as_the_display_matrix_says(tmp_path, name, degrees, mirror, expected):
    path = save(tmp_path / name, [quarters()] * 2, prepare=lambda s: s.set_display_rotation(degrees, **mirror))
    clip = read(path, frames=2, height=60, width=60, fit="stretch")
    assert quarter_colours(clip.frames[1]) == expected
    upright = (64, 48) if abs(degrees) == 90 else (48, 64)
    assert (probe_video(path).height, probe_video(path).width) == upright


def test_a_phone_s_rotation_written_into_the_track_header_is_followed(tmp_path):
    """What an upright phone writes, put into the bytes by hand: turn clockwise (a b u c d v x y w = 0 1 0 -1 ...)."""
    content = bytearray(save(tmp_path / "a.mp4", [quarters()] * 2).read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version and flags, dates, ids, duration, reserved, layer, volume
    one, minus_one, unit = (value.to_bytes(4, "big", signed=True) for value in (1 << 16, -1 << 16, 1 << 30))
    zero = bytes(4)
    assert content[matrix : matrix + 4] == one
    content[matrix : matrix + 36] = b"".join([zero, one, zero, minus_one, zero, zero, zero, zero, unit])
    clip = read(bytes(content), frames=1, fit="stretch")
    assert quarter_colours(clip.frames[0]) == (BLUE, RED, WHITE, GREEN)


def test_a_slanted_display_matrix_is_an_error(tmp_path):
    path = save(tmp_path / "a.mp4", [quarters()], prepare=lambda s: s.set_display_rotation(30))
    with pytest.raises(UndecodableVideoError, match=r"30\.0 degrees.*right angles") as caught:
        read(path, frames=1)
    assert caught.value.code == "video-rotation-unsupported"


def stripes(height, width, left, right):
    """Black, but white in columns left..right."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, left:right] = 255
    return picture


def test_crop_keeps_the_centre_and_stretch_keeps_everything(tmp_path):
    path = save(tmp_path / "wide.mkv", [stripes(32, 128, 48, 80)], codec="ffv1", pixels="bgra")
    assert read(path, 1, 32, 32).frames.min() == 255
    stretched = read(path, 1, 32, 32, fit="stretch").frames[0, 16, :, 0]
    np.testing.assert_array_equal(np.flatnonzero(stretched > 127), np.arange(12, 20))


def test_pixel_aspect_is_applied_before_the_crop(tmp_path):
    """64 x 48 pixels twice as wide as high show 128 x 48: a square crop keeps 24 coded columns."""

    def twice_as_wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = save(tmp_path / "a.mkv", [stripes(48, 64, 20, 44)], prepare=twice_as_wide, crf="1")
    assert read(path, 1, 48, 48).frames.min() > 200
    rotated = save(
        tmp_path / "b.mkv",
        [stripes(48, 64, 20, 44)],
        prepare=lambda s: (twice_as_wide(s), s.set_display_rotation(90)),
        crf="1",
    )
    assert read(rotated, 1, 48, 48).frames.min() > 200


def test_shrinking_averages_and_does_not_alias(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    path = save(tmp_path / "a.mkv", [np.dstack([board] * 3).astype(np.uint8)], codec="ffv1", pixels="bgra")
    small = read(path, 1, 16, 16).frames
    np.testing.assert_allclose(small, 127.5, atol=1)


def test_enlarging_keeps_positions_and_flat_areas(tmp_path):
    path = save(tmp_path / "a.mkv", [quarters(16, 16)], codec="ffv1", pixels="bgra")
    large = read(path, 1, 256, 256).frames[0]
    assert large.shape == (256, 256, 3)
    assert quarter_colours(large) == (RED, GREEN, BLUE, WHITE)
    assert tuple(large[64, 64]) == RED


def test_the_full_frame_comes_back_at_its_own_size(tmp_path):
    texture = moving(2)
    path = save(tmp_path / "a.mkv", texture, codec="ffv1", pixels="bgra")
    np.testing.assert_array_equal(read(path, 2, 96, 128).frames, texture)


# --- errors


def test_a_clip_that_is_too_short_says_what_it_has_and_what_to_do(tmp_path):
    path = save(tmp_path / "a.mp4", counting(17))
    expected = r"a\.mp4: 24 frames with stride 1 from frame 0 were requested, it has only 17\. .*at most 17 frames"
    with pytest.raises(TooShortVideoError, match=expected) as caught:
        read(path, frames=24)
    assert caught.value.code == "video-too-short"
    with pytest.raises(TooShortVideoError, match="only 17.*at most 5 frames"):
        read(path, frames=6, start=2, stride=3)
    with pytest.raises(TooShortVideoError, match="only 17.*start earlier"):
        read(path, frames=1, start=17)


def wav(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path.read_bytes()


def test_what_is_no_video_is_refused_with_the_probable_cause(tmp_path):
    cases = {
        b"": ("not-a-video", "empty"),
        b"<html><body>404 Not Found</body></html>" * 9: ("not-a-video", "it is text"),
        bytes(range(256)) * 64: ("not-a-video", "no known video format"),
        wav(tmp_path / "a.wav"): ("no-video-stream", "wav file without a video stream: it holds audio"),
    }
    for content, (code, cause) in cases.items():
        path = tmp_path / "renamed.mp4"
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(UndecodableVideoError, match=cause) as caught:
                read(source)
            assert caught.value.code == code
        with pytest.raises(UndecodableVideoError, match=cause):
            probe_video(path)


def test_cover_art_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(quarters(), format="rgb24").reformat(format="yuvj420p")
        for stream, frame in ((cover, picture), (cover, None), (sound, silence), (sound, None)):
            container.mux(stream.encode(frame))
    with pytest.raises(UndecodableVideoError, match="cover art"):
        read(tmp_path / "song.mp4", frames=1)


def test_a_playlist_is_not_followed(tmp_path):
    target = save(tmp_path / "secret.ts", counting(3))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(playlist)
    with pytest.raises(UndecodableVideoError, match="playlist"):
        read(tmp_path / "a.m3u8", frames=1)


SCRIPTS = {
    "HLS of files": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{file}\n#EXT-X-ENDLIST\n",
    "HLS of URLs": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "HLS with a key": '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n',
    "HLS of parts": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nconcat:{file}|subfile,,start,0,end,9,,:{file}\n",
    "concat": "ffconcat version 1.0\nfile '{file}'\nfile '{url}'\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
            'mimeType="video/mp2t"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>",
    "SVG": '<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="9" height="9"><image xlink:href="{url}"/></svg>',
    "RTSP": "[Reference]\nRef1={url}?MSWMExt=.asf\n",
    "an address": "{url}\n",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_that_names_other_files_makes_libav_open_none(tmp_path, web, script):
    target = save(tmp_path / "secret.ts", counting(3))
    web["secret.ts"] = Path(target).read_bytes()
    text = script.format(file=target, url=f"{web.url}/secret.ts")
    for name in ("a.m3u8", "a.ffconcat", "a.mpd", "a.svg", "a.asf", "a.mp4"):
        (tmp_path / name).write_text(text)
        for source in (tmp_path / name, text.encode()):
            with pytest.raises(UndecodableVideoError):
                read(source, frames=1)
    assert web.requests == []


def test_an_address_is_taken_for_a_local_path():
    with pytest.raises(FileNotFoundError):
        read("http://localhost/a.mp4")


def test_an_mp4_without_its_index_says_so(tmp_path):
    content = save(tmp_path / "a.mp4", rough()).read_bytes()
    with pytest.raises(UndecodableVideoError, match="moov"):
        read(content[: len(content) // 2])


def test_an_mp4_with_a_cut_index_is_refused(tmp_path):
    content = save(tmp_path / "a.mp4", rough()).read_bytes()
    with pytest.raises(UndecodableVideoError, match="cut off"):
        read(content[:-100])


def test_a_cut_mp4_gives_its_whole_frames_and_nothing_after_the_damage():
    content = encode_video(rough(), 10)
    cut = content[: len(content) * 6 // 10]
    whole, part = read(content, frames=6), read(cut, frames=6)
    np.testing.assert_array_equal(part.frames, whole.frames)
    with pytest.raises(CorruptVideoError, match=r"damaged near frame \d+, before the last requested frame"):
        read(cut, frames=24)
    with pytest.raises(CorruptVideoError):
        probe_video(cut)


def test_a_cut_matroska_is_too_short(tmp_path):
    content = save(tmp_path / "a.mkv", rough()).read_bytes()
    with pytest.raises(TooShortVideoError, match="longer video"):
        read(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")]
)
def test_scribbled_bytes_are_noticed(tmp_path, name, codec):
    content = bytearray(save(tmp_path / name, rough(), codec=codec).read_bytes())
    middle, length = len(content) // 2, len(content) // 10  # two frames and more, headers included
    content[middle : middle + length] = np.random.default_rng(0).bytes(length)
    # Matroska's reader skips what it cannot parse, so that frames are missing instead
    with pytest.raises(TooShortVideoError if name == "a.mkv" else CorruptVideoError):
        read(bytes(content))


def test_lost_transport_packets_are_noticed(tmp_path):
    content = save(tmp_path / "a.ts", rough()).read_bytes()
    packets = [content[i : i + 188] for i in range(0, len(content), 188)]
    middle = len(packets) // 2
    with pytest.raises(CorruptVideoError):
        read(b"".join(packets[:middle] + packets[middle + 3 :]))


def test_a_frame_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mp4", counting(3))
    read(path, frames=3, max_pixels_per_frame=64 * 48)
    monkeypatch.setattr(video._Video, "decode", lambda self: pytest.fail("decoding began"))
    with pytest.raises(OversizedVideoError, match="64x48 pixels, more than the accepted 3071") as caught:
        read(path, frames=3, max_pixels_per_frame=64 * 48 - 1)
    assert (caught.value.code, caught.value.key) == ("video-too-large", "references.max_pixels")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"height": 0}, "height is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_requests_without_sense_are_refused(request_, message):
    with pytest.raises(VideoError, match=message) as caught:
        read(b"never opened", **request_)
    assert caught.value.code == "video-request-invalid"


def test_a_description_of_a_network_session_opens_no_port(monkeypatch):
    """FFmpeg's own way with it is to wait ten seconds for pictures from the network."""
    session = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50004 RTP/AVP 96\n"
    session += b"a=rtpmap:96 H264/90000\n"
    with pytest.raises(UndecodableVideoError) as caught:
        read(session)
    assert caught.value.code == "not-a-video"
    monkeypatch.setattr(video, "_FORMATS", "sdp")
    with pytest.raises(UndecodableVideoError, match="not a video that FFmpeg can open|format or size cannot be found"):
        read(session)


def test_an_unknown_fit_is_refused():
    with pytest.raises(VideoError, match="'pad'.*'crop' or 'stretch'"):
        video._check_request(1, 2, 2, 0, 1, fit="pad")


# --- encoding


def test_what_is_encoded_comes_back_nearly_unchanged():
    texture = moving()
    content = encode_video(texture, 10)
    clip = read(content, 24, 96, 128)
    assert psnr(clip.frames, texture) > 40
    assert clip.fps == 10


def test_a_lower_crf_comes_back_closer_and_is_written_with_the_default_unless_asked(tmp_path):
    noise = rough(4)[..., :1].repeat(3, -1)  # grey, because subsampled colours are lost at any crf
    best, fine, default = (psnr(read(encode_video(noise, 10, crf=crf), 4, 96, 128).frames, noise) for crf in (1, 4, 12))
    assert best > fine > default
    for name, options in {"a.mp4": {}, "b.mp4": {"crf": 4}}.items():
        write_video(tmp_path / name, noise, 10, **options)
        assert (tmp_path / name).read_bytes() == encode_video(noise, 10, crf=options.get("crf", 12))


@pytest.mark.parametrize("crf", [-1, 0, 52])
def test_a_crf_that_is_none_or_that_few_players_know_is_refused(crf):
    with pytest.raises(VideoError, match=f"crf is {crf}, expected 1"):
        encode_video(counting(2), 10, crf=crf)


def test_saturated_colours_come_back_true():
    clip = read(encode_video(np.stack([quarters()] * 2), 10), 2)
    spots = clip.frames[1, [12, 12, 36, 36], [16, 48, 16, 48]]
    np.testing.assert_allclose(spots, [RED, GREEN, BLUE, WHITE], atol=4)


@pytest.mark.parametrize("fps", [10, 8.0, 2.5, 30000 / 1001, 24000 / 1001 / 7, 12.3456789, 0.5])
def test_the_frame_rate_comes_back(fps):
    assert probe_video(encode_video(counting(6), fps)).fps == pytest.approx(fps, rel=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 23])
def test_every_frame_is_in_the_file(frames):
    info = probe_video(encode_video(counting(frames), 10))
    assert (info.frames, info.height, info.width) == (frames, 48, 64)


def test_the_file_plays_anywhere_and_starts_at_once(tmp_path):
    content = encode_video(counting(4), 10)
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"Lavf" not in content  # no version of the muxer, which would change the bytes
    (tmp_path / "a.mp4").write_bytes(content)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)


def test_the_same_frames_give_the_same_bytes_in_another_process(tmp_path):
    texture = moving(12)
    np.save(tmp_path / "frames.npy", texture)
    script = (
        "import sys, numpy as np; from ditflow.media import video; "
        "video.write_video(sys.argv[2], np.load(sys.argv[1]), 10)"
    )
    arguments = [str(tmp_path / "frames.npy"), str(tmp_path / "b.mp4")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=Path(video.__file__).parents[2])
    assert (tmp_path / "b.mp4").read_bytes() == encode_video(texture, 10)


def test_the_bytes_do_not_depend_on_the_processor(monkeypatch):
    """The same as what x264 writes when it uses no special instructions of any processor."""
    frames = rough(24, 144, 192)
    content = encode_video(frames, 10)
    monkeypatch.setattr(video, "_REPRODUCIBLE", "no-asm=1")
    assert encode_video(frames, 10) == content


def test_one_thread_encodes_whatever_the_machine_has():
    """x264 writes its settings into the stream; small frames would not be shared among threads anyway."""
    assert b" threads=1 " in encode_video(counting(2, 480, 720), 10)


def test_strided_views_are_encoded_like_their_copies():
    view = moving(8)[:, :, ::2][:, ::-1]
    assert encode_video(view, 10) == encode_video(view.copy(), 10)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 48, 63, 3), np.uint8), 10, "63x48.*even"),
        (np.zeros((2, 47, 64, 3), np.uint8), 10, "64x47.*even"),
        (np.zeros((2, 48, 64, 3), np.float32), 10, r"float32 \[2, 48, 64, 3\].*multiplied by 255"),
        (np.zeros((2, 3, 48, 64), np.uint8), 10, "channels come last"),
        (np.zeros((0, 48, 64, 3), np.uint8), 10, "T >= 1"),
        (np.zeros((2, 48, 64, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((2, 48, 64, 3), np.uint8), float("nan"), "fps is nan"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(frames, fps, message):
    with pytest.raises(VideoError, match=message) as caught:
        encode_video(frames, fps)
    assert caught.value.code == ("video-request-invalid" if "fps" in message else "frames-not-encodable")


def test_writing_replaces_the_file_in_one_move_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    write_video(path, counting(4), 10)
    before = path.read_bytes()
    assert before == encode_video(counting(4), 10)

    def broken(source, target):
        assert Path(source).parent == path.parent
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_video(path, counting(8), 10)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


def test_an_error_of_bytes_names_what_the_caller_calls_them():
    with pytest.raises(UndecodableVideoError, match=r"^s3://bucket/a\.mp4: "):
        read_video(b"no video", frames=2, height=8, width=8, name="s3://bucket/a.mp4")


def test_frames_that_grow_beyond_the_limit_are_oversized_not_damaged(monkeypatch):
    data = encode_video(np.zeros((3, 64, 64, 3), np.uint8), fps=8.0)
    sizes = iter([False, True])

    def check(self, sized):
        if next(sizes, True):
            raise OversizedVideoError("too large")

    monkeypatch.setattr("ditflow.media.video._Video._check_size", check)
    with pytest.raises(OversizedVideoError, match="^too large$"):
        read_video(data, frames=3, height=8, width=8)
