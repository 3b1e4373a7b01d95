"""The loops over a network: Algorithm 2 of DDPM, which makes images from noise, and the bound.

Sampling: x_T ~ N(0, I); for each (t, s) of the scheduler's path x_s ~ p(x_s | x_t); the last mean
is the image. The sample stays in float32 whatever the network's type: only what the network is
given is cast. The bound on -log2 P(image) is in core/likelihood.py.
"""

import importlib
import inspect
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from .core.gaussian_chain import to_device
from .core.image_batches import ImageBatch, first_images, image_batches, number_of_images, regrouped
from .core.levels import num_unseen
from .core.likelihood import PILOT_IMAGES, BitsPerDimOutput, Bound
from .names import EVALUATIONS_PER_IMAGE, LEARNED_VARIANCES
from .scheduling_ddpm_notes import DDPMNotesScheduler
from .stock_config import PRIVATE_ENTRY

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_ddpm(scheduler: Any) -> bool:
    """Whether the scheduler has a bound. Duck-typed: a reloaded pipeline.py redefines the class."""
    return hasattr(scheduler, "vlb_terms")


class DDPMNotesPipeline(DiffusionPipeline):
    """A DDPM: a UNet and the scheduler that is its math.

    Args:
        unet (`UNet2DModel`): predicts eps, x_0 or v, as the scheduler's `prediction_type` says. It
            has as many output channels as input channels, or twice as many for a learned variance.
            With class embeddings, the last may be that of "no label" (`null_label` below).
        scheduler: a `DDPMNotesScheduler`. A stock `DDPMScheduler` is converted into one, so that
            any DDPM checkpoint loads; any other diffusers scheduler (DDIM, DPM-Solver++, UniPC...)
            samples as it is.

    `save_pretrained` writes a folder that loads in three ways: with this package; with any
    diffusers as a plain `DDPMPipeline`; and, with `custom_pipeline=folder, trust_remote_code=True`,
    as this class from the pipeline.py in the folder.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    # The text of the pipeline.py that defined this class, set there; None for the installed class.
    hub_source: ClassVar[str | None] = None

    def __init__(self, unet: UNet2DModel | torch.nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMNotesScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

    @property
    def null_label(self) -> int | None:
        """The class label for "no label", after the last class, from the UNet's config; or None."""
        return (self.unet.config.get(PRIVATE_ENTRY) or {}).get("null_label")

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None for an unconditional model."""
        embeddings = self.unet.config.get("num_class_embeds")
        return embeddings if embeddings is None or self.null_label is None else self.null_label

    @property
    def interrupt(self) -> bool:
        """Set it to True in a callback to end the sampling loop after that step."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def execution_device(self) -> torch.device:
        """Where the network runs, model offloading considered."""
        return self._execution_device

    @property
    def sample_dtype(self) -> torch.dtype:
        """What samples are kept in: the network's dtype, float32 at least."""
        return torch.promote_types(self.unet.dtype, torch.float32)

    # -------------------------------------------------------------------------------- sampling

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
        """Make images by Algorithm 2 (Ho et al. 2020), or by another scheduler's steps.

        Args:
            batch_size: number of images.
            class_labels: for a class-conditional UNet: one label for all, or one an image; None is
                the null label.
            guidance_scale: w in null + w (conditional - null) (classifier-free guidance, arXiv
                2207.12598). 1 is off; any other value needs `class_labels` and a model trained with
                a null label, and evaluates the network twice a step.
            num_inference_steps: length of the path; None: every timestep for DDPM, 50 for another
                scheduler.
            timesteps: or the path itself, strictly falling.
            eta: None for the scheduler's own way (Algorithm 2); or DDIM's eta in [0, 1], for
                schedulers that have one.
            generator: one for the batch, or a list of one an image: then the image of a seed does
                not depend on the batch it is in.
            latents: x_T, standard normal, (batch_size, C, H, W), in the place of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (the sample in [-1, 1], not clamped).
            return_dict: an `ImagePipelineOutput`, or a tuple.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": x_s}) after each
                step; may return new ones. Setting `pipeline.interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which tensors it gets: ["latents"].

        Raises:
            ValueError: labels, guidance, timesteps, eta, generators or latents that do not fit the
                model; raised before the network runs.
        """
        names = callback_on_step_end_tensor_inputs or self._callback_tensor_inputs
        self._check_inputs(batch_size, class_labels, guidance_scale, output_type, names)
        device, dtype = self.execution_device, self.unet.dtype
        labels = self._labels(class_labels, batch_size, device)
        path, step_arguments = self._prepare_scheduler(num_inference_steps, timesteps, eta, generator, device)
        x_t = self._initial_noise(batch_size, generator, latents, device)

        self._interrupt = False
        # The scheduler gets each timestep where the path is, on the CPU for a DDPM: checking it
        # there forces no device sync. The network gets it on its own device.
        with self.progress_bar(total=len(path)) as bar:
            for i, (t, network_t) in enumerate(zip(path, to_device(path, device))):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output = self.predict(model_input, network_t, labels, guidance_scale, dtype).to(x_t.dtype)
                x_t = self.scheduler.step(model_output, t, x_t, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)
                bar.update()

        images = self._as_output(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The network's output for x_t, in the network's dtype, as the scheduler takes it.

        Args:
            x_t: (B, C, H, W), on the network's device.
            t: timesteps, 0-d or (B,). class_labels: (B,) int64, checked, or None.
            guidance_scale: as of a call; guidance moves the mean and leaves a learned variance
                conditional.
            dtype: the network's, where it is known: diffusers searches the whole network for it.
        """
        x = x_t.to(dtype or self.unet.dtype)
        t = t.to(x.device)
        labels = None if class_labels is None else class_labels.to(x.device)
        if guidance_scale == 1 or labels is None:
            output = self.unet(x, t, class_labels=labels, return_dict=False)[0]
        else:
            null = torch.full_like(labels, self.null_label or 0)
            t = t if t.ndim == 0 else torch.cat([t, t])
            both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null]), return_dict=False)[0]
            conditional, unconditional = both.chunk(2)
            C = x.shape[1]
            guided = unconditional[:, :C] + guidance_scale * (conditional[:, :C] - unconditional[:, :C])
            output = torch.cat([guided, conditional[:, C:]], dim=1)
        # Stock DDPM schedulers know a learned variance; all others get the mean's half.
        whole = is_ddpm(self.scheduler) or vars(self.scheduler).get("variance_type") in LEARNED_VARIANCES
        return output if whole else output[:, : x.shape[1]]

    def _check_inputs(
        self, batch_size: Any, class_labels: Any, guidance_scale: float, output_type: str, names: list[str]
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {names!r}; it must be among {self._callback_tensor_inputs}"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        if guidance_scale != 1 and (class_labels is None or self.null_label is None):
            raise ValueError(
                f"guidance_scale is {guidance_scale} with class_labels {class_labels!r} and null label "
                f"{self.null_label!r}; it must be 1, unless class_labels are given and the model was trained with a "
                "null label"
            )

    def _labels(self, class_labels: Any, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """class_labels as an int64 tensor (B,) on the device, checked."""
        if getattr(self.unet, "class_embedding", None) is None:
            if class_labels is not None:
                raise ValueError(f"class_labels is {class_labels!r}; it must be None, as the model is unconditional")
            return None
        if class_labels is None:
            if self.null_label is None:
                raise ValueError(
                    f"class_labels is None and the model has no null label; it must be 0 to {(self.num_classes or 1) - 1}, "
                    "one for all or one an image"
                )
            class_labels = self.null_label
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or labels.numel() not in (1, batch_size):
            raise ValueError(
                f"class_labels is {class_labels!r}; it must be one integer, or {batch_size} (batch_size) of them"
            )
        embeddings = self.unet.config.get("num_class_embeds")
        if embeddings is not None and not 0 <= int(labels.min()) <= int(labels.max()) < embeddings:
            raise ValueError(
                f"class_labels has {int(labels.min())} to {int(labels.max())}; it must be 0 to {embeddings - 1}"
            )
        return to_device(labels.long(), device).expand(batch_size)

    def _prepare_scheduler(
        self, n: int | None, timesteps: list[int] | None, eta: float | None, generator: Any, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Set the scheduler's path; returns it and the arguments that its `step` takes."""
        scheduler, ours = self.scheduler, is_ddpm(self.scheduler)
        name = type(scheduler).__name__
        if n is not None and timesteps is not None:
            raise ValueError(f"num_inference_steps is {n} and timesteps is given too; only one of the two may be")
        if n is not None and n < 1:
            raise ValueError(f"num_inference_steps is {n}; it must be a whole number of at least 1")
        path: dict[str, Any] = {"timesteps": timesteps}
        if timesteps is None:
            path = {"num_inference_steps": n if n is not None else len(scheduler) if ours else 50}
        step_parameters = inspect.signature(scheduler.step).parameters
        arguments = {"generator": generator} if "generator" in step_parameters else {}
        if ours:
            scheduler.set_timesteps(**path, eta=eta)
            return scheduler.timesteps, arguments
        if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps is given and {name} takes none; it must be num_inference_steps")
        if eta is not None:
            if "eta" not in step_parameters:
                raise ValueError(f"eta is {eta} and {name} has none; it must be None")
            arguments["eta"] = eta
        scheduler.set_timesteps(**path, device=device)
        return scheduler.timesteps, arguments

    def _initial_noise(
        self, batch_size: int, generator: Any, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """x_T, in float32 at least, at the scheduler's scale."""
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}; it must have {batch_size} (batch_size), or be a single one"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.sample_dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be {shape}")
        return latents.to(device=device, dtype=self.sample_dtype) * self.scheduler.init_noise_sigma

    def _as_output(self, x_0: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x_0
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.float().permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    # -------------------------------------------------------------------------------- likelihood

    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        class_labels: Any = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        evaluations_per_image: int = EVALUATIONS_PER_IMAGE,
        full: bool = False,
        clip: bool | None = None,
        batch_size: int = 128,
        seed: int = 0,
        first_image: int = 0,
        pilot_images: Any = None,
        guidance_scale: float = 1.0,
        return_map: bool = False,
    ) -> BitsPerDimOutput:
        """The bound on -log2 P(x_0) / dims: the bits a dimension that encoding the images takes.

        Each image gets noise of its own, from (seed, its number): how images are batched does not
        matter, and calls with one seed compare models on the same noise. Without `full`, the
        decoder's term and `evaluations_per_image - 1` others are evaluated for each image, one in
        each of as many ranges of timesteps that contribute alike, found from a few pilot images
        first.

        Args:
            images: 8-bit images: uint8 tensor (N, C, H, W), uint8 array (N, H, W, C) or
                (N, C, H, W), PIL image(s), floats k / 127.5 - 1 (k = 0..255), or an iterable of
                batches of these (or of dicts with "pixel_values" and maybe "class_labels"), which
                is read once and never held whole.
            class_labels: for a class-conditional model: one for all, or one for each of `images`;
                None takes the batches' own, else the null label.
            num_inference_steps, timesteps: the path; a sampler of K steps has its own bound. None:
                every timestep.
            evaluations_per_image: network evaluations for each image; a dozen gives most for the
                cost if there are enough images. A path of no more steps is summed in full.
            full: evaluate every term of the path.
            clip: clip x0_hat; None as the scheduler's config says (improved-diffusion: in
                evaluation, not in training).
            batch_size: noisy images through the network at once.
            seed: of all noise. first_image: number of the first image, to split a set over
                processes.
            pilot_images: images to find the ranges with, where `images` is one part of a set; with
                labels of their own where `class_labels` has one for each of `images`. The first 16
                are used. Default: those of `images`.
            guidance_scale: must be 1, as guided sampling has no bound.
            return_map: also give the bits of each pixel (`maps`, held in memory, one an image) and
                of each class of levels at each timestep (`by_level`).

        Raises:
            ValueError: images off the 256-level grid, not finite, of another range or channels;
                none at all; a scheduler that is no DDPM, or has an eta other than 1; guidance;
                labels that do not fit.

        Warns of pixels whose level has the weight 0 in the scheduler's levels.
        """
        scheduler = self._bound_scheduler(num_inference_steps, timesteps, evaluations_per_image, guidance_scale)
        batches = self.image_batches(images, class_labels)
        device, dtype = self.execution_device, self.sample_dtype
        bound = Bound(scheduler, self.predict, device, dtype, clip, batch_size, seed, return_map)
        draws = not full and len(scheduler.timesteps) > evaluations_per_image
        # read ahead: how images are batched must not decide which of them the ranges are chosen on
        held, pilot = first_images(batches, PILOT_IMAGES if draws and pilot_images is None else 1)
        if not held:
            raise ValueError("images is empty; it must have at least one image")
        if draws:
            if pilot_images is not None:
                pilot = self._pilot(pilot_images, class_labels)
            bound.draw_terms(evaluations_per_image - 1, pilot)
        dims, batches = held[0][0][0].numel(), itertools.chain(held, batches)
        del held, pilot  # the last references to these images, once they are measured
        parts, number, unseen = [], first_image, 0
        settings = {"desc": "bits/dim", "unit": "image", "total": number_of_images(images)}
        with self.image_progress_bar(**settings) as bar:
            for pixels, labels in regrouped(batches, max(1, batch_size // bound.terms.per_image)):
                if pixels[0].numel() != dims:
                    raise ValueError(
                        f"images has {pixels[0].numel()} dims after {dims}; it must have images of one size"
                    )
                parts.append(bound(pixels, labels, number))
                number += len(pixels)
                unseen += num_unseen(pixels, scheduler.levels)
                bar.update(len(pixels))
        if unseen:
            warnings.warn(
                f"{unseen} of {(number - first_image) * dims} pixels have levels of weight 0, which do not occur in the "
                "images that the levels were fitted on: the decoder spends 24 bits on each",
                stacklevel=3,  # through torch.no_grad, to the caller
            )
        self.maybe_free_model_hooks()
        maps, by_level = (torch.stack(bound.maps), bound.by_level) if return_map else (None, None)
        return BitsPerDimOutput.from_parts(
            torch.cat(parts), bound.per_timestep, dims, bound.evaluations, maps, by_level
        )

    def image_batches(self, images: Any, class_labels: Any = None, need_labels: bool = False) -> Iterator[ImageBatch]:
        """(uint8 (B, C, H, W), labels (B,) int64 or None) for whatever `images` is, on the CPU.

        Args:
            images, class_labels: as of `bits_per_dim`.
            need_labels: refuse batches without labels.
        """
        cpu = torch.device("cpu")  # labels are checked here, and moved with the noisy images
        for pixels, labels in image_batches(images, self.unet.config.in_channels, class_labels, need_labels):
            yield pixels, self._labels(labels, len(pixels), cpu)

    def image_progress_bar(self, **settings: Any) -> tqdm:
        """A progress bar with these settings, and those of `set_progress_bar_config` over them."""
        return tqdm(**{**settings, **getattr(self, "_progress_bar_config", {})})

    def _bound_scheduler(
        self, n: int | None, timesteps: list[int] | None, evaluations_per_image: int, guidance_scale: float
    ) -> DDPMNotesScheduler:
        """A copy of the scheduler on the path, once it is clear that there is a bound."""
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; it must be 1 (guided sampling is no normalised reverse process: "
                "no bound)"
            )
        if not is_ddpm(self.scheduler):
            raise ValueError(
                f"the scheduler is {type(self.scheduler).__name__}, whose steps are no posteriors; it must be a DDPM, "
                "such as DDPMNotesScheduler.from_config(pipeline.scheduler.config)"
            )
        if evaluations_per_image < 2:
            raise ValueError(
                f"evaluations_per_image is {evaluations_per_image}; it must be at least 2 (the decoder's term and another)"
            )
        scheduler = DDPMNotesScheduler.from_config(self.scheduler.config)
        if timesteps is not None or n is not None:
            scheduler.set_timesteps(n, timesteps=timesteps)
        first = int(scheduler.timesteps[0])
        alpha_bar = float(scheduler.alphas_cumprod[first])
        if alpha_bar > 1e-3:
            warnings.warn(
                f"alpha_bar at the path's first timestep {first} is {alpha_bar:.3g}: the image shines through, samples "
                "start from the wrong distribution, and the prior's part of the bound is large",
                stacklevel=4,  # through bits_per_dim and torch.no_grad, to the caller
            )
        return scheduler

    def _pilot(self, pilot_images: Any, class_labels: Any) -> list[ImageBatch]:
        one = class_labels is not None and torch.as_tensor(class_labels).numel() == 1
        batches = self.image_batches(pilot_images, class_labels if one else None, class_labels is not None)
        _, pilot = first_images(batches, PILOT_IMAGES)
        if not pilot:
            raise ValueError("pilot_images is empty; it must have at least one image")
        return pilot

    # -------------------------------------------------------------------------------- saving

    def to_json_string(self) -> str:
        """model_index.json under the stock names: diffusers loads the folder without this code."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = "DDPMPipeline"
        index.pop("_name_or_path", None)  # where it was loaded from: often a path of the owner's machine
        if is_ddpm(self.scheduler):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """model_index.json and, beside it, this class as the one file pipeline.py."""
        super().save_config(save_directory, **kwargs)
        for path in Path(save_directory).glob("*/config.json"):  # diffusers writes where it was loaded from there, too
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (Path(save_directory) / "pipeline.py").write_text(pipeline_source(type(self)), encoding="utf-8")


def pipeline_source(pipeline_class: type[DDPMNotesPipeline] = DDPMNotesPipeline) -> str:
    """The text of the Hub's pipeline.py: the shipped files joined into one.

    A class that was itself loaded from such a file gives that file back, unchanged.
    """
    if pipeline_class.hub_source is not None:
        return pipeline_class.hub_source
    return importlib.import_module(".hub.code", __package__).joined_source()
