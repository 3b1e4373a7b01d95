"""The card of a Hub folder: what the model is, how it loads, what was measured, how it was made. Filled from the folder's own files.

A card is read by two kinds of readers. The Hub reads the metadata on top: library, licence, tags, and the `model-index` with each measured
number. People read the rest, which is written here in blocks between comments that they do not see:

    <!-- generated:use 0123456789ab -->
    ...
    <!-- /generated:use -->

Everything outside the blocks is the owner's. A block whose digest no longer fits its text was edited by hand: it is the owner's too. So a
card can be written anew, after every measurement, without ever taking away what somebody wrote into it.
"""

import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors import safe_open

from ..scheduling_ddpm_notes import LEARNED_VARIANCES, PRIVATE_ENTRY, DDPMNotesScheduler

logger = logging.getLogger(__name__)

BITS_PER_DIM = "bits_per_dim"
OVER_FEATURES = ("kernel_distance", "frechet_distance", "precision", "recall")  # of samples, over a named network
OUR_METRICS = (BITS_PER_DIM, *OVER_FEATURES)
KIND_TAGS = ("class-conditional",)  # ours, and gone when the next model in the repository is of another kind
DEFAULT_LICENSE = "apache-2.0"
PICTURES = ("samples.png", "trajectory.gif", "bits_per_dim.png", "loss.png")
_BLOCK = re.compile(r"<!-- generated:(\w+) ([0-9a-f]{12}) -->\n(.*?)<!-- /generated:\1 -->\n?", re.DOTALL)
_SPACE = re.compile(r"\[Try it in the browser\]\(https://huggingface\.co/spaces/([\w.-]+/[\w.-]+)\)")
_SEEN = re.compile(r"<!-- card of (\S+): (.*?); ([0-9a-f]{12}) -->\n?")


def write_card(
    folder: Path | str,
    repo_id: str | None = None,
    license: str | None = None,
    published: str | None = None,
    space_id: str | None = None,
) -> str:
    """Write the folder's README.md from what lies beside it, and return its text.

    Args:
        folder: a folder that `DDPMNotesPipeline.save_pretrained` wrote; training_run.json, evaluation.json, samples.png, trajectory.gif,
            bits_per_dim.png and loss.png in it are used where they are there.
        repo_id: "user/name" in the snippets; None: that of the card before, or the folder's name.
        license: the model's, as the Hub names licences; None: that of the card before, or apache-2.0.
        published: the text of the card on the Hub, if there is one: what its owner wrote there stays.
        space_id: "user/name" of the Space that is the model's demo; None: that of the card before, if it names one.

    Raises:
        ValueError: no pipeline in the folder, or a card whose metadata is no YAML.
    """
    folder = Path(folder)
    path = folder / "README.md"
    here = path.read_text(encoding="utf-8") if path.exists() else None
    named = _SEEN.search(here) if here is not None else None
    facts = read_facts(folder, repo_id or (named.group(1) if named else None))
    facts["space_id"] = space_id or next((m.group(1) for c in (here, published) if (m := _SPACE.search(c or ""))), None)
    before = here if published is None else published
    if published is not None and here is not None and _edited(here):
        if set(_owner_s(published)) <= set(_owner_s(here)):
            before = here
        else:
            aside = folder / "README.local.md"
            aside.write_text(here, encoding="utf-8")
            logger.warning(
                "%s was edited here and on the Hub: the Hub's words stay in it, yours are in %s", path, aside
            )
    blocks = {name: block(facts) for name, block in BLOCKS.items()}
    text = merge(facts["repo_id"], _metadata(facts, license), blocks, before)
    path.write_text(text, encoding="utf-8")
    return text


def read_facts(folder: Path, repo_id: str | None = None) -> dict[str, Any]:
    """What the folder's files say: `unet`, `scheduler`, `weights`, `run` and `evaluation` (None where unknown), `pictures`, `repo_id`.

    An evaluation of other weights than the folder's is left out.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json; allowed: a folder that DDPMNotesPipeline.save_pretrained wrote"
        )
    weights = weights_digest(folder)
    run, evaluation = (_read_json(folder / name) for name in ("training_run.json", "evaluation.json"))
    if evaluation is not None and evaluation.get("weights") != weights:
        logger.warning("%s is about other weights than the folder's: left out of the card", folder / "evaluation.json")
        evaluation = None
    return {
        "repo_id": repo_id or folder.resolve().name,
        "unet": UNet2DModel.load_config(folder / "unet"),
        "scheduler": DDPMNotesScheduler.from_pretrained(folder / "scheduler"),
        "parameters": _count_parameters(folder / "unet"),
        "weights": weights,
        "run": run,
        "evaluation": evaluation,
        "space_id": None,
        "pictures": {name for name in PICTURES if (folder / name).is_file()}
        - ({"bits_per_dim.png"} if evaluation is None else set()),
    }


def weights_digest(folder: Path | str) -> str:
    """sha256 over the UNet's weight files: what an evaluation is about."""
    digest = hashlib.sha256()
    for path in sorted((Path(folder) / "unet").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- the blocks


def _about(facts: dict[str, Any]) -> str:
    run = facts["run"] or {}
    labels = facts["unet"].get("num_class_embeds")
    kind = "class-conditional" if labels else "unconditional"
    trained = (
        f", trained on {run['data']} with ddpm_notes_pipeline {run['versions']['ddpm_notes_pipeline']}" if run else ""
    )
    sentence = (
        f"A DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)): a diffusion model that makes {_pixels(facts)} images, "
        f"{kind}{trained}. Its likelihood can be measured: the code in this repository computes an upper bound of the bits per dimension of any 8-bit image."
    )
    text = f"# {facts['repo_id'].split('/')[-1]}\n\n{sentence}\n"
    if facts["space_id"]:
        text += f"\n[Try it in the browser](https://huggingface.co/spaces/{facts['space_id']}).\n"
    if "samples.png" in facts["pictures"]:
        text += "\n![Training images on the left, samples on the right](samples.png)\n"
        text += "\nTraining images on the left, samples of this model on the right.\n"
    if "trajectory.gif" in facts["pictures"]:
        text += "\n![Samples while they form from noise](trajectory.gif)\n"
    return text


def _use(facts: dict[str, Any]) -> str:
    quoted, T = json.dumps(facts["repo_id"], ensure_ascii=False), len(facts["scheduler"])
    steps = min(100, T)
    conditional = bool(facts["unet"].get("num_class_embeds"))
    null_label = (facts["unet"].get(PRIVATE_ENTRY) or {}).get("null_label")
    parts = ["## How to use\n"]
    if not conditional:
        parts.append(
            "With diffusers alone, no trust in this repository's code needed:\n\n"
            f"```python\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({quoted})\n"
            f'image = pipe(num_inference_steps={steps}).images[0]  # {T} steps: best quality\nimage.save("sample.png")\n```\n\n'
            f"or by the class that this is:\n\n```python\nfrom diffusers import DDPMPipeline\n\npipe = DDPMPipeline.from_pretrained({quoted})\n"
            f"images = pipe(batch_size=4, num_inference_steps={steps}).images\n```\n"
        )
    arguments = f"batch_size=4, num_inference_steps={steps}"
    labels = ""
    if conditional:
        last = (facts["unet"]["num_class_embeds"] if null_label is None else null_label) - 1
        labels = f", class_labels=[{', '.join(str(i % (last + 1)) for i in range(4))}]"
        arguments += labels + (", guidance_scale=2.0" if null_label is not None else "")
        parts.append(
            f"It takes class labels 0 to {last}, which diffusers' own DDPMPipeline does not know: it needs the code of this repository.\n"
        )
    parts.append(
        "All of it, with the code in `pipeline.py` (read it first: trust means running it): sampling with any variance and path, and bits/dim.\n\n"
        f"```python\nfrom diffusers import DiffusionPipeline\n\nrepo = {quoted}\n"
        "pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)\n"
        f"images = pipe({arguments}).images\n"
        f"result = pipe.bits_per_dim(images{labels})\n"
        'print(f"{result.total:.2f} bits/dim: prior {result.prior:.2f}, steps {result.diffusion:.2f}, decoder {result.decoder:.2f}")\n```\n\n'
        'To pin what you have read, give the commit for both: `revision="COMMIT", custom_revision="COMMIT"`. '
        f"Where the package is installed, `DDPMNotesPipeline.from_pretrained({quoted})` does the same without trust.\n"
    )
    parts.append(
        "Other schedulers of diffusers plug in, for example 20 steps of DPM-Solver++:\n\n"
        f"```python\nfrom diffusers import DiffusionPipeline, DPMSolverMultistepScheduler\n\nrepo = {quoted}\n"
        "pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)\n"
        "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)\n"
        f"images = pipe(batch_size=4, num_inference_steps={min(20, T)}{labels}).images\n```\n\n"
        "The code works for any other DDPM on the Hub, which gains a measurable likelihood:\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"code = {quoted}\n"
        'pipe = DiffusionPipeline.from_pretrained("google/ddpm-cifar10-32", custom_pipeline=code, trust_remote_code=True)\n'
        "images = pipe(num_inference_steps=10).images\nprint(pipe.bits_per_dim(images, num_inference_steps=10).total)\n```\n"
    )
    return "\n".join(parts)


def _measured(facts: dict[str, Any]) -> str:
    evaluation = facts["evaluation"]
    if evaluation is None:
        return "## Measured\n\nNothing has been measured on these weights yet.\n"
    rows = ["| variance | steps | path | L_T | sum of KLs | L_0 | total, bits/dim |", "|---|---|---|---|---|---|---|"]
    for row in evaluation["results"]:
        errors = row["standard_errors"]
        cells = [f"{row[name]:.4f} ± {errors[name]:.4f}" for name in ("prior", "diffusion", "decoder")]
        total = f"**{row['total']:.4f} ± {row['standard_error']:.4f}**"
        rows.append(
            f"| {row['variance_type']} | {row['num_inference_steps']} | {row['path']} | {' | '.join(cells)} | {total} |"
        )
    each = evaluation["evaluations_per_image"]
    evaluations = "every term of the bound" if each == "all" else f"{each} network evaluations an image, unbiased"
    text = (
        "## Measured\n\nUpper bound of -log2 P(x_0) / dims and its parts, ± standard error over the images; lower is better. "
        f"Protocol: {evaluation['images']} images of {evaluation['data']}, split {evaluation['split']}, {evaluation['dims']} dims each, "
        f"{evaluations}, noise seed {evaluation['seed']}. Numbers of other dims do not compare.\n\n"
        + "\n".join(rows)
        + "\n"
    )
    if "bits_per_dim.png" in facts["pictures"]:
        text += "\n![Bits per timestep and their running sum](bits_per_dim.png)\n"
    return text + _measured_samples(evaluation.get("metrics") or [])


def _measured_samples(metrics: list[dict[str, Any]]) -> str:
    """The table of how far samples are from images."""
    if not metrics:
        return ""
    protocol, network = metrics[-1]["protocol"], metrics[-1]["protocol"]["network"]
    rows = [
        "| images | steps | path | number | kernel distance | Frechet distance | precision | recall | nearest training image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in metrics:
        kernel, error = (row[f"{name} ({network})"] for name in ("kernel_distance", "kernel_distance_standard_error"))
        cells = [
            row.get("variance_type") or row.get("sampler") or row["images"],
            str(row.get("num_inference_steps", "")),
            row.get("path", ""),
            str(row["protocol"]["num_generated"]),
            f"{kernel:.5f} ± {error:.5f}",
            *(f"{row[f'{name} ({network})']:.3f}" for name in OVER_FEATURES[1:]),
            f"{row['nearest_train_distance']:.4f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return (
        f"\nSamples against {protocol['num_real']} images of {protocol['real']}, split {protocol['split']}, over {protocol['num_features']} features of "
        f"{network} (no Inception: no FID), {protocol['preprocessing']}. The row of held-out images is what perfect samples would get. The last column "
        "is the median distance to the nearest training image, as a root mean square over pixels in [0, 1]: samples much nearer than held-out "
        "images are copies.\n\n" + "\n".join(rows) + "\n"
    )


def _loss(run: dict[str, Any]) -> str:
    if run["loss"] is None:
        return "no loss of the last steps is finite"
    return f"loss {run['loss']:.4f} over the last {run['loss_steps']} steps"


def _training(facts: dict[str, Any]) -> str:
    run, unet, scheduler = facts["run"], facts["unet"], facts["scheduler"].config
    rows = {
        "network": f"UNet2DModel, {facts['parameters'] / 1e6:.2f} M weights, channels {list(unet['block_out_channels'])}",
        "diffusion": f"T = {scheduler.num_train_timesteps}, {scheduler.beta_schedule} betas, {scheduler.prediction_type}, "
        f"variance {facts['scheduler'].variance_type}",
    }
    if run is not None:
        rows |= {
            "data": f"{_seen(run)} of {run['data']}, split {run['split']}, fingerprint `{run['fingerprint']}`",
            "licence of the data": run.get("data_license") or "not recorded with the data set",
            "objective": f"{run['objective']}; {_loss(run)}",
            "length": f"{run['steps']} optimizer steps of {run['train_batch_size']} images, seed {run['seed']}",
            "weights": run["weights"],
            "hardware": f"{run['hardware']}, {run['processes']} process(es), {run['mixed_precision']} mixed precision",
            "wall time": f"{run['seconds'] / 60:.1f} min for the {run['steps_of_launch']} steps of the last launch, {run['images_per_second']:.0f} images/s",
            "date": run["date"],
            "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        }
    text = "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    if run is not None:
        text += (
            "\nAll settings are in `training_config.yaml`. With it, this command repeats the run:\n\n"
            f"```bash\n{run['command']}\n```\n"
        )
    if "loss.png" in facts["pictures"]:
        text += "\n![Loss over optimizer steps](loss.png)\n"
    return text


def _seen(run: dict[str, Any], often: bool = False) -> str:
    """The training images in words; `often`: and how many times each was seen. Of a stream nobody counts them."""
    seen = run["steps"] * run["train_batch_size"]
    if run["images"] is None:
        return f"a stream of images, {seen} in all" if often else "a stream of images"
    return f"{run['images']} images" + (f" about {seen / run['images']:.0f} times each" if often else "")


def _limits(facts: dict[str, Any]) -> str:
    run, dims = facts["run"], _shape(facts)
    lines = [f"It makes images of {dims[1]}x{dims[2]} pixels, {dims[0]} channel(s) and 8 bits, and knows nothing else."]
    if run is not None:
        lines[0] = (
            f"It makes images like those of {run['data']}, of {dims[1]}x{dims[2]} pixels and {dims[0]} channel(s): for study, comparison and further "
            "training. It knows nothing else, and shows what is over- or under-represented there."
        )
        compared = bool((facts["evaluation"] or {}).get("metrics"))
        lines.append(
            f"{facts['parameters'] / 1e6:.2f} M weights saw {_seen(run, often=True)}: samples may come close to single training images. "
            + ("How close is in the last column above." if compared else "How close was not measured.")
        )
        if not run.get("data_license"):
            lines.append(
                "The licence of its training images is not recorded here: ask before you use samples where that matters."
            )
    lines.append(
        "bits/dim is an upper bound for 8-bit images of this size and Algorithm 2's sampler. There is none for guided sampling or other schedulers."
    )
    if facts["scheduler"].config.variance_type in LEARNED_VARIANCES:
        lines.append(
            "Its network also outputs a variance: stock DDPMScheduler knows what to do with that; stock DDIM and DPM-Solver only inside this repository's pipeline."
        )
    return "## Intended use and limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


BLOCKS = {"about": _about, "use": _use, "measured": _measured, "training": _training, "limits": _limits}


# ---------------------------------------------------------------------------------------------------- metadata


def _metadata(facts: dict[str, Any], license: str | None) -> dict[str, Any]:
    """What the Hub reads; `license` only where one is asked for."""
    run, evaluation = facts["run"] or {}, facts["evaluation"]
    labels = facts["unet"].get("num_class_embeds")
    results = []
    for row in evaluation["results"] if evaluation is not None else []:
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=evaluation["data"],
                dataset_name=evaluation["data"],
                dataset_split=evaluation["split"],
                metric_type=BITS_PER_DIM,
                metric_value=round(row["total"], 6),
                metric_name=f"bits/dim, {row['variance_type']}, {row['num_inference_steps']} {row['path']} steps",
                metric_args={
                    "standard_error": round(row["standard_error"], 6),
                    "images": evaluation["images"],
                    "dims": evaluation["dims"],
                    "split": evaluation["split"],
                    "num_inference_steps": row["num_inference_steps"],
                    "variance_type": row["variance_type"],
                    "path": row["path"],
                    "evaluations_per_image": evaluation["evaluations_per_image"],
                },
            )
        )
    for row in (evaluation or {}).get("metrics") or []:
        if row["images"] == "samples":
            results += _results_of_samples(row)
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "ddpm", "ddpm_notes_pipeline", "bits-per-dim", *(KIND_TAGS if labels else ())],
        datasets=[run["hub_dataset"]] if run.get("hub_dataset") else None,
        base_model=run.get("base_model"),
        model_name=facts["repo_id"].split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def _results_of_samples(row: dict[str, Any]) -> list[EvalResult]:
    protocol = row["protocol"]
    results = []
    for name in OVER_FEATURES:
        arguments: dict[str, Any] = {
            "network": protocol["network"],
            "preprocessing": protocol["preprocessing"],
            "images": protocol["num_generated"],
            "real_images": protocol["num_real"],
            "split": protocol["split"],
            "dims": math.prod(protocol["image_shape"]),
            **{key: row[key] for key in ("num_inference_steps", "variance_type", "sampler", "path") if key in row},
            "seeds": protocol["sampling"]["seeds"],
        }
        error = row.get(f"{name}_standard_error ({protocol['network']})")
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=protocol["real"],
                dataset_name=protocol["real"],
                dataset_split=protocol["split"],
                metric_type=name,
                metric_value=round(row[f"{name} ({protocol['network']})"], 6),
                metric_name=f"{name.replace('_', ' ')} ({protocol['network']}), {row.get('variance_type') or row['sampler']}, "
                f"{row['num_inference_steps']} {row['path']} steps",
                metric_args=arguments | ({"standard_error": round(error, 6)} if error is not None else {}),
            )
        )
    return results


def merge(repo_id: str, metadata: dict[str, Any], blocks: dict[str, str], before: str | None) -> str:
    """A card of these blocks for a repository, in which everything that the owner of the card `before` wrote, changed or took out stays so."""
    owner: dict[str, Any] = {}
    items: list[tuple[str, str]] = [(name, "") for name in blocks]
    if before is not None:
        card = ModelCard(before.replace("\r\n", "\n"), ignore_metadata_errors=False)
        owner = card.data.to_dict()
        items, known = _parse(card.text)
        items += [(name, "") for name in blocks if name not in known]
    body = ""
    for name, text in items:
        if name:
            body += text or _mark(name, blocks[name]) if name in blocks or text else ""
            body += "\n"
        else:
            body += f"{text.strip()}\n\n" if text.strip() else ""
    data = ModelCardData(**_merged_metadata(metadata, owner), ignore_metadata_errors=True)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return f"{text}<!-- card of {repo_id}: {' '.join(blocks)}; {_digest(text)} -->\n"


def _merged_metadata(ours: dict[str, Any], owner: dict[str, Any]) -> dict[str, Any]:
    """The owner's entries, ours where there are none; lists joined; of the measured numbers, ours are written anew."""
    merged = {
        **ours,
        **{name: value for name, value in owner.items() if name not in ("tags", "datasets", "model-index")},
    }
    if ours.get("license"):
        merged["license"] = ours["license"]
    merged.setdefault("license", DEFAULT_LICENSE)
    for name in ("tags", "datasets"):
        values = [*_as_list(owner.get(name)), *_as_list(ours.get(name))]
        values = [value for value in values if value not in KIND_TAGS or value in _as_list(ours.get(name))]
        if values:
            merged[name] = list(dict.fromkeys(values))
    theirs: list[EvalResult] = []
    model_name = None
    if owner.get("model-index"):
        model_name, results = model_index_to_eval_results(owner["model-index"])
        theirs = [result for result in results if result.metric_type not in OUR_METRICS]
    if ours.get("model-index"):
        own_name, results = model_index_to_eval_results(ours["model-index"])
        model_name, theirs = model_name or own_name, [*results, *theirs]
    merged.pop("model-index", None)
    return {**merged, "eval_results": theirs, "model_name": model_name} if theirs else merged


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ---------------------------------------------------------------------------------------------------- marks


def _digest(text: str) -> str:
    """Of what a reader sees: not of spaces at the end of lines, which editors change."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n"))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _mark(name: str, text: str) -> str:
    return f"<!-- generated:{name} {_digest(text)} -->\n{text}<!-- /generated:{name} -->\n"


def _parse(body: str) -> tuple[list[tuple[str, str]], set[str]]:
    """The body in order as (block's name, its text with the marks if the owner edited it, else "") and ("", text of the owner); and the names
    of all blocks that the card was once written with."""
    seen = _SEEN.findall(body)
    body = _SEEN.sub("", body)
    items, end = [], 0
    for block in _BLOCK.finditer(body):
        items.append(("", body[end : block.start()]))
        name, digest, text = block.groups()
        items.append((name, "" if _digest(text) == digest else block.group(0)))
        end = block.end()
    items.append(("", body[end:]))
    return items, {name for _, names, _ in seen for name in names.split()} | {name for name, _ in items if name}


def _edited(card: str) -> bool:
    """Whether somebody changed the card since it was written here."""
    card = card.replace("\r\n", "\n")
    seen = _SEEN.search(card)
    return seen is None or _digest(card[: seen.start()]) != seen.group(3) or bool(card[seen.end() :].strip())


def _owner_s(card: str) -> list[tuple[str, str]]:
    """What in a card is the owner's."""
    body = ModelCard(card.replace("\r\n", "\n"), ignore_metadata_errors=True).text
    return [(name, text.strip()) for name, text in _parse(body)[0] if text.strip()]


# ---------------------------------------------------------------------------------------------------- facts


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _shape(facts: dict[str, Any]) -> tuple[int, int, int]:
    size = facts["unet"]["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return facts["unet"]["in_channels"], height, width


def _pixels(facts: dict[str, Any]) -> str:
    channels, height, width = _shape(facts)
    return f"{height}x{width} {({1: 'grey', 3: 'RGB', 4: 'RGBA'}).get(channels, f'{channels}-channel')}"


def _count_parameters(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())
    return count
