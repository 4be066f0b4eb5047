"""Noise: our schedule against diffusers' own schedulers, and draws that depend on their place alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, SchedulerMixin

from configs.errors import UsageError
from finetune.diffusion.config import NoiseConfig
from finetune.diffusion.draws import draw, permutation
from finetune.diffusion.noise import NoiseSchedule, add_noise, from_scheduler, trained_scheduler, velocity

SCHEDULES = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]
SHAPE = (4, 8, 8)


@pytest.mark.parametrize("options", SCHEDULES)
def test_noisy_latents_equal_diffusers_at_every_timestep(options: dict[str, object]) -> None:
    scheduler = DDPMScheduler(**options)
    schedule = from_scheduler(scheduler.config)
    timesteps = torch.arange(1000)
    latents, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = scheduler.add_noise(latents, noise, timesteps)
    # diffusers takes the roots in float32, we in float64.
    torch.testing.assert_close(add_noise(schedule, latents, noise, timesteps), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", SCHEDULES)
def test_velocity_equals_diffusers_at_every_timestep(options: dict[str, object]) -> None:
    scheduler = DDPMScheduler(**options)
    schedule = from_scheduler(scheduler.config)
    timesteps = torch.arange(1000)
    latents, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(velocity(schedule, latents, noise, timesteps), expected, atol=2e-6, rtol=0)


def test_snr_is_the_ratio_of_variances() -> None:
    schedule = NoiseSchedule(torch.tensor([0.8, 0.5, 0.1], dtype=torch.float64), "epsilon")
    torch.testing.assert_close(schedule.snr, torch.tensor([4.0, 1.0, 1 / 9], dtype=torch.float64))


def test_zero_terminal_schedule_ends_in_pure_noise() -> None:
    schedule = from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    # diffusers keeps 2^-24 of the signal there, to divide by it while sampling.
    assert 0 <= schedule.snr[-1] < 1e-6


def test_epsilon_with_a_zero_terminal_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--prediction_type epsilon.*v_prediction"):
        from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True).config)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize("base", [PNDMScheduler, DDIMScheduler, DDPMScheduler])
def test_rescaled_training_is_saved_with_its_schedule_and_sampled_from_pure_noise(
    base: type[SchedulerMixin], tmp_path: Path
) -> None:
    noise = NoiseConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = trained_scheduler(base(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), noise)
    assert from_scheduler(scheduler.config).snr[-1] == 0
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    again.set_timesteps(10)
    assert int(again.timesteps[0]) == 999
    sampler = DPMSolverMultistepScheduler.from_config(again.config)
    sampler.set_timesteps(10)
    assert (int(sampler.timesteps[0]), sampler.config.prediction_type) == (999, "v_prediction")
    assert float(sampler.alphas_cumprod[-1]) == 2**-24  # what diffusers' samplers hold for zero
    assert float(again.alphas_cumprod[-1]) == 0.0


def test_rescaling_needs_v_prediction() -> None:
    with pytest.raises(ValueError, match=r"--prediction_type epsilon: the schedule ends in pure noise"):
        NoiseConfig(rescale_betas_zero_snr=True, prediction_type="epsilon")
    scheduler = trained_scheduler(DDIMScheduler(), NoiseConfig(rescale_betas_zero_snr=True))
    with pytest.raises(UsageError, match=r"--prediction_type epsilon: the schedule ends in pure noise"):
        from_scheduler(scheduler.config)


def test_without_options_the_scheduler_stays_as_it_is() -> None:
    before = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    after = trained_scheduler(before, NoiseConfig())
    assert (type(after), dict(after.config)) == (PNDMScheduler, dict(before.config))


def test_input_perturbation_changes_the_input_noise_alone() -> None:
    plain = draw(0, 7, shape=(4, 50, 50), num_timesteps=1000, noise_offset=0.1)
    perturbed = draw(0, 7, shape=(4, 50, 50), num_timesteps=1000, noise_offset=0.1, input_perturbation=0.1)
    assert torch.equal(plain.noise, perturbed.noise)
    assert torch.equal(plain.noise, plain.input_noise)
    assert torch.equal(plain.latent_noise, perturbed.latent_noise)
    # 10,000 numbers: the standard error of a standard deviation of 0.1 is 0.1 / sqrt(20000) = 0.0007; five of them.
    assert abs(float((perturbed.input_noise - plain.noise).std()) - 0.1) < 0.0036


def test_a_prediction_type_that_is_not_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="sample"):
        from_scheduler(DDPMScheduler(prediction_type="sample").config)


def test_prediction_type_given_by_hand_wins() -> None:
    assert from_scheduler(DDPMScheduler().config, "v_prediction").prediction_type == "v_prediction"


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    first = draw(3, 41, shape=SHAPE, num_timesteps=1000)
    torch.manual_seed(99)
    draw(3, 40, shape=SHAPE, num_timesteps=1000)
    again = draw(3, 41, shape=SHAPE, num_timesteps=1000)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.latent_noise, again.latent_noise)
    assert first.timestep == again.timestep


@pytest.mark.parametrize("other", [(3, 42), (4, 41)])
def test_draws_of_other_places_and_seeds_differ(other: tuple[int, int]) -> None:
    first, second = draw(3, 41, shape=SHAPE, num_timesteps=1000), draw(*other, shape=SHAPE, num_timesteps=1000)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, first.latent_noise)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(0, 0, shape=SHAPE, num_timesteps=1000)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_offset_adds_one_number_per_channel() -> None:
    plain = draw(0, 7, shape=SHAPE, num_timesteps=1000)
    offset = draw(0, 7, shape=SHAPE, num_timesteps=1000, noise_offset=0.1)
    added = offset.noise - plain.noise
    torch.testing.assert_close(added, added[:, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert added[:, 0, 0].unique().numel() == 4


def test_noise_offset_raises_the_variance_by_its_square() -> None:
    noise = torch.stack([draw(0, n, shape=(4, 1, 1), num_timesteps=9, noise_offset=0.8).noise for n in range(4000)])
    # 16,000 numbers: the standard error of the variance 1.64 is 1.64 * sqrt(2 / 16000) = 0.018; five of them.
    assert abs(float(noise.var()) - 1.64) < 0.09


def test_timesteps_fill_their_range_evenly() -> None:
    drawn = torch.tensor([draw(0, n, shape=(1, 1, 1), num_timesteps=10).timestep for n in range(5000)])
    counts = torch.bincount(drawn, minlength=10)
    # Each count is binomial(5000, 0.1): standard deviation 21; five of them.
    assert (counts - 500).abs().max() < 106


def test_captions_are_dropped_as_often_as_asked() -> None:
    dropped = [draw(0, n, shape=(1, 1, 1), num_timesteps=9, caption_dropout=0.25).drop_caption for n in range(4000)]
    assert abs(sum(dropped) - 1000) < 140


def test_options_leave_the_other_draws_as_they_were() -> None:
    plain = draw(0, 5, shape=SHAPE, num_timesteps=1000)
    other = draw(0, 5, shape=SHAPE, num_timesteps=1000, caption_dropout=0.99)
    assert torch.equal(plain.noise, other.noise)
    assert plain.timestep == other.timestep


def test_each_epoch_is_another_order_of_all_images() -> None:
    first, second = permutation(0, 0, 50), permutation(0, 1, 50)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)
