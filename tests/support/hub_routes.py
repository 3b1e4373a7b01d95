"""What the Hub of loopback_hub.py answers: a method for each call, which names who in the client makes it."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote

import yaml

from tests.support.hub_content import LARGE_SIZE, Blob, Refused, Repo, User, Xet, card_data, check_card

if TYPE_CHECKING:
    from tests.support.loopback_hub import Hub


@dataclass
class Request:
    """One request as it came; `status` is None until it was answered, and for good when it never was."""

    method: str
    path: str  # as sent, without the query
    query: dict[str, list[str]]
    route: str | None  # the name of the method of `Routes` that serves it
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    status: int | None = None

    @property
    def size(self) -> int:
        return len(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def json(self) -> Any:
        """The body; a list of the lines where each line is JSON of its own."""
        if "ndjson" in self.headers.get("content-type", ""):
            return [json.loads(line) for line in self.body.splitlines()]
        return json.loads(self.body)


@dataclass
class Answer:
    body: Any = b""  # bytes as they are; anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


API = r"/api/(?P<type>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
FILES = r"(?:/(?P<type>dataset|space)s)?/(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<rev>[^/]+)"
ROUTES: list[tuple[re.Pattern, str, Literal["read", "write"] | None]] = []


def route(method: str, path: str, needs: Literal["read", "write"] | None = None) -> Callable[[Callable], Callable]:
    """Serve a method and path by a method of `Routes`, whose parameters are the groups in the path.

    `needs`: `type` and `repo` in the path become the `Repo`, after its permissions were looked at.
    """

    def register(function: Callable) -> Callable:
        ROUTES.append((re.compile(f"(?:{method}) {path}"), function.__name__, needs))
        return function

    return register


@dataclass
class Routes:
    """The answer to one request."""

    hub: "Hub"
    call: Request

    @staticmethod
    def find(line: str) -> tuple[str | None, str | None, dict[str, Any]]:
        """For "METHOD /path": the route's name, what it needs and the groups in the path; no name if there is none."""
        for pattern, name, needs in ROUTES:
            if match := pattern.fullmatch(line):
                return name, needs, {key: value and unquote(value) for key, value in match.groupdict().items()}
        return None, None, {}

    @staticmethod
    def names() -> set[str]:
        return {name for _, name, _ in ROUTES}

    def answer(self) -> Answer:
        name, needs, groups = self.find(f"{self.call.method} {self.call.path}")
        if name is None:
            raise Refused(501, f"The loopback Hub does not serve {self.call.method} {self.call.path}")
        with self.hub.lock:
            if needs:
                groups["repo"] = self.repo(groups.pop("type"), groups["repo"], needs)
            return getattr(self, name)(**groups)

    # -------------------------------------------------------------------------------------------- who asks for what

    @property
    def endpoint(self) -> str:
        """As the client calls it: it may be behind another name."""
        return f"http://{self.call.headers.get('host', f'127.0.0.1:{self.hub.port}')}"

    def user(self) -> User | None:
        token = self.call.token
        if token is not None and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token] if token is not None else None

    def repo(self, kind: str | None, repo_id: str, needs: str) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(f"{kind}s/{repo_id}" if kind in ("dataset", "space") else repo_id)
        if repo is None or (repo.private and not (user and user.owns(repo_id))):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if needs == "write":
            if user is None:
                raise Refused(401, "Invalid username or password.")
            if not user.may_write(repo_id):
                reason = (
                    "you must use a write token to upload to a repository" if user.owns(repo_id) else "not your repo"
                )
                raise Refused(403, f"Forbidden: {reason}.")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        """HfApi.whoami"""
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}}
        return Answer({"type": "user", "name": user.name, "fullname": user.name, "orgs": organizations, "auth": auth})

    @route("GET", f"{API}/auth-check", "read")
    def auth_check(self, repo: Repo) -> Answer:
        """HfApi.auth_check"""
        self.check_gate(repo)
        return Answer()

    @route("GET", f"{API}/auth-check/write", "write")
    def auth_check_write(self, repo: Repo) -> Answer:
        """HfApi.auth_check(write=True)"""
        return Answer()

    def check_gate(self, repo: Repo) -> None:
        user = self.user()
        if repo.gated and not (user and user.owns(repo.id)):
            raise Refused(403 if user else 401, f"Access to {repo.type} {repo.id} is restricted.", "GatedRepo")

    # -------------------------------------------------------------------------------------------- repos

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Answer:
        """HfApi.create_repo"""
        asked, user = self.call.json, self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
        kind, private = asked.get("type", "model"), asked.get("visibility") == "private"
        if not re.fullmatch(r"[\w.-]{1,96}", asked["name"]):
            raise Refused(400, f"Invalid repo name: {asked['name']}")
        if not user.may_write(repo_id):
            namespace = repo_id.split("/")[0]
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        repo = Repo(repo_id, kind, private, sdk=asked.get("sdk"))
        url = f"{self.endpoint}/{repo.key}"
        if repo.key in self.hub.repos:
            raise Refused(409, f"You already created this {kind} repo", url=url)
        repo.start(user.name)
        self.hub.repos[repo.key] = repo
        return Answer({"url": url, "name": repo_id, "private": private})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> Answer:
        """HfApi.delete_repo"""
        asked, user = self.call.json, self.user()
        namespace = asked.get("organization") or (user.name if user else "")
        repo = self.repo(asked.get("type"), f"{namespace}/{asked['name']}", "write")
        del self.hub.repos[repo.key]
        return Answer()

    @route("PUT", f"{API}/settings", "write")
    def settings(self, repo: Repo) -> Answer:
        """HfApi.update_repo_settings"""
        asked = self.call.json
        repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = asked.get("gated", repo.gated)
        return Answer({"private": repo.private, "gated": repo.gated})

    @route("GET", rf"{API}(?:/revision{REV})?", "read")
    def info(self, repo: Repo, rev: str | None) -> Answer:
        """HfApi.model_info, dataset_info, space_info, repo_exists; the first call of every from_pretrained"""
        commit = repo.at(rev or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.blobs)]
        if "blobs" in self.call.query:
            for sibling in siblings:
                blob = commit.blobs[sibling["rfilename"]]
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.lfs:
                    size = {"size": len(blob.data), "pointerSize": len(blob.pointer)}
                    sibling["lfs"] = {"sha256": blob.sha256} | size
        data: dict[str, Any] = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
        }
        data |= {"createdAt": repo.log(commit.oid)[-1].date, "private": repo.private, "gated": repo.gated}
        data |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings}
        with contextlib.suppress(KeyError, ValueError, yaml.YAMLError):
            card = card_data(commit.blobs["README.md"].data.decode())
            data |= {"cardData": card, "tags": card.get("tags", [])}
            data |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        if repo.type == "space":
            data |= {"sdk": repo.sdk, "runtime": {"stage": "NO_APP_FILE", "hardware": {"current": "cpu-basic"}}}
        return Answer(data)

    @route("GET", f"{API}/refs", "read")
    def refs(self, repo: Repo) -> Answer:
        """HfApi.list_repo_refs"""

        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in names.items()]

        found = {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags")}
        return Answer(found | {"converts": [], "pullRequests": []})

    @route("POST|DELETE", f"{API}/branch/(?P<name>[^/]+)", "write")
    def branch(self, repo: Repo, name: str) -> Answer:
        """HfApi.create_branch, delete_branch"""
        if self.call.method == "DELETE":
            return self.forget(repo.branches, name)
        if name in repo.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.at(self.call.json.get("startingPoint", "main")).oid
        return Answer()

    @route("POST|DELETE", f"{API}/tag/(?P<name>[^/]+)", "write")
    def tag(self, repo: Repo, name: str) -> Answer:
        """HfApi.create_tag (the name in the path is what it points to), delete_tag"""
        if self.call.method == "DELETE":
            return self.forget(repo.tags, name)
        tag = self.call.json["tag"]
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.at(name).oid
        return Answer()

    @staticmethod
    def forget(names: dict[str, str], name: str) -> Answer:
        if name not in names:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        del names[name]
        return Answer()

    @route("GET", f"{API}/commits{REV}", "read")
    def commits(self, repo: Repo, rev: str) -> Answer:
        """HfApi.list_repo_commits"""
        return Answer(
            [
                {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
                for c in repo.log(rev)
            ]
        )

    # -------------------------------------------------------------------------------------------- writing files

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        """HfApi._validate_yaml: before a README.md is uploaded, and in RepoCard.push_to_hub"""
        errors, warnings = check_card(self.call.json["content"], self.call.json["repoType"])
        if self.call.headers.get("accept") == "text/plain":  # RepoCard.validate
            return Answer("\n".join(errors).encode(), 400 if errors else 200)
        found = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Answer(found, 400 if errors else 200)

    @route("POST", f"{API}/preupload{REV}", "write")
    def preupload(self, repo: Repo, rev: str) -> Answer:
        """HfApi.create_commit, upload_folder: which files are large, ignored, or there already"""
        self.no_pull_request()
        commit, asked = repo.at(rev), self.call.json
        attributes = commit.blobs.get(".gitattributes", Blob(b"")).data.decode().splitlines()
        large = [line.split()[0] for line in attributes if "filter=lfs" in line]
        gitignore = asked.get("gitIgnore", commit.blobs.get(".gitignore", Blob(b"")).data.decode())
        ignored = [line.strip(" /") for line in gitignore.splitlines() if line.strip() and line[0] != "#"]
        answers = []
        for file in asked["files"]:
            path, sample, old = file["path"], base64.b64decode(file["sample"]), commit.blobs.get(file["path"])
            is_large = file["size"] > LARGE_SIZE or b"\0" in sample or matches(path, large)
            oid = old and (old.sha256 if old.lfs else old.oid)
            mode = "lfs" if is_large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": matches(path, ignored), "oid": oid})
        return Answer({"files": answers})

    @route("POST", rf"{FILES}\.git/info/lfs/objects/batch", "write")
    def lfs_batch(self, repo: Repo) -> Answer:
        """huggingface_hub.lfs.post_lfs_batch_info: where to put large files, without Xet"""
        objects = []
        for asked in self.call.json["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:
                href = f"{self.endpoint}/lfs/{self.hub.secret}/{repo.key}/{asked['oid']}"
                verify = f"{self.endpoint}/{repo.key}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        return Answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<secret>[^/]+)/(?P<key>.+)/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, secret: str, key: str, oid: str) -> Answer:
        """huggingface_hub.lfs._upload_single_part: no token goes here, the address itself is the permission"""
        if secret != self.hub.secret or key not in self.hub.repos:
            raise Refused(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.call.body).hexdigest() != oid:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        self.hub.repos[key].objects[oid] = self.call.body
        return Answer()

    @route("POST", rf"{FILES}\.git/info/lfs/objects/verify", "write")
    def lfs_verify(self, repo: Repo) -> Answer:
        """huggingface_hub.lfs.lfs_upload, after the PUT"""
        asked = self.call.json
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "Object does not exist")
        return Answer()

    @route("GET", f"{API}/xet-write-token{REV}", "write")
    def xet_write_token(self, repo: Repo, rev: str) -> Answer:
        """hf_xet: where to put large files, with Xet"""
        self.no_pull_request()
        repo.at(rev)
        repo.stores.append(self.hub.xet.new_store())
        return self.xet_token(repo.stores[-1])

    @route("GET", f"{API}/xet-read-token{REV}", "read")
    def xet_read_token(self, repo: Repo, rev: str) -> Answer:
        """hf_xet, huggingface_hub.utils._xet.refresh_xet_connection_info: where to get them"""
        self.check_gate(repo)
        store = self.hub.xet.new_store()
        self.hub.xet.put([blob for blob in repo.at(rev).blobs.values() if blob.lfs], store)
        return self.xet_token(store)

    @staticmethod
    def xet_token(store: Path) -> Answer:
        """To hf_xet in JSON, to huggingface_hub in headers."""
        url, token, until = Xet.connection(store).values()
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
        return Answer({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)

    @route("POST", f"{API}/commit{REV}", "write")
    def commit(self, repo: Repo, rev: str) -> Answer:
        """huggingface_hub._commit_api._send_commit: all or nothing"""
        self.no_pull_request()
        branch, parent = rev.removeprefix("refs/heads/"), repo.at(rev)
        if branch not in repo.branches:
            raise Refused(400, f"Not a branch: {rev}")
        header, *operations = self.call.json
        header = header["value"]
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Blob | None] = {}
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                changes[path] = Blob(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                changes[path] = Blob(self.large_file(repo, value), lfs=True)
            else:
                folder = path.rstrip("/") + "/" if operation["key"] == "deletedFolder" else None
                gone = [p for p in parent.blobs if p == path or (folder and p.startswith(folder))]
                if not gone:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes |= dict.fromkeys(gone)
        if card := changes.get("README.md"):
            if errors := check_card(card.data.decode(errors="replace"), repo.type)[0]:
                raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
        user = self.user()
        assert user is not None
        commit = repo.commit(branch, header["summary"], header.get("description", ""), user.name, changes)
        url = f"{self.endpoint}/{repo.key}/commit/{commit.oid}"
        return Answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def large_file(self, repo: Repo, value: dict[str, Any]) -> bytes:
        oid = value["oid"]
        if oid not in repo.objects:
            data = self.hub.xet.get(oid, value.get("size", 0), repo.stores)
            if data is None:
                raise Refused(400, f"Your push was rejected: the large file {value['path']} ({oid}) was not uploaded")
            repo.objects[oid] = data
        return repo.objects[oid]

    def no_pull_request(self) -> None:
        if "create_pr" in self.call.query:
            raise Refused(501, "The loopback Hub has no pull requests")

    # -------------------------------------------------------------------------------------------- reading files

    @route("GET", rf"{API}/tree{REV}(?:/(?P<path>.+))?", "read")
    def tree(self, repo: Repo, rev: str, path: str | None) -> Answer:
        """HfApi.list_repo_tree, list_repo_files, snapshot_download"""
        blobs, top = repo.at(rev).blobs, f"{path}/" if path else ""
        if top and not any(name.startswith(top) for name in blobs):
            raise Refused(404, f"{path} does not exist on {rev}", "EntryNotFound")
        entries = with_folders(name for name in blobs if name.startswith(top))
        deep = self.call.query.get("recursive", ["false"])[0].lower() == "true"
        names = [n for n in entries if n.startswith(top) and n != path and (deep or "/" not in n[len(top) :])]
        return Answer([self.entry(name, blobs.get(name)) for name in names])

    @route("POST", f"{API}/paths-info{REV}", "read")
    def paths_info(self, repo: Repo, rev: str) -> Answer:
        """HfApi.get_paths_info, file_exists, create_commit with copies"""
        blobs, asked = repo.at(rev).blobs, parse_qs(self.call.body.decode()).get("paths", [])
        entries = with_folders(blobs)
        return Answer([self.entry(name, blobs.get(name)) for name in asked if name in entries])

    def entry(self, path: str, blob: Blob | None) -> dict[str, Any]:
        if blob is None:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
        if blob.lfs:
            size = {"size": len(blob.data), "pointerSize": len(blob.pointer)}
            entry |= {"lfs": {"oid": blob.sha256} | size, "xetHash": self.hub.xet.hash(blob)}
        return entry

    @route("GET|HEAD", f"{FILES}/resolve{REV}/(?P<path>.+)", "read")
    def resolve(self, repo: Repo, rev: str, path: str) -> Answer:
        """hf_hub_download: a HEAD for the name of the content and where it is, a GET for it"""
        self.check_gate(repo)
        commit = repo.at(rev)
        blob = commit.blobs.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
        headers["ETag"] = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        if blob.lfs:
            token = f"{self.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.data))}
            headers |= {"X-Xet-Hash": self.hub.xet.hash(blob), "Link": f'<{token}>; rel="xet-auth"'}
        size = len(blob.data)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.call.headers.get("range", ""))
        if span is None or self.call.method == "HEAD":
            return Answer(blob.data, headers=headers)
        first, last = span.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            raise Refused(416, f"Range not satisfiable: {span[0]} of {size} bytes")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(blob.data[start:stop], 206, headers)


def matches(path: str, patterns: list[str]) -> bool:
    """As in .gitattributes and .gitignore, without their finer points: a pattern meets the path or one of its parts."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (path, *path.split("/")))


def with_folders(paths: Iterable[str]) -> dict[str, None]:
    """The paths and the folders they are in, in order."""
    parts = (path.split("/") for path in paths)
    return dict.fromkeys(sorted("/".join(part[: n + 1]) for part in parts for n in range(len(part))))
