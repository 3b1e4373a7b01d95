"""Repositories as others find them: pushed by real launches, loaded without this package.

Each kind of model is trained and pushed once (`accelerate launch`, the real client, a Hub on this
machine). The tests below have only what arrived there: the others' interpreters cannot import the
package, and run the code blocks of the card as they stand.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from tests.hub.test_model_card import make_folder
from tests.support.hub_content import Blob, Repo, User
from tests.support.launching import ROOT, TINY, TRAIN, launch, once
from tests.support.loopback_hub import Hub

TOKEN, SECRET = "hf_ThisTokenIsPlanted", "this-value-is-planted"
PERSON = "plantedperson"
KINDS = {
    "plain": ["--hub_strategy", "every_save", "--checkpointing_steps", "6"],
    "labelled": ["--label_column", "label", "--hub_private_repo", "true"],
    "learned": ["--variance_type", "learned_range", "--objective", "hybrid"],
}
pytestmark = pytest.mark.slow


def people(hub):
    hub.users |= {TOKEN: User("user"), "hf_google": User("google")}


def client(hub, **more):
    """The environment of a Hub user on another machine, with private values in it."""
    kept = (
        "HF_ENDPOINT",
        "NO_PROXY",
        "no_proxy",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_XET_TELEMETRY_ENABLED",
        "HF_HUB_DISABLE_UPDATE_CHECK",
    )
    env = {name: value for name, value in hub.env(TOKEN).items() if name in kept}
    return (
        env
        | {
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "USER": PERSON,
            "LOGNAME": PERSON,
            "HOSTNAME": "planted-host",
            "MY_OWN": SECRET,
        }
        | more
    )


def publish(kind):
    """Train and push one kind: a folder with `run`, `hub` (what arrived) and commits.json."""

    def make(folder):
        folder.mkdir()
        home = folder / "home" / PERSON
        home.mkdir(parents=True)
        with Hub() as hub:
            people(hub)
            flags = [
                *TINY,
                "--output_dir",
                "run",
                "--push_to_hub",
                "true",
                "--hub_model_id",
                f"user/{kind}",
                *("--ddpm_beta_schedule", "squaredcos_cap_v2"),  # down to noise in 100 steps, too
                *KINDS[kind],
            ]
            result = launch(*flags, cwd=folder, env=client(hub, HOME=str(home)))
            repo = hub.repos[f"user/{kind}"]
            for name, data in repo.files().items():
                (folder / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "hub" / name).write_bytes(data)
            log = [{"title": commit.title, "files": sorted(commit.files)} for commit in repo.commits]
            sent = "\n".join(f"{request.path} {request.query}" for request in hub.requests)
            (folder / "commits.json").write_text(json.dumps({"private": repo.private, "log": log, "sent": sent}))
            assert not hub.errors
        return result

    return once(f"published-{kind}", make)


def put(hub, repo_id, folder):
    """A repository with the files of a folder, as one more commit; its hash."""
    repo = hub.repos.setdefault(repo_id, Repo(repo_id))
    if not repo.history:
        repo.start(repo_id.split("/")[0])
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }
    blobs = {
        name: Blob(data, lfs=name.endswith(".safetensors")) for name, data in files.items() if name != ".gitattributes"
    }
    return repo.commit("files", "", "somebody", blobs).oid


STRANGER = """
import logging, sys, warnings
sys.modules["ddpm_notes_pipeline"] = None
try:
    import ddpm_notes_pipeline
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported here: this is no stranger")
import json
from pathlib import Path
import numpy as np, torch
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

torch.set_num_threads(1)
diffusers_logging.disable_progress_bar()
heard = []
class Ear(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())
for name in ("diffusers", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Ear(logging.WARNING))
warnings.showwarning = lambda message, category, *_: heard.append(f"{category.__name__}: {message}")
"""


def stranger(hub, tmp_path, script, *arguments):
    """Run a script far from this checkout; its standard output."""
    away = tmp_path / "away"
    away.mkdir(exist_ok=True)
    path = away / "stranger.py"
    path.write_text(STRANGER + textwrap.dedent(script))
    env = {**hub.env(TOKEN), "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, path, *map(str, arguments)], cwd=away, env=env, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout


@pytest.fixture
def hub(hub):
    """The Hub of conftest.py, with users."""
    people(hub)
    return hub


def stock_checkpoint(folder):
    """A DDPM that was saved by stock diffusers."""
    pipe = DDPMPipeline.from_pretrained(make_folder(folder / "ours", run=None, evaluation=None, pictures=()))
    DDPMPipeline(pipe.unet, DDPMScheduler()).save_pretrained(folder / "stock")
    return folder / "stock"


# ------------------------------------------------------------ what a run publishes


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_publishes_its_folder_and_nothing_private(kind):
    folder, result = publish(kind)
    arrived = {path.relative_to(folder / "hub").as_posix() for path in (folder / "hub").rglob("*") if path.is_file()}
    assert arrived == {
        ".gitattributes",
        *("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", "README.md"),
        *(
            "unet/diffusion_pytorch_model.safetensors",
            "training_config.yaml",
            "training_run.json",
            "samples.png",
            "trajectory.gif",
            "loss.png",
        ),
    }
    for name in arrived - {".gitattributes"}:
        assert (folder / "hub" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    record = json.loads((folder / "commits.json").read_text())
    assert record["private"] == (kind == "labelled")
    titles = [commit["title"] for commit in record["log"]]
    expected = ["End of training", "Step 6 of 12"] if kind == "plain" else ["End of training"]
    assert titles == [*expected, "initial commit"]
    assert "Published: http://127.0.0.1" in result.stdout
    assert not list((folder / "run").glob(".push-*"))

    planted = (TOKEN, SECRET, PERSON, "planted-host", str(folder), str(ROOT), str(Path.home()), "/tmp/")
    for path in [*(folder / "hub").rglob("*"), *(folder / "run").rglob("*")]:
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in planted if secret.encode() in data], path
    typed = result.stdout.replace(str(TRAIN), "train.py")  # the command to go on repeats what was typed
    for text in (typed, record["sent"]):
        assert not [secret for secret in planted if secret in text]
    errors = result.stderr.replace(str(ROOT), "")  # Python names the file that a warning comes from
    assert not [secret for secret in (TOKEN, SECRET, PERSON, "planted-host") if secret in errors]


def test_the_settings_that_were_published_repeat_the_run(tmp_path):
    folder, _ = publish("learned")
    launch("--config", folder / "hub" / "training_config.yaml", "--output_dir", "again", cwd=tmp_path)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / "hub" / weights).read_bytes()


# ------------------------------------------------------------ what strangers do


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_runs_every_snippet_of_the_card(hub, tmp_path, kind):
    folder, _ = publish(kind)
    put(hub, f"user/{kind}", folder / "hub")
    put(hub, "google/ddpm-cifar10-32", stock_checkpoint(tmp_path))
    card = hub.repos[f"user/{kind}"].files()["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (3 if kind == "labelled" else 5)
    script = """
    for number, snippet in enumerate(json.loads(sys.argv[1])):
        names = {}
        exec(compile(snippet, f"snippet {number}", "exec"), names)
        images = names.get("images") or [names["image"]]
        made = np.stack([np.asarray(image) for image in images])
        assert made.dtype == np.uint8 and made.std() > 0
        print(type(names["pipe"]).__name__, made.shape[1:3], len(made), flush=True)
    assert not heard, heard
    """
    out = stranger(hub, tmp_path, script, json.dumps(snippets))
    ours = [line for line in out.splitlines() if line.startswith("DDPMNotesPipeline")]
    stock = [line for line in out.splitlines() if line.startswith("DDPMPipeline (8, 8)")]
    assert len(ours) == 3 and len(stock) == (0 if kind == "labelled" else 2)
    if kind != "labelled":
        assert (tmp_path / "away" / "sample.png").exists()
    assert re.search(r"^\d+\.\d\d bits/dim: prior \d", out, re.MULTILINE)


def test_without_trust_the_code_of_a_repository_is_refused(hub, tmp_path):
    folder, _ = publish("plain")
    put(hub, "user/plain", folder / "hub")
    script = """
    for code in ("user/plain", "user/plain"):
        try:
            DiffusionPipeline.from_pretrained("user/plain", custom_pipeline=code)
        except ValueError as refusal:
            assert "trust_remote_code=True" in str(refusal), refusal
            print("refused")
    assert not [name for name in sys.modules if name.startswith(("diffusers_modules", "ddpm_notes_pipeline_"))]
    """
    assert stranger(hub, tmp_path, script).split() == ["refused", "refused"]


def test_each_revision_and_each_repository_runs_its_own_code(hub, tmp_path):
    """All in one process: two revisions of one repository, a third version in another."""
    folder, _ = publish("plain")
    copy = tmp_path / "copy"
    shutil.copytree(folder / "hub", copy)
    code = (copy / "pipeline.py").read_text()
    at = "    @property\n    def null_label"
    pins = {}
    for version, repo in (("first", "user/one"), ("second", "user/one"), ("third", "user/two")):
        asked = code.replace(at, f"    def version(self):\n        return _version()\n\n{at}")
        asked = asked.replace(
            "class DDPMNotesPipeline(", f"def _version():\n    return {version!r}\n\n\nclass DDPMNotesPipeline("
        )
        assert asked.count("_version()") == 2
        (copy / "pipeline.py").write_text(asked)
        pins[version] = (repo, put(hub, repo, copy))
    script = """
    pipes = {}
    for version, (repo, commit) in json.loads(sys.argv[1]).items():
        pipes[version] = DiffusionPipeline.from_pretrained(
            repo, revision=commit, custom_pipeline=repo, custom_revision=commit, trust_remote_code=True
        )
    newest = DiffusionPipeline.from_pretrained("user/one", custom_pipeline="user/one", trust_remote_code=True)
    print(json.dumps([{version: pipe.version() for version, pipe in pipes.items()}, newest.version()]))
    assert not heard, heard
    """
    found = json.loads(stranger(hub, tmp_path, script, json.dumps(pins)))
    assert found == [{version: version for version in pins}, "second"]


# ------------------------------------------------------------ the table of the README

SCHEDULERS = {
    "its own": None,
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
ROWS = {"plain": "unconditional", "labelled": "class-conditional", "learned": "learned variance"}
WAYS = {
    "stock": "`DDPMPipeline`, `DiffusionPipeline`: no trust",
    "trusted": "`custom_pipeline=REPO, trust_remote_code=True`",
    "installed": "`DDPMNotesPipeline`",
}
SUPPORT = """
    import diffusers
    schedulers, kinds, ways = (json.loads(text) for text in sys.argv[1:])
    heard_before = list(heard)
    found = {}
    for kind in kinds:
        repo = f"user/{kind}"
        for way in ways:
            for name, class_name in schedulers.items():
                if way == "stock":
                    pipes = [DiffusionPipeline.from_pretrained(repo), DDPMPipeline.from_pretrained(repo)]
                    assert not heard, heard
                elif way == "trusted":
                    pipes = [DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)]
                    assert not heard, heard
                else:
                    from ddpm_notes_pipeline import DDPMNotesPipeline
                    pipes = [DDPMNotesPipeline.from_pretrained(repo)]
                works = []
                for pipe in pipes:
                    if class_name is not None:
                        pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config)
                    labels = {"class_labels": [0, 1]} if kind == "labelled" and way != "stock" else {}
                    try:
                        images = pipe(batch_size=2, num_inference_steps=4, output_type="np", **labels).images
                        works.append(images.shape == (2, 8, 8, 1) and bool(np.isfinite(images).all()) and images.std() > 0)
                    except Exception:
                        works.append(False)
                bits = None
                if class_name is None and way != "stock":
                    bits = 0 < pipes[0].bits_per_dim((images * 255).round().astype("uint8"), **labels).total < 100
                assert len(set(works)) == 1, (kind, way, name, works)
                found[f"{kind} {way} {name}"] = [bool(works[0]), bits]
                heard.clear()
    print(json.dumps(found))
"""


def test_the_documented_table_of_what_loads_what_is_what_happens(hub, tmp_path):
    for kind in KINDS:
        put(hub, f"user/{kind}", publish(kind)[0] / "hub")
    arguments = [json.dumps(SCHEDULERS), json.dumps(list(KINDS))]
    found = json.loads(stranger(hub, tmp_path, SUPPORT, *arguments, json.dumps(["stock", "trusted"])))
    script = tmp_path / "owner.py"
    script.write_text(
        STRANGER.partition("import json\n")[2].join(["import json, logging, sys, warnings\n", textwrap.dedent(SUPPORT)])
    )
    env = hub.env(TOKEN) | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, *arguments, '["installed"]'], env=env, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-5000:]
    found |= json.loads(run.stdout)

    lines = [
        f"| repository | loaded by | {' | '.join(SCHEDULERS)} | bits/dim |",
        f"|---|---|{'---|' * len(SCHEDULERS)}---|",
    ]
    for (kind, row), (way, words) in itertools.product(ROWS.items(), WAYS.items()):
        cells = ["yes" if found[f"{kind} {way} {name}"][0] else "no" for name in SCHEDULERS]
        bits = "yes" if found[f"{kind} {way} its own"][1] else "no"
        lines.append(f"| {row} | {words} | {' | '.join(cells)} | {bits} |")
    table = "\n".join(lines)
    assert table in (ROOT / "examples" / "README.md").read_text(), f"examples/README.md must have this table:\n{table}"


# ------------------------------------------------------------ when it cannot be published


def test_a_repository_that_cannot_be_written_to_stops_the_run_before_it_begins(tmp_path):
    with Hub() as hub:
        env = client(hub) | {"HF_TOKEN": "hf_reader"}
        flags = [*TINY, "--output_dir", "run", "--push_to_hub", "true", "--hub_model_id", "user/new"]
        result = launch(*flags, cwd=tmp_path, env=env, expect=1, processes=2)
    assert "needs the role `write`" in result.stderr and "train:" not in result.stderr
    assert hub.repos == {} and list((tmp_path / "run").iterdir()) == []


def test_a_push_that_fails_in_the_end_loses_nothing_and_says_how_to_finish(tmp_path):
    """On 2 processes. The last line is a command, which is then run as it stands."""
    with Hub() as hub:
        people(hub)
        fault = hub.fail("commit", 403, times=None)
        flags = [*TINY, "--output_dir", "run", "--push_to_hub", "true", "--hub_model_id", "user/late"]
        result = launch(*flags, cwd=tmp_path, env=client(hub), expect=1, processes=2)
        lines = [line for line in result.stderr.splitlines() if line]
        last = next(i for i, line in enumerate(lines) if line.startswith("python -m ddpm_notes_pipeline.publishing"))
        command = lines[last]
        assert "Nothing is lost" in lines[last - 1] and "run/" in lines[last - 1]
        assert "Learned:" in result.stdout
        assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").exists()
        card = (tmp_path / "run" / "README.md").read_text()
        assert "user/late" in card and "](samples.png)" in card
        fault.clear()
        env = {**hub.env(TOKEN), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        later = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert later.returncode == 0, later.stderr
        assert f"Pushed: {hub.endpoint}/user/late" in later.stdout
        files = hub.repos["user/late"].files()
        assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
        assert not [name for name in files if name.startswith("checkpoint")]
