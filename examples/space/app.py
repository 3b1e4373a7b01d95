"""A demo of a DDPM: images as they form, an image under noise, its bits/dim, other variances.

    python examples/space/app.py                              # in a clone: the models in it
    MODEL_ID=outputs/digits python examples/space/app.py      # a folder, or a Hub repository
    MODEL_ID=user/one,user/two python examples/space/app.py   # several: a menu switches

On the Hub the models are those that the metadata of the Space's README.md name. They are loaded as
anybody would load them: by diffusers, with the code in the model's own repository. Sampling stops
after MAX_SECONDS (an environment variable, 60 by default), and the controls end where this machine
would need longer.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import base64
import hashlib
import html
import io
import itertools
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import diffusers
import gradio as gr
import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub import RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

MAX_SECONDS = float(os.environ.get("MAX_SECONDS", 60))  # per click
STEPS = 50  # unless the model's evaluation or this machine's speed says otherwise
MAX_IMAGES = 8
MAX_ROWS = 12  # classes shown in rows
MAX_FILE_SIZE = "10mb"
MAX_PIXELS = 40_000_000  # of an upload
FRAMES = 24  # shown per trajectory
PICTURE_SIZE = 512  # pixels that a picture is enlarged to, by whole factors
SQUARE = 8  # pixels of a checkerboard's square
BARS = 10  # ranges of timesteps
NOISES = 8  # draws of noise that an image is measured with: their spread is the error
MAX_SEED = 2**31
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MODE_NAMES = {1: "grey", 3: "RGB", 4: "RGBA"}
ETA, FEWEST = "eta (DDIM)", "fewest steps at equal quality"
VARIANCES = {  # what the variance of a step is, in words
    "fixed_small": "right if all images were the same",
    "fixed_large": "right if images were noise",
    "learned": "predicted for each pixel",
    "learned_range": "predicted for each pixel",
    "optimal": "measured for this network",
    ETA: "0 adds no noise",
}
ROWS, IN_TURN, NO_LABEL = "a row of each", "each in turn", "no label"
NO_IMAGE = "Upload an image, or take a sample."
COLOURS = {"decoder": "#e07b39", "KL of the steps": "#3b78b5", "prior": "#7a7a7a"}
HEAT = ("#000004", "#b73779", "#fcfdbf")  # no bits, half, most


# --- the models


def model_ids() -> list[str]:
    """Those of MODEL_ID, or `models` in the README.md here, or the clone's models."""
    here = Path(__file__).resolve().parent
    named = [name.strip() for name in os.environ.get("MODEL_ID", "").split(",") if name.strip()]
    if named := named or RepoCard.load(here / "README.md").data.get("models") or []:
        return list(dict.fromkeys(named))
    examples = sorted(str(path.parent) for path in here.parent.glob("ddpm-*/model_index.json"))
    if not examples:
        sys.exit("app.py: which model? MODEL_ID=outputs/digits python app.py (a folder, or user/name)")
    print(
        f"No MODEL_ID: showing {', '.join(examples)}. Another: MODEL_ID=outputs/digits python examples/space/app.py",
        flush=True,
    )
    return examples


def short_name(model: str) -> str:
    """A folder's name, or a repository's id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def read_evaluation(model: str) -> dict[str, Any]:
    """evaluation.json of a folder or a repository; empty if there is none, or of other weights."""
    try:
        path = Path(model) / "evaluation.json" if Path(model).is_dir() else hf_hub_download(model, "evaluation.json")
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, EntryNotFoundError):
        return {}
    digest = hashlib.sha256()
    for file in sorted(Path(path).parent.glob("unet/*.safetensors")):  # the pipeline has downloaded them
        digest.update(file.read_bytes())
    return evaluation if evaluation.get("weights") in (None, digest.hexdigest()) else {}


class Interrupted(Exception):
    """Ends the sampling from a callback."""


class Model:
    """A published pipeline, and what the page needs to know about it.

    Attributes:
        channels, height, width: of its images.
        T: number of training timesteps.
        evaluation: what its evaluation.json says; may be empty.
        held_out: its headline, or the row of its results for the model as it is in all T steps;
            None if there is neither.
        fewest: how to sample with the fewest steps at equal quality, of the evaluation; None if
            that is not known, or needs what the scheduler does not have.
        class_names: of a class-conditional model; else empty.
        seconds: per network evaluation for one image, on this machine.
        evaluations: network evaluations for one image in MAX_SECONDS.
        variances: variance types that it supports; "optimal" only if it was measured.
        default_variance: the one that it was published with.
    """

    def __init__(self, model: str) -> None:
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(model, custom_pipeline=model, trust_remote_code=True)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        config, scheduler = self.pipe.unet.config, self.pipe.scheduler
        size = config.sample_size
        self.channels = config.in_channels
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if self.channels not in MODES:
            raise ValueError(f"{model} makes images of {self.channels} channels; this demo shows 1, 3 or 4")
        self.T = len(scheduler)
        self.name = short_name(model) if Path(model).is_dir() else f"[{model}](https://huggingface.co/{model})"
        self.evaluation = read_evaluation(model)
        as_it_is = {"variance_type": scheduler.variance_type, "num_inference_steps": self.T}
        results = [self.evaluation.get("headline") or {}, *(self.evaluation.get("results") or [])]
        self.held_out = next((row for row in results if as_it_is.items() <= row.items()), None)
        fewest = self.evaluation.get("fewest_steps")
        lacking = [name for name in (fewest or {}).get("needs", []) if getattr(scheduler, name, None) is None]
        self.fewest = None if lacking else fewest
        names = (self.pipe.unet.config.get("_ddpm_notes") or {}).get("class_names")
        self.class_names = list(map(str, names or range(self.pipe.num_classes or 0)))
        best = ["optimal"] if scheduler.original_sample_mse is not None else []
        learned = [] if scheduler.variance_type.startswith("fixed") else [scheduler.variance_type]
        self.variances = list(dict.fromkeys(["fixed_small", "fixed_large", *best, *learned]))
        self.default_variance = scheduler.variance_type.removesuffix("_log")  # the same values
        for steps in (1, min(5, self.T)):  # the first pass warms up
            started = time.monotonic()
            list(self.trajectory([0], steps, label="0" if self.class_names else None))
            self.seconds = (time.monotonic() - started) / steps
        self.evaluations = int(max(10, MAX_SECONDS / self.seconds))

    def with_variance(self, variance: str | None) -> Any:
        """The pipeline with a separate scheduler, so that concurrent runs do not interfere.

        Args:
            variance: one of `variances`; FEWEST: the scheduler of `fewest`; else as published.
        """
        kind, settings = type(self.pipe.scheduler), {}
        if variance == FEWEST:
            settings = self.fewest["scheduler_settings"]
            kind = getattr(diffusers, self.fewest["scheduler"], kind)  # ours is not in diffusers
        elif variance in self.variances:
            settings = {"variance_type": variance}
        pipe = type(self.pipe)(self.pipe.unet, kind.from_config(self.pipe.scheduler.config, **settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def path(self, variance: str | None, steps: int) -> dict[str, Any]:
        """The timesteps of a path, as a pipeline takes them."""
        known = self.fewest.get("timesteps") if variance == FEWEST else None
        return {"timesteps": known} if known and len(known) == steps else {"num_inference_steps": steps}

    def trajectory(
        self,
        seeds: list[int],
        steps: int,
        variance: str | None = None,
        eta: float = 0.0,
        label: str | None = None,
        guidance: float = 1.0,
        share: float = 1.0,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (steps done, images) about FRAMES times; images are uint8 (N, H, W, C).

        The last frame is the finished one, or the current one after a share of MAX_SECONDS. Closing
        the generator, as gradio does on Stop and when the page is left, ends the sampling after the
        current step.
        """
        frames: queue.SimpleQueue = queue.SimpleQueue()
        closed, end = threading.Event(), time.monotonic() + share * MAX_SECONDS
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
            ended: Exception | None = None
            try:
                self.with_variance(variance)(
                    batch_size=len(seeds),
                    **self.path(variance, steps),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    eta=eta if variance == ETA else None,
                    class_labels=labels,
                    guidance_scale=guidance if labels is not None else 1.0,
                    callback_on_step_end=after_step,
                    output_type="latent",
                )
            except Interrupted:
                pass
            except Exception as error:  # raised below, in the thread that waits
                ended = error
            frames.put(ended)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while isinstance(frame := frames.get(), tuple):
                yield frame
            if frame is not None:
                raise frame
        finally:
            closed.set()
            thread.join()

    def labels(self, label: str | None, n: int) -> list[int] | None:
        """One class label per image, for an entry of a label menu."""
        if label is None or label == NO_LABEL:
            return None
        if label == ROWS:
            return [i * self.rows(label) // n for i in range(n)]
        return [i % len(self.class_names) for i in range(n)] if label == IN_TURN else [int(label)] * n

    def rows(self, label: str | None) -> int:
        """Number of rows of images, each of a class."""
        return min(len(self.class_names), MAX_ROWS) if label == ROWS else 1

    def label_choices(self, *first: str) -> list[tuple[str, str]]:
        """(name, value) of a label menu, the default first; empty for an unconditional model."""
        if not self.class_names:
            return []
        no_label = [NO_LABEL] if self.pipe.null_label is not None else []
        return [
            *((name, name) for name in [*first, *no_label]),
            *((name, str(i)) for i, name in enumerate(self.class_names)),
        ]


# --- pictures


EMPTY = '<div class="picture empty"></div>'


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(images: np.ndarray, alt: str, columns: int | None = None) -> str:
    """Images, uint8 (N, H, W, C), as an HTML picture: a grid, enlarged by a whole factor.

    Transparent images are put over a checkerboard. The data are inline: a browser could read a file
    that is rewritten meanwhile only in part.
    """
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, PICTURE_SIZE // (columns * max(width, height)))
    gap = 0 if n == 1 else 4
    canvas = PIL.Image.new("RGBA", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap))
    for i, image in enumerate(images):
        tile = PIL.Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        tile = tile.resize((width * scale, height * scale), PIL.Image.Resampling.NEAREST)
        tile = over_checkerboard(tile) if channels == 4 else tile
        canvas.paste(tile, (i % columns * (width * scale + gap), i // columns * (height * scale + gap)))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="picture" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def over_checkerboard(image: PIL.Image.Image) -> PIL.Image.Image:
    y, x = np.indices((image.height, image.width)) // SQUARE
    board = np.where((x + y) % 2, 170, 230).astype(np.uint8)
    return PIL.Image.alpha_composite(PIL.Image.fromarray(board).convert("RGBA"), image)


def class_rows(images: np.ndarray, names: Sequence[str]) -> str:
    """Images (rows * columns, H, W, C), a row of each class beside its name."""
    rows = zip(names, np.split(images, len(names)), strict=True)
    cells = [f"<b>{html.escape(name)}</b>{picture(row, f'Images of {name}', len(row))}" for name, row in rows]
    return f'<div class="rows">{"".join(cells)}</div>'


def bits_map(image: np.ndarray, bits: np.ndarray) -> str:
    """An image (H, W, C) beside the bits of each pixel (H, W), in colours, with their scale."""
    top = max(float(np.quantile(bits, 0.995)), 1e-9)
    levels = PIL.Image.fromarray((bits / top * 255).clip(0, 255).astype(np.uint8))
    colours = np.array(PIL.ImageOps.colorize(levels, HEAT[0], HEAT[2], mid=HEAT[1]))
    return (
        f'<div class="map">{picture(image[None], "The image that was measured")}'
        f"{picture(colours[None], 'Bits of each pixel')}</div>"
        f'<div class="scale">0<span style="background: linear-gradient(90deg, {", ".join(HEAT)})"></span>'
        f"{top:.3g} bits or more a pixel</div>"
    )


def yardstick_table(result: Any, model: Model) -> str:
    """Bars of bits/dim: the image's, and the model's and simple codes' for held-out images."""
    entries = {name: (bits, 0.0) for name, bits in (model.evaluation.get("yardsticks") or {}).items()}
    if model.held_out:
        entries["held-out images, this model"] = model.held_out["total"], model.held_out["standard_error"]
    if not entries:
        return ""
    own = "this image, this model"
    entries[own] = result.total, result.standard_error
    longest = max(bits for bits, _ in entries.values())
    rows = [
        f'<tr class="{"own" if name == own else ""}"><th>{html.escape(name)}</th>'
        f"<td>{bits:.3f}{f' ± {error:.3f}' if error else ''}</td>"
        f'<td><div class="bar" style="width: {100 * bits / longest:.1f}%"></div></td></tr>'
        for name, (bits, error) in sorted(entries.items(), key=lambda entry: entry[1])
    ]
    measured = model.evaluation | {"images": (model.evaluation.get("headline") or model.evaluation)["images"]}
    images = "{images} held-out images of {data}, split {split}".format(**measured)
    caption = f"bits/dim: lower is better. Every row but this image's is a mean over {images}."
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(rows)}</table>"


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
    return without_hidden_colours(pixels), ", ".join(done) or "as it is"


def without_hidden_colours(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C) whose colours are 0 where its alpha is, as in the training data."""
    return image * (image[..., 3:] > 0) if image.shape[-1] == 4 else image


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
        raise ValueError("It cannot be read: it is not an image, its format is unknown, or it is damaged.") from error


def bars(per_timestep: np.ndarray, prior: float) -> pd.DataFrame:
    """Bits/dim by range of timesteps, each about 1.5 times the previous; the sum is the total."""
    T = len(per_timestep)
    edges = np.unique(np.geomspace(1, T, BARS + 1).round().astype(int)) if T > 1 else np.array([1])
    rows = [("0: decoder", per_timestep[0], "decoder")]
    for a, b in itertools.pairwise(edges):
        rows.append((f"{a}" if b == a + 1 else f"{a}–{b - 1}", per_timestep[a:b].sum(), "KL of the steps"))
    rows.append(("prior", prior, "prior"))
    return pd.DataFrame(rows, columns=["timesteps", "bits/dim", "part"])


# --- what the controls do


def checked(seed: int | None, name: str = "Seed") -> int:
    """A seed's field may be empty, or out of range."""
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise gr.Error(f"{name} must be a whole number from 0 to {MAX_SEED}.", print_exception=False)
    return int(seed)


def seeds_text(seed: int, images: int) -> str:
    return f"seed {seed}" if images == 1 else f"seeds {seed} to {seed + images - 1}"


def last(frames: Iterator[Any]) -> Any:
    *_, frame = frames
    return frame


class Demo:
    """What the controls of the page do, for one model.

    Attributes:
        steps_limit, evaluations_limit: what this machine can do in time.
        steps, variance, images, compare_steps, compare_images, timestep, evaluations: the defaults
            of the controls.
        compared: the variances of the Compare tab.
        samples, measured, comparison: what the tabs open with, made once in the background: a
            future each, of what the tab's button returns with the defaults of the controls.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.steps_limit = min(model.T, model.evaluations)
        self.steps = min(model.fewest["num_inference_steps"] if model.fewest else STEPS, self.steps_limit)
        self.variance = FEWEST if model.fewest else model.default_variance
        self.generate_labels = model.label_choices(ROWS)
        self.measure_labels = model.label_choices()
        self.compare_labels = model.label_choices(IN_TURN)
        rows = model.rows(first_value(self.generate_labels))
        affordable = int(model.evaluations / 2 / self.steps / rows)  # in half of MAX_SECONDS
        self.images = max(1, min(MAX_IMAGES // 2 if rows > 1 else MAX_IMAGES, affordable))
        self.compared = [*model.variances[:3], ETA][:3]
        self.compare_steps = max(1, min(25, self.steps_limit // 3))
        self.compare_images = min(4, self.images)
        self.timestep = model.T // 4
        self.evaluations_limit = max(2 * NOISES, min(400, NOISES * model.T, model.evaluations // 2))
        self.evaluations = min(5 * NOISES, self.evaluations_limit)
        self.samples, self.measured, self.comparison = Future(), Future(), Future()
        threading.Thread(target=self.open_tabs, daemon=True).start()  # not an executor's: ctrl-C would wait for it

    # -- what the tabs open with

    def open_tabs(self) -> None:
        for opening, make in (
            (self.samples, self.open_samples),
            (self.measured, self.open_measured),
            (self.comparison, self.open_comparison),
        ):
            try:
                opening.set_result(make())
            except Exception as error:  # raised where a page opens
                opening.set_exception(error)

    def noise_picture(self) -> str:
        """x_T of the first seeds: what is shown until `samples` is there."""
        shape = (1, self.model.channels, self.model.height, self.model.width)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(self.images)]
        return picture(to_uint8(torch.cat(noise)), "Noise, from which images form")

    def open_samples(self) -> tuple[str, str]:
        label = first_value(self.generate_labels)
        return last(self.generate(0, self.steps, self.images, self.variance, 0.0, label))

    def open_measured(self) -> tuple:
        """A sample, its message, its `views`, and what `measure` says of it."""
        label = first_value(self.measure_labels)
        image, message = self.sample(0, label)
        return image, message, *self.views(image, self.timestep, 0), *self.measure(image, 0, self.evaluations, label)

    def open_comparison(self) -> list[str]:
        return last(self.compare(0, self.compare_steps, self.compare_images, first_value(self.compare_labels)))

    # -- what the buttons do

    def trajectory(
        self, seed: int | None, steps: int, images: int, label: str | None, **settings: Any
    ) -> Iterator[tuple[int, np.ndarray]]:
        """`Model.trajectory` of images for each row; its errors are shown to the user."""
        first, done = checked(seed), 0
        seeds = [first + i for i in range(images)] * self.model.rows(label)
        try:
            for done, frame in self.model.trajectory(seeds, steps, label=label, **settings):
                yield done, frame
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if done < steps:
            gr.Warning(f"Out of time at step {done} of {steps}. Ask for fewer steps or images.")

    def generate(
        self,
        seed: int | None,
        steps: int,
        images: int,
        variance: str,
        eta: float,
        label: str | None = None,
        guidance: float = 1.0,
    ) -> Iterator[tuple[str, str]]:
        """Yields (picture, progress); the picture in rows if the label asks for them."""
        started, names = time.monotonic(), self.model.class_names[: self.model.rows(label)]
        settings = {"variance": variance, "eta": eta, "guidance": guidance}
        for done, frame in self.trajectory(seed, steps, images, label, **settings):
            shown = class_rows(frame, names) if label == ROWS else picture(frame, "Images of the model")
            seconds = time.monotonic() - started
            yield shown, f"Step {done} of {steps}, {seeds_text(seed, images)}, {seconds:.1f} s"

    def compare(self, seed: int | None, steps: int, images: int, label: str | None = None) -> Iterator[list[str]]:
        """Yields three pictures and the progress."""
        pictures, complete = [self.noise_picture()] * len(self.compared), True
        for i, variance in enumerate(self.compared):
            settings = {"variance": variance, "share": 1 / len(self.compared)}
            for done, frame in self.trajectory(seed, steps, images, label, **settings):
                pictures[i] = picture(frame, f"Images by {variance}")
                yield [*pictures, f"{variance}: step {done} of {steps}"]
            complete = complete and done == steps
        end = "All three are done" if complete else "Out of time before the last step"
        yield [*pictures, f"{end}, {seeds_text(seed, images)}."]

    def views(self, image: np.ndarray | None, t: int, seed: int | None) -> tuple[str, str, str]:
        """The image as the model sees it, the image at timestep t, and the formula for that."""
        if image is None:
            return EMPTY, EMPTY, ""
        scheduler = self.model.pipe.scheduler
        x_0 = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        mean, variance = scheduler.forward_mean_variance(x_0, t)
        generator = torch.Generator().manual_seed(checked(seed, "Noise seed"))
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

    def sample(self, seed: int | None, label: str | None = None) -> tuple[np.ndarray, str]:
        """One sample of the model, as the Generate tab makes it by default, and a message."""
        _, images = last(self.trajectory(seed, self.steps, 1, label, variance=self.variance))
        return without_hidden_colours(images[0]), f"A sample of the model, {seeds_text(seed, 1)}."

    def measure(
        self, image: np.ndarray | None, seed: int | None, evaluations: int, label: str | None = None
    ) -> tuple[str, str, str, pd.DataFrame | None]:
        """The image's bits/dim as Markdown, the yardsticks beside them, its map, the plot's bars.

        It is measured as NOISES images, each with noise of its own: so the mean has an error.
        """
        if image is None:
            return NO_IMAGE, "", "", None
        try:
            result = self.model.with_variance(None).bits_per_dim(
                np.repeat(image[None], NOISES, axis=0),
                class_labels=self.model.labels(label, 1),
                seed=checked(seed, "Noise seed"),
                evaluations_per_image=evaluations // NOISES,
                pilot_images=image[None],
                batch_size=NOISES,
                return_map=True,
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        text = (
            f"### {result.total:.3f} ± {result.standard_error:.3f} bits/dim\n\n"
            f"{result.total * result.dims:.0f} bits are enough to store this image. Uncompressed it takes "
            f"{8 * result.dims}: {result.dims} values of 8 bits. (An upper bound: the model may need fewer. ± is the "
            f"standard error over {NOISES} draws of noise.)\n\n"
            f"| decoder | KL of the steps | prior |\n|---|---|---|\n"
            f"| {result.decoder:.3f} | {result.diffusion:.3f} | {result.prior:.3f} |\n\n"
            "The prior is the cost of the noise that sampling starts from, the KL divergences are the cost of its "
            "steps, and the decoder is the cost of the pixels after the last step."
        )
        pixels = bits_map(image, result.maps.sum(1).mean(0).numpy())
        return text, yardstick_table(result, self.model), pixels, bars(result.per_timestep.numpy(), result.prior)


def first_value(choices: list[tuple[str, str]]) -> str | None:
    """The default of a label menu."""
    return choices[0][1] if choices else None


# --- the page


LOADING = threading.Lock()
DEMOS: dict[str, Demo] = {}


def load(model: str) -> Demo:
    """The demo of a model, loaded when it is first asked for."""
    with LOADING:
        if model not in DEMOS:
            DEMOS[model] = Demo(Model(model))
        return DEMOS[model]


def build(models: list[str]) -> gr.Blocks:
    """The page; with a menu if there are several models."""
    with gr.Blocks(title="A DDPM, measured", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# A DDPM, measured")
        if len(models) == 1:
            model_tabs(page, load(models[0]))
            return page
        menu = gr.Dropdown([(short_name(model), model) for model in models], value=models[0], label="Model")
        for model in models:
            show_if_chosen(page, menu, model)
    return page


def show_if_chosen(page: gr.Blocks, menu: gr.Dropdown, model: str) -> None:
    """A part of the page that is empty unless the menu says `model`.

    Each model has its own: Gradio keeps the tabs of a part that is rendered again hidden.
    """

    @gr.render(inputs=menu)
    def show(chosen: str) -> None:
        if chosen != model:
            return
        try:
            demo = load(model)
        except (OSError, ValueError) as error:
            gr.Markdown(f"⚠️ {cannot_load(model, error)}")
        else:
            model_tabs(page, demo)


NETWORK: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1}  # one visitor at a time computes
OPENING: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}  # visitors wait for the same results
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def run_on_click(start: gr.Button, stop: gr.Button, run: Any, inputs: list, outputs: list, opening: Any) -> None:
    """A button runs a generator, another one stops it. The last output says how far it is."""
    progress = outputs[-1]
    waiting = start.click(lambda: "Waiting for the first step ...", None, progress, cancels=opening, **AT_ONCE)
    running = waiting.then(run, inputs, outputs, show_progress="hidden", **NETWORK)
    running.failure(lambda: "Stopped.", None, progress, **AT_ONCE)
    stop.click(lambda: "Stopped.", None, progress, cancels=[opening, running], **AT_ONCE)


def model_tabs(page: gr.Blocks, demo: Demo) -> None:
    """The page of one model. Controls are said to be interactive: `gr.render` does not see it."""
    model, steps = demo.model, demo.steps
    classes = f" of {len(model.class_names)} classes" if model.class_names else ""
    transparent = " Transparency is shown as a checkerboard." if model.channels == 4 else ""
    gr.Markdown(
        f"A denoising diffusion model makes images from noise, step by step. {model.name} makes {model.height} x "
        f"{model.width} {MODE_NAMES[model.channels]} images{classes} and was trained with {model.T} timesteps. On this "
        f"{str(model.pipe.device).upper()} one image in {steps} steps takes about {steps * model.seconds:.2g} s."
        + transparent
    )
    with gr.Tab("Generate"), gr.Row():
        generate_tab(page, demo)
    with gr.Tab("Measure"):
        measure_tab(page, demo)
    with gr.Tab("Compare"):
        compare_tab(page, demo)


def seed_field(label: str = "Seed") -> gr.Number:
    return gr.Number(0, label=label, precision=0, step=1, interactive=True)


def slider(low: int, high: int, value: int, label: str, step: int = 1, info: str | None = None) -> gr.Slider:
    """A slider of whole numbers."""
    return gr.Slider(low, high, value, step=step, precision=0, label=label, info=info, interactive=True)


def sampling_controls(demo: Demo, steps: int, images: int) -> list[gr.components.Component]:
    return [
        seed_field(),
        slider(1, demo.steps_limit, steps, "Steps"),
        slider(1, MAX_IMAGES, images, "Images"),
    ]


def label_menu(choices: list[tuple[str, str]]) -> list[gr.components.Component]:
    return [gr.Dropdown(choices, label="Class label", interactive=True)] if choices else []


def generate_tab(page: gr.Blocks, demo: Demo) -> None:
    model = demo.model
    with gr.Column(scale=2, min_width=280):  # first: a phone shows it above the controls
        samples = gr.HTML(demo.noise_picture(), elem_id="samples")
        progress = gr.Markdown("The first images are being made ...", elem_id="progress", elem_classes="status")
    with gr.Column(scale=1, min_width=280):
        inputs = sampling_controls(demo, demo.steps, demo.images)
        variance = gr.Dropdown(
            [*([FEWEST] if model.fewest else []), *((f"{v}: {VARIANCES[v]}", v) for v in [*model.variances, ETA])],
            value=demo.variance,
            label="Variance of each step",
            info=fewest_text(model.fewest),
            interactive=True,
        )
        eta = gr.Slider(0, 1, 0, step=0.05, label="eta", info="1: fixed_small", visible=False, interactive=True)
        inputs += [variance, eta, *label_menu(demo.generate_labels)]
        if model.pipe.null_label is not None:
            inputs.append(
                gr.Slider(1, 5, 1, step=0.5, label="Guidance", info="1: off. Needs a label", interactive=True)
            )
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
    variance.change(lambda name: gr.Slider(visible=name == ETA), variance, eta, **AT_ONCE)
    opening = page.load(demo.samples.result, None, [samples, progress], **OPENING)
    run_on_click(start, stop, demo.generate, inputs, [samples, progress], opening)


def fewest_text(fewest: dict[str, Any] | None) -> str | None:
    """What `FEWEST` stands for."""
    if fewest is None:
        return None
    return (
        "Fewest steps: {num_inference_steps} {path} steps of {name} are no worse than {reference_steps} of fixed_large, "
        "by kernel distance"
    ).format(**fewest)


def measure_tab(page: gr.Blocks, demo: Demo) -> None:
    image = gr.State()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            t, views = noise_views(demo)
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Your image", type="filepath", height=140, interactive=True)
            sample_seed = seed_field("Seed of a sample")
            label = label_menu(demo.measure_labels)
            take_sample = gr.Button("Take a sample of the model")
            message = gr.Markdown(NO_IMAGE, elem_id="told", elem_classes="status")
            seed = seed_field("Noise seed")
            low, high, info = 2 * NOISES, demo.evaluations_limit, "more: a smaller error, a longer wait"
            evaluations = slider(low, high, demo.evaluations, "Network evaluations", NOISES, info)
            start = gr.Button("Measure bits/dim", variant="primary")
    with gr.Row():
        with gr.Column(min_width=280):
            number = gr.Markdown("The first image is being measured ...", elem_id="bits")
            pixels = gr.HTML(elem_id="map")
        with gr.Column(min_width=280):
            yardsticks = gr.HTML(elem_id="yardsticks")
            plot = bar_plot(demo)
    settings, figures = [image, seed, evaluations, *label], [number, yardsticks, pixels, plot]
    show_views = {"fn": demo.views, "inputs": [image, t, seed], "outputs": views, "trigger_mode": "always_last"}
    opening = page.load(demo.measured.result, None, [image, message, *views, *figures], **OPENING)
    uploaded = file.change(demo.upload, file, [image, message], cancels=opening, show_progress="hidden")
    waiting = take_sample.click(lambda: "A sample is on its way ...", None, message, cancels=opening, **AT_ONCE)
    sampled = waiting.then(demo.sample, [sample_seed, *label], [image, message], show_progress="hidden", **NETWORK)
    sampled.failure(lambda: "There is no sample.", None, message, **AT_ONCE)
    for new in (uploaded, sampled):
        new.success(**show_views, **AT_ONCE).then(demo.measure, settings, figures, **NETWORK)
    gr.on([t.change, seed.change], **show_views, **AT_ONCE)  # one event: responses stay in order
    start.click(demo.measure, settings, figures, **NETWORK)


def noise_views(demo: Demo) -> tuple[gr.Slider, list[gr.components.Component]]:
    """The timestep's slider, and where `Demo.views` goes."""
    with gr.Row():
        with gr.Column(min_width=120):
            gr.Markdown("**As the model sees it**")
            seen = gr.HTML(demo.noise_picture(), elem_id="seen")
        with gr.Column(min_width=120):
            gr.Markdown("**With noise, at timestep t**")
            noised = gr.HTML(demo.noise_picture(), elem_id="noised")
    t = slider(0, demo.model.T - 1, demo.timestep, "Timestep t")
    return t, [seen, noised, gr.Markdown(elem_classes="status")]


def bar_plot(demo: Demo) -> gr.BarPlot:
    return gr.BarPlot(
        x="timesteps",
        y="bits/dim",
        color="part",
        color_map=COLOURS,
        sort=list(bars(np.zeros(demo.model.T), 0.0)["timesteps"]),
        label="Where the bits are: an estimate, better with more network evaluations",
        colors_in_legend=[],
        x_title="timesteps of a bar",
        x_label_angle=-45,
        tooltip="all",
        height=320,
    )


def compare_tab(page: gr.Blocks, demo: Demo) -> None:
    gr.Markdown(
        "The same network, the same noise: only the variance of each reverse step differs. "
        "The fewer the steps, the more it matters."
    )
    panels = []
    with gr.Row():
        for i, variance in enumerate(demo.compared):
            with gr.Column(min_width=220):
                gr.Markdown(f"**{variance}**: {VARIANCES[variance]}")
                panels.append(gr.HTML(demo.noise_picture(), elem_id=f"panel-{i}"))
    progress = gr.Markdown("The first comparison is being made ...", elem_id="compared", elem_classes="status")
    with gr.Row():
        inputs = sampling_controls(demo, demo.compare_steps, demo.compare_images) + label_menu(demo.compare_labels)
    with gr.Row():
        start, stop = gr.Button("Compare", variant="primary"), gr.Button("Stop")
    opening = page.load(demo.comparison.result, None, [*panels, progress], **OPENING)
    run_on_click(start, stop, demo.compare, inputs, [*panels, progress], opening)


CSS = """
.gradio-container .block .html-container { padding: 0 }
.picture { display: block; width: 100%; max-width: 512px; image-rendering: pixelated }
.picture.empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary) }
.status { min-height: 1.6em }
.rows { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; align-items: center }
.rows .picture { width: auto; max-width: 100%; max-height: 64px }
.map { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; max-width: 640px }
.scale { display: flex; gap: 8px; align-items: center; max-width: 640px; padding-top: 8px }
.scale span { flex: 1; height: 12px }
#yardsticks table { width: 100% }
#yardsticks caption { caption-side: bottom; text-align: left; font-size: 0.9em; padding-top: 4px }
#yardsticks :is(table, tr) { border: none }
#yardsticks :is(th, td) { border: none; padding: 2px 12px 2px 0; text-align: left; font-weight: normal }
#yardsticks td { white-space: nowrap }
#yardsticks td:last-child { width: 40% }
#yardsticks .own :is(th, td) { font-weight: bold }
#yardsticks .bar { height: 10px; min-width: 1px; background: #3b78b5 }
#yardsticks .own .bar { background: #e07b39 }
"""


def cannot_load(model: str, error: Exception) -> str:
    missing = "" if Path(model).is_dir() else "it is not a local folder, and no repository of that name can be read: "
    return f"{model} cannot be loaded: {missing}{' '.join(str(error).split())}"


def main() -> None:
    models = model_ids()
    try:
        load(models[0])
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {cannot_load(models[0], error)}")
    page = build(models).queue(max_size=20)
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
