"""The card: true to the folder's files, valid for the Hub, and it keeps what its owner wrote."""

import json
import math
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from huggingface_hub import ModelCard

from ddpm_notes_pipeline.evaluation.metrics import measure_samples
from ddpm_notes_pipeline.evaluation.records import Evaluation, TrainingRecord
from ddpm_notes_pipeline.hub.card import leading_rows, read_facts, weights_digest, write_card
from ddpm_notes_pipeline.hub.owner_edits import merge
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from tests.support.launching import ROOT

RUN = {
    "data": "digits",
    "split": "train",
    "images": 1438,
    "fingerprint": "9dd2c141",
    "data_license": "CC BY 4.0",
    "hub_dataset": None,
    "base_model": None,
    "objective": "simple",
    "loss": 0.08,
    "loss_steps": 5,
    "steps": 100,
    "train_batch_size": 64,
    "seed": 3,
    "weights": "averaged",
    "mixed_precision": "bf16",
    "processes": 2,
    "hardware": "NVIDIA H200",
    "seconds": 90.0,
    "steps_of_launch": 100,
    "images_per_second": 71.1,
    "date": "2026-11-22",
    "versions": {"ddpm_notes_pipeline": "0.1.0", "torch": "2.13.0"},
    "command": "accelerate launch training/train.py --config training_config.yaml --output_dir outputs/d",
}
PART = {"prior": 0.001, "diffusion": 3.5, "decoder": 1.2}
EVALUATION = {
    "unit": "bits/dim",
    "data": "digits",
    "split": "test",
    "images": 359,
    "dims": 64,
    "seed": 0,
    "evaluations_per_image": 38,
    "results": [
        {
            "variance_type": variance,
            "path": "even",
            "num_inference_steps": 50,
            "total": total,
            "standard_error": 0.0312,
            **PART,
            "standard_errors": {name: 0.01 for name in PART},
        }
        for variance, total in (("fixed_small", 4.701), ("optimal", 4.4617))
    ],
}


def make_folder(path, kind="plain", run=RUN, evaluation=EVALUATION, pictures=("samples.png", "bits_per_dim.png")):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if kind == "learned" else 1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4 if kind == "labelled" else None,
    )
    if kind == "labelled":
        unet.register_to_config(_ddpm_notes={"null_label": 3})
    scheduler = DDPMNotesScheduler(50, variance_type="learned_range" if kind == "learned" else "fixed_small")
    DDPMNotesPipeline(unet, scheduler).save_pretrained(path)
    if run is not None:
        (path / "training_run.json").write_text(json.dumps(run))
    if evaluation is not None:
        (path / "evaluation.json").write_text(json.dumps({**evaluation, "weights": weights_digest(path)}))
    for name in pictures:
        (path / name).write_bytes(b"a picture")
    return path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    return {kind: make_folder(root / kind, kind) for kind in ("plain", "labelled", "learned")}


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# ------------------------------------------------------------ what is in it


@pytest.mark.parametrize("kind", ["plain", "labelled", "learned"])
def test_nothing_is_left_to_fill_in(shelf, kind):
    card = write_card(shelf[kind], "ada/digits")
    assert not re.search(r"[Mm]ore [Ii]nformation|TODO|\bNone\b|\bnan\b|\[\.\.\.|\bnull\b", card), card
    assert all(compile(code, "card", "exec") for code in snippets(card))


def test_a_card_says_which_classes_were_chosen_and_which_colours_became_zero(tmp_path):
    run = {**RUN, "classes": ["mon", "item", "dngn"], "hidden_colours": 428}
    evaluation = {**EVALUATION, "classes": ["mon", "item", "dngn"]}
    card = write_card(make_folder(tmp_path / "tiles", "labelled", run=run, evaluation=evaluation), "ada/tiles")
    data = "1438 images of digits, classes mon, item, dngn, split train, fingerprint `9dd2c141`"
    hidden = "colours of fully transparent pixels (alpha 0) were set to 0, in 428 images of the data set"
    assert f"| data | {data}; {hidden} |\n" in card
    assert "It takes class labels 0 to 2 (mon, item, dngn)." in card
    assert "359 images of digits, classes mon, item, dngn, split test, 64 dims each" in card
    assert r"of a\|b, classes c\|d, split" in write_card(
        make_folder(tmp_path / "named", run=RUN | {"data": "a|b", "classes": ["c|d"]}), "ada/named"
    )
    unet = tmp_path / "tiles" / "unet" / "config.json"
    for names, text in ((["a", "b", "c"], "0 to 2 (a, b, c)."), (["0", "1", "2"], "0 to 2.")):
        settings = json.loads(unet.read_text())
        unet.write_text(json.dumps(settings | {"_ddpm_notes": settings["_ddpm_notes"] | {"class_names": names}}))
        assert f"It takes class labels {text}" in write_card(tmp_path / "tiles", "ada/tiles")
    plain = write_card(make_folder(tmp_path / "plain"), "ada/digits")
    assert "| data | 1438 images of digits, split train, fingerprint `9dd2c141` |\n" in plain
    assert "classes" not in plain and "transparent" not in plain


def test_a_launch_that_only_finished_a_run_has_no_rate_on_the_card(tmp_path):
    """It failed after the last step, and was resumed there."""
    only_finished = RUN | {"seconds": 0.0, "steps_of_launch": 0, "images_per_second": 0.0}
    assert "wall time" not in write_card(make_folder(tmp_path / "finished", run=only_finished), "ada/digits")
    assert "| wall time | 1.5 min for the 100 steps of the last launch, 71 images/s |" in write_card(
        make_folder(tmp_path / "trained"), "ada/digits"
    )


def test_a_card_of_weights_alone_says_only_what_is_known(tmp_path):
    card = write_card(make_folder(tmp_path / "bare", run=None, evaluation=None, pictures=()), "ada/digits")
    assert "Nothing has been measured" in card
    assert "model-index" not in card and ".png" not in card.replace("sample.png", "") and "trained on" not in card


def test_the_metadata_has_the_headline_figures_with_their_protocol(shelf):
    data = ModelCard(write_card(shelf["plain"], "ada/digits")).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "diffusers",
        "unconditional-image-generation",
        "apache-2.0",
    )
    assert data.model_name == "digits"
    for found, row in zip(data.eval_results, EVALUATION["results"], strict=True):
        assert (found.metric_type, found.metric_value) == ("bits_per_dim", row["total"])
        assert (found.dataset_type, found.dataset_split) == ("digits", "test")
        assert found.metric_args == {
            "standard_error": 0.0312,
            "images": 359,
            "dims": 64,
            "split": "test",
            "num_inference_steps": 50,
            "variance_type": row["variance_type"],
            "path": "even",
            "decoder_type": "own",
            "evaluations_per_image": 38,
        }


def test_the_metadata_has_no_standard_error_of_a_single_image(tmp_path):
    """It was .nan, which is no number in JSON."""
    rows = [row | {"standard_error": math.nan} for row in EVALUATION["results"]]
    card = write_card(make_folder(tmp_path / "model", evaluation=EVALUATION | {"results": rows}), "ada/digits")
    measured = ModelCard(card).data.eval_results
    assert measured and all("standard_error" not in one.metric_args for one in measured)


def test_distances_of_samples_are_named_by_their_network_and_never_fid(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    rows = [
        ({"images": "held-out test"}, images[:8]),
        ({"images": "samples", "variance_type": "optimal", "path": "best", "num_inference_steps": 10}, images[8:16]),
    ]
    metrics = [
        {**row, **measure_samples(x, images, train=images, sampling={"seeds": "0..7"}, show_progress=False).as_dict()}
        for row, x in rows
    ]
    for row in metrics:  # as of an ImageSet
        row["protocol"] |= {"real": "digits", "split": "train"}
    folder = make_folder(tmp_path / "m", evaluation={**EVALUATION, "metrics": json.loads(json.dumps(metrics))})
    card = write_card(folder, "ada/digits")
    results = [r for r in ModelCard(card).data.eval_results if r.metric_type != "bits_per_dim"]
    (kernel,) = results
    assert kernel.metric_type == "kernel_distance"
    assert kernel.metric_value == round(metrics[1]["kernel_distance (efficientnet-lite0)"], 6)
    assert kernel.metric_name == "kernel distance (efficientnet-lite0), optimal, 10 best steps"
    assert kernel.metric_args["standard_error"] > 0 and kernel.metric_args["seeds"] == "0..7"
    assert (kernel.metric_args["images"], kernel.metric_args["real_images"], kernel.metric_args["dims"]) == (8, 20, 64)
    figures = {name.partition(" (")[0]: value for name, value in metrics[1].items()}
    cells = (
        f"{figures['kernel_distance']:.5f} ± {figures['kernel_distance_standard_error']:.5f}",
        f"{figures['frechet_distance']:.4g}",
        *(f"{figures[name]:.3f}" for name in ("precision", "recall")),
        *(f"{figures[name]:.4f}" for name in ("pixel_mean_error", "pixel_variance_error", "nearest_train_distance")),
    )
    assert f"| optimal | best | 10 | 8 | {' | '.join(cells)} |" in card and "| held-out test |  |  | 8 |" in card
    assert "The column `nearest` above shows how close" in card and not re.search(r"(?<!no )FID", card)


def test_the_reader_sees_the_same_numbers_and_the_pictures(shelf):
    card = write_card(shelf["plain"], "ada/digits")
    assert "| optimal | even | 50 | 0.0010 ± 0.0100 | 3.5000 ± 0.0100 | 1.2000 ± 0.0100 | **4.4617 ± 0.0312** |" in card
    assert "359 images of digits, split test, 64 dims each" in card
    assert "](samples.png)" in card and "](bits_per_dim.png)" in card and "](loss.png)" not in card


def test_the_card_says_which_simple_codes_the_lowest_bound_beats(tmp_path):
    evaluation = EVALUATION | {"yardsticks": {"one histogram": 5.5, "xz": 4.3, "PNG": 4.47}}
    pictures = ("bits_per_dim.png", "bits_map.png")
    folder = make_folder(tmp_path / "model", evaluation=evaluation, pictures=pictures)
    card = write_card(folder, "ada/digits")
    assert "one histogram 5.500, xz 4.300, PNG 4.470" in card and "](bits_map.png)" in card
    verdict = "Fewer bits than one histogram; not fewer than xz (4.300); within two standard errors of PNG (4.470)."
    assert f"optimal, 50 even steps, 4.462: {verdict}" in card
    assert not re.search(r"\n\n\n", card)
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"weights": "others"}))
    card = write_card(folder, "ada/digits")
    assert "bits_map.png" not in card and "xz" not in card


def test_a_card_of_a_model_with_levels_says_so(tmp_path):
    rows = [row | {"decoder_type": "levels"} for row in EVALUATION["results"]]
    card = write_card(make_folder(tmp_path / "model", evaluation=EVALUATION | {"results": rows}), "ada/digits")
    assert "a decoder that knows which levels occur" in " ".join(card.split())
    assert all(found.metric_args["decoder_type"] == "levels" for found in ModelCard(card).data.eval_results)


def test_the_card_shows_a_trajectory_and_links_to_the_demo_also_when_it_is_written_anew(tmp_path):
    folder = make_folder(tmp_path / "run")
    card = write_card(folder, "ada/digits")
    assert "trajectory.gif" not in card and "/spaces/" not in card
    (folder / "trajectory.gif").write_bytes(b"moving")
    card = write_card(folder, space_id="ada/digits-demo")
    link = "[Try it in the browser](https://huggingface.co/spaces/ada/digits-demo)"
    assert card.count(link) == 1 and card.count("](trajectory.gif)") == 1
    assert write_card(folder) == card
    assert link in write_card(make_folder(tmp_path / "other"), "ada/digits", published=card)


@pytest.mark.parametrize("schedule", ["linear", "laplace"])
def test_the_card_names_the_schedule_that_the_model_was_trained_with(schedule, tmp_path):
    folder = make_folder(tmp_path / "run")
    DDPMNotesScheduler(50, beta_schedule=schedule).save_pretrained(folder / "scheduler")
    assert f"| diffusion | T = 50, {schedule} betas, epsilon, variance fixed_small |" in write_card(folder)


def test_numbers_of_other_weights_stay_out(tmp_path, caplog):
    folder = make_folder(tmp_path / "again")
    assert read_facts(folder).evaluation is not None
    unet = UNet2DModel.from_pretrained(folder / "unet")
    torch.nn.init.normal_(unet.conv_in.weight)
    unet.save_pretrained(folder / "unet")
    card = write_card(folder, "ada/digits")
    assert "Nothing has been measured" in card and "bits_per_dim.png" not in card and "model-index" not in card
    assert "other weights" in caplog.text


def test_only_the_ways_that_work_are_shown(shelf):
    plain, labelled, learned = (write_card(shelf[kind], "ada/digits") for kind in ("plain", "labelled", "learned"))
    for card in (plain, learned):
        assert 'DDPMPipeline.from_pretrained("ada/digits")' in card
    assert "import DDPMPipeline" not in labelled
    assert all("trust_remote_code=True" in code for code in snippets(labelled))
    assert "class_labels=[0, 1, 2, 0], guidance_scale=2.0" in labelled and "class_labels" not in plain


def fewest(scheduler="DDPMNotesScheduler", timesteps=None, needs=(), **settings):
    values = {"name": "it", "path": "best", "num_inference_steps": 5, "scheduler": scheduler, "needs": list(needs)}
    values |= {"scheduler_settings": settings, "timesteps": timesteps, "reference_steps": 50}
    numbers = ("kernel_distance", "standard_error", "reference_kernel_distance", "reference_standard_error")
    return EVALUATION | {"fewest_steps": values | dict.fromkeys(numbers, 0.125)}


PATH = [49, 30, 12, 4, 0]


@pytest.mark.parametrize(
    ("evaluation", "kind", "settings", "path"),
    [
        (
            fewest(variance_type="fixed_large", timesteps=PATH),
            DDPMNotesScheduler,
            {"variance_type": "fixed_large"},
            PATH,
        ),
        (fewest(variance_type="fixed_small", timesteps=PATH), DDPMNotesScheduler, {}, PATH),
        (fewest(variance_type="fixed_small", timesteps=[40, 30, 20, 10, 0]), DDPMNotesScheduler, {}, None),
        (
            fewest(eta=0.0, timestep_spacing="trailing"),
            DDPMNotesScheduler,
            {"eta": 0.0, "timestep_spacing": "trailing"},
            None,
        ),
        (fewest("DDIMScheduler", timestep_spacing="trailing"), DDIMScheduler, {"timestep_spacing": "trailing"}, None),
    ],
)
def test_the_code_samples_with_the_fewest_steps_at_equal_quality(tmp_path, evaluation, kind, settings, path):
    card = write_card(make_folder(tmp_path / "model", evaluation=evaluation), "ada/digits")
    assert "The fewest steps at equal quality: 5 best steps of it, kernel distance x 1000 125.00" in card
    (code,) = [code for code in snippets(card) if "result = pipe.bits_per_dim" in code]
    assert ("timesteps = [" in code) == (path is not None) and ("own = pipe.scheduler" in code) == bool(settings)
    pipe = DDPMNotesPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    calls, call = [], DDPMNotesPipeline.__call__

    class Watched(DDPMNotesPipeline):  # seeds what the card samples
        def __call__(self, **arguments):
            calls.append(call(self, **arguments, generator=torch.Generator().manual_seed(0)))
            return calls[-1]

    watched = Watched(**pipe.components)
    watched.set_progress_bar_config(disable=True)
    names = {"pipe": watched, **{name: getattr(diffusers, name) for name in ("DDIMScheduler",)}}
    _, _, lines = code.partition("trust_remote_code=True)\n")
    exec(lines, names)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    steps = {"timesteps": path} if path else {"num_inference_steps": 5}
    truth = pipe(batch_size=4, **steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    images = np.stack([np.asarray(image) for image in names["images"]])
    assert (images == (truth * 255).round().astype(np.uint8).squeeze(-1)).all()
    assert names["result"].total > 0 and watched.scheduler.variance_type == "fixed_small"
    assert code.startswith(
        f"from diffusers import {'DDIMScheduler, ' if kind is DDIMScheduler else ''}DiffusionPipeline\n"
    )


def test_what_the_model_lacks_is_not_shown_as_code(tmp_path):
    evaluation = fewest(variance_type="optimal", timesteps=PATH, needs=["levels", "original_sample_mse"])
    folder = make_folder(tmp_path / "model", evaluation=evaluation)
    card = write_card(folder, "ada/digits")
    assert "images = pipe(batch_size=4, num_inference_steps=50).images\nresult" in card and "timesteps = " not in card
    levels = {"weights": [[1.0] * 256], "decoder_blur": {0: 0.1}, "guess_blur": {}}
    DDPMNotesScheduler(50, original_sample_mse=[0.1] * 50, levels=levels).save_pretrained(folder / "scheduler")
    card = write_card(folder, "ada/digits")
    assert "from_config(own.config, variance_type='optimal')\ntimesteps = [49, 30, 12, 4, 0]\n" in card
    assert Evaluation.from_dict(evaluation).as_dict()["fewest_steps"] == evaluation["fewest_steps"]


def bounds(*rows):
    """An evaluation's rows of (variance, path, K, total)."""
    names = ("variance_type", "path", "num_inference_steps", "total")
    rest = {**PART, "standard_error": 0.1, "standard_errors": dict.fromkeys(PART, 0.01)}
    values = {**EVALUATION, "results": [{**rest, **dict(zip(names, row, strict=True))} for row in rows]}
    return Evaluation.from_dict(values).results


def test_the_leading_rows_are_the_own_variance_at_t_and_the_lowest_bounds_at_10_and_50():
    rows = bounds(
        ("fixed_small", "even", 10, 9.0),
        ("optimal", "even", 10, 5.0),
        ("optimal", "best", 10, 3.0),
        ("optimal", "best", 25, 2.0),
        ("optimal", "best", 50, 1.9),
        ("learned", "best", 50, 1.8),
        ("learned", "even", 1000, 1.7),
        ("optimal", "even", 1000, 1.6),
    )
    assert [row.total for row in leading_rows(rows, "learned", 1000)] == [1.7, 3.0, 1.8]
    assert [row.total for row in leading_rows(rows[3:4], "learned", 1000)] == [2.0]
    own_at_50 = bounds(("learned", "even", 50, 2.5))
    assert leading_rows(own_at_50, "learned", 50) == own_at_50  # once


def test_records_of_a_published_repository_are_written_as_they_were_read():
    """evaluation.json and training_run.json of version 0.1.0."""
    example = ROOT / "tests" / "examples" / "ddpm-mnist-0.1.0"
    for record in (Evaluation, TrainingRecord):
        text = (example / record.FILE).read_text(encoding="utf-8")
        assert json.dumps(record.read(example).as_dict(), indent=2) + "\n" == text


def test_a_card_of_an_earlier_version_is_replaced_but_for_what_its_owner_wrote(tmp_path):
    """The card that version 0.1.0 published has 2,535 lines, 2,344 of them metadata."""
    folder = tmp_path / "mnist"
    shutil.copytree(ROOT / "tests" / "examples" / "ddpm-mnist-0.1.0", folder)
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8")
    assert before.count("<!-- generated:") == 5
    edited = before.replace("## Training\n", "## Mine\n\nMy words.\n\n## Training\n").replace(
        "<!-- generated:limits", "Thanks.\n\n<!-- generated:limits"
    )
    path.write_text(edited, encoding="utf-8")
    card = write_card(folder)
    assert len(before.splitlines()) > 2500 and len(card.splitlines()) < 300
    assert card.count("My words.") == card.count("Thanks.") == card.count("## Training") == 1
    assert "knows nothing else" in card and card.count("## Measured") == 1 and card.count("<!-- card of") == 1
    results = ModelCard(card).data.eval_results
    named = [(r.metric_type, r.metric_args["num_inference_steps"]) for r in results]
    assert named == [("bits_per_dim", 1000), ("bits_per_dim", 10), ("bits_per_dim", 50), ("kernel_distance", 100)]
    assert write_card(folder) == card


def test_parameters_are_counted_without_loading_them(shelf):
    unet = UNet2DModel.from_pretrained(shelf["plain"] / "unet")
    found = read_facts(shelf["plain"]).pipeline.unet
    assert found.num_parameters() == sum(p.numel() for p in unet.parameters()) and found.device.type == "meta"
    assert f"{found.num_parameters() / 1e6:.2f} M weights" in write_card(shelf["plain"])


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        write_card(tmp_path)


# ------------------------------------------------------------ the owner's words

BLOCKS = {"about": "# digits\n\nA model.\n", "use": "## Use\n\nLoad it.\n"}
NEW = {"about": "# digits\n\nA better model.\n", "use": "## Use\n\nLoad it so.\n"}
OURS = {"library_name": "diffusers", "tags": ["ddpm"]}


def rewritten(change, blocks=NEW, metadata=OURS):
    card = merge("ada/digits", OURS, BLOCKS, None)
    changed = change(card)
    assert changed != card
    return merge("ada/digits", metadata, blocks, changed)


def test_a_card_nobody_touched_is_written_anew():
    again = merge("ada/digits", OURS, NEW, merge("ada/digits", OURS, BLOCKS, None))
    assert again == merge("ada/digits", OURS, NEW, None)
    assert merge("ada/digits", OURS, NEW, again) == again


@pytest.mark.parametrize("after", ["A model.\n<!-- /generated:about -->\n", "Load it.\n<!-- /generated:use -->\n"])
def test_text_between_and_after_the_blocks_stays_where_it_was(after):
    again = rewritten(lambda card: card.replace(after, f"{after}\n## Thanks\n\nTo my cat.\n"))
    assert again.count("## Thanks\n\nTo my cat.\n") == 1
    assert "A better model." in again and "Load it so." in again
    assert (again.index("To my cat") < again.index("## Use")) == ("about" in after)
    assert merge("ada/digits", OURS, NEW, again) == again


def test_text_above_the_blocks_stays_above():
    again = rewritten(lambda card: card.replace("<!-- generated:about", "> Read me first.\n\n<!-- generated:about"))
    assert again.index("> Read me first.") < again.index("A better model.")


def test_a_block_that_was_edited_stays_as_edited_for_good():
    again = rewritten(lambda card: card.replace("A model.", "My model."))
    assert "My model." in again and "A better model." not in again and "Load it so." in again
    assert merge("ada/digits", OURS, BLOCKS, again).count("My model.") == 1


def test_a_block_that_was_taken_out_stays_out_and_a_new_kind_of_block_comes_in():
    def cut(card):
        return re.sub(r"<!-- generated:use .*<!-- /generated:use -->\n", "", card, flags=re.DOTALL)

    again = rewritten(cut, {**NEW, "demo": "## Demo\n"})
    assert "Load it" not in again and again.count("## Demo") == 1
    assert "Load it" not in merge("ada/digits", OURS, {**NEW, "demo": "## Demo\n"}, again)


def test_a_card_that_is_all_the_owner_s_gets_the_blocks_below():
    again = merge("ada/digits", OURS, NEW, "---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    assert again.index("Words.") < again.index("A better model.")
    assert yaml.safe_load(again.split("---")[1])["license"] == "mit"


def test_line_ends_of_another_system_are_no_edit():
    card = merge("ada/digits", OURS, BLOCKS, None)
    assert merge("ada/digits", OURS, NEW, card.replace("\n", "\r\n")) == merge("ada/digits", OURS, NEW, None)


def test_metadata_of_the_owner_wins_and_lists_are_joined():
    def change(card):
        return card.replace("license: apache-2.0", "license: mit\nthumbnail: cat.png").replace(
            "- ddpm", "- cats\n- ddpm"
        )

    data = yaml.safe_load(rewritten(change, metadata={**OURS, "datasets": ["a/b"]}).split("---")[1])
    assert data["license"] == "mit" and data["thumbnail"] == "cat.png" and data["datasets"] == ["a/b"]
    assert data["tags"] == ["cats", "ddpm"]
    asked = rewritten(change, metadata={**OURS, "license": "cc0-1.0"})
    assert yaml.safe_load(asked.split("---")[1])["license"] == "cc0-1.0"


def test_a_repository_that_turns_unconditional_says_so(shelf):
    before = write_card(shelf["labelled"], "ada/digits")
    assert "class-conditional" in ModelCard(before).data.tags
    assert "class-conditional" not in ModelCard(write_card(shelf["plain"], "ada/digits", published=before)).data.tags


def test_measured_numbers_are_replaced_and_the_owner_s_own_stay(tmp_path):
    folder = make_folder(tmp_path / "m")
    card = write_card(folder, "ada/digits")
    own = """    - type: fid
      value: 12.5
      name: FID
"""
    at = card.index("    - type: bits_per_dim")
    (folder / "README.md").write_text(card[:at] + own + card[at:])
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["results"] = evaluation["results"][:1]
    evaluation["results"][0]["total"] = 4.5
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    results = ModelCard(write_card(folder)).data.eval_results
    assert sorted((r.metric_type, r.metric_value) for r in results) == [("bits_per_dim", 4.5), ("fid", 12.5)]


def test_a_card_knows_whose_repository_it_is_for(shelf):
    card = write_card(shelf["learned"], "ada/digits")
    assert write_card(shelf["learned"]) == card


def test_edits_here_and_on_the_hub_are_both_kept(tmp_path, caplog):
    folder = make_folder(tmp_path / "both")
    card = write_card(folder, "ada/digits")
    (folder / "README.md").write_text(card.replace("## Intended use", "Mine.\n\n## Intended use"))
    merged = write_card(folder, "ada/digits", published=card.replace("## Measured", "Theirs.\n\n## Measured"))
    assert "Theirs." in merged and "Mine." not in merged
    assert "Mine." in (folder / "README.local.md").read_text() and "README.local.md" in caplog.text


def test_words_on_the_hub_are_not_lost_to_an_edit_in_another_copy_of_the_folder(tmp_path):
    folder = make_folder(tmp_path / "copy")
    card = write_card(folder, "ada/digits")
    (folder / "README.md").write_text(card.replace("## Measured", "Theirs.\n\n## Measured"))
    published = write_card(folder, "ada/digits")  # as if pushed, and not edited since
    (folder / "README.md").write_text(card.replace("## Intended use", "Mine.\n\n## Intended use"))
    assert "Theirs." in write_card(folder, "ada/digits", published=published)
    assert "Mine." in (folder / "README.local.md").read_text()


def test_an_edit_here_alone_goes_up(tmp_path):
    folder = make_folder(tmp_path / "here")
    card = write_card(folder, "ada/digits")
    (folder / "README.md").write_text(card.replace("## Intended use", "Mine.\n\n## Intended use"))
    assert "Mine." in write_card(folder, "ada/digits", published=card)
    assert not (folder / "README.local.md").exists()
