"""Pushing a Hub folder, so that no weights are lost and no commit is made twice.

    python -m ddpm_notes_pipeline.publishing outputs/digits --hub_model_id user/name
    python -m ddpm_notes_pipeline.publishing outputs/digits --hub_model_id user/name --space_id user/name-demo    # and its demo

Only the folder's own files go up (`HUB_FILES`): never checkpoints, optimizer states or logs. A push is one commit on top of the commit it
has seen. When the Hub says that the repository has moved on, is busy, or does not answer, the push looks at what is there now and tries
again: files that did arrive are not committed a second time, and of two pushes at once the later one's files win, all of them.
The folder itself is never touched but for its card, so a failed push loses nothing: the command above finishes it.

The demo is a Space: the three files of a folder of their own (`--space_dir`, examples/space in a clone). They are no part of the installed
package: an app needs gradio, is read and changed before it is pushed, and loads the model without this package.
"""

import argparse
import logging
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard

# HTTPError is what every fault of the network is: of httpx where huggingface_hub is 1.x, of httpx2 where it is 2.x.
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status

from .model_card import read_facts, write_card

logger = logging.getLogger(__name__)

# What the repository is made of: the layout that loads with diffusers alone, and what a reader of the card looks at.
HUB_FILES = [
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index.json",
    "README.md",
    "samples.png",
    "trajectory.gif",
    "bits_per_dim.png",
    "loss.png",
    "training_config.yaml",
    "training_run.json",
    "evaluation.json",
]
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
SPACE_SETTINGS = ("sdk", "sdk_version", "python_version", "app_file")  # what app.py runs in: not the owner's to keep
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds; doubled after each attempt


class PublishingError(RuntimeError):
    """A repository could not be made, or a push did not arrive. The local folder is complete."""


def prepare_repo(
    repo_id: str, private: bool = False, license: str | None = None, api: HfApi | None = None, repo_type: str = "model"
) -> str:
    """Make the repository, or make sure that an existing one can be written to; returns its full name "user/name".

    Args:
        repo_id: "user/name", or a name in the token's own namespace.
        private: make it private.
        license: asked about too, before anything depends on it.
        repo_type: "model", or "space" for a gradio app.

    Raises:
        PublishingError: a licence that the Hub does not know, no token, no right to write, no Hub, or a public repository where a private one was asked for.
    """
    api = api or HfApi()

    def prepare() -> str:
        if license is not None:
            _ask_about(license, api)
        # What is there is not asked for anew: a token may be allowed to write to a repository and not to make one.
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        try:
            found = api.repo_info(name, repo_type=repo_type)
        except RepositoryNotFoundError:
            sdk = "gradio" if repo_type == "space" else None
            return api.create_repo(name, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk).repo_id
        if private and not found.private:
            raise PublishingError(
                f"{name} is public and --hub_private_repo asks for a private one; make it private first, or name another"
            )
        api.auth_check(name, write=True, repo_type=repo_type)
        return name

    return _persistently(prepare, f"could not get {repo_id} ready")


def push_folder(
    folder: Path | str,
    repo_id: str,
    message: str = "Upload a DDPM",
    license: str | None = None,
    api: HfApi | None = None,
    ended: threading.Event | None = None,
    space_id: str | None = None,
) -> str:
    """Write the folder's card and push the folder's own files in one commit; returns the repository's address.

    Args:
        folder: a folder that `DDPMNotesPipeline.save_pretrained` wrote, with what training and evaluation put beside it.
        repo_id: "user/name" of a repository that is there (`prepare_repo`).
        message: of the commit.
        license: see `write_card`.
        ended: once it is set, a failed attempt is the last.
        space_id: see `write_card`.

    Raises:
        PublishingError: after five attempts, or at once when no attempt can help (no right to write).
    """
    api = api or HfApi()

    def push() -> str:
        head = api.repo_info(repo_id).sha
        write_card(folder, repo_id, license, _published_card(api, repo_id, head), space_id)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=HUB_FILES, commit_message=message, parent_commit=head
        )
        return f"{api.endpoint}/{repo_id}"

    return _persistently(push, f"could not push {folder} to {repo_id}", ended)


def push_space(space_dir: Path | str, space_id: str, model_id: str, api: HfApi | None = None) -> str:
    """Push the demo for a model in one commit; returns its address. The Space's page and the model's link to each other.

    In a README.md that was pushed before, what its owner wrote stays, other models too; the model is the first of them, which app.py takes.

    Args:
        space_dir: a folder with app.py, README.md and requirements.txt (`read_space`).
        space_id: "user/name" of a Space that is there (`prepare_repo`).
        model_id: "user/name" of the model.

    Raises:
        ValueError: the folder is no Space.
        PublishingError: as `push_folder`.
    """
    api = api or HfApi()
    files = read_space(space_dir)

    def push() -> str:
        head = api.repo_info(space_id, repo_type="space").sha
        card = RepoCard(files["README.md"].decode(), ignore_metadata_errors=False)
        ours = card.data.to_dict()
        there = Path(api.hf_hub_download(space_id, "README.md", repo_type="space", revision=head))
        before = RepoCard(there.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if before.data.get("models"):  # the one that a new Space has names none
            card = before
        models = [model_id, *(name for name in card.data.get("models") or [] if name != model_id)]
        for name, value in [*((name, ours[name]) for name in SPACE_SETTINGS if name in ours), ("models", models)]:
            card.data[name] = value
        contents = {**files, "README.md": str(card).encode()}
        operations = [CommitOperationAdd(name, contents[name]) for name in SPACE_FILES]
        message = f"Demo of {model_id}"
        api.create_commit(space_id, operations, commit_message=message, repo_type="space", parent_commit=head)
        return f"{api.endpoint}/spaces/{space_id}"

    return _persistently(push, f"could not push the Space {space_id}")


def read_space(space_dir: Path | str) -> dict[str, bytes]:
    """The three files of a Space by name; ValueError where one is missing."""
    missing = [name for name in SPACE_FILES if not (Path(space_dir) / name).is_file()]
    if missing:
        raise ValueError(
            f"--space_dir {space_dir} has no {', '.join(missing)}; allowed: a folder with {', '.join(SPACE_FILES)}, such as "
            "examples/space in a clone of the project"
        )
    return {name: (Path(space_dir) / name).read_bytes() for name in SPACE_FILES}


def export_folder(
    folder: Path | str, target: Path | str, repo_id: str | None = None, license: str | None = None
) -> list[str]:
    """Write the folder's card and copy into `target` exactly the files that a push would send; their names.

    For a repository that is kept with git, or looked at before anything is public.

    Raises:
        ValueError: no pipeline in the folder, or a target that has something in it.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there and not empty; allowed: a new folder, or an empty one")
    write_card(folder, repo_id, license)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(filter_repo_objects(names, allow_patterns=HUB_FILES))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return names


def push_command(folder: Path | str, repo_id: str, private: bool = False) -> str:
    """The command that uploads a folder later."""
    flags = " --hub_private_repo" if private else ""
    return f"python -m ddpm_notes_pipeline.publishing {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}{flags}"


class BackgroundPushes:
    """Pushes during training: one after the other, in a thread, of folders made for it, which are deleted when they are up.

    While one is on its way only the newest of the others waits. What fails is logged and left to the next one.
    """

    def __init__(self, repo_id: str, license: str | None = None) -> None:
        self.repo_id, self.license = repo_id, license
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._lock = threading.Lock()
        self._waiting: tuple[Path, Future] | None = None
        self._ended = threading.Event()

    def push(self, folder: Path, message: str) -> None:
        """Push the folder some time soon, then delete it."""
        with self._lock:
            if self._waiting is not None and self._waiting[1].cancel():
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (folder, self._pool.submit(self._push, folder, message))

    def _push(self, folder: Path, message: str) -> None:
        try:
            push_folder(folder, self.repo_id, message, self.license, ended=self._ended)
        except Exception as error:  # whatever it was, training goes on
            logger.warning("%s. Training goes on; the next push has everything", error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def abandon(self) -> None:
        """End soon, as a process does that was told to: the push on its way is tried no second time, the one that waits not at all."""
        self._ended.set()
        self.close()

    def close(self) -> None:
        """Wait for the push on its way, and for no other."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._waiting is not None:
            shutil.rmtree(self._waiting[0], ignore_errors=True)


def _ask_about(license: str, api: HfApi) -> None:
    """Have a card with this licence checked. `ModelCard.validate` of huggingface_hub 1.x asks huggingface.co whatever the endpoint is."""
    card = {"repoType": "model", "content": f"---\nlicense: {license}\n---\n"}
    hf_raise_for_status(
        get_session().post(f"{api.endpoint}/api/validate-yaml", json=card, headers={"Accept": "text/plain"})
    )


def _published_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        return Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def _persistently(action: Callable[[], str], what: str, ended: threading.Event | None = None) -> str:
    """The action's value, from the first attempt that works; no more attempts once `ended` is set."""
    ended = ended or threading.Event()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except PublishingError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            reason, hopeless, asked = _diagnose(error)
            if hopeless or attempt == ATTEMPTS or ended.is_set():
                tries = "" if attempt == 1 else f" in {attempt} attempts"
                raise PublishingError(f"{what}{tries}: {reason}") from error
            wait = max(FIRST_WAIT * 2 ** (attempt - 1), asked)
            logger.warning("%s: %s; trying again in %.0f s", what, reason, wait)
            ended.wait(wait)
    raise AssertionError("the last attempt returns or raises")


def _diagnose(error: BaseException) -> tuple[str, bool, float]:
    """The reason in plain words, whether trying again is hopeless, and for how many seconds the Hub asks to be left alone."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        said = f"the Hub says {status}" + (f" ({cause.server_message})" if cause.server_message else "")
        if status == 401:
            return (
                f"{said}: the token is missing, expired or wrong; log in by `hf auth login` or set HF_TOKEN",
                True,
                0.0,
            )
        if status == 403:
            return (
                f"{said}: the token may not write there; it needs the role `write`, and the name before the / has to be yours, or an organisation's of yours (`hf auth whoami` shows both)",
                True,
                0.0,
            )
        if status == 404:
            return f"{said}: there is no such repository, or the token may not see it", True, 0.0
        asked = cause.response.headers.get("Retry-After", "")
        return said, status not in (408, 409, 412, 423, 429) and status < 500, float(asked) if asked.isdigit() else 0.0
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in by `hf auth login` or set HF_TOKEN", True, 0.0
    if isinstance(cause, HTTPError):
        return f"the Hub does not answer ({type(cause).__name__}: {cause})", False, 0.0
    local = isinstance(error, (FileNotFoundError, PermissionError)) or not isinstance(error, (OSError, RuntimeError))
    return f"{type(error).__name__}: {error}", local, 0.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_notes_pipeline.publishing",
        description="Push a Hub folder: the pipeline's files, its card (written anew, with what you wrote into it kept), pictures and figures.",
    )
    parser.add_argument("folder", type=Path, help="a folder that training wrote, or DDPMNotesPipeline.save_pretrained")
    parser.add_argument(
        "--hub_model_id", help='"user/name"; without "user/", your own. Default: the name of the folder.'
    )
    parser.add_argument("--hub_private_repo", action="store_true", help="make the repository private")
    parser.add_argument(
        "--license", help="the model's licence, as the Hub names licences; default: that of the card, or apache-2.0"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="copy what a push would send to this new folder, and push nothing"
    )
    parser.add_argument("--space_id", help='push a demo of the model too, as this Space: "user/name"')
    parser.add_argument(
        "--space_dir", type=Path, default=Path("examples/space"), help="the demo's folder; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        read_facts(arguments.folder)  # before anything is made on the Hub
        if arguments.space_id is not None:
            read_space(arguments.space_dir)
        if arguments.export is not None:
            names = export_folder(arguments.folder, arguments.export, arguments.hub_model_id, arguments.license)
            print(f"Copied to {arguments.export}: {', '.join(names)}")
            return
        repo_id = prepare_repo(
            arguments.hub_model_id or arguments.folder.resolve().name, arguments.hub_private_repo, arguments.license
        )
        space_id = None
        if arguments.space_id is not None:
            space_id = prepare_repo(arguments.space_id, arguments.hub_private_repo, repo_type="space")
        print(f"Pushed: {push_folder(arguments.folder, repo_id, license=arguments.license, space_id=space_id)}")
        if space_id is not None:  # it starts when it is there, and looks for the model
            print(f"Pushed: {push_space(arguments.space_dir, space_id, repo_id)}")
    except (PublishingError, ValueError) as fault:
        sys.exit(f"publishing: error: {' '.join(str(fault).split())}")


def run() -> None:
    """`main` as a program of its own."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    main()
