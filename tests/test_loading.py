"""The Hub folder: what is in it, and who can load it.

A folder that `save_pretrained` writes has three kinds of readers: this package; any diffusers,
which knows nothing of us; and any diffusers that is told to trust the folder's pipeline.py. The
last two are asked in interpreters of their own (`slow`), where the package cannot be imported; the
quick tests ask all three in this process.
"""

import ast
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import ddpm_notes_pipeline
from ddpm_notes_pipeline.pipeline_ddpm_notes import DDPMNotesPipeline, pipeline_source
from ddpm_notes_pipeline.scheduling_ddpm_notes import DDPMNotesScheduler
from ddpm_notes_pipeline.variances import optimal_scheduler

LAYOUT = {
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
T = 50
MSE = [0.001 * (t + 1) for t in range(T)]
SCHEDULERS = {
    "plain": {},
    "optimal": {"variance_type": "optimal", "original_sample_mse": MSE, "decoder_variance": {0: 0.002, 10: 0.03}},
    "learned": {"variance_type": "learned_range"},
    "learned_optimal": {"variance_type": "learned_range"},  # whose best variance was measured
    "eta": {"eta": 0.25, "variance_type": "fixed_large"},
    "labelled": {"beta_schedule": "squaredcos_cap_v2"},
    "twin": {},  # of "plain", with other weights
}
UNLABELLED = ["plain", "optimal", "learned", "learned_optimal", "eta", "twin"]
PLUGGED = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}  # in the place of the scheduler of "optimal"
WAYS = ("installed", "stock", "trusted")


# ------------------------------------------------------------------------------ folders and readers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the other interpreters have: sums in another order are other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()
    torch.set_num_threads(before)


def tiny_unet(name):
    torch.manual_seed(1 if name == "twin" else 0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if name.startswith("learned") else 1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4 if name == "labelled" else None,
    )
    if name == "labelled":
        unet.register_to_config(_ddpm_notes={"null_label": 3, "class_names": ["zero", "one", "two"]})
    return unet.eval()


def made(name):
    """The pipeline that folder `name` is saved from."""
    if name in PLUGGED:
        pipe = made("optimal")
        pipe.scheduler = PLUGGED[name].from_config(pipe.scheduler.config)
        return pipe
    scheduler = DDPMNotesScheduler(num_train_timesteps=T, **SCHEDULERS[name])
    if name == "learned_optimal":
        scheduler = optimal_scheduler(scheduler, MSE, 0.002)
    return DDPMNotesPipeline(tiny_unet(name), scheduler)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder for each of SCHEDULERS and PLUGGED, and "stock", saved by the stock pipeline."""
    root = tmp_path_factory.mktemp("shelf")
    for name in [*SCHEDULERS, *PLUGGED]:
        made(name).save_pretrained(root / name)
    DDPMPipeline(tiny_unet("plain"), DDPMScheduler(num_train_timesteps=T)).save_pretrained(root / "stock")
    return root


def load(way, folder, code=None):
    """`folder` loaded in one of three WAYS; the trusted code is that of `code`, or its own."""
    folder = str(folder)
    if way == "installed":
        return DDPMNotesPipeline.from_pretrained(folder)
    if way == "stock":
        return DiffusionPipeline.from_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(code or folder), trust_remote_code=True)


def sample(pipe, **arguments):
    """Two images of 4 steps, (2, 8, 8, 1)."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **arguments).images


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in files(folder)}


def settings(scheduler):
    names = ("variance_type", "original_sample_mse", "decoder_variance", "eta")
    return {name: getattr(scheduler, name) for name in names}


@pytest.fixture
def heard(recwarn):
    """The warnings of diffusers, transformers, the Hub's client and Python, in a list."""
    messages = []

    class Ear(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(ear)
    yield lambda: messages + [str(warning.message) for warning in recwarn]
    for logger in loggers:
        logger.removeHandler(ear)


# ---------------------------------------------------------------------------- what is in the folder


@pytest.mark.parametrize("name", [*SCHEDULERS, *PLUGGED])
def test_the_folder_holds_these_files_and_no_other(shelf, name):
    assert files(shelf / name) == LAYOUT


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_index_names_stock_classes(shelf, name):
    index = json.loads((shelf / name / "model_index.json").read_text(encoding="utf-8"))
    version = index.pop("_diffusers_version")
    assert re.fullmatch(r"\d+\.\d+.*", version)
    assert index == {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_s_config_has_what_stock_knows_and_one_private_entry(shelf, name):
    config = json.loads((shelf / name / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert config.pop("_class_name") == "DDPMScheduler"
    assert {key for key in config if not key.startswith("_")} == {
        key for key in DDPMScheduler().config if not key.startswith("_")
    }
    assert {key for key in config if key.startswith("_")} <= {"_diffusers_version", "_ddpm_notes"}
    assert ("_ddpm_notes" in config) == (name in ("optimal", "eta", "learned_optimal"))
    DDPMScheduler(**{key: value for key, value in config.items() if not key.startswith("_")})


def test_the_index_names_a_plugged_in_scheduler(shelf):
    for name, cls in PLUGGED.items():
        index = json.loads((shelf / name / "model_index.json").read_text(encoding="utf-8"))
        assert (index["_class_name"], index["scheduler"]) == ("DDPMPipeline", ["diffusers", cls.__name__])


def test_the_code_says_its_version_and_digest(shelf):
    first, _, rest = (shelf / "plain" / "pipeline.py").read_bytes().partition(b"\n")
    assert re.fullmatch(
        rf"# ddpm_notes_pipeline {re.escape(ddpm_notes_pipeline.__version__)}, sha256 of the lines below [0-9a-f]{{64}}",
        first.decode(),
    )
    assert first.decode().split()[-1] == hashlib.sha256(rest).hexdigest()


def test_every_folder_has_the_same_code(shelf):
    assert {(shelf / name / "pipeline.py").read_text(encoding="utf-8") for name in [*SCHEDULERS, *PLUGGED]} == {
        pipeline_source()
    }


def test_the_code_needs_diffusers_and_what_comes_with_it_alone(shelf):
    code = (shelf / "plain" / "pipeline.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            imported.add(str(node.module).partition(".")[0])
    allowed = {"torch", "numpy", "PIL", "tqdm", "diffusers", "huggingface_hub", "safetensors"}
    assert imported - set(sys.stdlib_module_names) <= allowed


def test_nothing_in_the_code_looks_like_another_import(shelf):
    # diffusers searches the text, docstrings included: what it takes for a relative import is a
    # file that it wants to copy, and what it takes for an absolute one it tries to import.
    path = shelf / "plain" / "pipeline.py"
    assert get_relative_imports(str(path)) == []
    code = path.read_text(encoding="utf-8")
    found = re.findall(r"^\s*import\s+(\S+)\s*$|^\s*from\s+(\S+)\s+import", code, flags=re.MULTILINE)
    in_text = {(a or b).partition(".")[0] for a, b in found}
    real = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        for name in ([alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else [])
        + ([str(node.module)] if isinstance(node, ast.ImportFrom) else [])
    }
    assert in_text <= real
    assert not re.search(r"\b(from|import)\s+\.*ddpm_notes_pipeline\b", code)


def test_the_code_has_one_pipeline_class(shelf):
    # diffusers refuses a file with two
    tree = ast.parse((shelf / "plain" / "pipeline.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    pipelines = [node.name for node in classes if any("Pipeline" in ast.unparse(base) for base in node.bases)]
    assert pipelines == ["DDPMNotesPipeline"]


# ------------------------------------------------------------------------- loading, in this process


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*SCHEDULERS, *PLUGGED])
def test_each_folder_loads_in_each_way_without_a_word(shelf, name, way, heard):
    pipe = load(way, shelf / name)
    assert heard() == []
    assert type(pipe).__name__ == ("DDPMPipeline" if way == "stock" else "DDPMNotesPipeline")
    assert (type(pipe) is DDPMNotesPipeline) == (way == "installed")
    if name in PLUGGED:
        assert type(pipe.scheduler) is PLUGGED[name]
    elif way == "stock":
        assert type(pipe.scheduler) is DDPMScheduler
    else:
        assert type(pipe.scheduler).__name__ == "DDPMNotesScheduler"
        assert settings(pipe.scheduler) == settings(made(name).scheduler)
    expected = tiny_unet(name).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("way", ["installed", "trusted"])
@pytest.mark.parametrize("name", [*SCHEDULERS, *PLUGGED])
def test_a_loaded_pipeline_makes_the_images_of_the_one_that_was_saved(shelf, name, way):
    np.testing.assert_array_equal(sample(load(way, shelf / name)), sample(made(name)))


def test_the_stock_pipeline_makes_the_same_images_where_it_can(shelf):
    for name in ("plain", "learned"):
        np.testing.assert_allclose(sample(load("stock", shelf / name)), sample(made(name)), rtol=0, atol=1e-4)
    # fixed_small is what it falls back to from "optimal"
    fallback = DDPMNotesPipeline(tiny_unet("optimal"), DDPMNotesScheduler(num_train_timesteps=T))
    np.testing.assert_allclose(sample(load("stock", shelf / "optimal")), sample(fallback), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:alpha_bar at the path's first timestep")
def test_stock_samples_a_learned_model_whose_best_variance_was_measured(shelf):
    """Its network has twice the channels: a stock scheduler of fixed_small fails on them."""
    stock = load("stock", shelf / "learned_optimal")
    assert (type(stock), stock.scheduler.variance_type) == (DDPMPipeline, "learned_range")
    np.testing.assert_array_equal(sample(stock), sample(load("stock", shelf / "learned")))
    # ours has the measured variance, and takes no notice of the other half of the channels
    ours = load("installed", shelf / "learned_optimal")
    assert ours.scheduler.variance_type == "optimal" and ours.unet.config.out_channels == 2
    fixed = DDPMNotesPipeline(ours.unet, made("optimal").scheduler)
    fixed.scheduler = DDPMNotesScheduler.from_config(fixed.scheduler.config, decoder_variance=0.002)
    np.testing.assert_array_equal(sample(ours), sample(fixed))
    pixels = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    path = {"timesteps": [49, 30, 12, 0]}
    assert torch.equal(ours.bits_per_dim(pixels, **path).per_image, fixed.bits_per_dim(pixels, **path).per_image)


def test_labels_and_guidance_work_from_the_folder(shelf):
    arguments = {"class_labels": [0, 2], "guidance_scale": 2.0}
    expected = sample(made("labelled"), **arguments)
    for way in ("installed", "trusted"):
        pipe = load(way, shelf / "labelled")
        assert (pipe.null_label, pipe.num_classes) == (3, 3)
        assert list(pipe.unet.config["_ddpm_notes"]["class_names"]) == ["zero", "one", "two"]
        np.testing.assert_array_equal(sample(pipe, **arguments), expected)


def test_without_trust_the_code_of_a_folder_is_refused(shelf):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(str(shelf / "plain"), custom_pipeline=str(shelf / "plain"))


@pytest.mark.parametrize("way", ["installed", "trusted"])
def test_any_other_ddpm_loads_with_our_code(shelf, way):
    assert "pipeline.py" not in files(shelf / "stock")
    pipe = load(way, shelf / "stock", code=shelf / "optimal")
    assert type(pipe.scheduler).__name__ == "DDPMNotesScheduler"
    np.testing.assert_array_equal(sample(pipe), sample(made("plain")))


@pytest.mark.parametrize("way", ["installed", "trusted"])
def test_the_weights_type_is_chosen_at_loading(shelf, way):
    extra = {} if way == "installed" else {"custom_pipeline": str(shelf / "plain"), "trust_remote_code": True}
    cls = DDPMNotesPipeline if way == "installed" else DiffusionPipeline
    pipe = cls.from_pretrained(str(shelf / "plain"), torch_dtype=torch.bfloat16, **extra)
    assert pipe.unet.dtype == torch.bfloat16
    assert sample(pipe).dtype == np.float32


@pytest.mark.parametrize("name", PLUGGED)
def test_the_way_back_from_a_plugged_in_scheduler_keeps_our_settings(shelf, name):
    scheduler = DDPMNotesScheduler.from_config(load("installed", shelf / name).scheduler.config)
    assert settings(scheduler) == settings(made("optimal").scheduler)


# --------------------------------------------------------------------------- several in one process


def steps(pipe):
    """How many steps a call walks when nothing is said: all T of a DDPM."""
    pipe(output_type="latent", callback_on_step_end=lambda pipe, *_: setattr(pipe, "interrupt", True))
    return len(pipe.scheduler.timesteps)


def state(pipe):
    """All that another folder might disturb."""
    return {
        "class": type(pipe).__name__,
        "settings": settings(pipe.scheduler),
        "images": sample(pipe).tolist(),
        "steps": steps(pipe),
        "weights": {name: value.tolist() for name, value in pipe.unet.state_dict().items()},
    }


@pytest.mark.parametrize("first, second", [("plain", "twin"), ("learned", "plain"), ("optimal", "optimal")])
@pytest.mark.parametrize("way", ["installed", "trusted"])
def test_a_second_folder_leaves_the_first_as_it_was(shelf, tmp_path, way, first, second):
    pipe = load(way, shelf / first)
    before = state(pipe)
    other = load(way, shelf / second)
    assert before["steps"] == T
    assert state(pipe) == before
    assert state(other) == state(load(way, shelf / second))
    if first != second:
        assert not np.array_equal(sample(other), sample(pipe))
    pipe.save_pretrained(tmp_path)
    expected = contents(shelf / first)
    assert (tmp_path / "pipeline.py").read_bytes() == expected["pipeline.py"]
    assert (tmp_path / "model_index.json").read_bytes() == expected["model_index.json"]
    assert files(tmp_path) == LAYOUT


def test_two_versions_of_the_code_in_one_process_each_run_their_own(shelf, tmp_path):
    """Also what a method finds by name in its module: a helper function, a constant."""
    folders = {version: tmp_path / version for version in ("old", "new")}
    own = (shelf / "plain" / "pipeline.py").read_text()
    for version, folder in folders.items():
        DDPMPipeline.from_pretrained(shelf / "plain").save_pretrained(folder)
        code = own.replace("def is_ddpm(", f"VERSION = {version!r}\n\n\ndef is_ddpm(")
        code = code.replace(
            "    @property\n    def null_label",
            "    def version(self):\n        return _ask(), VERSION\n\n    @property\n    def null_label",
        )
        code = code.replace("def is_ddpm(", f"def _ask():\n    return {version!r}\n\n\ndef is_ddpm(")
        assert code.count(repr(version)) == 2 and code.count("return _ask(), VERSION") == 1
        (folder / "pipeline.py").write_text(code)
    pipes = {version: load("trusted", folder) for version, folder in folders.items()}
    assert {version: pipe.version() for version, pipe in pipes.items()} == {v: (v, v) for v in folders}
    for version, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / "again" / version)
        assert (tmp_path / "again" / version / "pipeline.py").read_text() == (
            folders[version] / "pipeline.py"
        ).read_text()
    assert load("trusted", folders["old"]).version() == ("old", "old")


def test_components_may_be_shared_between_loaded_code_and_the_package(shelf):
    trusted = load("trusted", shelf / "learned")
    pipe = DDPMNotesPipeline(trusted.unet, trusted.scheduler)
    np.testing.assert_array_equal(sample(pipe), sample(made("learned")))


# ------------------------------------------------------------------------------------- saving again


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "optimal", "labelled", "eta", "learned"])
def test_a_folder_saved_again_loads_in_all_ways(shelf, tmp_path, name, way):
    again = tmp_path / "again"
    load(way, shelf / name).save_pretrained(again)
    assert files(again) == LAYOUT - ({"pipeline.py"} if way == "stock" else set())
    code = shelf / name if way == "stock" else again
    expected = sample(made(name))
    for reader in ("installed", "trusted"):
        pipe = load(reader, again, code=code)
        assert settings(pipe.scheduler) == settings(made(name).scheduler)
        assert pipe.null_label == (3 if name == "labelled" else None)
        np.testing.assert_array_equal(sample(pipe), expected)
    stock = load("stock", again)
    assert type(stock) is DDPMPipeline and type(stock.scheduler) is DDPMScheduler
    if name != "labelled":
        np.testing.assert_array_equal(sample(stock), sample(load("stock", shelf / name)))


@pytest.mark.parametrize("way", ["installed", "trusted"])
@pytest.mark.parametrize("name", ["optimal", "labelled"])
def test_a_folder_saved_again_has_the_same_code_weights_index_and_settings(shelf, tmp_path, name, way):
    load(way, shelf / name).save_pretrained(tmp_path)
    again, expected = contents(tmp_path), contents(shelf / name)
    for file in LAYOUT - {"unet/config.json"}:
        assert again[file] == expected[file], file
    unet, before = (json.loads(files["unet/config.json"]) for files in (again, expected))
    unet.pop("_name_or_path", None)
    assert unet == before


@pytest.mark.parametrize("way", ["installed", "trusted"])
def test_a_folder_saved_again_does_not_say_where_it_was_loaded_from(shelf, tmp_path, way):
    load(way, shelf / "plain").save_pretrained(tmp_path)
    leaks = [name for name, text in contents(tmp_path).items() if str(shelf).encode() in text]
    assert leaks == []


@pytest.mark.parametrize("way", ["installed", "trusted"])
def test_a_pipeline_saved_over_its_own_folder_is_as_good_as_before(tmp_path, way):
    made("optimal").save_pretrained(tmp_path)
    code = (tmp_path / "pipeline.py").read_bytes()
    load(way, tmp_path).save_pretrained(tmp_path)
    assert files(tmp_path) == LAYOUT
    assert (tmp_path / "pipeline.py").read_bytes() == code
    np.testing.assert_array_equal(sample(load(way, tmp_path)), sample(made("optimal")))


@pytest.mark.parametrize("name", PLUGGED)
@pytest.mark.parametrize("way", WAYS)
def test_a_plugged_in_scheduler_is_saved_again(shelf, tmp_path, name, way):
    load(way, shelf / name).save_pretrained(tmp_path)
    for reader in WAYS:
        pipe = load(reader, tmp_path, code=shelf / name)
        assert type(pipe.scheduler) is PLUGGED[name]
        np.testing.assert_allclose(sample(pipe), sample(made(name)), rtol=0, atol=1e-6)


# ---------------------------------------------------------- strangers, in interpreters of their own

STRANGER = """
import sys
sys.modules["ddpm_notes_pipeline"] = None
import json, logging, warnings
from pathlib import Path
import numpy as np, torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

try:
    import ddpm_notes_pipeline
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported here: this is no stranger")

shelf, out = Path(sys.argv[1]), Path(sys.argv[2])
diffusers_logging.disable_progress_bar()
torch.set_num_threads(1)

def sample(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **arguments).images

heard = []
class Ear(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())
for name in ("diffusers", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Ear(logging.WARNING))
warnings.showwarning = lambda message, category, *_: heard.append(f"{category.__name__}: {message}")

# What other libraries say while they are imported is not about our folder.
print("the stranger begins", file=sys.stderr, flush=True)
"""


def stranger(script, shelf, tmp_path):
    """Run `script` where the package is hidden, on the shelf; returns the folder it wrote to."""
    out, away = tmp_path / "out", tmp_path / "away"
    out.mkdir()
    away.mkdir()
    path = tmp_path / "stranger.py"
    path.write_text(STRANGER + textwrap.dedent(script) + "\nassert not heard, heard\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(path), str(shelf), str(out)],
        cwd=away,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    _, begins, said = run.stderr.partition("the stranger begins\n")
    assert begins and said == ""
    return out


@pytest.mark.slow
def test_a_stranger_samples_with_stock_diffusers_and_hears_no_warning(shelf, tmp_path):
    out = stranger(
        """
        for name in ("plain", "optimal", "learned", "eta"):
            pipe = DiffusionPipeline.from_pretrained(shelf / name)
            assert type(pipe) is DDPMPipeline, type(pipe)
            assert type(pipe.scheduler) is DDPMScheduler
            images = sample(pipe)
            np.save(out / f"{name}.npy", images)
            assert np.array_equal(sample(DDPMPipeline.from_pretrained(shelf / name)), images)
            pipe.save_pretrained(out / name)
        assert DDPMPipeline.from_pretrained(shelf / "optimal").scheduler.config.variance_type == "fixed_small"
        assert not [name for name in sys.modules if name.startswith("diffusers_modules")]  # no code of ours has run
        """,
        shelf,
        tmp_path,
    )
    for name in ("plain", "learned"):
        np.testing.assert_allclose(np.load(out / f"{name}.npy"), sample(made(name)), rtol=0, atol=1e-4)
    for name in ("plain", "optimal", "learned", "eta"):  # what it has saved is still what it was
        pipe = load("installed", out / name)
        assert settings(pipe.scheduler) == settings(made(name).scheduler)
        np.testing.assert_array_equal(sample(pipe), sample(made(name)))


@pytest.mark.slow
def test_a_stranger_who_trusts_the_folder_gets_all_of_it(shelf, tmp_path):
    out = stranger(
        """
        try:
            DiffusionPipeline.from_pretrained(shelf / "plain", custom_pipeline=str(shelf / "plain"))
        except ValueError as refusal:
            assert "trust_remote_code=True" in str(refusal)
        else:
            raise SystemExit("untrusted code was run")

        def trusted(folder, code=None):
            return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(code or folder), trust_remote_code=True)

        settings = {}
        for name in ("plain", "optimal", "learned", "eta", "labelled", "ddim", "dpm"):
            pipe = trusted(shelf / name)
            assert type(pipe).__name__ == "DDPMNotesPipeline"
            scheduler = pipe.scheduler
            if name not in ("ddim", "dpm"):
                assert type(scheduler).__name__ == "DDPMNotesScheduler"
                names = ("variance_type", "original_sample_mse", "decoder_variance", "eta")
                settings[name] = {key: getattr(scheduler, key) for key in names}
            arguments = {"class_labels": [0, 2], "guidance_scale": 2.0} if name == "labelled" else {}
            np.save(out / f"{name}.npy", sample(pipe, **arguments))
            pipe.save_pretrained(out / name)
            assert (out / name / "pipeline.py").read_bytes() == (shelf / name / "pipeline.py").read_bytes()
            assert np.array_equal(sample(trusted(out / name), **arguments), np.load(out / f"{name}.npy"))
            DiffusionPipeline.from_pretrained(out / name)
        np.save(out / "stock.npy", sample(trusted(shelf / "stock", shelf / "optimal")))
        (out / "settings.json").write_text(json.dumps(settings))
        """,
        shelf,
        tmp_path,
    )
    found = json.loads((out / "settings.json").read_text())
    assert found == {name: json.loads(json.dumps(settings(made(name).scheduler))) for name in found}
    for name in ("plain", "optimal", "learned", "eta", "labelled", "ddim", "dpm"):
        arguments = {"class_labels": [0, 2], "guidance_scale": 2.0} if name == "labelled" else {}
        np.testing.assert_array_equal(np.load(out / f"{name}.npy"), sample(made(name), **arguments), err_msg=name)
        np.testing.assert_array_equal(sample(load("installed", out / name), **arguments), np.load(out / f"{name}.npy"))
    np.testing.assert_array_equal(np.load(out / "stock.npy"), sample(made("plain")))


@pytest.mark.slow
def test_a_stranger_keeps_two_folders_apart(shelf, tmp_path):
    stranger(
        """
        def trusted(name):
            return DiffusionPipeline.from_pretrained(
                shelf / name, custom_pipeline=str(shelf / name), trust_remote_code=True
            )

        alone = {name: sample(trusted(name)) for name in ("learned", "plain", "twin")}
        assert not np.array_equal(alone["plain"], alone["twin"])
        together = {name: trusted(name) for name in alone}
        for name, pipe in together.items():
            assert np.array_equal(sample(pipe), alone[name]), name
        """,
        shelf,
        tmp_path,
    )
