"""The demo in a real browser: Chromium uses every control of the app, for models of a real run.

What the page shows is compared with the pipeline in this process. The app runs without this
package, as on the Hub.
"""

import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from playwright.sync_api import expect, sync_playwright
from sklearn.datasets import load_digits

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from ddpm_notes_pipeline.hub.card import weights_digest
from tests.hub.test_published import publish
from tests.support.launching import ROOT, environment_of_runs, free_port, kill_tree

SPACE = ROOT / "examples" / "space"
T = 100  # of the published models
NOISES = 8  # that an image is measured with
CLASSES = ["spells & scrolls", "monsters", "armour"]  # of the model with transparency
BEST = [99, 80, 60, 45, 30, 20, 12, 8, 5, 3, 1, 0]  # timesteps
EVALUATION = {
    "data": "digits",
    "split": "test",
    "images": 359,
    "results": [
        {"variance_type": "fixed_small", "num_inference_steps": 10, "total": 2.5, "standard_error": 0.01},
        {"variance_type": "optimal", "num_inference_steps": T, "total": 2.125, "standard_error": 0.01},
        {"variance_type": "fixed_small", "num_inference_steps": T, "total": 2.25, "standard_error": 0.02},
    ],
    "yardsticks": {"one histogram": 3.125, "PNG": 6.5},
    "fewest_steps": {
        "name": "optimal",
        "path": "best",
        "num_inference_steps": len(BEST),
        "scheduler": "DDPMNotesScheduler",
        "scheduler_settings": {"variance_type": "optimal"},
        "timesteps": BEST,
        "needs": ["original_sample_mse"],
        "reference_steps": T,
    },
}
pytestmark = pytest.mark.slow
expect.set_options(timeout=120_000)

AS_ON_THE_HUB = """
import runpy, sys
sys.modules["ddpm_notes_pipeline"] = None  # cannot be imported
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class App:
    """The app as a separate process, for the folders of models; what is compared is the last."""

    def __init__(self, folders, home):
        self.folders, self.port, self.log = folders, free_port(), home / "app.log"
        env = environment_of_runs(
            MODEL_ID=",".join(map(str, folders)), GRADIO_SERVER_PORT=str(self.port), HF_HOME=str(home)
        )
        env |= {"PYTHONPATH": "", "GRADIO_TEMP_DIR": str(home / "gradio")}
        with self.log.open("w") as log:
            command = [sys.executable, "-c", AS_ON_THE_HUB, str(SPACE / "app.py")]
            self.process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
        self.url = f"http://127.0.0.1:{self.port}/"
        self.pipe = DDPMNotesPipeline.from_pretrained(folders[-1])
        self.pipe.set_progress_bar_config(disable=True)

    def wait(self, seconds=300):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url, timeout=10):
                return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def made(self, seeds, variance=None, **settings):
        """The pipeline's images for the seeds, (N, H, W) or (N, H, W, C), levels 0 to 255."""
        changes = {} if variance is None else {"variance_type": variance}
        pipe = DDPMNotesPipeline(self.pipe.unet, DDPMNotesScheduler.from_config(self.pipe.scheduler.config, **changes))
        pipe.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(batch_size=len(seeds), generator=generator, output_type="np", **settings).images
        images = (images * 255).round().astype(int)
        return images[..., 0] if images.shape[-1] == 1 else images

    def measured(self, image, seed, evaluations, **settings):
        """The bound of one image (H, W) under several draws of noise."""
        image = image.astype(np.uint8)[None, ..., None]
        settings |= {"seed": seed, "evaluations_per_image": evaluations // NOISES, "pilot_images": image}
        return self.pipe.bits_per_dim(image.repeat(NOISES, 0), return_map=True, **settings)


@pytest.fixture(scope="module")
def apps(tmp_path_factory):
    """An unconditional model; one with labels and all that is measured; several, with a menu."""
    home = tmp_path_factory.mktemp("space")
    plain, labelled = publish("plain")[0] / "hub", home / "labelled"
    shutil.copytree(publish("labelled")[0] / "hub", labelled)
    scheduler = DDPMNotesScheduler.from_pretrained(labelled / "scheduler")
    mse = np.geomspace(1e-3, 0.3, T).tolist()
    DDPMNotesScheduler.from_config(scheduler.config, original_sample_mse=mse).save_pretrained(labelled / "scheduler")
    (labelled / "evaluation.json").write_text(json.dumps(EVALUATION))
    transparent().save_pretrained(home / "transparent")
    folders = {"plain": [plain], "labelled": [labelled], "several": [plain, home / "nowhere", home / "transparent"]}
    started = {}
    try:
        for name, shown in folders.items():
            (home / f"home-{name}").mkdir()
            started[name] = App(shown, home / f"home-{name}")
        for app in started.values():
            app.wait()
        yield started
        for app in started.values():
            assert "Traceback" not in app.log.read_text(), app.log.read_text()
    finally:
        for app in started.values():
            kill_tree(app.process)


def transparent():
    """A class-conditional pipeline of RGBA images, untrained, without a null label."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    settings = {"layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": len(CLASSES)}
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **blocks, **settings)
    unet.register_to_config(_ddpm_notes={"class_names": CLASSES})
    return DDPMNotesPipeline(unet, DDPMNotesScheduler(num_train_timesteps=T))


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = "no Chromium or Chrome here: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def visit(apps, browser):
    """Opens a page of an app; it must log no error and send no request elsewhere."""
    seen, contexts = [], []

    def visit(name, width=1280, tab=None):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: seen.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: asked(request.url, apps[name].url))
        page.goto(apps[name].url)
        page.get_by_role("button", name="Generate").wait_for()
        if tab is not None:
            page.get_by_role("tab", name=tab).click()
        return page

    def asked(url, own):
        if not url.startswith((own, "data:", "blob:")):
            seen.append(f"asked for {url}")

    yield visit
    for context in contexts:
        context.close()
    assert not seen, seen


def put(page, label, value):
    """Type into a field of the open tab."""
    field = page.get_by_label(label, exact=True).locator("visible=true")
    field.fill(str(value))
    field.press("Tab")


def choose(page, label, value):
    """An entry of a menu: its name may go on after a colon."""
    page.get_by_label(label, exact=True).locator("visible=true").click()
    exactly = page.get_by_role("option", name=value, exact=True)
    exactly.or_(page.get_by_role("option", name=f"{value}: ")).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def drawn(page):
    """Wait until received data are rendered."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")


def picture(source):
    """A picture's pixels (H, W, 4)."""
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGBA"))


def pictures(page, place, n, size=8):
    """The n images shown at a place, in their original size: (n, size, size)."""
    return split(page.locator(f"{place} img").get_attribute("src"), n, int(np.ceil(np.sqrt(n))), size)


def rows(page, columns, size=8):
    """(name, images (columns, size, size)) of each row of classes."""
    names = page.locator("#samples .rows b").all_inner_texts()
    images = [image.get_attribute("src") for image in page.locator("#samples .rows img").all()]
    return [(name, split(source, columns, columns, size)) for name, source in zip(names, images, strict=True)]


def split(source, n, columns, size):
    """The n images of a grid, in their original size: (n, size, size)."""
    shown = picture(source)
    gap = 0 if n == 1 else 4
    scale = (shown.shape[1] + gap) // columns - gap
    assert scale % size == 0 and scale >= 56  # a whole factor, and large enough to see
    found = []
    for i in range(n):
        top, left = i // columns * (scale + gap), i % columns * (scale + gap)
        image = shown[top : top + scale, left : left + scale]
        assert (image[..., 3] == 255).all()
        blocks = image[..., 0].reshape(size, scale // size, size, scale // size).transpose(0, 2, 1, 3)
        assert (blocks == blocks[:, :, :1, :1]).all()  # nearest neighbour
        found.append(blocks[:, :, 0, 0])
    return np.stack(found).astype(int)


def seeds(seed, images):
    return f"seed {seed}" if images == 1 else f"seeds {seed} to {seed + images - 1}"


def generate(page, seed, steps=10, images=2):
    """Press Generate and wait for the last step; returns the images.

    Seeds, steps or images must differ from the previous call's.
    """
    for label, value in (
        ("Seed", seed),
        ("number input for Steps", steps),
        ("number input for Images", images),
    ):
        put(page, label, value)
    before = page.locator("#progress").inner_text()
    done = f"Step {steps} of {steps}, {seeds(seed, images)},"
    assert done not in before
    press(page, "Generate")
    page.get_by_text(done).wait_for()
    drawn(page)
    return pictures(page, "#samples", images) if page.locator("#samples img").count() == 1 else rows(page, images)


def close(shown, expected):
    return np.abs(shown - expected).max() <= 1  # rounding of half levels may differ


WATCH_PROGRESS = """
    window.progress_seen = [];
    new MutationObserver(() => {
        const text = document.querySelector('#progress p')?.innerText;
        if (text && window.progress_seen.at(-1) !== text) window.progress_seen.push(text);
    }).observe(document.querySelector('#progress'), {subtree: true, childList: true, characterData: true});
"""


def value(page, label):
    """Of a slider of the open tab."""
    return int(page.get_by_label(f"number input for {label}", exact=True).locator("visible=true").input_value())


# --- what the page opens with


def test_each_tab_opens_with_what_its_button_would_make(apps, visit):
    page, app = visit("plain"), apps["plain"]
    steps, images = value(page, "Steps"), value(page, "Images")
    page.get_by_text(f"Step {steps} of {steps}, {seeds(0, images)},").wait_for()
    drawn(page)
    made = app.made(range(images), num_inference_steps=steps)
    assert steps == 50 and close(pictures(page, "#samples", images), made)
    assert page.get_by_label("Model", exact=True).count() == 0  # there is one only

    page.get_by_role("tab", name="Measure").click()
    page.get_by_text("A sample of the model, seed 0.").wait_for()
    expect(page.locator("#seen img")).to_have_attribute("alt", "The image")
    sample = pictures(page, "#seen", 1)[0]
    assert close(sample, made[0])
    result = app.measured(sample, 0, value(page, "Network evaluations"))
    expect(page.locator("#bits h3")).to_have_text(f"{result.total:.3f} ± {result.standard_error:.3f} bits/dim")
    expect(page.locator("#map img")).to_have_count(2)
    assert page.locator("#yardsticks table").count() == 0  # it was not evaluated

    page.get_by_role("tab", name="Compare").click()
    page.get_by_text(re.compile("All three are done, seeds? 0")).wait_for()
    drawn(page)
    steps, images = value(page, "Steps"), value(page, "Images")
    for i, settings in enumerate(({"variance": "fixed_small"}, {"variance": "fixed_large"}, {"eta": 0.0})):
        expected = app.made(range(images), num_inference_steps=steps, **settings)
        assert close(pictures(page, f"#panel-{i}", images), expected), i
    assert page.locator(".empty").count() == 0


def test_a_class_conditional_model_opens_with_a_row_of_each_class_in_the_fewest_steps(apps, visit):
    page, app = visit("labelled"), apps["labelled"]
    assert value(page, "Steps") == len(BEST)
    images = value(page, "Images")
    page.get_by_text(f"Step 12 of 12, {seeds(0, images)},").wait_for()
    page.get_by_text(f"12 best steps of optimal are no worse than {T} of fixed_large").wait_for()
    drawn(page)
    shown = rows(page, images)
    assert [name for name, _ in shown] == [str(i) for i in range(10)]
    for i, (_, row) in enumerate(shown):
        made = app.made(range(images), "optimal", timesteps=BEST, class_labels=[i] * images)
        assert close(row, made), i


def test_a_menu_switches_between_models(apps, visit):
    page, app = visit("several"), apps["several"]
    page.get_by_text(re.compile(r"Step 50 of 50, ")).wait_for()
    assert page.locator("#samples img").count() == 1
    choose(page, "Model", str(app.folders[1]))
    page.get_by_text(re.compile("nowhere cannot be loaded: it is not a local folder")).wait_for()
    assert page.get_by_role("tab", name="Generate").count() == 0
    choose(page, "Model", "transparent")
    page.get_by_text("8 x 8 RGBA images of 3 classes").wait_for()
    page.locator("#samples .rows").wait_for()
    names = page.locator("#samples .rows b").all_inner_texts()
    assert names == CLASSES
    put(page, "number input for Images", 1)
    put(page, "number input for Steps", 5)
    press(page, "Generate")
    page.get_by_text("Step 5 of 5, seed 0,").wait_for()
    drawn(page)
    for i, source in enumerate(image.get_attribute("src") for image in page.locator("#samples .rows img").all()):
        made = app.made([0], num_inference_steps=5, class_labels=[i])[0]
        assert np.abs(picture(source)[..., :3] - on_checkerboard(made, 512)).max() <= 2, i
    choose(page, "Model", "hub")  # the first, kept
    page.get_by_text(re.compile(r"Step 50 of 50, ")).wait_for()


def on_checkerboard(image, side):
    """RGBA levels (H, W, 4), enlarged to a side, over squares of 8 pixels: RGB, by hand."""
    large = image.repeat(side // len(image), 0).repeat(side // len(image), 1).astype(float)
    square = np.arange(side) // 8
    board = np.where((square[:, None] + square) % 2 == 0, 230.0, 170.0)[..., None]
    alpha = large[..., 3:] / 255
    return alpha * large[..., :3] + (1 - alpha) * board


# --- generate


def test_the_images_are_the_pipeline_s_and_follow_the_controls(apps, visit):
    page, app = visit("plain"), apps["plain"]
    page.evaluate(
        """() => { window.frames_seen = new Set(); new MutationObserver(() => {
            const image = document.querySelector('#samples img'); if (image) window.frames_seen.add(image.src)
        }).observe(document.querySelector('#samples'), {subtree: true, childList: true, attributes: true}) }"""
    )
    first = generate(page, 0, steps=20)
    assert close(first, app.made([0, 1], num_inference_steps=20))
    assert page.evaluate("window.frames_seen.size") > 5  # frames arrived during sampling
    other = generate(page, 7, steps=20)
    assert not close(first, other) and close(other, app.made([7, 8], num_inference_steps=20))
    assert (generate(page, 0, steps=20) == first).all()
    assert close(generate(page, 0, steps=20, images=5), app.made(range(5), num_inference_steps=20))

    eta = page.get_by_label("number input for eta", exact=True)
    expect(eta).to_be_hidden()
    choose(page, "Variance of each step", "fixed_large")
    assert close(generate(page, 1), app.made([1, 2], "fixed_large", num_inference_steps=10))
    choose(page, "Variance of each step", "eta (DDIM)")
    expect(eta).to_be_visible()
    assert close(generate(page, 2), app.made([2, 3], num_inference_steps=10, eta=0.0))
    put(page, "number input for eta", 0.5)
    assert close(generate(page, 3), app.made([3, 4], num_inference_steps=10, eta=0.5))
    assert page.get_by_label("Class label").count() == 0 and page.get_by_label("Guidance").count() == 0


def test_stop_ends_a_run_and_the_next_one_begins(visit):
    page = visit("plain")
    put(page, "number input for Steps", T)
    put(page, "number input for Images", 8)
    page.evaluate(
        """() => new MutationObserver((_, observer) => { if (document.body.innerText.includes(' of 100,')) {
            observer.disconnect(); [...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Stop').click()
        } }).observe(document.body, {subtree: true, childList: true, characterData: true})"""
    )
    press(page, "Generate")
    page.get_by_text("Stopped.").wait_for()
    page.wait_for_timeout(1500)
    expect(page.locator("#progress")).to_have_text("Stopped.")
    generate(page, 0)


def test_a_visitor_who_waits_for_another_is_told(visit):
    first, second = visit("plain"), visit("plain")
    for page, steps, images in ((first, T, 8), (second, 5, 1)):
        put(page, "number input for Steps", steps)
        put(page, "number input for Images", images)
    second.evaluate(f"() => {{ {WATCH_PROGRESS} }}")
    press(first, "Generate")
    first.get_by_text(re.compile(rf"Step \d+ of {T}, seeds 0 to 7,")).wait_for()
    press(second, "Generate")
    second.get_by_text("Step 5 of 5, seed 0,").wait_for()
    assert "Waiting for the first step ..." in second.evaluate("window.progress_seen")
    first.get_by_text(f"Step {T} of {T}, seeds 0 to 7,").wait_for()


def test_an_empty_or_negative_field_is_reported(visit):
    page = visit("plain")
    for value in ("", "-3"):
        put(page, "Seed", value)
        press(page, "Generate")
        expect(page.get_by_test_id("toast-body").first).to_contain_text("Seed must be a whole number from 0")
        page.get_by_test_id("toast-close").first.click()


def test_a_class_conditional_model_has_a_label_menu(apps, visit):
    page, app = visit("labelled"), apps["labelled"]
    choose(page, "Variance of each step", "fixed_small")
    each = generate(page, 0)
    for i, (_, row) in enumerate(each):
        assert close(row, app.made([0, 1], num_inference_steps=10, class_labels=[i, i])), i
    choose(page, "Class label", "3")
    assert close(generate(page, 1), app.made([1, 2], num_inference_steps=10, class_labels=[3, 3]))
    put(page, "number input for Guidance", 3)
    guided = {"num_inference_steps": 10, "class_labels": [3, 3], "guidance_scale": 3.0}
    three = generate(page, 0)
    assert close(three, app.made([0, 1], **guided)) and not close(three, each[3][1])
    choose(page, "Variance of each step", "optimal")
    assert close(generate(page, 2), app.made([2, 3], "optimal", **guided))
    choose(page, "Class label", "no label")
    assert close(generate(page, 3), app.made([3, 4], "optimal", num_inference_steps=10))


# --- measure


def png(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


def offer(page, data, name="image.png"):
    remove = page.get_by_label("Clear", exact=True)
    if remove.count():
        remove.first.click()
        page.locator("#told").get_by_text("Upload an image, or take a sample.").wait_for()
    page.locator("input[type=file]").first.set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    )


def test_an_image_s_noise_and_bits_are_the_pipeline_s(apps, visit):
    page, app = visit("plain", tab="Measure"), apps["plain"]
    digit = (load_digits().images[10] * 255 / 16).round().astype(np.uint8)
    page.get_by_text("A sample of the model, seed 0.").wait_for()
    sample = page.locator("#seen img").get_attribute("src")
    offer(page, png(PIL.Image.fromarray(digit)))
    page.get_by_text("Your image, as it is.").wait_for()
    expect(page.locator("#seen img")).not_to_have_attribute("src", sample)
    assert (pictures(page, "#seen", 1)[0] == digit).all()

    put(page, "Noise seed", 3)
    x_0 = torch.from_numpy(digit / 127.5 - 1).float()[None, None]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    for t in (0, 60, T - 1):
        put(page, "number input for Timestep t", t)
        page.locator(f"#noised img[alt='The image at timestep {t}, noise seed 3']").wait_for()
        x_t = app.pipe.scheduler.add_noise(x_0, noise, torch.tensor([t]))[0, 0].numpy()
        assert close(pictures(page, "#noised", 1)[0], ((x_t.clip(-1, 1) + 1) * 127.5).round())

    totals = set()
    for evaluations in (40, 400):
        put(page, "number input for Network evaluations", evaluations)
        press(page, "Measure bits/dim")
        evaluations = value(page, "Network evaluations")  # a slow machine's slider ends below
        result = app.measured(digit, 3, evaluations)
        expect(page.locator("#bits h3")).to_have_text(f"{result.total:.3f} ± {result.standard_error:.3f} bits/dim")
        full = app.pipe.bits_per_dim(digit[None, ..., None].repeat(50, 0), seed=11, full=True)
        assert abs(result.total - full.total) < 5 * (result.standard_error + full.standard_error)
        parts = page.locator("#bits td").all_inner_texts()
        assert parts == [f"{part:.3f}" for part in (result.decoder, result.diffusion, result.prior)]
        totals.add(f"{result.total:.3f}")
    assert len(totals) == 2

    bars = page.locator("[aria-roledescription=bar]")
    found = {}
    for words in bars.evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))"):
        name, bits = re.search(r"timesteps of a bar: (.+?); bits/dim: ([^;]+)", words).groups()
        found[name] = float(bits.replace("−", "-"))
    terms = result.per_timestep
    for name, bits in found.items():
        if name == "prior":
            expected = result.prior
        else:
            first, _, last = name.removesuffix(": decoder").partition("–")
            expected = float(terms[int(first) : int(last or first) + 1].sum())
        assert bits == pytest.approx(expected, rel=1e-3)  # it is written with four digits
    assert sum(found.values()) == pytest.approx(result.total, rel=1e-3)
    assert_is_map(page, digit, result)


def assert_is_map(page, image, result):
    """The image, and beside it colours that are the brighter, the more bits a pixel takes."""
    seen, colours = (picture(shown.get_attribute("src")) for shown in page.locator("#map img").all())
    assert (seen[::64, ::64, 0] == image).all()
    bits = result.maps[:, 0].mean(0).numpy()
    assert bits.sum() == pytest.approx(result.total * 64, rel=1e-4)
    top = np.quantile(bits, 0.995)
    expect(page.locator("#map .scale")).to_have_text(f"0{top:.3g} bits or more a pixel")
    brightness = colours[::64, ::64, :3].sum(-1, dtype=int)
    levels = np.interp(np.minimum(bits / top, 1), [0, 0.5, 1], [4, 359, 696])  # the sums of three colours
    assert np.abs(brightness - levels).max() < 12


def test_a_sample_of_the_model_can_be_measured_with_its_label(apps, visit):
    page, app = visit("labelled", tab="Measure"), apps["labelled"]
    page.locator("#bits h3").wait_for()
    offer(page, b"no image")
    expect(page.locator("#told")).to_contain_text("not used")
    expect(page.locator("#bits")).to_have_text("Upload an image, or take a sample.")  # no longer the figures of before
    expect(page.locator("#map")).to_have_text("")
    press(page, "Measure bits/dim")
    expect(page.locator("#bits")).to_have_text("Upload an image, or take a sample.")
    choose(page, "Class label", "5")
    put(page, "Seed of a sample", 4)
    press(page, "Take a sample of the model")
    page.get_by_text("A sample of the model, seed 4.").wait_for()
    page.locator("#seen img").wait_for()
    sample = pictures(page, "#seen", 1)
    assert close(sample, app.made([4], "optimal", timesteps=BEST, class_labels=[5]))
    evaluations = value(page, "Network evaluations")
    result = app.measured(sample[0], 0, evaluations, class_labels=5)  # a new image is measured at once
    expect(page.locator("#bits h3")).to_have_text(f"{result.total:.3f} ± {result.standard_error:.3f} bits/dim")
    own = f"{result.total:.3f} ± {result.standard_error:.3f}"
    others = [("held-out images, this model", "2.250 ± 0.020"), ("one histogram", "3.125"), ("PNG", "6.500")]
    expected = sorted([("this image, this model", own), *others], key=lambda row: float(row[1].split()[0]))
    expect(page.locator("#yardsticks tr.own td").first).to_have_text(own)
    shown = [tuple(row.locator("th, td").all_inner_texts()[:2]) for row in page.locator("#yardsticks tr").all()]
    assert shown == expected
    expect(page.locator("#yardsticks caption")).to_contain_text("a mean over 359 held-out images of digits, split test")


def uploads():
    """Kind: the uploaded bytes, the file's name, and a part of the message."""
    grey = PIL.Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    colour = PIL.Image.merge("RGB", [grey, grey.rotate(90), grey])
    frames = [grey.rotate(i) for i in range(3)]
    return {
        "no image": (b"id,label\n1,2\n", "table.csv", "It cannot be read"),
        "empty": (b"", "empty.png", "It cannot be read"),
        "damaged": (png(colour)[: len(png(colour)) // 2], "damaged.png", "It cannot be read"),
        "tiny": (png(grey.resize((3, 20))), "tiny.png", "It has 3 x 20 pixels; the model needs at least 8 x 8"),
        "huge": (png(PIL.Image.new("1", (20000, 3000))), "huge.png", "It has 20000 x 3000 pixels; at most 40,000,000"),
        "a bomb": (png(PIL.Image.new("1", (20000, 20000))), "bomb.png", "It is too large to be read here"),
        "animated": (
            png(frames[0], format="GIF", save_all=True, append_images=frames[1:]),
            "three.gif",
            "3 pictures in one file",
        ),
        "sixteen bits": (
            png(PIL.Image.fromarray(np.full((9, 9), 3000, np.uint16))),
            "deep.png",
            "more than 8 bits a pixel (mode I;16)",
        ),
        "floats": (png(grey.convert("F"), format="TIFF"), "floats.tif", "more than 8 bits a pixel (mode F)"),
        "colour": (png(colour, format="JPEG"), "photo.jpg", "made grey, cropped and resized from 64 x 64"),
        "transparent": (png(colour.convert("RGBA").resize((8, 8))), "clear.png", "put on white, made grey"),
        "palette": (png(colour.convert("P")), "palette.png", "made grey, cropped"),
        "inks": (png(colour.convert("CMYK"), format="JPEG"), "print.jpg", "made grey, cropped"),
    }


UPLOADS = uploads()


def test_an_upload_gets_a_plain_message(visit):
    page = visit("plain", tab="Measure")
    for kind in ("colour", "no image", "transparent", "animated", "tiny"):
        data, name, answer = UPLOADS[kind]
        offer(page, data, name)
        expect(page.locator("#told"), kind).to_contain_text(answer)
        assert ("not used" in page.locator("#told").inner_text()) == ("grey" not in answer), kind
        expect(page.locator("#seen img"), kind).to_have_count(int("grey" in answer))
    offer(page, b"\0" * (11 << 20), "large.png")
    page.get_by_text(re.compile("maximum allowed size|exceeds")).first.wait_for()
    assert "Traceback" not in page.inner_text("body")


# --- compare


def test_one_seed_under_three_variances(apps, visit):
    thirds = {"plain": ("eta (DDIM)", {"eta": 0.0}), "labelled": ("optimal", {"variance": "optimal"})}
    for name, (title, third) in thirds.items():
        page, app = visit(name, tab="Compare"), apps[name]
        put(page, "Seed", 2)
        put(page, "number input for Steps", 5)
        put(page, "number input for Images", 2)
        if name == "labelled":
            choose(page, "Class label", "1")
            labels = {"class_labels": [1, 1]}
        else:
            labels = {}
        page.get_by_text(title, exact=True).wait_for()
        press(page, "Compare")
        page.get_by_text("All three are done, seeds 2 to 3.").wait_for()
        drawn(page)
        for i, settings in enumerate(({"variance": "fixed_small"}, {"variance": "fixed_large"}, third)):
            expected = app.made([2, 3], num_inference_steps=5, **labels, **settings)
            assert close(pictures(page, f"#panel-{i}", 2), expected), (name, i)


# --- accessibility

NAMELESS = re.compile(
    r"^\s*- (button|textbox|spinbutton|slider|combobox|listbox|checkbox|radio|tab|link)(?! \")(?! ')(:|$| \[)", re.M
)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["labelled", "several"])
def test_every_control_has_a_name_and_the_page_fits(visit, name, width):
    page = visit(name, width)
    page.get_by_text(re.compile(r"Step \d+ of \d+, ")).wait_for()
    choose(page, "Variance of each step", "eta (DDIM)")
    for tab in ("Generate", "Measure", "Compare"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        tree = page.locator("body").aria_snapshot()
        assert "- button" in tree and "- spinbutton" in tree and not NAMELESS.findall(tree), tree
        assert page.evaluate("document.documentElement.scrollWidth") <= width


# --- without a browser


@pytest.fixture(scope="module")
def app_module():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", UPLOADS)
def test_a_file_is_read_or_refused_with_a_reason(app_module, tmp_path, kind):
    data, name, answer = UPLOADS[kind]
    (tmp_path / name).write_bytes(data)
    model = SimpleNamespace(height=8, width=8, channels=1)
    if "grey" not in answer:
        with pytest.raises(ValueError, match=re.escape(answer)):
            app_module.read_image(str(tmp_path / name), model)
        return
    image, done = app_module.read_image(str(tmp_path / name), model)
    assert answer in done and image.shape == (8, 8, 1) and image.dtype == np.uint8 and image.std() > 0


def test_uploads_for_a_model_of_rgba_images(app_module, tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(1, 256, (8, 8, 4), dtype=np.uint8)
    pixels[2:5, :, 3] = 0
    model = SimpleNamespace(height=8, width=8, channels=4)

    def read(image):
        (tmp_path / "image.png").write_bytes(png(image))
        return app_module.read_image(str(tmp_path / "image.png"), model)

    image, done = read(PIL.Image.fromarray(pixels))
    assert done == "as it is"
    np.testing.assert_array_equal(image, np.where(pixels[..., 3:] > 0, pixels, 0))
    image, done = read(PIL.Image.fromarray(pixels[..., :3]))
    assert done == "made RGBA"
    np.testing.assert_array_equal(image, np.dstack([pixels[..., :3], np.full((8, 8), 255)]))


def test_a_model_of_rgba_images_is_sampled_shown_and_measured(app_module, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, in_channels=4, out_channels=4, block_out_channels=(16, 16), norm_num_groups=8, **blocks)
    pipe = DDPMNotesPipeline(unet, DDPMNotesScheduler(T))
    pipe.save_pretrained(tmp_path)
    model = app_module.Model(str(tmp_path))
    assert model.channels == 4
    *_, (steps, images) = model.trajectory([3], 5)
    (made,) = pipe(num_inference_steps=5, generator=[torch.Generator().manual_seed(3)]).images
    assert steps == 5 and made.mode == "RGBA"
    assert np.abs(images[0].astype(int) - np.asarray(made)).max() <= 1
    shown = picture(app_module.picture(images, "an image").partition('src="')[2].partition('"')[0])
    assert np.abs(shown[..., :3] - on_checkerboard(images[0], len(shown))).max() <= 2
    text, *_ = app_module.Demo(model).measure(images[0], 0, 10 * NOISES)
    expected = pipe.bits_per_dim(images.repeat(NOISES, 0), seed=0, evaluations_per_image=10, pilot_images=images)
    assert text.startswith(f"### {expected.total:.3f} ± ") and f"Uncompressed it takes {8 * 256}: " in text


def test_closing_a_trajectory_ends_the_sampling(app_module):
    model = app_module.Model(str(publish("plain")[0] / "hub"))
    evaluations = []
    model.pipe.unet.register_forward_hook(lambda *_: evaluations.append(1))
    run = model.trajectory([0], T)
    next(run)
    threads = threading.active_count()
    run.close()
    assert threading.active_count() == threads - 1 and 0 < len(evaluations) < T
    ended = len(evaluations)
    time.sleep(0.2)
    assert len(evaluations) == ended


def test_a_run_ends_after_max_seconds(app_module, monkeypatch, tmp_path):
    transparent().save_pretrained(tmp_path)
    model = app_module.Model(str(tmp_path))
    demo = app_module.Demo(model)
    demo.comparison.result()
    with monkeypatch.context() as patched:
        patched.setattr(app_module, "MAX_SECONDS", 0)
        assert [step for step, _ in model.trajectory([0], T, label="0")] == [1]
        *_, (*_, text) = demo.compare(0, T, 1, "0")
        assert text == "Out of time before the last step, seed 0."
    model.pipe.unet.register_forward_hook(lambda *_: time.sleep(0.02))  # T steps would take 2 s
    monkeypatch.setattr(app_module, "MAX_SECONDS", 3)
    *_, (*pictures, text) = demo.compare(0, T, 1, "0")  # all three within the time of a click
    assert text.startswith("Out of time") and len(set(pictures)) == 3


def test_colours_that_nobody_sees_become_0_and_an_opaque_image_gets_its_alpha(app_module, tmp_path):
    pixels = np.full((8, 8, 4), (10, 20, 30, 255), np.uint8)
    pixels[:4, :, 3] = 0
    PIL.Image.fromarray(pixels).save(tmp_path / "half.png")
    PIL.Image.fromarray(pixels[..., :3]).save(tmp_path / "opaque.png")
    model = SimpleNamespace(height=8, width=8, channels=4)
    half, _ = app_module.read_image(str(tmp_path / "half.png"), model)
    assert half.dtype == np.uint8 and (half[:4] == 0).all() and (half[4:] == (10, 20, 30, 255)).all()
    opaque, done = app_module.read_image(str(tmp_path / "opaque.png"), model)
    assert (opaque == (10, 20, 30, 255)).all() and done == "made RGBA"


def test_fewest_steps_that_the_scheduler_cannot_take_are_not_offered(app_module, tmp_path):
    shutil.copytree(publish("plain")[0] / "hub", tmp_path / "model")
    (tmp_path / "model" / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert app_module.Model(str(tmp_path / "model")).fewest is None  # it has no original_sample_mse
    stock = {"scheduler": "DPMSolverMultistepScheduler", "scheduler_settings": {}, "needs": [], "timesteps": None}
    fewest = EVALUATION["fewest_steps"] | stock
    (tmp_path / "model" / "evaluation.json").write_text(json.dumps({"fewest_steps": fewest}))
    model = app_module.Model(str(tmp_path / "model"))
    *_, (step, images) = model.trajectory([0], 6, variance=app_module.FEWEST)
    pipe = DDPMNotesPipeline.from_pretrained(tmp_path / "model")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    made = pipe(num_inference_steps=6, generator=[torch.Generator().manual_seed(0)], output_type="np").images
    assert step == 6 and close(images.astype(int), (made * 255).round())


def test_the_models_come_from_the_environment_or_the_readme(app_module, monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_ID", "ada/digits, outputs/tiles,ada/digits,")
    assert app_module.model_ids() == ["ada/digits", "outputs/tiles"]
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"app.py: .*nowhere cannot be loaded: "):
        app_module.main()
    monkeypatch.delenv("MODEL_ID")
    readme = (SPACE / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("models: []", "models:\n- user/plain\n- user/tiles"))
    monkeypatch.setattr(app_module, "__file__", str(tmp_path / "app.py"))
    assert app_module.model_ids() == ["user/plain", "user/tiles"]


def test_without_a_name_a_clone_shows_its_own_models(app_module, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("MODEL_ID", raising=False)
    own = sorted(str(path) for path in (ROOT / "examples").glob("ddpm-*"))
    assert app_module.model_ids() == own and str(ROOT / "examples" / "ddpm-mnist") in own
    assert "No MODEL_ID: showing" in capsys.readouterr().out
    (tmp_path / "README.md").write_text((SPACE / "README.md").read_text())
    monkeypatch.setattr(app_module, "__file__", str(tmp_path / "app.py"))  # no clone around it
    with pytest.raises(SystemExit, match="which model"):
        app_module.model_ids()


def test_the_requirements_are_pinned_in_the_tested_environment():
    pinned = re.findall(r"^([\w-]+)==", Path(ROOT / "constraints.txt").read_text(), re.M)
    asked = re.findall(r"^([a-z][\w-]*)", (SPACE / "requirements.txt").read_text(), re.M)
    assert asked and set(asked) <= set(pinned) and "ddpm_notes_pipeline" not in asked


def test_an_evaluation_of_other_weights_is_not_shown_as_this_models(app_module, tmp_path):
    """Training on without validation images leaves the older one in the folder."""
    folder = tmp_path / "model"
    transparent().save_pretrained(folder)
    assert app_module.read_evaluation(str(folder)) == {}
    for weights, shown in ((weights_digest(folder), True), (None, True), ("0" * 64, False)):
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"weights": weights}))
        assert bool(app_module.read_evaluation(str(folder))) == shown
