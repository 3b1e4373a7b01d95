"""State of the loopback Hub: repositories with their history, Xet stores, rules for cards."""

import functools
import hashlib
import itertools
import re
import shutil
import struct
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import hf_xet
import yaml

# Patterns of a new repository's .gitattributes: what goes to large-file storage.
LARGE = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst "
    "*tfevents*"
).split()
LARGE_SIZE = 10 * 1024 * 1024  # bytes above which any file goes there; binary files always do


class Refused(Exception):
    """An error response: the client reads code and message from headers, and the rest from JSON."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(message)
        self.status, self.json = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


# --- content


@dataclass(frozen=True)
class Blob:
    """One version of one file. `lfs`: it is in large-file storage, and git holds a pointer."""

    data: bytes
    lfs: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1\noid sha256:"
        return f"{head}{self.sha256}\nsize {len(self.data)}\n".encode()

    @functools.cached_property
    def oid(self) -> str:
        """Git's object id: of the content, or of the pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str  # 40 hexadecimal digits, unique
    parent: str | None
    title: str
    message: str
    author: str
    time: float  # seconds since the epoch
    blobs: dict[str, Blob]  # path -> version; the whole tree
    changed: tuple[str, ...]  # paths that this commit wrote

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.data for path, blob in sorted(self.blobs.items())}

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.time)) + f".{int(self.time % 1 * 1000):03d}Z"


@dataclass
class Repo:
    """A repository with one branch, main; `objects` and `stores` are its large-file storage."""

    id: str
    type: Literal["model", "space"] = "model"
    private: bool = False
    sdk: str | None = None
    head: str | None = None  # oid of the newest commit
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    stores: list[Path] = field(default_factory=list)  # folders that Xet clients write to

    def at(self, revision: str = "main") -> Commit:
        """The commit of "main" or of a full oid; `Refused` if there is none."""
        oid = self.head if revision == "main" else revision
        if oid not in self.history:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.at(revision).files

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.history[commits[-1].parent])
        return commits

    @property
    def commits(self) -> list[Commit]:
        return self.log()

    def start(self, author: str) -> None:
        """Make the first commit, which every repository on the Hub has."""
        lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
        changes = {".gitattributes": Blob(lines.encode())}
        if self.type == "space":
            title = self.id.split("/")[1]
            card = f"---\ntitle: {title}\nemoji: 🐠\ncolorFrom: red\ncolorTo: gray\nsdk: {self.sdk}\n---\n"
            changes["README.md"] = Blob(card.encode())
        self.commit("initial commit", "", author, changes)

    def commit(self, title: str, message: str, author: str, changes: Mapping[str, Blob | None]) -> Commit:
        """Add a commit to main. `changes`: path -> its new version, None if it is deleted."""
        parent = self.head
        blobs = {**(self.history[parent].blobs if parent else {}), **changes}
        blobs = {path: blob for path, blob in blobs.items() if blob is not None}
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.history[oid] = Commit(oid, parent, title, message, author, time.time(), blobs, tuple(changes))
        self.head = oid
        return self.history[oid]

    @property
    def key(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"


@dataclass(frozen=True)
class User:
    name: str
    role: Literal["read", "write"] = "write"  # of the token

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and self.owns(repo_id)

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] == self.name


# --- Xet storage


@functools.cache
def session() -> Any:
    """One per process: each starts threads of its own."""
    return hf_xet.XetSession()


class Xet:
    """Reads and writes the folders in which `hf_xet` keeps a `local://` store."""

    def __init__(self, root: Path) -> None:
        self.root, self.numbers = root, itertools.count()
        self.server_store = self.new_store()
        self.hashes: dict[str, str] = {}  # sha256 -> Xet hash

    def new_store(self) -> Path:
        folder = self.root / f"xet-{next(self.numbers)}"
        folder.mkdir()
        return folder

    def put(self, blobs: Iterable[Blob], store: Path) -> None:
        with session().new_upload_commit(**self.connection(store)) as commit:
            handles = [(blob, commit.start_upload_bytes(blob.data, sha256=blob.sha256)) for blob in blobs]
        for blob, handle in handles:
            self.hashes[blob.sha256] = handle.result().xet_info.hash

    def hash(self, blob: Blob) -> str:
        if blob.sha256 not in self.hashes:
            self.put([blob], self.server_store)
        return self.hashes[blob.sha256]

    def get(self, sha256: str, size: int, stores: Iterable[Path]) -> bytes | None:
        """Content that a client wrote to one of the stores, or None."""
        for store in stores:
            for shard in (store / "xet/xorbs/shards").glob("*.mdb"):
                if xet_hash := self.files_in(shard).get(sha256):
                    data = self.read(store, xet_hash, size)
                    return data if hashlib.sha256(data).hexdigest() == sha256 else None
        return None

    def read(self, store: Path, xet_hash: str, size: int) -> bytes:
        """Content of a store, from a copy: the client keeps its own locked until it has committed.

        Another client may be writing into the store, so that a copy has a file's name before its
        content: then it is copied again.
        """
        for attempt in range(20):
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                copy, target = Path(folder, "store"), Path(folder, "out")
                shutil.copytree(store / "xet/xorbs", copy / "xet/xorbs")
                try:
                    with session().new_file_download_group(**self.connection(copy)) as group:
                        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
                    return target.read_bytes()
                except RuntimeError:
                    if attempt == 19:
                        raise
            time.sleep(0.1)
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def connection(store: Path) -> dict[str, Any]:
        return {"endpoint": f"local://{store}", "token": "local", "token_expiry_unix_secs": int(time.time()) + 3600}

    @staticmethod
    def files_in(shard: Path) -> dict[str, str]:
        """sha256 -> Xet hash of the files in a shard: records of 48 bytes, after a header of 48."""

        def hexadecimal(at: int) -> str:  # four little-endian numbers of 64 bits
            return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", data, at))

        data, at, found = shard.read_bytes(), 48, {}
        while len(data) > at + 48 and data[at : at + 32] != b"\xff" * 32:
            flags, segments = struct.unpack_from("<2I", data, at + 32)
            end = at + 48 + 48 * segments * (2 if flags & 1 << 31 else 1)  # segments, with proofs if flagged
            if flags & 1 << 30:  # then git's sha256
                found[hexadecimal(end)] = hexadecimal(at)
                end += 48
            at = end
        return found


# --- cards

LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause "
    "bsd-3-clause bsd-3-clause-clear cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl unknown other"
).split()
COLORS = "red yellow green blue indigo purple pink gray".split()
SDKS = "gradio docker static streamlit".split()
REPO_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class StrictLoader(yaml.SafeLoader):
    """YAML as the Hub parses it: a duplicate key in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"duplicated mapping key: {twice[0]}")
        return super().construct_mapping(node, deep)


def card_data(text: str) -> dict:
    """The metadata between the `---` lines at the top of a README.

    Raises:
        yaml.YAMLError: it cannot be parsed. ValueError: there is none.
    """
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    data = yaml.load(match[1], StrictLoader) if match else None
    if data is not None and not isinstance(data, dict):
        raise yaml.YAMLError("the metadata is not a mapping")
    if not data:
        raise ValueError("empty or missing yaml metadata in repo card")
    return data


def check_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for the metadata of a README.md."""
    try:
        data = card_data(text)
    except yaml.YAMLError as problem:
        return [f"YAML Metadata Error: {problem}"], []
    except ValueError as problem:
        return [], [f"{problem} (https://huggingface.co/docs/hub/model-cards)"]

    errors = []
    names = {"base_model": str, "datasets": str, "models": str, "tags": str, "license": str}
    for key in names.keys() & data.keys():
        values = data[key] if isinstance(data[key], list) else [data[key]]
        if key in ("tags", "datasets", "models") and not isinstance(data[key], list):
            errors.append(f'"{key}" must be an array')
        elif not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string')
        elif key == "license" and not set(values) <= set(LICENSES):
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
        elif key in ("base_model", "datasets", "models"):
            bad = [value for value in values if not REPO_NAME.fullmatch(value)]
            errors += [f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co' for value in bad]
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "title", "app_file", "sdk_version"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if repo_type == "space":
        for key, allowed in (("sdk", SDKS), ("colorFrom", COLORS), ("colorTo", COLORS)):
            if key in data and data[key] not in allowed:
                errors.append(f'"{key}" must be one of [{", ".join(allowed)}]')
        if len(str(data.get("short_description", ""))) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    return errors + check_model_index(data.get("model-index", [])), []


def check_model_index(index: Any) -> list[str]:
    """Errors of `model-index`: names, results, tasks, datasets, metrics with types and values."""
    errors: list[str] = []

    def required(item: Any, keys: str, where: str) -> list[Any]:
        item = item if isinstance(item, dict) else {}
        errors.extend(f'"{where}.{key}" is required' for key in keys.split() if item.get(key) is None)
        return [item.get(key) for key in keys.split()]

    def numbered(items: Any, where: str) -> Iterator[tuple[str, Any]]:
        if items is not None and not isinstance(items, list):
            errors.append(f'"{where}" must be an array')
        elif items:
            yield from ((f"{where}[{number}]", item) for number, item in enumerate(items))

    for entry, model in numbered(index, "model-index"):
        for where, result in numbered(required(model, "name results", entry)[1], f"{entry}.results"):
            task, dataset, metrics = required(result, "task dataset metrics", where)
            required(task, "type", f"{where}.task")
            required(dataset, "type name", f"{where}.dataset")
            for name, metric in numbered(metrics, f"{where}.metrics"):
                required(metric, "type value", name)
    return errors
