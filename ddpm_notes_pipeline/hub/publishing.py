"""Moved to push.py."""

from .push import BackgroundPushes, PublishingError, prepare_repo, push_command, push_folder

__all__ = ["BackgroundPushes", "PublishingError", "prepare_repo", "push_command", "push_folder"]
