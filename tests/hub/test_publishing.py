"""Pushing over real HTTP to a Hub on this machine: what is sent and retried; nothing is lost.

Quick tests push from this process, whose client is told the address; the slow ones start other
processes, which learn it from their environment, as a user's would.
"""

import json
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import HfApi, RepoCard
from safetensors.torch import load_file, save_file

from ddpm_notes_pipeline import publishing
from ddpm_notes_pipeline.hub import push
from ddpm_notes_pipeline.hub.push import BackgroundPushes, PublishingError, prepare_repo, push_folder, push_space
from tests.hub.test_model_card import make_folder
from tests.support.hub_content import Blob
from tests.support.launching import ROOT

REPO = "user/digits"
PICTURES = ("samples.png", "trajectory.gif", "bits_per_dim.png", "bits_map.png", "loss.png")


@pytest.fixture(params=["xet", "lfs"])
def api(request, hub, monkeypatch):
    """The real client, by either way of uploading large files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    monkeypatch.setattr(push, "FIRST_WAIT", 0.02)
    huggingface_hub.utils.disable_progress_bars()
    yield HfApi(endpoint=hub.endpoint, token="hf_user")
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """A trained model's folder, with files that training leaves in it and a push must not send."""
    folder = make_folder(tmp_path / "run", pictures=PICTURES)
    (folder / "training_config.yaml").write_text("seed: 3\n")
    for name in ("checkpoint-100/model.safetensors", "checkpoint-100/optimizer.bin", "loss.jsonl", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    return folder


PUSHED = {
    *("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", "README.md"),
    *("unet/diffusion_pytorch_model.safetensors", "training_config.yaml", "training_run.json", "evaluation.json"),
    *PICTURES,
}


def pushed(hub, repo=REPO):
    files = dict(hub.repos[repo].files())
    del files[".gitattributes"]
    return files


def here(folder):
    return {name: (folder / name).read_bytes() for name in PUSHED}


def commits(hub, repo=REPO):
    """Titles, the oldest first, without the commit that every repository begins with."""
    return [commit.title for commit in hub.repos[repo].commits[::-1]][1:]


# ------------------------------------------------------------ what goes up


def test_a_push_is_one_commit_of_the_folder_s_own_files(hub, api, folder):
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert prepare_repo(REPO, api=api) == REPO
    assert push_folder(folder, REPO, "End of training", api=api) == f"{hub.endpoint}/{REPO}"
    assert pushed(hub) == here(folder)
    assert commits(hub) == ["End of training"]
    assert {path for path in folder.rglob("*") if path.is_file()} == before | {folder / "README.md"}
    large = hub.calls("lfs_put") if huggingface_hub.constants.HF_HUB_DISABLE_XET else hub.calls("xet_write_token")
    assert large, "the weights went another way than this test is about"


def test_pushing_again_commits_what_has_changed_and_nothing_else(hub, api, folder):
    prepare_repo(REPO, api=api)
    push_folder(folder, REPO, "one", api=api)
    push_folder(folder, REPO, "two", api=api)
    assert commits(hub) == ["one"]
    (folder / "samples.png").write_bytes(b"other samples")
    push_folder(folder, REPO, "three", api=api)
    assert commits(hub) == ["one", "three"] and pushed(hub) == here(folder)
    assert hub.repos[REPO].commits[0].changed == ("samples.png",)


def test_a_repository_keeps_no_evaluation_of_weights_that_were_replaced(hub, api, folder):
    """A second push, of other weights and without an evaluation of these."""
    push_folder(folder, prepare_repo(REPO, api=api), api=api)
    before = pushed(hub)
    measured = {"evaluation.json", "bits_per_dim.png", "bits_map.png"}
    assert measured < before.keys()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    push_folder(folder, REPO, api=api)
    after = pushed(hub)
    assert before.keys() - after.keys() == measured and not after.keys() - before.keys()
    assert (folder / "evaluation.json").exists()


def test_what_the_owner_wrote_on_the_hub_stays(hub, api, folder):
    prepare_repo(REPO, api=api)
    push_folder(folder, REPO, api=api)
    card = hub.repos[REPO].files()["README.md"].decode()
    edited = card.replace("license: apache-2.0", "license: mit").replace(
        "## Measured", "## By hand\n\nMine.\n\n## Measured", 1
    )
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="extra/file.txt", repo_id=REPO)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["results"][0]["total"] = 4.3333
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    push_folder(folder, REPO, api=api)
    files = pushed(hub)
    assert files.pop("extra/file.txt") == b"mine" and files == here(folder)
    card = files["README.md"].decode()
    assert "license: mit" in card and "Mine." in card and "value: 4.3333" in card


def test_a_repository_is_made_as_asked(hub, api):
    assert prepare_repo("own", private=True, api=api) == "user/own"
    assert hub.repos["user/own"].private
    assert prepare_repo("user/open", api=api) == "user/open"
    assert not hub.repos["user/open"].private
    assert prepare_repo("own", private=True, api=api) == prepare_repo("own", api=api) == "user/own"
    with pytest.raises(PublishingError, match=r"user/open is public and --hub_private_repo asks for a private one"):
        prepare_repo("open", private=True, api=api)


def test_a_licence_is_asked_about_before_there_is_a_repository(hub, api):
    """At the endpoint of this client, which is no other than the one that is pushed to."""
    with pytest.raises(PublishingError, match=r'the Hub says 400 \("license" must be one of \[apache-2.0, mit, '):
        prepare_repo(REPO, license="none of them", api=api)
    assert not hub.repos and len(hub.calls("validate_yaml")) == 1
    assert prepare_repo(REPO, license="mit", api=api) == REPO


@pytest.mark.parametrize(
    "token, repo, reason",
    [
        ("hf_reader", "user/new", "needs the role `write`"),
        ("hf_reader", "user/there", "needs the role `write`"),
        ("hf_user", "other/new", "needs the role `write`"),
        ("hf_user", "other/there", "needs the role `write`"),
        ("hf_wrong", "user/new", "missing, expired or wrong"),
        (None, "new", "log in with `hf auth login`"),
        (None, "user/new", "log in with `hf auth login`"),
    ],
)
def test_a_repository_that_cannot_be_written_to_is_told_at_once(hub, api, token, repo, reason):
    for user in ("user", "other"):
        HfApi(endpoint=hub.endpoint, token=f"hf_{user}").create_repo(f"{user}/there")
    asked = len(hub.requests)
    with pytest.raises(PublishingError, match=reason):
        prepare_repo(repo, api=HfApi(endpoint=hub.endpoint, token=token))
    assert len(hub.requests) - asked <= 4 and hub.repos.keys() == {"user/there", "other/there"}


# ------------------------------------------------------------ the demo

SPACE = ROOT / "examples" / "space"


@pytest.mark.slow
def test_the_demo_goes_up_as_a_space_that_names_its_model_and_the_model_names_it(hub, api, folder, monkeypatch, capsys):
    """The command; twice, then for another model after the owner has edited the page.

    The first time as a process, then here.
    """
    monkeypatch.setattr(push, "HfApi", lambda: api)
    demo = ["--space_id", "digits-demo", "--space_dir", str(SPACE)]
    models = ("user/digits", "user/digits", "user/other")
    for number, model in enumerate(models):
        words = [str(folder), "--hub_model_id", model, *demo]
        if number == 0:
            command = [sys.executable, "-m", "ddpm_notes_pipeline.publishing", *words]
            done = subprocess.run(command, cwd=ROOT, env=hub.env(), capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        else:
            publishing.main(words)
            said = capsys.readouterr().out
        assert f"Pushed: {hub.endpoint}/spaces/user/digits-demo" in said
        space = hub.repos["spaces/user/digits-demo"]
        assert space.sdk == "gradio" and not space.private
        files = pushed(hub, "spaces/user/digits-demo")
        assert files.keys() == {"app.py", "README.md", "requirements.txt"}
        assert all(files[name] == (SPACE / name).read_bytes() for name in ("app.py", "requirements.txt"))
        data = RepoCard(files["README.md"].decode()).data
        ours = RepoCard.load(SPACE / "README.md").data.to_dict()
        if number < 2:
            assert commits(hub, "spaces/user/digits-demo") == ["Demo of user/digits"]  # the same is not sent twice
            assert data.to_dict() == {**ours, "models": ["user/digits"]}
        assert hub.repos[model].files()["README.md"].count(b"(https://huggingface.co/spaces/user/digits-demo)") == 1
        if number == 1:
            changed = files["README.md"].decode().replace("title: A DDPM, measured", "title: Mine") + "\nMy words.\n"
            changed = changed.replace("sdk_version: ", "sdk_version: 5.0.0 #")
            space.commit("mine", "", "user", {"README.md": Blob(changed.encode())})
    assert data.to_dict() == {**ours, "models": ["user/other", "user/digits"], "title": "Mine"}
    assert files["README.md"].decode().endswith("\nMy words.\n")
    # a push without the demo forgets no link
    publishing.main([str(folder), "--hub_model_id", "user/digits"])
    assert b"spaces/user/digits-demo)" in hub.repos["user/digits"].files()["README.md"]


def test_a_folder_that_is_no_space_is_told_before_anything_is_pushed(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"--space_dir .* has no app.py, README.md, requirements.txt; it must be"):
        publishing.main([str(folder), "--space_id", "user/demo", "--space_dir", str(tmp_path)])


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 412}, {"drop": "answer"}], ids=str)
def test_after_a_passing_fault_the_demo_is_there_once(hub, api, fault):
    name = prepare_repo("user/demo", private=True, api=api, repo_type="space")
    hub.fail("commit", times=2, **fault)
    assert push_space(SPACE, name, REPO, api=api) == f"{hub.endpoint}/spaces/user/demo"
    assert commits(hub, "spaces/user/demo") == ["Demo of user/digits"] and hub.repos["spaces/user/demo"].private


# ------------------------------------------------------------ faults

BUSY = [{"status": status} for status in (500, 502, 503, 429, 409, 412)]
CUT = [{"drop": drop} for drop in ("request", "answer")]
FAULTS = [
    *(("commit", fault) for fault in [*BUSY, *CUT, {"drop": "body"}, {"delay": 3}]),
    *(("info", fault) for fault in [{"status": 500}, {"status": 429, "retry_after": 1}, {"drop": "request"}]),
    *(("preupload", fault) for fault in [{"status": 500}, {"drop": "answer"}]),
    *(("validate_yaml", fault) for fault in [{"status": 500}]),
]
LARGE = [
    ("lfs", "lfs_batch", {"status": 500}),
    ("lfs", "lfs_put", {"status": 503}),
    ("lfs", "lfs_put", {"drop": "body"}),
    ("lfs", "lfs_put", {"drop": "request"}),
    ("xet", "xet_write_token", {"status": 500}),
    ("xet", "xet_write_token", {"drop": "request"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("route, fault", FAULTS, ids=str)
def test_after_a_passing_fault_the_push_is_there_once(hub, api, folder, route, fault):
    prepare_repo(REPO, api=api)
    injected = hub.fail(route, times=2, **fault)
    push_folder(folder, REPO, "End of training", api=api)
    assert injected.hits == 2 or "delay" in fault or fault == {"drop": "answer"}  # what arrived is not sent again
    assert pushed(hub) == here(folder) and commits(hub) == ["End of training"]


@pytest.mark.slow
@pytest.mark.parametrize("api, route, fault", LARGE, indirect=["api"], ids=str)
def test_after_a_passing_fault_with_large_files_the_push_is_there_once(hub, api, folder, route, fault):
    prepare_repo(REPO, api=api)
    injected = hub.fail(route, times=2, **fault)
    push_folder(folder, REPO, "End of training", api=api)
    assert injected.hits == 2
    assert pushed(hub) == here(folder) and commits(hub) == ["End of training"]


@pytest.mark.parametrize("route, status", [("commit", 401), ("commit", 403), ("preupload", 403), ("info", 401)])
def test_a_refusal_is_told_at_once_and_the_next_push_has_it_all(hub, api, folder, route, status):
    prepare_repo(REPO, api=api)
    before = here_or_none(folder)
    fault = hub.fail(route, status, times=None)
    with pytest.raises(PublishingError, match=f"the Hub says {status}") as caught:
        push_folder(folder, REPO, api=api)
    assert fault.hits == 1 and "attempts" not in str(caught.value)
    assert commits(hub) == [] and {**before, "README.md": None} == {**here_or_none(folder), "README.md": None}
    fault.clear()
    push_folder(folder, REPO, "again", api=api)
    assert pushed(hub) == here(folder) and commits(hub) == ["again"]


def here_or_none(folder):
    return {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in PUSHED}


@pytest.mark.parametrize("route, status", [("commit", 409), ("commit", 412), ("info", 503)])
def test_a_lasting_fault_is_told_after_five_attempts(hub, api, folder, route, status):
    prepare_repo(REPO, api=api)
    fault = hub.fail(route, status, times=None)
    with pytest.raises(PublishingError, match=rf"could not push .* in 5 attempts: the Hub says {status}"):
        push_folder(folder, REPO, api=api)
    assert fault.hits >= 5
    fault.clear()
    push_folder(folder, REPO, "again", api=api)
    assert pushed(hub) == here(folder) and commits(hub) == ["again"]


def test_a_hub_that_is_gone_and_comes_back(hub, api, folder):
    prepare_repo(REPO, api=api)
    hub.stop()
    with pytest.raises(PublishingError, match="the Hub does not answer"):
        push_folder(folder, REPO, api=api)
    hub.start()
    push_folder(folder, REPO, "again", api=api)
    assert pushed(hub) == here(folder) and commits(hub) == ["again"]


def test_a_hub_that_asks_for_time_gets_it(hub, api, folder):
    prepare_repo(REPO, api=api)
    hub.fail("commit", 429, retry_after=2)
    begun = time.monotonic()
    push_folder(folder, REPO, api=api)
    assert time.monotonic() - begun >= 2 and len(commits(hub)) == 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"drop": "request"}, {"drop": "answer"}, {"status": 503}])
def test_a_repository_is_made_once_whatever_happens(hub, api, fault):
    hub.fail("create_repo", times=2, **fault)
    assert prepare_repo(REPO, private=True, api=api) == REPO
    assert hub.repos[REPO].private and list(hub.repos) == [REPO]


def test_a_commit_in_between_makes_no_mixture_of_two_models(hub, api, folder):
    """The client omits files that are there; another commit may change just those meanwhile."""
    prepare_repo(REPO, api=api)
    push_folder(folder, REPO, "first", api=api)
    (folder / "samples.png").write_bytes(b"other samples")
    late = hub.fail("commit", delay=1)
    ours = threading.Thread(target=push_folder, args=(folder, REPO, "ours"), kwargs={"api": api})
    ours.start()
    while not late.hits:
        time.sleep(0.01)
    with hub.lock:
        hub.repos[REPO].commit("theirs", "", "other", {"unet/config.json": Blob(b"{}")})
    ours.join()
    assert commits(hub) == ["first", "theirs", "ours"] and pushed(hub) == here(folder)


def test_two_pushes_at_once_end_with_one_of_the_two_models(hub, api, tmp_path):
    folders = []
    for n in range(2):
        folder = make_folder(tmp_path / str(n), evaluation=None, pictures=())
        unet = UNet2DModel.from_pretrained(folder / "unet")
        torch.nn.init.constant_(unet.conv_in.weight, n)
        unet.save_pretrained(folder / "unet")
        (folder / "training_config.yaml").write_text(f"seed: {n}\n")
        (folder / "samples.png").write_bytes(bytes([n]) * 100)
        folders.append(folder)
    prepare_repo(REPO, api=api)
    hub.fail("commit", delay=0.3, times=2)  # both have seen the same head by then
    threads = [
        threading.Thread(target=push_folder, args=(folder, REPO, folder.name), kwargs={"api": api})
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(commits(hub)) == ["0", "1"]
    last = folders[int(commits(hub)[-1])]
    files = pushed(hub)
    assert files == {name: (last / name).read_bytes() for name in files}


# ------------------------------------------------------------ in the background


@pytest.fixture
def background(hub, api, monkeypatch):
    """Pushes of BackgroundPushes by the client of this test."""
    prepare_repo(REPO, api=api)
    monkeypatch.setattr(push, "HfApi", lambda: api)
    pushes = BackgroundPushes(REPO)
    yield pushes
    pushes.close()


def snapshots(tmp_path, count):
    made = []
    for n in range(count):
        folder = make_folder(tmp_path / f"snapshot-{n}", evaluation=None, pictures=())
        (folder / "training_config.yaml").write_text(f"seed: {n}\n")
        made.append(folder)
    return made


def test_background_pushes_hold_nobody_up_and_only_the_newest_waits(hub, background, tmp_path):
    folders = snapshots(tmp_path, 4)
    slow = hub.fail("commit", delay=3)
    background.push(folders[0], "0")
    while not slow.hits:
        time.sleep(0.01)
    for n in (1, 2, 3):
        background.push(folders[n], str(n))
    assert commits(hub) == [], "a push held training up"
    while len(commits(hub)) < 2:
        time.sleep(0.02)
    background.close()
    assert commits(hub) == ["0", "3"] and pushed(hub)["training_config.yaml"] == b"seed: 3\n"
    assert not any(folder.exists() for folder in folders)


def test_a_background_push_that_fails_is_told_and_the_next_has_everything(hub, background, tmp_path, caplog):
    folders = snapshots(tmp_path, 2)
    fault = hub.fail("commit", 403, times=None)
    background.push(folders[0], "0")
    while folders[0].exists():
        time.sleep(0.01)
    assert "Training continues" in caplog.text and commits(hub) == []
    fault.clear()
    background.push(folders[1], "1")
    while folders[1].exists():
        time.sleep(0.01)
    assert commits(hub) == ["1"]


def test_closing_waits_for_the_push_on_its_way_and_drops_the_one_that_waits(hub, background, tmp_path):
    folders = snapshots(tmp_path, 2)
    slow = hub.fail("commit", delay=1)
    background.push(folders[0], "0")
    while not slow.hits:
        time.sleep(0.01)
    background.push(folders[1], "1")
    background.close()
    assert commits(hub) == ["0"] and not any(folder.exists() for folder in folders)


def test_a_process_that_has_to_end_waits_for_no_further_attempt(hub, background, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(push, "FIRST_WAIT", 60)
    hub.fail("info", 500, times=None)
    (folder,) = snapshots(tmp_path, 1)
    background.push(folder, "0")
    while "trying again in 60 s" not in caplog.text:
        time.sleep(0.01)
    begun = time.monotonic()
    background.abandon()
    assert time.monotonic() - begun < 60 and not folder.exists() and commits(hub) == []


def test_an_export_is_what_a_push_sends(hub, api, folder, tmp_path):
    """The same names and bytes; the card names the repository that it is for."""
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.bin").write_bytes(b"not for others")
    names = push.export_folder(folder, tmp_path / "copy", "user/model")
    push_folder(folder, prepare_repo("user/model", api=api), api=api)
    pushed = {name: data for name, data in hub.repos["user/model"].files().items() if name != ".gitattributes"}
    copied = {
        path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    assert sorted(copied) == names and copied == pushed
    with pytest.raises(ValueError, match="copy is not empty"):
        push.export_folder(folder, tmp_path / "copy")
