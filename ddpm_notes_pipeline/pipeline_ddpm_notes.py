"""The loops over a network: Algorithm 2 of DDPM, which makes images from noise.

x_T ~ N(0, I); for each (t, s) of the scheduler's path: x_s ~ p(x_s | x_t); the last mean is the image. The sample stays in float32
whatever the network's type: only the network's input is cast.
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_ddpm_notes import PRIVATE_ENTRY, DDPMNotesScheduler


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

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin) -> None:
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
            raise ValueError(f"callback_on_step_end_tensor_inputs is {names!r}; allowed: {self._callback_tensor_inputs}")
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

        # The scheduler gets each timestep on the CPU, where reading it stops nothing; the network gets it on its own device.
        self._interrupt = False
        with self.progress_bar(total=len(path)) as bar:
            for i, (t, t_network) in enumerate(zip(path, path.to(device))):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output = self._predict(model_input, t_network, labels, guidance_scale if guided else None)
                x_t = self.scheduler.step(model_output, t, x_t, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)
                bar.update()

        images = x_t if output_type == "latent" else (x_t / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.float().permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float | None = None) -> torch.Tensor:
        """The network's output for x_t in the network's own type, guided if asked."""
        x = x.to(self.unet.dtype)
        if guidance_scale is None:
            return self._for_scheduler(self.unet(x, t, class_labels=labels, return_dict=False)[0], x)
        null = torch.full_like(labels, self.null_label)
        both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null]), return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        C = x.shape[1]  # guidance moves the mean; a learned variance stays the conditional one
        guided = unconditional[:, :C] + guidance_scale * (conditional[:, :C] - unconditional[:, :C])
        return self._for_scheduler(torch.cat([guided, conditional[:, C:]], dim=1), x)

    def _for_scheduler(self, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Other schedulers know no learned variance: they get the mean's half."""
        return model_output if isinstance(self.scheduler, DDPMNotesScheduler) else model_output[:, : x.shape[1]]

    def _labels(self, class_labels: Any, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """class_labels as an int64 tensor (B,) on the device, checked."""
        if getattr(self.unet, "class_embedding", None) is None:
            if class_labels is not None:
                raise ValueError(f"class_labels is {class_labels!r} and this model is unconditional; allowed: None")
            return None
        if class_labels is None:
            if self.null_label is None:
                raise ValueError(f"class_labels is None and this model needs labels; allowed: 0 to {(self.num_classes or 1) - 1}, one an image")
            class_labels = self.null_label
        labels = torch.as_tensor(class_labels).reshape(-1)
        if labels.is_floating_point() or labels.numel() not in (1, batch_size):
            raise ValueError(f"class_labels is {class_labels!r}; allowed: one integer, or {batch_size} (batch_size) of them")
        highest = self.unet.config.get("num_class_embeds")
        if highest is not None and not 0 <= int(labels.min()) <= int(labels.max()) < highest:
            raise ValueError(f"class_labels has {int(labels.min())} to {int(labels.max())}; allowed: 0 to {highest - 1}")
        return labels.long().expand(batch_size).to(device)

    def _prepare_scheduler(
        self, n: int | None, timesteps: list[int] | None, eta: float | None, generator: Any, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Set the scheduler's path; returns it and what its `step` takes besides."""
        scheduler = self.scheduler
        ours = isinstance(scheduler, DDPMNotesScheduler)
        if n is not None and timesteps is not None:
            raise ValueError(f"num_inference_steps is {n} and timesteps is given too; allowed: one of the two")
        path = {"timesteps": timesteps} if timesteps is not None else {"num_inference_steps": n or (len(scheduler) if ours else 50)}
        step_parameters = inspect.signature(scheduler.step).parameters
        arguments = {"generator": generator} if "generator" in step_parameters else {}
        if ours:
            scheduler.set_timesteps(**path, **({} if eta is None else {"eta": eta}))
            return scheduler.timesteps, arguments
        if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps is given and {type(scheduler).__name__} takes none of its own; allowed: num_inference_steps")
        if eta is not None:
            if "eta" not in step_parameters:
                raise ValueError(f"eta is {eta} and {type(scheduler).__name__} has none; allowed: None")
            arguments["eta"] = eta
        scheduler.set_timesteps(**path, device=device)
        return scheduler.timesteps, arguments

    def _initial_noise(self, batch_size: int, generator: Any, latents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """x_T, in float32 at least, at the scheduler's scale."""
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)}; allowed: {batch_size} (batch_size) generators, or a single one")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; allowed: {shape}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    # ------------------------------------------------------------------------------------------------ saving

    def to_json_string(self) -> str:
        """model_index.json: written under the stock names, so that diffusers loads the folder without this code."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = "DDPMPipeline"
        index.pop("_name_or_path", None)  # where it was loaded from: often a path of the owner's machine
        if isinstance(self.scheduler, DDPMNotesScheduler):
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """model_index.json and, beside it, this class as the one file pipeline.py."""
        super().save_config(save_directory, **kwargs)
        (Path(save_directory) / "pipeline.py").write_text(pipeline_source(type(self)), encoding="utf-8")


def pipeline_source(pipeline_class: type = DDPMNotesPipeline) -> str:
    """The text of the Hub's pipeline.py: this module with the scheduler's joined in front, so that the folder needs no other file.

    The first line names the package's version and the digest of the lines below it. A class that was itself loaded from such a file
    gives that file back, unchanged.
    """
    own: str = pipeline_class._own_source  # type: ignore[attr-defined]
    if DDPMNotesScheduler.__module__ == pipeline_class.__module__:
        return own
    scheduler = Path(sys.modules[DDPMNotesScheduler.__module__].__file__ or "").read_text(encoding="utf-8")
    joined = scheduler + "\n\n" + "".join(line for line in own.splitlines(keepends=True) if not line.startswith("from ."))
    version = sys.modules[__name__.rpartition(".")[0]].__version__  # type: ignore[attr-defined]
    return f"# ddpm_notes_pipeline {version}, sha256 of the lines below {hashlib.sha256(joined.encode()).hexdigest()}\n{joined}"
