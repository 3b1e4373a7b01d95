"""training/evaluate.py as users start it, on an untrained network."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel
from huggingface_hub import ModelCard
from transformers import ViTConfig, ViTModel

from ddpm_notes_pipeline.data import hold_out, load_images
from ddpm_notes_pipeline.evaluation import samples
from ddpm_notes_pipeline.evaluation.findings import kernel_distances
from ddpm_notes_pipeline.evaluation.records import Evaluation
from ddpm_notes_pipeline.evaluation.yardsticks import image_yardsticks
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from ddpm_notes_pipeline.training import evaluate
from ddpm_notes_pipeline.training.evaluate import EvaluationRun, is_sampled, main, with_defaults
from ddpm_notes_pipeline.training.images import load_split
from ddpm_notes_pipeline.training.parser import parse_evaluation_arguments
from tests.data.making import table_of, write_parquet
from tests.support.launching import ROOT, describe, once

EVALUATE = ROOT / "training" / "evaluate.py"
SAMPLES = 20
FLAGS = "--variance_types fixed_small optimal --num_inference_steps 5 40 --paths even best --decoder levels --max_images 21 --variance_split test".split()


def save_model(folder, classes=None, null_label=None, class_names=None, **settings):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if settings.get("variance_type", "").startswith("learned") else 1,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes if null_label is None else classes + 1,
    )
    unet.register_to_config(_ddpm_notes={"null_label": null_label, "class_names": class_names})
    DDPMNotesPipeline(unet, DDPMNotesScheduler(40, beta_end=0.4, **settings)).save_pretrained(folder)


def save_network(folder):
    """A small vision model of transformers, the same weights each time."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    return folder


def evaluated(name, start, *flags, **options):
    """Folder and output of an evaluation that `train` (in a fork) or `launch` starts."""

    def run(folder):
        save_model(folder)
        config = ROOT / "training" / "configs" / "digits.yaml"
        command = ["--model", folder, "--config", config, "--evaluations_per_image", "6", *flags]
        network = save_network(folder.with_name(f"{folder.name}-small-vit"))
        command += ["--metrics", "--metric_images", SAMPLES, "--metric_network", network]
        return start(*command, script=EVALUATE, timeout=150, **options)

    return once(name, run)


@pytest.fixture(scope="module")
def one(train):
    return evaluated("evaluate-1", train, *FLAGS, "--save_variances")


def arguments(folder, *flags):
    return parse_evaluation_arguments(["--model", str(folder), "--dataset_name", "digits", *map(str, flags)])


def evaluate_here(folder, *flags):
    """The same in this process, without the launcher."""
    main(*arguments(folder, *flags))


def results(folder):
    return json.loads((Path(folder) / "evaluation.json").read_text())


def test_a_table_a_file_and_a_picture(one):
    folder, done = one
    table = [line for line in done.stdout.partition("\nDistances")[0].splitlines() if "|" in line]
    assert [cell.strip() for cell in table[0].split("|")][:7] == [
        "variance",
        "path",
        "K",
        "L_T",
        "sum of KLs",
        "L_0",
        "total, bits/dim",
    ]
    written = results(folder)
    assert (written["data"], written["split"], written["images"], written["dims"], written["unit"]) == (
        "digits",
        "test",
        21,
        64,
        "bits/dim",
    )
    keys = [(row["variance_type"], row["num_inference_steps"], row["path"]) for row in written["results"]]
    assert keys == [(v, *k) for v in ("fixed_small", "optimal") for k in ((5, "even"), (5, "best"), (40, "even"))]
    assert len(table) == 1 + len(keys)
    for line, row in zip(table[1:], written["results"], strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        errors = {**row["standard_errors"], "total": row["standard_error"]}
        assert cells[3:7] == [f"{row[k]:.5f} ± {errors[k]:.5f}" for k in ("prior", "diffusion", "decoder", "total")]
        assert row["total"] == pytest.approx(row["prior"] + row["diffusion"] + row["decoder"], rel=1e-9)
    assert all((folder / name).stat().st_size > 10_000 for name in ("bits_per_dim.png", "nearest.png"))
    assert "nearest.png" in done.stdout and not (folder / "unfinished").exists()


def test_samples_of_each_row_are_measured_beside_held_out_images(one):
    folder, done = one
    written = results(folder)
    floor, *rows = written["metrics"]
    network = rows[0]["protocol"]["network"]
    assert network.endswith("-small-vit")
    assert floor["images"] == "held-out test" and floor["protocol"]["num_generated"] == 21
    names = ("variance_type", "path", "num_inference_steps")
    assert [[row[name] for name in names] for row in rows] == [
        [row[name] for name in names] for row in written["results"]
    ]
    for row in rows:
        protocol = row["protocol"]
        seen = [protocol[name] for name in ("num_generated", "num_real", "num_train", "num_held_out_nearest", "split")]
        assert seen == [SAMPLES, 1438, 1438, 21, "train"]
        assert protocol["sampling"]["seeds"] == "0..19, one an image"
        assert protocol["sampling"]["variance_type"] == row["variance_type"]
        # an untrained network's samples are noise, far from digits in every respect
        for figure in ("frechet_distance", "kernel_distance"):
            assert row[f"{figure} ({network})"] > floor[f"{figure} ({network})"]
        assert row["nearest_train_distance"] > 1.5 * row["held_out_nearest_train_distance"]
        assert row["held_out_nearest_train_distance"] == floor["nearest_train_distance"]
    table = [line for line in done.stdout.partition("\nDistances")[2].splitlines() if "|" in line]
    assert len(table) == 2 + len(rows)
    for line, row in zip(table[1:], [floor, *rows], strict=True):
        assert f"{row[f'frechet_distance ({network})']:.4g}" in line and f"{row['nearest_train_distance']:.4f}" in line


def pixel_mean_error(folder, scheduler_type, call, **settings):
    """Of the samples that this call of the pipeline makes with these settings, in one batch."""
    pipe = DDPMNotesPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_type.from_config(pipe.scheduler.config, decoder_variance=None, **settings)
    generators = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
    images = pipe(SAMPLES, **call, generator=generators, output_type="pt").images
    real = load_images("digits", split="train").take(range(1438))
    return float(
        (((images * 255).round() / 255).double().mean(0) - real.double().div(255).mean(0)).square().mean().sqrt()
    )


def test_samples_are_those_of_their_seeds(one):
    folder, _ = one
    row = results(folder)["metrics"][3]
    assert (row["variance_type"], row["num_inference_steps"]) == ("fixed_small", 40)
    path = {"timesteps": list(range(39, -1, -1))}
    expected = pixel_mean_error(folder, DDPMNotesScheduler, path, variance_type="fixed_small")
    assert row["pixel_mean_error"] == pytest.approx(expected, rel=1e-3)


def test_guided_samples_are_rows_of_their_own(tmp_path, capsys):
    folder = tmp_path / "model"
    save_model(folder, classes=10, null_label=10)
    flags = ["--label_column", "label", "--max_images", 20, "--num_inference_steps", 5, "--metrics"]
    flags += ["--metric_images", SAMPLES, "--metric_network", save_network(tmp_path / "small-vit")]
    evaluate_here(folder, *flags, "--guidance_scales", 1, 30)
    record = Evaluation.read(folder)
    plain, guided = record.samples
    assert (plain.guidance_scale, guided.guidance_scale) == (None, 30)
    assert guided.name == "fixed_small, guidance 30" and guided.metrics.protocol.sampling["guidance_scale"] == 30
    real = load_images("digits", split="train", label_column="label")
    call = {"num_inference_steps": 5, "class_labels": [int(real.labels[i * 1438 // SAMPLES]) for i in range(SAMPLES)]}
    for row, scale in ((plain, 1), (guided, 30)):
        expected = pixel_mean_error(
            folder, DDPMNotesScheduler, {**call, "guidance_scale": scale}, timestep_spacing="linspace", steps_offset=0
        )
        assert row.metrics.pixel_mean_error == pytest.approx(expected, rel=1e-3)
    assert abs(plain.metrics.pixel_mean_error / guided.metrics.pixel_mean_error - 1) > 1e-3
    assert list(kernel_distances(record.samples)) == [plain.key]  # of another distribution: not compared
    assert re.search(r"fixed_small \|\s+30 \|\s+even \|", capsys.readouterr().out)
    assert "| fixed_small | 30 | even | 5 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ({}, "--guidance_scales 2", "--guidance_scales has 2 and the model has no null label; it must be 1"),
        ({"classes": 10}, "--label_column label --guidance_scales 1 0", "--guidance_scales has 0 and the model has no"),
        ({"classes": 10, "null_label": 10}, "--guidance_scales 2", "--guidance_scales has 2 and the images have no"),
    ],
)
def test_guidance_without_labels_is_refused(tmp_path, model, flags, says):
    save_model(tmp_path, **model)
    with pytest.raises(ValueError, match=re.escape(says)):
        EvaluationRun(*arguments(tmp_path, "--metrics", *flags.split()))


def test_samples_in_mixed_precision_say_so(train, tmp_path):
    folder = tmp_path / "model"
    save_model(folder)
    flags = ["--model", folder, "--dataset_name", "digits", "--max_images", 20, "--num_inference_steps", 5]
    flags += ["--metrics", "--metric_images", SAMPLES, "--metric_network", save_network(tmp_path / "small-vit")]
    done = train(*flags, script=EVALUATE, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    (row,) = Evaluation.read(folder).samples
    assert row.metrics.protocol.sampling["mixed_precision"] == "bf16"
    sentence = "The network computed samples in bf16 mixed precision."
    assert sentence in " ".join(done.stdout.split()) and sentence in (folder / "README.md").read_text()


@pytest.mark.slow
def test_samplers_are_the_ones_that_they_are_named(train):
    folder, _ = evaluated(
        "evaluate-samplers",
        train,
        "--num_inference_steps",
        5,
        "--max_images",
        8,
        "--samplers",
        "ddim",
        "eta0",
        "dpmsolver++",
    )
    rows = {row["sampler"]: row for row in results(folder)["metrics"] if "sampler" in row}
    path = {"num_inference_steps": 5}
    for name, kind, settings in (
        ("DDIM", DDIMScheduler, {}),
        ("eta = 0", DDPMNotesScheduler, {"eta": 0.0}),
        ("DPM-Solver++", DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}),
    ):
        expected = pixel_mean_error(folder, kind, path, timestep_spacing="trailing", **settings)
        assert rows[name]["pixel_mean_error"] == pytest.approx(expected, rel=1e-3), name
    # an untrained network's x0_hat is far outside [-1, 1]: what is made of clipping differs
    assert abs(rows["DDIM"]["pixel_mean_error"] - rows["eta = 0"]["pixel_mean_error"]) > 1e-3


def test_fitted_levels_serve_every_variance(one):
    assert {row["decoder_type"] for row in results(one[0])["results"]} == {"levels"}


def test_what_was_measured_is_kept_in_the_models_folder(one):
    scheduler = DDPMNotesPipeline.from_pretrained(one[0]).scheduler
    assert scheduler.variance_type == "optimal" and len(scheduler.original_sample_mse) == 40
    assert len(np.flatnonzero(scheduler.levels["weights"][0])) == 17  # of digits


# Variances are measured on the twentieth of the training images that is not held out.
FEW = "--max_images 4 --num_inference_steps 2 --validation_share 0.95 --save_variances".split()


def saved_scheduler(folder):
    return DDPMNotesPipeline.from_pretrained(folder).scheduler


def test_save_variances_saves_what_nothing_else_asked_to_measure(tmp_path, capsys):
    save_model(tmp_path)
    evaluate_here(tmp_path, *FEW)
    assert "denoising error: 100%" in capsys.readouterr().err
    saved = saved_scheduler(tmp_path)
    assert saved.variance_type == "optimal" and saved.decoder_variance is None
    assert len(saved.original_sample_mse) == 40 and min(saved.original_sample_mse) > 0


def test_variances_are_measured_on_some_images(tmp_path, monkeypatch):
    """Of 60,000 images it would take longer than the rest together."""
    save_model(tmp_path)
    monkeypatch.setattr(evaluate, "VARIANCE_IMAGES", 2)
    with pytest.raises(ValueError, match=r"^2 images at 32 timesteps each reach timestep"):
        evaluate_here(tmp_path, *FEW)


def test_save_variances_saves_what_was_known_and_needed_no_measuring(tmp_path):
    mse = [0.01 * (t + 1) for t in range(40)]
    save_model(tmp_path, original_sample_mse=mse)
    assert saved_scheduler(tmp_path).variance_type == "fixed_small"
    evaluate_here(tmp_path, *FEW, "--variance_types", "optimal")
    saved = saved_scheduler(tmp_path)
    assert (saved.variance_type, saved.original_sample_mse) == ("optimal", mse)


def test_a_decoder_variance_of_an_earlier_version_is_measured_and_kept(tmp_path):
    save_model(tmp_path, decoder_variance={0: 0.003, 2: 0.1})
    evaluate_here(tmp_path, *FEW)
    row = results(tmp_path)["results"][0]
    assert (row["decoder_type"], row["decoder_variance"]) == ("fitted", pytest.approx(0.003))
    assert saved_scheduler(tmp_path).decoder_variance == {0: 0.003, 2: 0.1}


def test_fitted_levels_are_saved_with_the_v_t_of_the_refined_guess_and_are_what_was_measured(tmp_path, capsys):
    save_model(tmp_path, original_sample_mse=[0.01] * 40)
    evaluate_here(tmp_path, *FEW, "--decoder", "levels", "--variance_types", "fixed_small", "optimal")
    out, saved, written = capsys.readouterr().out, saved_scheduler(tmp_path), results(tmp_path)
    assert len(np.flatnonzero(saved.levels["weights"][0])) == 17  # of digits
    assert saved.variance_type == "optimal" and saved.original_sample_mse != [0.01] * 40
    assert [row["decoder_type"] for row in written["results"]] == ["levels", "levels"]
    pipe = DDPMNotesPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images = load_images("digits", split="test", max_samples=4).take(range(4))
    for row in written["results"]:
        pipe.scheduler = DDPMNotesScheduler.from_config(saved.config, variance_type=row["variance_type"])
        total = pipe.bits_per_dim(images, timesteps=[39, 0]).total
        assert row["total"] == pytest.approx(total, rel=1e-4)  # levels are saved with 6 digits
    held_in = hold_out(load_images("digits", split="train"), 0.95, 0)[0]
    counted = np.bincount(held_in.take(range(len(held_in))).numpy().ravel(), minlength=256)
    assert written["yardsticks"]["uniform over the levels that occur"] == pytest.approx(np.log2((counted > 0).sum()))
    assert f"Levels: fitted on {len(held_in)} images, gamma" in out and "on the images of the fit" in out
    assert "Yardsticks, bits/dim of simple codes" in out and (tmp_path / "bits_map.png").stat().st_size > 10_000


def test_own_keeps_the_models_levels_and_their_v_t(tmp_path):
    levels = {"weights": [[1.0] * 256], "decoder_blur": {0: 0.1}, "guess_blur": {0: 0.1}}
    save_model(tmp_path, levels=levels, original_sample_mse=[0.01] * 40)
    evaluate_here(tmp_path, *FEW)
    saved = saved_scheduler(tmp_path)
    assert saved.levels is not None and saved.original_sample_mse == [0.01] * 40
    assert results(tmp_path)["results"][0]["decoder_type"] == "levels"


def test_without_a_training_split_there_are_bits_and_a_warning_but_no_yardsticks(tmp_path):
    save_model(tmp_path)
    flags = "--max_images 4 --num_inference_steps 2 --train_split nowhere".split()
    with pytest.warns(UserWarning, match="no yardsticks to compare with.*nowhere"):
        evaluate_here(tmp_path, *flags)
    assert "yardsticks" not in results(tmp_path) and results(tmp_path)["results"][0]["total"] > 0


def test_stock_diffusers_samples_a_learned_model_after_save_variances(tmp_path):
    """And the model keeps its learned variance, with the measured ones beside it."""
    save_model(tmp_path, variance_type="learned_range")
    before = DDPMPipeline.from_pretrained(tmp_path)
    evaluate_here(tmp_path, *FEW)
    after = DDPMPipeline.from_pretrained(tmp_path)
    assert after.scheduler.variance_type == "learned_range"
    images = []
    for pipe in (before, after):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(torch.from_numpy(pipe(2, generator, num_inference_steps=5, output_type="np").images))
    assert torch.equal(*images)
    saved = saved_scheduler(tmp_path)
    assert saved.variance_type == "learned_range" and len(saved.original_sample_mse) == 40
    (before,) = results(tmp_path)["results"]
    evaluate_here(tmp_path, *FEW[:4], "--variance_types", "learned_range", "optimal")
    rows = results(tmp_path)["results"]
    assert [row["variance_type"] for row in rows] == ["learned_range", "optimal"]
    assert rows[0]["total"] == before["total"] != rows[1]["total"]


def test_save_variances_of_a_model_on_the_hub_makes_no_folder_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        evaluate_here("user/name", "--save_variances")
    assert exit.value.code == 2
    assert "--model is user/name, which must be a folder here: download the repository first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_what_the_pipeline_says(one):
    folder, _ = one
    pipe = DDPMNotesPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = load_images("digits", split="test", max_samples=21)
    pilot = images.at_most(16)
    result = pipe.bits_per_dim(images.take(range(21)), evaluations_per_image=6, pilot_images=pilot.take(range(16)))
    row = results(folder)["results"][-1]
    assert row["total"] == pytest.approx(result.total, rel=1e-5)
    assert row["network_evaluations"] == result.network_evaluations


@pytest.mark.slow
def test_two_processes_find_the_same_numbers(one, train):
    folder, done = evaluated("evaluate-2", train, *FLAGS, processes=2)
    mine, theirs = results(one[0])["results"], results(folder)["results"]
    for a, b in zip(mine, theirs, strict=True):
        for name in ("total", "standard_error", "prior", "diffusion", "decoder"):
            assert b[name] == pytest.approx(a[name], rel=2e-6, abs=1e-9), (name, describe(done))
    mine, theirs = results(one[0])["metrics"], results(folder)["metrics"]
    figures = [name for name, value in mine[1].items() if isinstance(value, float)]
    assert len(figures) == 9 and len(mine) == len(theirs) == 7
    for a, b in zip(mine, theirs, strict=True):
        a, b = ({name.partition(" (")[0]: value for name, value in row.items()} for row in (a, b))
        for name in (name.partition(" (")[0] for name in figures if name in a):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    mine, theirs = results(one[0])["results"], results(folder)["results"]
    # the same images, each once; every process finds the ranges on the same pilot images
    for a, b in zip(mine, theirs, strict=True):
        pilot = a["network_evaluations"] - 21 * min(6, a["num_inference_steps"])
        assert pilot % 16 == 0 and pilot <= 16 * 48
        assert b["network_evaluations"] == a["network_evaluations"] + pilot
    assert sum(row["network_evaluations"] > 21 * 6 for row in mine) == 2  # the paths that are not summed in full


def test_what_cannot_be_measured_is_said_in_a_line(train, tmp_path):
    save_model(tmp_path)
    flags = ["--model", tmp_path, "--dataset_name", "digits", "--split", "validation"]
    done = train(*flags, script=EVALUATE, expect=1)
    assert "evaluate.py: error:" in done.stderr and "'validation'" in done.stderr and "test" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--paths", "even", "bset"], "--paths: invalid choice: bset (choose from even, best)"),
        (["--paths", "bset", "--table"], "--paths: invalid choice: bset (choose from even, best)"),
        (
            ["--variance_types", "fixed_smal", "optimal"],
            "--variance-types: invalid choice: fixed_smal (choose from fix",
        ),
        (["--samplers", "ddmi", "--metrics"], "--samplers: invalid choice: ddmi (choose from ddim, eta0, dpmsolver++)"),
    ],
)
def test_a_typo_in_a_list_of_choices_is_refused_before_anything_is_loaded(capsys, flags, says):
    """A path of a mistyped kind was an even one, in a table under the mistyped name."""
    with pytest.raises(SystemExit) as exit:
        parse_evaluation_arguments(["--model", "nothing/here", "--dataset_name", "digits", *flags])
    assert exit.value.code == 2 and says in capsys.readouterr().err.replace("'", "")  # Python 3.12 dropped them


OF_THE_RUN = {"dataset_name": "digits", "train_split": "train", "validation_share": 0.1, "seed": 3}
HELD_OUT = "--split held_out --validation_share 0.1 --seed 3".split()


def held_out_run(folder, of_the_run, *flags):
    """An evaluation on held-out images, ready to measure, of a model trained `of_the_run`."""
    save_model(folder)
    (folder / "training_config.yaml").write_text(yaml.safe_dump(of_the_run))
    line = ["--model", str(folder), "--dataset_name", "digits", *HELD_OUT, *map(str, flags)]
    return EvaluationRun(*parse_evaluation_arguments(line))


@pytest.mark.parametrize(
    ("of_the_run", "flags", "says"),
    [
        ({}, ["--validation_share", 0.2], "--validation_share is 0.2 and was 0.1 in training"),
        ({"validation_share": None}, [], "--validation_share is 0.1 and was None in training"),
        ({}, ["--seed", 0], "--seed is 0 and was 3 in training"),
        ({"max_train_samples": 500}, [], "--max_train_samples is None and was 500 in training"),
        ({"classes": ["3", "7"]}, [], "--classes is None and was ['3', '7'] in training"),
        (
            {"classes": ["3", "7"]},
            "--label_column label --classes 7 3".split(),
            "--classes is ['7', '3'] and was ['3', '7'] in training",
        ),
        (
            {"seed": 1, "train_split": "train[:90%]"},
            [],
            "--seed is 3 and was 1 in training, --train_split is train and was train[:90%]",
        ),
    ],
)
def test_images_that_were_trained_on_are_not_measured_as_held_out(tmp_path, of_the_run, flags, says):
    """Another share or seed holds other images out: bits/dim were too good, and silently so."""
    with pytest.raises(ValueError, match=re.escape(says) + ".*; they must be equal"):
        held_out_run(tmp_path, OF_THE_RUN | of_the_run, *flags)


@pytest.mark.parametrize(
    "of_the_run",
    [
        {},
        {"dataset_name": "me/faces", "seed": 1},
        {"dataset_name": "./mine"},
        {"train_split": "test"},
        {"classes": None},
    ],
)
def test_images_held_out_by_the_same_settings_or_of_another_data_set_are_measured(tmp_path, of_the_run):
    assert len(held_out_run(tmp_path, OF_THE_RUN | of_the_run).images) == 144  # a tenth of 1438


def test_held_out_images_of_chosen_classes_are_those_of_the_run(tmp_path):
    flags = "--label_column label --classes 7 3".split()
    run = held_out_run(tmp_path, OF_THE_RUN | {"classes": ["7", "3"]}, *flags)
    whole = load_images("digits", label_column="label", show_progress=False)
    members = np.flatnonzero(np.isin(whole.labels, [7, 3]))
    chosen = load_images("digits", label_column="label", classes=["7", "3"], show_progress=False)
    _, held_out = hold_out(chosen, 0.1, seed=3)
    assert len(run.images) == len(held_out) == round(0.1 * len(members))
    assert run.images.fingerprint == held_out.fingerprint
    expected = [{7: 0, 3: 1}[int(label)] for label in whole.labels[members[held_out.index]]]
    assert run.images.labels.tolist() == expected
    assert torch.equal(run.images.take(range(9)), whole.take(members[held_out.index[:9]]))
    trained_on = run.read("train")
    assert len(trained_on) + len(held_out) == len(members) and not set(trained_on.index) & set(held_out.index)


def test_the_training_split_is_what_was_trained_on(tmp_path):
    """--max_train_samples of it, also where all of it is measured."""
    save_model(tmp_path)
    line = ["--model", str(tmp_path), "--dataset_name", "digits", "--max_train_samples", "30", "--split", "train"]
    run = EvaluationRun(*parse_evaluation_arguments([*line, "--max_images", "20"]))
    trained_on = load_images("digits", max_samples=30, show_progress=False)
    assert run.read("train").fingerprint == trained_on.fingerprint and len(run.read("test")) == 359
    assert torch.equal(run.images.take(range(20)), trained_on.at_most(20).take(range(20)))


def test_a_stream_is_read_as_far_as_it_is_measured(tmp_path, monkeypatch):
    """Not as far as it was trained on, which may be larger than the disk."""
    save_model(tmp_path / "model")
    images = [*np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)]
    write_parquet(tmp_path / "set", table_of(images))
    line = ["--model", tmp_path / "model", "--dataset_name", tmp_path / "set", "--streaming", "--split", "train"]
    asked = []

    def load(*arguments):
        asked.append(arguments[-1])
        return load_split(*arguments)

    monkeypatch.setattr(evaluate, "load_split", load)
    line = [*map(str, line), "--max_train_samples", "25", "--max_images"]
    for most, read in (("7", 7), ("99", 25)):
        assert len(EvaluationRun(*parse_evaluation_arguments([*line, most])).images) == read
    assert asked == [7, 25]


def test_the_headline_is_of_more_images_than_the_rows_and_the_card_says_so(tmp_path, capsys):
    save_model(tmp_path)
    flags = "--full --max_images 7 --num_inference_steps 5 --variance_types fixed_large".split()
    evaluate_here(tmp_path, *flags, "--headline_images", 21)
    written, images = results(tmp_path), load_images("digits", split="test", max_samples=21, show_progress=False)
    found, few = written["headline"], load_images("digits", split="test", max_samples=7, show_progress=False)
    pipe = DDPMNotesPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe.bits_per_dim(images.take(range(21)), full=True, seed=0)
    assert (found["variance_type"], found["path"], found["num_inference_steps"]) == ("fixed_small", "even", 40)
    assert found["total"] == pytest.approx(expected.total, rel=1e-6)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)
    assert (found["images"], found["fingerprint"]) == (21, images.fingerprint)
    assert (written["images"], written["fingerprint"]) == (7, few.fingerprint)
    (row,) = written["results"]
    assert (row["variance_type"], row["num_inference_steps"]) == ("fixed_large", 5)
    assert written["yardsticks"] == image_yardsticks(load_images("digits", show_progress=False), images).bits
    number = f"{expected.total:.4f} ± {expected.standard_error:.4f}"
    text, said = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    for place in (text, said):
        assert f"fixed_small, 40 even steps, 21 images: **{number} bits/dim**" in place
        assert "7 images (21 for the headline) of digits" in place
        assert f"fixed_small, 40 even steps, {expected.total:.3f}: " in place  # beside the yardsticks
    of_card = [(r.metric_value, r.metric_args["images"]) for r in ModelCard(text).data.eval_results]
    assert of_card[0] == (round(found["total"], 6), 21) and of_card[1][1] == 7 and len(of_card) == 2


@pytest.mark.parametrize("flags", ["--headline_images 21", "--max_images 7 --headline_images 7"])
def test_a_headline_of_no_more_images_than_the_rows_is_refused(tmp_path, flags):
    save_model(tmp_path)
    says = r"--headline_images gives \d+ images; it must be more than the \d+ of the rows \(--max_images\)"
    with pytest.raises(ValueError, match=says):
        EvaluationRun(*arguments(tmp_path, *flags.split()))


def test_max_images_takes_the_images_that_its_help_says(capsys):
    """They are spread over the split, since many sets are sorted by class."""
    with pytest.raises(SystemExit):
        parse_evaluation_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Measure on this many images, evenly spaced over the split (--streaming: the first)." in text
    images, few = (load_images("digits", split="test", max_samples=n, show_progress=False) for n in (None, 3))
    assert torch.equal(few.take(range(3)), images.take([i * len(images) // 3 for i in range(3)]))


@pytest.mark.parametrize(
    ("own", "asked", "known"),
    [
        ("learned_range", "learned", "learned_range, fixed_small"),
        ("learned", "learned_range", "learned, fixed_small"),
        ("fixed_large", "learned", "fixed_small"),
    ],
)
def test_a_network_s_output_is_not_read_as_another_variance_than_it_was_trained_as(tmp_path, own, asked, known):
    """learned_range's v is about -1 to 1: as a log variance, noise as large as images."""
    save_model(tmp_path, variance_type=own)
    says = f"--variance_types has {asked} and the model's variance is {own}; "
    says += f"each must be one of {known}, fixed_large, optimal"
    with pytest.raises(ValueError, match=re.escape(says)):
        evaluate_here(tmp_path, "--variance_types", "fixed_small", asked)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
def test_images_of_another_size_than_the_models_are_refused(train, tmp_path):
    """Its network would take them, and the card would show the number of no model."""
    save_model(tmp_path)
    flags = ["--model", tmp_path, "--dataset_name", "digits", "--resolution", 16, "--image_mode", "RGB"]
    done = train(*flags, script=EVALUATE, expect=1)
    assert not (tmp_path / "evaluation.json").exists()
    assert (
        "images are 3x16x16 and the model's are 1x8x8; they must be the same (--resolution 8 --image_mode L)"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num_inference_steps 5 41", "--num_inference_steps is 41; it must be at most the model's 40 timesteps"),
        ("--metrics --num_inference_steps 5 --metric_steps 41", "--metric_steps is 41; it must be at most"),
        ("--num_inference_steps 5 1 --paths even best", "--num_inference_steps is 1 with --paths best; it must be at"),
        (
            "--metrics --num_inference_steps 5 --metric_steps 10",
            "--metric_steps has 10 and --num_inference_steps has not",
        ),
        ("--results_dir {file}/results", "/results must take the results and cannot be written to (--results_dir)"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_beginning(tmp_path, flags, says):
    """Rows were measured first, and some commands could never finish."""
    save_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    flags = flags.format(file=tmp_path / "file").split()
    with pytest.raises(ValueError, match=re.escape(says)):
        EvaluationRun(*arguments(tmp_path / "model", *flags))


def test_images_whose_classes_are_not_the_models_are_refused(tmp_path):
    save_model(tmp_path, classes=3)
    with pytest.raises(ValueError, match=r"model has 3 classes and the images have no labels; .* \(--label_column\)"):
        EvaluationRun(*arguments(tmp_path))
    with pytest.raises(ValueError, match=r"the images have 10 classes and the model has 3; .* \(--classes\)"):
        EvaluationRun(*arguments(tmp_path, "--label_column", "label"))
    EvaluationRun(*arguments(tmp_path, "--label_column", "label", "--classes", 0, 1, 2))


@pytest.mark.parametrize("classes", [[2, 0, 1], [0, 2], [1]])
def test_images_whose_classes_come_in_another_order_are_refused(tmp_path, classes):
    """Their labels stood for other classes of the model, and nothing said so."""
    save_model(tmp_path, classes=3, class_names=["0", "1", "2"])
    with pytest.raises(ValueError, match=r"classes are .* model's are 0, 1, 2; .* \(--classes 0 1 2\)"):
        EvaluationRun(*arguments(tmp_path, "--label_column", "label", "--classes", *classes))
    EvaluationRun(*arguments(tmp_path, "--label_column", "label", "--classes", 0, 1))


def test_images_whose_classes_have_other_names_are_measured(tmp_path):
    save_model(tmp_path, classes=3, class_names=["zero", "one", "two"])
    EvaluationRun(*arguments(tmp_path, "--label_column", "label", "--classes", 0, 1, 2))


def test_only_images_that_were_not_trained_on_are_called_held_out(tmp_path, capsys):
    """A part of the training split was, and its nearest training images were at a distance of 0."""
    save_model(tmp_path / "model")
    flags = ["--metrics", "--metric_images", 20, "--metric_network", save_network(tmp_path / "small-vit")]
    flags += ["--max_images", 20, "--num_inference_steps", 2]

    def table_of(*splits):
        return EvaluationRun(*arguments(tmp_path / "model", *flags, *splits)).sample_table()

    assert [row.name for row in table_of("--split", "test").rows] == ["held-out test"]
    assert table_of("--split", "train").rows == []
    evaluate_here(tmp_path / "model", *flags, "--split", "test", "--metric_split", "test")
    (row,) = results(tmp_path / "model")["metrics"]
    assert row["images"] == "samples" and row["protocol"]["split"] == "test"
    assert not [name for name in row if "nearest" in name] and row["protocol"]["num_train"] is None
    said = capsys.readouterr().out
    assert "held-out" not in said and "nearest" not in said and not (tmp_path / "model" / "nearest.png").exists()


def test_samples_are_compared_with_some_of_many_images_and_copies_sought_in_all(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    monkeypatch.setattr(samples, "REAL_IMAGES", 50)
    flags = ["--metrics", "--metric_images", 20, "--metric_network", save_network(tmp_path / "small-vit")]
    evaluate_here(tmp_path / "model", *flags, "--max_images", 20, "--num_inference_steps", 2)
    for row in results(tmp_path / "model")["metrics"]:
        assert (row["protocol"]["num_real"], row["protocol"]["num_train"]) == (50, 1438)
    assert "Distances from 50 images of" in (tmp_path / "model" / "README.md").read_text()


def test_a_table_samples_the_rows_that_are_worth_their_time(tmp_path):
    """All even ones at --metric_steps, the best paths of the better variances, one row at T."""
    _, evaluation = arguments(tmp_path, "--table", "--metric_steps", 10, 25)
    evaluation = with_defaults(evaluation, DDPMNotesScheduler())
    kinds = [(v, p) for v in ("fixed_small", "fixed_large", "learned_range", "optimal") for p in ("even", "best")]
    rows = [SimpleNamespace(variance_type=v, path=p, num_inference_steps=10) for v, p in kinds]
    assert [kind for kind, row in zip(kinds, rows) if not is_sampled(evaluation, row, 1000)] == [
        ("fixed_small", "best"),
        ("fixed_large", "best"),
    ]
    for steps, sampled in ((50, []), (1000, ["fixed_large"])):
        rows = [SimpleNamespace(variance_type=v, path="even", num_inference_steps=steps) for v, _ in kinds[::2]]
        assert [row.variance_type for row in rows if is_sampled(evaluation, row, 1000)] == sampled


@pytest.mark.parametrize(("flags", "paths"), [([], ["even", "best"]), (["--paths", "even"], ["even"])])
def test_a_table_has_the_paths_that_were_asked_for_and_levels(tmp_path, flags, paths):
    _, evaluation = arguments(tmp_path, "--table", *flags)
    filled = with_defaults(evaluation, DDPMNotesScheduler())
    assert (filled.paths, filled.decoder) == (paths, "levels")
