import copy
import dataclasses
import json
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ditflow.backbones import load
from ditflow.mini import world
from ditflow.mini.build import build_pipeline, build_wan_pipeline
from ditflow.mini.measure import block_scores, flow_score
from ditflow.mini.training.__main__ import main
from ditflow.mini.training.autoencoder import vae_batch, vae_loss
from ditflow.mini.training.cogvideox import CogVideoXDenoiser, add_noise, velocity
from ditflow.mini.training.denoiser import Denoiser, drop_prompts, spread
from ditflow.mini.training.kinds import AUTOENCODERS, KINDS, Kind
from ditflow.mini.training.latents import encode_clips, encode_world, fit_scale
from ditflow.mini.training.loop import Training, fit, generator_of, replacing
from ditflow.mini.training.optimizers import Muon, averaged, optimizers_of, orthogonalised
from ditflow.mini.training.recipe import RECIPES, Recipe, Run
from ditflow.mini.training.samples import motion_errors, picture_samples
from ditflow.mini.training.transformer import export
from ditflow.mini.training.truth import GRID, SPRITE_WEIGHT, Truth, by_patch, correspondence_loss, weighted_mean
from ditflow.mini.training.wan import WanDenoiser
from ditflow.mini.world import prompt_of, render, sample_scene, true_motion
from ditflow.motion.amf import hard_displacement
from ditflow.types import QueriesKeys, TokenGrid

CPU = torch.device("cpu")
RECIPE = Recipe(steps=6, batch=2, learning_rate=2e-3, warmup_steps=1, decay_share=0.5, checkpoint_steps=3)


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def denoiser(kind) -> Denoiser:
    return kind.denoiser(kind.build(layers=1), CPU, torch.float32)


@pytest.fixture(params=["rotary", "additive"])
def cogvideox(request) -> CogVideoXDenoiser:
    return CogVideoXDenoiser(KINDS[request.param].build(layers=1), CPU, torch.float32)


def wan() -> WanDenoiser:
    return WanDenoiser(build_wan_pipeline(layers=1), CPU, torch.float32)


def loss_at_step(denoiser):
    words = denoiser.words([prompt_of(sample_scene(seed)) for seed in range(2)])

    def loss_at(step):
        generator = generator_of(0, step)
        return denoiser.loss(torch.randn(2, 5, 16, 16, 16, generator=generator), words, generator)

    return loss_at


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the diffusion


def test_velocity_and_noised_latents_in_closed_form():
    clean, noise = torch.full((2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), 5.0)
    alpha_bar = torch.tensor([0.64, 0.0])
    assert velocity(clean, noise, alpha_bar).flatten().tolist() == pytest.approx([0.8 * 5 - 0.6 * 3, -3.0])
    assert add_noise(clean, noise, alpha_bar).flatten().tolist() == pytest.approx([0.8 * 3 + 0.6 * 5, 5.0])


def test_velocity_and_noised_latents_are_the_schedulers(cogvideox):
    scheduler = cogvideox.pipeline.scheduler
    clean, noise = torch.randn(2, 4, 5, 16, 16, 16).unbind()
    timesteps = torch.tensor([0, 300, 700, 999])
    alpha_bar = scheduler.alphas_cumprod.float()[timesteps]
    expected = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(velocity(clean, noise, alpha_bar), expected)
    torch.testing.assert_close(add_noise(clean, noise, alpha_bar), scheduler.add_noise(clean, noise, timesteps))


def test_wans_noise_levels_are_shifted_and_its_velocity_leads_from_the_latents_to_noise():
    clean = torch.randn(4, 5, 16, 16, 16)
    noised = wan().noised(clean, torch.Generator().manual_seed(0))
    offset = torch.rand(1, generator=torch.Generator().manual_seed(0))
    share = (torch.arange(4) + offset) / 4
    sigma = noised.timesteps / 1000
    torch.testing.assert_close(sigma, 3 * share / (1 + 2 * share))
    ahead = noised.latents + (1 - sigma).view(-1, 1, 1, 1, 1) * noised.velocity
    assert ahead.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([ahead.flatten(), clean.flatten()]))[0, 1].abs() < 0.02
    torch.testing.assert_close(noised.latents - sigma.view(-1, 1, 1, 1, 1) * noised.velocity, clean)


def test_a_wan_that_knows_the_velocity_is_sampled_to_the_clean_latents(monkeypatch):
    """The timesteps and the velocity of the training are those of the pipeline's scheduler."""
    pipeline, clean = build_wan_pipeline(layers=1), torch.randn(1, 16, 5, 16, 16)

    def oracle(hidden_states, timestep, **_):
        sigma = timestep.view(-1, 1, 1, 1, 1) / 1000
        return ((hidden_states - clean) / sigma,)

    monkeypatch.setattr(pipeline.transformer, "forward", oracle)
    options = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 32, "output_type": "latent"}
    made = pipeline("a ball", num_inference_steps=3, guidance_scale=1.0, **options).frames
    torch.testing.assert_close(made, clean, rtol=1e-4, atol=1e-4)


def test_the_loss_is_zero_for_a_model_that_knows_the_velocity(cogvideox, monkeypatch):
    clean = torch.randn(3, 5, 16, 16, 16)
    alphas = cogvideox.pipeline.scheduler.alphas_cumprod.float()

    def oracle(hidden_states, timestep, **_):
        signal = alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = (hidden_states - signal.sqrt() * clean) / (1 - signal).sqrt()
        return (velocity(clean, noise, alphas[timestep]),)

    monkeypatch.setattr(cogvideox.pipeline.transformer, "forward", oracle)
    loss = cogvideox.loss(clean, cogvideox.words(["a red ball"] * 3), generator_of(0, 0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_zero_for_a_wan_that_knows_the_velocity(monkeypatch):
    denoiser, clean = wan(), torch.randn(3, 5, 16, 16, 16)

    def oracle(hidden_states, timestep, **_):
        return ((hidden_states - clean.transpose(1, 2)) / (timestep.view(-1, 1, 1, 1, 1) / 1000),)

    monkeypatch.setattr(denoiser.pipeline.transformer, "forward", oracle)
    loss = denoiser.loss(clean, denoiser.words(["a red ball"] * 3), generator_of(0, 0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_timesteps_cover_the_whole_range_once():
    timesteps = spread(10, torch.Generator().manual_seed(0))
    assert (timesteps * 10).long().tolist() == list(range(10))


def test_one_prompt_in_ten_is_dropped():
    words, empty = torch.ones(20_000, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    kept = drop_prompts(words, empty, torch.Generator().manual_seed(0))
    assert set(kept.sum(dim=1).tolist()) == {0, 3}, "a prompt is kept or dropped as a whole"
    assert (kept[:, 0] == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_the_transformer_sees_a_prompt_as_the_pipeline_encodes_it(denoiser, monkeypatch):
    prompt, pipeline, seen = "a red striped ball moving over the grass", denoiser.pipeline, []

    def keep(hidden_states, encoder_hidden_states, **_):
        seen.append(encoder_hidden_states)
        return (hidden_states,)

    monkeypatch.setattr(pipeline.transformer, "forward", keep)
    denoiser.predict(torch.zeros(1, 5, 16, 16, 16), torch.zeros(1), denoiser.words([prompt]))
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
    torch.testing.assert_close(seen, [expected])


def test_the_recording_attention_is_diffusers_attention(denoiser):
    def predict():
        with torch.no_grad():
            return denoiser.loss(torch.ones(2, 5, 16, 16, 16), denoiser.words(["a ball", ""]), generator_of(0, 0))

    ours = predict()
    processor = WanAttnProcessor if isinstance(denoiser, WanDenoiser) else CogVideoXAttnProcessor2_0
    for block in denoiser.blocks:
        block.attn1.set_processor(processor())
    torch.testing.assert_close(ours, predict())


def test_a_weighted_mean_in_closed_form():
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert weighted_mean(values, torch.tensor([[1.0], [3.0]])).item() == pytest.approx((1 + 3 + 15 + 21) / 8)


def test_latents_around_sprites_weigh_more():
    scene = sample_scene(3, sprites=1)
    weight = Truth.of([scene]).weight[0, :, 0]
    assert set(weight.unique().tolist()) == {1.0, SPRITE_WEIGHT}
    masks = torch.from_numpy(render(scene).masks[0])
    covered = masks.unflatten(1, (16, 4)).unflatten(3, (16, 4)).float().mean((2, 4))
    by_latent_frame = torch.stack([covered[:1].amax(0), *covered[1:].unflatten(0, (4, 4)).amax(1)])
    assert (weight[by_latent_frame > 0.6] == SPRITE_WEIGHT).all(), "what is mostly sprite in one frame"
    assert (weight == SPRITE_WEIGHT).float().mean() < 0.35


def test_the_distance_to_silhouettes_is_negative_on_sprites_alone():
    scene = sample_scene(3, sprites=1)
    masks = torch.from_numpy(render(scene).masks[0])[0]
    covered = masks.unflatten(0, (16, 4)).unflatten(2, (16, 4)).float().mean((1, 3))
    distance = Truth.of([scene]).silhouette[0, 0]
    assert (distance[covered == 1] < 0).all()
    assert (distance[covered == 0] > 0).all()
    assert distance.abs().max() == 1


def test_cells_are_taken_in_the_order_of_the_tokens():
    cells = torch.arange(2 * 5 * 16 * 16.0).view(2, 5, 16, 16)
    tokens = by_patch(cells)
    assert tokens.shape == (2, 320, 4)
    assert tokens[1, 64 * 3 + 8 * 2 + 5].tolist() == cells[1, 3, 4:6, 10:12].flatten().tolist()


def test_tokens_are_taught_where_silhouettes_are(denoiser):
    latents, words, truth = torch.randn(1, 5, 16, 16, 16), denoiser.words(["a ball"]), Truth.of([sample_scene(0)])
    denoiser.loss(latents, words, generator_of(0, 0), truth).backward()
    assert denoiser.silhouette.weight.grad.any()
    assert not denoiser.seen_block._forward_hooks, "the model is as it was"


# ---- the correspondence


def true_motions(*seeds: int):
    return [true_motion(sample_scene(seed), (17, 64, 64), GRID) for seed in seeds]


def test_attention_that_knows_nothing_costs_the_logarithm_of_the_patches():
    indifferent = torch.zeros(2, 4, 320, 32)
    loss = correspondence_loss(indifferent, torch.randn(2, 4, 320, 32), true_motions(0, 1))
    assert loss.item() == pytest.approx(np.log(64), rel=1e-5)


def test_attention_that_is_taught_sees_the_true_motion():
    """Free queries and keys, taught for a while, give the true flow through AMF's own code."""
    motion = true_motions(3)
    queries, keys = (torch.randn(1, 4, 320, 32, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([queries, keys], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        correspondence_loss(queries, keys, motion).backward()
        optimizer.step()
    video = QueriesKeys(*(part[0].detach().transpose(0, 1).flatten(1) for part in (queries, keys)), heads=4)
    score = flow_score(hard_displacement(video, TokenGrid(*GRID)).numpy(), motion[0])
    assert score.sprite_error < 0.55, "0.4 is lost by whole patches"
    assert score.ground_error < 0.55


@pytest.mark.parametrize("name", ["rotary", "wan"])
def test_the_taught_block_is_at_half_depth_and_its_attention_gets_the_gradient(name):
    kind = KINDS[name]
    denoiser = kind.denoiser(kind.build(layers=4), CPU, torch.float32)
    assert denoiser.taught_block is denoiser.blocks[2]
    latents, words = torch.randn(1, 5, 16, 16, 16), denoiser.words(["a ball"])

    def gradient(truth):
        denoiser.model.zero_grad()
        denoiser.loss(latents, words, generator_of(0, 0), truth).backward()
        return [block.attn1.to_q.weight.grad.clone() for block in denoiser.blocks]

    truth = Truth.of([sample_scene(0)])
    still = dataclasses.replace(truth, motion=())
    differ = [not torch.equal(*pair) for pair in zip(gradient(still), gradient(truth), strict=True)]
    copy.deepcopy(denoiser.model)  # fails if a tensor of the pass is left behind
    assert differ == [True, True, True, False]


# ---- the optimisation


def test_moving_average_in_closed_form():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = averaged(model, 0.15)
    nn.init.ones_(model.weight)
    for _ in range(3):
        average.update_parameters(model)
    decays = [1 / 10, 0.15, 0.15]
    assert average.module.weight.item() == pytest.approx(1 - np.prod(decays))


def test_learning_rate_rises_rests_and_falls_to_zero():
    recipe = Recipe(steps=100, batch=1, learning_rate=2.0, warmup_steps=10, decay_share=0.2)
    rates = [recipe.learning_rate_at(step) for step in (0, 4, 9, 50, 80, 90, 100)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonalised_has_all_singular_values_near_one_and_the_same_directions(shape):
    matrix = torch.randn(shape)
    step = orthogonalised(matrix)
    assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.35
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ step @ right.T
    assert (core - core.diag().diag()).abs().max() < 1e-4


def test_muon_steps_have_the_size_of_adams():
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3, 3))
    muon = Muon([weight])
    muon.param_groups[0]["lr"] = 0.01
    weight.grad = torch.randn(weight.shape) * 100
    muon.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_every_weight_has_one_optimiser_and_muon_those_of_linear_layers_and_convolutions(denoiser):
    muon, adam = ([w for group in o.param_groups for w in group["params"]] for o in optimizers_of(denoiser.model))
    assert len({id(weight) for weight in (*muon, *adam)}) == len(muon) + len(adam)
    assert len(muon) + len(adam) == len(list(denoiser.model.parameters()))
    layers = {id(m.weight) for m in denoiser.model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    assert {id(weight) for weight in muon} == layers
    assert any(weight is denoiser.pipeline.text_encoder.shared.weight for weight in adam)


def test_a_few_steps_lower_the_loss_on_a_fixed_batch(denoiser, tmp_path):
    loss_at = loss_at_step(denoiser)
    before = loss_at(0).item()
    training = Training(denoiser.model, dataclasses.replace(RECIPE, learning_rate=6e-3))
    assert fit(training, lambda _: loss_at(0), tmp_path / "x.safetensors")
    assert loss_at(0).item() < 0.95 * before


@pytest.mark.parametrize("stage", AUTOENCODERS)
def test_an_autoencoder_learns_a_fixed_batch(stage, tmp_path):
    vae = AUTOENCODERS[stage](layers=1).vae
    pixels = vae_batch(0, 0, RECIPE)[:, :, :9, :16, :16]

    def loss_at(_):
        return vae_loss(vae, pixels, generator_of(0, 0))

    before = loss_at(0).item()
    fit(Training(vae, dataclasses.replace(RECIPE, learning_rate=1e-2)), loss_at, tmp_path / "x.safetensors")
    assert loss_at(0).item() < 0.95 * before


# ---- resuming


def test_a_killed_run_ends_in_the_same_weights_as_an_uninterrupted_one(denoiser, tmp_path):
    start, loss_at = copy.deepcopy(denoiser.model.state_dict()), loss_at_step(denoiser)

    def killed_at_4(step):
        if step == 4:
            raise KeyboardInterrupt
        return loss_at(step)

    uninterrupted = Training(denoiser.model, RECIPE)
    fit(uninterrupted, loss_at, tmp_path / "uninterrupted.safetensors")
    expected = weights_of(denoiser.model)

    denoiser.model.load_state_dict(start)
    assert not same(weights_of(denoiser.model), expected)
    with pytest.raises(KeyboardInterrupt):
        fit(Training(denoiser.model, RECIPE), killed_at_4, tmp_path / "killed.safetensors")
    resumed = Training(denoiser.model, RECIPE)
    fit(resumed, loss_at, tmp_path / "killed.safetensors")
    assert same(weights_of(denoiser.model), expected)
    assert same(weights_of(resumed.average), weights_of(uninterrupted.average))


def test_a_run_out_of_time_says_so_and_keeps_its_step(denoiser, tmp_path):
    file = tmp_path / "x.safetensors"
    fit(Training(denoiser.model, RECIPE), loss_at_step(denoiser), file)
    longer = Training(denoiser.model, dataclasses.replace(RECIPE, steps=9))
    assert not fit(longer, loss_at_step(denoiser), file, deadline=0.0)
    assert longer.step == 6


def test_what_is_written_replaces_at_once_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with replacing(target) as temporary:
            temporary.write_text(content)

    def write_half():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "new"


# ---- data and results


def test_training_pixels_are_crops_at_first_and_whole_clips_at_the_end():
    early, late = (vae_batch(0, step, dataclasses.replace(RECIPE, batch=8)) for step in (0, 3))
    assert (early.shape, late.shape) == ((8, 3, 17, 32, 32), (2, 3, 17, 64, 64))
    assert early.min() >= -1
    assert early.max() <= 1


def test_encoded_clips_are_the_backbones_latents(cogvideox, tmp_path):
    export(cogvideox.pipeline, tmp_path / "mini", {})
    backbone = load(str(tmp_path / "mini"), device="cpu")
    expected = backbone.encode_video(render(sample_scene(7)).frames)
    made = encode_clips(backbone.vae, [6, 7], torch.float32)[1:]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def test_wans_encoded_clips_have_the_mean_and_the_deviation_of_each_channel_removed():
    vae = build_wan_pipeline(layers=1).vae
    plain = encode_clips(vae, [7], torch.float32)
    mean, deviation = torch.arange(16.0), torch.arange(1.0, 17)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    by_channel = (1, 1, 16, 1, 1)
    expected = (plain - mean.view(by_channel)) / deviation.view(by_channel)
    torch.testing.assert_close(encode_clips(vae, [7], torch.float32), expected)


@pytest.mark.parametrize("stage", AUTOENCODERS)
def test_a_scaled_autoencoder_gives_latents_of_unit_deviation(stage):
    vae = AUTOENCODERS[stage](layers=1).vae
    fit_scale(vae, torch.float32, clips=2)
    latents = encode_clips(vae, [0, 1], torch.float32)
    assert latents.std().item() == pytest.approx(1, rel=0.02)
    if stage == "vae-wan":
        torch.testing.assert_close(latents.mean(dim=(0, 1, 3, 4)), torch.zeros(16), rtol=0, atol=0.02)


@pytest.fixture(params=AUTOENCODERS)
def vae(request):
    return AUTOENCODERS[request.param](layers=1).vae


def test_latents_are_encoded_once_and_found_again(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("ditflow.mini.training.latents._CLIPS_PER_FILE", 2)
    run = Run(tmp_path, CPU, torch.float32, clips=4)
    latents = encode_world(vae, run, tmp_path / "latents")
    assert len(latents) == 4
    third = encode_clips(vae, [3], torch.float32)
    monkeypatch.delattr("ditflow.mini.training.latents.encode_clips")
    again = encode_world(vae, run, tmp_path / "latents")
    assert torch.equal(again.take([3, 0]), latents.take([3, 0]))
    torch.testing.assert_close(latents.take([3]), third, rtol=1e-2, atol=1e-2)


def test_latents_of_another_encoder_are_refused_and_a_new_decoder_changes_nothing(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("ditflow.mini.training.latents._CLIPS_PER_FILE", 1)
    run = Run(tmp_path, CPU, torch.float32, clips=1)
    encode_world(vae, run, tmp_path)
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
        encode_world(vae, run, tmp_path)
        next(vae.encoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="another encoder"):
        encode_world(vae, run, tmp_path)


def test_latents_of_another_world_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ditflow.mini.training.latents._CLIPS_PER_FILE", 1)
    vae = build_pipeline(rotary=True, layers=1).vae
    run = Run(tmp_path, CPU, torch.float32, clips=1)
    encode_world(vae, run, tmp_path)
    monkeypatch.setattr(world, "PATTERN_STRENGTH", 0.5)
    with pytest.raises(ValueError, match="another world"):
        encode_world(vae, run, tmp_path)


def test_an_exported_folder_is_a_backbone_with_its_own_defaults(cogvideox, tmp_path):
    folder = tmp_path / "mini"
    export(cogvideox.pipeline, folder, KINDS["additive"].defaults)
    backbone = load(str(folder), device="cpu")
    assert list(backbone.defaults.blocks) == KINDS["additive"].defaults["blocks"]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXPipeline"
    for name, weight in cogvideox.pipeline.transformer.named_parameters():
        torch.testing.assert_close(backbone.transformer.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    assert all(weight.dtype == torch.float32 for weight in cogvideox.model.parameters())


def test_an_exported_wan_is_a_diffusers_folder_that_samples(tmp_path):
    pytest.importorskip("accelerate", reason="diffusers loads no Wan transformer without it")
    pipeline, folder = build_wan_pipeline(layers=1), tmp_path / "mini-wan"
    export(pipeline, folder, KINDS["wan"].defaults)
    loaded = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    for name, weight in pipeline.transformer.named_parameters():
        torch.testing.assert_close(loaded.transformer.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    options = {"num_inference_steps": 2, "max_sequence_length": 32, "generator": torch.Generator().manual_seed(0)}
    frames = loaded("a red ball", height=64, width=64, num_frames=17, **options).frames
    assert frames.shape == (1, 17, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_an_exported_wan_has_16_bits_and_its_own_defaults(tmp_path):
    folder = tmp_path / "mini-wan"
    export(build_wan_pipeline(), folder, KINDS["wan"].defaults)
    weights = [weight for file in folder.rglob("*.safetensors") for weight in load_file(file).values()]
    assert {weight.dtype for weight in weights} == {torch.float16}
    assert sum(file.stat().st_size for file in folder.rglob("*.*")) < 5.2e6
    assert json.loads((folder / "ditflow.json").read_text()) == KINDS["wan"].defaults
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_motion_errors_are_those_of_the_backbone(cogvideox, tmp_path):
    export(cogvideox.pipeline, tmp_path / "mini", {})
    backbone = load(str(tmp_path / "mini"), device="cpu")
    exported = CogVideoXDenoiser(backbone.pipeline, CPU, torch.float32)
    (expected,) = block_scores(backbone, render(sample_scene(1, "eval")))
    assert motion_errors(exported, [1]) == pytest.approx([expected.sprite_error])


def test_progress_is_pictured(denoiser, tmp_path):
    picture_samples(denoiser, tmp_path / "samples.png", clips=1, steps=2)
    assert np.asarray(Image.open(tmp_path / "samples.png")).shape == (2 * 64, 5 * 2 * 64, 3)


def test_a_killed_command_ends_in_the_same_folder_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Both stages of Wan, from the first step to the exported folder."""
    tiny = dataclasses.replace(RECIPE, steps=2, images=1, checkpoint_steps=1)
    monkeypatch.setattr("ditflow.mini.training.recipe.RECIPES", dict.fromkeys(RECIPES, tiny))
    monkeypatch.setattr("ditflow.mini.training.latents._CLIPS_PER_FILE", 2)
    monkeypatch.setattr("ditflow.mini.training.autoencoder.fit_scale", partial(fit_scale, clips=2))
    for stage in ("autoencoder.picture_reconstructions", "transformer.picture_samples"):
        monkeypatch.setattr(f"ditflow.mini.training.{stage}", lambda *_: None)
    updates = count(1)
    update = Training.update

    def killed(self, loss):
        if next(updates) in (2, 5):  # the second step of either stage
            raise KeyboardInterrupt
        update(self, loss)

    def train(out):
        for stage in ("vae-wan", "wan"):
            arguments = ["--stage", stage, "--clips", "2", "--threads", "1"]
            main(["--out", str(out), *arguments, "--device", "cpu", "--precision", "float32"])
        return {file.name: load_file(file) for file in sorted((out / "mini-wan").rglob("*.safetensors"))}

    expected = train(tmp_path / "uninterrupted")
    monkeypatch.setattr(Training, "update", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
    made = train(tmp_path / "killed")
    assert made.keys() == expected.keys()
    assert all(same(made[part], expected[part]) for part in expected)
