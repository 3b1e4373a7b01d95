"""A card that is generated again and again and keeps what its owner wrote.

Generated text stands in blocks between comments that a reader does not see:

    <!-- generated:use 0123456789ab -->
    ...
    <!-- /generated:use -->

Everything outside the blocks is the owner's. A block whose digest no longer fits its text was
edited by hand: it is the owner's too. The last line names the repository, the blocks that the card
was written with, and a digest of all above it.
"""

import hashlib
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

DEFAULT_LICENSE = "apache-2.0"
NO_CARD = "---\n\n---\n"
# What this or an earlier version generated is replaced: metrics of the model-index, tags.
GENERATED_METRICS = ("bits_per_dim", "kernel_distance", "frechet_distance", "precision", "recall")
GENERATED_TAGS = ("class-conditional",)
_BLOCK = re.compile(r"<!-- generated:(\w+) ([0-9a-f]{12}) -->\n(.*?)<!-- /generated:\1 -->\n?", re.DOTALL)
_LAST_LINE = re.compile(r"<!-- card of (\S+): (.*?); ([0-9a-f]{12}) -->\n?")


def merge(repo_id: str, metadata: dict[str, Any], blocks: dict[str, str], before: str | None) -> str:
    """A card of these blocks that keeps everything the owner of the card `before` did.

    Added text stays where it is, edited blocks stay as edited, removed blocks stay removed.

    Args:
        repo_id: of the repository that the card is for.
        metadata: generated entries. The owner's win, but not over a `license`.
        blocks: generated text by name, in order.
        before: the card so far; None: there is none.

    Raises:
        ValueError: a card whose metadata is not YAML.
    """
    card = ModelCard((before or NO_CARD).replace("\r\n", "\n"), ignore_metadata_errors=False)
    items, known = _parse(card.text)
    items += [(name, "") for name in blocks if name not in known]
    body = ""
    for name, kept in items:
        if name:
            body += kept or (_block(name, _digest(blocks[name]), blocks[name]) if name in blocks else "")
            body += "\n"
        elif kept.strip():
            body += f"{kept.strip()}\n\n"
    data = ModelCardData(**_merged_metadata(metadata, card.data.to_dict()), ignore_metadata_errors=True)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return f"{text}<!-- card of {repo_id}: {' '.join(blocks)}; {_digest(text)} -->\n"


def repository_of(card: str | None) -> str | None:
    """The repository that a card was written for, if it was generated."""
    found = _LAST_LINE.search(card or "")
    return found.group(1) if found else None


def newest_card(local: str | None, published: str | None) -> tuple[str | None, bool]:
    """Which of two copies to build on, and whether edits of the local one are lost.

    The published one, unless only the local one was edited.
    """
    if published is None or local is None or not _was_edited(local):
        return (local if published is None else published), False
    if set(_owners_text(published)) <= set(_owners_text(local)):
        return local, False
    return published, True


def _merged_metadata(generated: dict[str, Any], owners: dict[str, Any]) -> dict[str, Any]:
    """The owner's entries, else the generated ones; lists joined; generated metrics replaced."""
    merged = {**generated, **owners}
    merged["license"] = generated.get("license") or owners.get("license") or DEFAULT_LICENSE
    for name in ("tags", "datasets"):
        theirs = [value for value in _as_list(owners.get(name)) if value not in GENERATED_TAGS]
        merged[name] = list(dict.fromkeys(theirs + _as_list(generated.get(name)))) or None
    merged.pop("model-index", None)
    generated_name, results = _results(generated)
    owners_name, owners_results = _results(owners)
    results += [result for result in owners_results if result.metric_type not in GENERATED_METRICS]
    return {**merged, "eval_results": results, "model_name": owners_name or generated_name} if results else merged


def _results(metadata: dict[str, Any]) -> tuple[str | None, list[EvalResult]]:
    """Name and results of a model-index, if there is one."""
    index = metadata.get("model-index")
    return model_index_to_eval_results(index) if index else (None, [])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _digest(text: str) -> str:
    """Of what a reader sees: trailing spaces and line ends, which editors change, do not count."""
    lines = "\n".join(line.rstrip() for line in text.strip().split("\n"))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _block(name: str, digest: str, text: str) -> str:
    return f"<!-- generated:{name} {digest} -->\n{text}<!-- /generated:{name} -->\n"


def _parse(body: str) -> tuple[list[tuple[str, str]], set[str]]:
    """A body in order, and the names of all blocks that the card was ever written with.

    Items are ("", text of the owner) and (name of a block, its text with the comments if the owner
    edited it, else "").
    """
    written = {name for _, names, _ in _LAST_LINE.findall(body) for name in names.split()}
    before, *rest = _BLOCK.split(_LAST_LINE.sub("", body))
    items = [("", before)]
    for name, digest, text, after in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4]):
        items += [(name, "" if _digest(text) == digest else _block(name, digest, text)), ("", after)]
    return items, written | {name for name, _ in items if name}


def _was_edited(card: str) -> bool:
    """Whether a card was changed since it was generated."""
    last = _LAST_LINE.search(card)
    return last is None or _digest(card[: last.start()]) != last.group(3) or bool(card[last.end() :].strip())


def _owners_text(card: str) -> list[tuple[str, str]]:
    """What in a card is the owner's."""
    body = ModelCard(card, ignore_metadata_errors=True).text
    return [(name, text.strip()) for name, text in _parse(body)[0] if text.strip()]
