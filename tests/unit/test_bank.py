"""Motion banks: learned once, kept bit by bit, reused without optimisation, and refused where they do not fit."""

import json
import math
import pickle
import struct
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from tiny import FRAMES, SIZE

from ditflow.artifact import ArtifactError, header_end, update_hashes, write_artifact
from ditflow.banks.bank import BankHeader, BankMismatchError, MotionBank
from ditflow.banks.compression import StepOffsets
from ditflow.errors import SettingsError
from ditflow.motion import motion_statistics
from ditflow.motion.reference import MotionReference, extract_motion
from ditflow.settings import MethodSettings, SamplingSettings, settings_dict
from ditflow.transfer import Transferred, learn_bank, transfer_motion
from ditflow.types import NonFiniteError, TokenGrid

STEPS, GUIDED_STEPS = 4, 2
PROMPT = "a red ball"
CLIP = (FRAMES, SIZE, SIZE)
SAMPLING = SamplingSettings(steps=STEPS)
METHOD = MethodSettings(
    "ditflow", "position", guided_steps=GUIDED_STEPS, iterations=2, learning_rate=(0.05, 0.05), blocks=(1,)
)


def generate(backbone, reference, method: MethodSettings = METHOD, prompt: str = PROMPT, **options) -> Transferred:
    given = {"size": CLIP, "sampling": SAMPLING, "seed": 5} | options
    return transfer_motion(backbone, prompt, reference=reference, method=method, **given)


@dataclass(frozen=True)
class Learned:
    """A run that optimised positions, with its bank as it comes back from a file."""

    method: MethodSettings
    reference: MotionReference
    run: Transferred
    data: bytes
    bank: MotionBank


def learned_with(backbone, video: np.ndarray, method: MethodSettings) -> Learned:
    reference = extract_motion(backbone, video, method)
    run = generate(backbone, reference, method)
    assert run.bank is not None
    data = run.bank.to_bytes()
    return Learned(method, reference, run, data, MotionBank.from_bytes(data))


@pytest.fixture(scope="module", params=["position", "coordinates"])
def learned(request, backbone, moving_video) -> Learned:
    return learned_with(backbone, moving_video, replace(METHOD, optimize=request.param))


@pytest.fixture(scope="module")
def rotary(rotary_backbone, moving_video) -> Learned:
    return learned_with(rotary_backbone, moving_video, METHOD)


def assert_same_positions(one: MotionBank, other: MotionBank) -> None:
    assert one.guided_steps == other.guided_steps
    for step in range(one.guided_steps):
        change, expected = one.offsets(step), other.offsets(step)
        assert change.keys() == expected.keys()
        assert all(torch.equal(change[part], expected[part]) for part in expected)


# ---------------------------------------------------------------------- learning


def test_learning_a_bank_gives_the_positions_of_the_whole_run_and_stops_after_the_guided_steps(learned, backbone):
    alone = learn_bank(
        backbone, PROMPT, reference=learned.reference, size=CLIP, method=learned.method, sampling=SAMPLING, seed=5
    )
    assert_same_positions(alone.bank, learned.run.bank)
    assert len(alone.records) == GUIDED_STEPS
    assert len(learned.run.records) == STEPS
    assert alone.bank.header == learned.run.bank.header
    assert alone.video is None


def test_the_header_tells_all_that_the_positions_depend_on(learned, backbone):
    header = learned.run.bank.header
    assert (header.model, header.model_revision) == (backbone.name, backbone.revision)
    assert header.grid == (3, 4, 4)
    assert header.steps == STEPS
    assert header.timesteps == (999, 749)
    assert header.method == settings_dict(learned.method.resolve(backbone.defaults))
    assert header.prompt == PROMPT
    assert header.provenance == {"size": list(CLIP)}
    assert [list(losses) for losses in header.losses] == learned.run.losses


def test_a_bank_keeps_the_latents_that_injection_needs(learned, rotary_backbone, rotary):
    assert torch.equal(learned.bank.latents, learned.reference.latents)
    method = replace(METHOD, injection=False)
    without = learn_bank(
        rotary_backbone,
        PROMPT,
        reference=replace(rotary.reference, latents=None),
        size=CLIP,
        method=method,
        sampling=SAMPLING,
    )
    assert without.bank.latents is None


@pytest.mark.parametrize(
    "method", [replace(METHOD, optimize="latent"), replace(METHOD, name="injection"), replace(METHOD, name="none")]
)
def test_a_bank_is_learned_by_a_motion_loss_on_positions_only(rotary_backbone, rotary, method):
    with pytest.raises(ValueError, match=f"position or coordinates, not {method.name}, {method.optimize}"):
        learn_bank(rotary_backbone, PROMPT, reference=rotary.reference, size=CLIP, method=method)


# ---------------------------------------------------------------------- files


def test_a_file_keeps_every_bit(learned):
    assert_same_positions(learned.bank, learned.run.bank)
    assert torch.equal(learned.bank.latents, learned.run.bank.latents)
    assert learned.bank.header == learned.run.bank.header
    assert MotionBank.read_header(learned.data) == learned.run.bank.header


def test_the_same_bank_gives_the_same_bytes(learned):
    assert learned.run.bank.to_bytes() == learned.data
    assert learned.bank.to_bytes() == learned.data


def test_the_steps_of_a_bank_stand_in_order(rotary):
    tokens = TokenGrid(*rotary.bank.header.grid).tokens
    changes = [{"query": torch.full((tokens, 3), float(n)), "key": torch.zeros(tokens, 3)} for n in range(12)]
    header = replace(rotary.bank.header, timesteps=tuple(range(12)))
    loaded = MotionBank.from_bytes(MotionBank.from_steps(header, changes).to_bytes())
    assert [loaded.offsets(step)["query"][0, 0].item() for step in range(12)] == list(range(12))


@pytest.mark.parametrize("error", [0.3, 0.05, 0.002])
def test_a_compressed_bank_is_smaller_and_as_near_as_was_asked_for(learned, error):
    small = learned.bank.compressed(error)
    assert small.header.error == error
    assert len(small.to_bytes()) < 0.8 * len(learned.data)
    for part, values in small.parts.items():
        true = learned.bank.parts[part].whole
        came = torch.stack([values.at(step) for step in range(len(true))])
        assert (came - true).norm() <= error * true.norm()
    assert_same_positions(MotionBank.from_bytes(small.to_bytes()), small)


def test_a_bank_compressed_by_nothing_is_the_bank(learned):
    assert learned.bank.compressed(0.0) is learned.bank


def test_a_compressed_bank_moves_the_video_almost_the_same(learned, backbone):
    whole, small = (generate(backbone, bank) for bank in (learned.bank, learned.bank.compressed(0.01)))
    assert (small.latents - whole.latents).norm() < 0.01 * whole.latents.norm()


def header_of(learned: Learned) -> dict:
    """The header as JSON, of a bank without a flow."""
    return {**json.loads(json.dumps(asdict(learned.bank.header))), "motion": None}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda learned: pickle.dumps([1.0]), "artifact-not-safetensors"),
        (lambda learned: learned.data[: len(learned.data) // 2], "artifact-not-safetensors"),
        (lambda learned: learned.data[:-1], "artifact-not-safetensors"),
        (lambda learned: learned.reference.to_bytes(), "artifact-wrong-kind"),
        (lambda learned: write_artifact("motion bank", 1000, header_of(learned), {}), "artifact-newer-format"),
        (lambda learned: write_artifact("motion bank", 3, header_of(learned), {}), "artifact-older-format"),
        (lambda learned: write_artifact("motion bank", 5, {"model": "x"}, {}), "artifact-damaged"),
    ],
    ids=["pickle", "half", "one-byte-short", "motion-reference", "newer", "older", "no-header"],
)
def test_another_file_is_refused_with_what_it_is(rotary, damage, code):
    with pytest.raises(ArtifactError, match=r"^my\.safetensors ") as caught:
        MotionBank.from_bytes(damage(rotary), "my.safetensors")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda learned: learned.data[:-1], "is not a safetensors file .*damaged, cut off.*pickles are never read"),
        (lambda learned: learned.reference.to_bytes(), "is not a motion bank: it is a motion reference"),
        (
            lambda learned: write_artifact("motion bank", 1000, header_of(learned), {}),
            "has motion bank format 1000; this version reads format 5: upgrade ditflow",
        ),
        (
            lambda learned: write_artifact("motion bank", 4, header_of(learned), {}),
            "format 4.* reads format 5: make it",
        ),
    ],
    ids=["not-safetensors", "wrong-kind", "newer", "older"],
)
def test_the_message_says_what_the_file_is_and_what_to_do(rotary, damage, message):
    with pytest.raises(ArtifactError, match=message):
        MotionBank.from_bytes(damage(rotary), "my.safetensors")


def with_header(learned: Learned, **changes) -> bytes:
    return write_artifact("motion bank", 5, {**header_of(learned), **changes}, {})


def renamed(learned: Learned, name: str, *shape: int) -> bytes:
    return write_artifact("motion bank", 5, header_of(learned), {name: torch.zeros(shape or (2, 2))})


def factors(learned: Learned, part: str, channels: int, rank: int, optimize: str = "position") -> bytes:
    """A bank of one part in two factors, which multiply to 2 steps of 48 tokens with so many channels."""
    tensors = {"left": torch.zeros(48, rank).half(), "right": torch.zeros(2, channels, rank).half()}
    named = {f"{part}.{form}": tensor for form, tensor in tensors.items()}
    return write_artifact("motion bank", 5, {**header_of(learned), "optimize": optimize}, named)


def motion_of(learned: Learned) -> dict:
    return asdict(learned.bank.header.motion)


def with_flow(learned: Learned, **changes) -> bytes:
    """The file with all of its tensors and another header."""
    tensors = {"flow": learned.bank.flow}
    return write_artifact("motion bank", 5, {**header_of(learned), **changes}, tensors)


def rewritten(learned: Learned, change) -> bytes:
    """The file with another header of safetensors, of any content and the right length."""
    length = int.from_bytes(learned.data[:8], "little")
    text = change(learned.data[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + learned.data[8 + length :]


def bare(header: dict, tensors: bytes = b"") -> bytes:
    """A file of safetensors, by hand."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


USED = {"frames": 9, "height": 32, "width": 32, "start": 0, "stride": 2, "fit": "crop"}
DAMAGED = {
    "no format": (lambda bank: with_header(bank, format=None), "format None"),
    "a grid of text": (lambda bank: with_header(bank, grid="abc"), "grid 'abc'"),
    "a grid of nothing": (lambda bank: with_header(bank, grid=[0, 4, 4]), "grid "),
    "a schedule of text": (lambda bank: with_header(bank, timesteps="999"), "timesteps '999'"),
    "a schedule of millions": (lambda bank: with_header(bank, timesteps=[0] * 10**6), "timesteps "),
    "steps of text": (lambda bank: with_header(bank, steps="4"), "steps '4'"),
    "losses of text": (lambda bank: with_header(bank, losses=["ab"]), "losses "),
    "losses of NaN": (lambda bank: with_header(bank, losses=[[math.nan]]), "losses "),
    "a step without losses": (lambda bank: with_header(bank, losses=[[]]), "losses "),
    "a model that is no text": (lambda bank: with_header(bank, model_revision=5), "model_revision 5"),
    "a size of text": (lambda bank: with_header(bank, provenance={"size": "9x32"}), "provenance "),
    "an unknown field": (lambda bank: with_header(bank, colour="red"), "unknown motion bank header"),
    "a tensor of no part": (lambda bank: renamed(bank, "positions"), "tensor 'positions'"),
    "a tensor of no form": (lambda bank: renamed(bank, "query.middle"), "tensor 'query.middle'"),
    "latents without frames": (lambda bank: renamed(bank, "latents"), r"latents of shape \[2, 2\]"),
    "a flow without statistics": (lambda bank: with_flow(bank), "motion None .* Motion"),
    "statistics without a flow": (
        lambda bank: with_header(bank, motion=motion_of(bank)), "motion Motion.* None"
    ),
    "statistics of another flow": (
        lambda bank: with_flow(bank, motion={**motion_of(bank), "moving": 0.5}), "motion .*moving=0.5"
    ),
    "statistics of text": (lambda bank: with_header(bank, motion="fast"), "motion 'fast'"),
    "a statistic too few": (lambda bank: with_header(bank, motion={"moving": 1}), "motion "),
    "a flow of another grid": (
        lambda bank: renamed(bank, "flow", 2, 15, 2), r"flow torch.float32 \[2, 15, 2\].* \[2, 16, 2\]"
    ),
    "a flow of fractions": (lambda bank: renamed(bank, "flow", 2, 16, 2), "flow torch.float32 "),
    "a tag that is no text": (lambda bank: with_header(bank, tags=[1]), "tags "),
    "a seed of text": (lambda bank: with_header(bank, provenance={"seed": "1"}), "provenance "),
    "a reference of no frames": (
        lambda bank: with_header(bank, provenance={"reference_video": {**USED, "frames": 0}}),
        "provenance ",
    ),
    "a reference read by other words": (
        lambda bank: with_header(bank, provenance={"reference_video": {**USED, "name": "/etc/passwd"}}),
        "provenance ",
    ),
    "a rate of nothing": (lambda bank: with_header(bank, provenance={"fps": 0}), "provenance "),
    "a factor alone": (lambda bank: renamed(bank, "query.left"), r"for query .* left torch.float32 \[2, 2\]"),
    "tokens of another grid": (lambda bank: renamed(bank, "query.whole", 2, 2, 3), "for query .* a 3x4x4 grid"),
    "steps of another schedule": (lambda bank: renamed(bank, "query.whole", 1, 48, 3), "for query .* a 3x4x4 grid"),
    "a grid of a city": (lambda bank: with_header(bank, grid=[1000, 1000, 1000]), "grid "),
    "a video of a year": (
        lambda bank: with_header(bank, provenance={"size": [2**30, 32, 32]}), "size .* on a grid"
    ),
    "moves along six axes": (lambda bank: factors(bank, "query", 6, 1, optimize="coordinates"), "for query "),
    "a terabyte of one column": (lambda bank: factors(bank, "additive", 2**23, 1), "for additive "),
    "a petabyte of nothing": (lambda bank: factors(bank, "additive", 2**50, 0), "for additive "),
    "values of nothing": (lambda bank: factors(bank, "additive", 5, 0), "for additive"),
    "latents of no number": (lambda bank: renamed(bank, "latents", 1, 3, 0, 8, 8), r"latents torch.float32 \[1, 3, 0"),
    "latents of two clips": (lambda bank: renamed(bank, "latents", 2, 3, 4, 8, 8), r"latents torch.float32 \[2, 3"),
    "latents of a larger video": (lambda bank: renamed(bank, "latents", 1, 3, 1, 99, 8), r"latents torch.* 99, 8\]"),
    "no part": (lambda bank: with_header(bank), "has no offsets"),
    "positions that are no name": (lambda bank: with_header(bank, positions=5), "positions 5"),
    "an optimized variable of no kind": (lambda bank: with_header(bank, optimize="latent"), "optimize 'latent'"),
    "an injection of no step": (
        lambda bank: with_header(bank, injected_steps=0), "injected_steps 0"
    ),
    "an error of 2": (lambda bank: with_header(bank, error=2), "error 2"),
    "versions of nothing": (lambda bank: with_header(bank, libraries=["torch"]), "libraries "),
    "a header in pieces": (
        lambda bank: rewritten(bank, lambda text: text.replace(b'{\\"error', b'[\\"error')), "not JSON"
    ),
    "a header that is a list": (lambda bank: bare({"__metadata__": {"ditflow": "[1]"}}), r"header \[1\]"),
    "a header nested without end": (lambda bank: bare({"__metadata__": {"ditflow": "[" * 100_000}}), "not JSON"),
    "no header": (lambda bank: bare({"__metadata__": None}), "other origin"),
    "a tensor of an unknown type": (
        lambda bank: rewritten(bank, lambda text: text.replace(b'"F32"', b'"F99"')), "not a safetensors file"
    ),
    "a tensor of a rare type": (
        lambda bank: bare({"latents": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"ab"),
        "not a safetensors file|not a motion bank",
    ),
    "a header of 9 megabytes": (
        lambda bank: rewritten(bank, lambda text: text + b" " * 9 * 2**20), "a header of "
    ),
}  # fmt: skip


@pytest.mark.parametrize("deinterlace", [{}, {"deinterlace": "bwdif"}, {"deinterlace": "off"}], ids=str)
def test_a_bank_tells_which_frames_of_which_reference_it_was_learned_of(rotary, deinterlace):
    used = {**USED, **deinterlace}
    provenance = {**rotary.bank.header.provenance, "reference_video": used}
    bank = replace(rotary.bank, header=replace(rotary.bank.header, provenance=provenance))
    assert MotionBank.from_bytes(bank.to_bytes()).header.provenance["reference_video"] == used


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_bank_is_refused_with_what_is_wrong(rotary, damage, message):
    with pytest.raises(ArtifactError, match=f"^my.safetensors .*(?:{message})") as caught:
        MotionBank.from_bytes(damage(rotary), "my.safetensors")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_bank_with_a_value_that_is_not_finite_is_neither_read_nor_written(value):
    bank = small_bank()
    data = bank.to_bytes()
    at = data.index(struct.pack("<f", 0.5), header_end(data))
    data = update_hashes(data[:at] + struct.pack("<f", value) + data[at + 4 :])
    with pytest.raises(
        ArtifactError, match=r"^my.safetensors .*key.whole: 1 of 24 values are NaN or infinite"
    ) as caught:
        MotionBank.from_bytes(data, "my.safetensors")
    assert caught.value.code == "artifact-not-finite"
    bank.parts["key"].whole[0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"key.whole of the motion bank: 1 of 24"):
        bank.to_bytes()


# ---------------------------------------------------------------------- one changed byte


def small_bank() -> MotionBank:
    """A bank of a few kilobytes with every kind of tensor."""
    header = BankHeader(
        'a "model"',
        "0123",
        (2, 2, 2),
        4,
        (999,),
        "rotary",
        "coordinates",
        {"name": "ditflow"},
        1,
        'a "sha256_header": ball',
        ((1.0, 0.5),),
        tags=("x",),
    )
    parts = [{"query": torch.ones(8, 3), "key": torch.full((8, 3), 0.5)}]
    flow = torch.tensor([[[1, 0], [0, 0], [1, 1], [0, -1]]], dtype=torch.int8)
    return MotionBank.from_steps(header, parts, torch.zeros(1, 2, 2, 4, 4), flow)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF], ids=hex)
def test_one_changed_byte_anywhere_is_refused(flip):
    data = small_bank().to_bytes()
    assert MotionBank.from_bytes(data).to_bytes() == data
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= flip
        with pytest.raises(ArtifactError, match="^my.safetensors "):
            MotionBank.from_bytes(bytes(changed), "my.safetensors")


def test_a_changed_byte_of_a_tensor_is_told_from_one_of_the_header():
    data = bytearray(small_bank().to_bytes())
    data[-1] ^= 1
    with pytest.raises(
        ArtifactError, match="is damaged: the SHA-256 of its tensors is [0-9a-f]{64}, its header records"
    ):
        MotionBank.from_bytes(bytes(data))
    data[-1] ^= 1
    place = data.index(b"0123")
    data[place] ^= 1
    with pytest.raises(ArtifactError, match="is damaged: the SHA-256 of its header is .*copy it again"):
        MotionBank.from_bytes(bytes(data))


def test_a_header_is_read_from_the_beginning_of_a_file_and_refused_by_itself():
    data = small_bank().to_bytes()
    start = data[: header_end(data)]
    assert MotionBank.read_header(start, size=len(data)) == small_bank().header
    for place in range(len(start)):
        changed = bytearray(start)
        changed[place] ^= 0x01
        with pytest.raises(ArtifactError):
            MotionBank.read_header(bytes(changed), size=len(data))
    for wrong in (len(data) - 1, len(data) + 1):
        with pytest.raises(ArtifactError, match=f"has {wrong} bytes, expected {len(data)}"):
            MotionBank.read_header(start, size=wrong)


def test_a_file_with_updated_hashes_is_read_again():
    whole = small_bank().to_bytes()
    data = bytearray(whole)
    data[header_end(whole)] ^= 1
    assert MotionBank.from_bytes(update_hashes(bytes(data))).to_bytes() == update_hashes(bytes(data))


# ---------------------------------------------------------------------- motion


def test_a_bank_keeps_the_consecutive_flow_of_its_reference_and_what_it_comes_to(learned):
    displacement = learned.reference.displacement
    for frame in range(len(displacement) - 1):
        assert torch.equal(learned.bank.flow[frame], displacement[frame, frame + 1])
    assert learned.bank.flow.dtype == torch.int8
    assert learned.bank.header.motion == motion_statistics(learned.bank.flow)
    assert learned.bank.compressed(0.1).flow is learned.bank.flow


@pytest.mark.parametrize(
    "method", [replace(METHOD, name="smm"), replace(METHOD, loss={"reference_flow": "soft"})], ids=["smm", "soft"]
)
def test_a_loss_without_a_hard_displacement_leaves_no_flow(rotary_backbone, moving_video, method):
    reference = extract_motion(rotary_backbone, moving_video, replace(method, learning_rate=(0.01, 0.01)))
    assert reference.flow is None
    bank = learn_bank(
        rotary_backbone, PROMPT, reference=reference, size=CLIP, method=method, sampling=SAMPLING, seed=5
    ).bank
    assert (bank.flow, bank.header.motion) == (None, None)
    assert MotionBank.from_bytes(bank.to_bytes()).header == bank.header


# ---------------------------------------------------------------------- reuse


def test_reuse_with_the_same_prompt_and_seed_gives_the_very_video_of_the_learning_run(learned, backbone):
    reused = generate(backbone, learned.bank)
    assert reused.video.tobytes() == learned.run.video.tobytes()
    assert torch.equal(reused.latents, learned.run.latents)


def test_reuse_without_injection_gives_the_very_video_of_the_learning_run(backbone, moving_video):
    method = replace(METHOD, injection=False)
    learned = learned_with(backbone, moving_video, method)
    assert learned.bank.latents is None
    assert generate(backbone, learned.bank, method).video.tobytes() == learned.run.video.tobytes()


def test_a_bank_says_how_long_its_reference_is_injected(backbone, moving_video):
    longer = replace(METHOD, injected_steps=GUIDED_STEPS + 1)
    learned = learned_with(backbone, moving_video, longer)
    assert learned.bank.header.injected_steps == GUIDED_STEPS + 1
    assert torch.equal(generate(backbone, learned.bank).latents, learned.run.latents)
    assert torch.equal(generate(backbone, learned.bank, longer).latents, learned.run.latents)
    shorter = generate(backbone, learned.bank, replace(METHOD, injected_steps=GUIDED_STEPS))
    assert not torch.equal(shorter.latents, learned.run.latents)
    unsaid = replace(learned.bank, header=replace(learned.bank.header, injected_steps=None))
    assert torch.equal(generate(backbone, unsaid).latents, shorter.latents)


def test_reuse_optimises_nothing(learned, backbone, monkeypatch):
    captures, capture = [], backbone.capture
    monkeypatch.setattr(backbone, "capture", lambda *args, **kwargs: captures.append(args) or capture(*args, **kwargs))
    reused = generate(backbone, learned.bank)
    assert captures == []
    assert reused.losses == []
    assert all(record.learning_rate is None for record in reused.records)
    assert reused.bank is None


def test_reuse_serves_whatever_the_method_would_have_optimised(learned, backbone):
    reused = generate(backbone, learned.bank, replace(METHOD, optimize="latent"))
    assert reused.video.tobytes() == learned.run.video.tobytes()


def test_a_bank_moves_the_video_of_another_prompt(learned, backbone):
    prompt = "a green star"
    zero_shot = generate(backbone, learned.bank, prompt=prompt)
    assert zero_shot.video.shape == (*CLIP, 3)
    assert not np.array_equal(zero_shot.video, learned.run.video)
    injection_alone = generate(backbone, learned.reference, MethodSettings("injection", guided_steps=2), prompt)
    assert (zero_shot.latents - injection_alone.latents).abs().max() > 1e-3


def test_another_model_revision_is_refused(rotary, rotary_backbone):
    stranger = replace(rotary.bank, header=replace(rotary.bank.header, model_revision="other"))
    expected = f"model revision is other, the generation's is {rotary_backbone.revision}.*of tiny-rotary.*build a bank"
    with pytest.raises(BankMismatchError, match=expected) as caught:
        generate(rotary_backbone, stranger)
    assert (caught.value.code, caught.value.key) == ("bank-model-revision", "model.path")


WIDER = (FRAMES + 4, SIZE, SIZE + 16)


@pytest.fixture(scope="module")
def by_coordinates(backbone, moving_video) -> Learned:
    return learned_with(backbone, moving_video, replace(METHOD, optimize="coordinates"))


def test_a_bank_of_coordinates_moves_videos_of_another_size_when_it_is_stretched(by_coordinates, backbone):
    bank = by_coordinates.bank
    other = bank.resized(backbone.layout, WIDER)
    made = generate(backbone, other, by_coordinates.method, size=WIDER)
    unmoved = replace(
        other, parts={part: StepOffsets(torch.zeros_like(v.all_steps())) for part, v in other.parts.items()}
    )
    assert made.video is not None and made.video.shape == (*WIDER, 3)
    still = generate(backbone, unmoved, by_coordinates.method, size=WIDER)
    assert not torch.equal(made.latents, still.latents)
    assert other.header.provenance["size"] == list(WIDER)
    assert replace(other.header, grid=bank.header.grid, motion=bank.header.motion, provenance={}) == replace(
        bank.header, provenance={}
    )
    assert bank.header.grid == (3, 4, 4), "the bank itself stays as it was"


def test_a_bank_that_was_stretched_is_still_read_as_one(by_coordinates, backbone):
    other = by_coordinates.bank.resized(backbone.layout, WIDER)
    again = MotionBank.from_bytes(other.to_bytes())
    assert_same_positions(again, other)
    assert again.header == other.header


def test_its_own_size_stretches_nothing(by_coordinates, backbone):
    bank = by_coordinates.bank
    same = bank.resized(backbone.layout, CLIP)
    for step in range(GUIDED_STEPS):
        torch.testing.assert_close(same.offsets(step), bank.offsets(step))
    torch.testing.assert_close(same.latents, bank.latents)


def test_free_positions_are_not_stretched(rotary, rotary_backbone):
    with pytest.raises(BankMismatchError, match="free positions of a 3x4x4 grid.*optimize: coordinates") as caught:
        rotary.bank.resized(rotary_backbone.layout, WIDER)
    assert (caught.value.code, caught.value.key) == ("bank-not-resizable", "banks.size")
    assert rotary.bank.resized(rotary_backbone.layout, CLIP) is rotary.bank, "their own size is no other"


def test_a_bank_is_stretched_to_no_size_that_the_model_cannot_do(by_coordinates, backbone):
    with pytest.raises(SettingsError, match="width.*multiple of"):
        by_coordinates.bank.resized(backbone.layout, (FRAMES, SIZE, SIZE + 1))


def test_another_grid_is_refused(rotary, rotary_backbone):
    with pytest.raises(BankMismatchError) as caught:
        generate(rotary_backbone, rotary.bank, size=(FRAMES, SIZE, SIZE + 8))
    assert caught.value.code == "bank-token-grid"


def test_another_position_embedding_is_refused(rotary, rotary_backbone):
    other = replace(rotary.bank, header=replace(rotary.bank.header, positions="additive"))
    with pytest.raises(BankMismatchError) as caught:
        generate(rotary_backbone, other)
    assert caught.value.code == "bank-positions"


def test_parts_that_the_models_positions_have_not_are_refused(rotary, rotary_backbone):
    part = next(iter(rotary.bank.parts))
    with pytest.raises(BankMismatchError) as caught:
        generate(rotary_backbone, replace(rotary.bank, parts={part: rotary.bank.parts[part]}))
    assert caught.value.code == "bank-parts"


def test_another_number_of_steps_is_refused(rotary, rotary_backbone):
    with pytest.raises(BankMismatchError) as caught:
        generate(rotary_backbone, rotary.bank, sampling=SamplingSettings(steps=5))
    assert (caught.value.code, caught.value.key) == ("bank-steps", "sampling.steps")


def test_more_guided_steps_than_the_bank_has_positions_are_refused(rotary, rotary_backbone):
    with pytest.raises(
        BankMismatchError, match="has positions for 2 guided steps, the generation asks for 3"
    ) as caught:
        generate(rotary_backbone, rotary.bank, replace(METHOD, guided_steps=GUIDED_STEPS + 1))
    assert (caught.value.code, caught.value.key) == ("bank-guided-steps", "method.guided_steps")


def test_a_bank_without_latents_is_refused_for_injection_and_serves_without(rotary, rotary_backbone):
    bare = replace(rotary.bank, latents=None)
    with pytest.raises(ValueError, match="injection needs the reference's latents.*method.injection: false"):
        generate(rotary_backbone, bare)
    reused = generate(rotary_backbone, bare, replace(METHOD, injection=False))
    assert not np.array_equal(reused.video, rotary.run.video)
