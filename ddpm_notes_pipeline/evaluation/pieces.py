"""Finished pieces of a long measurement, for the same command when it is run again after a stop.

A piece is a bound, part of a set of samples, or something that was fitted before them. It is a file
named by a digest of everything that its numbers depend on, so a run with other settings or weights
does not use it. Batch size and number of processes change no number and are left out.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from .. import __version__
from ..data import ImageSet
from ..pipeline_ddpm_notes import DDPMNotesPipeline
from .whole_file import read_whole, tensor_digest, write_whole

Settings = Mapping[str, Any]  # for JSON


@dataclass
class Piece:
    """What was measured: values for JSON, whose floats come back bit for bit, and tensors."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Piece":
        """Of values some of which are tensors."""
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return cls({name: value for name, value in values.items() if name not in tensors}, tensors)


Measured = TypeVar("Measured", Piece, Piece | None)


class Pieces:
    """Finished pieces in a folder.

    Args:
        accelerator: its main process reads, writes and decides for all.
        folder: below that of the results; None keeps and finds nothing.
        of_all: what every piece depends on: the network, its precision.

    Attributes:
        found, measured: numbers of pieces so far that were there, and that were not.
    """

    FOLDER: ClassVar[str] = "unfinished"

    def __init__(self, accelerator: Accelerator, folder: Path | None = None, of_all: Settings | None = None) -> None:
        self.accelerator, self.folder, self.of_all = accelerator, folder, dict(of_all or {})
        self.found = self.measured = 0
        self.used: set[Path] = set()

    def get(self, settings: Settings, measure: Callable[[], Measured], part: range | None = None) -> Measured:
        """The piece with these settings, found or measured. Collective: every rank must call it.

        Args:
            settings: what it depends on, beside `of_all`.
            measure: collective; returns None if it was stopped, and nothing is kept.
            part: which images it has, if it is part of a set with these settings.
        """
        if self.folder is None:
            return measure()
        name = self._name(settings)
        if part is not None:
            name = f"{name}-{part.start}-{part.stop}"
            settings = {**settings, "part": [part.start, part.stop]}
        path = self.folder / f"{name}.safetensors"
        known = [self._read(path, settings) if self.accelerator.is_main_process else None]
        found: Piece | None = broadcast_object_list(known)[0]
        self.used.add(path)
        if found is not None:
            self.found += 1
            return found
        measured = measure()
        if measured is not None:
            self.measured += 1
            self._write(path, settings, measured)
        return measured

    def drop_parts(self, settings: Settings) -> None:
        """Remove all parts of a set with these settings: another piece has taken their place."""
        if self.folder is not None and self.accelerator.is_main_process:
            for path in self.folder.glob(f"{self._name(settings)}-*"):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the pieces of this run, on the main process; those of other settings stay."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        for path in self.used:
            for file in self.folder.glob(f"{path.stem}.*"):  # also what a kill left half-written
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it still holds pieces, perhaps of a run beside this one
            self.folder.rmdir()

    def _name(self, settings: Settings) -> str:
        return digest({**self.of_all, **settings})

    def _read(self, path: Path, settings: Settings) -> Piece | None:
        """None if it is not there, or damaged."""
        tensors, metadata = read_whole(path) or ({}, {})
        if metadata and metadata == self._metadata(settings, metadata.get("values", ""), tensors):
            values = json.loads(metadata["values"])
            # not views of the file, which may be removed
            return Piece(values, {name: tensor.clone() for name, tensor in tensors.items()})
        if path.exists():
            warnings.warn(f"{path} is damaged and is measured again", stacklevel=4)
        return None

    def _write(self, path: Path, settings: Settings, piece: Piece) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            write_whole(path, piece.tensors, self._metadata(settings, json.dumps(piece.values), piece.tensors))
        except (OSError, SafetensorError) as fault:  # not worth the measurement
            warnings.warn(f"{path} could not be written; a stop would lose this piece ({fault})", stacklevel=4)

    def _metadata(self, settings: Settings, values: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        decided_by = json.dumps({**self.of_all, **settings}, sort_keys=True)
        contents = digest({"values": values, "tensors": tensor_digest(tensors)})
        return {"settings": decided_by, "values": values, "contents": contents}


def digest(settings: Settings) -> str:
    """Hex digest of a dictionary for JSON, whatever the order of its entries."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def int_keys(values: Any) -> Any:
    """The same with integer keys, which JSON has turned into text."""
    if isinstance(values, list):
        return [int_keys(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {int(key) if str(key).isdigit() else key: int_keys(value) for key, value in values.items()}


# ------------------------------------------------------------ what a piece depends on


def network_settings(pipeline: DDPMNotesPipeline, accelerator: Accelerator) -> dict[str, Any]:
    """The network's weights, its config and the precision of its arithmetic."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "weights": tensor_digest(pipeline.unet.state_dict()),
        "network": public_entries(json.loads(pipeline.unet.to_json_string())),
        "mixed_precision": accelerator.mixed_precision,
    }


def scheduler_settings(pipeline: DDPMNotesPipeline) -> dict[str, Any]:
    """Class and config of the pipeline's scheduler."""
    config = json.loads(pipeline.scheduler.to_json_string())
    private = {name: value for name, value in config.items() if isinstance(value, dict)}  # of ours
    return {"scheduler": type(pipeline.scheduler).__name__, "config": public_entries(config) | private}


def image_settings(images: ImageSet, labelled: bool) -> dict[str, Any]:
    """Digest of an image set's pixels, number of images, and the labels where these are used."""
    labels = images.labels.tolist() if labelled and images.labels is not None else None
    return {"fingerprint": images.fingerprint, "images": len(images), "labels": labels and digest({"labels": labels})}


def public_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers notes on it: version, path, which values are defaults."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
