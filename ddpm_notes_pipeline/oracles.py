"""Exact denoisers: networks that need no training, because the best possible answer is a formula.

A DDPM network is trained to return E[x_0 | x_t], the mean of all images that the noisy x_t may have
come from (the least-squares answer; a network that predicts eps or v says the same in other terms).
For two kinds of data the notes' forward process

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)

gives that mean in closed form, and with it the only number about the network that the likelihood
bound needs,

    V_t = E||x_0 - E[x_0 | x_t]||^2 / dims.

`GaussianDenoiser` is for Gaussian pixels, `CoinDenoiser` for pixels that are -1 or 1 with equal
probability. Both take the place of a `UNet2DModel`: they are called, saved, loaded and put into a
pipeline alike. So samplers and bounds can be tested against the truth. The coin's entropy is
exactly 1 bit/dim, and what a bound reports above 1 is its own fault. Gaussian data stays Gaussian
under every sampler here, and its sample variance has a closed form.

    >>> scheduler = DDPMScheduler()
    >>> unet = CoinDenoiser.from_scheduler(scheduler, sample_size=8)
    >>> DDPMPipeline(unet, scheduler)(batch_size=4, output_type="np").images  # zeros and ones
"""

import math
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor

from .names import PREDICTION_TYPES


class ExactDenoiser(ModelMixin, ConfigMixin):
    """What the denoisers share: alpha_bar, the three prediction types, a `UNet2DModel`'s interface.

    A subclass supplies `original_sample`, `denoising_error` and `images`.

    Args:
        alphas_cumprod: alpha_bar_t for t = 0..T-1, each in [0, 1); `from_scheduler` takes a
            scheduler's.
        prediction_type: what `forward` returns: "epsilon", "sample" (x_0) or "v_prediction".
        sample_size: height and width of an image, one int for square ones. Only `images` and
            pipelines use it.
        channels: channels of an image.

    Raises:
        ValueError: an argument out of its range.
    """

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list[float],
        prediction_type: str = "epsilon",
        sample_size: int | tuple[int, int] = 32,
        channels: int = 1,
    ) -> None:
        super().__init__()
        for t, alpha_bar in enumerate(alphas_cumprod):
            if not 0 <= alpha_bar < 1:
                raise ValueError(f"alphas_cumprod has {alpha_bar} at t = {t}; it must be in [0, 1)")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; it must be one of {', '.join(PREDICTION_TYPES)}")
        # nothing is learned, but a module without any parameter has no dtype, no device, no weights
        self.nothing = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def config(self) -> Any:
        """The constructor's arguments, and `in_channels` and `out_channels` for pipelines."""
        arguments = super().config
        channels = arguments["channels"]
        return FrozenDict({**arguments, "in_channels": channels, "out_channels": channels})

    @classmethod
    def from_scheduler(cls, scheduler: Any, **options: Any) -> Self:
        """The denoiser for a scheduler's alpha_bar and prediction type.

        The scheduler of this package has a `chain` in float64. Any other one has only its betas,
        which diffusers rounds to float32: 1 - alpha_bar is then good to 6 digits.

        Args:
            scheduler: any DDPM scheduler. options: for the constructor.
        """
        if hasattr(scheduler, "chain"):
            log_alpha_bar = scheduler.chain.log_alpha_bar[:-1]
        else:
            log_alpha_bar = torch.log1p(-scheduler.betas.double()).cumsum(0)
        options.setdefault("prediction_type", scheduler.config.prediction_type)
        return cls(alphas_cumprod=log_alpha_bar.exp().tolist(), **options)

    def original_sample(self, x_t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t], elementwise."""
        raise NotImplementedError

    def denoising_error(self, t: int | torch.Tensor) -> torch.Tensor:
        """V_t = E||x_0 - E[x_0 | x_t]||^2 / dims, float64, for `original_sample_mse`."""
        raise NotImplementedError

    def images(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """n images x_0 of the denoiser's data, float32, (n, channels, height, width)."""
        raise NotImplementedError

    def alpha_bar(self, t: float | torch.Tensor) -> torch.Tensor:
        """alpha_bar_t in float64, of t's shape; ValueError where t is not an integer in 0..T-1."""
        steps = torch.as_tensor(t, device=self.device)
        table = torch.tensor(self.config.alphas_cumprod, dtype=torch.float64, device=self.device)
        index = steps.long()
        if ((index != steps) | (index < 0) | (index >= len(table))).any():
            raise ValueError(f"timestep is {t}; it must be an integer from 0 to {len(table) - 1}")
        return table[index]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The answer of a perfectly trained network to x_t at `timestep`.

        Args:
            sample: x_t, (B, ...).
            timestep: a number, a 0-d tensor, or a (B,) tensor with one timestep for each image.
            class_labels: ignored: the data is the same whatever the label.
            return_dict: False returns a tuple, as diffusers' models do.

        Returns:
            `UNet2DOutput` whose `sample` has the shape of x_t; computed in float64, returned in the
            dtype of x_t, float32 at least.
        """
        x_t = sample.double()
        alpha_bar = self.alpha_bar(timestep).to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
        x_0 = self.original_sample(x_t, alpha_bar)
        # the eps between this x_0 and this x_t: 1 - alpha_bar > 0 at both ends of the chain
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        answer = {"epsilon": eps, "sample": x_0, "v_prediction": v}[self.config.prediction_type]
        answer = answer.to(torch.promote_types(sample.dtype, torch.float32))
        return UNet2DOutput(sample=answer) if return_dict else (answer,)

    def _shape(self, n: int) -> tuple[int, ...]:
        size = self.config.sample_size
        return (n, self.config.channels, *((size, size) if isinstance(size, int) else size))


class GaussianDenoiser(ExactDenoiser):
    """For pixels that are independent draws of N(mean, variance).

    x_0 and x_t are jointly Gaussian, so E[x_0 | x_t] is linear in x_t,

        mean + gain (x_t - sqrt(alpha_bar) mean),
        gain = sqrt(alpha_bar) variance / (alpha_bar variance + 1 - alpha_bar)

    and its error, V_t = variance (1 - alpha_bar) / (alpha_bar variance + 1 - alpha_bar), does not
    depend on x_t (Bishop, Pattern Recognition and Machine Learning, eq. 2.116). A sampler with this
    denoiser and without clipping takes Gaussians to Gaussians. The data are not 8-bit: they have
    sample variances and KL terms, but no bits/dim.
    """

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list[float],
        mean: float = 0.0,
        variance: float = 0.25,
        prediction_type: str = "epsilon",
        sample_size: int | tuple[int, int] = 32,
        channels: int = 1,
    ) -> None:
        shared = {"prediction_type": prediction_type, "sample_size": sample_size, "channels": channels}
        super().__init__(alphas_cumprod=alphas_cumprod, **shared)
        if not 0 < variance < math.inf:
            raise ValueError(f"variance is {variance}; it must be a finite number above 0")

    def original_sample(self, x_t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t], as above."""
        mean, variance = self.config.mean, self.config.variance
        gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
        return mean + gain * (x_t - alpha_bar.sqrt() * mean)

    def denoising_error(self, t: int | torch.Tensor) -> torch.Tensor:
        """V_t as above, float64, of t's shape."""
        alpha_bar, variance = self.alpha_bar(t), self.config.variance
        return variance * (1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar)

    def images(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """n images of independent N(mean, variance) pixels, not confined to [-1, 1]."""
        noise = randn_tensor(self._shape(n), generator=generator, device=self.device)
        return self.config.mean + math.sqrt(self.config.variance) * noise


class CoinDenoiser(ExactDenoiser):
    """For pixels that are -1 or 1, independently, with probability 1/2 each.

    Bayes' rule on two points: the log odds of 1 against -1 are 2 sqrt(alpha_bar) x_t /
    (1 - alpha_bar), so

        E[x_0 | x_t] = tanh(sqrt(alpha_bar) x_t / (1 - alpha_bar)).

    -1 and 1 are the 8-bit levels 0 and 255, and no code can spend less than `entropy` on a pixel.
    """

    entropy: ClassVar[float] = 1.0  # bits/dim, exactly

    def original_sample(self, x_t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t] = tanh(sqrt(alpha_bar) x_t / (1 - alpha_bar)); 0 where alpha_bar = 0."""
        return torch.tanh(alpha_bar.sqrt() * x_t / (1 - alpha_bar))

    def denoising_error(self, t: int | torch.Tensor) -> torch.Tensor:
        """V_t = 1 - E[tanh^2], float64, of t's shape, to about 12 digits, as 1 - alpha_bar has.

        Given x_0 = 1 (and by symmetry -1) the argument of tanh is u ~ N(SNR, SNR), so
        V_t = E[sech(u)^2]. At a large SNR all of that is in a tail that plain quadrature misses;
        centring the Gaussian at 0 gives, as only the even part of exp(u) counts,

            V_t = exp(-SNR/2) E[sech(sqrt(SNR) z)],    z ~ N(0, 1),

        a smooth positive bump at 0, for which the trapezoid rule converges exponentially fast.
        """
        alpha_bar = self.alpha_bar(t)[..., None]
        snr = alpha_bar / (1 - alpha_bar)
        # Beyond 9 of z, or 40 of sqrt(SNR) z, nothing is left in float64.
        reach = torch.clamp(40 / snr.sqrt(), max=9.0)
        z = reach * torch.linspace(-1, 1, 801, dtype=torch.float64, device=self.device)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        bump = density / torch.cosh(snr.sqrt() * z)
        return torch.exp(-snr / 2).squeeze(-1) * torch.trapezoid(bump, z)

    def images(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """n images of fair coins: -1 or 1, the lowest and the highest 8-bit level."""
        device = generator.device if generator is not None else self.device
        heads = torch.randint(0, 2, self._shape(n), generator=generator, device=device)
        return (2.0 * heads - 1).to(self.device)
