"""The loopback Hub under the real client: what is sent is stored, listed and sent back.

And what the client makes of each fault: which ones it retries, which ones it raises and as what.
Publishing has to handle these (`huggingface_hub` 1.32 and 2.4, with Xet, their default, and
without).
"""

import hashlib
import importlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    file_download,
    hf_api,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from tests.support.hub_content import Xet
from tests.support.launching import ROOT, kill_tree
from tests.support.loopback_hub import Hub

httpx = importlib.import_module(HTTPError.__module__)  # httpx2 with huggingface_hub 2.x
client_module = importlib.import_module(get_session.__module__)
WEIGHTS = random.Random(0).randbytes(3_000_000)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random.Random(1).randbytes(500)
CARD = b"---\nlicense: apache-2.0\ntags:\n- ddpm\n---\n\n# A model\n"
FOLDER = {
    "README.md": CARD,
    "config.json": b'{"sample_size": 8}\n',
    "empty.txt": b"",
    "samples/grid.png": PNG,
    "unet/größe 1.txt": "ähm\n".encode(),
    "unet/model.safetensors": WEIGHTS,
}


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, monkeypatch):
    """Both transfers of large files."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def connect(hub, monkeypatch, tmp_path):
    """The client in this process, by token. It reads the environment on import only."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def ask_here(request):
        """huggingface_hub 1.x checks cards at https://huggingface.co, whatever the endpoint."""
        if request.url.host == "huggingface.co":
            here = httpx.URL(hub.endpoint)
            request.url = request.url.copy_with(scheme=here.scheme, host=here.host, port=here.port)
            request.headers["Host"] = here.netloc.decode()

    def client():
        client = client_module.default_client_factory()
        client.event_hooks["request"].append(ask_here)
        return client

    set_client_factory(client)
    yield lambda token="hf_user": HfApi(endpoint=hub.endpoint, token=token)
    set_client_factory(client_module.default_client_factory)


@pytest.fixture
def api(connect):
    return connect()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client means to wait before each retry; it does not wait."""
    seconds = []
    for module in (client_module, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FOLDER)


def write(folder, files):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder):
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }
    return {path: data for path, data in files.items() if not path.startswith(".cache/")}


def added(repo, revision="main"):
    """The files, without the one that every repository starts with."""
    return {path: data for path, data in repo.files(revision).items() if path != ".gitattributes"}


def run(hub, script, **options):
    """Run a separate Python process for which `hub` is the Hub."""
    env = hub.env(**options)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=env, cwd=env["HF_HOME"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- repos


@pytest.mark.parametrize("kind", ["model", "space"])
def test_repos_are_created_once_and_found(hub, api, kind):
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    url = api.create_repo("user/name", repo_type=kind, private=True, **sdk)
    key = "user/name" if kind == "model" else "spaces/user/name"
    assert (url.repo_id, url.repo_type, str(url)) == ("user/name", kind, f"{hub.endpoint}/{key}")
    repo = hub.repos[key]
    assert repo.private and repo.sdk == sdk.get("space_sdk")
    assert [commit.title for commit in repo.commits] == ["initial commit"]
    assert list(repo.files()) == [".gitattributes"] + ["README.md"] * (kind == "space")

    assert api.create_repo("name", repo_type=kind, exist_ok=True, **sdk).repo_id == "user/name"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("user/name", repo_type=kind, **sdk)
    with pytest.raises(HfHubHTTPError, match=r'rights to create .* namespace "other"'):
        api.create_repo("other/name", repo_type=kind, **sdk)

    info = api.repo_info("user/name", repo_type=kind)
    assert (info.id, info.private, info.sha) == ("user/name", True, repo.at().oid)
    assert api.repo_exists("user/name", repo_type=kind)
    assert not api.repo_exists("user/other", repo_type=kind)


def test_who_may_do_what(hub, connect):
    owner = connect()
    assert owner.whoami()["name"] == "user"
    owner.create_repo("user/secret", private=True)
    owner.create_repo("user/open")
    owner.upload_file(repo_id="user/open", path_in_repo="a.txt", path_or_fileobj=b"a")
    owner.auth_check("user/open", write=True)
    for token in (False, "hf_other"):
        guest = connect(token)
        with pytest.raises(RepositoryNotFoundError) as error:
            guest.model_info("user/secret")
        assert error.value.response.status_code == (404 if token else 401)
        assert Path(guest.hf_hub_download("user/open", "a.txt")).read_bytes() == b"a"
        refused = "Forbidden" if token else "Invalid username"
        with pytest.raises(HfHubHTTPError, match=refused):
            guest.upload_file(repo_id="user/open", path_in_repo="b.txt", path_or_fileobj=b"b")
        with pytest.raises(HfHubHTTPError, match=refused):
            guest.auth_check("user/open", write=True)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        connect("hf_wrong").model_info("user/open")
    reader = connect("hf_reader")
    assert reader.model_info("user/secret").private
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.upload_file(repo_id="user/open", path_in_repo="b.txt", path_or_fileobj=b"b")
    assert list(added(hub.repos["user/open"])) == ["a.txt"]


# --- upload and download


def test_an_uploaded_folder_downloads_unchanged(hub, connect, transfer, folder, tmp_path):
    api = connect()
    api.create_repo("user/name", private=True)
    info = api.upload_folder(repo_id="user/name", folder_path=folder, commit_message="Step 100")
    repo = hub.repos["user/name"]
    assert added(repo) == FOLDER
    assert [(commit.title, sorted(commit.changed)) for commit in repo.commits] == [
        ("Step 100", sorted(FOLDER)),
        ("initial commit", [".gitattributes"]),
    ]
    assert (info.oid, info.repo_url.repo_id) == (repo.at().oid, "user/name")
    assert abs(repo.commits[0].time - time.time()) < 3600 and repo.commits[0].author == "user"

    # Large by name and by content. They take the requested transfer, without a token.
    large = {path for path, blob in repo.at().blobs.items() if blob.lfs}
    assert large == {"samples/grid.png", "unet/model.safetensors"}
    assert [call.size for call in sorted(hub.calls("lfs_put"), key=lambda call: call.size)] == (
        [len(PNG), len(WEIGHTS)] if transfer == "lfs" else []
    )
    assert len(hub.calls("xet_write_token")) == (transfer == "xet")
    assert not hub.calls(None)
    for call in hub.requests:
        assert call.token == (None if call.route == "lfs_put" else "hf_user"), call
    [commit] = hub.calls("commit")
    assert commit.json[0] == {"key": "header", "value": {"summary": "Step 100", "description": ""}}
    assert commit.size < 3000  # the pointers only

    snapshot = api.snapshot_download("user/name")
    assert {path: data for path, data in read(snapshot).items() if path != ".gitattributes"} == FOLDER
    assert len(hub.calls("xet_read_token")) == (transfer == "xet")
    assert api.hf_hub_download("user/name", "samples/grid.png").startswith(snapshot)
    local = api.snapshot_download("user/name", local_dir=tmp_path / "local", allow_patterns="unet/*")
    assert read(local) == {path: data for path, data in FOLDER.items() if path.startswith("unet/")}

    before = len(repo.commits)
    api.upload_folder(repo_id="user/name", folder_path=folder)
    assert len(repo.commits) == before  # nothing changed, so there is no commit


def test_xet_uploads_download_by_lfs_and_the_other_way_round(hub, connect, transfer, folder, monkeypatch):
    api = connect()
    api.create_repo("user/name")
    api.upload_folder(repo_id="user/name", folder_path=folder)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "xet")
    assert read(api.snapshot_download("user/name")) == hub.repos["user/name"].files()
    assert len(hub.calls("xet_read_token")) == (transfer == "lfs")


def test_commits_write_files_and_know_their_parent(hub, connect, transfer, tmp_path):
    api = connect()
    api.create_repo("user/name")
    (tmp_path / "w.bin").write_bytes(b"w\0w")
    first = api.create_commit(
        "user/name",
        [
            CommitOperationAdd("a/one.txt", b"one"),
            CommitOperationAdd("a/two.txt", io.BytesIO(b"two")),
            CommitOperationAdd("b.bin", str(tmp_path / "w.bin")),
        ],
        commit_message="First",
        commit_description="of two",
    )
    operations = [CommitOperationAdd("d.bin", io.BytesIO(b"\0d"))]  # a stream goes by LFS, Xet or not
    second = api.create_commit("user/name", operations, commit_message="Second", parent_commit=first.oid)
    repo = hub.repos["user/name"]
    assert added(repo, first.oid) == {"a/one.txt": b"one", "a/two.txt": b"two", "b.bin": b"w\0w"}
    assert added(repo) == added(repo, first.oid) | {"d.bin": b"\0d"}
    assert [(commit.title, commit.message) for commit in repo.commits[:2]] == [("Second", ""), ("First", "of two")]

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("user/name", [CommitOperationAdd("e", b"e")], commit_message="Late", parent_commit=first.oid)
    assert error.value.response.status_code == 412
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id="user/name", path_in_repo="e", path_or_fileobj=b"e", revision="elsewhere")
    assert len(repo.commits) == 3

    for revision, data in {first.oid: None, second.oid: b"\0d", "main": b"\0d"}.items():
        assert api.model_info("user/name", revision=revision).sha == repo.at(revision).oid
        assert read(api.snapshot_download("user/name", revision=revision)) == repo.files(revision)
        assert repo.files(revision).get("d.bin") == data
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/name", revision="0" * 40)


def test_which_files_are_large_and_which_ignored(hub, api, tmp_path):
    files = {
        "tiny.safetensors": b"text",
        "picture.png": PNG,
        "text.png": b"not one",
        "notes.txt": b"n",
        "long.txt": b"a line\n" * 1_600_000,  # 11.2 MB
        "logs/events.out.tfevents.1": b"e",
        "skipped.log": b"s",
        "tmp/skipped.txt": b"s",
        ".gitignore": b"# not these\n*.log\ntmp/\n",
    }
    api.create_repo("user/name")
    api.upload_folder(repo_id="user/name", folder_path=write(tmp_path / "folder", files))
    blobs = hub.repos["user/name"].at().blobs
    large = {"tiny.safetensors", "picture.png", "long.txt", "logs/events.out.tfevents.1"}
    assert {path for path, blob in blobs.items() if blob.lfs} == large
    assert not {"skipped.log", "tmp/skipped.txt"} & blobs.keys()


def test_listings_agree_with_git(hub, api, folder):
    api.create_repo("user/name")
    api.upload_folder(repo_id="user/name", folder_path=folder)
    tree = {entry.path: entry for entry in api.list_repo_tree("user/name", recursive=True)}
    assert set(tree) == {".gitattributes", *FOLDER}
    assert {sibling.rfilename for sibling in api.model_info("user/name").siblings} == set(tree)
    for path, data in FOLDER.items():
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        large = data in (PNG, WEIGHTS)
        content = pointer if large else data
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = tree[path]
        assert (entry.size, entry.blob_id) == (len(data), oid)
        expected = (sha256, len(pointer)) if large else None
        assert (entry.lfs and (entry.lfs.sha256, entry.lfs.pointer_size)) == expected
        headers = api.get_hf_file_metadata(url=f"{hub.endpoint}/user/name/resolve/main/{path}".replace(" ", "%20"))
        assert (headers.etag, headers.size) == (sha256 if large else oid, len(data))
        assert headers.commit_hash == hub.repos["user/name"].at().oid


def test_a_download_that_is_cut_is_an_error(hub, api, monkeypatch):
    api.create_repo("user/name")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("user/name", "letters.txt")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api.upload_file(repo_id="user/name", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    hub.fail("GET .*/resolve/", drop="half")
    with pytest.raises(httpx.ReadError):
        api.hf_hub_download("user/name", "w.bin", force_download=True)
    assert Path(api.hf_hub_download("user/name", "w.bin")).read_bytes() == WEIGHTS


def test_a_xet_store_is_only_read_where_a_commit_names_its_content(hub, api, tmp_path):
    api.create_repo("user/name")
    oid = hashlib.sha256(b"\0x").hexdigest()
    hub.fail("commit", 409)
    with pytest.raises(HfHubHTTPError):
        api.upload_file(repo_id="user/name", path_in_repo="x.bin", path_or_fileobj=b"\0x")
    [store] = hub.repos["user/name"].stores
    assert [set(Xet.files_in(shard)) for shard in (store / "xet/xorbs/shards").glob("*.mdb")] == [{oid}]
    assert added(hub.repos["user/name"]) == {} and hub.repos["user/name"].objects == {}
    lines = [
        '{"key": "header", "value": {"summary": "A file that nobody sent"}}',
        f'{{"key": "lfsFile", "value": {{"path": "y.bin", "algo": "sha256", "oid": "{"0" * 64}", "size": 2}}}}',
    ]
    answer = get_session().post(
        f"{hub.endpoint}/api/models/user/name/commit/main",
        content="\n".join(lines),
        headers={"Authorization": "Bearer hf_user", "Content-Type": "application/x-ndjson"},
    )
    assert (answer.status_code, "was not uploaded" in answer.text) == (400, True)
    assert len(hub.repos["user/name"].commits) == 1


# --- cards

INDEX = "model-index:\n- name: m\n  results:\n  - task: {type: unconditional-image-generation}\n    dataset: {%s}\n    metrics:\n    - {%s}\n"
GOOD = ("name: digits, type: digits", "type: bits_per_dim, value: 1.5")


@pytest.mark.parametrize(
    ("metadata", "kind", "error"),
    [
        ("license: mit\nbase_model: google/ddpm-cifar10-32\ndatasets: [ylecun/mnist]\n", "model", None),
        (INDEX % GOOD, "model", None),
        ("sdk: gradio\ncolorFrom: indigo\nshort_description: draws digits\n", "space", None),
        ("license: MIT\n", "model", '"license" must be one of'),
        ("license: mit\nlicense: mit\n", "model", "duplicated mapping key: license"),
        ("tags: ddpm\n", "model", '"tags" must be an array'),
        ("tags: [1, 2]\n", "model", '"tags" must be a string'),
        ("a: b: c\n", "model", "mapping values are not allowed"),
        ("- a\n- b\n", "model", "not a mapping"),
        ("base_model: ./runs/digits\n", "model", '"base_model" with value "./runs/digits" is not valid'),
        ("library_name: 3\n", "model", '"library_name" must be a string'),
        (INDEX % ("name: digits", GOOD[1]), "model", r'"model-index\[0\].results\[0\].dataset.type" is required'),
        (INDEX % (GOOD[0], "type: bits_per_dim"), "model", r'results\[0\].metrics\[0\].value" is required'),
        ("sdk: gradioo\n", "space", '"sdk" must be one of'),
        ("colorTo: mauve\n", "space", '"colorTo" must be one of'),
        (f"short_description: {'x' * 61}\n", "space", "less than or equal to 60"),
    ],
)
def test_cards_are_checked_before_and_while_they_are_committed(hub, api, tmp_path, metadata, kind, error):
    key = "user/name" if kind == "model" else f"{kind}s/user/name"
    api.create_repo("user/name", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    before = hub.repos[key].files()
    card = f"---\n{metadata}---\n\n# Title\n"
    folder = write(tmp_path / "folder", {"README.md": card.encode()})
    if error is None:
        api.upload_folder(repo_id="user/name", folder_path=folder, repo_type=kind)
        assert hub.repos[key].files() == before | {"README.md": card.encode()}
        return
    with pytest.raises(ValueError, match=rf"Invalid metadata in README.md.\n- .*{error}"):
        api.upload_folder(repo_id="user/name", folder_path=folder, repo_type=kind)
    assert len(hub.calls("validate_yaml")) == 1 and not hub.calls("preupload")
    # A client that does not validate first is refused, too.
    hub.fail("validate_yaml", 200, times=None, message="all is well")
    with pytest.raises(HfHubHTTPError, match=f"Invalid metadata in README.md: .*{error}"):
        api.upload_folder(repo_id="user/name", folder_path=folder, repo_type=kind)
    assert hub.repos[key].files() == before


def test_a_card_without_metadata_is_warned_about(hub, api):
    api.create_repo("user/name")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        api.upload_file(repo_id="user/name", path_in_repo="README.md", path_or_fileobj=b"# Title\n")
    assert added(hub.repos["user/name"]) == {"README.md": b"# Title\n"}
    card = ModelCard(CARD.decode())
    card.validate()
    card.push_to_hub("user/name", token="hf_user")
    assert added(hub.repos["user/name"])["README.md"] == CARD
    assert ModelCard.load("user/name").data.license == api.model_info("user/name").card_data.license == "apache-2.0"
    card.data.license = "none of them"
    with pytest.raises(ValueError, match='"license" must be one of'):
        card.push_to_hub("user/name", token="hf_user")


# --- faults

SMALL = {"README.md": CARD, "a.txt": b"a", "w.safetensors": WEIGHTS[:5000]}


def publish(api, way, folder):
    """Send the files of SMALL in one of the client's three ways."""
    if way == "upload_folder":
        return api.upload_folder(repo_id="user/name", folder_path=folder)
    if way == "upload_file":
        return api.upload_file(
            repo_id="user/name", path_in_repo="w.safetensors", path_or_fileobj=folder / "w.safetensors"
        )
    operations = [CommitOperationAdd(path, str(folder / path)) for path in SMALL]
    return api.create_commit("user/name", operations, commit_message="All")


WAYS = ("upload_folder", "create_commit", "upload_file")
RESET = {"ReadError", "RemoteProtocolError"}  # the second while sending, or on a reused connection


def outcome(action):
    """The name of the exception raised, or None."""
    try:
        action()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("way", WAYS)
def test_only_upload_folder_with_xet_retries_a_commit(hub, connect, transfer, tmp_path, waits, way):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    again = way == "upload_folder" and transfer == "xet"
    faults = (408, 429, 500, 502, 503, 504, "request", "body", "answer")
    for what in faults:
        hub.repos.clear()
        api.create_repo("user/name")
        fault = hub.fail("commit", what) if isinstance(what, int) else hub.fail("commit", drop=what)
        expected = {None} if again else {"HfHubHTTPError"} if isinstance(what, int) else RESET
        assert outcome(lambda: publish(api, way, folder)) in expected, what
        assert fault.hits == 1
        # If only the response is lost, the commit exists: it is made twice, or an error is raised
        # anyway.
        assert len(hub.repos["user/name"].commits) - 1 == again + (what == "answer"), what
    for status in (401, 403, 409, 412):
        hub.repos.clear()
        api.create_repo("user/name")
        hub.fail("commit", status)
        assert outcome(lambda: publish(api, way, folder)) == "HfHubHTTPError"
        assert len(hub.repos["user/name"].commits) == 1
    assert waits == [1] * len(faults) * again


@pytest.mark.parametrize("way", WAYS)
def test_every_way_retries_before_the_commit(hub, connect, transfer, tmp_path, waits, way):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    routes = ["preupload"] + (["lfs_batch", "lfs_put", "lfs_verify"] if transfer == "lfs" else [])
    for where in routes:
        for what in (500, "request", "body", "answer"):
            hub.repos.clear()
            hub.requests.clear()
            api.create_repo("user/name")
            fault = hub.fail(where, what) if isinstance(what, int) else hub.fail(where, drop=what)
            publish(api, way, folder)
            assert (fault.hits, len(hub.calls(where)), len(hub.repos["user/name"].commits)) == (1, 2, 2), (where, what)
            assert added(hub.repos["user/name"])["w.safetensors"] == WEIGHTS[:5000]
    assert waits == [1] * 4 * len(routes)


def test_xet_retries_a_token_request_that_may_succeed(hub, api, tmp_path):
    folder = write(tmp_path / "folder", SMALL)
    api.create_repo("user/name")
    hub.fail("xet_write_token", 500)
    publish(api, "upload_folder", folder)
    assert len(hub.calls("xet_write_token")) == 2 and added(hub.repos["user/name"]) == SMALL
    refused = hub.fail("xet_write_token", 403, times=None)
    (folder / "w.safetensors").write_bytes(b"\0new")
    for way in WAYS:
        with pytest.raises(ConnectionError, match="403 Forbidden"):  # the built-in: an OSError, no HfHubHTTPError
            publish(api, way, folder)
    assert len(hub.calls("xet_write_token")) == 5
    refused.clear()
    # It gives up after five more attempts, which take minutes with its default delays.
    fault = hub.fail("xet_write_token", drop="request", times=None)
    script = """
        from huggingface_hub import HfApi
        try:
            HfApi().upload_file(repo_id="user/name", path_in_repo="w.bin", path_or_fileobj=b"\\0w")
        except ConnectionError as error:
            print("it said:", error)
    """
    assert "it said: Network error" in run(hub, script, HF_XET_CLIENT_RETRY_BASE_DELAY="10ms")
    assert fault.hits == 6


def test_creating_a_repo_and_validating_a_card_are_not_retried(hub, connect, transfer, tmp_path, waits):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    hub.fail("create_repo", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_repo("user/name", exist_ok=True)
    assert hub.repos == {}
    hub.fail("create_repo", drop="answer")
    with pytest.raises(httpx.ReadError):
        api.create_repo("user/name", exist_ok=True)
    api.create_repo("user/name", exist_ok=True)  # it exists already
    for what in (500, "request"):
        for send in (
            lambda: publish(api, "upload_folder", folder),
            lambda: publish(api, "create_commit", folder),
            lambda: ModelCard(CARD.decode()).push_to_hub("user/name", token="hf_user"),
        ):
            hub.fail("validate_yaml", what) if isinstance(what, int) else hub.fail("validate_yaml", drop=what)
            assert outcome(send) in ({"HfHubHTTPError"} if what == 500 else RESET)
    assert waits == [] and added(hub.repos["user/name"]) == {} and not hub.calls("preupload")


def test_retries_end_and_follow_retry_after(hub, connect, transfer, tmp_path, waits):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    api.create_repo("user/name")
    fault = hub.fail("preupload", 503, times=None, message="in maintenance")
    with pytest.raises(HfHubHTTPError, match="in maintenance"):
        publish(api, "upload_folder", folder)
    assert (fault.hits, waits) == (6, [1, 2, 4, 8, 8])
    fault.clear()
    waits.clear()
    hub.fail("preupload", 429, retry_after=7)
    publish(api, "upload_folder", folder)
    assert waits == [8] and added(hub.repos["user/name"]) == SMALL  # plus one second
    if transfer == "lfs":
        (folder / "w.safetensors").write_bytes(b"\0new")
        hub.fail("lfs_put", 403)
        with pytest.raises(RuntimeError, match=r"Error while uploading 'w.safetensors'") as error:
            publish(api, "upload_folder", folder)
        assert isinstance(error.value.__cause__, HfHubHTTPError)


def test_a_late_response_is_requested_again_after_a_timeout(hub, api):
    api.create_repo("user/name")
    for delay, asked in ((0, 1), (1, 2)):  # it asks again, with a longer timeout
        api.upload_file(repo_id="user/name", path_in_repo=f"{delay}.txt", path_or_fileobj=b"%d" % delay)
        hub.requests.clear()
        hub.fail("HEAD .*/resolve/.*", delay=delay)
        api.hf_hub_download("user/name", f"{delay}.txt", etag_timeout=0.3)
        assert [call.method for call in hub.calls("resolve")] == ["HEAD"] * asked + ["GET"]


def test_a_restarted_server_keeps_everything(hub, connect, transfer, tmp_path, waits):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    api.create_repo("user/name", private=True)
    oid = publish(api, "create_commit", folder).oid
    port = hub.port
    hub.stop()
    (folder / "w.safetensors").write_bytes(b"\0new")
    with pytest.raises(httpx.ConnectError) as error:
        publish(api, "upload_folder", folder)
    assert not isinstance(error.value, OSError)
    hub.start()
    assert (hub.port, hub.repos["user/name"].at().oid) == (port, oid)
    publish(api, "upload_folder", folder)
    assert added(hub.repos["user/name"]) == SMALL | {"w.safetensors": b"\0new"}
    assert added(hub.repos["user/name"], oid) == SMALL


def test_a_fault_meets_only_its_requests(hub, api):
    with pytest.raises(ValueError, match=r"No route is called 'comit'; there are .*commit, "):
        hub.fail("comit", 500)
    api.create_repo("user/name")
    fault = hub.fail("info", 418, times=2)  # not "/info/lfs/" or any other path with these letters
    other = hub.fail("GET .*/user/other$", 418, times=None)
    for _ in range(2):
        assert outcome(lambda: api.model_info("user/name")) == "HfHubHTTPError"
    assert api.model_info("user/name").id == "user/name"
    assert (fault.hits, other.hits) == (2, 0)
    assert outcome(lambda: api.model_info("user/other")) == "HfHubHTTPError"
    other.clear()
    assert outcome(lambda: api.model_info("user/other")) == "RepositoryNotFoundError"
    assert outcome(lambda: api.create_pull_request("user/name", "One")) == "HfHubHTTPError"
    [unserved] = hub.calls(None)
    assert (unserved.status, unserved.path) == (501, "/api/models/user/name/discussions")


# --- other processes


def test_two_processes_commit_concurrently(hub, api, transfer):
    api.create_repo("user/name")
    script = """
        import sys
        from huggingface_hub import HfApi
        for n in range(6):
            for name, data in (("txt", b"text %d"), ("bin", b"\\0binary %d")):
                HfApi().upload_file(repo_id="user/name", path_in_repo=f"{NAME}/{n}.{name}", path_or_fileobj=data % n)
    """
    xet = {"HF_HUB_DISABLE_XET": str(int(transfer == "lfs"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script).replace("NAME", repr(name))], env=hub.env(**xet)
        )
        for name in ("one", "two")
    ]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            kill_tree(process)
    repo = hub.repos["user/name"]
    data = {"txt": b"text %d", "bin": b"\0binary %d"}
    assert added(repo) == {
        f"{name}/{n}.{end}": data[end] % n for name in ("one", "two") for n in range(6) for end in data
    }
    assert len(repo.commits) == 25 and all(len(commit.changed) == 1 for commit in repo.commits)
    assert sorted(len(commit.blobs) for commit in repo.commits) == list(range(1, 26))  # each on top of the previous one


def test_a_process_gets_a_separate_machine(hub, api):
    api.create_repo("user/name", private=True)
    api.upload_file(repo_id="user/name", path_in_repo="a.txt", path_or_fileobj=b"a")
    script = """
        import os
        from huggingface_hub import HfApi, constants, get_token
        print(get_token(), constants.ENDPOINT, constants.HF_HUB_CACHE, HfApi().repo_exists("user/name"))
    """
    token, endpoint, cache, exists = run(hub, script).split()
    assert (token, endpoint, exists) == ("hf_user", hub.endpoint, "True")
    assert run(hub, script, token=None).split()[::3] == ["None", "False"]
    assert run(hub, script).split()[2] != cache
    assert cache.startswith(str(hub.root)) and not cache.startswith(os.environ["HF_HOME"])
    hub.close()
    assert not hub.root.exists()


def test_started_by_hand_it_prints_the_variables_to_export(tmp_path):
    flags = ["--port", "0", "--user", "me", "--token", "hf_me"]
    command = [sys.executable, "-m", "tests.support.loopback_hub", *flags]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        text = ""
        while "Control-C" not in text:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            text += line
        exports = dict(re.findall(r"export (\w+)=(.*)", text))
        assert set(exports) == {"HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "NO_PROXY"}
        script = """
            from huggingface_hub import HfApi
            HfApi().create_repo("name")
            HfApi().upload_file(repo_id="me/name", path_in_repo="w.bin", path_or_fileobj=b"\\0w")
            print(open(HfApi().hf_hub_download("me/name", "w.bin"), "rb").read())
        """
        others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, env=others | exports, capture_output=True, text=True, timeout=60)
        assert done.stdout == "b'\\x00w'\n", done.stderr
        server.send_signal(signal.SIGINT)
        assert "200 POST /api/repos/create\n" in server.communicate(timeout=30)[1]
        assert server.returncode == 0 and not Path(exports["HF_HOME"]).exists()
    finally:
        kill_tree(server)


def test_two_hubs_are_separate(hub, connect):
    with Hub() as second:
        connect().create_repo("user/name")
        HfApi(endpoint=second.endpoint, token="hf_user").create_repo("user/other")
        assert (list(hub.repos), list(second.repos)) == (["user/name"], ["user/other"])


@pytest.mark.slow
def test_a_pushed_pipeline_loads_without_this_package(hub, connect, tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
        unet = UNet2DModel(8, 1, 1, norm_num_groups=8, layers_per_block=1, **blocks).eval()
        return DDPMNotesPipeline(unet, DDPMNotesScheduler(num_train_timesteps=50, variance_type="fixed_large"))

    api = connect()
    api.create_repo("user/digits", private=True)
    made(1).save_pretrained(tmp_path / "saved")
    first = api.upload_folder(repo_id="user/digits", folder_path=tmp_path / "saved", commit_message="Seed 1").oid
    made(2).push_to_hub("user/digits", private=True, token="hf_user", commit_message="Seed 2")
    repo = hub.repos["user/digits"]
    assert [commit.title for commit in repo.commits] == ["Seed 2", "Seed 1", "initial commit"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sorted(repo.commits[0].changed) == ["README.md", weights]  # the rest is unchanged
    layout = {"model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", weights}
    assert added(repo, first).keys() == layout
    assert added(repo, first)[weights] == (tmp_path / "saved" / weights).read_bytes()

    stranger = """
        import sys
        sys.modules["ddpm_notes_pipeline"] = None
        import torch, numpy as np
        from diffusers import DDPMPipeline, DiffusionPipeline
        torch.set_num_threads(1)

        def sample(pipe, name):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            images = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
            np.save(OUT + name, images)

        stock = DiffusionPipeline.from_pretrained("user/digits")
        assert type(stock) is DDPMPipeline and type(stock.scheduler).__module__.startswith("diffusers."), stock
        sample(stock, "stock-2")
        sample(DiffusionPipeline.from_pretrained("user/digits", revision=FIRST), "stock-1")
        code = {"custom_pipeline": "user/digits", "trust_remote_code": True}
        sample(DiffusionPipeline.from_pretrained("user/digits", **code), "trusted-2")
        pipe = DiffusionPipeline.from_pretrained("user/digits", revision=FIRST, custom_revision=FIRST, **code)
        assert type(pipe).__name__ == "DDPMNotesPipeline", pipe
        sample(pipe, "trusted-1")
    """
    run(hub, stranger.replace("OUT", repr(f"{tmp_path}/")).replace("FIRST", repr(first)), OMP_NUM_THREADS="1")
    assert not hub.calls(None)
    assert f"/user/digits/resolve/{first}/pipeline.py" in {
        call.path for call in hub.calls("resolve")
    }  # custom_revision
    images = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
    assert len(images) == 4 and not np.array_equal(images["trusted-1"], images["trusted-2"])
    for seed in (1, 2):
        pipe = made(seed)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        expected = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
        for way in ("stock", "trusted"):
            np.testing.assert_allclose(images[f"{way}-{seed}"], expected, rtol=0, atol=1e-4, err_msg=way)
