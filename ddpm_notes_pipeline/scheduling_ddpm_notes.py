"""DDPM (Ho et al. 2020, arXiv 2006.11239) as a diffusers scheduler: the face of the Gaussian chain.

The chain gives the posterior's coefficients for any pair of timesteps s < t. The reverse step is

    p(x_s | x_t) = N(c_0 x0_hat(x_t) + c_t x_t, variance I)

where x0_hat is the network's guess of x_0. Maximum likelihood asks each reverse step to be near the
posterior in KL divergence; those KLs, the prior's and the decoder's cost are the terms of the bound
(`vlb_terms`, `prior_kl`).

Arithmetic is float32 at least, coefficients are float64 and rounded once when they meet a tensor.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .core.gaussian_chain import GaussianChain, StepPair, Table, Timesteps, shorten, to_device, widest_float
from .core.levels import LevelPosterior, Levels, discretized_gaussian_log_likelihood
from .core.schedules import make_betas, rescale_zero_terminal_snr
from .names import LEARNED_VARIANCES, PREDICTION_TYPES, TIMESTEP_SPACINGS, VARIANCE_TYPES
from .stock_config import PRIVATE_ENTRY as PRIVATE_ENTRY  # imported from here by others
from .stock_config import StockConfigMixin

OFF_PATH = -2  # in the table of each timestep's next one
DECODER_FLOOR = 1e-6  # of the decoder's variance with "optimal"


@dataclass
class DDPMNotesSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x_s, shape and dtype of the sample.
        pred_original_sample: x0_hat as used in the mean (clipped if the config says so), the same.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class PathTables(NamedTuple):
    """What depends on the path of timesteps or on measured numbers, each of T entries."""

    next_timestep: Table  # s after each t of the path, -1 (the data) after its last; OFF_PATH
    log_decoder_variance: Table  # of p(x_0 | x_t), for each last timestep t
    original_sample_mse: Table  # of use to "optimal" alone
    level_posterior: LevelPosterior | None  # of fitted levels


class DDPMNotesScheduler(SchedulerMixin, StockConfigMixin):
    """DDPM's forward process, posterior, reverse step and terms of the bound, for any pair (t, s).

    A drop-in for `diffusers.DDPMScheduler` (same names, defaults, and numbers where that one is
    right), written from the equations. Timesteps are t = 0..T-1, and s = -1 is the data.

    Args:
        num_train_timesteps (`int`): T, the length of the chain.
        beta_start, beta_end (`float`): ends of "linear", "scaled_linear" and "sigmoid".
        beta_schedule (`str`): "linear" (Ho et al. 2020), "scaled_linear", "squaredcos_cap_v2"
            (cosine, arXiv 2102.09672), "sigmoid", "laplace" (arXiv 2407.03297), "log_snr" (log SNR
            linear in t, from `log_snr_range[0]` down to `log_snr_range[1]`).
        trained_betas (list of `float`, *optional*): T betas of your own, each in (0, 1); the last
            may be 1 (zero terminal SNR).
        variance_type (`str`): variance of the reverse step at s >= 0.
            "fixed_small": that of the posterior. "fixed_large": b = 1 - alpha_bar_t / alpha_bar_s.
            Their "_log" spellings are the same numbers. "learned": the second half of the output
            channels is the log variance. "learned_range": the second half is v, log variance =
            (v+1)/2 log b + (1-v)/2 log posterior variance (arXiv 2102.09672, eq. 15). "optimal":
            posterior variance + c_0^2 V_t, the best isotropic one for this network; needs
            `original_sample_mse`.
        clip_sample, clip_sample_range: clip x0_hat to [-range, range].
        prediction_type (`str`): what the network outputs: "epsilon", "sample" (x_0) or
            "v_prediction" (sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0).
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0_hat
            (arXiv 2205.11487) instead of clipping.
        timestep_spacing, steps_offset: how `set_timesteps(n)` chooses n of the T timesteps
            (arXiv 2305.08891, table 2).
        rescale_betas_zero_snr (`bool`): shift sqrt(alpha_bar) so that alpha_bar_T = 0
            (arXiv 2305.08891). Not with "epsilon", where x0_hat = (x_T - eps) / 0.
        original_sample_mse (list of T `float`, *optional*): V_t = E||x_0 - x0_hat(x_t)||^2 / dims,
            measured on data.
        decoder_variance (`float` or `dict`, *optional*): variance of the decoder p(x_0 | x_t) for a
            path that ends at timestep 0, or {last timestep: variance}.
        levels (`dict`, *optional*): what is known of the 8-bit levels of the images, fitted on
            training images (`core.levels.Levels` as a dictionary). x0_hat is then the mean of the
            level given the network's guess, and the decoder the probability of the level.
        log_snr_range (two `float`, *optional*): ends of "log_snr"; None is (10, -7).
        eta (`float`, *optional*): None samples by Algorithm 2 with `variance_type`; a number in
            [0, 1] is DDIM's eta (arXiv 2010.02502), which replaces the variance type: 0 is
            deterministic, 1 is fixed_small.

    Methods that take timesteps take an int or an integer tensor of shape (B,). Timesteps on an
    accelerator are not checked, as that would force a device sync.

    Raises:
        ValueError: a setting out of its range; the message names it, the value, and the range.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        original_sample_mse: list[float] | None = None,
        decoder_variance: float | dict[int, float] | None = None,
        levels: dict[str, Any] | None = None,
        log_snr_range: tuple[float, float] | None = None,
        eta: float | None = None,
    ) -> None:
        _check_config(self.config)
        betas = make_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, log_snr_range)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        if betas[-1] == 1 and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type is 'epsilon' with a schedule whose last alpha_bar is 0 (rescale_betas_zero_snr, or a "
                "last beta of 1), where x_0 = (x_T - eps) / 0; it must be 'v_prediction' or 'sample'"
            )
        self.chain = GaussianChain(betas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = self.chain.log_alpha_bar[:-1].exp().float()

        self.variance_type = variance_type
        self.eta = _check_eta(eta)
        self.original_sample_mse = _check_original_sample_mse(original_sample_mse, variance_type, num_train_timesteps)
        self.decoder_variance = _check_decoder_variance(decoder_variance, num_train_timesteps)
        self.hide_private_settings()

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_path(list(range(num_train_timesteps))[::-1], device=None)

    @property
    def levels(self) -> dict[str, Any] | None:
        """What is fitted about the levels of the images, as `core.levels.Levels` reads it."""
        return self.private_setting("levels")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # -------------------------------------------------------------------------------- the path

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
    ) -> None:
        """Choose the path t_1 > t_2 > ... that `step` walks down, ending at the data.

        Args:
            num_inference_steps: how many of the T timesteps, 1..T, spaced by `timestep_spacing`.
            device: where `scheduler.timesteps` is put.
            timesteps: or the timesteps themselves, strictly falling, in 0..T-1.
            eta: as in the constructor, for this path; None takes the constructor's.

        Raises:
            ValueError: both or neither of the two given; a number or a timestep out of range;
                timesteps that do not fall.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r} and timesteps is {timesteps!r}; "
                "exactly one of the two must be given"
            )
        eta = self.private_setting("eta") if eta is None else _check_eta(eta)
        custom = timesteps is not None
        path = self._spaced_timesteps(num_inference_steps) if timesteps is None else _as_path(timesteps, len(self))
        self.eta = eta
        self.custom_timesteps = custom
        self.num_inference_steps = len(path)
        self._set_path(path, device)

    def _spaced_timesteps(self, n: Any) -> list[int]:
        """n timesteps by arXiv 2305.08891, table 2."""
        T, spacing, offset = len(self), self.config.timestep_spacing, self.config.steps_offset
        if not _is_whole(n) or not 1 <= n <= T:
            raise ValueError(
                f"num_inference_steps is {n!r}; it must be a whole number from 1 to {T} (num_train_timesteps)"
            )
        n = int(n)
        path: Any
        if spacing == "linspace":
            path = np.linspace(0, T - 1, n).round()[::-1]
        elif spacing == "leading":
            path = np.arange(n)[::-1] * (T // n) + offset
        else:  # trailing
            path = np.round(np.arange(T, 0, -T / n)[:n]) - 1  # rounding may make that range one longer
        if path[0] >= T:
            raise ValueError(
                f"steps_offset is {offset} and the {n} timesteps would start at {int(path[0])}; "
                f"it must keep them below {T} (num_train_timesteps)"
            )
        return [int(t) for t in path]

    def _set_path(self, path: list[int], device: str | torch.device | None) -> None:
        cpu = torch.device("cpu")  # whatever torch's default device is
        self.timesteps = torch.tensor(path, device=cpu).to(device)
        next_timestep = torch.full((len(self),), OFF_PATH, device=cpu)
        next_timestep[path] = torch.tensor([*path[1:], -1], device=cpu)
        mse = torch.tensor(self.original_sample_mse or [0.0] * len(self), dtype=torch.float64, device=cpu)
        levels = None if self.levels is None else LevelPosterior(Levels.from_config(self.levels), len(self))
        log_variances = self._decoder_variances(path).log()
        self._tables = PathTables(Table(next_timestep), Table(log_variances), Table(mse), levels)

    def _decoder_variances(self, path: list[int]) -> torch.Tensor:
        """Variance of p(x_0 | x_t) for every last timestep t, (T,) float64.

        The posterior's is 0 there. The fixed types take that of the next pair above: (1, 0) for
        t = 0, as in the papers, and the path's own last pair where it ends higher. "optimal" takes
        its own rule with posterior variance 0 and c_0 = 1. A fitted number comes first.
        """
        if self.variance_type == "optimal":
            mse = torch.tensor(self.original_sample_mse, dtype=torch.float64, device="cpu")
            variances = mse.clamp(min=DECODER_FLOOR)
        else:
            s = torch.arange(len(self), device="cpu")
            t = s + 1
            if len(path) > 1 and path[-1] > 0:
                t[path[-1]] = path[-2]
            variances = self.chain.pair(t[:-1], s[:-1]).posterior_variance
            nothing_above = self.chain.pair(len(self) - 1, -1).one_minus_alpha_bar_t
            variances = torch.cat([variances, nothing_above])
        if self.variance_type not in LEARNED_VARIANCES:
            for last, variance in (self.decoder_variance or {}).items():
                variances[last] = variance
        return variances

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """The s that follows t on the path, -1 (the data) after its last.

        Returns:
            As the stock scheduler: before `set_timesteps` t - 1, of t's own type; afterwards a 0-d
            int64 tensor.

        Raises:
            ValueError: t is not on the path.
        """
        _, s = self._step_on_path(timestep)
        return timestep - 1 if self.num_inference_steps is None else to_device(s.reshape(()), self.timesteps.device)

    def _step_on_path(self, timestep: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """t and the s that follows it, (1,) int64, where t is; checked where that costs no sync."""
        if isinstance(timestep, torch.Tensor) and not timestep.is_cpu:
            t = timestep.reshape(1).long()
            return t, self._tables.next_timestep[t]
        value = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        if not _is_whole(value):
            raise ValueError(f"timestep is {timestep!r}; it must be one whole number on the path")
        t = torch.tensor([int(value)], device="cpu")
        if not 0 <= value < len(self) or int(s := self._tables.next_timestep[t]) == OFF_PATH:
            raise ValueError(
                f"timestep is {int(value)}; it must be on the path: {shorten(self.timesteps.tolist())} (see set_timesteps)"
            )
        return t, s

    # -------------------------------------------------------------------------- the forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, floating point, (B, ...), images in [-1, 1].
            noise: eps, standard normal, same shape.
            timesteps: t in 0..T-1, int or (B,).

        Returns:
            x_t, shape and dtype of x_0; computed in float32 at least.

        Raises:
            ValueError: integer images, shapes that differ, t out of range.
        """
        dtype = _check_images(original_samples=original_samples, noise=noise)
        signal, std = _signal_and_std(self.chain.pair(timesteps, -1), original_samples, dtype)
        return (signal * original_samples + std * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512). As `add_noise`.

        It is what a network of prediction type "v_prediction" learns.
        """
        dtype = _check_images(sample=sample, noise=noise)
        signal, std = _signal_and_std(self.chain.pair(timesteps, -1), sample, dtype)
        return (signal * noise - std * sample).to(sample.dtype)

    def forward_mean_variance(self, x_0: torch.Tensor, t: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

        Returns:
            mean (shape of x_0) and variance (broadcasts), in float32 or x_0's wider type.
        """
        dtype = _check_images(x_0=x_0)
        pair = self.chain.pair(t, -1)
        signal, _ = _signal_and_std(pair, x_0, dtype)
        return signal * x_0, _per_image(pair.one_minus_alpha_bar_t, x_0, dtype)

    def posterior_mean_variance(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_s | x_t, x_0), by Bayes' rule (the notes' figures 9-11).

        At s = -1 the mean is x_0 and the variance 0.

        Returns:
            mean (shape of x_0) and variance (broadcasts), in float32 or the images' wider type.
        """
        dtype = _check_images(x_0=x_0, x_t=x_t)
        pair = self.chain.pair(t, s)
        c_0, c_t, variance = (_per_image(c, x_0, dtype) for c in (pair.c_0, pair.c_t, pair.posterior_variance))
        return c_0 * x_0 + c_t * x_t, variance

    # -------------------------------------------------------------------------- the reverse process

    def predict_original_sample(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """x0_hat, the network's guess of the image (the notes' figure 13, solved for x_0).

        Args:
            model_output: the network's output, channels of x_t or twice as many (the second half
                is about the variance).
            x_t: the noisy image, (B, C, ...).
            t: its timestep.
            clip: clip or threshold x0_hat as the config describes; None: if the config says so.
                Fitted `levels` take the place of both; with False it is the raw guess.

        Returns:
            x0_hat, shape of x_t, in float32 or the wider type of the two.
        """
        _check_images(x_t=x_t)
        output, _ = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, -1)
        return self._refined(self._original_sample(output, x_t, pair), pair, clip)

    def predict_noise(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """eps_hat = (x_t - sqrt(alpha_bar_t) x0_hat) / sqrt(1 - alpha_bar_t), the noise of x0_hat.

        Arguments and result as of `predict_original_sample`.
        """
        x_0 = self.predict_original_sample(model_output, x_t, t, clip)
        signal, std = _signal_and_std(self.chain.pair(t, -1), x_t, x_0.dtype)
        return (x_t - signal * x_0) / std

    def reverse_mean_variance(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps, clip: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the reverse step p(x_s | x_t): c_0 x0_hat + c_t x_t, and its type's.

        At s = -1 it is the decoder p(x_0 | x_t): mean x0_hat, variance the decoder's; with fitted
        `levels` the mean and variance of the level.

        Returns:
            mean (shape of x_t) and variance (broadcasts), in float32 or the inputs' wider type.
        """
        _check_images(x_t=x_t)
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, s)
        guess = self._original_sample(output, x_t, pair)
        mean = self._mean(self._refined(guess, pair, clip), x_t, pair)
        variance = self._variance(pair, v, guess)
        if self._tables.level_posterior is None or pair.none_at_data:
            return mean, variance
        is_data = _per_image(pair.s, x_t) < 0
        level = self._tables.level_posterior.mean_variance(guess, self._decoder_blur(pair, v, guess))
        return torch.where(is_data, level[0], mean), torch.where(is_data, level[1], variance)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timesteps,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMNotesSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of Algorithm 2: x_s = mean + std z, and the mean alone where s = -1.

        With fitted `levels` the image at s = -1 has the occurring level nearest to each mean.

        Args:
            model_output: the network's output at (sample, timestep), channels of the sample or
                twice as many.
            timestep: t, on the path that `set_timesteps` chose. On an accelerator it is looked up
                there, unchecked: no host sync.
            sample: x_t, (B, C, ...), floating point.
            generator: for z: one, or one an image; a CPU generator serves any device, whose host
                then waits for the copy of each draw.
            return_dict: an output object, or the tuple (prev_sample, pred_original_sample).

        Returns:
            x_s and x0_hat in the sample's dtype; computed in float32 at least.

        Raises:
            ValueError: a timestep off the path, shapes that do not fit, an integer sample.
        """
        x_t = sample.to(_check_images(sample=sample))
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.unchecked_pair(*self._step_on_path(timestep))

        guess = self._original_sample(output, x_t, pair)
        x_0 = self._refined(guess, pair)
        x_s = mean = self._mean(x_0, x_t, pair)
        if not pair.all_at_data:  # std is 0 at the data
            std = self._variance(pair, v, x_0).sqrt().masked_fill(_per_image(pair.s, x_t) < 0, 0)
            noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            x_s = mean + std * noise
        if self._tables.level_posterior is not None and not pair.none_at_data:
            level, _ = self._tables.level_posterior.mean_variance(guess, self._decoder_blur(pair, v, guess))
            x_s = torch.where(_per_image(pair.s, x_t) < 0, self._tables.level_posterior.nearest(level), x_s)

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMNotesSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Timesteps | None = None) -> torch.Tensor:
        """The sample itself: DDPM's network sees x_t as it is (other schedulers scale it)."""
        return sample

    def _split_output(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's guess, and its second half where the variance type uses it."""
        learned = self.variance_type in LEARNED_VARIANCES and self.eta is None
        if not model_output.is_floating_point():
            raise ValueError(f"model_output has dtype {model_output.dtype}; it must be floating point")
        if model_output.shape == x_t.shape:
            if learned:
                raise ValueError(
                    f"model_output has {x_t.shape[1]} channels; it must have {2 * x_t.shape[1]} with variance_type "
                    f"'{self.variance_type}', the second half for the variance"
                )
            return model_output, None
        if x_t.ndim < 2 or model_output.shape != (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]):
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and the sample {tuple(x_t.shape)}; "
                "it must be the same shape, or twice the channels (dimension 1)"
            )
        output, v = model_output.chunk(2, dim=1)
        return output, v if learned else None

    def _original_sample(self, output: torch.Tensor, x_t: torch.Tensor, pair: StepPair) -> torch.Tensor:
        """The network's guess as a guess of x_0, in the wider type of the two."""
        dtype = torch.promote_types(torch.promote_types(x_t.dtype, torch.float32), output.dtype)
        x_0 = output.to(dtype)
        if self.config.prediction_type != "sample":
            signal, std = _signal_and_std(pair, x_t, dtype)
            if self.config.prediction_type == "epsilon":  # x_t = signal x_0 + std eps
                x_0 = (x_t - std * x_0) / signal
            else:  # v = signal eps - std x_0 (arXiv 2202.00512)
                x_0 = signal * x_t - std * x_0
        return x_0

    def _refined(self, guess: torch.Tensor, pair: StepPair, clip: bool | None = None) -> torch.Tensor:
        """x0_hat as the reverse step uses it: the mean of the level given the guess, or clipped."""
        x_0 = self._clip(guess, clip)
        if self._tables.level_posterior is None or clip is False:
            return x_0
        blur = self._tables.level_posterior.guess_blur[pair.t]  # 0 where the guess is not refined
        if blur.is_cpu:  # only those images that need it
            rows = to_device((blur > 0).expand(len(x_0)).nonzero().flatten(), x_0.device)
            if not len(rows):
                return x_0
            mean, _ = self._tables.level_posterior.mean_variance(
                guess[rows], _per_image(blur, guess).expand_as(guess)[rows]
            )
            return x_0.index_put((rows,), mean)
        blur = _per_image(blur, guess)
        mean, _ = self._tables.level_posterior.mean_variance(guess, torch.where(blur > 0, blur, 1))
        return torch.where(blur > 0, mean, x_0)

    def _decoder_blur(self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Blur of the guess in the levels' decoder, shaped to broadcast against x."""
        assert self._tables.level_posterior is not None
        blur = _per_image(self._tables.level_posterior.decoder_blur[pair.t], x)
        if v is None or self._tables.level_posterior.decoder_scale is None:
            return blur
        floor, excess = self._log_variance(pair, v, x)
        return torch.where(
            _per_image(pair.t, x) == 0, self._tables.level_posterior.decoder_scale * (floor + excess).exp(), blur
        )

    def _clip(self, x_0: torch.Tensor, clip: bool | None = None) -> torch.Tensor:
        """A guess of x_0 clipped or thresholded as the config says; `clip` overrides whether."""
        config = self.config
        if not (config.thresholding or config.clip_sample if clip is None else clip):
            return x_0
        if not config.thresholding:
            return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
        # arXiv 2205.11487, section 2.3: a high percentile of |x_0|, at least 1, is brought to 1
        limit = torch.quantile(x_0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        limit = _per_image(limit.clamp(min=1, max=config.sample_max_value), x_0)
        return torch.maximum(torch.minimum(x_0, limit), -limit) / limit

    def _mean(self, x_0: torch.Tensor, x_t: torch.Tensor, pair: StepPair) -> torch.Tensor:
        """Mean of the reverse step: the posterior's with x0_hat in the place of x_0."""
        if self.eta is None:  # Ho et al. 2020, eq. 7
            c_0, c_t = pair.c_0, pair.c_t
        else:
            # sqrt(abar_s) x0_hat + direction eps_hat (arXiv 2010.02502, eq. 12), direction =
            # sqrt(1 - abar_s - sigma^2), with the eps_hat that belongs to x_t and x0_hat
            variance = self.eta**2 * pair.posterior_variance
            c_t = ((pair.one_minus_alpha_bar_s - variance).clamp(min=0) / pair.one_minus_alpha_bar_t).sqrt()
            c_0 = pair.alpha_bar_s.sqrt() - c_t * pair.alpha_bar_t.sqrt()
        return _per_image(c_0, x_t, x_0.dtype) * x_0 + _per_image(c_t, x_t, x_0.dtype) * x_t

    def _variance(self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Variance of the reverse step, in x's dtype and shaped to broadcast against it."""
        floor, excess = self._log_variance(pair, v, x)
        return (floor + excess).exp().to(x.dtype)

    def _log_variance(
        self, pair: StepPair, v: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log variance of the reverse step as floor + excess, float64, shaped to broadcast to x.

        The floor is the log of the posterior's variance (of the decoder's, where s = -1). The KL to
        the posterior depends on the excess alone, which is exactly 0 for fixed_small.
        """
        is_data = pair.s < 0
        floor = torch.where(is_data, self._tables.log_decoder_variance[pair.t], pair.posterior_variance.log())
        dtype = widest_float(x.device)
        if v is not None:
            v, floor = v.to(dtype), _per_image(floor, x, dtype)
            if self.variance_type == "learned":
                return floor, v - floor
            # learned_range: from the floor to log b
            return floor, (v + 1) / 2 * (_per_image(pair.b.log(), x, dtype) - floor)
        if self.eta is not None:
            excess = torch.full_like(floor, 2 * math.log(self.eta) if self.eta else -math.inf)
        elif self.variance_type == "optimal":
            # (posterior variance + c_0^2 V_t) / posterior variance
            excess = torch.log1p(pair.snr_gain * self._tables.original_sample_mse[pair.t])
        elif self.variance_type.startswith("fixed_large"):
            excess = pair.b.log() - floor
        else:
            excess = torch.zeros_like(floor)
        excess = excess.masked_fill(is_data, 0)
        return _per_image(floor, x, dtype), _per_image(excess, x, dtype)

    # ----------------------------------------------------------------------- the terms of the bound

    def prior_kl(self, x_0: torch.Tensor, t: Timesteps | None = None, per_pixel: bool = False) -> torch.Tensor:
        """KL(q(x_t | x_0), N(0, I)): what the chain's start still knows of the image.

        Args:
            x_0: images in [-1, 1], (B, ...).
            t: the path's first timestep; None takes that of `scheduler.timesteps`.
            per_pixel: not summed over dims.

        Returns:
            nats per image, summed over dims, (B,) float64; or per pixel, shape of x_0.
        """
        _check_images(x_0=x_0)
        pair = self.chain.pair(self.timesteps[0] if t is None else t, -1).to(x_0.device)
        if per_pixel:
            signal, noise = (_per_image(c, x_0) for c in (pair.alpha_bar_t, pair.prior_kl(0)))
            return signal * x_0**2 / 2 + noise
        _per_image(pair.t, x_0)  # there is one timestep, or one an image
        dims = x_0[0].numel()
        mean_square = x_0.flatten(1).pow(2).sum(1, dtype=widest_float(x_0.device)) / dims
        return dims * pair.prior_kl(mean_square)

    def vlb_terms(
        self,
        model_output: torch.Tensor,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        t: Timesteps,
        s: Timesteps,
        clip: bool | None = None,
        per_pixel: bool = False,
    ) -> torch.Tensor:
        """One term of the bound for each image (the notes' figures 6-8 and 12).

        At s >= 0 it is KL(q(x_s | x_t, x_0), p(x_s | x_t)). At s = -1 it is the decoder's cost,
        -log p(x_0 | x_t), by the exact mass of each 8-bit pixel's bin, or with fitted `levels` by
        the probability of each pixel's level.

        Args:
            model_output: the network's output at (x_t, t).
            x_0: the images, 8-bit levels k / 127.5 - 1 where s = -1.
            x_t: a sample of q(x_t | x_0), same shape.
            t, s: the pair, int or (B,), s < t.
            clip: as in `predict_original_sample`.
            per_pixel: not summed over dims.

        Returns:
            nats, summed over dims, (B,) float64, or per pixel, shape of x_0; differentiable in
            model_output.

        Raises:
            ValueError: shapes or timesteps that do not fit; an eta other than None and 1, as the
                bound belongs to Algorithm 2.
        """
        if self.eta not in (None, 1):
            raise ValueError(
                f"eta is {self.eta}; it must be None or 1 in the bound (a DDIM path has another one; take "
                "from_config(config, eta=None))"
            )
        _check_images(x_0=x_0, x_t=x_t)
        output, v = self._split_output(model_output, x_t)
        pair = self.chain.pair(t, s)
        guess = self._original_sample(output, x_t, pair)
        terms = self._posterior_kl(x_0, self._refined(guess, pair, clip), pair, v)
        if not pair.none_at_data:
            is_data = pair.s < 0
            if is_data.is_cpu:  # the decoder of those images alone that need it
                rows = to_device(is_data.expand(len(x_0)).nonzero().flatten(), x_0.device)
                at_data = self.chain.pair(pair.t.expand(len(x_0))[is_data.expand(len(x_0))], -1)
                cost = self._decoder_cost(x_0[rows], guess[rows], at_data, None if v is None else v[rows], clip)
                terms = terms.index_put((rows,), cost)
            else:
                terms = torch.where(_per_image(is_data, x_0), self._decoder_cost(x_0, guess, pair, v, clip), terms)
        return terms if per_pixel else terms.flatten(1).sum(1)

    def _posterior_kl(
        self, x_0: torch.Tensor, x_0_hat: torch.Tensor, pair: StepPair, v: torch.Tensor | None
    ) -> torch.Tensor:
        """KL(q(x_s | x_t, x_0), p(x_s | x_t)) in nats per pixel, float64. Meaningless at the data.

        The means of the two Gaussians are c_0 (x_0 - x0_hat) apart and their log variances
        `excess`: (excess + exp(-excess) - 1 + c_0^2 (x_0 - x0_hat)^2 / variance) / 2.
        """
        _, excess = self._log_variance(pair, v, x_0)
        gain = pair.snr_gain.masked_fill(pair.s < 0, 0)  # c_0^2 / posterior variance
        weight = _per_image(gain, x_0, excess.dtype) * torch.exp(-excess)  # c_0^2 / variance
        return 0.5 * (excess + torch.expm1(-excess) + weight.to(x_0_hat.dtype) * (x_0 - x_0_hat) ** 2)

    def _decoder_cost(
        self, x_0: torch.Tensor, guess: torch.Tensor, pair: StepPair, v: torch.Tensor | None, clip: bool | None
    ) -> torch.Tensor:
        """-log P(x_0 | x_t), nats per pixel, float64."""
        if self._tables.level_posterior is not None:
            return -self._tables.level_posterior.log_mass(x_0, guess, self._decoder_blur(pair, v, guess))
        floor, excess = self._log_variance(pair, v, guess)
        return -discretized_gaussian_log_likelihood(x_0, self._clip(guess, clip), floor + excess)


# ---------------------------------------------------------------------------------------- functions


def _signal_and_std(pair: StepPair, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to broadcast against x."""
    signal, std = pair.alpha_bar_t.sqrt(), pair.one_minus_alpha_bar_t.sqrt()
    return _per_image(signal, x, dtype), _per_image(std, x, dtype)


def _per_image(values: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One value an image (B,), or one for all (1,), on x's device, shaped to broadcast to x."""
    if values.numel() not in (1, x.shape[0]):
        raise ValueError(f"{values.numel()} timesteps for {x.shape[0]} images; there must be one, or one an image")
    return to_device(values, x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def _check_images(**images: torch.Tensor) -> torch.dtype:
    """The dtype to compute in; ValueError for images of an integer dtype or of several shapes."""
    dtype = torch.float32
    first_name, first = next(iter(images.items()))
    for name, x in images.items():
        if not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point (8-bit images are k / 127.5 - 1, in [-1, 1])"
            )
        if x.ndim == 0 or x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {first_name} {tuple(first.shape)}; "
                "both must be of one shape (B, ...)"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _check_config(config: Any) -> None:
    """The settings that stand alone."""
    choices = {
        "variance_type": VARIANCE_TYPES,
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
    }
    for name, choice in choices.items():
        if config[name] not in choice:
            raise ValueError(f"{name} is {config[name]!r}; it must be one of {', '.join(choice)}")
    T, offset, ratio = config.num_train_timesteps, config.steps_offset, config.dynamic_thresholding_ratio
    if not _is_whole(T) or T < 1 or isinstance(T, float):
        raise ValueError(f"num_train_timesteps is {T!r}; it must be a whole number of at least 1")
    if not _is_whole(offset) or offset < 0:
        raise ValueError(f"steps_offset is {offset!r}; it must be a whole number of at least 0")
    for name in ("clip_sample_range", "sample_max_value"):
        if not config[name] > 0:
            raise ValueError(f"{name} is {config[name]!r}; it must be above 0")
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio is {ratio!r}; it must be above 0 and at most 1")


def _check_eta(eta: float | None) -> float | None:
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; it must be None (Algorithm 2), or a number from 0 (DDIM) to 1")
    return eta


def _check_original_sample_mse(values: Any, variance_type: str, T: int) -> list[float] | None:
    if values is None:
        if variance_type == "optimal":
            raise ValueError(
                "variance_type is 'optimal' and original_sample_mse is None; it must be num_train_timesteps floats"
            )
        return None
    mse = [float(v) for v in values]
    if len(mse) != T or not all(math.isfinite(v) and v >= 0 for v in mse):
        raise ValueError(
            f"original_sample_mse has {len(mse)} values from {min(mse, default=None)} to {max(mse, default=None)}; "
            f"it must have {T} (num_train_timesteps), finite and at least 0"
        )
    return mse


def _check_decoder_variance(value: Any, T: int) -> dict[int, float] | None:
    if value is None:
        return None
    # JSON turns a dictionary's keys into strings
    variances = {int(t): float(v) for t, v in value.items()} if isinstance(value, dict) else {0: float(value)}
    for t, variance in variances.items():
        if not 0 <= t < T or not (math.isfinite(variance) and variance > 0):
            raise ValueError(
                f"decoder_variance has {variance!r} for last timestep {t}; it must have finite numbers above 0, "
                f"at timesteps 0..{T - 1}"
            )
    return variances


def _as_path(timesteps: Any, T: int) -> list[int]:
    """Timesteps of any kind as a list of ints, checked."""
    values = [t.item() if isinstance(t, (torch.Tensor, np.generic)) else t for t in timesteps]
    if not values:
        raise ValueError("timesteps is empty; it must have at least one timestep")
    outside = [t for t in values if not _is_whole(t) or not 0 <= t < T]
    if outside:
        raise ValueError(f"timesteps has {shorten(outside)}; they must be whole numbers from 0 to {T - 1}")
    path = [int(t) for t in values]
    if any(s >= t for t, s in itertools.pairwise(path)):
        raise ValueError(f"timesteps is {shorten(path)}; it must fall strictly (each below the one before)")
    return path


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and float(value).is_integer()
