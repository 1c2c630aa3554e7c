import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch import nn

from ditflow.amf import hard_displacement
from ditflow.backbones import load
from ditflow.mini import train, world
from ditflow.mini.build import build_pipeline
from ditflow.mini.measure import flow_score
from ditflow.mini.world import prompt_of, render, sample_scene, true_motion
from ditflow.types import QueriesKeys, TokenGrid

CPU = torch.device("cpu")
RECIPE = train.Recipe(steps=6, batch=2, learning_rate=2e-3, warmup_steps=1, decay_share=0.5, checkpoint_steps=3)


@pytest.fixture(params=train.KINDS)
def denoiser(request) -> train.Denoiser:
    pipeline = build_pipeline(rotary=request.param == "rotary", layers=1)
    return train.Denoiser(pipeline, CPU, torch.float32)


def loss_at_step(denoiser):
    words = denoiser.words([prompt_of(sample_scene(seed)) for seed in range(2)])

    def loss_at(step):
        generator = train._randomness(0, step)
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
    assert train.velocity(clean, noise, alpha_bar).flatten().tolist() == pytest.approx([0.8 * 5 - 0.6 * 3, -3.0])
    assert train.add_noise(clean, noise, alpha_bar).flatten().tolist() == pytest.approx([0.8 * 3 + 0.6 * 5, 5.0])


def test_velocity_and_noised_latents_are_the_schedulers(denoiser):
    scheduler = denoiser.pipeline.scheduler
    clean, noise = torch.randn(2, 4, 5, 16, 16, 16).unbind()
    timesteps = torch.tensor([0, 300, 700, 999])
    alpha_bar = scheduler.alphas_cumprod.float()[timesteps]
    expected = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(train.velocity(clean, noise, alpha_bar), expected)
    torch.testing.assert_close(train.add_noise(clean, noise, alpha_bar), scheduler.add_noise(clean, noise, timesteps))


def test_the_loss_is_zero_for_a_model_that_knows_the_velocity(denoiser, monkeypatch):
    clean = torch.randn(3, 5, 16, 16, 16)
    alphas = denoiser.pipeline.scheduler.alphas_cumprod.float()

    def oracle(hidden_states, timestep, **_):
        signal = alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = (hidden_states - signal.sqrt() * clean) / (1 - signal).sqrt()
        return (train.velocity(clean, noise, alphas[timestep]),)

    monkeypatch.setattr(denoiser.pipeline.transformer, "forward", oracle)
    loss = denoiser.loss(clean, denoiser.words(["a red ball"] * 3), train._randomness(0, 0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_timesteps_cover_the_whole_range_once():
    timesteps = train.draw_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert (timesteps // 100).tolist() == list(range(10))


def test_one_prompt_in_ten_is_dropped():
    words, empty = torch.ones(20_000, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    kept = train.drop_prompts(words, empty, torch.Generator().manual_seed(0))
    assert set(kept.sum(dim=1).tolist()) == {0, 3}, "a prompt is kept or dropped as a whole"
    assert (kept[:, 0] == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_words_are_what_the_pipeline_makes_of_a_prompt(denoiser):
    prompt = "a red striped ball moving over the grass"
    expected, _ = denoiser.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
    torch.testing.assert_close(denoiser.pipeline.text_encoder(denoiser.words([prompt]))[0], expected)


def test_spelled_out_attention_is_diffusers_attention(denoiser):
    def predict():
        with torch.no_grad():
            return denoiser.loss(torch.ones(2, 5, 16, 16, 16), denoiser.words(["a ball", ""]), train._randomness(0, 0))

    ours = predict()
    denoiser.pipeline.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    torch.testing.assert_close(ours, predict())


def test_a_weighted_mean_in_closed_form():
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert train.weighted_mean(values, torch.tensor([[1.0], [3.0]])).item() == pytest.approx((1 + 3 + 15 + 21) / 8)


def test_latents_around_sprites_weigh_more():
    scene = sample_scene(3, sprites=1)
    weight = train.Truth.of([scene]).weight[0, :, 0]
    assert set(weight.unique().tolist()) == {1.0, train.SPRITE_WEIGHT}
    masks = torch.from_numpy(render(scene).masks[0])
    covered = masks.unflatten(1, (16, 4)).unflatten(3, (16, 4)).float().mean((2, 4))
    by_latent_frame = torch.stack([covered[:1].amax(0), *covered[1:].unflatten(0, (4, 4)).amax(1)])
    assert (weight[by_latent_frame > 0.6] == train.SPRITE_WEIGHT).all(), "what is mostly sprite in one frame"
    assert (weight == train.SPRITE_WEIGHT).float().mean() < 0.35


def test_the_distance_to_silhouettes_is_negative_on_sprites_alone():
    scene = sample_scene(3, sprites=1)
    masks = torch.from_numpy(render(scene).masks[0])[0]
    covered = masks.unflatten(0, (16, 4)).unflatten(2, (16, 4)).float().mean((1, 3))
    distance = train.Truth.of([scene]).silhouette[0, 0]
    assert (distance[covered == 1] < 0).all()
    assert (distance[covered == 0] > 0).all()
    assert distance.abs().max() == 1


def test_cells_are_taken_in_the_order_of_the_tokens():
    cells = torch.arange(2 * 5 * 16 * 16.0).view(2, 5, 16, 16)
    tokens = train.by_patch(cells)
    assert tokens.shape == (2, 320, 4)
    assert tokens[1, 64 * 3 + 8 * 2 + 5].tolist() == cells[1, 3, 4:6, 10:12].flatten().tolist()


def test_tokens_are_taught_where_silhouettes_are(denoiser):
    latents, words, truth = torch.randn(1, 5, 16, 16, 16), denoiser.words(["a ball"]), train.Truth.of([sample_scene(0)])
    denoiser.loss(latents, words, train._randomness(0, 0), truth).backward()
    assert denoiser.silhouette.weight.grad.any()
    assert not denoiser.seen_block._forward_hooks, "the model is as it was"


# ---- the correspondence


def true_motions(*seeds: int):
    return [true_motion(sample_scene(seed), (17, 64, 64), train.GRID) for seed in seeds]


def test_attention_that_knows_nothing_costs_the_logarithm_of_the_patches():
    indifferent = torch.zeros(2, 4, 320, 32)
    loss = train.correspondence_loss(indifferent, torch.randn(2, 4, 320, 32), true_motions(0, 1))
    assert loss.item() == pytest.approx(np.log(64), rel=1e-5)


def test_attention_that_is_taught_sees_the_true_motion():
    """Free queries and keys, taught for a while, give the true flow through AMF's own code."""
    motion = true_motions(3)
    queries, keys = (torch.randn(1, 4, 320, 32, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([queries, keys], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        train.correspondence_loss(queries, keys, motion).backward()
        optimizer.step()
    video = QueriesKeys(*(part[0].detach().transpose(0, 1).flatten(1) for part in (queries, keys)), heads=4)
    score = flow_score(hard_displacement(video, TokenGrid(*train.GRID)).numpy(), motion[0])
    assert score.sprite_error < 0.55, "0.4 is lost by whole patches"
    assert score.ground_error < 0.55


def test_the_taught_block_is_at_half_depth_and_its_attention_gets_the_gradient():
    pipeline = build_pipeline(rotary=True, layers=4)
    denoiser = train.Denoiser(pipeline, CPU, torch.float32)
    assert denoiser.taught_block is pipeline.transformer.transformer_blocks[2]
    latents, words = torch.randn(1, 5, 16, 16, 16), denoiser.words(["a ball"])

    def gradient(truth):
        denoiser.model.zero_grad()
        denoiser.loss(latents, words, train._randomness(0, 0), truth).backward()
        return [block.attn1.to_q.weight.grad.clone() for block in pipeline.transformer.transformer_blocks]

    truth = train.Truth.of([sample_scene(0)])
    still = dataclasses.replace(truth, motion=())
    differ = [not torch.equal(*pair) for pair in zip(gradient(still), gradient(truth), strict=True)]
    assert train.half_precision_copy(pipeline).transformer.dtype == torch.float16, "nothing of the pass is left behind"
    assert differ == [True, True, True, False]


# ---- the optimisation


def test_moving_average_in_closed_form():
    average = {"w": torch.zeros(1)}
    for step in range(1, 4):
        train.update_average(average, {"w": torch.ones(1)}, 0.15, step)
    decays = [1 / 10, 0.15, 0.15]
    assert average["w"].item() == pytest.approx(1 - np.prod(decays))


def test_learning_rate_rises_rests_and_falls_to_zero():
    recipe = train.Recipe(steps=100, batch=1, learning_rate=2.0, warmup_steps=10, decay_share=0.2)
    rates = [recipe.learning_rate_at(step) for step in (0, 4, 9, 50, 80, 90, 100)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonalised_has_all_singular_values_near_one_and_the_same_directions(shape):
    matrix = torch.randn(shape)
    step = train.orthogonalised(matrix)
    assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.35
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ step @ right.T
    assert (core - core.diag().diag()).abs().max() < 1e-4


def test_muon_steps_have_the_size_of_adams():
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3, 3))
    muon = train.Muon([weight])
    muon.param_groups[0]["lr"] = 0.01
    weight.grad = torch.randn(weight.shape) * 100
    muon.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_every_weight_has_one_optimiser_and_embeddings_are_no_matrices(denoiser):
    muon, adam = ([w for group in o.param_groups for w in group["params"]] for o in train.optimizers_of(denoiser.model))
    assert len({id(weight) for weight in (*muon, *adam)}) == len(muon) + len(adam)
    assert len(muon) + len(adam) == len(list(denoiser.model.parameters()))
    assert any(weight is denoiser.pipeline.text_encoder.shared.weight for weight in adam)


def test_a_few_steps_lower_the_loss_on_a_fixed_batch(denoiser, tmp_path):
    loss_at = loss_at_step(denoiser)
    before = loss_at(0).item()
    assert train.fit(train.Training(denoiser.model, RECIPE), lambda _: loss_at(0), tmp_path / "x.safetensors")
    assert loss_at(0).item() < 0.95 * before


def test_the_autoencoder_learns_a_fixed_batch(tmp_path):
    vae = build_pipeline(rotary=True, layers=1).vae
    pixels = train.vae_batch(0, 0, RECIPE)[:, :, :9, :16, :16]
    noise = torch.randn(2, 16, 3, 4, 4)
    before = train.vae_loss(vae, pixels, noise).item()
    training = train.Training(vae, dataclasses.replace(RECIPE, learning_rate=1e-2))
    train.fit(training, lambda _: train.vae_loss(vae, pixels, noise), tmp_path / "x.safetensors")
    assert train.vae_loss(vae, pixels, noise).item() < 0.95 * before


# ---- resuming


def test_a_killed_run_ends_in_the_same_weights_as_an_uninterrupted_one(denoiser, tmp_path):
    start, loss_at = weights_of(denoiser.model), loss_at_step(denoiser)

    def killed_at_4(step):
        if step == 4:
            raise KeyboardInterrupt
        return loss_at(step)

    uninterrupted = train.Training(denoiser.model, RECIPE)
    train.fit(uninterrupted, loss_at, tmp_path / "uninterrupted.safetensors")
    expected = weights_of(denoiser.model)
    assert not same(expected, start)

    train._fill(denoiser.model, start)
    with pytest.raises(KeyboardInterrupt):
        train.fit(train.Training(denoiser.model, RECIPE), killed_at_4, tmp_path / "killed.safetensors")
    resumed = train.Training(denoiser.model, RECIPE)
    train.fit(resumed, loss_at, tmp_path / "killed.safetensors")
    assert same(weights_of(denoiser.model), expected)
    assert same(resumed.average, uninterrupted.average)


def test_a_run_out_of_time_says_so_and_keeps_its_step(denoiser, tmp_path):
    file = tmp_path / "x.safetensors"
    train.fit(train.Training(denoiser.model, RECIPE), loss_at_step(denoiser), file)
    longer = train.Training(denoiser.model, dataclasses.replace(RECIPE, steps=9))
    assert not train.fit(longer, loss_at_step(denoiser), file, deadline=0.0)
    assert longer.step == 6


def test_what_is_written_replaces_at_once_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with train._replacing(target) as temporary:
            temporary.write_text(content)

    def write_half():
        with train._replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "new"


# ---- data and results


def test_training_pixels_are_crops_at_first_and_whole_clips_at_the_end():
    early, late = (train.vae_batch(0, step, dataclasses.replace(RECIPE, batch=8)) for step in (0, 3))
    assert (early.shape, late.shape) == ((8, 3, 17, 32, 32), (2, 3, 17, 64, 64))
    assert early.min() >= -1
    assert early.max() <= 1


def test_encoded_clips_are_the_backbones_latents(denoiser, tmp_path):
    folder = train.export(denoiser.pipeline, tmp_path / "mini")
    backbone = load(str(folder))
    expected = backbone.encode_video(train.render(sample_scene(7)).frames)
    made = train.encode_clips(backbone.vae, [6, 7], torch.float32)[1:]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def test_latents_are_encoded_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CLIPS_PER_FILE", 2)
    vae = build_pipeline(rotary=True, layers=1).vae
    run = train.Run(tmp_path, CPU, torch.float32, clips=4)
    latents = train.encode_world(vae, run)
    assert len(latents) == 4
    third = train.encode_clips(vae, [3], torch.float32)
    monkeypatch.delattr(train, "encode_clips")
    again = train.encode_world(vae, run)
    assert torch.equal(again.take([3, 0]), latents.take([3, 0]))
    torch.testing.assert_close(latents.take([3]), third, rtol=1e-2, atol=1e-2)


def test_latents_of_another_encoder_are_refused_and_a_new_decoder_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CLIPS_PER_FILE", 1)
    vae = build_pipeline(rotary=True, layers=1).vae
    run = train.Run(tmp_path, CPU, torch.float32, clips=1)
    train.encode_world(vae, run)
    with torch.no_grad():
        vae.decoder.conv_in.conv.bias.add_(1)
        train.encode_world(vae, run)
        vae.encoder.conv_in.conv.bias.add_(1)
    with pytest.raises(ValueError, match="another encoder"):
        train.encode_world(vae, run)


def test_latents_of_another_world_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CLIPS_PER_FILE", 1)
    vae = build_pipeline(rotary=True, layers=1).vae
    run = train.Run(tmp_path, CPU, torch.float32, clips=1)
    train.encode_world(vae, run)
    monkeypatch.setattr(world, "PATTERN_STRENGTH", 0.5)
    with pytest.raises(ValueError, match="another world"):
        train.encode_world(vae, run)


def test_an_exported_folder_is_a_backbone_with_its_own_defaults(denoiser, tmp_path):
    folder = train.export(denoiser.pipeline, tmp_path / "mini")
    backbone = load(str(folder))
    kind = "rotary" if denoiser.pipeline.transformer.config.use_rotary_positional_embeddings else "additive"
    assert list(backbone.defaults.blocks) == train.DEFAULTS[kind]["blocks"]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXPipeline"
    for name, weight in denoiser.pipeline.transformer.named_parameters():
        torch.testing.assert_close(backbone.transformer.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    assert all(weight.dtype == torch.float32 for weight in denoiser.model.parameters())


def test_motion_errors_of_every_block_lie_between_nothing_and_the_picture(denoiser, tmp_path):
    errors = train.motion_errors(load(str(train.export(denoiser.pipeline, tmp_path / "mini"))), [0, 1])
    assert len(errors) == 1
    assert 0 < errors[0] < 8 * 2**0.5
