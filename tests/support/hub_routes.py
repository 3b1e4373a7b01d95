"""Routes of the loopback Hub: one method each, whose docstring names the client's calls."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

import yaml

from tests.support.hub_content import LARGE_SIZE, Blob, Refused, Repo, User, Xet, card_data, check_card

if TYPE_CHECKING:
    from tests.support.loopback_hub import Hub


@dataclass
class Request:
    """One request. `status` is None until it is answered, and stays None if it never is."""

    method: str
    path: str  # without the query
    query: dict[str, list[str]]
    route: str | None  # method of `Routes` that serves it
    headers: dict[str, str]  # lower-case names
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
        """The parsed body; for ndjson, the list of its lines."""
        if "ndjson" in self.headers.get("content-type", ""):
            return [json.loads(line) for line in self.body.splitlines()]
        return json.loads(self.body)


@dataclass
class Answer:
    body: Any = b""  # bytes, or anything that becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


API = r"/api/(?P<type>model|space)s/(?P<repo>[^/]+/[^/]+)"
FILES = r"(?:/(?P<type>space)s)?/(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<rev>[^/]+)"
ROUTES: list[tuple[re.Pattern, str, Literal["read", "write"] | None]] = []


def route(method: str, path: str, needs: Literal["read", "write"] | None = None) -> Callable[[Callable], Callable]:
    """Decorator: serve an HTTP method and path by a method of `Routes`, with the path's groups.

    `needs`: `type` and `repo` in the path become the `Repo`, once its permissions are checked.
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
        """For "METHOD /path": the route's name or None, what it needs, the path's groups."""
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

    # --- permissions

    @property
    def endpoint(self) -> str:
        """As the client calls it: the server may have another name there."""
        return f"http://{self.call.headers.get('host', f'127.0.0.1:{self.hub.port}')}"

    def user(self) -> User | None:
        token = self.call.token
        if token is not None and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token] if token is not None else None

    def repo(self, kind: str | None, repo_id: str, needs: str) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(f"spaces/{repo_id}" if kind == "space" else repo_id)
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
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}}
        return Answer({"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": auth})

    @route("GET", f"{API}/auth-check/write", "write")
    def auth_check_write(self, repo: Repo) -> Answer:
        """HfApi.auth_check(write=True)"""
        return Answer()

    # --- repos

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

    @route("GET", rf"{API}(?:/revision{REV})?", "read")
    def info(self, repo: Repo, rev: str | None) -> Answer:
        """HfApi.model_info, space_info, repo_exists; the first call of every from_pretrained"""
        commit = repo.at(rev or "main")
        data: dict[str, Any] = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
        }
        data |= {"createdAt": repo.log(commit.oid)[-1].date, "private": repo.private, "gated": False}
        data |= {"disabled": False, "downloads": 0, "likes": 0}
        data["siblings"] = [{"rfilename": path} for path in sorted(commit.blobs)]
        with contextlib.suppress(KeyError, ValueError, yaml.YAMLError):
            card = card_data(commit.blobs["README.md"].data.decode())
            data |= {"cardData": card, "tags": card.get("tags", [])}
            data |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        if repo.type == "space":
            data |= {"sdk": repo.sdk, "runtime": {"stage": "NO_APP_FILE", "hardware": {"current": "cpu-basic"}}}
        return Answer(data)

    # --- writing files

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        """Before a README.md is uploaded; RepoCard.validate, RepoCard.push_to_hub"""
        errors, warnings = check_card(self.call.json["content"], self.call.json["repoType"])
        if self.call.headers.get("accept") == "text/plain":  # RepoCard.validate
            return Answer("\n".join(errors).encode(), 400 if errors else 200)
        found = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Answer(found, 400 if errors else 200)

    @route("POST", f"{API}/preupload{REV}", "write")
    def preupload(self, repo: Repo, rev: str) -> Answer:
        """HfApi.create_commit, upload_folder: which files are large, ignored or unchanged"""
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
        """huggingface_hub.lfs.post_lfs_batch_info: where large files go, without Xet"""
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
        """huggingface_hub.lfs, one part: without a token; the address is the permission"""
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
        """hf_xet: where large files go, with Xet"""
        repo.at(rev)
        repo.stores.append(self.hub.xet.new_store())
        return self.xet_token(repo.stores[-1])

    @route("GET", f"{API}/xet-read-token{REV}", "read")
    def xet_read_token(self, repo: Repo, rev: str) -> Answer:
        """hf_xet, huggingface_hub.utils._xet.refresh_xet_connection_info: where they are"""
        store = self.hub.xet.new_store()
        self.hub.xet.put([blob for blob in repo.at(rev).blobs.values() if blob.lfs], store)
        return self.xet_token(store)

    @staticmethod
    def xet_token(store: Path) -> Answer:
        """hf_xet reads the JSON, huggingface_hub the headers."""
        url, token, until = Xet.connection(store).values()
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
        return Answer({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)

    @route("POST", f"{API}/commit{REV}", "write")
    def commit(self, repo: Repo, rev: str) -> Answer:
        """huggingface_hub._commit_api._send_commit: all or nothing"""
        parent = repo.at(rev)
        if rev != "main":
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
            elif operation["key"] == "deletedFile":
                changes[path] = None
            else:
                raise Refused(501, f"The loopback Hub does not serve commits with {operation['key']}")
        if card := changes.get("README.md"):
            if errors := check_card(card.data.decode(errors="replace"), repo.type)[0]:
                raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
        user = self.user()
        assert user is not None
        commit = repo.commit(header["summary"], header.get("description", ""), user.name, changes)
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

    # --- reading files

    @route("GET", f"{API}/tree{REV}", "read")
    def tree(self, repo: Repo, rev: str) -> Answer:
        """snapshot_download, HfApi.list_repo_files: the files of all folders"""
        entries: list[dict[str, Any]] = []
        for path, blob in sorted(repo.at(rev).blobs.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
            if blob.lfs:
                size = {"size": len(blob.data), "pointerSize": len(blob.pointer)}
                entry |= {"lfs": {"oid": blob.sha256} | size, "xetHash": self.hub.xet.hash(blob)}
            entries.append(entry)
        return Answer(entries)

    @route("GET|HEAD", f"{FILES}/resolve{REV}/(?P<path>.+)", "read")
    def resolve(self, repo: Repo, rev: str, path: str) -> Answer:
        """hf_hub_download: HEAD for the etag and where the content is, GET for the content"""
        commit = repo.at(rev)
        blob = commit.blobs.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
        headers["ETag"] = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        if blob.lfs:
            token = f"{self.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.data))}
            headers |= {"X-Xet-Hash": self.hub.xet.hash(blob), "Link": f'<{token}>; rel="xet-auth"'}
        return Answer(blob.data, headers=headers)


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a pattern of .gitattributes or .gitignore matches the path or a part of it."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (path, *path.split("/")))
