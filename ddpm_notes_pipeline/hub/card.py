"""The model card of a Hub folder: what the model is, how it loads, was measured and trained.

Filled from the folder's own files by model_card.md.jinja. It is written anew after every run or
measurement, and keeps what its owner wrote (owner_edits.py).
"""

import hashlib
import json
import logging
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2
import torch
from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.records import (
    BoundRecord,
    Estimate,
    Evaluation,
    FewestSteps,
    Headline,
    SampleRecord,
    TrainingRecord,
    of_classes,
)
from ..evaluation.reports import (
    bound_table,
    fewest_steps_text,
    nearest_text,
    sample_caption,
    sample_table,
    yardstick_text,
)
from ..names import LEARNED_VARIANCES
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from ..scheduling_ddpm_notes import DDPMNotesScheduler
from ..stock_config import PRIVATE_ENTRY
from .owner_edits import merge, newest_card, repository_of

logger = logging.getLogger(__name__)

BLOCKS = ("about", "use", "measured", "training", "limits")  # of the template, in the card's order
MEASURED = (Evaluation.PICTURE, Evaluation.MAP, Evaluation.NEAREST)  # pictures of an evaluation
PICTURES = ("samples.png", "trajectory.gif", *MEASURED, "loss.png")
# that the template calls
TEXTS = (bound_table, fewest_steps_text, nearest_text, of_classes, sample_caption, sample_table, yardstick_text)
LEADING_STEPS = (10, 50)
MOST_NAMES = 20  # of classes
TASK = "unconditional-image-generation"
_SPACE_LINK = re.compile(r"\[Try it in the browser\]\(https://huggingface\.co/spaces/([\w.-]+/[\w.-]+)\)")


@dataclass(frozen=True)
class CardFacts:
    """What the files of a folder say.

    Attributes:
        repo_id: "user/name" in the snippets.
        pipeline: the model, its network without weights.
        run, evaluation: None if unknown.
        pictures: names of those that are there.
        space_id: "user/name" of the demo, if there is one.
    """

    repo_id: str
    pipeline: DDPMNotesPipeline
    run: TrainingRecord | None
    evaluation: Evaluation | None
    pictures: set[str]
    space_id: str | None = None

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[-1]


def write_card(
    folder: Path | str,
    repo_id: str | None = None,
    license: str | None = None,
    published: str | None = None,
    space_id: str | None = None,
) -> str:
    """Write the folder's README.md from its other files, and return its text.

    Args:
        folder: written by `DDPMNotesPipeline.save_pretrained`; training_run.json, evaluation.json
            and pictures in it are used if they are there.
        repo_id: "user/name" in the snippets; None: that of the card before, or the folder's name.
        license: of the model, as the Hub names licences; None: that of the card before, or
            apache-2.0.
        published: text of the card on the Hub, if there is one: what its owner wrote there is kept.
        space_id: "user/name" of the model's demo Space; None: that of the card before, if any.

    Raises:
        ValueError: no pipeline in the folder, or a card whose metadata is not YAML.
    """
    folder = Path(folder)
    path = folder / "README.md"
    local = path.read_text(encoding="utf-8") if path.exists() else None
    links = _SPACE_LINK.findall(f"{local}{published}")
    facts = read_facts(folder, repo_id or repository_of(local), space_id or next(iter(links), None))
    before, edits_get_lost = newest_card(local, published)
    if edits_get_lost:
        copy = folder / "README.local.md"
        copy.write_text(local or "", encoding="utf-8")
        logger.warning("%s was edited here and on the Hub: it keeps the Hub's edits, yours are in %s", path, copy)
    text = merge(facts.repo_id, _metadata(facts, license), _render(facts), before)
    path.write_text(text, encoding="utf-8")
    return text


def read_facts(folder: Path, repo_id: str | None = None, space_id: str | None = None) -> CardFacts:
    """What the folder's files say. An evaluation of other weights is left out.

    Raises:
        ValueError: no pipeline in the folder.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json; it must be a folder that DDPMNotesPipeline.save_pretrained wrote"
        )
    evaluation = current_evaluation(folder)
    if evaluation is None and (folder / Evaluation.FILE).exists():
        logger.warning(
            "%s was measured on other weights than the folder's: left off the card", folder / Evaluation.FILE
        )
    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    pictures = {name for name in PICTURES if (folder / name).is_file()}
    return CardFacts(
        repo_id=repo_id or folder.resolve().name,
        pipeline=DDPMNotesPipeline(unet, DDPMNotesScheduler.from_pretrained(folder / "scheduler")),
        run=TrainingRecord.read(folder),
        evaluation=evaluation,
        pictures=pictures if evaluation else pictures.difference(MEASURED),
        space_id=space_id,
    )


def current_evaluation(folder: Path | str) -> Evaluation | None:
    """The evaluation in a folder; None if there is none, or if it was measured on other weights."""
    evaluation = Evaluation.read(Path(folder))
    return evaluation if evaluation is not None and evaluation.weights == weights_digest(folder) else None


def weights_digest(folder: Path | str) -> str:
    """sha256 over the UNet's weight files, by which an evaluation is known to be the model's."""
    digest = hashlib.sha256()
    for path in sorted((Path(folder) / "unet").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _render(facts: CardFacts) -> dict[str, str]:
    """The generated blocks by name."""
    template = jinja2.Template(
        (Path(__file__).parent / "model_card.md.jinja").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pipeline, unet = facts.pipeline, facts.pipeline.unet.config
    classes, side, images = pipeline.num_classes or 0, unet.sample_size, facts.run and facts.run.images
    labels = f", class_labels={[i % classes for i in range(4)]}" if classes else ""
    context = template.new_context(
        {
            **{function.__name__: function for function in TEXTS},
            **vars(facts),
            "name": facts.name,
            "repo": json.dumps(facts.repo_id, ensure_ascii=False),
            "unet": unet,
            "scheduler": pipeline.scheduler,
            "T": len(pipeline.scheduler),
            "num_labels": classes,
            "named_classes": named_classes(facts),
            "kind": {1: "grey", 3: "RGB", 4: "RGBA"}.get(unet.in_channels, f"{unet.in_channels}-channel"),
            "pixels": f"{side}x{side}" if isinstance(side, int) else "{}x{}".format(*side),
            "parameters": f"{pipeline.unet.num_parameters() / 1e6:.2f} M weights",
            "images": f"{images} images" if images else "a stream of images",
            "labels": labels,
            "sampling": sampling_code(facts, labels),
            "imported": sorted({"DiffusionPipeline", *stock_scheduler(facts)}),
            "learned_variance": pipeline.scheduler.config.variance_type in LEARNED_VARIANCES,
        }
    )
    return {name: "".join(template.blocks[name](context)) for name in BLOCKS}


def named_classes(facts: CardFacts) -> str:
    """The classes by label, as words; of many the first. Empty if their names are their labels."""
    own = (facts.pipeline.unet.config.get(PRIVATE_ENTRY) or {}).get("class_names")
    names = own or (facts.run and facts.run.classes) or []
    if list(names) == [str(label) for label in range(len(names))]:
        return ""
    return ", ".join([*names[:MOST_NAMES], *(["..."] if len(names) > MOST_NAMES else [])])


def fewest_steps(facts: CardFacts) -> FewestSteps | None:
    """Those of the evaluation; None if the model in the folder lacks what they need."""
    fewest = facts.evaluation.fewest_steps if facts.evaluation else None
    return None if fewest is None or fewest.missing(facts.pipeline.scheduler) else fewest


def sampling_code(facts: CardFacts, labels: str) -> str:
    """Lines that sample 4 images with `pipe`, and restore its scheduler, which bits/dim need.

    With the fewest steps at equal quality where these are known; else with 100 steps. `labels` is
    the argument of the 4 classes, or empty.
    """
    own, fewest = facts.pipeline.scheduler, fewest_steps(facts)
    if fewest is None:
        guidance = "" if facts.pipeline.null_label is None else ", guidance_scale=2.0"
        return f"images = pipe(batch_size=4, num_inference_steps={min(100, len(own))}{labels}{guidance}).images"
    K, changes = fewest.num_inference_steps, fewest.scheduler_settings
    lines, path = [], f"num_inference_steps={K}"
    changed = changes != {"variance_type": own.variance_type}
    if changed:
        kind = "type(own)" if fewest.scheduler == type(own).__name__ else fewest.scheduler
        settings = "".join(f", {name}={value!r}" for name, value in changes.items())
        lines = ["own = pipe.scheduler", f"pipe.scheduler = {kind}.from_config(own.config{settings})"]
    if fewest.timesteps is not None and fewest.timesteps != own_timesteps(own, K):
        lines.append(textwrap.fill(f"timesteps = {fewest.timesteps}", 100, subsequent_indent=" " * 13))
        path = "timesteps=timesteps"
    said = f"# no worse than {fewest.reference_steps} steps: see Measured"
    lines.append(f"images = pipe(batch_size=4, {path}{labels}).images  {said}")
    return "\n".join([*lines, "pipe.scheduler = own"] if changed else lines)


def stock_scheduler(facts: CardFacts) -> list[str]:
    """The diffusers class that `sampling_code` needs, if any."""
    fewest = fewest_steps(facts)
    return [] if fewest is None or fewest.scheduler == DDPMNotesScheduler.__name__ else [fewest.scheduler]


def own_timesteps(scheduler: DDPMNotesScheduler, steps: int) -> list[int]:
    """The timesteps that the scheduler itself sets for a number of steps."""
    same = DDPMNotesScheduler.from_config(scheduler.config)
    same.set_timesteps(steps)
    return same.timesteps.tolist()


# ------------------------------------------------------------ metadata


def _metadata(facts: CardFacts, license: str | None) -> dict[str, Any]:
    """What the Hub reads; `license` only if one is asked for."""
    run, results = facts.run, _eval_results(facts.evaluation, facts.pipeline.scheduler) if facts.evaluation else None
    conditional = ["class-conditional"] if facts.pipeline.num_classes else []
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["diffusers", "ddpm", "ddpm_notes_pipeline", "bits-per-dim", *conditional],
        datasets=[run.hub_dataset] if run and run.hub_dataset else None,
        base_model=run.base_model if run else None,
        model_name=facts.name if results else None,
        eval_results=results,
    ).to_dict()


def leading_rows(rows: Sequence[BoundRecord], own_variance: str, T: int) -> list[BoundRecord]:
    """The rows that stand for a table: own variance at T, and the lowest bounds at K = 10 and 50.

    If the table has none of these: the row with the lowest bound.
    """
    total = attrgetter("total")
    own = [row for row in rows if row.key == (own_variance, "even", T)]
    at_K = [[row for row in rows if row.num_inference_steps == K] for K in LEADING_STEPS]
    chosen = own[:1] + [min(some, key=total) for some in at_K if some] or [min(rows, key=total)]
    return list({row.key: row for row in chosen}.values())


def _eval_results(evaluation: Evaluation, scheduler: DDPMNotesScheduler) -> list[EvalResult]:
    """Bounds of the headline and the leading rows, and the kernel distance of their samples.

    If those were not sampled, the lowest kernel distance of all rows.
    """
    bounds = leading_rows(evaluation.results, scheduler.variance_type, len(scheduler))
    if evaluation.headline:
        bounds = [evaluation.headline, *(row for row in bounds if row.key != evaluation.headline.key)]
    measured = [row for row in evaluation.samples if row.metrics.kernel_distance is not None]
    samples = [row for row in measured if row.key in {bound.key for bound in bounds}]
    samples = samples or sorted(measured, key=lambda row: row.kernel)[:1]
    return [_bound_result(row, evaluation) for row in bounds] + [_kernel_result(row) for row in samples]


def _bound_result(row: BoundRecord, evaluation: Evaluation) -> EvalResult:
    protocol = {name: getattr(evaluation, name) for name in ("images", "dims", "split", "evaluations_per_image")}
    protocol |= {"images": row.images} if isinstance(row, Headline) else {}
    settings = {name: getattr(row, name) for name in ("num_inference_steps", "variance_type", "path", "decoder_type")}
    what = f"bits/dim, {row.variance_type}, {row.num_inference_steps} {row.path} steps"
    estimate = (row.total, row.standard_error)
    return _result("bits_per_dim", what, estimate, evaluation.data, protocol | settings)


def _kernel_result(row: SampleRecord) -> EvalResult:
    protocol = row.metrics.protocol
    settings = {
        "network": protocol.network,
        "preprocessing": protocol.preprocessing,
        "images": protocol.num_generated,
        "real_images": protocol.num_real,
        "split": protocol.split,
        "dims": math.prod(protocol.image_shape),
        **row.settings,
        "seeds": protocol.sampling["seeds"],
    }
    what = f"kernel distance ({protocol.network}), {row.name}, {row.num_inference_steps} {row.path} steps"
    return _result("kernel_distance", what, row.kernel, protocol.real or "", settings)


def _result(kind: str, what: str, estimate: Estimate, data: str, settings: dict[str, Any]) -> EvalResult:
    value, error = (round(number, 6) for number in estimate)
    return EvalResult(
        task_type=TASK,
        dataset_type=data,
        dataset_name=data,
        dataset_split=settings["split"],
        metric_type=kind,
        metric_value=value,
        metric_name=what,
        metric_args=({} if math.isnan(error) else {"standard_error": error}) | settings,  # nan: of one image
    )
