"""A demo of a DDPM: images as they form, an image under noise, its bits/dim, other variances.

    python examples/space/app.py                             # in a clone: the model that comes with
    it MODEL_ID=outputs/digits python examples/space/app.py     # a folder, or a Hub repository:
    "user/name"

On the Hub the model is the one that the metadata of the Space's README.md names. It is loaded as
anybody
would load it: by diffusers, with the code in the model's own repository. Every computation stops
after MAX_SECONDS (an environment variable, 60 by default).
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import base64
import io
import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import RepoCard

MAX_SECONDS = float(os.environ.get("MAX_SECONDS", 60))  # per click
MAX_IMAGES = 8
MAX_FILE_SIZE = "10mb"
MAX_PIXELS = 40_000_000  # of an upload
FRAMES = 24  # shown per trajectory
PICTURE_SIZE = 512  # pixels that a picture is enlarged to, by whole factors
BARS = 16  # ranges of timesteps
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MODE_NAMES = {1: "grey", 3: "RGB", 4: "RGBA"}
ETA, IN_TURN, NO_LABEL = "eta (DDIM)", "each in turn", "no label"
NO_IMAGE = "Upload an image, or take a sample."
COLOURS = {"decoder": "#e07b39", "KL of the steps": "#3b78b5", "prior": "#7a7a7a"}


# --- the model


def model_id() -> str:
    """MODEL_ID, or the first of `models` in the README.md here, or the clone's model."""
    here = Path(__file__).resolve().parent
    models = RepoCard.load(here / "README.md").data.get("models")
    if named := os.environ.get("MODEL_ID") or (models or [None])[0]:
        return named
    example = here.parent / "ddpm-mnist"
    if not (example / "model_index.json").is_file():
        sys.exit("app.py: which model? MODEL_ID=outputs/digits python app.py (a folder, or user/name)")
    print(f"No MODEL_ID: showing {example}. Another: MODEL_ID=outputs/digits python examples/space/app.py", flush=True)
    return str(example)


class Interrupted(Exception):
    """Ends the sampling from a callback."""


class Model:
    """A published pipeline, and what the page needs to know about it.

    Attributes:
        channels, height, width: of its images.
        T: number of training timesteps.
        seconds: per network evaluation for one image, on this machine.
        evaluations: network evaluations for one image in MAX_SECONDS.
        variances: variance types that it supports; "optimal" only if it was measured.
        default_variance: the one that it was published with.
    """

    def __init__(self, model: str) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=model, trust_remote_code=True)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        config, scheduler = self.pipe.unet.config, self.pipe.scheduler
        size = config.sample_size
        self.channels = config.in_channels
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if self.channels not in MODES:
            raise ValueError(f"{model} makes images of {self.channels} channels; this demo shows 1, 3 or 4")
        self.T = len(scheduler)
        self.name = Path(model).resolve().name if Path(model).is_dir() else f"[{model}](https://huggingface.co/{model})"
        best = ["optimal"] if scheduler.original_sample_mse is not None else []
        learned = [] if scheduler.variance_type.startswith("fixed") else [scheduler.variance_type]
        self.variances = list(dict.fromkeys(["fixed_small", "fixed_large", *best, *learned]))
        self.default_variance = scheduler.variance_type.removesuffix("_log")  # the same values
        for steps in (1, min(5, self.T)):  # the first pass warms up
            started = time.monotonic()
            list(self.trajectory([0], steps))
            self.seconds = (time.monotonic() - started) / steps
        self.evaluations = int(max(10, MAX_SECONDS / self.seconds))

    def with_variance(self, variance: str | None) -> Any:
        """The pipeline with a separate scheduler, so that concurrent runs do not interfere."""
        settings = {} if variance is None else {"variance_type": variance}
        pipe = type(self.pipe)(self.pipe.unet, self.pipe.scheduler.from_config(self.pipe.scheduler.config, **settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def trajectory(
        self,
        seeds: list[int],
        steps: int,
        variance: str | None = None,
        eta: float | None = None,
        label: str | None = None,
        guidance: float = 1.0,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (steps done, images) about FRAMES times; images are uint8 (N, H, W, C).

        The last frame is the finished one, or the current one after MAX_SECONDS. Closing the
        generator, as gradio does on Stop and when the page is left, ends the sampling after the
        current step.
        """
        frames: queue.SimpleQueue = queue.SimpleQueue()
        closed, end = threading.Event(), time.monotonic() + MAX_SECONDS
        shown = {math.ceil(steps * (i + 1) / FRAMES) for i in range(FRAMES)}
        labels = self.labels(label, len(seeds))

        def after_step(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            stopped = closed.is_set() or time.monotonic() > end
            if i + 1 in shown or stopped:
                frames.put((i + 1, to_uint8(tensors["latents"])))
            if stopped:
                raise Interrupted
            return {}

        def run() -> None:
            try:
                self.with_variance(variance)(
                    batch_size=len(seeds),
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    eta=eta,
                    class_labels=labels,
                    guidance_scale=guidance if labels is not None else 1.0,
                    callback_on_step_end=after_step,
                    output_type="latent",
                )
                frames.put(None)
            except Interrupted:
                frames.put(None)
            except Exception as error:  # raised in the thread that waits
                frames.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (frame := frames.get()) is not None:
                if isinstance(frame, Exception):
                    raise frame
                yield frame
        finally:
            closed.set()
            thread.join()

    def labels(self, label: str | None, n: int) -> list[int] | None:
        """One class label per image, for an entry of `label_choices`."""
        if label is None or label == NO_LABEL:
            return None
        return [i % self.pipe.num_classes for i in range(n)] if label == IN_TURN else [int(label)] * n

    def label_choices(self, several: bool) -> list[str]:
        """Entries of the label menu, the default first; empty for an unconditional model."""
        if self.pipe.num_classes is None:
            return []
        no_label = [NO_LABEL] if self.pipe.null_label is not None else []
        return [*([IN_TURN] if several else []), *no_label, *map(str, range(self.pipe.num_classes))]


# --- pictures


EMPTY = '<div class="picture empty"></div>'


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(images: np.ndarray, alt: str) -> str:
    """Images, uint8 (N, H, W, C), as an HTML picture: a square grid, enlarged by a whole factor.

    The data are inline: a browser could read a file that is rewritten meanwhile only in part.
    """
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, PICTURE_SIZE // (columns * max(width, height)))
    gap = 0 if n == 1 else 4
    canvas = PIL.Image.new("RGBA", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap))
    for i, image in enumerate(images):
        picture = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        picture = picture.resize((width * scale, height * scale), PIL.Image.Resampling.NEAREST)
        canvas.paste(picture, (i % columns * (width * scale + gap), i // columns * (height * scale + gap)))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return f'<img class="picture" alt="{alt}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def read_image(path: str, model: Model) -> tuple[np.ndarray, str]:
    """An uploaded image in the model's size and mode, uint8 (H, W, C), and what was done to it.

    Raises:
        ValueError: with a message for the user.
    """
    height, width, mode = model.height, model.width, MODES[model.channels]
    image = decode(path)
    if image.width < width or image.height < height:
        raise ValueError(f"It has {image.width} x {image.height} pixels; the model needs at least {width} x {height}.")
    done = []
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
        done.append("put on white")
    if image.mode != mode:
        done.append(f"made {MODE_NAMES[model.channels]}")
        image = image.convert(mode)
    if image.size != (width, height):
        done.append(f"cropped and resized from {image.width} x {image.height}")
        image = PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BILINEAR)
    pixels = np.array(image).reshape(height, width, model.channels)
    if mode == "RGBA":
        pixels[pixels[..., 3] == 0] = 0  # as in training: nobody sees these colours
    return pixels, ", ".join(done) or "as it is"


def decode(path: str) -> PIL.Image.Image:
    """A single 8-bit image from an uploaded file.

    Raises:
        ValueError: with a message for the user.
    """
    try:
        with PIL.Image.open(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a phone's JPEG with a preview
            if frames > 1:
                raise ValueError(f"It is animated, or has pages: {frames} pictures in one file. Upload one of them.")
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"It has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are read here.")
            if file.mode.startswith("I") or file.mode == "F":
                raise ValueError(f"It has more than 8 bits a pixel (mode {file.mode}). Save it with 8 bits.")
            return PIL.ImageOps.exif_transpose(file)  # decodes it
    except ValueError:
        raise
    except PIL.Image.DecompressionBombError as bomb:
        raise ValueError(f"It is too large to be read here; at most {MAX_PIXELS:,} pixels.") from bomb
    except Exception as error:  # PIL raises many types for damaged files
        raise ValueError("It cannot be read: it is no image, of an unknown format, or damaged.") from error


def bars(per_timestep: np.ndarray, prior: float) -> pd.DataFrame:
    """Bits/dim by range of timesteps, each about 1.5 times the previous; the sum is the total."""
    T = len(per_timestep)
    edges = np.unique(np.geomspace(1, T, BARS + 1).round().astype(int)) if T > 1 else np.array([1])
    rows = [("0: decoder", per_timestep[0], "decoder")]
    for a, b in itertools.pairwise(edges):
        rows.append((f"{a}" if b == a + 1 else f"{a}–{b - 1}", per_timestep[a:b].sum(), "KL of the steps"))
    rows.append(("prior", prior, "prior"))
    return pd.DataFrame(rows, columns=["timesteps", "bits/dim", "part"])


# --- the page


def checked(value: Any, name: str, lowest: int, highest: int) -> int:
    """The whole number in a field, which may be empty or out of range."""
    if value is None or not lowest <= value <= highest:
        raise gr.Error(f"{name} must be a whole number from {lowest} to {highest}.", print_exception=False)
    return int(value)


class Demo:
    """What the controls of the page do, for one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.steps_limit = min(model.T, model.evaluations)
        self.compared = [*model.variances[:3], ETA][:3]
        self.titles = ["mean only (eta = 0)" if name == ETA else name for name in self.compared]

    def trajectory(self, seed: Any, steps: Any, images: Any, **settings: Any) -> Iterator[tuple[int, np.ndarray]]:
        """`Model.trajectory` for checked inputs; errors are shown to the user."""
        first = checked(seed, "Seed", 0, 2**31)
        seeds = [first + i for i in range(checked(images, "Images", 1, MAX_IMAGES))]
        done, steps = 0, checked(steps, "Steps", 1, self.steps_limit)
        try:
            for done, frame in self.model.trajectory(seeds, steps, **settings):
                yield done, frame
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if done < steps:
            gr.Warning(f"Stopped at step {done} of {steps}, after {MAX_SECONDS:.0f} s. Ask for fewer steps or images.")

    @staticmethod
    def noise(variance: str, eta: float) -> dict[str, Any]:
        return {"eta": eta} if variance == ETA else {"variance": variance}

    def generate(
        self,
        seed: Any,
        steps: Any,
        images: Any,
        variance: str,
        eta: float,
        label: str | None = None,
        guidance: float = 1.0,
    ) -> Iterator[tuple]:
        """Yields (picture, progress)."""
        started = time.monotonic()
        settings = {"label": label, "guidance": guidance, **self.noise(variance, eta)}
        for done, frame in self.trajectory(seed, steps, images, **settings):
            last, seconds = seed + len(frame) - 1, time.monotonic() - started
            progress = f"Step {done} of {steps}, seeds {seed} to {last}, {seconds:.1f} s"
            yield picture(frame, "Images of the model"), progress

    def compare(self, seed: Any, steps: Any, images: Any, label: str | None = None) -> Iterator[list]:
        """Yields three pictures and the progress."""
        pictures = [EMPTY] * 3
        for i, variance in enumerate(self.compared):
            for _, frame in self.trajectory(seed, steps, images, label=label, **self.noise(variance, 0.0)):
                pictures[i] = picture(frame, f"Images by {self.titles[i]}")
                yield [*pictures, f"{self.titles[i]} ..."]
        yield [*pictures, "All three are done."]

    def views(self, image: np.ndarray | None, t: int, seed: Any) -> tuple[str, str, str]:
        """The image as the model sees it, the image at timestep t, and the formula for that."""
        if image is None:
            return EMPTY, EMPTY, ""
        scheduler, t = self.model.pipe.scheduler, int(t)
        x_0 = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean, variance = scheduler.forward_mean_variance(x_0, t)
        generator = torch.Generator().manual_seed(checked(seed, "Noise seed", 0, 2**31))
        x_t = mean + variance.sqrt() * torch.randn(x_0.shape, generator=generator)
        alpha_bar = float(scheduler.alphas_cumprod[t])
        formula = f"x_t = {math.sqrt(alpha_bar):.3f} · image + {math.sqrt(1 - alpha_bar):.3f} · noise"
        noised = picture(to_uint8(x_t), f"The image at timestep {t}, noise seed {seed}")
        return picture(image[None], "The image"), noised, formula

    def upload(self, path: str | None) -> tuple[np.ndarray | None, str]:
        """The image of a file, or None, and a message."""
        if path is None:
            return None, NO_IMAGE
        try:
            image, done = read_image(path, self.model)
        except ValueError as error:
            return None, f"⚠️ **This file is not used.** {error}"
        return image, f"Your image, {done}."

    def sample(self, seed: Any, label: str | None = None) -> tuple[np.ndarray, str]:
        """One sample of the model, and a message."""
        *_, (_, images) = self.trajectory(seed, min(self.steps_limit, 100), 1, label=label)
        return images[0], f"A sample of the model, seed {int(seed)}."

    def measure(
        self, image: np.ndarray | None, seed: Any, evaluations: int, label: str | None = None
    ) -> tuple[str, pd.DataFrame]:
        """The image's bits/dim as Markdown, and the bars of the plot."""
        if image is None:
            raise gr.Error("There is no image yet: upload one, or take a sample.", print_exception=False)
        try:
            result = self.model.with_variance(None).bits_per_dim(
                image[None],
                class_labels=self.model.labels(label, 1),
                seed=checked(seed, "Noise seed", 0, 2**31),
                evaluations_per_image=int(evaluations),
                batch_size=8,
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        text = (
            f"### {result.total:.3f} bits/dim\n\n"
            f"| decoder | KL of the steps | prior |\n|---|---|---|\n"
            f"| {result.decoder:.3f} | {result.diffusion:.3f} | {result.prior:.3f} |\n\n"
            f"An upper bound: at most {result.total * result.dims:.0f} bits for {result.dims} values, which take "
            f"{8 * result.dims} bits uncompressed."
        )
        return text, bars(result.per_timestep.numpy(), result.prior)


NETWORK: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1}  # one user at a time computes


def build(model: Model) -> gr.Blocks:
    """The page for a model."""
    demo = Demo(model)
    steps = min(50, demo.steps_limit)
    with gr.Blocks(title="A DDPM, measured", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# A DDPM, measured\n\nThe model {model.name} makes {model.height} x {model.width} "
            f"{MODE_NAMES[model.channels]} images in {model.T} timesteps. It runs on {str(model.pipe.device).upper()} "
            f"here: one image in {steps} steps takes about {steps * model.seconds:.2g} s."
        )
        with gr.Tab("Generate"), gr.Row():
            generate_tab(demo)
        with gr.Tab("Measure"):
            measure_tab(demo)
        with gr.Tab("Compare"):
            compare_tab(demo)
    return page


def sampling_controls(demo: Demo, steps: int) -> list[gr.components.Component]:
    """Seed, steps, images and, for class-conditional models, the label."""
    return [
        gr.Number(0, label="Seed", precision=0, step=1),
        gr.Slider(1, demo.steps_limit, min(steps, demo.steps_limit), step=1, label="Steps"),
        gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images"),
        *label_menu(demo, several=True),
    ]


def label_menu(demo: Demo, several: bool) -> list[gr.components.Component]:
    choices = demo.model.label_choices(several)
    return [gr.Dropdown(choices, value=choices[0], label="Class label")] if choices else []


def generate_tab(demo: Demo) -> None:
    with gr.Column(scale=1, min_width=280):
        inputs = sampling_controls(demo, steps=50)
        variance = gr.Dropdown(
            [*demo.model.variances, ETA],
            value=demo.model.default_variance,
            label="Variance of each step",
            info="eta replaces it by DDIM's",
        )
        eta = gr.Slider(0, 1, 0, step=0.05, label="eta", info="0: no noise is added", visible=False)
        inputs[3:3] = [variance, eta]
        if demo.model.pipe.null_label is not None:
            inputs.append(gr.Slider(1, 5, 1, step=0.5, label="Guidance", info="1: off. Needs a label"))
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
    with gr.Column(scale=2, min_width=280):
        samples = gr.HTML(EMPTY, padding=False, elem_id="samples")
        progress = gr.Markdown(elem_id="progress", elem_classes="status")
    variance.change(lambda name: gr.Slider(visible=name == ETA), variance, eta, show_progress="hidden", queue=False)
    running = start.click(demo.generate, inputs, [samples, progress], show_progress="hidden", **NETWORK)
    stop.click(None, cancels=running)


def measure_tab(demo: Demo) -> None:
    image = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Your image", type="filepath", height=140)
            sample_seed = gr.Number(0, label="Seed of a sample", precision=0, step=1)
            label = label_menu(demo, several=False)
            take_sample = gr.Button("Take a sample of the model")
            message = gr.Markdown(NO_IMAGE, elem_id="told", elem_classes="status")
        with gr.Column(scale=2, min_width=280):
            t, views = noise_views(demo)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            seed = gr.Number(0, label="Noise seed", precision=0, step=1)
            limit = max(2, min(200, demo.model.T, demo.model.evaluations // 2))
            info = "more: less noise in the number"
            evaluations = gr.Slider(2, limit, min(38, limit), step=1, label="Network evaluations", info=info)
            start = gr.Button("Measure bits/dim", variant="primary")
            number = gr.Markdown(elem_id="bits")
        with gr.Column(scale=2, min_width=280):
            plot = bar_plot(demo)
    show_views = {"fn": demo.views, "inputs": [image, t, seed], "outputs": views}
    show_views |= {"show_progress": "hidden", "trigger_mode": "always_last", "queue": False}
    file.change(demo.upload, file, [image, message], show_progress="hidden").then(**show_views)
    take_sample.click(demo.sample, [sample_seed, *label], [image, message], **NETWORK).then(**show_views)
    gr.on([t.change, seed.change], **show_views)  # one event: responses stay in order
    start.click(demo.measure, [image, seed, evaluations, *label], [number, plot], **NETWORK)


def noise_views(demo: Demo) -> tuple[gr.Slider, list[gr.components.Component]]:
    """The timestep's slider, and where `Demo.views` goes."""
    with gr.Row():
        with gr.Column(min_width=120):
            gr.Markdown("**As the model sees it**")
            seen = gr.HTML(EMPTY, padding=False, elem_id="seen")
        with gr.Column(min_width=120):
            gr.Markdown("**With noise: q(x_t | x_0)**")
            noised = gr.HTML(EMPTY, padding=False, elem_id="noised")
    t = gr.Slider(0, demo.model.T - 1, demo.model.T // 4, step=1, label="Timestep t")
    return t, [seen, noised, gr.Markdown(elem_classes="status")]


def bar_plot(demo: Demo) -> gr.BarPlot:
    return gr.BarPlot(
        x="timesteps",
        y="bits/dim",
        color="part",
        color_map=COLOURS,
        sort=list(bars(np.zeros(demo.model.T), 0.0)["timesteps"]),
        label="Where the bits are",
        colors_in_legend=[],
        x_title="timesteps of a bar",
        x_label_angle=-45,
        tooltip="all",
        height=320,
    )


def compare_tab(demo: Demo) -> None:
    gr.Markdown(
        "The same network, the same noise: only the variance of each reverse step differs. "
        "The fewer the steps, the more it matters."
    )
    with gr.Row():
        inputs = sampling_controls(demo, steps=25)
    with gr.Row():
        start, stop = gr.Button("Compare", variant="primary"), gr.Button("Stop")
    panels = []
    with gr.Row():
        for i, title in enumerate(demo.titles):
            with gr.Column(min_width=220):
                gr.Markdown(f"**{title}**")
                panels.append(gr.HTML(EMPTY, padding=False, elem_id=f"panel-{i}"))
    progress = gr.Markdown(elem_classes="status")
    running = start.click(demo.compare, inputs, [*panels, progress], show_progress="hidden", **NETWORK)
    stop.click(None, cancels=running)


CSS = """
.picture { display: block; width: 100%; max-width: 512px; image-rendering: pixelated }
.picture.empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary) }
.status { min-height: 1.6em }
"""


def main() -> None:
    name = model_id()
    try:
        model = Model(name)
    except (OSError, ValueError) as error:
        missing = "" if Path(name).is_dir() else "it is no local folder, and no repository of that name can be read: "
        sys.exit(f"app.py: {name} cannot be loaded: {missing}{' '.join(str(error).split())}")
    page = build(model).queue(max_size=20)
    # Local fonts only: nothing is fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        inbrowser=bool(os.environ.get("OPEN_BROWSER")),
        share=False,
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=CSS,
    )


if __name__ == "__main__":
    main()
