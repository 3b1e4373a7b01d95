"""Pushing a Hub folder: no weights get lost, and no commit is made twice.

Only the folder's own files are pushed (`HUB_FILES`): no checkpoints, optimizer states or logs, and
no evaluation of other weights, which is removed from the repository, too. A push is one commit on
top of the commit it has seen. If the Hub says that the repository has moved on, is busy or does not
answer, the push looks at what is there and tries again: files that arrived are not committed a
second time, and of two concurrent pushes the later one wins. Only the folder's card changes, so a
failed push loses nothing: `push_command` finishes it.

The demo is a Space: three files of a folder of their own (examples/space in a clone). They are not
part of the installed package: an app needs gradio, is read and changed before it is pushed, and
loads the model without this package.
"""

import logging
import shlex
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, errors
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status

from ..evaluation.records import Evaluation
from .card import MEASURED, PICTURES, current_evaluation, write_card

logger = logging.getLogger(__name__)

# The layout that loads with diffusers alone, and what a reader of the card looks at.
HUB_FILES = [
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index.json",
    "README.md",
    *PICTURES,
    "training_config.yaml",
    "training_run.json",
    "evaluation.json",
]
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
SPACE_SETTINGS = ("sdk", "sdk_version", "python_version", "app_file")  # what app.py needs: ours
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds; doubled after each attempt


class PublishingError(RuntimeError):
    """A repository could not be made, or a push did not arrive. The local folder is complete."""


def prepare_repo(
    repo_id: str, private: bool = False, license: str | None = None, api: HfApi | None = None, repo_type: str = "model"
) -> str:
    """Create the repository, or check that an existing one is writable; returns "user/name".

    Args:
        repo_id: "user/name", or a name in the token's own namespace.
        private: make it private.
        license: validated too, before anything depends on it.
        repo_type: "model", or "space" for a gradio app.

    Raises:
        PublishingError: a licence that the Hub does not know, no token, no write access, no Hub, or
            a public repository where a private one was asked for.
    """
    api = api or HfApi()

    def prepare() -> str:
        if license is not None:
            _validate_license(license, api)
        # not create_repo(exist_ok=True): a token that may write need not be allowed to create
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        try:
            found = api.repo_info(name, repo_type=repo_type)
        except errors.RepositoryNotFoundError:
            sdk = "gradio" if repo_type == "space" else None
            return api.create_repo(name, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk).repo_id
        if private and not found.private:
            raise PublishingError(
                f"{name} is public and --hub_private_repo asks for a private one; make it private first, or name another"
            )
        api.auth_check(name, write=True, repo_type=repo_type)
        return name

    return _with_retries(prepare, f"could not prepare {repo_id}")


def push_folder(
    folder: Path | str,
    repo_id: str,
    message: str = "Upload a DDPM",
    license: str | None = None,
    api: HfApi | None = None,
    ended: threading.Event | None = None,
    space_id: str | None = None,
) -> str:
    """Write the folder's card and push its own files in one commit; returns the repository's URL.

    Args:
        folder: written by `DDPMNotesPipeline.save_pretrained`, training and evaluation.
        repo_id: "user/name" of an existing repository (`prepare_repo`).
        message: of the commit.
        license, space_id: see `write_card`.
        ended: once it is set, a failed attempt is the last.

    Raises:
        PublishingError: after five attempts, or at once if another cannot help (no write access).
    """
    api = api or HfApi()

    def push() -> str:
        head = api.repo_info(repo_id).sha
        write_card(folder, repo_id, license, _published_card(api, repo_id, head), space_id)
        stale = of_other_weights(folder)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[name for name in HUB_FILES if name not in stale],
            delete_patterns=stale or None,  # what an earlier push left there
            commit_message=message,
            parent_commit=head,
        )
        return f"{api.endpoint}/{repo_id}"

    return _with_retries(push, f"could not push {folder} to {repo_id}", ended)


def of_other_weights(folder: Path | str) -> list[str]:
    """The evaluation and its pictures, if they were not measured on the folder's weights."""
    return [] if current_evaluation(folder) else [Evaluation.FILE, *MEASURED]


def push_space(space_dir: Path | str, space_id: str, model_id: str, api: HfApi | None = None) -> str:
    """Push the demo of a model in one commit; returns its URL. Space and model link to each other.

    A README.md that was pushed before keeps what its owner wrote, other models included; app.py
    opens with the first model of the list, which is this one, and has a menu of all.

    Args:
        space_dir: a folder with app.py, README.md and requirements.txt (`read_space`).
        space_id: "user/name" of an existing Space (`prepare_repo`).
        model_id: "user/name" of the model.

    Raises:
        ValueError: the folder is not a Space.
        PublishingError: as `push_folder`.
    """
    api = api or HfApi()
    files = read_space(space_dir)

    def push() -> str:
        head = api.repo_info(space_id, repo_type="space").sha
        card = _space_card(files["README.md"].decode(), _published_card(api, space_id, head, "space"), model_id)
        contents = {**files, "README.md": card.encode()}
        operations = [CommitOperationAdd(name, data) for name, data in contents.items()]
        message = f"Demo of {model_id}"
        api.create_commit(space_id, operations, commit_message=message, repo_type="space", parent_commit=head)
        return f"{api.endpoint}/spaces/{space_id}"

    return _with_retries(push, f"could not push the Space {space_id}")


def _space_card(ours: str, published: str | None, model_id: str) -> str:
    """README.md of a Space: the published one if it names models, this model first."""
    card, before = RepoCard(ours), RepoCard(published or ours, ignore_metadata_errors=True)
    settings = {name: value for name, value in card.data.to_dict().items() if name in SPACE_SETTINGS}
    if before.data.get("models"):  # the README of a new Space names none
        card = before
    models = dict.fromkeys([model_id, *(card.data.get("models") or [])])
    vars(card.data).update(settings, models=list(models))
    return str(card)


def read_space(space_dir: Path | str) -> dict[str, bytes]:
    """The three files of a Space by name; ValueError if one is missing."""
    missing = [name for name in SPACE_FILES if not (Path(space_dir) / name).is_file()]
    if missing:
        raise ValueError(
            f"--space_dir {space_dir} has no {', '.join(missing)}; it must be a folder with {', '.join(SPACE_FILES)}, such as "
            "examples/space in a clone of the project"
        )
    return {name: (Path(space_dir) / name).read_bytes() for name in SPACE_FILES}


def export_folder(
    folder: Path | str, target: Path | str, repo_id: str | None = None, license: str | None = None
) -> list[str]:
    """Write the folder's card and copy the files of a push into `target`; returns their names.

    For a repository that is kept with git, or reviewed before anything is public.

    Raises:
        ValueError: no pipeline in the folder, or a target that is not empty.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty; it must be a new folder, or an empty one")
    write_card(folder, repo_id, license)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(filter_repo_objects(names, allow_patterns=HUB_FILES, ignore_patterns=of_other_weights(folder)))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return names


def push_command(folder: Path | str, repo_id: str, private: bool = False) -> str:
    """The command that pushes a folder later."""
    words = ["python", "-m", "ddpm_notes_pipeline.publishing", str(folder), "--hub_model_id", repo_id]
    return shlex.join(words + (["--hub_private_repo"] if private else []))


class BackgroundPushes:
    """Pushes during training, one at a time in a thread; deletes each folder after its push.

    While one push runs, only the newest of the others waits. A failure is logged; the next push has
    everything.
    """

    def __init__(self, repo_id: str, license: str | None = None) -> None:
        self.repo_id, self.license = repo_id, license
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._newest: Future = Future()
        self._ended = threading.Event()

    def push(self, folder: Path, message: str) -> None:
        """Push the folder soon, then delete it."""
        self._newest.cancel()  # if it has not begun
        self._newest = self._pool.submit(self._push, folder, message)
        # after the push, or if it is cancelled
        self._newest.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))

    def _push(self, folder: Path, message: str) -> None:
        try:
            push_folder(folder, self.repo_id, message, self.license, ended=self._ended)
        except Exception as error:  # whatever it was, training continues
            logger.warning("%s. Training continues; the next push has everything", error)

    def abandon(self) -> None:
        """Close soon: the running push is not retried, the waiting one is dropped."""
        self._ended.set()
        self.close()

    def close(self) -> None:
        """Wait for the running push; the waiting one is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _validate_license(license: str, api: HfApi) -> None:
    """Let the Hub validate a card with this licence.

    Not by `ModelCard.validate`: huggingface_hub 1.x asks huggingface.co, whatever the endpoint.
    """
    card = {"repoType": "model", "content": f"---\nlicense: {license}\n---\n"}
    url = f"{api.endpoint}/api/validate-yaml"
    hf_raise_for_status(get_session().post(url, json=card, headers={"Accept": "text/plain"}))


def _published_card(api: HfApi, repo_id: str, revision: str | None, repo_type: str = "model") -> str | None:
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision, repo_type=repo_type)
    except errors.EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _with_retries(action: Callable[[], str], what: str, ended: threading.Event | None = None) -> str:
    """The action's value, from the first attempt that succeeds; `ended`: see `push_folder`."""
    ended = ended or threading.Event()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except PublishingError:
            raise
        except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            reason, least_wait = _diagnose(error)
            if least_wait is None or attempt == ATTEMPTS or ended.is_set():
                tries = "" if attempt == 1 else f" in {attempt} attempts"
                raise PublishingError(f"{what}{tries}: {reason}") from error
            wait = max(FIRST_WAIT * 2 ** (attempt - 1), least_wait)
            logger.warning("%s: %s; trying again in %.0f s", what, reason, wait)
            ended.wait(wait)
    raise AssertionError("the last attempt returns or raises")


ADVICE = {  # by status: what only the user can change
    401: "the token is missing, expired or wrong; log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not write there; it needs the role `write`, and the name before the / must be yours, or that of "
    "an organisation of yours (`hf auth whoami` shows both)",
    404: "there is no such repository, or the token may not see it",
}
TEMPORARY = (408, 409, 412, 423, 429)  # and all above 499


def _diagnose(error: BaseException) -> tuple[str, float | None]:
    """Why an attempt failed, and the seconds to wait at least; None: another cannot help."""
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token; log in with `hf auth login` or set HF_TOKEN", None
    cause: BaseException | None = error
    # HTTPError is the base of all network errors: httpx's in huggingface_hub 1.x, httpx2's in 2.x
    while cause is not None and not isinstance(cause, errors.HTTPError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
        status, seconds = cause.response.status_code, cause.response.headers.get("Retry-After", "")
        parts = [f"the Hub says {status}" + (f" ({cause.server_message})" if cause.server_message else "")]
        parts += [ADVICE[status]] if status in ADVICE else []
        retry = status in TEMPORARY or status >= 500
        return ": ".join(parts), (float(seconds) if seconds.isdigit() else 0.0) if retry else None
    if cause is not None:
        return f"the Hub does not answer ({type(cause).__name__}: {cause})", 0.0
    local = isinstance(error, (FileNotFoundError, PermissionError)) or not isinstance(error, (OSError, RuntimeError))
    return f"{type(error).__name__}: {error}", None if local else 0.0
