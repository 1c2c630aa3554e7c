"""CoTracker as a TorchScript file: what it is asked, what becomes of its answer, and which files are refused."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditflow.metrics.cotracker import VISIBILITY_THRESHOLD, cotracker
from ditflow.metrics.errors import MetricInputError
from ditflow.metrics.motion_fidelity import motion_fidelity
from ditflow.metrics.trackers import track
from ditflow.metrics.tracks import query_grid

FRAMES, HEIGHT, WIDTH = 6, 32, 48
BLANK = np.full((FRAMES, HEIGHT, WIDTH, 3), 200, np.uint8)


class Sliding(nn.Module):
    """Moves all queries by the same way in each frame; refuses to be asked otherwise than is documented."""

    def __init__(self, velocity=(2.05, -1.03)):
        super().__init__()
        self.register_buffer("velocity", torch.tensor(velocity))

    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        assert video.dtype == torch.float32 and queries.dtype == torch.float32
        assert video.dim() == 5 and video.size(0) == 1 and video.size(2) == 3
        assert queries.dim() == 3 and queries.size(0) == 1 and queries.size(2) == 3
        time = torch.arange(video.size(1), dtype=torch.float32)[None, :, None] - queries[:, None, :, 0]
        tracks = queries[:, None, :, 1:] + time[..., None] * self.velocity
        return tracks, torch.ones(tracks.shape[:3], dtype=torch.bool)


class ByColour(Sliding):
    """Moves queries right by the red of pixel (0, 0) in each frame, and down by the blue of pixel (x 2, y 1)."""

    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.stack([video[0, :, 0, 0, 0], video[0, :, 2, 1, 2]], dim=-1)
        tracks = queries[:, None, :, 1:] + steps[None, :, None]
        return tracks, torch.ones(tracks.shape[:3], dtype=torch.bool)


class Answering(nn.Module):
    """Answers what it was made with, whatever the video."""

    def __init__(self, tracks: Tensor, visibility: Tensor):
        super().__init__()
        self.register_buffer("tracks", tracks)
        self.register_buffer("visibility", visibility)

    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        return self.tracks, self.visibility


class OnlyTracks(nn.Module):
    def forward(self, video: Tensor, queries: Tensor) -> Tensor:
        return queries


class Marker:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


GRID = query_grid(HEIGHT, WIDTH)


@pytest.fixture
def weights(tmp_path):
    """Writes a module as TorchScript and returns the path."""

    def write(module):
        torch.jit.script(module).save(str(tmp_path / "tracker.pt"))
        return tmp_path / "tracker.pt"

    return write


def answer(visibility=None, move=(1.0, 0.0)):
    """A valid answer [1, T, N] whose points move evenly, and its visibility."""
    tracks = torch.from_numpy(GRID) + torch.arange(FRAMES)[:, None, None] * torch.tensor(move)
    seen = torch.ones(FRAMES, len(GRID)) if visibility is None else visibility
    return tracks[None], seen[None]


# --- what it is asked and what comes back


def test_points_move_with_the_modules_velocity_until_they_leave(weights):
    tracks = cotracker(weights(Sliding()))(BLANK)
    ways = GRID[:, None] + np.arange(FRAMES)[:, None] * np.array([2.05, -1.03])
    expected = (ways[..., 0] <= WIDTH - 0.5) & (ways[..., 1] >= -0.5)
    assert 0.5 < expected[:, -1].mean() < 1
    np.testing.assert_array_equal(tracks.visible, expected)
    np.testing.assert_allclose(tracks.points[expected], ways[expected], atol=1e-4)
    assert tracks.points.min() > -0.5 and (tracks.points < (WIDTH - 0.5, HEIGHT - 0.5)).all()


def test_the_video_comes_in_levels_with_channels_before_rows(weights):
    frames = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, 0, 0, 0], frames[:, 1, 2, 2] = (0, 3, 7), (0, 1, 5)
    for layout in (frames, np.asfortranarray(frames), frames[:, :, ::-1].copy()[:, :, ::-1]):
        tracks = cotracker(weights(ByColour()))(layout)
        ways = tracks.points[0] - tracks.points[0, 0]
        np.testing.assert_allclose(ways, [(0, 0), (3, 1), (7, 5)], atol=1e-5)


def test_hidden_points_stay_where_they_were_seen_and_come_back(weights):
    seen = torch.ones(FRAMES, len(GRID), dtype=torch.bool)
    seen[2:4, 5] = False
    tracks = cotracker(weights(Answering(*answer(seen))))(BLANK)
    assert tracks.visible[5].tolist() == [True, True, False, False, True, True]
    np.testing.assert_allclose(tracks.points[5, :, 0] - GRID[5, 0], [0, 1, 1, 1, 4, 5], atol=1e-5)


def test_probabilities_are_visible_above_the_threshold(weights):
    seen = torch.ones(FRAMES, len(GRID))
    seen[1:, 7] = torch.tensor([1.0, VISIBILITY_THRESHOLD + 0.01, VISIBILITY_THRESHOLD - 0.01, 0.5, 0.0])
    tracks = cotracker(weights(Answering(*answer(seen))))(BLANK)
    assert tracks.visible[7].tolist() == [True, True, True, False, False, False]


def test_points_start_where_they_were_asked_for(weights):
    tracks, seen = answer(torch.zeros(FRAMES, len(GRID), dtype=torch.bool))
    followed = cotracker(weights(Answering(tracks + 1, seen)))(BLANK)
    np.testing.assert_array_equal(followed.points, GRID[:, None].repeat(FRAMES, axis=1))
    assert followed.visible[:, 0].all() and not followed.visible[:, 1:].any()


def test_track_takes_it_by_name_and_motion_fidelity_takes_its_tracks(weights):
    path = weights(Sliding())
    tracks, same = track(BLANK, "cotracker3", path), cotracker(path)(BLANK)
    np.testing.assert_array_equal(tracks.points, same.points)
    assert motion_fidelity(tracks, same) == pytest.approx(1, abs=1e-6)
    opposite = track(BLANK, "cotracker3", str(weights(Sliding((-2.05, 1.03)))))
    assert motion_fidelity(opposite, same) == pytest.approx(-1, abs=1e-6)


# --- what is refused


def test_without_weights_it_says_that_they_are_never_downloaded():
    with pytest.raises(MetricInputError, match="came without weights.*never downloaded.*lucas-kanade or dis") as caught:
        track(BLANK, "cotracker3")
    assert (caught.value.code, caught.value.key) == ("tracker-weights-missing", "metrics.tracker_weights")


def test_trackers_without_weights_refuse_them(tmp_path):
    with pytest.raises(MetricInputError, match="tracker.pt came with the tracker dis.*cotracker3 is meant") as caught:
        track(BLANK, "dis", tmp_path / "tracker.pt")
    assert caught.value.code == "tracker-weights-unexpected"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MetricInputError, match="absent.pt is not a file.*never downloaded") as caught:
        cotracker(tmp_path / "absent.pt")
    assert caught.value.code == "tracker-weights-missing"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unread(tmp_path, zipped):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "marker"
    torch.save({"model": Marker(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        MetricInputError, match=r"is not a TorchScript archive.*unpickling.*torch\.jit\.script"
    ) as caught:
        cotracker(path)
    assert caught.value.code == "tracker-weights-not-torchscript"
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_pickle_in_torchscripts_layout_is_refused_unread(tmp_path):
    path, marker = tmp_path / "disguised.pt", tmp_path / "marker"
    torch.save({"model": Marker(marker)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("disguised/constants.pkl", pickle.dumps(Marker(marker)))
        archive.writestr("disguised/code/__torch__.py", "")
    with pytest.raises(MetricInputError, match="has TorchScript's layout, but .* cannot load it") as caught:
        cotracker(path)
    assert caught.value.code == "tracker-weights-damaged"
    assert not marker.exists()


@pytest.mark.parametrize("entries", [["a/constants.pkl"], ["a/code/x.py"], ["a/constants.pkl", "a/decode/x.py"], []])
def test_other_archives_are_refused(tmp_path, entries):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        for entry in entries:
            archive.writestr(entry, "")
    with pytest.raises(MetricInputError) as caught:
        cotracker(tmp_path / "other.zip")
    assert caught.value.code == "tracker-weights-not-torchscript"


def test_a_file_cut_short_is_refused(weights):
    path = weights(Sliding())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MetricInputError) as caught:
        cotracker(path)
    assert caught.value.code == "tracker-weights-not-torchscript"


TRACKS, SEEN = answer()
OUTPUT = "tracker-output-invalid"


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        (
            OnlyTracks(),
            OUTPUT,
            r"returned Tensor, expected tensors \(\[1, 6, 600, 2\], \[1, 6, 600\]\)",
        ),
        (
            Answering(TRACKS.transpose(1, 2), SEEN),
            OUTPUT,
            r"returned \(\[1, 600, 6, 2\], \[1, 6, 600\]\), expected",
        ),
        (
            Answering(TRACKS, SEEN[..., None]),
            OUTPUT,
            r"returned \(\[1, 6, 600, 2\], \[1, 6, 600, 1\]\), expected",
        ),
        (
            Answering(TRACKS[:, 1:], SEEN[:, 1:]),
            OUTPUT,
            r"returned \(\[1, 5, 600, 2\].*export it again",
        ),
        (Answering(TRACKS, 4 * SEEN - 8), OUTPUT, "visibilities from -4 to -4.*logits"),
        (Answering(TRACKS, SEEN * torch.nan), OUTPUT, "visibilities from nan to nan"),
        (Answering(TRACKS * torch.nan, SEEN), "tracks-invalid", "coordinates of the tracks are not finite"),
    ],
)
def test_an_answer_of_another_form_is_refused(weights, module, code, message):
    assert len(GRID) == 600
    with pytest.raises(MetricInputError, match=message) as caught:
        cotracker(weights(module))(BLANK)
    assert caught.value.code == code


def test_frames_that_cannot_be_tracked_are_refused(weights):
    follow = cotracker(weights(Sliding()))
    for frames, code in ((BLANK.astype(np.float32), "frames-invalid"), (BLANK[:1], "frames-too-few")):
        with pytest.raises(MetricInputError) as caught:
            follow(frames)
        assert caught.value.code == code
