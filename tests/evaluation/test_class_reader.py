"""Class accuracy against a regression of our own, with labels at random, and in a run's files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation import class_reader
from ddpm_notes_pipeline.evaluation.class_reader import ClassReader
from ddpm_notes_pipeline.evaluation.features import load_feature_network
from ddpm_notes_pipeline.evaluation.metrics import measure_samples
from tests.evaluation.test_evaluate import EVALUATE, results, save_network
from tests.support.launching import ROOT, TINY, once

pytestmark = pytest.mark.filterwarnings("ignore:frechet_distance of")  # few images are enough here


@pytest.fixture(scope="module")
def sets():
    return [load_images("digits", split=s, label_column="label", show_progress=False) for s in ("train", "test")]


@pytest.fixture(scope="module")
def network():
    return load_feature_network(image_size=32)


def pixels(images):
    return images.take(range(len(images)))


def softmax_regression(features, labels, read):
    """Classes of `read` by the minimum of sum of cross entropies + |W|^2 / 2, found by torch."""
    mean, deviation = features.mean(0), features.std(0, correction=0)
    x, y = ((f - mean) / deviation.where(deviation > 0, 1.0) for f in (features, read))
    weights = torch.zeros(len(x[0]), 10, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=400, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weights + bias, labels, reduction="sum")
        value = value + weights.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return (y @ weights + bias).argmax(1).detach()


def test_the_accuracy_is_that_of_a_regression_of_our_own(sets, network):
    real, held_out = sets
    result = measure_samples(pixels(held_out), real, network=network, class_labels=held_out.labels, show_progress=False)
    a, b = (torch.cat([network(part) for part in pixels(images).split(64)]).double() for images in sets)
    truth = softmax_regression(a, torch.from_numpy(real.labels), b).numpy() == held_out.labels
    assert result.class_accuracy == pytest.approx(truth.mean(), abs=1.5 / len(truth))  # an image may be on the edge
    assert truth.mean() > 0.85
    assert result.protocol.classifier == "logistic regression (C = 1) on standardised features of 1438 real images"


def test_labels_at_random_are_read_by_chance(sets, network):
    real, held_out = sets
    shuffled = np.random.default_rng(0).permutation(held_out.labels)
    result = measure_samples(pixels(held_out), real, network=network, class_labels=shuffled, show_progress=False)
    chance, deviation = 0.1, (0.1 * 0.9 / len(shuffled)) ** 0.5
    assert result.class_accuracy == pytest.approx(chance, abs=3 * deviation)


def test_without_labels_classes_or_a_network_there_is_none(sets, network):
    real, held_out = sets
    few, labels = pixels(held_out)[:20], held_out.labels[:20]
    unlabelled = load_images("digits", split="train", show_progress=False)
    one_class = replace(real, labels=np.zeros_like(real.labels))
    for settings in (
        {"real": real, "network": network},
        {"real": unlabelled, "network": network, "class_labels": labels},
        {"real": pixels(real), "network": network, "class_labels": labels},
        {"real": real, "network": None, "class_labels": labels},
        {"real": one_class, "network": network, "class_labels": labels},
    ):
        result = measure_samples(few, show_progress=False, **settings)
        assert result.class_accuracy is None and result.protocol.classifier is None
        assert not any("class_accuracy" in name for name in result.as_dict())


def test_another_number_of_labels_is_refused(sets, network):
    with pytest.raises(ValueError, match="19 class_labels for 20 images; must be one each"):
        measure_samples(
            pixels(sets[1])[:20], sets[0], network=network, class_labels=sets[1].labels[:19], show_progress=False
        )


def test_it_is_fitted_once_and_to_evenly_spaced_images_at_most(monkeypatch):
    monkeypatch.setattr(class_reader, "MOST_FITTED", 10)
    features, labels = torch.eye(2).repeat_interleave(50, 0), np.arange(100) // 50
    reader = ClassReader()
    reader.fit(features, labels)
    assert reader.description.endswith("of 10 real images") and reader.accuracy(features, labels) == 1
    reader.fit(features, 1 - labels)
    assert reader.accuracy(features, labels) == 1


@pytest.mark.slow
def test_a_model_with_classes_has_it_in_all_its_files(train, sets):
    """Its samples are noise yet, and read by chance; held-out images show their class."""

    def run(folder):
        network = save_network(folder.with_name(f"{folder.name}-small-vit"))
        flags = ["--metric_interval", 12, "--metric_images", 20, "--metric_network", network, "--label_column", "label"]
        return train(*TINY, *flags, "--validation_split", "test", "--output_dir", folder)

    folder, _ = once("classes", run)
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= row["class_accuracy"] < row["held_out_class_accuracy"] < 1
    held_out, samples = results(folder)["metrics"]
    network = samples["protocol"]["network"]
    assert samples[f"class_accuracy ({network})"] == row["class_accuracy"]
    assert held_out[f"class_accuracy ({network})"] == row["held_out_class_accuracy"]
    read = load_feature_network(str(folder.with_name(f"{folder.name}-small-vit")))
    a, b = (torch.cat([read(part) for part in pixels(images).split(64)]).double() for images in sets)
    truth = softmax_regression(a, torch.from_numpy(sets[0].labels), b).numpy() == sets[1].labels
    assert row["held_out_class_accuracy"] == pytest.approx(truth.mean(), abs=2.5 / len(truth))
    card = (folder / "README.md").read_text()
    assert "| class acc |" in card and "GAN-test" in card and f"| {row['held_out_class_accuracy']:.3f} |" in card
    flags = ["--metrics", "--metric_images", 20, "--metric_network", folder.with_name(f"{folder.name}-small-vit")]
    flags += ["--num_inference_steps", 2, "--max_images", 21]
    flags += ["--config", ROOT / "training" / "configs" / "digits.yaml", "--label_column", "label"]
    train("--model", folder, *flags, script=EVALUATE)
    held_out, samples = results(folder)["metrics"]
    assert samples[f"held_out_class_accuracy ({network})"] == held_out[f"class_accuracy ({network})"] > 0.2
