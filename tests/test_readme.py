"""Every code block of the documents runs, in a folder like a clone, with flags that shorten it.

What is not run is named here with the reason.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.support.hub_content import User
from tests.support.launching import ROOT, once

DOCUMENTS = (
    "README.md",
    "training/README.md",
    "examples/README.md",
    "tests/benchmarks/README.md",
    "CONTRIBUTING.md",
)
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
BLOCKS = [block for text in TEXT.values() for block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)]
SHORT_TRAINING = (
    "--block_out_channels 32 32 --layers_per_block 1 --attention_levels 1 --max_train_steps 3 --lr_warmup_steps 1 "
    "--train_batch_size 4 --checkpointing_steps 3 --max_validation_images 3 --num_samples 2 "
    "--ddpm_num_inference_steps 2 --report_to none"
).split()
SHORT_MEASURING = "--max_images 4 --evaluations_per_image 3 --variance_split test".split()
RUN = {  # how a command starts: the flags that shorten it
    "accelerate launch training/train.py --train_data_dir my_images": SHORT_TRAINING,
    "accelerate launch training/train.py --config training/configs/digits.yaml --push_to_hub": SHORT_TRAINING,
    "accelerate launch training/evaluate.py --model outputs/digits": SHORT_MEASURING,
    "python -m ddpm_notes_pipeline.publishing outputs/digits --hub_model_id you/ddpm-digits": [],
}
NOT_RUN = {
    "pip install": "the environment that the tests run in; test_wheel.py installs the package",
    "make train": "set-up and the main job: the first command of a fresh machine",
    "make demo": "test_space.py starts it and goes through it in a browser",
    "make test": "these tests",
    "make lint": "beside these tests in .ci/run",
    "make bench": "20 minutes of a quiet machine; nothing here is timed",
    "make gpu-check": "a GPU; test_gpu_check.py runs its code on a CPU",
    "accelerate launch training/train.py --dataset_name huggan/": "a data set of the real Hub, on a GPU",
    "accelerate launch --multi_gpu": "four GPUs; test_train.py runs two processes",
    "git tag": "a release of its own",
    "python -m pip wheel": "test_wheel.py builds the wheel",
    "python -m pip download": "a folder for a machine without a network",
}


def commands() -> list[str]:
    """The shell commands of all blocks, each once, on one line and without comments."""
    text = "".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    words = (shlex.split(line, comments=True) for line in text.splitlines())
    return list(dict.fromkeys(shlex.join(command) for command in words if command))


def treatment(command: str) -> list[str]:
    return [start for start in (*RUN, *NOT_RUN) if command.startswith(start)]


def test_every_command_is_run_or_has_a_reason():
    found = [treatment(command) for command in commands()]
    assert all(len(starts) == 1 for starts in found), dict(zip(commands(), found, strict=True))
    assert {start for starts in found for start in starts} == {*RUN, *NOT_RUN}  # no entry is left over
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


def test_the_front_page_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 150 and len(TEXT["README.md"].encode()) <= 9000


@pytest.mark.parametrize("name", [*DOCUMENTS, "examples/tables/README.md"])
def test_links_lead_somewhere(name):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#][^)]*)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (document.parent / path).exists(), target
            assert not anchor or anchor in anchors(document.parent / path), target


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def clone(train):
    """A folder with what a clone has, a folder of images, and what `make train` leaves."""

    def make(folder: Path):
        (folder / "my_images").mkdir(parents=True)
        for i in range(6):
            PIL.Image.new("RGB", (80, 70), (40 * i, 0, 200)).save(folder / "my_images" / f"{i}.png")
        for name in ("training", "examples"):
            (folder / name).symlink_to(ROOT / name)
        return train("--config", "training/configs/digits.yaml", *SHORT_TRAINING, cwd=folder)

    return once("readme", make)[0]


def runnable(command: str) -> list[str]:
    """The words of a command without its launcher, with the flags that shorten it."""
    words = [word for word in shlex.split(command) if word not in ("accelerate", "launch", "python")]
    return [*words, *RUN[treatment(command)[0]]]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if treatment(c)[0] in RUN and "you/" not in c])
def test_a_command_does_what_it_says(train, clone, command):
    script, *flags = runnable(command)
    evaluation = clone / "outputs" / "digits" / "evaluation.json"
    if "evaluate.py" in script:
        evaluation.unlink()
    result = train(*flags, script=script, cwd=clone)
    if "evaluate.py" in script:
        assert len(json.loads(evaluation.read_text())["results"]) >= 1
    named = re.findall(r"--output_dir (\S+)", command) or ["outputs/digits"]
    assert named[0] in result.stdout and (clone / named[0] / "model_index.json").exists()


@pytest.mark.slow
def test_the_publishing_commands_publish(clone, hub):
    hub.users = {"hf_you": User("you")}
    commits = []
    publishing = [c for c in commands() if treatment(c)[0] in RUN and "you/ddpm-digits" in c]
    for command in sorted(publishing, key=lambda command: "train.py" not in command):  # the one that trains first
        words = [sys.executable, *runnable(command)]
        words += ["--output_dir", "outputs/published"] if "train.py" in command else []
        done = subprocess.run(words, cwd=clone, env=hub.env("hf_you"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        commits.append(len(hub.repos["you/ddpm-digits"].commits))
    assert len(commits) == 3 and commits[2] > commits[1] > commits[0]
    assert "app.py" in hub.repos["spaces/you/ddpm-digits-demo"].files()
    assert {"pipeline.py", "README.md", "samples.png"} <= set(hub.repos["you/ddpm-digits"].files())


@pytest.mark.slow
@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language == "python"])
def test_a_python_block_runs(train, clone, body):
    train(body, script="-c", cwd=clone)
