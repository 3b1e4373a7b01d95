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
import itertools
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

from .scheduling_ddpm_notes import PRIVATE_ENTRY, DDPMNotesScheduler

# Share of an image's terms that is drawn whatever the pilot images said.
DEFENSIVE_SHARE = 0.3
PILOT_IMAGES = 16
ImageBatch = tuple[torch.Tensor, torch.Tensor | None]  # uint8 (B, C, H, W), labels (B,)


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

        Each image gets its own noise, from (seed, its number): how images are batched does not
        matter, and calls with one seed compare models on the same noise. Without `full`, the
        decoder's term and `evaluations_per_image - 1` others are evaluated for each image, one in
        each of as many ranges of timesteps that contribute alike, found from a few pilot images
        first.

        Args:
            images: 8-bit images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or (N, C, H, W), PIL image(s), floats
                k / 127.5 - 1 (k = 0..255), or an iterable of batches of these (or of dicts with "pixel_values" and maybe
                "class_labels"), which is read once and never held whole.
            class_labels: for a class-conditional model: one for all, or one for each of `images`;
                None takes the batches' own, else the null label.
            num_inference_steps, timesteps: the path; a sampler of K steps has its own bound. None: every timestep.
            evaluations_per_image: network evaluations for each image. A path of no more steps is summed in full.
            full: evaluate every term of the path.
            clip: clip x0_hat; None as the scheduler's config says (improved-diffusion: in evaluation, not in training).
            batch_size: how many noisy images go through the network at once.
            seed: of all noise. first_image: number of the first image, to split a set over processes.
            pilot_images: images to find the ranges with, where `images` is one part of a set; with
                labels of their own where `class_labels` has one for each of `images`. The first 16
                are used. Default: those of `images`.
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
        terms = _BoundTerms(self, scheduler, clip, batch_size, seed)
        sampled = not full and len(path) > evaluations_per_image
        # read ahead: how images are batched must not decide which of them the ranges are chosen on
        held, pilot = _first_images(batches, PILOT_IMAGES if sampled and pilot_images is None else 1)
        if not held:
            raise ValueError("images is empty; allowed: at least one image")
        if sampled:
            if pilot_images is not None:
                one = class_labels is not None and torch.as_tensor(class_labels).numel() == 1
                own = self._image_batches(pilot_images, class_labels if one else None, class_labels is not None)
                _, pilot = _first_images(own, PILOT_IMAGES)
            if not pilot:
                raise ValueError("pilot_images is empty; it must have at least one image")
            terms.choose_ranges(evaluations_per_image - 1, pilot)
        dims, batches = held[0][0][0].numel(), itertools.chain(held, batches)
        del held, pilot  # the last references to these images, once they are measured
        parts, number = [], first_image
        settings = {"desc": "bits/dim", "unit": "image", "total": _number_of_images(images)}
        with tqdm(**{**settings, **getattr(self, "_progress_bar_config", {})}) as bar:
            for pixels, labels in _regrouped(batches, max(1, batch_size // terms.per_image)):
                if pixels[0].numel() != dims:
                    raise ValueError(f"images has {pixels[0].numel()} dims after {dims}; allowed: images of one size")
                parts.append(terms(pixels, labels, number))
                number += len(pixels)
                bar.update(len(pixels))
        self.maybe_free_model_hooks()
        return BitsPerDimOutput.from_parts(torch.cat(parts), terms.per_timestep, dims, terms.evaluations)

    def _image_batches(self, images: Any, class_labels: Any, own_labels: bool = False) -> Iterator[ImageBatch]:
        """(uint8 (B, C, H, W), labels (B,) or None) for whatever `images` is.

        `own_labels`: refuse batches without labels.
        """
        if isinstance(images, PIL.Image.Image):
            images = [images]
        whole = isinstance(images, (torch.Tensor, np.ndarray)) or (
            isinstance(images, (list, tuple)) and all(isinstance(image, PIL.Image.Image) for image in images)
        )
        if not whole and not isinstance(images, Iterable):
            raise ValueError(
                f"images is {type(images).__name__}; allowed: 8-bit images as tensors, arrays, PIL images, or batches of them"
            )
        given = None if class_labels is None else torch.as_tensor(class_labels).reshape(-1)
        one_an_image = given is not None and given.numel() != 1
        start = 0
        for batch in [images] if whole else images:
            pixels, labels = (
                (batch["pixel_values"], batch.get("class_labels")) if isinstance(batch, dict) else (batch, None)
            )
            pixels = as_pixels(pixels, self.unet.config.in_channels)
            if not len(pixels):
                continue
            end = start + len(pixels)
            if given is not None:
                labels = given[start:end] if one_an_image else given
                if one_an_image and (given.numel() < end or (whole and given.numel() > end)):
                    raise ValueError(_labels_do_not_fit(given.numel(), f"{end}" if whole else f"at least {end}"))
            elif own_labels and labels is None:
                raise ValueError(
                    "class_labels has one label for each of images, and pilot_images has no labels; it must be "
                    'batches of {"pixel_values": ..., "class_labels": ...}, or class_labels one label for all'
                )
            device = torch.device("cpu")  # checked here, moved with the noisy images
            yield pixels, self._labels(labels, len(pixels), device)
            start = end
        if given is not None and one_an_image and start and given.numel() != start:
            raise ValueError(_labels_do_not_fit(given.numel(), f"{start}"))

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

    def choose_ranges(self, n: int, images: list[ImageBatch]) -> None:
        """Draw n of the KL terms with p proportional to their root mean square over a pilot: the least noise for the number."""
        K = len(self.t) - 1
        # the pilot's timesteps: half of them even in t, half even in log SNR, where the terms of clean images are large
        log_alpha_bar = self.scheduler._log_alpha_bar
        log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        share = (log_snr[self.s[:-1]] - log_snr[self.t[:-1]]).nan_to_num(posinf=0.0)
        density = (0.5 / K + 0.5 * share / share.sum()).cumsum(0)
        grid = torch.searchsorted(density, (torch.arange(n) + 0.5) / n).clamp(max=K - 1).unique()
        pilot = []
        for i, (pixels, labels) in enumerate(images):
            x_0 = _in_model_range(pixels)
            pilot.append(self._nats(x_0, labels, grid, self._noise(-1 - i, len(grid), x_0)))
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


def _first_images(batches: Iterator[ImageBatch], n: int) -> tuple[list[ImageBatch], list[ImageBatch]]:
    """The batches that hold the first n images (all, if there are fewer), and these one by one."""
    held: list[ImageBatch] = []
    images: list[ImageBatch] = []
    while len(images) < n and (batch := next(batches, None)) is not None:
        held.append(batch)
        pixels, labels = batch
        for i in range(min(len(pixels), n - len(images))):
            images.append((pixels[i : i + 1], None if labels is None else labels[i : i + 1]))
    return held, images


def _regrouped(batches: Iterable[ImageBatch], n: int) -> Iterator[ImageBatch]:
    """The same images n at a time: a network's rounding depends on the size of its batches."""
    rest: ImageBatch | None = None
    for pixels, labels in batches:
        if rest is not None and rest[0].shape[1:] != pixels.shape[1:]:
            yield rest
        elif rest is not None:
            pixels = torch.cat([rest[0], pixels])
            labels = None if labels is None or rest[1] is None else torch.cat([rest[1], labels])
        rest = None
        for i in range(0, len(pixels), n):
            part = pixels[i : i + n], None if labels is None else labels[i : i + n]
            if len(part[0]) < n:
                rest = part
            else:
                yield part
    if rest is not None:
        yield rest


def _number_of_images(images: Any) -> int | None:
    """How many images `bits_per_dim` is given; None where they come one batch after another."""
    if isinstance(images, dict):
        return _number_of_images(images["pixel_values"])
    if isinstance(images, PIL.Image.Image):
        return 1
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return len(images) if images.ndim else None
    if not isinstance(images, (list, tuple)):
        return None
    numbers = [_number_of_images(batch) for batch in images]
    return None if None in numbers else sum(n or 0 for n in numbers)


def _labels_do_not_fit(labels: int, images: str) -> str:
    return f"class_labels has {labels} labels for {images} images; it must have one an image, or one for all"


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
