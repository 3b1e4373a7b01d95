"""A demo of a DDPM: images from noise while they form, an image's way into noise, its bits/dim, and what the variance does.

    python examples/space/app.py                             # in a clone: the model that comes with it
    MODEL_ID=outputs/digits python examples/space/app.py     # a folder, or a repository on the Hub: "user/name"

On the Hub the model is the one that the metadata of the Space's README.md names. It is loaded as strangers load it: diffusers, and the code
that lies in the model's own repository. Whatever takes time ends after MAX_SECONDS (an environment variable, 60 unless set).
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

MAX_SECONDS = float(os.environ.get("MAX_SECONDS", 60))  # of one press of a button
MAX_IMAGES = 8
MAX_FILE_SIZE = "10mb"
MAX_PIXELS = 40_000_000  # of an upload
FRAMES = 24  # shown of one trajectory
SHOWN = 512  # pixels that a picture is enlarged to, by whole numbers
BARS = 16  # ranges of timesteps
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ETA, IN_TURN, NO_LABEL = "eta (DDIM)", "each in turn", "no label"
NO_IMAGE = "Upload an image, or take a sample."
COLOURS = {"decoder": "#e07b39", "KL of the steps": "#3b78b5", "prior": "#7a7a7a"}


# --- the model


def model_id() -> str:
    """MODEL_ID; or the first of `models` in the README.md beside this file, which publishing fills in; or the clone's."""
    here = Path(__file__).resolve().parent
    models = RepoCard.load(here / "README.md").data.get("models")
    if named := os.environ.get("MODEL_ID") or (models or [None])[0]:
        return named
    example = here.parent / "ddpm-mnist"
    if not (example / "model_index.json").is_file():
        sys.exit("app.py: which model? MODEL_ID=outputs/digits python app.py (a folder, or user/name)")
    print(f"No MODEL_ID: showing {example}. Another: MODEL_ID=outputs/digits python examples/space/app.py", flush=True)
    return str(example)


class Model:
    """A published pipeline, and what the page has to know of it.

    Attributes:
        channels, height, width: of its images.
        T: how many timesteps it was trained with.
        seconds: one evaluation of the network for one image takes here.
        variances: names that its scheduler can take: its measured or learned one only where it has that.
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
        own = [] if scheduler.variance_type.startswith("fixed") else [scheduler.variance_type]
        self.variances = list(dict.fromkeys(["fixed_small", "fixed_large", *best, *own]))
        self.own_variance = scheduler.variance_type.removesuffix("_log")  # the same numbers
        for steps in (1, min(5, self.T)):  # the first one warms up
            begun = time.monotonic()
            list(self.trajectory([0], steps))
            self.seconds = (time.monotonic() - begun) / steps
        self.evaluations = int(max(10, MAX_SECONDS / self.seconds))  # of the network, for one image, in MAX_SECONDS

    def with_variance(self, variance: str | None) -> Any:
        """The pipeline with a scheduler of its own, so that runs do not meet."""
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
        """The images while they form: (steps done, uint8 (N, H, W, C)), about FRAMES times, the last time when they are done.

        Ends early after MAX_SECONDS. Closing it, as gradio does on Stop or when the page is left, ends the sampling behind the step.
        """
        frames: queue.SimpleQueue = queue.SimpleQueue()
        closed, end = threading.Event(), time.monotonic() + MAX_SECONDS
        shown = {math.ceil(steps * (i + 1) / FRAMES) for i in range(FRAMES)}
        labels = self.labels(label, len(seeds))

        def after_step(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = closed.is_set() or time.monotonic() > end
            if i + 1 in shown or pipe._interrupt:
                levels = (tensors["latents"].clamp(-1, 1) + 1) * 127.5
                frames.put((i + 1, levels.round().byte().permute(0, 2, 3, 1).cpu().numpy()))
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
            except Exception as error:  # told where it is waited for
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
        """One class label an image, for an entry of `label_choices`."""
        if label is None or label == NO_LABEL:
            return None
        return [i % self.pipe.num_classes for i in range(n)] if label == IN_TURN else [int(label)] * n

    def label_choices(self, many: bool) -> list[str]:
        """What may be asked for, the first choice first; nothing for an unconditional model."""
        if self.pipe.num_classes is None:
            return []
        no_label = [NO_LABEL] if self.pipe.null_label is not None else []
        return [*([IN_TURN] if many else []), *no_label, *map(str, range(self.pipe.num_classes))]


# --- pictures


EMPTY = '<div class="picture empty"></div>'


def picture(images: np.ndarray, words: str) -> str:
    """Images (N, H, W, C) uint8 in about as many rows as columns, each pixel a whole number of pixels wide: as HTML, with words for who cannot
    see it. The picture is part of the text: a file that is written anew while a browser reads it would arrive cut off.
    """
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, SHOWN // (columns * max(width, height)))
    gap = 0 if n == 1 else 4
    canvas = PIL.Image.new("RGBA", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap))
    for i, image in enumerate(images):
        picture = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        picture = picture.resize((width * scale, height * scale), PIL.Image.Resampling.NEAREST)
        canvas.paste(picture, (i % columns * (width * scale + gap), i // columns * (height * scale + gap)))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return (
        f'<img class="picture" alt="{words}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def read_image(path: str, model: Model) -> tuple[np.ndarray, str]:
    """An upload as the model takes it, uint8 (H, W, C), and in words what was done to it.

    Raises:
        ValueError: with a message for whoever uploaded it.
    """
    height, width, mode = model.height, model.width, MODES[model.channels]
    try:
        with PIL.Image.open(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a telephone's JPEG with a preview
            if frames > 1:
                raise ValueError(f"It is animated, or has pages: {frames} pictures in one file. Upload one of them.")
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"It has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are read here.")
            if file.mode.startswith("I") or file.mode == "F":
                raise ValueError(f"It has more than 8 bits a pixel (mode {file.mode}). Save it with 8 bits.")
            image = PIL.ImageOps.exif_transpose(file)  # decodes it
    except ValueError:
        raise
    except PIL.Image.DecompressionBombError as bomb:
        raise ValueError(f"It is too large to be read here; at most {MAX_PIXELS:,} pixels.") from bomb
    except Exception as fault:  # PIL raises many kinds for files that are damaged
        raise ValueError("It cannot be read: no image, of a kind that is not known here, or damaged.") from fault
    if image.width < width or image.height < height:
        raise ValueError(f"It has {image.width} x {image.height} pixels; the model needs at least {width} x {height}.")
    done = []
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
        done.append("put on white")
    if image.mode != mode:
        done.append({"L": "made grey", "RGB": "made RGB", "RGBA": "made RGBA"}[mode])
        image = image.convert(mode)
    if image.size != (width, height):
        done.append(f"cropped and resized from {image.width} x {image.height}")
        image = PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, model.channels), ", ".join(done) or "as it is"


def bars(per_timestep: np.ndarray, prior: float) -> pd.DataFrame:
    """Bits/dim of ranges of timesteps, each about 1.5 times as long as the one before; they sum to the total."""
    T = len(per_timestep)
    edges = np.unique(np.geomspace(1, T, BARS + 1).round().astype(int)) if T > 1 else np.array([1])
    rows = [("0: decoder", per_timestep[0], "decoder")]
    for a, b in itertools.pairwise(edges):
        rows.append((f"{a}" if b == a + 1 else f"{a}–{b - 1}", per_timestep[a:b].sum(), "KL of the steps"))
    rows.append(("prior", prior, "prior"))
    return pd.DataFrame(rows, columns=["timesteps", "bits/dim", "part"])


# --- the page


def whole(value: Any, name: str, lowest: int, highest: int) -> int:
    """A number from a field, which may be empty."""
    if value is None or not lowest <= value <= highest:
        raise gr.Error(f"{name}: a whole number from {lowest} to {highest}, please.", print_exception=False)
    return int(value)


def build(model: Model) -> gr.Blocks:
    """The page for a model."""
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[model.channels]
    device = str(model.pipe.device).upper()
    steps_limit = min(model.T, model.evaluations)
    trio = [*model.variances[:3], ETA][:3]
    titles = ["mean only (eta = 0)" if name == ETA else name for name in trio]

    def run(seed: Any, steps: Any, images: Any, **settings: Any) -> Iterator[tuple[int, np.ndarray]]:
        """A trajectory whose faults are told to the user."""
        seeds = [whole(seed, "Seed", 0, 2**31) + i for i in range(whole(images, "Images", 1, MAX_IMAGES))]
        try:
            done, steps = 0, whole(steps, "Steps", 1, steps_limit)
            for done, frame in model.trajectory(seeds, steps, **settings):
                yield done, frame
            if done < steps:
                gr.Warning(f"Stopped at step {done} of {steps}, after {MAX_SECONDS:.0f} s. Ask for less at once.")
        except ValueError as fault:
            raise gr.Error(str(fault), print_exception=False) from fault

    def noise(variance: str, eta: float) -> dict[str, Any]:
        return {"eta": eta} if variance == ETA else {"variance": variance}

    def generate(
        seed: Any, steps: Any, images: Any, variance: str, eta: float, label: str | None = None, guidance: float = 1.0
    ) -> Iterator[tuple]:
        begun = time.monotonic()
        for done, frame in run(seed, steps, images, label=label, guidance=guidance, **noise(variance, eta)):
            yield (
                picture(frame, "Images of the model"),
                f"Step {done} of {steps}, seeds {seed} to {seed + len(frame) - 1}, {time.monotonic() - begun:.1f} s",
            )

    def compare(seed: Any, steps: Any, images: Any, label: str | None = None) -> Iterator[list]:
        pictures = [EMPTY] * 3
        for i, variance in enumerate(trio):
            for _, frame in run(seed, steps, images, label=label, **noise(variance, 0.0)):
                pictures[i] = picture(frame, f"Images by {titles[i]}")
                yield [*pictures, f"{titles[i]} ..."]
        yield [*pictures, "All three are done."]

    def shown(image: np.ndarray | None, t: int, seed: Any) -> tuple:
        """The image as the model sees it, and noised to timestep t."""
        if image is None:
            return EMPTY, EMPTY, ""
        x_0 = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean, variance = model.pipe.scheduler.forward_mean_variance(x_0, int(t))
        generator = torch.Generator().manual_seed(whole(seed, "Noise seed", 0, 2**31))
        x_t = mean + variance.sqrt() * torch.randn(x_0.shape, generator=generator)
        noised = ((x_t.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        alpha_bar = float(model.pipe.scheduler.alphas_cumprod[int(t)])
        words = f"x_t = {math.sqrt(alpha_bar):.3f} · image + {math.sqrt(1 - alpha_bar):.3f} · noise"
        return (
            picture(image[None], "The image"),
            picture(noised, f"The image at timestep {int(t)}, noise seed {seed}"),
            words,
        )

    def upload(path: str | None) -> tuple:
        if path is None:
            return None, NO_IMAGE
        try:
            image, done = read_image(path, model)
        except ValueError as fault:
            return None, f"⚠️ **This file is not used.** {fault}"
        return image, f"Your image, {done}."

    def draw(seed: Any, label: str | None = None) -> tuple:
        *_, (_, images) = run(seed, min(steps_limit, 100), 1, label=label)
        return images[0], f"A sample of the model, seed {int(seed)}."

    def measure(image: np.ndarray | None, seed: Any, evaluations: int, label: str | None = None) -> tuple:
        if image is None:
            raise gr.Error("There is no image yet: upload one, or take a sample.", print_exception=False)
        labels = model.labels(label, 1)
        try:
            result = model.with_variance(None).bits_per_dim(
                image[None],
                class_labels=labels,
                seed=whole(seed, "Noise seed", 0, 2**31),
                evaluations_per_image=int(evaluations),
                batch_size=8,
            )
        except ValueError as fault:
            raise gr.Error(str(fault), print_exception=False) from fault
        words = (
            f"### {result.total:.3f} bits/dim\n\n"
            f"| decoder | KL of the steps | prior |\n|---|---|---|\n"
            f"| {result.decoder:.3f} | {result.diffusion:.3f} | {result.prior:.3f} |\n\n"
            f"{result.total * result.dims:.0f} bits for {result.dims} numbers of 8 bits each ({8 * result.dims} bits as they are), at most: "
            "it is an upper bound."
        )
        return words, bars(result.per_timestep.numpy(), result.prior)

    def controls(steps: int, images: int) -> list[gr.components.Component]:
        """Seed, steps, images, and the label where there are labels."""
        made: list[gr.components.Component] = [
            gr.Number(0, label="Seed", precision=0, step=1),
            gr.Slider(1, steps_limit, min(steps, steps_limit), step=1, label="Steps"),
            gr.Slider(1, MAX_IMAGES, images, step=1, label="Images"),
        ]
        return made + labels(many=True)

    def labels(many: bool) -> list[gr.components.Component]:
        choices = model.label_choices(many)
        return [gr.Dropdown(choices, value=choices[0], label="Class label")] if choices else []

    network: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1}  # one user at a time computes

    with gr.Blocks(title="A DDPM, measured", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# A DDPM, measured\n\nThe model {model.name} makes {model.height} x {model.width} {kind} images in {model.T} timesteps. Here it runs on "
            f"{device}: one image in {min(50, steps_limit)} steps takes about {min(50, steps_limit) * model.seconds:.2g} s."
        )
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1, min_width=280):
                inputs = controls(50, 4)
                variance = gr.Dropdown(
                    [*model.variances, ETA],
                    value=model.own_variance,
                    label="Variance of each step",
                    info="eta replaces it by that of DDIM",
                )
                eta = gr.Slider(0, 1, 0, step=0.05, label="eta", info="0: no noise is added", visible=False)
                inputs[3:3] = [variance, eta]
                if model.pipe.null_label is not None:
                    inputs.append(gr.Slider(1, 5, 1, step=0.5, label="Guidance", info="1: off. It needs a label"))
                with gr.Row():
                    go, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            with gr.Column(scale=2, min_width=280):
                samples = gr.HTML(EMPTY, padding=False, elem_id="samples")
                progress = gr.Markdown(elem_id="progress", elem_classes="status")
        variance.change(lambda name: gr.Slider(visible=name == ETA), variance, eta, show_progress="hidden", queue=False)
        running = go.click(generate, inputs, [samples, progress], show_progress="hidden", **network)
        stop.click(None, cancels=running)

        with gr.Tab("Measure"):
            image = gr.State()
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Your image", type="filepath", height=140)
                    drawn = [gr.Number(0, label="Seed of a sample", precision=0, step=1)]
                    label = labels(many=False)
                    take = gr.Button("Take a sample of the model")
                    told = gr.Markdown(NO_IMAGE, elem_id="told", elem_classes="status")
                with gr.Column(scale=2, min_width=280):
                    with gr.Row():
                        with gr.Column(min_width=120):
                            gr.Markdown("**As the model sees it**")
                            seen = gr.HTML(EMPTY, padding=False, elem_id="seen")
                        with gr.Column(min_width=120):
                            gr.Markdown("**With noise: q(x_t | x_0)**")
                            noised = gr.HTML(EMPTY, padding=False, elem_id="noised")
                    t = gr.Slider(0, model.T - 1, model.T // 4, step=1, label="Timestep t")
                    formula = gr.Markdown(elem_classes="status")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    seed = gr.Number(0, label="Noise seed", precision=0, step=1)
                    most = max(2, min(200, model.T, model.evaluations // 2))
                    evaluations = gr.Slider(
                        2,
                        most,
                        min(38, most),
                        step=1,
                        label="Network evaluations",
                        info="more: less noise in the number",
                    )
                    button = gr.Button("Measure bits/dim", variant="primary")
                    number = gr.Markdown(elem_id="bits")
                with gr.Column(scale=2, min_width=280):
                    plot = gr.BarPlot(
                        x="timesteps",
                        y="bits/dim",
                        color="part",
                        color_map=COLOURS,
                        sort=list(bars(np.zeros(model.T), 0.0)["timesteps"]),
                        label="Where the bits are",
                        colors_in_legend=[],
                        x_title="timesteps of a bar",
                        x_label_angle=-45,
                        tooltip="all",
                        height=320,
                    )
        hidden: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "queue": False}
        views = ([image, t, seed], [seen, noised, formula])
        file.change(upload, file, [image, told], show_progress="hidden").then(shown, *views, **hidden)
        take.click(draw, [*drawn, *label], [image, told], **network).then(shown, *views, **hidden)
        gr.on([t.change, seed.change], shown, *views, **hidden)  # one event: answers cannot overtake each other
        button.click(measure, [image, seed, evaluations, *label], [number, plot], **network)

        with gr.Tab("Compare"):
            gr.Markdown(
                "The same network, the same noise: only the variance of each reverse step differs. Take few steps to see it matter."
            )
            with gr.Row():
                choices = controls(min(25, model.T), 4)
            with gr.Row():
                start, halt = gr.Button("Compare", variant="primary"), gr.Button("Stop")
            with gr.Row():
                panels = []
                for i, name in enumerate(titles):
                    with gr.Column(min_width=220):
                        gr.Markdown(f"**{name}**")
                        panels.append(gr.HTML(EMPTY, padding=False, elem_id=f"panel-{i}"))
            state = gr.Markdown(elem_classes="status")
        comparing = start.click(compare, choices, [*panels, state], show_progress="hidden", **network)
        halt.click(None, cancels=comparing)
    return page


CSS = """
.picture { display: block; width: 100%; max-width: 512px; image-rendering: pixelated }
.picture.empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary) }
.status { min-height: 1.6em }
"""


def main() -> None:
    name = model_id()
    try:
        model = Model(name)
    except (OSError, ValueError) as fault:
        missing = "" if Path(name).is_dir() else "it is no folder here, and no repository by that name could be read: "
        sys.exit(f"app.py: {name} cannot be loaded: {missing}{' '.join(str(fault).split())}")
    page = build(model).queue(max_size=20)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none fetched
    page.launch(
        inbrowser=bool(os.environ.get("OPEN_BROWSER")),
        share=False,
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        footer_links=[],
        theme=plain,
        css=CSS,
    )


if __name__ == "__main__":
    main()
