# ddpm_notes_pipeline 0.1.0, sha256 of the lines below 596f9abbfb1ed4c38381c5e4d8cd324aeab927f7d1ef880d897935c6c7d706e7
"""The math of DDPM (Ho et al. 2020, arXiv 2006.11239), as a diffusers scheduler.

A fixed chain adds noise to an image x_0 in T small steps, beta_t at a time; with alpha_bar_t = prod(1 - beta) any x_t is one jump away:

    q(x_t | x_0)      = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                                    the forward jump
    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, pv I)   for s < t, by Bayes' rule                           the posterior
        a = alpha_bar_t / alpha_bar_s,   b = 1 - a
        c_0 = sqrt(alpha_bar_s) b / (1 - alpha_bar_t)
        c_t = sqrt(a) (1 - alpha_bar_s) / (1 - alpha_bar_t)
        pv  = (1 - alpha_bar_s) b / (1 - alpha_bar_t)
    p(x_s | x_t)      = N(c_0 x0_hat(x_t) + c_t x_t, variance)                                           the reverse step

A network supplies x0_hat, its guess of x_0 (directly, or as the noise eps, or as the velocity v). Maximum likelihood asks each reverse
step to be near the posterior in KL divergence; those KLs, the prior's and the decoder's are the terms of the bound (`vlb_terms`, `prior_kl`).

Timesteps are counted as diffusers does, t = 0..T-1, and **s = -1 is the data x_0** (alpha_bar = 1). All tables are float64 in log space,
rounded once when they meet a tensor; arithmetic is float32 at least.
"""

import itertools
import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES, "optimal")
HALF_PIXEL = 1 / 255  # half the distance between two neighbouring levels of an 8-bit image in [-1, 1]

# Stock diffusers classes know neither our settings nor "optimal". Ours sit in one private config entry, which they load and re-save
# without a word, and `variance_type` holds the type that they can fall back to.
PRIVATE_ENTRY = "_ddpm_notes"
PRIVATE_SETTINGS = ("original_sample_mse", "decoder_variance", "eta")
STOCK_CLASS, STOCK_FALLBACK = "DDPMScheduler", "fixed_small"

Timesteps = int | torch.Tensor


CPU = torch.device("cpu")


@dataclass
class DDPMNotesSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x_s, shape and dtype of the sample.
        pred_original_sample: x0_hat as used in the mean (clipped if the config says so), same shape and dtype.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None

    def __init__(self, prev_sample: torch.Tensor, pred_original_sample: torch.Tensor | None = None) -> None:
        # As BaseOutput does it, without its loop over the fields: that takes a third of the time of a step.
        self.__dict__.update(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
        OrderedDict.__setitem__(self, "prev_sample", prev_sample)
        if pred_original_sample is not None:
            OrderedDict.__setitem__(self, "pred_original_sample", pred_original_sample)


class StepPair(NamedTuple):
    """The numbers of a step from t to s, float64, one entry a pair."""

    alpha_bar_t: torch.Tensor
    one_minus_alpha_bar_t: torch.Tensor
    alpha_bar_s: torch.Tensor
    one_minus_alpha_bar_s: torch.Tensor
    a: torch.Tensor  # alpha_bar_t / alpha_bar_s
    b: torch.Tensor  # 1 - a


class StepCoefficients(NamedTuple):
    """What `step` needs for one pair, as Python floats."""

    is_last: bool  # s = -1: the mean is the image, no noise is added
    scale: float  # x0_hat = scale * y,  y = model_output + x_t_to_y * x_t
    x_t_to_y: float
    limit: float  # of |y|, where x0_hat is clipped
    y_to_mean: float  # mean = y_to_mean * y + x_t_to_mean * x_t
    x_t_to_mean: float
    std: float  # of the fixed types and "optimal"
    log_variance: float  # the lower end of learned_range, and how far its upper end is above
    log_variance_gap: float
    scale_float32: torch.Tensor  # no dimensions: half the time of a multiplication by a Python float


class DDPMNotesScheduler(SchedulerMixin, ConfigMixin):
    """DDPM's forward process, posterior, reverse step and terms of the bound, for any pair of timesteps (t, s).

    A drop-in for `diffusers.DDPMScheduler` (same names, defaults and numbers where that one is right), written from the equations.

    Args:
        num_train_timesteps (`int`): T, the length of the chain.
        beta_start, beta_end (`float`): ends of the schedules "linear", "scaled_linear" and "sigmoid".
        beta_schedule (`str`): "linear" (Ho et al. 2020), "scaled_linear", "squaredcos_cap_v2" (cosine, arXiv 2102.09672), "sigmoid",
            "laplace" (arXiv 2407.03297: alpha_bar = snr / (1 + snr)).
        trained_betas (list of `float`, *optional*): T betas of your own, each in (0, 1); the last may be 1 (zero terminal SNR).
        variance_type (`str`): variance of the reverse step at s >= 0.
            "fixed_small" (pv), "fixed_large" (b), their "_log" spellings (the same numbers), "learned" (the second half of the output
            channels is the log variance), "learned_range" (second half v: log variance = (v+1)/2 log b + (1-v)/2 log pv, arXiv 2102.09672
            eq. 15), "optimal" (pv + c_0^2 V_t, the best isotropic variance for this network; needs `original_sample_mse`).
        clip_sample, clip_sample_range: clip x0_hat to [-range, range].
        prediction_type (`str`): what the network outputs: "epsilon", "sample" (x_0) or "v_prediction" (sqrt(abar) eps - sqrt(1-abar) x_0).
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0_hat (arXiv 2205.11487), instead of clipping.
        timestep_spacing, steps_offset: how `set_timesteps(n)` chooses n of the T timesteps (arXiv 2305.08891, table 2).
        rescale_betas_zero_snr (`bool`): shift sqrt(alpha_bar) so that alpha_bar_T = 0 (arXiv 2305.08891). Not with "epsilon", where
            x0_hat = (x_T - eps) / 0 has no meaning.
        original_sample_mse (list of T `float`, *optional*): V_t = E||x_0 - x0_hat(x_t)||^2 / dims, measured on data.
        decoder_variance (`float` or `dict`, *optional*): variance of the decoder p(x_0 | x_t) for a path that ends at timestep 0
            (a float), or at each of several last timesteps ({timestep: variance}).
        eta (`float`, *optional*): None samples by Algorithm 2 with `variance_type`; a number in [0, 1] is DDIM's eta (arXiv 2010.02502),
            which replaces the variance type: 0 is deterministic, 1 is fixed_small.

    Every method that takes timesteps takes an int or an integer tensor of shape (B,). Those on a CPU are checked; those on an
    accelerator are not, because reading them would stop its stream.

    Raises:
        ValueError: for a setting out of its range; the message names it, the value seen, and what is allowed.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

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
        eta: float | None = None,
    ) -> None:
        _check_choice("variance_type", variance_type, VARIANCE_TYPES)
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if not _is_whole(num_train_timesteps) or num_train_timesteps < 1 or isinstance(num_train_timesteps, float):
            raise ValueError(f"num_train_timesteps is {num_train_timesteps!r}; allowed: a whole number of at least 1")
        if not _is_whole(steps_offset) or steps_offset < 0:
            raise ValueError(f"steps_offset is {steps_offset!r}; allowed: a whole number of at least 0")
        for name, limit in (("clip_sample_range", clip_sample_range), ("sample_max_value", sample_max_value)):
            if not limit > 0:
                raise ValueError(f"{name} is {limit!r}; allowed: above 0")
        if not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio is {dynamic_thresholding_ratio!r}; allowed: above 0, at most 1"
            )

        betas = make_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        if betas[-1] == 1 and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type is 'epsilon' with a schedule whose last alpha_bar is 0 (rescale_betas_zero_snr, or a last beta of 1): "
                "x_0 = (x_T - eps) / 0 there. Allowed: 'v_prediction' or 'sample'"
            )
        # log alpha_bar_t for t = 0..T-1, and 0 for the data behind them: index -1 finds the data
        log_alpha_bar = np.append(np.cumsum(np.log1p(-betas, where=betas < 1, out=np.full_like(betas, -np.inf))), 0.0)
        self._log_alpha_bar = torch.from_numpy(log_alpha_bar)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = self._log_alpha_bar[:-1].exp().float()
        self.init_noise_sigma = 1.0

        self.variance_type = variance_type
        self.eta = self._configured_eta = _check_eta(eta)
        self.original_sample_mse = self._check_original_sample_mse(original_sample_mse)
        self.decoder_variance = self._check_decoder_variance(decoder_variance)
        self._keep_private_settings()

        self._tables: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}
        self._signals: dict[tuple[int, torch.device, torch.dtype], list[Any]] = {}
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_path(list(range(num_train_timesteps))[::-1], device=None)

    # ------------------------------------------------------------------------------------------------ configuration

    def _keep_private_settings(self) -> None:
        """Move what stock classes do not know into the private config entry."""
        config = {name: value for name, value in self.config.items() if name not in PRIVATE_SETTINGS}
        ours = {name: getattr(self, name) for name in PRIVATE_SETTINGS if getattr(self, name) is not None}
        if self.variance_type == "optimal":
            ours["variance_type"], config["variance_type"] = "optimal", STOCK_FALLBACK
        if ours:
            config[PRIVATE_ENTRY] = ours
        self._internal_dict = FrozenDict(config)

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', under the stock class's name: by it `from_config` knows what to pass over without a warning."""
        super().register_to_config(**{**kwargs, **({"_class_name": STOCK_CLASS} if "_class_name" in kwargs else {})})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Like diffusers' `from_config`: from this class's config or any compatible scheduler's, changed by `kwargs`."""
        if isinstance(config, dict) and PRIVATE_ENTRY in config:
            config = dict(config)
            ours = dict(config.pop(PRIVATE_ENTRY))
            if config.get("variance_type") != STOCK_FALLBACK:  # somebody chose another one since
                ours.pop("variance_type", None)
            config.update(ours)
            config["_use_default_values"] = [name for name in config.get("_use_default_values", []) if name not in ours]
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, under the name of the stock class, so that any diffusers loads it."""
        config = json.loads(super().to_json_string())
        self.register_to_config(_class_name=STOCK_CLASS)
        return json.dumps({**config, "_class_name": STOCK_CLASS}, indent=2, sort_keys=True) + "\n"

    def _check_original_sample_mse(self, values: Any) -> list[float] | None:
        if values is None:
            if self.variance_type == "optimal":
                raise ValueError(
                    "variance_type is 'optimal' and original_sample_mse is None; allowed: a list of num_train_timesteps floats"
                )
            return None
        mse = [float(v) for v in values]
        if len(mse) != len(self) or not all(math.isfinite(v) and v >= 0 for v in mse):
            raise ValueError(
                f"original_sample_mse has {len(mse)} values from {min(mse, default=None)} to {max(mse, default=None)}; "
                f"allowed: {len(self)} (num_train_timesteps) finite values of at least 0"
            )
        return mse

    def _check_decoder_variance(self, value: Any) -> dict[int, float] | None:
        if value is None:
            return None
        # JSON turns a dictionary's keys into strings
        variances = {int(t): float(v) for t, v in value.items()} if isinstance(value, dict) else {0: float(value)}
        for t, variance in variances.items():
            if not 0 <= t < len(self) or not (math.isfinite(variance) and variance > 0):
                raise ValueError(
                    f"decoder_variance has {variance!r} for last timestep {t}; allowed: a finite number above 0, at timesteps 0..{len(self) - 1}"
                )
        return variances

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------------------------------------ the path of timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
    ) -> None:
        """Choose the path t_1 > t_2 > ... that `step` walks down, ending at the data, and compute all of its coefficients.

        Args:
            num_inference_steps: how many of the T timesteps, 1..T, spaced as `timestep_spacing` says.
            device: where `scheduler.timesteps` is put.
            timesteps: or the timesteps themselves, strictly falling, in 0..T-1.
            eta: as in the constructor, for this path; None takes the constructor's.

        Raises:
            ValueError: both or neither of the two given; a number or a timestep out of range; timesteps not falling.
        """
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r} and timesteps is {timesteps!r}; allowed: exactly one of the two"
            )
        eta = self._configured_eta if eta is None else _check_eta(eta)
        custom = timesteps is not None
        if timesteps is not None:
            timesteps = [t.item() if isinstance(t, (torch.Tensor, np.generic)) else t for t in timesteps]
            if not timesteps:
                raise ValueError("timesteps is empty; allowed: at least one timestep")
            if not all(_is_whole(t) and 0 <= t < T for t in timesteps):
                raise ValueError(f"timesteps has {_outside(timesteps, T)}; allowed: whole numbers from 0 to {T - 1}")
            path = [int(t) for t in timesteps]
            if any(s >= t for t, s in itertools.pairwise(path)):
                raise ValueError(
                    f"timesteps is {_shorten(path)}; allowed: strictly falling (each below the one before)"
                )
        else:
            path = self._spaced_timesteps(num_inference_steps)
        self.eta = eta
        self.custom_timesteps = custom
        self.num_inference_steps = len(path)
        self._set_path(path, device)

    def _spaced_timesteps(self, n: Any) -> list[int]:
        """n timesteps by arXiv 2305.08891, table 2."""
        T, spacing = len(self), self.config.timestep_spacing
        if not _is_whole(n) or not 1 <= n <= T:
            raise ValueError(
                f"num_inference_steps is {n!r}; allowed: a whole number from 1 to {T} (num_train_timesteps)"
            )
        n = int(n)
        path: Any
        if spacing == "linspace":
            path = np.linspace(0, T - 1, n).round()[::-1]
        elif spacing == "leading":
            path = np.arange(n)[::-1] * (T // n) + self.config.steps_offset
        else:  # trailing
            path = np.round(np.arange(T, 0, -T / n)[:n]) - 1  # rounding may make that range one longer
        if path[0] >= T:
            raise ValueError(
                f"steps_offset is {self.config.steps_offset} and the {n} timesteps would start at {int(path[0])}; "
                f"allowed: an offset that keeps them below {T} (num_train_timesteps)"
            )
        return [int(t) for t in path]

    def _set_path(self, path: list[int], device: str | torch.device | None) -> None:
        """Coefficients of every step of the path, all at once, and the decoder's variance at its end."""
        self.timesteps = torch.tensor(path, dtype=torch.int64).to(device)
        self._path_timesteps = path
        t = torch.tensor(path)
        s = torch.tensor([*path[1:], -1])
        self._log_decoder_variance = self._decoder_variances(path).log()
        self._tables.clear()
        pair = self._pair(t, s)
        log_pv = self._log_pv(t, s, pair)
        gap = pair.b.log() - log_pv
        # at s = -1 `step` adds no noise: the image is the mean
        std = torch.where(s < 0, torch.zeros_like(log_pv), self._log_variance(t, s, pair).mul(0.5).exp())
        x_t_to_x_0, scale = self._x_0_coefficients(pair)
        x_0_to_mean, x_t_to_mean = self._mean_coefficients(pair)
        config = self.config
        self._thresholding = config.thresholding
        clipped = config.clip_sample and not config.thresholding
        limit = (config.clip_sample_range if clipped else math.inf) / scale.abs()
        columns = (scale, x_t_to_x_0 / scale, limit, x_0_to_mean * scale, x_t_to_mean, std, log_pv, gap)
        rows = zip(*(column.tolist() for column in columns), scale.float().unbind())
        self._path = {t: StepCoefficients(t == path[-1], *row) for t, row in zip(path, rows)}
        self._previous = dict(zip(path, [*path[1:], -1]))

    def _decoder_variances(self, path: list[int]) -> torch.Tensor:
        """Variance of p(x_0 | x_t) for every last timestep t, (T,) float64.

        The posterior's is 0 there. The fixed types take that of the next pair above (pv(1, 0) for t = 0, as in the papers; the pair
        that the path really has, where it ends higher), "optimal" its own rule with pv = 0 and c_0 = 1; a fitted number comes first.
        """
        T = len(self)
        t = torch.arange(T)
        pair = self._pair(torch.clamp(t + 1, max=T - 1), t)
        variances = pair.one_minus_alpha_bar_s * pair.b / pair.one_minus_alpha_bar_t
        variances[-1] = pair.one_minus_alpha_bar_t[-1]  # nothing is above T-1
        if len(path) > 1 and path[-1] > 0:
            above = self._pair(torch.tensor(path[-2:-1]), torch.tensor(path[-1:]))
            variances[path[-1]] = above.one_minus_alpha_bar_s * above.b / above.one_minus_alpha_bar_t
        if self.variance_type == "optimal":
            variances = torch.tensor(self.original_sample_mse, dtype=torch.float64).clamp(min=1e-6)
        if self.variance_type not in LEARNED_VARIANCES:
            for last, variance in (self.decoder_variance or {}).items():
                variances[last] = variance
        return variances

    def previous_timestep(self, timestep: Timesteps) -> int:
        """The s that follows t on the path, -1 (the data) after its last.

        Raises:
            ValueError: t is not on the path that `set_timesteps` chose.
        """
        t = self._path_index(timestep)
        if t not in self._previous:
            raise ValueError(
                f"timestep {t} is not on the path; allowed: {_shorten(list(self._path))} (see set_timesteps)"
            )
        return self._previous[t]

    def _path_index(self, timestep: Timesteps) -> int:
        # `for t in scheduler.timesteps` gives views into it. On an accelerator the offset of such a view says which it is,
        # where reading its value would stop the stream.
        if isinstance(timestep, torch.Tensor) and timestep.device.type not in ("cpu", "meta"):
            if (
                timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
                and timestep.ndim == 0
            ):
                return self._path_timesteps[timestep.storage_offset()]
        value = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        if not _is_whole(value):
            raise ValueError(f"timestep is {timestep!r}; allowed: one whole number on the path")
        return int(value)

    # ------------------------------------------------------------------------------------------------ numbers of a pair (t, s)

    def _table(self, name: str, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """`values` (float64, on the CPU) rounded once to `dtype` on `device`, kept."""
        key = (name, device, dtype)
        if key not in self._tables:
            self._tables[key] = values.to(dtype).to(device)
        return self._tables[key]

    def _timestep(self, value: Timesteps, name: str = "t") -> torch.Tensor:
        """An int or integer tensor as int64 of shape (B,) or (1,), checked where that costs no stop of an accelerator."""
        lowest = -1 if name == "s" else 0
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.ndim > 1:
                raise ValueError(
                    f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}; allowed: an int, or integers of shape (B,)"
                )
            index = value.reshape(-1).long()
            if index.device.type == "mps":  # has no float64 to compute the coefficients in
                index = index.cpu()
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            index = torch.tensor([int(value)])
        else:
            raise ValueError(f"{name} is {value!r}; allowed: an int, or an integer tensor of shape (B,)")
        least, largest = index.aminmax() if index.device.type == "cpu" and index.numel() else (lowest, lowest)
        if not (lowest <= least and largest < len(self)):
            raise ValueError(
                f"{name} has {_outside(index.tolist(), len(self), lowest)}; allowed: {lowest} to {len(self) - 1}"
            )
        return index

    def _timestep_pair(self, from_t: Timesteps, to_s: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        t, s = self._timestep(from_t), self._timestep(to_s, "s")
        if t.device != s.device:
            t, s = (t.to(s.device), s) if t.numel() == 1 else (t, s.to(t.device))
        if t.numel() != s.numel() and 1 not in (t.numel(), s.numel()):
            raise ValueError(
                f"t has {t.numel()} entries and s has {s.numel()}; allowed: the same number, or one of them a single step"
            )
        t, s = torch.broadcast_tensors(t, s)
        if t.device.type == "cpu" and bool((s >= t).any()):
            worst = int((s - t).argmax())
            raise ValueError(
                f"the pair (t, s) = ({int(t[worst])}, {int(s[worst])}) does not go back; allowed: s < t (s = -1 is the data)"
            )
        return t, s

    def _pair(self, t: torch.Tensor, s: torch.Tensor) -> StepPair:
        table = self._table("log_alpha_bar", self._log_alpha_bar, t.device, torch.float64)
        log_t, log_s = table[t], table[s]
        return StepPair(
            log_t.exp(),
            -torch.expm1(log_t),
            log_s.exp(),
            -torch.expm1(log_s),
            (log_t - log_s).exp(),
            -torch.expm1(log_t - log_s),
        )

    def _x_0_coefficients(self, pair: StepPair) -> tuple[torch.Tensor, torch.Tensor]:
        """x0_hat = first * x_t + second * model_output."""
        signal, noise = pair.alpha_bar_t.sqrt(), pair.one_minus_alpha_bar_t.sqrt()
        if self.config.prediction_type == "epsilon":  # x_t = signal x_0 + noise eps, solved for x_0
            return 1 / signal, -noise / signal
        if self.config.prediction_type == "v_prediction":  # x_0 = signal x_t - noise v (arXiv 2202.00512)
            return signal, -noise
        return torch.zeros_like(signal), torch.ones_like(signal)

    def _mean_coefficients(self, pair: StepPair) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of the reverse step = first * x0_hat + second * x_t."""
        if self.eta is None:
            return (
                pair.alpha_bar_s.sqrt() * pair.b / pair.one_minus_alpha_bar_t,
                pair.a.sqrt() * pair.one_minus_alpha_bar_s / pair.one_minus_alpha_bar_t,
            )
        # DDIM (arXiv 2010.02502, eq. 12): sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat, eps_hat from x_t and x0_hat
        variance = self.eta**2 * pair.one_minus_alpha_bar_s * pair.b / pair.one_minus_alpha_bar_t
        direction = ((pair.one_minus_alpha_bar_s - variance).clamp(min=0) / pair.one_minus_alpha_bar_t).sqrt()
        return pair.alpha_bar_s.sqrt() - direction * pair.alpha_bar_t.sqrt(), direction

    def _log_pv(self, t: torch.Tensor, s: torch.Tensor, pair: StepPair) -> torch.Tensor:
        """log pv, the posterior's variance; where s = -1 the decoder's in its place (pv is 0 there)."""
        log_pv = (pair.one_minus_alpha_bar_s * pair.b / pair.one_minus_alpha_bar_t).log()
        log_decoder = self._table("log_decoder_variance", self._log_decoder_variance, t.device, torch.float64)[t]
        return torch.where(s < 0, log_decoder, log_pv)

    def _excess(
        self,
        t: torch.Tensor,
        s: torch.Tensor,
        pair: StepPair,
        v: torch.Tensor | None,
        log_pv: torch.Tensor,
    ) -> torch.Tensor:
        """log variance of the reverse step minus log pv (minus the decoder's, where s = -1), float64.

        Kept as a difference because the KL to the posterior depends on it alone: fixed_small has 0, exactly.
        Shape of t, or of `v` (the network's second half) for the learned types.
        """
        if self.eta is not None:
            return torch.where(s < 0, 0.0, torch.full_like(log_pv, 2 * math.log(self.eta) if self.eta else -math.inf))
        if v is not None:
            log_pv, log_b = (c.to(v.device).reshape(-1, *[1] * (v.ndim - 1)) for c in (log_pv, pair.b.log()))
            if self.variance_type == "learned":
                return v.double() - log_pv
            return (v.double() + 1) / 2 * (log_b - log_pv)  # learned_range: between log pv and log b
        if self.variance_type == "optimal":
            mse = self._table(
                "mse", torch.tensor(self.original_sample_mse, dtype=torch.float64), t.device, torch.float64
            )[t]
            c_0 = pair.alpha_bar_s.sqrt() * pair.b / pair.one_minus_alpha_bar_t
            excess = torch.log1p(c_0**2 * mse * torch.exp(-log_pv))
        elif self.variance_type.startswith("fixed_large"):
            excess = pair.b.log() - log_pv
        else:
            return torch.zeros_like(log_pv)
        return torch.where(s < 0, 0.0, excess)

    def _log_variance(
        self, t: torch.Tensor, s: torch.Tensor, pair: StepPair, v: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log variance of the reverse step: float64, shape of t, or of `v` for the learned types."""
        log_pv = self._log_pv(t, s, pair)
        excess = self._excess(t, s, pair, v, log_pv)
        return log_pv.to(excess.device).reshape(-1, *[1] * (excess.ndim - 1)) + excess

    # ------------------------------------------------------------------------------------------------ the forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the forward jump with its noise given (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, floating point, (B, ...), images in [-1, 1].
            noise: eps, standard normal, same shape.
            timesteps: t in 0..T-1, int or (B,).

        Returns:
            x_t, shape and dtype of x_0; computed in float32 at least.

        Raises:
            ValueError: integer images, shapes that differ, t out of range.
        """
        signal, std, dtype = self._signal_and_noise(original_samples, noise, timesteps, "original_samples")
        x_t = (signal * original_samples).addcmul_(std, noise if noise.dtype is dtype else noise.to(dtype))
        return x_t if dtype is original_samples.dtype else x_t.to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Timesteps) -> torch.Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, the target of "v_prediction" (arXiv 2202.00512). As `add_noise`."""
        signal, std, dtype = self._signal_and_noise(sample, noise, timesteps, "sample")
        return (signal * noise).addcmul_(std, sample.to(dtype), value=-1).to(sample.dtype)

    def _signal_and_noise(
        self, x_0: torch.Tensor, noise: torch.Tensor, t: Timesteps, name: str
    ) -> tuple[Any, Any, torch.dtype]:
        dtype = torch.float32
        if not (x_0.dtype is noise.dtype is dtype and x_0.ndim and x_0.shape == noise.shape):
            dtype = _check_images(**{name: x_0, "noise": noise})
        if not isinstance(t, torch.Tensor) or t.dtype != torch.int64 or t.ndim != 1:
            t = self._timestep(t, "timesteps")
        key = (x_0.ndim, t.device, dtype)
        tables = self._signals.get(key)
        if tables is None:  # shaped to broadcast against the images
            half = 0.5 * self._log_alpha_bar[:-1].reshape(-1, *[1] * (x_0.ndim - 1))
            tables = [values.to(dtype).to(t.device) for values in (half.exp(), (-torch.expm1(2 * half)).sqrt())]
            tables += [list(values.flatten().unbind()) for values in tables] if t.device == CPU else []
            self._signals[key] = tables
        # one number for all images; a tensor without dimensions would not lift half precision to float32
        if t.device == CPU and t.numel() == 1 and x_0.dtype is noise.dtype is dtype and 0 <= (i := int(t)) < len(self):
            return tables[2][i], tables[3][i], dtype
        try:
            signal, std = tables[0].index_select(0, t), tables[1].index_select(0, t)
        except (IndexError, RuntimeError):
            self._timestep(t, "timesteps")  # says what is wrong
            raise
        if t.device != x_0.device or t.numel() != x_0.shape[0]:
            signal, std = (_like(values.flatten(), x_0, dtype) for values in (signal, std))
        return signal, std, dtype

    def forward_mean_variance(self, x_0: torch.Tensor, t: Timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

        Returns:
            mean (shape of x_0) and variance (broadcasts against it), in float32 or x_0's wider type.
        """
        dtype = _check_images(x_0=x_0)
        t = self._timestep(t)
        log_t = self._table("log_alpha_bar", self._log_alpha_bar, t.device, torch.float64)[t]
        return _like((0.5 * log_t).exp(), x_0, dtype) * x_0, _like(-torch.expm1(log_t), x_0, dtype)

    def posterior_mean_variance(
        self, x_0: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, pv I), by Bayes' rule (the notes' figures 9-11).

        At s = -1 the mean is x_0 and the variance 0.

        Returns:
            mean (shape of x_0) and variance (broadcasts against it), in float32 or the wider type of the two images.
        """
        dtype = _check_images(x_0=x_0, x_t=x_t)
        pair = self._pair(*self._timestep_pair(t, s))
        c_0 = pair.alpha_bar_s.sqrt() * pair.b / pair.one_minus_alpha_bar_t
        c_t = pair.a.sqrt() * pair.one_minus_alpha_bar_s / pair.one_minus_alpha_bar_t
        pv = pair.one_minus_alpha_bar_s * pair.b / pair.one_minus_alpha_bar_t
        return _like(c_0, x_0, dtype) * x_0 + _like(c_t, x_0, dtype) * x_t, _like(pv, x_0, dtype)

    # ------------------------------------------------------------------------------------------------ the reverse process

    def predict_original_sample(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """x0_hat, the image that the network believes in (the notes' figure 13, solved for x_0).

        Args:
            model_output: the network's output, channels of x_t or twice as many (the second half is about the variance).
            x_t: the noisy image, (B, C, ...).
            t: its timestep.
            clip: clip or threshold x0_hat as the config describes; None: if the config says so.

        Returns:
            x0_hat, shape of x_t, in float32 or the wider type of the two.
        """
        _check_images(x_t=x_t)
        output, _ = self._split_output(model_output, x_t)
        t = self._timestep(t)
        return self._original_sample(output, x_t, self._pair(t, torch.full_like(t, -1)), clip)

    def _original_sample(
        self, output: torch.Tensor, x_t: torch.Tensor, pair: StepPair, clip: bool | None
    ) -> torch.Tensor:
        """The same from the network's guess alone and a pair with that t."""
        x_t_to_x_0, output_to_x_0 = self._x_0_coefficients(pair)
        x_0 = output.to(torch.promote_types(_check_images(x_t=x_t), output.dtype))
        if self.config.prediction_type != "sample":
            x_0 = _like(x_t_to_x_0, x_t, x_0.dtype) * x_t + _like(output_to_x_0, x_t, x_0.dtype) * x_0
        return self._clip(x_0, clip)

    def predict_noise(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, clip: bool | None = None
    ) -> torch.Tensor:
        """eps_hat, the noise that belongs to x0_hat: (x_t - sqrt(alpha_bar_t) x0_hat) / sqrt(1 - alpha_bar_t). As `predict_original_sample`."""
        x_0 = self.predict_original_sample(model_output, x_t, t, clip)
        t = self._timestep(t)
        pair = self._pair(t, torch.full_like(t, -1))
        signal, noise = (_like(c.sqrt(), x_t, x_0.dtype) for c in (pair.alpha_bar_t, pair.one_minus_alpha_bar_t))
        return (x_t - signal * x_0) / noise

    def reverse_mean_variance(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: Timesteps, s: Timesteps, clip: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the reverse step p(x_s | x_t): c_0 x0_hat + c_t x_t, and what `variance_type` (or `eta`) says.

        At s = -1 it is the decoder p(x_0 | x_t): mean x0_hat, variance the decoder's.

        Returns:
            mean (shape of x_t) and variance (broadcasts against it), in float32 or the wider type of the inputs.
        """
        _, v = self._split_output(model_output, x_t)
        x_0 = self.predict_original_sample(model_output, x_t, t, clip)
        t, s = self._timestep_pair(t, s)
        pair = self._pair(t, s)
        c_0, c_t = (_like(c, x_t, x_0.dtype) for c in self._mean_coefficients(pair))
        variance = self._log_variance(t, s, pair, v).exp()
        return c_0 * x_0 + c_t * x_t, _like(variance, x_t, x_0.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timesteps,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMNotesSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of Algorithm 2: x_s = mean + std z, and the mean alone where s = -1.

        Args:
            model_output: the network's output at (sample, timestep), channels of the sample or twice as many.
            timestep: t, on the path that `set_timesteps` chose.
            sample: x_t, (B, C, ...), floating point.
            generator: for z: one, or one an image; a CPU generator serves any device.
            return_dict: an output object, or the tuple (prev_sample, pred_original_sample).

        Returns:
            x_s and x0_hat in the sample's dtype; computed in float32 at least.

        Raises:
            ValueError: a timestep off the path, shapes that do not fit, an integer sample.
        """
        t: Any = timestep
        if isinstance(timestep, torch.Tensor) and timestep.device == CPU and timestep.numel() == 1:
            t = timestep.item()
        if type(t) is not int:
            t = self._path_index(timestep)
        if t not in self._path:
            self.previous_timestep(t)  # says what is wrong
        c = self._path[t]
        x_t, output, v = sample, model_output, None
        float32 = sample.dtype is torch.float32 and model_output.dtype is torch.float32
        if (
            not float32
            or sample.shape != model_output.shape
            or not sample.ndim
            or self.variance_type in LEARNED_VARIANCES
        ):
            x_t = sample.to(_check_images(sample=sample))
            output, v = self._split_output(model_output, x_t)

        # x0_hat, but for a factor that goes into the next coefficient
        y = torch.add(output, x_t, alpha=c.x_t_to_y).clamp_(-c.limit, c.limit)
        if self._thresholding:
            y = self._clip(y * c.scale) / c.scale

        # std z, and the mean on top: the posterior's with x0_hat in x_0's place (Ho et al. 2020, eq. 7)
        if c.is_last:
            x_s = x_t * c.x_t_to_mean
        elif v is None or self.eta is not None:
            x_s = _noise_like(x_t, generator, c.std).add_(x_t, alpha=c.x_t_to_mean)
        else:
            log_variance = v.to(x_t.dtype)
            if self.variance_type == "learned_range":
                log_variance = (log_variance + 1) * (c.log_variance_gap / 2) + c.log_variance
            x_s = torch.exp(log_variance / 2).mul_(_noise_like(x_t, generator)).add_(x_t, alpha=c.x_t_to_mean)
        x_s.add_(y, alpha=c.y_to_mean)

        x_0 = y.mul_(c.scale_float32 if y.dtype is torch.float32 else c.scale)
        if x_s.dtype is not sample.dtype:
            x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMNotesSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def scale_model_input(self, sample: torch.Tensor, timestep: Timesteps | None = None) -> torch.Tensor:
        """The sample itself: DDPM's network sees x_t as it is (other schedulers scale it)."""
        return sample

    def _split_output(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's guess, and its second half where the variance type uses it."""
        learned = self.variance_type in LEARNED_VARIANCES
        if not model_output.is_floating_point():
            raise ValueError(f"model_output has dtype {model_output.dtype}; allowed: floating point")
        if model_output.shape == x_t.shape:
            if learned and self.eta is None:
                raise ValueError(
                    f"model_output has {x_t.shape[1]} channels; allowed: {2 * x_t.shape[1]} with variance_type '{self.variance_type}', "
                    "whose second half is about the variance"
                )
            return model_output, None
        if x_t.ndim < 2 or model_output.shape != (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]):
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and the sample {tuple(x_t.shape)}; "
                "allowed: the same shape, or twice the channels (dimension 1)"
            )
        output, v = model_output.chunk(2, dim=1)
        return output, v if learned else None

    def _clip(self, x_0: torch.Tensor, clip: bool | None = None) -> torch.Tensor:
        """x0_hat clipped or thresholded as the config says; `clip` overrides whether."""
        config = self.config
        if not (config.thresholding or config.clip_sample if clip is None else clip):
            return x_0
        if not config.thresholding:
            return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
        # dynamic thresholding (arXiv 2205.11487, section 2.3): a high percentile of |x_0|, at least 1, is brought back to 1
        limit = torch.quantile(x_0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        limit = _like(limit.clamp(min=1, max=config.sample_max_value), x_0, x_0.dtype)
        return torch.maximum(torch.minimum(x_0, limit), -limit) / limit

    # ------------------------------------------------------------------------------------------------ the terms of the bound

    def prior_kl(self, x_0: torch.Tensor, t: Timesteps | None = None) -> torch.Tensor:
        """KL(q(x_t | x_0), N(0, I)) in nats per image, summed over dims, (B,): what the chain's start still knows of the image.

        Args:
            x_0: images in [-1, 1], (B, ...).
            t: the path's first timestep; None takes that of `scheduler.timesteps`.
        """
        _check_images(x_0=x_0)
        t = self._timestep(next(iter(self._path)) if t is None else t)
        log_t = self._table("log_alpha_bar", self._log_alpha_bar, t.device, torch.float64)[t]
        log_t = _like(log_t, x_0, torch.float64).flatten()
        alpha_bar = log_t.exp()
        dims = x_0[0].numel()
        squares = x_0.flatten(1).pow(2).sum(1, dtype=torch.float64)
        # log(1 - alpha_bar), from whichever of its two forms keeps its digits
        log_noise = torch.where(alpha_bar < 0.5, torch.log1p(-alpha_bar), torch.log(-torch.expm1(log_t)))
        return 0.5 * (alpha_bar * squares - dims * (alpha_bar + log_noise))

    def vlb_terms(
        self,
        model_output: torch.Tensor,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        t: Timesteps,
        s: Timesteps,
        clip: bool | None = None,
    ) -> torch.Tensor:
        """One term of the bound for each image: nats, summed over dims, (B,) (the notes' figures 6-8 and 12).

        s >= 0: KL(q(x_s | x_t, x_0), p(x_s | x_t)). s = -1: the decoder, -log p(x_0 | x_t), the exact mass of each 8-bit pixel's bin.

        Args:
            model_output: the network's output at (x_t, t).
            x_0: the images, 8-bit levels k / 127.5 - 1 where s = -1.
            x_t: a sample of q(x_t | x_0), same shape.
            t, s: the pair, int or (B,), s < t.
            clip: as in `predict_original_sample`.

        Returns:
            float64 (B,); differentiable in model_output.

        Raises:
            ValueError: shapes or timesteps that do not fit; an eta other than None and 1 (the bound belongs to Algorithm 2).
        """
        if self.eta not in (None, 1):
            raise ValueError(
                f"eta is {self.eta}; allowed in the bound: None or 1 (a DDIM path has another one; take from_config(config, eta=None))"
            )
        _check_images(x_0=x_0, x_t=x_t)
        output, v = self._split_output(model_output, x_t)
        t, s = self._timestep_pair(t, s)
        pair = self._pair(t, s)
        x_0_hat = self._original_sample(output, x_t, pair, clip)
        log_pv = self._log_pv(t, s, pair)
        excess = _like(self._excess(t, s, pair, v, log_pv), x_t, torch.float64)  # log variance of p minus log pv
        log_pv = _like(log_pv, x_t, torch.float64)
        dims = x_0[0].numel()

        def total(per_pixel: torch.Tensor) -> torch.Tensor:
            """Sum over dims of what may be given once for all of them."""
            return per_pixel.flatten(1).mean(1, dtype=torch.float64) * dims

        # KL of two Gaussians: (log v_p/v_q + v_q/v_p - 1 + |difference of means|^2 / v_p) / 2, the means c_0 x_0 and c_0 x0_hat apart
        c_0 = _like(pair.alpha_bar_s.sqrt() * pair.b / pair.one_minus_alpha_bar_t, x_t, torch.float64)
        weight = (c_0**2 * torch.exp(-log_pv - excess)).to(x_0_hat.dtype)
        kl = 0.5 * (total(excess + torch.expm1(-excess)) + total(weight * (x_0 - x_0_hat) ** 2))
        last = s < 0
        if s.device.type == "cpu":  # reading s costs a stop elsewhere: both of all images there
            if not bool(last.any()):
                return kl
            if not bool(last.all()):
                images = last.nonzero().flatten().to(kl.device)
                log_variance = (log_pv + excess)[images]
                log_mass = discretized_gaussian_log_likelihood(x_0[images], x_0_hat[images], log_variance)
                return kl.index_put((images,), -log_mass.flatten(1).sum(1).to(kl.dtype))
        decoder = -discretized_gaussian_log_likelihood(x_0, x_0_hat, log_pv + excess).flatten(1).sum(1)
        return torch.where(last.to(kl.device), decoder, kl)


# ---------------------------------------------------------------------------------------------------- functions


def make_betas(T: int, beta_start: float, beta_end: float, schedule: str, trained_betas: Any = None) -> np.ndarray:
    """The T betas of a named schedule (or your own, checked), float64.

    Raises:
        ValueError: a beta outside (0, 1) (the last may be 1), a wrong number of them, an unknown schedule.
    """
    if trained_betas is not None:
        betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.shape != (T,):
            raise ValueError(
                f"trained_betas has shape {betas.shape}; allowed: ({T},), one beta a timestep (num_train_timesteps)"
            )
    elif schedule == "linear":
        betas = np.linspace(beta_start, beta_end, T)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    elif schedule == "sigmoid":
        betas = (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T))) + beta_start
    elif schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17: alpha_bar(u) / alpha_bar(0)
        alpha_bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    elif schedule == "laplace":  # arXiv 2407.03297, table 1 (mu = 0, b = 0.5): alpha_bar = snr / (1 + snr)
        u = np.arange(1, T + 1) / T
        log_snr = -0.5 * np.sign(0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
        alpha_bar = np.append(1.0, 1 / (1 + np.exp(-log_snr)))
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise ValueError(f"beta_schedule is {schedule!r}; allowed: {', '.join(BETA_SCHEDULES)}")
    bad = ~((betas > 0) & (betas < 1))
    bad[-1] &= betas[-1] != 1
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        source = (
            "trained_betas"
            if trained_betas is not None
            else f"beta_start {beta_start}, beta_end {beta_end}: schedule {schedule!r}"
        )
        raise ValueError(
            f"{source} has beta {betas[where]} at timestep {where}; allowed: above 0 and below 1 (the last one may be 1)"
        )
    return betas


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose sqrt(alpha_bar) is shifted and scaled to end at exactly 0 and start as before (arXiv 2305.08891, algorithm 1)."""
    signal = np.exp(0.5 * np.cumsum(np.log1p(-betas[:-1] if betas[-1] == 1 else -betas)))
    signal = np.append(signal, 0.0) if betas[-1] == 1 else signal
    if len(signal) == 1:
        raise ValueError("rescale_betas_zero_snr is True with num_train_timesteps 1; allowed: at least 2 timesteps")
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    return np.append(betas[0], 1 - alpha_bar[1:] / alpha_bar[:-1])


def discretized_gaussian_log_likelihood(
    x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """log of the mass that N(mean, variance) puts on each 8-bit pixel's bin (Ho et al. 2020, eq. 13), by the exact normal CDF.

    The bin of level k is x_0 +- 1/255 around x_0 = k / 127.5 - 1; the outermost two reach to infinity, so that the 256 masses sum to 1.

    Args:
        x_0: levels in [-1, 1]; mean, log_variance: broadcast against it.

    Returns:
        nats, elementwise, in float64 (float32 where the device has none); finite and differentiable.
    """
    dtype = torch.float32 if x_0.device.type == "mps" else torch.float64
    x_0, mean, log_variance = x_0.to(dtype), mean.to(dtype), log_variance.to(dtype)
    inverse_std = torch.exp(-0.5 * log_variance)
    lower = (x_0 - mean - HALF_PIXEL) * inverse_std
    upper = (x_0 - mean + HALF_PIXEL) * inverse_std
    # 40 standard deviations beyond the other edge is infinity (mass below 1e-347), with gradients that stay finite
    far = torch.maximum(lower.abs(), upper.abs()) + 40
    lower = torch.where(x_0 < -1 + HALF_PIXEL, -far, lower)
    upper = torch.where(x_0 > 1 - HALF_PIXEL, far, upper)
    # the CDF is accurate in its lower tail: reflect bins that lie above the mean
    above = lower + upper > 0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


def _like(values: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One value an image (B,), or one for all (1,), shaped to broadcast against x of shape (B, ...)."""
    if values.ndim != 1:
        return values.to(device=x.device, dtype=dtype)
    if values.numel() not in (1, x.shape[0]):
        raise ValueError(f"{values.numel()} timesteps for {x.shape[0]} images; allowed: one, or one an image")
    return values.to(x.device, dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def _noise_like(
    x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None, std: float = 1.0
) -> torch.Tensor:
    """Gaussian numbers: `torch.randn` times std, in one pass where one generator of x's device draws them."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device == x.device):
        return torch.empty_like(x, memory_format=torch.contiguous_format).normal_(0.0, std, generator=generator)
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype).mul_(std)


def _check_images(**images: torch.Tensor) -> torch.dtype:
    """The images are floating point, of one shape; returns the type to compute in, float32 at least."""
    dtype = torch.float32
    first_name, first = next(iter(images.items()))
    for name, x in images.items():
        if not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype}; allowed: floating point (8-bit images are k / 127.5 - 1, in [-1, 1])"
            )
        if x.ndim == 0 or x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {first_name} {tuple(first.shape)}; allowed: the same shape (B, ...)"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def _check_eta(eta: float | None) -> float | None:
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; allowed: None (Algorithm 2), or a number from 0 (DDIM) to 1")
    return eta


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and float(value).is_integer()


def _outside(values: Any, T: int, lowest: int = 0) -> str:
    return _shorten([v for v in values if not _is_whole(v) or not lowest <= v < T])


def _shorten(values: list) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


"""The loops over a network: Algorithm 2 of DDPM, which makes images from noise, and the bound, which says how likely given images are.

Sampling: x_T ~ N(0, I); for each (t, s) of the scheduler's path: x_s ~ p(x_s | x_t); the last mean is the image. The sample stays in
float32 whatever the network's type: only the network's input is cast.

Likelihood, for images of 8 bits a pixel (the notes' figures 6-8):

    -log2 P(x_0) <= prior + sum over (t, s), s >= 0, of E KL(q(x_s | x_t, x_0), p(x_s | x_t)) + decoder       E over x_t ~ q(x_t | x_0)

The sum has as many terms as the path has steps, each an expectation that needs the network. A random few of them, each divided by its
probability, have the same mean: unbiased, at a fraction of the cost.
"""

import hashlib
import inspect
import json
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm


# Share of an image's terms that is drawn whatever the pilot images said.
DEFENSIVE_SHARE = 0.3
PILOT_IMAGES = 16


@dataclass
class BitsPerDimOutput(BaseOutput):
    """An upper bound of -log2 P(x_0) / dims over a set of images, and its parts. All in bits/dim.

    Attributes:
        total: mean over the images of prior + diffusion + decoder.
        standard_error: of the total, over the images (nan for a single one): their own spread and the Monte Carlo noise together.
        prior, diffusion, decoder: the parts of the total; `standard_errors` has theirs by name.
        per_timestep: (T,) float64, mean term of each timestep, the decoder's at the path's last; zeros off the path. Sums to diffusion +
            decoder. Unless every term was evaluated, each entry is unbiased but noisy: look at sums over ranges.
        per_image: (N,) float64, total of each image. parts_per_image: (N, 3): prior, diffusion, decoder.
        dims: C*H*W, what the bits are divided by.
        network_evaluations: images that the network was evaluated on, in all.
    """

    total: float
    standard_error: float
    prior: float
    diffusion: float
    decoder: float
    standard_errors: dict[str, float]
    per_timestep: torch.Tensor
    per_image: torch.Tensor
    parts_per_image: torch.Tensor
    dims: int
    network_evaluations: int

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, steps {self.diffusion:.4f}, decoder {self.decoder:.4f}"
        return (
            f"{self.total:.4f} ± {self.standard_error:.4f} bits/dim ({parts}) over {len(self.per_image)} image(s) of "
            f"{self.dims} dims; {self.network_evaluations} network evaluations"
        )

    @classmethod
    def from_parts(
        cls, parts: torch.Tensor, per_timestep: torch.Tensor, dims: int, network_evaluations: int
    ) -> "BitsPerDimOutput":
        """From (N, 3) parts of each image and the sum over images of the terms at each timestep (T,)."""
        n = len(parts)
        names = ("prior", "diffusion", "decoder")
        errors = (parts.std(0) if n > 1 else torch.full((3,), math.nan)) / math.sqrt(n)
        per_image = parts.sum(1)
        return cls(
            total=float(per_image.mean()),
            standard_error=float(per_image.std()) / math.sqrt(n) if n > 1 else math.nan,
            **dict(zip(names, parts.mean(0).tolist(), strict=True)),
            standard_errors=dict(zip(names, errors.tolist(), strict=True)),
            per_timestep=per_timestep / n,
            per_image=per_image,
            parts_per_image=parts,
            dims=dims,
            network_evaluations=network_evaluations,
        )


def _is_ours(scheduler: Any) -> bool:
    """Told by what it can do: a second folder's pipeline.py runs in the first one's module and replaces the class there."""
    return hasattr(scheduler, "vlb_terms")


class DDPMNotesPipeline(DiffusionPipeline):
    """A DDPM: a UNet and the scheduler that is its math.

    Args:
        unet (`UNet2DModel`): predicts eps, x_0 or v, as the scheduler's `prediction_type` says. Channels out: those in, or twice as many
            for a learned variance. With class embeddings, the last may be the "no label" embedding (`null_label` below).
        scheduler: a `DDPMNotesScheduler`; a stock `DDPMScheduler` is taken over into one, so that any DDPM checkpoint loads; every other
            diffusers scheduler (DDIM, DPM-Solver++, UniPC...) samples as it is.

    `save_pretrained` writes a folder that loads three ways: with this package; with any diffusers as a plain `DDPMPipeline`; and, with
    `custom_pipeline=folder, trust_remote_code=True`, as this class from the pipeline.py inside it.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    # Kept by the class: the file of a pipeline loaded from a folder may be replaced while this class lives on.
    _own_source = Path(__file__).read_text(encoding="utf-8")

    def __init__(self, unet: UNet2DModel | torch.nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMNotesScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

    @property
    def null_label(self) -> int | None:
        """The class label that means "no label" (its embedding is after the last class's), recorded in the UNet's config; or None."""
        return (self.unet.config.get(PRIVATE_ENTRY) or {}).get("null_label")

    @property
    def num_classes(self) -> int | None:
        """How many class labels there are, the null label not counted; None for an unconditional model."""
        embeddings = self.unet.config.get("num_class_embeds")
        return embeddings if embeddings is None or self.null_label is None else self.null_label

    # ------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make images: Algorithm 2 (Ho et al. 2020), or the loop of the scheduler in its place.

        Args:
            batch_size: how many images.
            class_labels: one label for all, or one an image, for a class-conditional UNet; None means the null label there.
            guidance_scale: w in null + w (conditional - null) (classifier-free guidance, arXiv 2207.12598). 1 is off; another value
                needs `class_labels` and a model that was trained with a null label, and evaluates the network twice a step.
            num_inference_steps: length of the path; None: every timestep for DDPM, 50 for another scheduler.
            timesteps: or the path itself, strictly falling.
            eta: None for the scheduler's own way (Algorithm 2); DDIM's eta in [0, 1], for schedulers that have one.
            generator: one for the batch, or a list of one an image: then the image of a seed does not depend on the batch it is in.
            latents: x_T, standard normal, (batch_size, C, H, W), instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (the sample in [-1, 1], unclamped).
            return_dict: an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": x_s}) after each step; may return new ones.
                Setting `pipeline._interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which tensors it gets: ["latents"].

        Raises:
            ValueError: labels, guidance, timesteps, eta, generators or latents that do not fit the model; said before the loop starts.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; allowed: 'pil', 'np', 'pt', 'latent'")
        names = callback_on_step_end_tensor_inputs or ["latents"]
        if any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {names!r}; allowed: {self._callback_tensor_inputs}"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; allowed: a whole number of at least 1")
        device = self._execution_device
        labels = self._labels(class_labels, batch_size, device)
        guided = guidance_scale != 1
        if guided and (class_labels is None or self.null_label is None):
            raise ValueError(
                f"guidance_scale is {guidance_scale} with class_labels {class_labels!r} and null label {self.null_label!r}; "
                "allowed: 1, unless class_labels are given and the model was trained with a null label"
            )
        path, step_arguments = self._prepare_scheduler(num_inference_steps, timesteps, eta, generator, device)
        x_t = self._initial_noise(batch_size, generator, latents, device)

        dtype = self.unet.dtype  # diffusers looks through the whole network for it: not at every step
        # The scheduler gets each timestep on the CPU, where reading it stops nothing; the network gets it on its own device.
        self._interrupt = False
        with self.progress_bar(total=len(path)) as bar:
            for i, (t, t_network) in enumerate(zip(path, path.to(device))):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output = self._predict(model_input, t_network, dtype, labels, guidance_scale if guided else None)
                x_t = self.scheduler.step(model_output.to(x_t.dtype), t, x_t, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)
                bar.update()

        images: Any = x_t if output_type == "latent" else (x_t / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.float().permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        labels: torch.Tensor | None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """The network's output for x_t in `dtype`, the network's own type, guided if asked."""
        x = x.to(dtype)
        if guidance_scale is None or labels is None:
            return self._for_scheduler(self.unet(x, t, class_labels=labels, return_dict=False)[0], x)
        null = torch.full_like(labels, self.null_label or 0)
        both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null]), return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        C = x.shape[1]  # guidance moves the mean; a learned variance stays the conditional one
        guided = unconditional[:, :C] + guidance_scale * (conditional[:, :C] - unconditional[:, :C])
        return self._for_scheduler(torch.cat([guided, conditional[:, C:]], dim=1), x)

    def _for_scheduler(self, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Other schedulers know no learned variance: they get the mean's half."""
        return model_output if _is_ours(self.scheduler) else model_output[:, : x.shape[1]]

    def _labels(self, class_labels: Any, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """class_labels as an int64 tensor (B,) on the device, checked."""
        if getattr(self.unet, "class_embedding", None) is None:
            if class_labels is not None:
                raise ValueError(f"class_labels is {class_labels!r} and this model is unconditional; allowed: None")
            return None
        if class_labels is None:
            if self.null_label is None:
                raise ValueError(
                    f"class_labels is None and this model needs labels; allowed: 0 to {(self.num_classes or 1) - 1}, one an image"
                )
            class_labels = self.null_label
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or labels.numel() not in (1, batch_size):
            raise ValueError(
                f"class_labels is {class_labels!r}; allowed: one integer, or {batch_size} (batch_size) of them"
            )
        highest = self.unet.config.get("num_class_embeds")
        if highest is not None and not 0 <= int(labels.min()) <= int(labels.max()) < highest:
            raise ValueError(
                f"class_labels has {int(labels.min())} to {int(labels.max())}; allowed: 0 to {highest - 1}"
            )
        return labels.long().expand(batch_size).to(device)

    def _prepare_scheduler(
        self, n: int | None, timesteps: list[int] | None, eta: float | None, generator: Any, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Set the scheduler's path; returns it and what its `step` takes besides."""
        scheduler = self.scheduler
        ours = _is_ours(scheduler)
        if n is not None and timesteps is not None:
            raise ValueError(f"num_inference_steps is {n} and timesteps is given too; allowed: one of the two")
        if n is not None and n < 1:
            raise ValueError(f"num_inference_steps is {n}; allowed: a whole number of at least 1")
        path = (
            {"timesteps": timesteps}
            if timesteps is not None
            else {"num_inference_steps": n if n is not None else len(scheduler) if ours else 50}
        )
        step_parameters = inspect.signature(scheduler.step).parameters
        arguments = {"generator": generator} if "generator" in step_parameters else {}
        if ours:
            scheduler.set_timesteps(**path, eta=eta)
            return scheduler.timesteps, arguments
        if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"timesteps is given and {type(scheduler).__name__} takes none of its own; allowed: num_inference_steps"
            )
        if eta is not None:
            if "eta" not in step_parameters:
                raise ValueError(f"eta is {eta} and {type(scheduler).__name__} has none; allowed: None")
            arguments["eta"] = eta
        scheduler.set_timesteps(**path, device=device)
        return scheduler.timesteps, arguments

    def _initial_noise(
        self, batch_size: int, generator: Any, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """x_T, in float32 at least, at the scheduler's scale."""
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}; allowed: {batch_size} (batch_size) generators, or a single one"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; allowed: {shape}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    # ------------------------------------------------------------------------------------------------ likelihood

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        class_labels: Any = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        evaluations_per_image: int = 38,
        full: bool = False,
        clip: bool | None = None,
        batch_size: int = 128,
        seed: int = 0,
        first_image: int = 0,
        pilot_images: Any = None,
        guidance_scale: float = 1.0,
    ) -> BitsPerDimOutput:
        """How many bits a dimension the model needs at most to encode images: the bound on -log2 P(x_0) / dims, term by term.

        Each image gets its own noise, from (seed, its number): the batch it is in does not matter, and calls with one seed compare
        models on the same noise. Without `full`, the decoder's term and `evaluations_per_image - 1` others are evaluated for each image,
        one in each of as many ranges of timesteps that contribute alike, found from a few pilot images first.

        Args:
            images: 8-bit images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or (N, C, H, W), PIL image(s), floats
                k / 127.5 - 1 (k = 0..255), or an iterable of batches of these (or of dicts with "pixel_values" and maybe
                "class_labels"), which is read once and never held whole.
            class_labels: for a class-conditional model: one for all, or one an image; None takes the batches' own, else the null label.
            num_inference_steps, timesteps: the path; a sampler of K steps has its own bound. None: every timestep.
            evaluations_per_image: network evaluations for each image. A path of no more steps is summed in full.
            full: evaluate every term of the path.
            clip: clip x0_hat; None as the scheduler's config says (improved-diffusion: in evaluation, not in training).
            batch_size: how many noisy images go through the network at once.
            seed: of all noise. first_image: number of the first image, to split a set over processes.
            pilot_images: images to find the ranges with, where `images` is one part of a set. Default: the first of `images`.
            guidance_scale: must be 1. Guided sampling follows no normalised reverse process: it has no bound.

        Raises:
            ValueError: images off the 256-level grid, not finite, of another range or channels; none at all; a scheduler that is no DDPM
                (no posterior, no bound), an eta other than 1; guidance; labels that do not fit.
        """
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; allowed: 1 (guided sampling is no normalised reverse process: no bound)"
            )
        if not _is_ours(self.scheduler):
            raise ValueError(
                f"the scheduler is {type(self.scheduler).__name__}, whose steps are no posteriors; allowed: a DDPM, such as "
                "DDPMNotesScheduler.from_config(pipeline.scheduler.config)"
            )
        if evaluations_per_image < 2:
            raise ValueError(
                f"evaluations_per_image is {evaluations_per_image}; allowed: at least 2 (the decoder's term and another)"
            )
        scheduler = DDPMNotesScheduler.from_config(self.scheduler.config)  # its path is ours to choose
        if timesteps is not None or num_inference_steps is not None:
            scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
        path = scheduler.timesteps
        alpha_bar = float(scheduler.alphas_cumprod[path[0]])
        if alpha_bar > 1e-3:
            warnings.warn(
                f"alpha_bar at the path's first timestep {int(path[0])} is {alpha_bar:.3g}: the image shines through, samples start from "
                "the wrong distribution, and the prior's part of the bound is large",
                stacklevel=3,  # through torch.no_grad, to the caller
            )

        batches = self._image_batches(images, class_labels)
        first, dims = next(batches, None), 0
        if first is None:
            raise ValueError("images is empty; allowed: at least one image")
        terms = _BoundTerms(self, scheduler, clip, batch_size, seed)
        if full or len(path) <= evaluations_per_image:
            terms.take_all()
        else:
            pilot, labels = first if pilot_images is None else next(self._image_batches(pilot_images, class_labels))
            terms.choose_ranges(
                evaluations_per_image - 1, pilot[:PILOT_IMAGES], None if labels is None else labels[:PILOT_IMAGES]
            )
        parts, number = [], first_image
        total = len(images) if isinstance(images, (torch.Tensor, np.ndarray, list)) else None
        with tqdm(
            **{"desc": "bits/dim", "unit": "image", "total": total, **getattr(self, "_progress_bar_config", {})}
        ) as bar:
            for pixels, labels in self._chain(first, batches):
                dims = dims or pixels[0].numel()
                if pixels[0].numel() != dims:
                    raise ValueError(f"images has {pixels[0].numel()} dims after {dims}; allowed: images of one size")
                rows = max(1, batch_size // terms.per_image)
                for i in range(0, len(pixels), rows):
                    chunk = slice(i, i + rows)
                    parts.append(terms(pixels[chunk], None if labels is None else labels[chunk], number))
                    number += len(parts[-1])
                    bar.update(len(parts[-1]))
        self.maybe_free_model_hooks()
        return BitsPerDimOutput.from_parts(torch.cat(parts), terms.per_timestep, dims, terms.evaluations)

    @staticmethod
    def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
        yield first
        yield from rest

    def _image_batches(self, images: Any, class_labels: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(uint8 (B, C, H, W), labels (B,) or None) for whatever `images` is."""
        if isinstance(images, PIL.Image.Image):
            images = [images]
        whole = isinstance(images, (torch.Tensor, np.ndarray)) or (
            isinstance(images, (list, tuple)) and all(isinstance(image, PIL.Image.Image) for image in images)
        )
        if not whole and not isinstance(images, Iterable):
            raise ValueError(
                f"images is {type(images).__name__}; allowed: 8-bit images as tensors, arrays, PIL images, or batches of them"
            )
        start = 0
        for batch in [images] if whole else images:
            pixels, labels = (
                (batch["pixel_values"], batch.get("class_labels")) if isinstance(batch, dict) else (batch, None)
            )
            pixels = as_pixels(pixels, self.unet.config.in_channels)
            if class_labels is not None:
                given = torch.as_tensor(class_labels).reshape(-1)
                labels = given if given.numel() == 1 else given[start : start + len(pixels)]
            if not len(pixels):
                continue
            device = torch.device("cpu")  # checked here, moved with the noisy images
            yield pixels, self._labels(labels, len(pixels), device)
            start += len(pixels)

    # ------------------------------------------------------------------------------------------------ saving

    def to_json_string(self) -> str:
        """model_index.json: written under the stock names, so that diffusers loads the folder without this code."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = "DDPMPipeline"
        index.pop("_name_or_path", None)  # where it was loaded from: often a path of the owner's machine
        if _is_ours(self.scheduler):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """model_index.json and, beside it, this class as the one file pipeline.py."""
        super().save_config(save_directory, **kwargs)
        for config in Path(save_directory).glob(
            "*/config.json"
        ):  # diffusers writes there, too, where it was loaded from
            values = json.loads(config.read_text(encoding="utf-8"))
            if values.pop("_name_or_path", None) is not None:
                config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (Path(save_directory) / "pipeline.py").write_text(pipeline_source(type(self)), encoding="utf-8")


class _BoundTerms:
    """Evaluates terms of the bound for batches of images, all of the path's or a random few, and adds them up by timestep."""

    def __init__(
        self, pipeline: DDPMNotesPipeline, scheduler: DDPMNotesScheduler, clip: bool | None, batch_size: int, seed: int
    ) -> None:
        self.pipeline, self.scheduler, self.clip, self.batch_size, self.seed = (
            pipeline,
            scheduler,
            clip,
            batch_size,
            seed,
        )
        self.t = scheduler.timesteps
        self.s = torch.cat([self.t[1:], torch.tensor([-1])])
        self.per_timestep = torch.zeros(len(scheduler), dtype=torch.float64)
        self.evaluations = 0
        self.take_all()

    def take_all(self) -> None:
        """Every term of the path once."""
        self.p: torch.Tensor | None = None
        self.per_image = len(self.t)

    def choose_ranges(self, n: int, pixels: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Draw n of the KL terms with p proportional to their root mean square over a pilot: the least noise for the number."""
        K = len(self.t) - 1
        x_0 = _in_model_range(pixels)
        # the pilot's timesteps: half of them even in t, half even in log SNR, where the terms of clean images are large
        log_alpha_bar = self.scheduler._log_alpha_bar
        log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        share = (log_snr[self.s[:-1]] - log_snr[self.t[:-1]]).nan_to_num(posinf=0.0)
        density = (0.5 / K + 0.5 * share / share.sum()).cumsum(0)
        grid = torch.searchsorted(density, (torch.arange(n) + 0.5) / n).clamp(max=K - 1).unique()
        pilot = [
            self._nats(
                x_0[i : i + 1], None if labels is None else labels[i : i + 1], grid, self._noise(-1 - i, len(grid), x_0)
            )
            for i in range(len(x_0))
        ]
        rms = torch.stack(pilot).pow(2).mean(0).sqrt().clamp(min=1e-12)
        p = torch.from_numpy(np.exp(np.interp(np.arange(K), grid.numpy(), rms.log().numpy())))
        # part of the draws follow no pilot, which may have missed rare large terms: no weight can explode
        even = torch.diff(density, prepend=torch.zeros(1, dtype=torch.float64))
        self.p = (1 - DEFENSIVE_SHARE) * p / p.sum() + DEFENSIVE_SHARE * even
        self.per_image = n + 1

    def _generator(self, number: int) -> torch.Generator:
        """The random numbers of image `number`; the pilot's are negative."""
        seed = np.random.SeedSequence([self.seed, number >= 0, abs(number)]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def _noise(self, number: int, n: int, x_0: torch.Tensor) -> torch.Tensor:
        return torch.randn((n, *x_0.shape[1:]), generator=self._generator(number))

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor | None, first: int) -> torch.Tensor:
        """Prior, diffusion and decoder of each image, (B, 3) bits/dim; images are numbered from `first`."""
        x_0 = _in_model_range(pixels)
        B, M, K = len(x_0), self.per_image, len(self.t)
        index, weight, noise = [], [], []
        for number in range(first, first + B):
            generator = self._generator(number)
            if self.p is None:
                index.append(torch.arange(K))
                weight.append(torch.ones(K, dtype=torch.float64))
            else:  # one term in each of M - 1 equal parts of the cumulative distribution, and the decoder
                u = (torch.arange(M - 1) + torch.rand(M - 1, generator=generator, dtype=torch.float64)) / (M - 1)
                drawn = torch.searchsorted(self.p.cumsum(0), u, right=True).clamp(max=K - 2)
                index.append(torch.cat([drawn, torch.tensor([K - 1])]))
                weight.append(torch.cat([1 / ((M - 1) * self.p[drawn]), torch.ones(1, dtype=torch.float64)]))
            noise.append(torch.randn((M, *x_0.shape[1:]), generator=generator))
        indices = torch.cat(index)
        repeated = None if labels is None else labels.repeat_interleave(M)
        nats = self._nats(x_0.repeat_interleave(M, 0), repeated, indices, torch.cat(noise))
        unit = 1 / (x_0[0].numel() * math.log(2))
        bits = nats * torch.cat(weight) * unit
        self.per_timestep.index_add_(0, self.t[indices], bits)
        bits = bits.reshape(B, M)
        prior = self.scheduler.prior_kl(x_0) * unit
        return torch.stack([prior, bits[:, :-1].sum(1), bits[:, -1]], dim=1)

    def _nats(
        self, x_0: torch.Tensor, labels: torch.Tensor | None, index: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The path's terms number `index` (R,), one a row of noise; x_0 has as many rows, or a single one for all."""
        pipeline = self.pipeline
        device, network_dtype = pipeline._execution_device, pipeline.unet.dtype
        dtype = torch.promote_types(network_dtype, torch.float32)
        nats = []
        for i in range(0, len(index), self.batch_size):
            rows = slice(i, i + self.batch_size)
            eps = noise[rows].to(device, dtype)
            x = (x_0 if len(x_0) == 1 else x_0[rows]).to(device, dtype).expand_as(eps)
            t, s = self.t[index[rows]], self.s[index[rows]]
            x_t = self.scheduler.add_noise(x, eps, t)
            own = None if labels is None else (labels if len(labels) == 1 else labels[rows]).expand(len(eps)).to(device)
            output = pipeline._predict(x_t, t.to(device), network_dtype, own)
            nats.append(self.scheduler.vlb_terms(output.to(dtype), x, x_t, t, s, self.clip).cpu())
        self.evaluations += len(index)
        return torch.cat(nats).double()


def as_pixels(images: Any, channels: int) -> torch.Tensor:
    """8-bit images of any kind as uint8 (N, C, H, W).

    Raises:
        ValueError: what is not 8-bit images of so many channels; the message says what was seen.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            return torch.empty((0, channels, 1, 1), dtype=torch.uint8)
        arrays = [np.asarray(image) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise ValueError(f"images has sizes {sorted({array.shape[:2] for array in arrays})}; allowed: one size")
        images = np.stack([array[..., None] if array.ndim == 2 else array for array in arrays])
    if isinstance(images, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(images))
        if x.ndim == 4 and x.shape[-1] == channels and x.shape[1] != channels:
            x = x.permute(0, 3, 1, 2)
    else:
        x = images
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != channels:
        seen = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"images has {seen}; allowed: (N, {channels}, H, W), the model has {channels} channel(s)")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(f"images has dtype {x.dtype}; allowed: uint8, or floats k / 127.5 - 1 with k = 0..255")
    levels = (x.double() + 1) * 127.5
    off = (levels - levels.round()).abs().max() if x.numel() else 0.0
    lowest, highest = (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("images has values that are not finite; allowed: floats k / 127.5 - 1 with k = 0..255")
    if lowest < -1.001 or highest > 1.001 or off > 0.02:
        raise ValueError(
            f"images has floats from {lowest:.4g} to {highest:.4g}, up to {float(off) / 127.5:.2g} away from the 256 levels k / 127.5 - 1; "
            "allowed: those levels (only 8-bit images have a number of bits), or uint8"
        )
    return levels.round().clamp(0, 255).to(torch.uint8)


def _in_model_range(pixels: torch.Tensor) -> torch.Tensor:
    return (2 * pixels.float() - 255) / 255


def pipeline_source(pipeline_class: type = DDPMNotesPipeline) -> str:
    """The text of the Hub's pipeline.py: this module with the scheduler's joined in front, so that the folder needs no other file.

    The first line names the package's version and the digest of the lines below it. A class that was itself loaded from such a file
    gives that file back, unchanged.
    """
    own: str = pipeline_class._own_source  # type: ignore[attr-defined]
    if DDPMNotesScheduler.__module__ == pipeline_class.__module__:
        return own
    scheduler = Path(sys.modules[DDPMNotesScheduler.__module__].__file__ or "").read_text(encoding="utf-8")
    joined = (
        scheduler + "\n\n" + "".join(line for line in own.splitlines(keepends=True) if not line.startswith("from ."))
    )
    version = sys.modules[__name__.rpartition(".")[0]].__version__  # type: ignore[attr-defined]
    return f"# ddpm_notes_pipeline {version}, sha256 of the lines below {hashlib.sha256(joined.encode()).hexdigest()}\n{joined}"


if DDPMNotesScheduler.__module__ == __name__ and not __name__.startswith("ddpm_notes_pipeline_"):
    # This is the joined file. diffusers runs the pipeline.py of every local folder as one and the same module, each over the names of the
    # last: functions of one version would find constants of another. So what the file defines lives in a module named by its digest.
    _name = "ddpm_notes_pipeline_" + hashlib.sha256(DDPMNotesPipeline._own_source.encode()).hexdigest()[:16]
    if _name not in sys.modules:
        _own = sys.modules[_name] = types.ModuleType(_name, __doc__)
        _own.__file__ = __file__
        exec(compile(DDPMNotesPipeline._own_source, __file__, "exec"), vars(_own))
    globals().update({name: value for name, value in vars(sys.modules[_name]).items() if not name.startswith("__")})
