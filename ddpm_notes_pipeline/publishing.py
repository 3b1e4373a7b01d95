"""Push a Hub folder: the pipeline's files, its card, pictures and figures.

    python -m ddpm_notes_pipeline.publishing outputs/digits --hub_model_id user/name

With `--space_id user/name-demo` it pushes a demo too.
"""

import argparse
import logging
import sys
from pathlib import Path

from .hub.card import read_facts
from .hub.push import PublishingError, export_folder, prepare_repo, push_folder, push_space, read_space

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Run the command; SystemExit with a message if anything fails."""
    try:
        _run(_parser().parse_args(argv))
    except (PublishingError, ValueError) as fault:
        sys.exit(f"publishing: error: {' '.join(str(fault).split())}")


def _run(arguments: argparse.Namespace) -> None:
    folder, private, space_id = arguments.folder, arguments.hub_private_repo, arguments.space_id
    read_facts(folder)  # before anything is created on the Hub
    if space_id is not None:
        read_space(arguments.space_dir)
    if arguments.export is not None:
        names = export_folder(folder, arguments.export, arguments.hub_model_id, arguments.license)
        print(f"Copied to {arguments.export}: {', '.join(names)}")
        return
    repo_id = prepare_repo(arguments.hub_model_id or folder.resolve().name, private, arguments.license)
    if space_id is not None:
        space_id = prepare_repo(space_id, private, repo_type="space")
    print(f"Pushed: {push_folder(folder, repo_id, license=arguments.license, space_id=space_id)}")
    if space_id is not None:  # after the model: it starts at once, and loads it
        print(f"Pushed: {push_space(arguments.space_dir, space_id, repo_id)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_notes_pipeline.publishing",
        description="Push a Hub folder: the pipeline's files, its card (written anew, with your own edits kept), pictures "
        "and figures.",
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder that training or DDPMNotesPipeline.save_pretrained wrote")
    add("--hub_model_id", help='"user/name"; without "user/", your own. Default: the name of the folder.')
    add("--hub_private_repo", action="store_true", help="make the repository private")
    add("--license", help="the model's licence, as the Hub names licences; default: that of the card, or apache-2.0")
    add("--export", type=Path, metavar="FOLDER", help="copy the files of a push to this new folder, and push nothing")
    add("--space_id", help='push a demo of the model too, as this Space: "user/name"')
    add("--space_dir", type=Path, default=Path("examples/space"), help="the demo's folder; default: %(default)s")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    main()
