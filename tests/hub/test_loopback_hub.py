"""The Hub of loopback_hub.py, asked by the real client: what was sent is what is kept, listed and given back.

And what the client makes of each fault: which ones it hides by trying again, which ones it raises and as what. This is
what publishing has to live with (`huggingface_hub` 1.32 and 2.4, with Xet, their default, and without).
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
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    file_download,
    hf_api,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session

from ddpm_notes_pipeline import DDPMNotesPipeline, DDPMNotesScheduler
from tests.support.hub_content import Xet
from tests.support.launching import ROOT, kill_tree
from tests.support.loopback_hub import Hub

httpx = importlib.import_module(HTTPError.__module__)  # or httpx2, where huggingface_hub is 2.x
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
    """Both ways of the client to send and get large files."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def connect(hub, monkeypatch, tmp_path):
    """The client in this process, with a token; it reads these settings from the environment when it is imported."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def ask_here(request):
        """A `RepoCard` of huggingface_hub 1.x is checked by https://huggingface.co, whatever the endpoint is."""
        if request.url.host == "huggingface.co":
            here = httpx.URL(hub.endpoint)
            request.url = request.url.copy_with(scheme=here.scheme, host=here.host, port=here.port)
            request.headers["Host"] = here.netloc.decode()

    def client():
        client = _http.default_client_factory()
        client.event_hooks["request"].append(ask_here)
        return client

    set_client_factory(client)
    yield lambda token="hf_user": HfApi(endpoint=hub.endpoint, token=token)
    set_client_factory(_http.default_client_factory)


@pytest.fixture
def api(connect):
    return connect()


@pytest.fixture
def waits(monkeypatch):
    """How long the client meant to wait before each new attempt, in seconds; it does not."""
    seconds = []
    for module in (_http, file_download):
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
    """The files but for the one that every repo starts with."""
    return {path: data for path, data in repo.files(revision).items() if path != ".gitattributes"}


def run(hub, script, **options):
    """A Python process of its own that takes `hub` for the Hub."""
    env = hub.env(**options)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=env, cwd=env["HF_HOME"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------ repos


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_repos_are_made_listed_and_deleted(hub, api, kind):
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    url = api.create_repo("user/name", repo_type=kind, private=True, **sdk)
    key = "user/name" if kind == "model" else f"{kind}s/user/name"
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
    api.update_repo_settings("user/name", repo_type=kind, private=False)
    assert not repo.private
    assert api.repo_exists("user/name", repo_type=kind)
    api.delete_repo("user/name", repo_type=kind)
    assert not api.repo_exists("user/name", repo_type=kind) and hub.repos == {}


def test_who_may_do_what(hub, connect):
    mine = connect()
    assert mine.whoami()["name"] == "user"
    mine.create_repo("user/secret", private=True)
    mine.create_repo("user/open")
    mine.upload_file(repo_id="user/open", path_in_repo="a.txt", path_or_fileobj=b"a")
    mine.update_repo_settings("user/open", gated="auto")
    for token in (False, "hf_other"):
        guest = connect(token)
        with pytest.raises(RepositoryNotFoundError) as error:
            guest.model_info("user/secret")
        assert error.value.response.status_code == (404 if token else 401)
        assert guest.model_info("user/open").gated == "auto"
        with pytest.raises(GatedRepoError):
            guest.hf_hub_download("user/open", "a.txt")
        with pytest.raises(HfHubHTTPError, match="Forbidden" if token else "Invalid username"):
            guest.upload_file(repo_id="user/open", path_in_repo="b.txt", path_or_fileobj=b"b")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        connect("hf_wrong").model_info("user/open")
    reader = connect("hf_reader")
    assert reader.model_info("user/secret").private
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.upload_file(repo_id="user/open", path_in_repo="b.txt", path_or_fileobj=b"b")
    assert list(added(hub.repos["user/open"])) == ["a.txt"]


# ------------------------------------------------------------------------------------------------ upload and download


def test_a_folder_goes_up_and_comes_back(hub, connect, transfer, folder, tmp_path):
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

    # Large: by its name and by its bytes. They went the way that was asked for, and no token with them.
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
    assert len(repo.commits) == before  # nothing has changed, so nothing is committed


def test_what_goes_up_one_way_comes_back_the_other(hub, connect, transfer, folder, monkeypatch):
    api = connect()
    api.create_repo("user/name")
    api.upload_folder(repo_id="user/name", folder_path=folder)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "xet")
    assert read(api.snapshot_download("user/name")) == hub.repos["user/name"].files()
    assert len(hub.calls("xet_read_token")) == (transfer == "lfs")


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_datasets_and_spaces_go_up_and_come_back(hub, connect, transfer, folder, kind):
    api = connect()
    api.create_repo("user/name", repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    (folder / "README.md").write_bytes(b"---\nsdk: gradio\napp_file: app.py\nlicense: mit\n---\n")
    api.upload_folder(repo_id="user/name", folder_path=folder, repo_type=kind)
    assert read(api.snapshot_download("user/name", repo_type=kind)) == hub.repos[f"{kind}s/user/name"].files()
    assert api.repo_info("user/name", repo_type=kind).card_data["license"] == "mit"
    if kind == "space":
        assert api.space_info("user/name").sdk == "gradio"


def test_commits_write_delete_copy_and_know_their_parent(hub, connect, transfer, tmp_path):
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
    operations = [
        CommitOperationDelete("a/"),
        CommitOperationCopy("b.bin", "c.bin"),
        CommitOperationAdd("d.bin", io.BytesIO(b"\0d")),  # a stream goes by LFS, Xet or not
    ]
    api.create_commit("user/name", operations, commit_message="Second", parent_commit=first.oid)
    repo = hub.repos["user/name"]
    assert added(repo) == {"b.bin": b"w\0w", "c.bin": b"w\0w", "d.bin": b"\0d"}
    assert added(repo, first.oid) == {"a/one.txt": b"one", "a/two.txt": b"two", "b.bin": b"w\0w"}
    assert [commit.commit_id for commit in api.list_repo_commits("user/name")] == [c.oid for c in repo.commits]
    assert [commit.message for commit in api.list_repo_commits("user/name")] == ["", "of two", ""]

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("user/name", [CommitOperationAdd("e", b"e")], commit_message="Late", parent_commit=first.oid)
    assert error.value.response.status_code == 412
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a/one.txt", "user/name")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id="user/name", path_in_repo="e", path_or_fileobj=b"e", revision="elsewhere")
    assert len(repo.commits) == 3


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
    for kind in ("model", "dataset"):
        api.create_repo("user/name", repo_type=kind)
        api.upload_folder(repo_id="user/name", folder_path=write(tmp_path / kind, files), repo_type=kind)
    large = {"tiny.safetensors", "picture.png", "long.txt", "logs/events.out.tfevents.1"}
    for key, expected in (("user/name", large), ("datasets/user/name", large | {"text.png"})):
        blobs = hub.repos[key].at().blobs
        assert {path for path, blob in blobs.items() if blob.lfs} == expected
        assert not {"skipped.log", "tmp/skipped.txt"} & blobs.keys()


def test_revisions_are_branches_tags_and_commits(hub, connect, transfer, tmp_path):
    api = connect()
    api.create_repo("user/name")
    oids = {}
    for step in ("1", "2", "3"):
        oids[step] = api.upload_file(
            repo_id="user/name", path_in_repo="w.bin", path_or_fileobj=b"\0" + step.encode()
        ).oid
        if step == "1":
            api.create_tag("user/name", tag="v1")
        if step == "2":
            api.create_branch("user/name", branch="experiment/a")
    api.upload_file(repo_id="user/name", path_in_repo="w.bin", path_or_fileobj=b"\0a", revision="experiment/a")
    expected = {oids["1"]: b"\x001", "v1": b"\x001", oids["2"]: b"\x002", "main": b"\x003", "experiment/a": b"\0a"}
    for revision, data in expected.items():
        assert Path(api.hf_hub_download("user/name", "w.bin", revision=revision)).read_bytes() == data
        assert read(api.snapshot_download("user/name", revision=revision))["w.bin"] == data
        assert hub.repos["user/name"].files(revision)["w.bin"] == data
        assert api.model_info("user/name", revision=revision).sha == hub.repos["user/name"].at(revision).oid
    refs = api.list_repo_refs("user/name")
    assert [(ref.name, ref.ref) for ref in refs.branches + refs.tags] == [
        ("main", "refs/heads/main"),
        ("experiment/a", "refs/heads/experiment/a"),
        ("v1", "refs/tags/v1"),
    ]
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag("user/name", tag="v1")
    api.create_branch("user/name", branch="experiment/a", exist_ok=True)
    api.delete_tag("user/name", tag="v1")
    api.delete_branch("user/name", branch="experiment/a")
    for revision in ("v1", "experiment/a", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("user/name", revision=revision)


def test_listings_agree_with_git(hub, api, folder):
    api.create_repo("user/name")
    api.upload_folder(repo_id="user/name", folder_path=folder)
    tree = {entry.path: entry for entry in api.list_repo_tree("user/name", recursive=True)}
    assert set(tree) == {".gitattributes", "samples", "unet", *FOLDER}
    assert [entry.path for entry in api.list_repo_tree("user/name", "unet")] == [p for p in FOLDER if p[:4] == "unet"]
    assert {entry.path for entry in api.list_repo_tree("user/name")} == {path.split("/")[0] for path in tree}
    info = {sibling.rfilename: sibling for sibling in api.model_info("user/name", files_metadata=True).siblings}
    found = {entry.path: entry for entry in api.get_paths_info("user/name", ["unet", "missing", *FOLDER])}
    assert set(found) == {"unet", *FOLDER}
    assert api.file_exists("user/name", "config.json") and not api.file_exists("user/name", "config")
    for path, data in FOLDER.items():
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        large = data in (PNG, WEIGHTS)
        content = pointer if large else data
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        for entry in (tree[path], info[path], found[path]):
            assert (entry.size, entry.blob_id) == (len(data), oid)
            assert (entry.lfs and (entry.lfs.sha256, entry.lfs.pointer_size)) == (
                (sha256, len(pointer)) if large else None
            )
        headers = api.get_hf_file_metadata(url=f"{hub.endpoint}/user/name/resolve/main/{path}".replace(" ", "%20"))
        assert (headers.etag, headers.size) == (sha256 if large else oid, len(data))
        assert headers.commit_hash == hub.repos["user/name"].at().oid


def test_parts_of_files(hub, api, monkeypatch, waits):
    api.create_repo("user/name")
    api.upload_file(repo_id="user/name", path_in_repo="digits.txt", path_or_fileobj=b"0123456789")
    url = f"{hub.endpoint}/user/name/resolve/main/digits.txt"
    for span, part in {"0-3": b"0123", "4-": b"456789", "-2": b"89", "8-99": b"89", "9-9": b"9"}.items():
        answer = get_session().get(url, headers={"Range": f"bytes={span}"})
        start = 10 - len(part) if span in ("4-", "-2", "8-99") else int(span[0])
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/10"
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("user/name", "letters.txt")

    # A download whose connection ends in good order halfway goes on from there; one that is reset does not.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api.upload_file(repo_id="user/name", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)  # it keeps whole chunks
    hub.fail("GET .*/resolve/", drop="half", reset=False)
    assert Path(api.hf_hub_download("user/name", "w.bin")).read_bytes() == WEIGHTS
    assert [call.headers.get("range") for call in hub.calls("resolve") if call.method == "GET"][-2:] == [
        None,
        "bytes=1000000-",
    ]
    hub.fail("GET .*/resolve/", drop="half")
    with pytest.raises(httpx.ReadError):
        api.hf_hub_download("user/name", "w.bin", force_download=True)


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


# ------------------------------------------------------------------------------------------------ cards

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
    # A client that does not ask first is refused as well.
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


# ------------------------------------------------------------------------------------------------ faults

SMALL = {"README.md": CARD, "a.txt": b"a", "w.safetensors": WEIGHTS[:5000]}


def publish(api, way, folder):
    """The client's three ways to send the files of SMALL."""
    if way == "upload_folder":
        return api.upload_folder(repo_id="user/name", folder_path=folder)
    if way == "upload_file":
        return api.upload_file(
            repo_id="user/name", path_in_repo="w.safetensors", path_or_fileobj=folder / "w.safetensors"
        )
    operations = [CommitOperationAdd(path, str(folder / path)) for path in SMALL]
    return api.create_commit("user/name", operations, commit_message="All")


WAYS = ("upload_folder", "create_commit", "upload_file")
RESET = {"ReadError", "RemoteProtocolError"}  # the second where it was still sending, or had an old connection


def outcome(action):
    """The name of what it raised, or None."""
    try:
        action()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("way", WAYS)
def test_only_a_folder_by_xet_tries_a_commit_again(hub, connect, transfer, tmp_path, waits, way):
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
        # Where only the answer got lost the commit was made: it is made twice, or an error is raised though it is there.
        assert len(hub.repos["user/name"].commits) - 1 == again + (what == "answer"), what
    for status in (401, 403, 409, 412):
        hub.repos.clear()
        api.create_repo("user/name")
        hub.fail("commit", status)
        assert outcome(lambda: publish(api, way, folder)) == "HfHubHTTPError"
        assert len(hub.repos["user/name"].commits) == 1
    assert waits == [1] * len(faults) * again


@pytest.mark.parametrize("way", WAYS)
def test_every_way_tries_again_before_the_commit(hub, connect, transfer, tmp_path, waits, way):
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


def test_xet_tries_again_to_get_a_token_where_trying_may_help(hub, api, tmp_path):
    folder = write(tmp_path / "folder", SMALL)
    api.create_repo("user/name")
    hub.fail("xet_write_token", 500)
    publish(api, "upload_folder", folder)
    assert len(hub.calls("xet_write_token")) == 2 and added(hub.repos["user/name"]) == SMALL
    refused = hub.fail("xet_write_token", 403, times=None)
    (folder / "w.safetensors").write_bytes(b"\0new")
    for way in WAYS:
        with pytest.raises(ConnectionError, match="403 Forbidden"):  # Python's own: an OSError, but no HfHubHTTPError
            publish(api, way, folder)
    assert len(hub.calls("xet_write_token")) == 5
    refused.clear()
    # For good it gives up after five more attempts: by its own waits that takes minutes.
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


def test_a_repo_and_a_card_are_asked_for_once(hub, connect, transfer, tmp_path, waits):
    api, folder = connect(), write(tmp_path / "folder", SMALL)
    hub.fail("create_repo", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_repo("user/name", exist_ok=True)
    assert hub.repos == {}
    hub.fail("create_repo", drop="answer")
    with pytest.raises(httpx.ReadError):
        api.create_repo("user/name", exist_ok=True)
    api.create_repo("user/name", exist_ok=True)  # it was there already
    for what in (500, "request"):
        for send in (
            lambda: publish(api, "upload_folder", folder),
            lambda: publish(api, "create_commit", folder),
            lambda: ModelCard(CARD.decode()).push_to_hub("user/name", token="hf_user"),
        ):
            hub.fail("validate_yaml", what) if isinstance(what, int) else hub.fail("validate_yaml", drop=what)
            assert outcome(send) in ({"HfHubHTTPError"} if what == 500 else RESET)
    assert waits == [] and added(hub.repos["user/name"]) == {} and not hub.calls("preupload")


def test_trying_again_has_an_end_and_the_server_may_say_when(hub, connect, transfer, tmp_path, waits):
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
    assert waits == [8] and added(hub.repos["user/name"]) == SMALL  # and a second on top
    if transfer == "lfs":
        (folder / "w.safetensors").write_bytes(b"\0new")
        hub.fail("lfs_put", 403)
        with pytest.raises(RuntimeError, match=r"Error while uploading 'w.safetensors'") as error:
            publish(api, "upload_folder", folder)
        assert isinstance(error.value.__cause__, HfHubHTTPError)


def test_a_delayed_answer_comes_too_late_for_a_client_in_a_hurry(hub, api):
    api.create_repo("user/name")
    for delay, asked in ((0, 1), (1, 2)):  # it asks a second time, with more patience
        api.upload_file(repo_id="user/name", path_in_repo=f"{delay}.txt", path_or_fileobj=b"%d" % delay)
        hub.requests.clear()
        hub.fail("HEAD .*/resolve/.*", delay=delay)
        api.hf_hub_download("user/name", f"{delay}.txt", etag_timeout=0.3)
        assert [call.method for call in hub.calls("resolve")] == ["HEAD"] * asked + ["GET"]


def test_a_server_that_goes_and_comes_back_has_kept_everything(hub, connect, transfer, tmp_path, waits):
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


def test_faults_are_for_what_they_say(hub, api):
    with pytest.raises(ValueError, match=r"No route is called 'comit'; there are .*commit, "):
        hub.fail("comit", 500)
    api.create_repo("user/name")
    fault = hub.fail("info", 418, times=2)  # not "/info/lfs/", nor any other path with these letters
    api.list_repo_refs("user/name")
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


# ------------------------------------------------------------------------------------------------ processes of their own


def test_two_processes_commit_at_once(hub, api, transfer):
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
    assert sorted(len(commit.blobs) for commit in repo.commits) == list(range(1, 26))  # each on top of the one before


def test_a_process_gets_a_machine_of_its_own(hub, api):
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


def test_started_by_hand_it_prints_what_to_export(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tests" / "loopback_hub.py"),
        "--port",
        "0",
        "--user",
        "me",
        "--token",
        "hf_me",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


def test_two_hubs_do_not_meet(hub, connect):
    with Hub() as second:
        connect().create_repo("user/name")
        HfApi(endpoint=second.endpoint, token="hf_user").create_repo("user/other")
        assert (list(hub.repos), list(second.repos)) == (["user/name"], ["user/other"])


@pytest.mark.slow
def test_a_pipeline_goes_up_and_a_stranger_loads_it(hub, connect, tmp_path):
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
    assert sorted(repo.commits[0].changed) == ["README.md", weights]  # the rest is the same
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
