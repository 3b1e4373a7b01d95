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

import inspect
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
# without a word, and `variance_type` holds the type that they can fall back to: the learned one
# where the network outputs a variance.
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

    def _keep_private_settings(self, fallback: str = STOCK_FALLBACK) -> None:
        """Move what stock classes do not know into the private config entry.

        `fallback` is their variance type in the place of "optimal".
        """
        config = {name: value for name, value in self.config.items() if name not in PRIVATE_SETTINGS}
        ours = {name: getattr(self, name) for name in PRIVATE_SETTINGS if getattr(self, name) is not None}
        if self.variance_type == "optimal":
            ours["variance_type"], config["variance_type"] = "optimal", fallback
            if fallback != STOCK_FALLBACK:
                ours["stock_variance_type"] = fallback
        if ours:
            config[PRIVATE_ENTRY] = ours
        defaults = [name for name in config.pop("_use_default_values", []) if name not in PRIVATE_SETTINGS]
        if defaults:  # the entry that a stock scheduler has, of the settings that it knows
            config["_use_default_values"] = defaults
        self._internal_dict = FrozenDict(config)

    def register_to_config(self, **kwargs: Any) -> None:
        """As diffusers', under the stock class's name: by it `from_config` knows what to pass over without a warning."""
        if "_use_default_values" in kwargs:
            # diffusers lists arguments given by position here, too; `from_config` would lose them
            parameters = inspect.signature(type(self).__init__).parameters
            names = [n for n in kwargs["_use_default_values"] if kwargs[n] is parameters[n].default]
            kwargs |= {"_use_default_values": names}
        super().register_to_config(**{**kwargs, **({"_class_name": STOCK_CLASS} if "_class_name" in kwargs else {})})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Like diffusers' `from_config`: from this class's config or any compatible scheduler's, changed by `kwargs`."""
        fallback = config.get("variance_type") if isinstance(config, dict) else None
        if isinstance(config, dict) and PRIVATE_ENTRY in config:
            config = dict(config)
            ours = dict(config.pop(PRIVATE_ENTRY))
            if fallback != ours.pop("stock_variance_type", STOCK_FALLBACK):  # somebody chose another one since
                ours.pop("variance_type", None)
            config.update(ours)
            config["_use_default_values"] = [name for name in config.get("_use_default_values", []) if name not in ours]
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        if fallback in LEARNED_VARIANCES:  # stock classes must know to split the network's output
            scheduler._keep_private_settings(fallback)
        return made

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
        self._positions = {t: i for i, t in enumerate(path)}

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

    def previous_timestep(self, timestep: Timesteps) -> Timesteps:
        """The s that follows t on the path, -1 (the data) after its last.

        Returns:
            As the stock scheduler: before `set_timesteps` t - 1, of t's own type; afterwards a 0-d
            int64 tensor.

        Raises:
            ValueError: t is not on the path.
        """
        position = self._positions.get(t := self._path_index(timestep))
        if position is None:
            raise ValueError(
                f"timestep is {t}; it must be on the path: {_shorten(list(self._path))} (see set_timesteps)"
            )
        if self.num_inference_steps is None:
            return timestep - 1
        return torch.tensor(-1) if position == len(self._path) - 1 else self.timesteps[position + 1]

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
        least, largest = map(int, index.aminmax() if index.is_cpu and index.numel() else (lowest, lowest))
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
        if isinstance(timestep, torch.Tensor) and timestep.is_cpu and timestep.numel() == 1:
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
        dims = x_0[0].numel()

        def total(per_pixel: torch.Tensor) -> torch.Tensor:
            """Sum over dims of what may be given once for all of them."""
            return per_pixel.flatten(1).mean(1, dtype=torch.float64) * dims

        # KL of two Gaussians: (log v_p/v_q + v_q/v_p - 1 + |difference of means|^2 / v_p) / 2, the means c_0 x_0 and c_0 x0_hat apart.
        # c_0^2 / pv is what the step gains in signal-to-noise ratio, SNR(s) - SNR(t) (arXiv 2107.00630, eq. 13); infinite at the data
        last = s < 0
        gain = pair.alpha_bar_s * pair.b / (pair.one_minus_alpha_bar_t * pair.one_minus_alpha_bar_s)
        weight = _like(gain.masked_fill_(last, 0), x_t, torch.float64) * torch.exp(-excess)
        kl = 0.5 * (total(excess + torch.expm1(-excess)) + total(weight.to(x_0_hat.dtype) * (x_0 - x_0_hat) ** 2))
        if s.is_cpu and not bool(last.any()):  # reading s costs a stop elsewhere: both of all images there
            return kl
        log_variance = _like(log_pv, x_t, torch.float64) + excess
        if s.is_cpu and not bool(last.all()):
            images = last.nonzero().flatten().to(kl.device)
            log_mass = discretized_gaussian_log_likelihood(x_0[images], x_0_hat[images], log_variance[images])
            return kl.index_put((images,), -log_mass.flatten(1).sum(1).to(kl.dtype))
        decoder = -discretized_gaussian_log_likelihood(x_0, x_0_hat, log_variance).flatten(1).sum(1)
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
