"""Distances against direct computations and known answers, protocols, and what is refused.

The feature network is the real one with its ImageNet weights, at 32x32 for speed.
"""

import json
import math
import warnings

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.distances import (
    FeatureSet,
    frechet_distance,
    kernel_distance,
    nearest_rows,
    precision_recall,
)
from ddpm_notes_pipeline.evaluation.features import FeatureNetwork, full_float32, load_feature_network
from ddpm_notes_pipeline.evaluation.metrics import SampleComparison, measure_samples
from ddpm_notes_pipeline.evaluation.reading import nearest_training_images
from ddpm_notes_pipeline.evaluation.records import SampleMetrics

FEW = "ignore:frechet_distance of"  # few images, where a test is about something else


@pytest.fixture(scope="module")
def network():
    return load_feature_network(image_size=32)


@pytest.fixture(scope="module")
def train():
    return load_images("digits", split="train", label_column="label", show_progress=False)


@pytest.fixture(scope="module")
def test_split():
    return load_images("digits", split="test", show_progress=False)


def normal(n, d, seed, mean=0.0, scale=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + mean


def take(images, n, first=0):
    return images.take(range(first, first + n))


# ------------------------------------------------------------ distances


def feature_sets(a, b):
    return FeatureSet(a, seed=0), FeatureSet(b, seed=1)


def frechet_by_scipy(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    s, r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ r).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s + r - 2 * root)


@pytest.mark.parametrize(("n", "m"), [(400, 300), (50, 40)])
def test_frechet_distance_is_scipys(n, m):
    mix = normal(64, 64, 2)
    a, b = normal(n, 64, 0) @ mix, normal(m, 64, 1, mean=0.3, scale=1.5) @ mix.T
    assert frechet_distance(*feature_sets(a, b)) == pytest.approx(frechet_by_scipy(a, b), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    a, b = normal(200_000, 2, 0), normal(200_000, 2, 1) * torch.tensor([2.0, 3.0]) + torch.tensor([1.0, 0.0])
    assert frechet_distance(*feature_sets(a, b)) == pytest.approx(1 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=0.02)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_distance_on_features_of_images(network, train):
    a, b = (network(pixels)[:, :200] for pixels in (take(train, 300), take(train, 300).flip(-1)))
    assert frechet_distance(*feature_sets(a, b)) == pytest.approx(frechet_by_scipy(a, b), rel=1e-6)


def kernel_by_sums(a, b):
    a, b = a.double().numpy(), b.double().numpy()

    def k(u, v):
        return (u @ v / len(u) + 1) ** 3

    same = [
        sum(k(f[i], f[j]) for i in range(len(f)) for j in range(len(f)) if i != j) / (len(f) * (len(f) - 1))
        for f in (a, b)
    ]
    return sum(same) - 2 * sum(k(u, v) for u in a for v in b) / (len(a) * len(b))


def test_kernel_distance_and_its_error_are_the_direct_sums():
    a, b = normal(31, 6, 0), normal(23, 6, 1, mean=0.4)
    value, error = kernel_distance(*feature_sets(a, b), subsets=5)
    assert value == pytest.approx(kernel_by_sums(a, b), rel=1e-10)
    orders = [torch.randperm(len(f), generator=torch.Generator().manual_seed(seed)) for seed, f in enumerate((a, b))]
    parts = [order.tensor_split(5) for order in orders]
    without = [
        kernel_by_sums(*(f[torch.cat([p for j, p in enumerate(part) if j != i])] for f, part in zip((a, b), parts)))
        for i in range(5)
    ]
    assert error == pytest.approx(math.sqrt(4 / 5 * np.sum((without - np.mean(without)) ** 2)), rel=1e-8)


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kernel_distance_is_that_of_torchmetrics_where_it_takes_all_images():
    a, b = normal(60, 16, 0).double(), normal(60, 16, 1, mean=0.3).double()
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert kernel_distance(*feature_sets(a, b))[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_its_spread():
    """Over 120 draws: the mean is the distance, errors its deviation, up to sqrt(2) above at 0."""
    for shift, least, most in ((0.0, 0.9, 1.6), (1.0, 0.8, 1.25)):
        draws = [feature_sets(normal(60, 8, s), normal(40, 8, s + 1000, mean=shift)) for s in range(120)]
        drawn = np.array([kernel_distance(*sets) for sets in draws])
        a, b = normal(500_000, 8, 5).double(), normal(500_000, 8, 6).double()
        xx, yy, xy = (
            float(((((u * v).sum(1) / 8) + 1) ** 3).mean()) for u, v in ((a, b), (a + shift, b + shift), (a, b + shift))
        )
        spread = drawn[:, 0].std()
        assert abs(drawn[:, 0].mean() - (xx + yy - 2 * xy)) < 4 * spread / math.sqrt(120) + 0.01
        assert least * spread < np.sqrt(np.mean(drawn[:, 1] ** 2)) < most * spread


def precision_by_loops(real, generated, k=3):
    real, generated = real.double().numpy(), generated.double().numpy()
    hits = 0
    for g in generated:
        for i, r in enumerate(real):
            others = sorted(np.linalg.norm(r - q) for j, q in enumerate(real) if j != i)
            if np.linalg.norm(g - r) <= others[k - 1]:
                hits += 1
                break
    return hits / len(generated)


def test_precision_and_recall_are_the_direct_ones():
    real, generated = normal(40, 5, 0), normal(30, 5, 1, mean=0.8, scale=0.7)
    precision, recall = precision_recall(*feature_sets(real, generated))
    assert precision == pytest.approx(precision_by_loops(real, generated))
    assert recall == pytest.approx(precision_by_loops(generated, real))
    assert 0 < recall < precision < 1


def test_precision_and_recall_where_the_answer_is_known():
    a = normal(1500, 2, 0)  # more rows than are compared at once
    real = FeatureSet(a, seed=0)

    def beside_real(**settings):
        return precision_recall(real, FeatureSet(normal(1200, 2, 1, **settings), seed=1))

    assert beside_real(mean=100.0) == (0, 0)
    assert min(beside_real()) > 0.95
    precision, recall = beside_real(scale=0.1)  # a few modes, seen well
    assert precision > 0.95 and recall < 0.2
    precision, recall = beside_real(scale=10.0)
    assert precision < 0.5 and recall > 0.5


# ------------------------------------------------------------ real images


def blurred(pixels, sigma):
    offsets = torch.arange(-3, 4).float()
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    return nn.functional.conv2d(pixels.float(), kernel, padding=3).round().clamp(0, 255).to(torch.uint8)


def noisy(pixels, std):
    return (pixels + std * normal(pixels.numel(), 1, 7).view(pixels.shape)).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def measure(network, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")

    def measured(generated, **more):
        more = {"network": network, "cache_dir": folder, "show_progress": False, **more}
        return measure_samples(generated, train, **more)

    return measured


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW)
def test_blur_noise_and_missing_classes_are_ranked_by_their_strength(measure, train, test_split):
    pixels = take(test_split, len(test_split))
    equal = measure(pixels)
    series = {
        "blur": [measure(blurred(pixels, sigma)) for sigma in (0.4, 0.7, 1.5)],
        "noise": [measure(noisy(pixels, std)) for std in (10, 30, 90)],
        "classes": [measure(take(train, 1437)[torch.from_numpy(train.labels[:1437] < c)]) for c in (7, 4, 1)],
    }
    assert abs(equal.kernel_distance) < 4 * equal.kernel_distance_standard_error
    for name, steps in series.items():
        for figure in ("frechet_distance", "kernel_distance", "pixel_variance_error"):
            values = [getattr(result, figure) for result in steps]
            if name == "classes" and figure == "frechet_distance":
                values[0] = min(values[0], values[1])  # fewer images are farther at any number of classes
            assert values == sorted(values), (name, figure, values)
        assert steps[-1].kernel_distance > equal.kernel_distance + 4 * steps[-1].kernel_distance_standard_error, name
        assert steps[-1].frechet_distance > equal.frechet_distance, name
    # samples of one class are good and cover little; noise leaves the manifold
    assert series["classes"][-1].precision > 0.9 > 0.5 > series["classes"][-1].recall
    assert series["noise"][-1].precision < 0.1 < 0.5 < equal.precision


@pytest.mark.filterwarnings(FEW)
def test_a_set_against_itself(measure, train):
    same = measure(train, train=train, held_out=train)
    assert same.frechet_distance < 1e-3
    assert -1e-3 < same.kernel_distance < 0  # unbiased for independent sets, so below 0 for equal ones
    assert (same.precision, same.recall) == (1, 1)
    assert (same.pixel_mean_error, same.pixel_variance_error, same.nearest_train_distance) == (0, 0, 0)


def test_pixel_statistics_are_numpys(train, test_split):
    result = measure_samples(test_split, train, train=train, held_out=take(test_split, 50), network=None)
    a, b = (take(images, len(images)).double().numpy() / 255 for images in (test_split, train))
    assert result.pixel_mean_error == pytest.approx(np.sqrt(np.mean((a.mean(0) - b.mean(0)) ** 2)), rel=1e-12)
    assert result.pixel_variance_error == pytest.approx(np.sqrt(np.mean((a.var(0) - b.var(0)) ** 2)), rel=1e-9)
    nearest = np.sqrt(((a[:, None] - b[None]) ** 2).mean((2, 3, 4)).min(1))
    assert result.nearest_train_distance == pytest.approx(np.sort(nearest)[179], rel=1e-12)
    assert result.held_out_nearest_train_distance == pytest.approx(np.sort(nearest[:50])[24], rel=1e-12)
    assert (result.protocol.num_train, result.protocol.num_nearest) == (len(train), len(test_split))
    assert result.protocol.num_held_out_nearest == 50
    assert not any("(" in name for name in result.as_dict())


def test_copies_of_training_images_show_as_much_nearer_than_held_out_ones(train, test_split):
    """All samples copied, with one grey level changed."""
    copies = take(train, 100)
    copies[:, 0, 4, 4] ^= 1
    result = measure_samples(copies, train, train=train, held_out=test_split, network=None)
    assert result.nearest_train_distance == pytest.approx(1 / 255 / 8, rel=1e-9)
    assert result.held_out_nearest_train_distance > 20 * result.nearest_train_distance


@pytest.mark.parametrize("size", [7, 4000])
def test_the_nearest_rows_are_those_of_a_direct_search(size):
    points, rows = normal(5, 6, 0), normal(3000, 6, 1)
    truth = (points[:, None].double() - rows.double()).square().sum(-1).min(1)
    chunks = ((first, rows[first : first + size]) for first in range(0, len(rows), size))
    squared, numbers = nearest_rows(points, chunks)
    assert numbers.tolist() == truth.indices.tolist()
    assert squared.numpy() == pytest.approx(truth.values.numpy(), abs=1e-9)


def test_the_nearest_training_image_of_a_copy_is_what_was_copied(train):
    copied = [3, 1200, 77]
    nearest, distances = nearest_training_images(train.take(copied), train)
    assert torch.equal(nearest, train.take(copied)) and distances.tolist() == [0, 0, 0]
    dimmed = (train.take([5]).float() * 0.98).byte()
    nearest, (distance,) = nearest_training_images(dimmed, train)
    every = ((train.take(range(1438)).double() - dimmed.double()) / 255).square().flatten(1).mean(1).sqrt()
    assert float(distance) == pytest.approx(float(every.min())) and torch.equal(nearest, train.take([5]))


def test_probes_of_a_large_set_are_spread_evenly(train):
    pixels = torch.arange(2500) % 256
    images = pixels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    result = measure_samples(images, images, train=images[:1], network=None)
    kept = pixels[::4].double()  # every second, then every second of these
    assert result.protocol.num_nearest == 625
    assert result.nearest_train_distance == pytest.approx(float(kept.median()) / 255)


@pytest.mark.filterwarnings(FEW)
def test_any_form_of_images_gives_the_same_numbers(train, test_split):
    pixels = take(test_split, 70)
    forms = {
        "tensor": pixels,
        "array": pixels.numpy(),
        "floats": pixels.float() / 255,
        "doubles": pixels.double() / 255,
        "batches": (part for part in pixels.split(17)),
        "dictionaries": [{"pixel_values": part} for part in pixels.split(50)],
    }
    results = [
        measure_samples(images, take(train, 90), network=counting(), show_progress=False) for images in forms.values()
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.filterwarnings(FEW)
def test_several_sets_are_compared_with_real_images_that_are_read_once(train, test_split):
    """The figures are those of each set alone, though only the first can read these iterators."""
    real, held_out, sets = take(train, 60), take(test_split, 30), [take(test_split, n, 100) for n in (20, 9, 25)]
    once = {name: iter(images.split(7)) for name, images in {"real": real, "held_out": held_out}.items()}
    compared = SampleComparison(train=real, network=counting(), show_progress=False, **once)
    found = [compared.measure(images, sampling={"set": i}) for i, images in enumerate(sets)]
    assert compared.network.images == len(real) + sum(map(len, sets))
    settings = {"train": real, "held_out": held_out, "network": compared.network, "show_progress": False}
    alone = [measure_samples(images, real, sampling={"set": i}, **settings) for i, images in enumerate(sets)]
    assert found == alone


def test_what_depends_on_one_set_alone_is_computed_once():
    real, others = FeatureSet(normal(50, 4, 0), seed=0), [FeatureSet(normal(40, 4, seed), seed) for seed in (1, 2)]
    expected = [(kernel_distance(real, one), precision_recall(real, one)) for one in others]
    alone = [FeatureSet(one.features, seed) for seed, one in enumerate(others, 1)]
    kept, measured = (real.squared_radii, real.kernel_sums(10)), []
    for one in alone:
        measured.append((kernel_distance(real, one), precision_recall(real, one)))
        assert real.squared_radii is kept[0] and real.kernel_sums(10) is kept[1]
    assert measured == expected


@pytest.mark.filterwarnings(FEW)
def test_a_set_that_was_refused_leaves_the_next_ones_alone(train, test_split):
    """Of real images in batches the shape is not known before they are read."""
    real, good = list(take(train, 30).split(10)), take(test_split, 20)
    compared = SampleComparison(real, network=counting(), show_progress=False)
    with pytest.raises(ValueError, match="2 channels; small takes 1, 3 or 4"):
        compared.measure(good.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match=r"generated has images of shape \(1, 4, 4\) .* beside \(1, 8, 8\)"):
        compared.measure(good[:, :, :4, :4])
    found = compared.measure(good)
    assert found == measure_samples(good, real, network=compared.network, show_progress=False)


@pytest.mark.filterwarnings(FEW)
def test_the_protocol_has_what_every_figure_depends_on(measure, train, test_split):
    sampling = {"num_inference_steps": 50, "variance_type": "optimal", "seeds": "0..39"}
    result = measure(take(test_split, 40), train=train, sampling=sampling, source="PNG, not resized")
    written = json.loads(json.dumps(result.as_dict()))
    assert SampleMetrics.from_dict(written).as_dict() == written
    protocol = written.pop("protocol")
    over_features = ("frechet_distance", "kernel_distance", "kernel_distance_standard_error", "precision", "recall")
    pixels = ("pixel_mean_error", "pixel_variance_error", "nearest_train_distance")
    assert set(written) == {f"{name} (efficientnet-lite0)" for name in over_features} | set(pixels)
    assert all(isinstance(value, float) and math.isfinite(value) for value in written.values())
    said = {
        "network": "efficientnet-lite0",
        "num_features": 1280,
        "num_generated": 40,
        "num_real": 1438,
        "num_train": 1438,
        "image_shape": [1, 8, 8],
        "real": "digits",
        "split": "train",
        "fingerprint": train.fingerprint,
        "sampling": sampling,
        "source": "PNG, not resized",
    }
    assert {name: protocol[name] for name in said} == said
    assert "32x32, bicubic, antialiased; grey repeated" in protocol["preprocessing"] and len(protocol["weights"]) == 32
    assert len(protocol["notes"]) == 1 and "40 generated and 1438 real images over 1280" in protocol["notes"][0]


# ------------------------------------------------------------ what is refused


def test_fewer_images_than_features_are_warned_of(measure, test_split):
    with pytest.warns(UserWarning, match="40 generated and 1438 real images over 1280 features.*singular"):
        measure(take(test_split, 40))


def test_sets_whose_files_were_treated_differently_are_warned_of(tmp_path, test_split):
    """The same images as PNG, as JPEG, and resized by the loader."""
    pixels = take(test_split, 20)[:, 0].numpy().repeat(2, 1).repeat(2, 2)
    for kind in ("png", "jpg"):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(pixels):
            PIL.Image.fromarray(image).save(tmp_path / kind / f"{i:02d}.{kind}")
    png, jpg = (load_images(train_data_dir=tmp_path / kind, cache_dir=tmp_path) for kind in ("png", "jpg"))
    small = load_images(train_data_dir=tmp_path / "jpg", cache_dir=tmp_path, resolution=8)
    assert [(x.lossy, x.resized) for x in (png, jpg, small)] == [(0, 0), (20, 0), (20, 20)]
    with pytest.warns(UserWarning, match="100% of generated, 0% of real came from JPEG files") as found:
        result = measure_samples(jpg, png, network=None)
    assert len(found) == 1 and len(result.protocol.notes) == 1
    with warnings.catch_warnings():  # a part has the share of its file
        warnings.simplefilter("error")
        measure_samples(jpg.at_most(10), jpg, held_out=jpg.part(np.arange(2), "few"), train=jpg, network=None)
    eight = load_images(train_data_dir=tmp_path / "png", cache_dir=tmp_path, resolution=8)
    with pytest.warns(UserWarning, match="JPEG"):
        measure_samples(small, eight, network=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_samples(png, png, network=None)  # alike
        measure_samples(small, small, network=None)
    whole = load_images("digits", split="test", cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="100% of generated, 0% of real were resized"):
        measure_samples(eight, whole, network=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float() / 127.5 - 1, r"generated has floats from -1 to 1; must be in \[0, 1\].*to_uint8"),
        (lambda x: x.float(), r"generated has floats from 0 to 255; must be in \[0, 1\]"),
        (lambda x: x.long(), "generated has dtype torch.int64; must be uint8"),
        (lambda x: (x.float() / 255).byte(), "generated has only 0 and 1 as uint8"),
        (lambda x: x.float().div(255).masked_fill(x == 0, math.nan), "generated has floats from nan"),
        (lambda x: x.expand(-1, 3, -1, -1), r"generated \(3, 8, 8\), real \(1, 8, 8\)"),
        (lambda x: x.repeat(1, 1, 2, 2), r"generated \(1, 16, 16\), real \(1, 8, 8\); must be one shape"),
        (lambda x: x.permute(0, 2, 3, 1), r"\(1, 8, 8, 1\); must be a tensor \(N, C, H, W\) with 1 to 4"),
        (lambda x: x[0], r"generated has a batch of shape \(1, 8, 8\); must be a tensor \(N, C, H, W\) with 1 to 4"),
        (lambda x: [x, x.repeat(1, 1, 2, 2)], r"generated has images of shape \(1, 16, 16\) .* beside \(1, 8, 8\)"),
        (lambda x: [x, x.float() / 127.5 - 1], "generated has floats from -1 to 1"),
        (lambda x: x[:7], "7 generated and 1438 real images; must be at least 8"),
        (lambda x: iter(()), "generated is empty"),
        (lambda x: "images", "generated is str; must be an ImageSet"),
        (lambda x: [["a"]], "generated has a batch of type list"),
    ],
)
def test_images_of_another_kind_are_refused(measure, test_split, change, message):
    with pytest.raises(ValueError, match=message):
        measure(change(take(test_split, 20)))


def test_what_cannot_be_measured_is_refused(test_split):
    pixels = take(test_split, 20)
    two = pixels.expand(-1, 2, -1, -1)
    with pytest.raises(ValueError, match="2 channels; efficientnet-lite0 takes 1, 3 or 4"):
        measure_samples(two, two)
    with pytest.raises(ValueError, match="held_out is given without train"):
        measure_samples(pixels, pixels, held_out=pixels, network=None)
    with pytest.raises(ValueError, match="batch_size is 0"):
        measure_samples(pixels, pixels, network=None, batch_size=0)
    few = feature_sets(normal(3, 2, 0), normal(9, 2, 1))
    with pytest.raises(ValueError, match="3 and 9 images in precision and recall; must be more than k = 3"):
        precision_recall(*few)
    with pytest.raises(ValueError, match="must be at least 3 images and 2 subsets"):
        kernel_distance(*feature_sets(normal(2, 2, 0), normal(9, 2, 1)))


def test_features_that_are_not_finite_are_refused(train, test_split):
    broken = load_feature_network(image_size=32)
    broken.scale = math.inf
    with pytest.raises(ValueError, match="efficientnet-lite0 gives features of real images that are not finite"):
        measure_samples(take(test_split, 20), take(train, 20), network=broken)


# ------------------------------------------------------------ networks


def test_the_offline_network_knows_a_photograph():
    """Its preprocessing is that of its training: its classifier sees that a flower is a daisy."""
    from sklearn.datasets import load_sample_image

    network = load_feature_network()
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    features = network(photograph)
    assert features.shape == (1, 1280) and network.image_size == (224, 224) and features.dtype == torch.float32
    assert int(network.network.network.get_submodule("_fc")(features).argmax()) == 985
    grey = photograph[:, :1]
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert not network.train().network.training


def test_features_do_not_depend_on_the_callers_precision(network, train):
    pixels = take(train, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(pixels)
    torch.testing.assert_close(inside, network(pixels), rtol=0, atol=0)
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    with full_float32():
        assert setting.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert setting.fp32_precision == before


def preprocessor(folder, **more):
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_normalize": True, "resample": 3, **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def tiny(kind, folder):
    """A randomly initialised vision model of transformers, saved in a folder."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**small, mlp_ratio=2))
        preprocessor(folder, size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, do_center_crop=True)
    elif kind == "vit":  # as from a classifier's checkpoint: no pooler
        model = ViTModel(ViTConfig(**small, intermediate_size=32), add_pooling_layer=False)
        preprocessor(folder, size={"height": 28, "width": 28}, resample=2)
    elif kind == "resnet":
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
        preprocessor(folder, size=28)
    else:
        vision = {**small, "intermediate_size": 32}
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12))
        preprocessor(folder, size={"shortest_edge": 28})
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "dims"), [("dinov2", 16), ("vit", 16), ("resnet", 16), ("clip", 12)])
@torch.no_grad()
def test_any_vision_model_of_transformers(kind, dims, tmp_path, train):
    folder = tmp_path / "my-network"
    folder.mkdir()
    model = tiny(kind, folder)
    network = load_feature_network(str(folder))
    assert (network.name, network.num_features, network.image_size) == ("my-network", dims, (28, 28))
    pixels = take(train, 12)
    x = pixels.float().expand(-1, 3, -1, -1)
    mode = "bilinear" if kind == "vit" else "bicubic"
    x = nn.functional.interpolate(x, (28, 28), mode=mode, antialias=True).clamp(0, 255) / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    expected = {
        "dinov2": lambda: model(x).last_hidden_state[:, 0],
        "vit": lambda: model(x).last_hidden_state[:, 0],
        "resnet": lambda: model(x).last_hidden_state.mean((2, 3)),
        "clip": lambda: model.visual_projection(model.vision_model(x).pooler_output),
    }[kind]()
    torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-5)
    result = measure_samples(take(train, 30), take(train, 30, 500), network=str(folder), show_progress=False)
    assert "frechet_distance (my-network)" in result.as_dict() and str(tmp_path) not in json.dumps(result.as_dict())


def test_networks_that_would_mislead_are_refused(tmp_path):
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        load_feature_network(str(tmp_path))
    preprocessor(tmp_path, size={"longest_edge": 64})
    with pytest.raises(ValueError, match=r"\{'longest_edge': 64\} as the size of its images; give image_size"):
        load_feature_network(str(tmp_path))
    with pytest.raises(ValueError, match="image_size is 0"):
        load_feature_network(image_size=0)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessor(tmp_path, size=224)
    with pytest.raises(ValueError, match=r"no weights for .* of its ViTModel: its features would be random"):
        load_feature_network(str(tmp_path))


# ------------------------------------------------------------ cached features


class Counting(FeatureNetwork):
    """A small network that counts the images it is given."""

    images = 0

    def forward(self, pixels):
        self.images += len(pixels)
        return super().forward(pixels)


def counting(image_size=8, name="small", seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = Counting(name, nn.Sequential(*layers), (image_size, image_size), [0.5] * 3, [0.5] * 3)
    network.images = 0
    return network


# ------------------------------------------------------------ transparency


def transparent(n, seed=0):
    """RGBA images that are whole levels on grey 128: alpha 0, 1/5, ..., 1 and colours 128 + 5k."""
    generator = torch.Generator().manual_seed(seed)
    alpha = 51 * torch.randint(0, 6, (n, 1, 8, 8), generator=generator)
    colours = 128 + 5 * torch.randint(-25, 26, (n, 3, 8, 8), generator=generator)
    on_grey = 128 + (colours - 128) // 5 * (alpha // 51)
    return torch.cat([colours, alpha], 1).byte(), on_grey.byte()


def test_features_of_transparent_images_are_those_of_the_images_on_mid_grey():
    network = counting()
    images, on_grey = transparent(6)
    assert torch.allclose(network(images), network(on_grey), atol=1e-5)
    assert not torch.allclose(network(images), network(images[:, :3]), atol=1e-2)


@pytest.mark.filterwarnings(FEW)
def test_figures_of_transparent_images_are_those_of_the_images_on_mid_grey(tmp_path):
    network, figures = counting(), ("frechet_distance", "kernel_distance", "precision", "recall")
    (made, made_on_grey), (real, real_on_grey) = transparent(40, 1), transparent(50, 2)
    result = measure_samples(made, real, train=real, network=network, show_progress=False)
    opaque = measure_samples(made_on_grey, real_on_grey, network=network, show_progress=False)
    for name in figures:
        assert getattr(result, name) == pytest.approx(getattr(opaque, name), rel=1e-3), name
    assert result.protocol.preprocessing == f"RGBA composited on grey 128; {network.preprocessing}"
    assert opaque.protocol.preprocessing == network.preprocessing and "RGBA" not in network.preprocessing
    assert result.protocol.image_shape == [4, 8, 8]
    a, b = made.flatten(1).double() / 255, real.flatten(1).double() / 255  # of all four channels as they are
    nearest = torch.cdist(a, b).min(1).values / a.shape[1] ** 0.5
    assert result.nearest_train_distance == pytest.approx(float(nearest.median()), rel=1e-6)


@pytest.mark.filterwarnings(FEW)
def test_cached_features_of_transparent_images_state_the_grey(tmp_path):
    from safetensors import safe_open

    folder = tmp_path / "rgba"
    folder.mkdir()
    for i, image in enumerate(transparent(20)[0]):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    real = load_images(train_data_dir=folder, cache_dir=tmp_path / "images", show_progress=False)
    measure_samples(transparent(20, 1)[0], real, network=counting(), cache_dir=tmp_path / "cache", show_progress=False)
    (path,) = (tmp_path / "cache").iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata()["preprocessing"].startswith("RGBA composited on grey 128; whole image resized")


@pytest.mark.filterwarnings(FEW)
def test_features_of_the_real_images_are_cached_by_images_network_and_preprocessing(tmp_path, test_split):
    generated = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def evaluations(network, real=test_split, **more):
        before = network.images
        result = measure_samples(generated, real, network=network, cache_dir=tmp_path, show_progress=False, **more)
        return network.images - before - len(generated), result

    network, n = counting(), len(test_split)
    first = evaluations(network)
    assert first[0] == n and len(list(tmp_path.iterdir())) == 1
    assert evaluations(network) == (0, first[1])
    assert evaluations(counting(), batch_size=7)[0] == 0  # as in another process
    # another size, name, weights or set is computed
    fewer = load_images("digits", split="test", max_samples=100, show_progress=False)
    for network in (counting(12), counting(name="other"), counting(seed=1)):
        assert evaluations(network)[0] == n
    assert evaluations(counting(), fewer)[0] == 100
    assert len(list(tmp_path.iterdir())) == 5
    # a tensor makes no file, and a truncated file is computed again
    assert evaluations(counting(), take(test_split, 30))[0] == 30
    assert len(list(tmp_path.iterdir())) == 5
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert evaluations(counting()) == first
    assert evaluations(counting())[0] == 0


# ------------------------------------------------------------ processes

SCRIPT = """
import json, sys, warnings
from pathlib import Path
from accelerate import Accelerator
from ddpm_notes_pipeline.data import load_images
from ddpm_notes_pipeline.evaluation.features import load_feature_network
from ddpm_notes_pipeline.evaluation.metrics import measure_samples

warnings.simplefilter("ignore")
accelerator = Accelerator()
with accelerator.local_main_process_first():
    train, test = (load_images("digits", split=s, max_samples=n, show_progress=False) for s, n in (("train", 150), ("test", 75)))
network = load_feature_network(image_size=32)
for name in ("computed", "kept"):
    result = measure_samples(
        (test.take(range(i, i + 25)) for i in (0, 25, 50)), train, train=train, held_out=test, network=network,
        cache_dir=sys.argv[1], accelerator=accelerator, batch_size=16, show_progress=False,
    )
    Path(sys.argv[1], f"{name}-{accelerator.process_index}-of-{accelerator.num_processes}.json").write_text(json.dumps(result.as_dict()))
accelerator.end_training()  # a thread of the process group that outlives the interpreter would abort it
"""


@pytest.mark.slow
def test_two_processes_find_the_same_numbers(forked, tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        forked(tmp_path / str(processes), processes=processes, script=script)
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert sorted(results) == [
        f"{name}-{place}.json" for name in ("computed", "kept") for place in ("0-of-1", "0-of-2", "1-of-2")
    ]
    one = results["computed-0-of-1.json"]
    for name, result in results.items():
        assert result == one, name
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
