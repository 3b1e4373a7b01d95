"""The likelihood bound of DDPM for images of 8 bits a pixel (the notes' figures 6-8).

    -log2 P(x_0) <= prior + steps + decoder,    expectations over x_t ~ q(x_t | x_0)

    prior    KL(q(x_T | x_0), N(0, I))
    steps    sum over the path's (t, s), s >= 0, of E KL(q(x_s | x_t, x_0), p(x_s | x_t))
    decoder  E -log P(x_0 | x_t) at the path's last t

Each term of the steps needs the network. A random few of them, each divided by its probability,
have the same mean: an unbiased estimate at a fraction of the cost.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from .image_batches import ImageBatch
from .levels import to_model_range
from .seeding import seeded_generator

DEFENSIVE_SHARE = 0.1  # share of an image's terms that is drawn whatever the pilot images said
PILOT_IMAGES, PILOT_STEPS = 16, 48

# x_t (R, C, H, W), t (R,), labels (R,) or None -> the network's output
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class BitsPerDimOutput(BaseOutput):
    """An upper bound of -log2 P(x_0) / dims over a set of images, and its parts, in bits/dim.

    Attributes:
        total: mean over the images of prior + diffusion + decoder.
        standard_error: of the total, over the images (nan for a single one): the images' own spread
            and the Monte Carlo noise together.
        prior, diffusion, decoder: the parts of the total; diffusion is the sum of the steps.
        standard_errors: those of the parts, by name.
        per_timestep: (T,) float64, mean term of each timestep, the decoder's at the path's last;
            zeros off the path. Sums to diffusion + decoder. Unless every term was evaluated, each
            entry is unbiased but noisy: look at sums over ranges.
        per_image: (N,) float64, total of each image.
        parts_per_image: (N, 3) float64: prior, diffusion, decoder.
        dims: C*H*W, what the bits are divided by.
        network_evaluations: images that the network was evaluated on, in all.
        maps: (N, C, H, W) float32, bits of each pixel, unbiased; an image's sum is its total times
            dims. None unless asked for.
        by_level: (T + 1, 3) float64, bits/dim of each timestep, and last of the prior, that are
            spent on pixels of the lowest level (0), of levels between, and of the highest (255).
            None unless asked for.
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
    maps: torch.Tensor | None = None
    by_level: torch.Tensor | None = None

    def __str__(self) -> str:
        parts = f"prior {self.prior:.4f}, steps {self.diffusion:.4f}, decoder {self.decoder:.4f}"
        return (
            f"{self.total:.4f} ± {self.standard_error:.4f} bits/dim ({parts}) over {len(self.per_image)} image(s) of "
            f"{self.dims} dims; {self.network_evaluations} network evaluations"
        )

    @classmethod
    def from_parts(
        cls,
        parts: torch.Tensor,
        per_timestep: torch.Tensor,
        dims: int,
        network_evaluations: int,
        maps: torch.Tensor | None = None,
        by_level: torch.Tensor | None = None,
    ) -> "BitsPerDimOutput":
        """From (N, 3) parts of each image, and sums over images of each timestep's term (T,)."""
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
            maps=maps,
            by_level=None if by_level is None else by_level / n,
        )


@dataclass
class AllTerms:
    """Every term of a path, once."""

    per_image: int

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (M,) into the path, the decoder's last, and the weights of their terms."""
        index = torch.arange(self.per_image, device=generator.device)
        return index, torch.ones_like(index, dtype=torch.float64)


@dataclass
class RandomTerms:
    """n of a path's K - 1 steps with the probabilities (K - 1,), and always the decoder."""

    n: int
    probabilities: torch.Tensor

    @property
    def per_image(self) -> int:
        return self.n + 1

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AllTerms.draw`: one step in each of n equal parts of the cumulative distribution."""
        p = self.probabilities
        u = torch.rand(self.n, generator=generator, dtype=torch.float64, device=generator.device)
        u = (torch.arange(self.n, device=u.device) + u) / self.n
        drawn = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        index = torch.cat([drawn, drawn.new_tensor([len(p)])])
        return index, torch.cat([1 / (self.n * p[drawn]), p.new_ones(1)])


@dataclass
class Bound:
    """Measures the bound of images, batch by batch, and adds up its terms by timestep.

    Each image gets noise of its own, from (seed, its number): how images are batched does not
    matter, and two models with one seed are compared on the same noise.

    Args:
        scheduler: a DDPM with its path set (`add_noise`, `prior_kl`, `vlb_terms`, `chain`).
        predict: the network.
        device, dtype: where and in what type noisy images are made.
        clip: whether x0_hat is clipped; None as the scheduler's config says.
        batch_size: noisy images through the network at once.
        seed: of all noise.
        keep_maps: keep the bits of each pixel.

    Attributes:
        terms: which terms are evaluated for each image; all of them until `draw_terms`.
        evaluations: images that the network was evaluated on so far.
        per_timestep: (T,) float64, sum over the images so far of each timestep's term, bits/dim.
        by_level: (T + 1, 3) float64, the same by class of level, and last of the prior's.
        maps: (C, H, W) bits of each pixel, for each image so far.
    """

    scheduler: Any
    predict: Predict
    device: torch.device
    dtype: torch.dtype
    clip: bool | None
    batch_size: int
    seed: int
    keep_maps: bool = False
    evaluations: int = 0
    terms: AllTerms | RandomTerms = field(init=False)

    def __post_init__(self) -> None:
        self.t = self.scheduler.timesteps
        self.s = torch.cat([self.t[1:], self.t.new_tensor([-1])])
        self.per_timestep = torch.zeros(len(self.scheduler), dtype=torch.float64, device="cpu")
        self.by_level = torch.zeros(len(self.scheduler) + 1, 3, dtype=torch.float64, device="cpu")
        self.maps: list[torch.Tensor] = []
        self.terms = AllTerms(len(self.t))

    def draw_terms(self, n: int, pilot: Iterable[ImageBatch]) -> None:
        """Evaluate n of the steps for each image, drawn as the pilot images suggest, not all."""
        density = even_density(self.scheduler.chain, self.t[:-1], self.s[:-1])
        even = (torch.arange(PILOT_STEPS, device=density.device) + 0.5) / PILOT_STEPS
        grid = torch.searchsorted(density.cumsum(0), even)
        grid = grid.clamp(max=len(density) - 1).unique()
        nats = []
        for i, (pixels, labels) in enumerate(pilot):
            generator = seeded_generator(self.seed, 0, 1 + i)
            noise = torch.randn((len(grid), *pixels.shape[1:]), generator=generator, device="cpu")
            nats.append(self._nats(to_model_range(pixels), labels, grid, noise).flatten(1).sum(1))
        self.terms = RandomTerms(n, pilot_probabilities(grid, torch.stack(nats), density))

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor | None, first: int) -> torch.Tensor:
        """Prior, steps and decoder of each image, (B, 3) float64 bits/dim.

        Args:
            pixels: uint8 (B, C, H, W). labels: (B,) or None.
            first: number of the first image.
        """
        x_0 = to_model_range(pixels)
        B, M = len(x_0), self.terms.per_image
        generators = [seeded_generator(self.seed, 1, first + i) for i in range(B)]
        draws = [self.terms.draw(generator) for generator in generators]
        index, weight = (torch.cat(column) for column in zip(*draws))
        noise = torch.cat([torch.randn((M, *x_0.shape[1:]), generator=g, device="cpu") for g in generators])
        repeated = None if labels is None else labels.repeat_interleave(M)
        nats = self._nats(x_0.repeat_interleave(M, 0), repeated, index, noise, per_pixel=self.keep_maps)

        bits_per_nat = 1 / (x_0[0].numel() * math.log(2))  # bits/dim
        if self.keep_maps:
            self._keep_maps(pixels, x_0, nats * weight.reshape(-1, 1, 1, 1) / math.log(2), index)
        terms = nats.flatten(1).sum(1) * weight * bits_per_nat
        self.per_timestep.index_add_(0, self.t[index], terms)
        terms = terms.reshape(B, M)

        # prior: what x_T still knows of the image
        prior = self.scheduler.prior_kl(x_0) * bits_per_nat
        # steps: KL(q(x_s | x_t, x_0), p(x_s | x_t)), all or a random few, each over its probability
        steps = terms[:, :-1].sum(1)
        # decoder: -log P(x_0 | x_t) at the last pair
        decoder = terms[:, -1]
        return torch.stack([prior, steps, decoder], dim=1)

    def _keep_maps(self, pixels: torch.Tensor, x_0: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> None:
        """Add the bits of each pixel, (B * M, C, H, W), to the maps and to the sums by level."""
        B, dims = len(pixels), pixels[0].numel()
        prior = self.scheduler.prior_kl(x_0, per_pixel=True) / math.log(2)
        self.maps.extend((bits.unflatten(0, (B, -1)).sum(1) + prior).float())
        classes = (pixels > 0).long() + (pixels == 255).long()  # lowest, between, highest
        for c in range(3):
            share = (classes == c).double()
            sums = (bits.unflatten(0, (B, -1)) * share[:, None]).flatten(2).sum(2).flatten() / dims
            self.by_level[:, c].index_add_(0, self.t[index], sums)
            self.by_level[-1, c] += float((prior * share).sum()) / dims

    def _nats(
        self,
        x_0: torch.Tensor,
        labels: torch.Tensor | None,
        index: torch.Tensor,
        noise: torch.Tensor,
        per_pixel: bool = False,
    ) -> torch.Tensor:
        """The path's terms number `index` (R,), one for each row of noise; float64 on the CPU.

        x_0 and labels have R rows, or a single one for all. The result has shape (R, 1), or that
        of noise where it is per pixel.
        """
        x_0 = x_0.expand_as(noise)
        labels = None if labels is None else labels.expand(len(noise))
        nats = []
        for rows in torch.arange(len(index), device="cpu").split(self.batch_size):
            x, eps = (images[rows].to(self.device, self.dtype) for images in (x_0, noise))
            t, s = self.t[index[rows]], self.s[index[rows]]
            x_t = self.scheduler.add_noise(x, eps, t)
            output = self.predict(x_t, t, None if labels is None else labels[rows])
            terms = self.scheduler.vlb_terms(output.to(self.dtype), x, x_t, t, s, self.clip, per_pixel)
            nats.append(terms.cpu() if per_pixel else terms[:, None].cpu())
        self.evaluations += len(index)
        return torch.cat(nats).double()


def even_density(chain: Any, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A probability for each step: half even over the steps, half even in log SNR.

    The second half is for clean images, where the terms are large.
    """
    log_snr_gain = chain.pair(s, -1).snr_t.log() - chain.pair(t, -1).snr_t.log()
    share = log_snr_gain.nan_to_num(posinf=0.0)
    return 0.5 / len(t) + 0.5 * share / share.sum()


def pilot_probabilities(grid: torch.Tensor, nats: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """p proportional to the spread of each step's term: the least noise for the number of draws.

    The draws are evenly spread, so that a term's mean, which varies slowly from step to step, adds
    no noise: what counts is its standard deviation over images and noise. A few images know it
    badly, the less of them the more: the mean's share in the spread is 1 / (pilot images), and
    neighbouring steps are averaged.

    Args:
        grid: the steps that were measured, (G,). nats: their terms, (pilot images, G).
        density: (K - 1,). A share of the draws follows it and no pilot, which may have missed rare
            large terms: no weight can explode.
    """
    spread = (nats.var(0, unbiased=False) + nats.mean(0).pow(2) / len(nats)).sqrt().clamp(min=1e-12)
    padded = torch.cat([spread[:1], spread, spread[-1:]])
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    p = torch.from_numpy(np.exp(np.interp(np.arange(len(density)), grid.numpy(), smooth.log().numpy())))
    return (1 - DEFENSIVE_SHARE) * p / p.sum() + DEFENSIVE_SHARE * density
