"""The whole algorithm a second time, as plainly as it can be written, against `ditflow.transfer`.

The plain side is written from the papers' definitions under preset `official`, one obvious line after the other: whole
passes of diffusers' transformer, its scheduler, full attention matrices, loops over frames, anchors and channels. It
shares no code with ditflow but the builder of the random weights.

Axis letters: F latent frames, P patches of a frame, S = F*P video tokens, L text tokens, H heads, d head size, D = H*d.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from tiny import KINDS, tiny_backbone
from torch import Tensor
from torch.nn.functional import layer_norm

from ditflow.mini.build import build_pipeline
from ditflow.sampling.guidance import Generation
from ditflow.settings import ExecutionSettings, MethodSettings, SamplingSettings
from ditflow.transfer import Transferred, generate_latents, transfer_latents

LAYERS, BLOCK = 2, 1
FRAMES, ROWS, COLUMNS = 3, 4, 6
"""Token frames, and rows and columns of patches; not square, so that x is not y."""
PIXELS = 8
"""Side of a patch: the mini VAE's compression of 4 times a patch of 2."""
TEXT_TOKENS, TEXT_DIM = 32, 64
SEED = 5
TOLERANCE = 1e-4
RATES = {"latent": (0.05, 0.02), "position": (0.01, 0.004)}
"""Adam moves an entry by the whole rate even if its gradient is rounding alone, as a few of a position's are: its sign
is the processor's then. The rates of positions keep what that does to the loss below a tenth of the tolerance."""

Position = dict[str, Tensor]
"""query_cos, query_sin, key_cos, key_sin [S, d], or additive [S, D]."""
Injected = dict[str, Tensor]
"""What block 0 projects the video tokens to, key and value [S, D], in another pass."""


# ---------------------------------------------------------------------- the model's passes


@dataclass
class Seen:
    """What one whole pass shows.

    queries, keys [H, S, d] of every block's video tokens behind norm and rotation; features [S, D], every block's
    output; projections [S, D] to block 0's key and value, straight from the linear layers.
    """

    prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    projections: Injected = field(default_factory=dict)


class PlainModel:
    """A model of its own with the same random weights; one text at a time, no pass ever cut short."""

    def __init__(self, kind: str):
        self.pipeline = build_pipeline(rotary=kind == "rotary", layers=LAYERS)
        self.rotary = kind == "rotary"
        self.transformer = self.pipeline.transformer.requires_grad_(False).eval()
        self.scheduler = self.pipeline.scheduler

    def own_position(self) -> Position:
        if self.rotary:
            cos, sin = self.pipeline._prepare_rotary_positional_embeddings(
                ROWS * PIXELS, COLUMNS * PIXELS, FRAMES, torch.device("cpu")
            )
            return {"query_cos": cos, "query_sin": sin, "key_cos": cos.clone(), "key_sin": sin.clone()}
        embedding = get_3d_sincos_pos_embed(self.transformer.patch_embed.embed_dim, (COLUMNS, ROWS), FRAMES)
        return {"additive": embedding.flatten(0, 1).float()}

    def run(
        self, latents: Tensor, timestep: int, embeds: Tensor, position: Position, injected: Injected | None = None
    ) -> Seen:
        seen = Seen()
        with self._watched(seen, position, injected):
            seen.prediction = self.transformer(latents, embeds, torch.tensor([timestep]), return_dict=False)[0]
        return seen

    @contextmanager
    def _watched(self, seen: Seen, position: Position, injected: Injected | None) -> Iterator[None]:
        blocks = self.transformer.transformer_blocks
        with ExitStack() as stack:
            for part, layer in (("key", blocks[0].attn1.to_k), ("value", blocks[0].attn1.to_v)):
                stack.callback(layer.register_forward_hook(projection_hook(seen, part, injected)).remove)
            for block in blocks:
                stack.callback(block.register_forward_hook(feature_hook(seen)).remove)
                stack.callback(block.attn1.set_processor, block.attn1.processor)
                block.attn1.set_processor(PlainAttention(seen, position))
            if not self.rotary:
                embed = self.transformer.patch_embed
                stack.callback(embed.register_forward_hook(embedding_hook(position["additive"])).remove)
            yield


def projection_hook(seen: Seen, part: str, injected: Injected | None) -> Callable:
    """Show one of block 0's projections, and put another in its place."""

    def hook(module: Any, inputs: Any, tokens: Tensor) -> Tensor:
        seen.projections[part] = tokens[0, TEXT_TOKENS:]
        return tokens if injected is None else torch.cat([tokens[:, :TEXT_TOKENS], injected[part][None]], dim=1)

    return hook


def feature_hook(seen: Seen) -> Callable:
    def hook(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen.features.append(output[0][0])

    return hook


def embedding_hook(additive: Tensor) -> Callable:
    """Embed text and patches once more, with this position and not the model's."""

    def hook(module: Any, inputs: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        text, patches = module.text_proj(inputs[0]), module.proj(inputs[1][0]).flatten(2).mT.flatten(0, 1)
        return torch.cat([text, (patches + additive)[None]], dim=1)

    return hook


@dataclass
class PlainAttention:
    """Softmax attention of text and video tokens together, with whole attention matrices."""

    seen: Seen
    position: Position

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(tokens)[0].unflatten(1, (attn.heads, -1)).transpose(0, 1)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = self._placed(normalised(query, attn.norm_q), "query")
        key = self._placed(normalised(key, attn.norm_k), "key")
        self.seen.queries.append(query[:, TEXT_TOKENS:])
        self.seen.keys.append(key[:, TEXT_TOKENS:])
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        output = attn.to_out[0]((weights @ value).transpose(0, 1).flatten(1))[None]
        return output[:, TEXT_TOKENS:], output[:, :TEXT_TOKENS]

    def _placed(self, tokens: Tensor, part: str) -> Tensor:
        """Turn every pair of channels (a, b) of the video tokens to (a cos - b sin, b cos + a sin)."""
        if f"{part}_cos" not in self.position:
            return tokens
        cos, sin = self.position[f"{part}_cos"], self.position[f"{part}_sin"]
        text, video = tokens[:, :TEXT_TOKENS], tokens[:, TEXT_TOKENS:]
        a, b = video[..., 0::2], video[..., 1::2]
        even, odd = a * cos[:, 0::2] - b * sin[:, 0::2], b * cos[:, 1::2] + a * sin[:, 1::2]
        return torch.cat([text, torch.stack([even, odd], dim=-1).flatten(-2)], dim=1)


def normalised(tokens: Tensor, norm: Any) -> Tensor:
    return layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)


# ---------------------------------------------------------------------- the losses, between two passes


def by_frame(tokens: Tensor) -> Tensor:
    """[..., S, n] -> [..., F, P, n]."""
    return tokens.unflatten(-2, (FRAMES, ROWS * COLUMNS))


def coordinates() -> Tensor:
    """[P, 2] as (x, y), row by row."""
    return torch.tensor([[x, y] for y in range(ROWS) for x in range(COLUMNS)], dtype=torch.float32)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


def pair_logits(seen: Seen, block: int, i: int, j: int) -> Tensor:
    """[P, P]: every head's scaled product of frame i's queries and frame j's keys, then the mean over heads."""
    query, key = by_frame(seen.queries[block])[:, i], by_frame(seen.keys[block])[:, j]
    return (query @ key.mT / math.sqrt(query.shape[-1])).mean(dim=0)


def flow_loss(generated: Seen, reference: Seen, block: int) -> Tensor:
    """Squared error over both components of the displacement vectors that are not zero in the reference."""
    errors, own = [], coordinates()
    for i in range(FRAMES):
        for j in range(FRAMES):
            hard = own[pair_logits(reference, block, i, j).argmax(dim=-1)] - own
            soft = (2 * pair_logits(generated, block, i, j)).softmax(dim=-1) @ own - own
            errors.append((soft - hard)[hard.norm(dim=-1) > 0] ** 2)
    return torch.cat(errors).mean()


def smm_loss(generated: Seen, reference: Seen, block: int) -> Tensor:
    """Official: the reference's anchors on both sides, cosine over time."""
    wanted, means = (by_frame(seen.features[block]).mean(dim=1) for seen in (reference, generated))
    terms = [1 - cosine((means - anchor).T, (wanted - anchor).T) for anchor in wanted]
    return torch.stack(terms).mean()


def moft_loss(generated: Seen, reference: Seen, block: int) -> Tensor:
    wanted, features = (by_frame(seen.features[block]) for seen in (reference, generated))
    wanted, features = wanted - wanted.mean(dim=0), features - features.mean(dim=0)
    _, _, right = torch.linalg.svd(wanted.flatten(0, 1))
    motion = right[0].abs().topk(int(0.04 * right.shape[1])).indices
    return (1 - cosine(features[..., motion], wanted[..., motion])).mean()


def motionclone_loss(generated: Seen, reference: Seen, block: int) -> Tensor:
    wanted, attention = (
        torch.einsum("hipd,hjpd->hpij", by_frame(seen.queries[block]), by_frame(seen.keys[block]))
        .div(math.sqrt(seen.queries[block].shape[-1]))
        .softmax(dim=-1)
        for seen in (reference, generated)
    )
    largest = wanted.argmax(dim=-1, keepdim=True)
    return (attention.gather(-1, largest) - wanted.gather(-1, largest)).square().mean()


LOSSES: dict[str, Callable[[Seen, Seen, int], Tensor]] = {
    "ditflow": flow_loss,
    "smm": smm_loss,
    "moft": moft_loss,
    "motionclone": motionclone_loss,
}


# ---------------------------------------------------------------------- the sampler


@dataclass
class Inputs:
    """Latents [1, F, C, height, width] and text embeddings [1, L, text dim], all different."""

    reference: Tensor
    initial: Tensor
    prompt: Tensor
    negative: Tensor
    empty: Tensor


@dataclass
class Run:
    """What is asked for, in numbers; `blocks` are averaged."""

    name: str = "ditflow"
    optimize: str = "latent"
    injection: bool = True
    steps: int = 4
    guided_steps: int = 2
    iterations: int = 2
    rates: tuple[float, float] = (0.05, 0.02)
    blocks: tuple[int, ...] = (BLOCK,)

    @property
    def injects(self) -> bool:
        return self.name == "injection" or (self.name != "none" and self.injection)


@dataclass
class Outcome:
    """Losses by guided step and iteration, the position of every guided step, the last latents, and
    the model's own position."""

    losses: list[list[float]]
    positions: list[Position]
    latents: Tensor
    own: Position


def noised(model: PlainModel, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    signal = model.scheduler.alphas_cumprod[timestep]
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def reference_pass(model: PlainModel, inputs: Inputs, name: str) -> Seen:
    """Clean latents at timestep 0, or, for MotionClone, noised once to 40 %; the empty prompt, nothing injected.

    The definition leaves that noise open; ours is the first of a generator seeded with 0.
    """
    latents, timestep = inputs.reference, 0
    if name == "motionclone":
        timestep = 400
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        latents = noised(model, latents, noise, timestep)
    return model.run(latents, timestep, inputs.empty, model.own_position())


def rate_table(run: Run) -> list[float]:
    """Official: one entry more than there are guided steps, of which the last is never used."""
    first, last = run.rates
    table = [first + (last - first) * n / run.guided_steps for n in range(run.guided_steps + 1)]
    assert table[0] == first and table[-1] == pytest.approx(last)
    return table[: run.guided_steps]


def plain_transfer(model: PlainModel, inputs: Inputs, run: Run, bank: list[Position] | None = None) -> Outcome:
    generator = torch.Generator().manual_seed(SEED)
    model.scheduler.set_timesteps(run.steps)
    timesteps = model.scheduler.timesteps
    with torch.no_grad():
        reference = reference_pass(model, inputs, run.name)
    latents, position, previous = inputs.initial, model.own_position(), None
    outcome = Outcome([], [], latents, position)
    for step, timestep in enumerate(timesteps.tolist()):
        injected, used = None, model.own_position()
        if step < run.guided_steps:
            if run.injects:
                injected = reference_projections(model, inputs, timestep)
            if bank is not None:
                position = bank[step]
            elif run.name in LOSSES:
                rate = rate_table(run)[step]
                latents, position, losses = optimised(
                    model, inputs, run, reference, timestep, rate, latents, position, injected
                )
                outcome.losses.append(losses)
            used = position
            outcome.positions.append(position)
        with torch.no_grad():
            with_prompt = model.run(latents, timestep, inputs.prompt, used, injected).prediction
            without = model.run(latents, timestep, inputs.negative, used, injected).prediction
        velocity = without + guidance_scale(model, run.steps, timestep) * (with_prompt - without)
        if isinstance(model.scheduler, CogVideoXDPMScheduler):
            back = timesteps[step - 1] if step > 0 else None
            latents, previous = model.scheduler.step(
                velocity, previous, timesteps[step], back, latents, generator=generator
            )
        else:
            latents = model.scheduler.step(velocity, timesteps[step], latents).prev_sample
    outcome.latents = latents
    return outcome


def optimised(
    model: PlainModel,
    inputs: Inputs,
    run: Run,
    reference: Seen,
    timestep: int,
    rate: float,
    latents: Tensor,
    position: Position,
    injected: Injected | None,
) -> tuple[Tensor, Position, list[float]]:
    """One guided step's iterations, with the prompt alone, by an Adam that knows nothing of the step before."""
    latents, position = latents.clone(), {part: value.clone() for part, value in position.items()}
    variables = [latents] if run.optimize == "latent" else list(position.values())
    for variable in variables:
        variable.requires_grad_(True)
    adam, losses = torch.optim.Adam(variables, lr=rate), []
    for _ in range(run.iterations):
        adam.zero_grad()
        generated = model.run(latents, timestep, inputs.prompt, position, injected)
        by_block = [LOSSES[run.name](generated, reference, block) for block in run.blocks]
        loss = torch.stack(by_block).mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return latents.detach(), {part: value.detach() for part, value in position.items()}, losses


@torch.no_grad()
def reference_projections(model: PlainModel, inputs: Inputs, timestep: int) -> Injected:
    """Block 0's projections of the reference, noised to this timestep with the noise that sampling began with."""
    at_timestep = noised(model, inputs.reference, inputs.initial, timestep)
    return model.run(at_timestep, timestep, inputs.prompt, model.own_position()).projections


def guidance_scale(model: PlainModel, steps: int, timestep: int) -> float:
    """7; with the rotary model diffusers' dynamic formula, of the raw timestep."""
    if not model.rotary:
        return 7.0
    return 1 + 7.0 * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2


# ---------------------------------------------------------------------- both sides


@dataclass
class Sides:
    """The product and its plain counterpart, of one kind, with the same weights."""

    backbone: Any
    model: PlainModel
    inputs: Inputs


def sides_of(kind: str, **options: Any) -> Sides:
    backbone, model = tiny_backbone(kind, **options), PlainModel(kind)
    for transformer in (backbone.transformer, model.transformer):
        for block in transformer.transformer_blocks:
            make_telling(block.attn1)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS, generator=generator)
    embeds = torch.randn(3, 1, TEXT_TOKENS, TEXT_DIM, generator=generator)
    return Sides(backbone, model, Inputs(*latents, *embeds))


def make_telling(attention: Any) -> None:
    """Let mistakes show: new weights' attention hardly moves the latents, and their norms are the same done twice."""
    attention.to_out[0].weight.mul_(10)
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-0.5, 0.5, len(norm.bias)))


@pytest.fixture(scope="module", params=KINDS)
def sides(request) -> Sides:
    return sides_of(request.param)


def method_of(run: Run) -> MethodSettings:
    return MethodSettings(
        run.name,
        optimize=run.optimize,
        preset="official",
        blocks=run.blocks,
        guided_steps=run.guided_steps,
        iterations=run.iterations,
        learning_rate=run.rates,
        injection=run.injection,
    )


def transferred(sides: Sides, method: MethodSettings, sampling: SamplingSettings) -> Transferred:
    return transfer_latents(
        sides.backbone,
        reference_latents=sides.inputs.reference,
        initial_latents=sides.inputs.initial,
        prompt_embeds=sides.inputs.prompt,
        negative_prompt_embeds=sides.inputs.negative,
        source_embeds=sides.inputs.empty,
        method=method,
        sampling=sampling,
        generator=torch.Generator().manual_seed(SEED),
    )


def assert_close(came: Tensor, expected: Tensor) -> None:
    """Compare lengths, not entries: Adam divides by the gradient, which is rounding alone where it is nearly zero."""
    assert came.dtype == torch.float32
    assert came.shape == expected.shape
    error = ((came - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def assert_same(came: Transferred, expected: Outcome, run: Run) -> None:
    assert [len(losses) for losses in came.losses] == [run.iterations] * len(expected.losses)
    for losses, expected_losses in zip(came.losses, expected.losses, strict=True):
        assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
    assert_close(came.latents, expected.latents)
    if run.optimize == "position" and expected.losses:
        for step, expected_position in enumerate(expected.positions):
            changes = came.bank.offsets(step)
            assert changes.keys() == expected_position.keys()
            for part, value in expected_position.items():
                assert_close(expected.own[part] + changes[part], value)


def check(sides: Sides, run: Run) -> None:
    came = transferred(sides, method_of(run), SamplingSettings(steps=run.steps))
    assert_same(came, plain_transfer(sides.model, sides.inputs, run), run)


# ---------------------------------------------------------------------- facts


def test_the_plain_pass_is_that_of_diffusers(sides):
    model, inputs = sides.model, sides.inputs
    rotary = model.own_position() if model.rotary else None
    with torch.no_grad():
        untouched = model.transformer(
            inputs.initial,
            inputs.prompt,
            torch.tensor([749]),
            image_rotary_emb=rotary and (rotary["query_cos"], rotary["query_sin"]),
            return_dict=False,
        )[0]
        plain = model.run(inputs.initial, 749, inputs.prompt, model.own_position()).prediction
    assert_close(plain, untouched)


def test_plain_sampling_is_that_of_diffusers_pipeline(sides):
    run = Run("none")
    expected = sides.model.pipeline(
        height=ROWS * PIXELS,
        width=COLUMNS * PIXELS,
        num_frames=4 * (FRAMES - 1) + 1,
        num_inference_steps=run.steps,
        guidance_scale=7.0,
        use_dynamic_cfg=sides.model.rotary,
        generator=torch.Generator().manual_seed(SEED),
        latents=sides.inputs.initial,
        prompt_embeds=sides.inputs.prompt,
        negative_prompt_embeds=sides.inputs.negative,
        max_sequence_length=TEXT_TOKENS,
        output_type="latent",
    ).frames
    assert_close(plain_transfer(sides.model, sides.inputs, run).latents, expected)


@pytest.mark.parametrize("injection", [True, False], ids=["injected", "not-injected"])
@pytest.mark.parametrize("optimize", ["latent", "position"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_guided_transfer_is_the_plain_one(sides, name, optimize, injection):
    check(sides, Run(name, optimize, injection, rates=RATES[optimize]))


@pytest.mark.parametrize("name", ["none", "injection"])
def test_a_transfer_without_a_loss_is_the_plain_one(sides, name):
    check(sides, Run(name))


def test_two_blocks_are_averaged_as_in_the_plain_one(sides):
    check(sides, Run(blocks=(0, 1), injection=False))


@pytest.mark.parametrize("kind", KINDS)
def test_serial_classifier_free_guidance_is_the_plain_one(kind):
    check(sides_of(kind, execution=ExecutionSettings(cfg="serial")), Run())


def test_left_alone_a_transfer_is_the_published_one(sides):
    """50 steps, the first 10 guided by five iterations, from 0.002 down towards 0.001, all by default."""
    run = Run(steps=50, guided_steps=10, iterations=5, rates=(0.002, 0.001))
    came = transferred(sides, MethodSettings(preset="official"), SamplingSettings())
    assert_same(came, plain_transfer(sides.model, sides.inputs, run), run)


def test_guided_steps_are_a_share_of_the_steps_or_their_number(sides):
    method = MethodSettings(preset="official", guided_steps=0.5, iterations=2, learning_rate=(0.05, 0.02))
    came = transferred(sides, method, SamplingSettings(steps=4))
    assert_same(came, plain_transfer(sides.model, sides.inputs, Run()), Run())


@pytest.mark.parametrize("injection", [True, False], ids=["injected", "not-injected"])
def test_reusing_a_bank_with_another_prompt_is_the_plain_reuse(sides, injection):
    run, inputs = Run(optimize="position", injection=injection), sides.inputs
    method, sampling = method_of(run), SamplingSettings(steps=run.steps)
    bank = transferred(sides, method, sampling).bank
    other = Inputs(inputs.reference, inputs.initial.flip(1), inputs.prompt.flip(1), inputs.negative, inputs.empty)
    grid = sides.backbone.layout.grid(other.initial.shape)
    schedule, generator = sides.backbone.schedule(run.steps, grid), torch.Generator().manual_seed(SEED)
    came = generate_latents(
        sides.backbone,
        [Generation(other.initial, [other.prompt, other.negative], schedule, generator)],
        reference=bank,
        method=method.resolve(sides.backbone.defaults),
        sampling=sampling.resolve(sides.backbone.defaults),
    )
    learned = plain_transfer(sides.model, inputs, run).positions
    assert_close(came.latents, plain_transfer(sides.model, other, run, bank=learned).latents)
    assert came.losses == []
