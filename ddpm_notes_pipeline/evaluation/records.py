"""What was measured and how a model was trained, as dataclasses, and their JSON.

The formats of evaluation.json (`Evaluation`), training_run.json (`TrainingRecord`) and the rows of
metrics.jsonl (`figures_of`) are those of the fields here. `from_dict` reads files of any version:
unknown keys are ignored, and missing ones take their default.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

Key = tuple[str, str, int]  # what makes the samples, path, number of steps
Estimate = tuple[float, float]  # value, standard error


def of_classes(classes: Sequence[str] | None) -> str:
    """Which classes images are of, as words after their name; empty for all."""
    return "" if classes is None else f", classes {', '.join(classes)}"


def nan_to_null(value: Any) -> Any:
    """The same with None in the place of nan, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: nan_to_null(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Record:
    """A dataclass as a dictionary for JSON, and back.

    Attributes:
        OPTIONAL: fields that the dictionary has only if they differ from their default.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in names})

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)  # type: ignore[call-overload]
        for f in fields(self):  # type: ignore[arg-type]
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name in self.OPTIONAL and values[f.name] == default:
                del values[f.name]
        return values


class JSONFile(Record):
    """A record that is kept in the file `FILE` of a model's folder."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None where there is no file."""
        path = folder / cls.FILE
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def write(self, folder: Path) -> None:
        text = json.dumps(nan_to_null(self.as_dict()), indent=2)
        (folder / self.FILE).write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------ bits/dim


@dataclass(frozen=True, kw_only=True)
class BoundRecord(Record):
    """bits/dim of one variance and path: a row of `results` in evaluation.json.

    Attributes:
        variance_type, path, num_inference_steps: variance, "even" or "best", number of steps K.
        decoder_type: "own", the variance type's; "fitted", a Gaussian of fitted variance; "levels",
            the probability of each pixel's level (core/levels.py).
        decoder_variance: of a Gaussian p(x_0 | x_t) at the end of the path; None: the network's
            own, or no Gaussian.
        total, standard_error: the bound in bits/dim, and its standard error over the images; nan
            for a single one.
        prior, diffusion, decoder, standard_errors: its parts, and their standard errors by name.
        network_evaluations: images that the network was evaluated on, in all.
    """

    variance_type: str
    path: str
    num_inference_steps: int
    decoder_type: str = "own"
    decoder_variance: float | None = None
    total: float
    standard_error: float
    prior: float
    diffusion: float
    decoder: float
    standard_errors: dict[str, float]
    network_evaluations: int | None = None

    OPTIONAL = ("decoder_type",)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        total, parts = values["standard_error"], values["standard_errors"]
        parts = {name: math.nan if error is None else error for name, error in parts.items()}
        total = math.nan if total is None else total
        return super().from_dict({**values, "standard_error": total, "standard_errors": parts})

    @property
    def key(self) -> Key:
        return self.variance_type, self.path, self.num_inference_steps

    @property
    def name(self) -> str:
        """Variance and path in words, "optimal, 10 best steps"."""
        return f"{self.variance_type}, {self.num_inference_steps} {self.path} steps"


@dataclass(frozen=True, kw_only=True)
class Headline(BoundRecord):
    """bits/dim of the model as it is, on more images than the rows: `headline` in evaluation.json.

    Attributes:
        images: how many. fingerprint: digest of their pixels.
    """

    images: int
    fingerprint: str | None = None


# ------------------------------------------------------------ samples


@dataclass(frozen=True, kw_only=True)
class MetricProtocol(Record):
    """What the figures of `SampleMetrics` depend on besides the model.

    Attributes:
        network, weights, num_features, preprocessing: of the features; None if only pixels were
            compared.
        num_generated, num_real: images on either side.
        image_shape: (C, H, W) of both, before the network's resizing.
        real, split, fingerprint: name, split and pixel digest of the real images, if they are an
            `ImageSet`.
        classes: of the real images, if some were chosen.
        num_train, num_nearest, num_held_out_nearest: training images, and the generated and
            held-out images (at most 1000, evenly spaced) whose nearest training image was found.
        classifier: what reads the classes of images, and was fitted to how many.
        source: what the caller knows of the files: JPEG or PNG, how they were resized.
        sampling: how the samples were made: steps, variance, seeds; the network's precision, if
            it was not float32.
        notes: warnings that were given.
    """

    network: str | None = None
    weights: str | None = None
    num_features: int | None = None
    preprocessing: str | None = None
    num_generated: int
    num_real: int
    image_shape: list[int]
    real: str | None = None
    split: str | None = None
    fingerprint: str | None = None
    classes: Sequence[str] | None = None
    num_train: int | None = None
    num_nearest: int | None = None
    num_held_out_nearest: int | None = None
    classifier: str | None = None
    source: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    arithmetic: str = "features float32, statistics float64"
    pixels: str = "pixel statistics: scale 0..1, root mean square over pixels"
    neighbors: int = 3
    kernel_subsets: int = 10

    OPTIONAL = ("classes", "classifier")


def figure(head: str | None = None, form: str = ".4f", over_features: bool = False) -> Any:
    """A field of `SampleMetrics`: None where it was not measured.

    Args:
        head, form: its column in the table of samples (`reports`); None: no column of its own.
        over_features: needs a feature network, which its name in JSON then says.
    """
    return field(default=None, metadata={"head": head, "form": form, "over_features": over_features})


@dataclass(frozen=True)
class SampleMetrics(Record):
    """Distances of samples from images, and the protocol that they depend on.

    Attributes:
        protocol: see `MetricProtocol`.
        frechet_distance, kernel_distance, kernel_distance_standard_error, precision, recall: see
            `distances`.
        pixel_mean_error, pixel_variance_error: root mean square over pixels of the difference
            between the sets' per-pixel means (variances), scale 0..1.
        nearest_train_distance: median over samples of the root mean square distance to the nearest
            training image, scale 0..1.
        held_out_nearest_train_distance: the same for held-out images.
        class_accuracy: share of samples that a classifier of the real images reads as the class
            that they were asked for (class_reader.py); None without classes.
        held_out_class_accuracy: the same for held-out images.
    """

    protocol: MetricProtocol
    frechet_distance: float | None = figure("Frechet", ".4g", over_features=True)
    kernel_distance: float | None = figure(over_features=True)
    kernel_distance_standard_error: float | None = figure(over_features=True)
    precision: float | None = figure("precision", ".3f", over_features=True)
    recall: float | None = figure("recall", ".3f", over_features=True)
    pixel_mean_error: float | None = figure("mean err")
    pixel_variance_error: float | None = figure("var err")
    nearest_train_distance: float | None = figure("nearest")
    held_out_nearest_train_distance: float | None = figure()
    class_accuracy: float | None = figure("class acc", ".3f", over_features=True)
    held_out_class_accuracy: float | None = figure(over_features=True)

    def figures(self) -> dict[str, float]:
        """The measured figures by name, without the protocol."""
        return {name: value for name, value in vars(self).items() if name != "protocol" and value is not None}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the figures and "protocol".

        Figures over features carry the network in their name: "recall (efficientnet-lite0)".
        """
        over_features = {f.name for f in fields(self) if f.metadata.get("over_features")}
        suffix = f" ({self.protocol.network})"
        named = {name + suffix if name in over_features else name: value for name, value in self.figures().items()}
        return named | {"protocol": self.protocol.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        protocol = MetricProtocol.from_dict(values["protocol"])
        figures = {name.removesuffix(f" ({protocol.network})"): value for name, value in values.items()}
        return super().from_dict(figures | {"protocol": protocol})


def figures_of(result: SampleMetrics) -> dict[str, float]:
    """A row of metrics.jsonl, but for its step: the figures and the number of samples."""
    return result.figures() | {"images": result.protocol.num_generated}


@dataclass(frozen=True)
class SampleRecord(Record):
    """Metrics of samples, or of real images in their place: a row of `metrics` in evaluation.json.

    Attributes:
        images: "samples", or "held-out SPLIT" for the row of real images.
        metrics: the figures and their protocol.
        variance_type: of Algorithm 2. sampler: name of another sampler.
        path, num_inference_steps: of samples.
        guidance_scale: of samples of labels; None: no guidance.
        kernel_distances: of each set of samples, where there were several.
    """

    images: str
    metrics: SampleMetrics
    variance_type: str | None = None
    sampler: str | None = None
    path: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    kernel_distances: list[float | None] | None = None

    SETS_KEY: ClassVar[str] = "kernel_distance of each set"

    @property
    def is_sampled(self) -> bool:
        """Whether these are samples, not real images."""
        return self.images == "samples"

    @property
    def source(self) -> str:
        """What made the images: Algorithm 2's variance, another sampler, or "held-out SPLIT"."""
        return self.variance_type or self.sampler or self.images

    @property
    def name(self) -> str:
        """What made the images, with the guidance if there was any."""
        guidance = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        return self.source + guidance

    @property
    def key(self) -> Key:
        """Only of samples."""
        return self.name, self.path or "", self.num_inference_steps or 0

    @property
    def kernel(self) -> Estimate:
        """Kernel distance and its standard error; nan without a network."""
        value, error = self.metrics.kernel_distance, self.metrics.kernel_distance_standard_error
        return math.nan if value is None else value, math.nan if error is None else error

    @property
    def settings(self) -> dict[str, Any]:
        """How the samples were made, as far as it applies."""
        names = ("variance_type", "sampler", "path", "num_inference_steps", "guidance_scale")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def as_dict(self) -> dict[str, Any]:
        sets = {} if self.kernel_distances is None else {self.SETS_KEY: self.kernel_distances}
        return {"images": self.images, **self.settings, **sets, **self.metrics.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        more = {"metrics": SampleMetrics.from_dict(values), "kernel_distances": values.get(cls.SETS_KEY)}
        return super().from_dict({**values, **more})


@dataclass(frozen=True, kw_only=True)
class FewestSteps(Record):
    """How to sample with the fewest steps at equal quality: `fewest_steps` in evaluation.json.

    Equal: a kernel distance at most two standard errors of the difference above that of all T steps
    of fixed_large.

    Attributes:
        name, path, num_inference_steps: of the row of samples.
        scheduler: name of its class, DDPMNotesScheduler or one of diffusers.
        scheduler_settings: for its `from_config`, beside the model's own config.
        timesteps: of the path, from T-1 down; None: those that the scheduler sets by itself.
        needs: settings that the model's scheduler must have for it.
        kernel_distance, standard_error: of its samples.
        reference_steps, reference_kernel_distance, reference_standard_error: T, and of its samples.
    """

    name: str
    path: str
    num_inference_steps: int
    scheduler: str
    scheduler_settings: dict[str, Any]
    timesteps: list[int] | None = None
    needs: list[str] = field(default_factory=list)
    kernel_distance: float
    standard_error: float
    reference_steps: int
    reference_kernel_distance: float
    reference_standard_error: float

    def missing(self, scheduler: Any) -> list[str]:
        """What a model's scheduler would need, and does not have."""
        return [name for name in self.needs if getattr(scheduler, name, None) is None]


# ------------------------------------------------------------ files


@dataclass(frozen=True, kw_only=True)
class Evaluation(JSONFile):
    """evaluation.json: the protocol of the bounds, the bounds, and metrics of samples.

    Attributes:
        data, split, images, dims, fingerprint: the images that bits/dim were measured on: name,
            split, number, dims of each, digest of their pixels.
        classes: of these images, if some were chosen.
        weights: digest of the measured weights, by which the card knows that the figures belong to
            its model; None if unknown.
        seed: of the noise.
        evaluations_per_image: network evaluations an image, or "all".
        results: a row for each variance and path.
        headline: the model's own variance in all T steps, on more images; None if not asked for.
        metrics: of held-out images and of samples, each row with its own protocol.
        yardsticks: bits/dim of simple codes for the same images (the headline's, if there is one),
            by name (yardsticks.py); None where they were not measured.
        fewest_steps: at equal quality; None if no row is, or all T steps were not sampled.
    """

    unit: str = "bits/dim"
    data: str
    split: str
    images: int
    dims: int
    fingerprint: str | None = None
    classes: Sequence[str] | None = None
    seed: int = 0
    evaluations_per_image: int | str = "all"
    weights: str | None = None
    results: list[BoundRecord]
    headline: Headline | None = None
    metrics: list[SampleRecord] = field(default_factory=list)
    yardsticks: dict[str, float] | None = None
    fewest_steps: FewestSteps | None = None

    FILE = "evaluation.json"
    OPTIONAL = ("classes", "headline", "metrics", "yardsticks", "fewest_steps")
    PICTURE: ClassVar[str] = "bits_per_dim.png"  # beside it: where the bits are, timestep by timestep
    MAP: ClassVar[str] = "bits_map.png"  # pixel by pixel
    NEAREST: ClassVar[str] = "nearest.png"  # training images that are nearest to samples

    @property
    def samples(self) -> list[SampleRecord]:
        """The rows of samples, without that of held-out images."""
        return [row for row in self.metrics if row.is_sampled]

    @property
    def nearest_samples(self) -> SampleRecord | None:
        """The row of samples with the lowest kernel distance; None without any."""
        measured = [row for row in self.samples if row.metrics.kernel_distance is not None]
        return min(measured, key=lambda row: row.kernel, default=None)

    @property
    def best(self) -> BoundRecord:
        """The headline, or else the row with the lowest bound."""
        return self.headline or min(self.results, key=lambda row: row.total)

    @property
    def protocol(self) -> str:
        """What the bounds were measured on and how, in words."""
        each = self.evaluations_per_image
        terms = "every term of the bound" if each == "all" else f"{each} network evaluations an image (unbiased)"
        decoders = {
            "levels": ", a decoder that knows which levels occur",
            "fitted": ", a decoder of fitted variance",
            "own": "",
        }
        decoder = next(words for kind, words in decoders.items() if kind in {row.decoder_type for row in self.results})
        headline = f" ({self.headline.images} for the headline)" if self.headline else ""
        return (
            f"{self.images} images{headline} of {self.data}{of_classes(self.classes)}, split {self.split}, {self.dims} dims each, "
            f"{terms}, noise seed {self.seed}{decoder}"
        )

    def as_dict(self) -> dict[str, Any]:
        values = super().as_dict()
        rows = {
            name: [row.as_dict() for row in getattr(self, name)] for name in ("results", "metrics") if name in values
        }
        return values | rows

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        results = [BoundRecord.from_dict(row) for row in values["results"]]
        metrics = [SampleRecord.from_dict(row) for row in values.get("metrics") or []]
        headline = Headline.from_dict(values["headline"]) if values.get("headline") else None
        fewest = FewestSteps.from_dict(values["fewest_steps"]) if values.get("fewest_steps") else None
        single = {"headline": headline, "fewest_steps": fewest}
        return super().from_dict({**values, "results": results, "metrics": metrics, **single})


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(JSONFile):
    """training_run.json: on what, how, on which hardware and for how long a model was trained.

    Attributes:
        data, split, images, images_skipped, dims, fingerprint, data_license: the training images;
            `images` is None for a stream, dims is [C, H, W].
        hidden_colours: how many of the images of the data set had colours where their alpha is 0,
            which are 0 in training.
        classes: of the training images, if some were chosen: the names of labels 0, 1, ...
        hub_dataset, base_model: Hub ids, where the data and the initial weights come from there.
        initial_weights: the repository, or ./name of the local folder, that they come from; None if
            they were drawn.
        objective, loss, loss_steps: mean loss over that many last steps; None if none was finite.
        steps, train_batch_size, seed, weights: optimizer steps, images of a step, which weights
            were saved, in words.
        mixed_precision, processes, hardware: what it ran on.
        seconds, steps_of_launch, images_per_second: of the last launch.
        date, versions, command: ISO date, version of each package, command that repeats the run.
    """

    data: str
    split: str
    images: int | None
    images_skipped: int = 0
    hidden_colours: int = 0
    classes: Sequence[str] | None = None
    dims: list[int] | None = None
    fingerprint: str
    data_license: str | None = None
    hub_dataset: str | None = None
    base_model: str | None = None
    initial_weights: str | None = None
    objective: str
    loss: float | None
    loss_steps: int
    steps: int
    train_batch_size: int
    seed: int
    weights: str
    mixed_precision: str
    processes: int
    hardware: str
    seconds: float
    steps_of_launch: int
    images_per_second: float
    date: str
    versions: dict[str, str]
    command: str

    FILE = "training_run.json"
    OPTIONAL = ("hidden_colours", "classes", "initial_weights")

    @property
    def images_seen(self) -> int:
        """Images that training has seen, repetitions included."""
        return self.steps * self.train_batch_size
