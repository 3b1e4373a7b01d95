"""Moved to card.py."""

from .card import weights_digest, write_card

__all__ = ["weights_digest", "write_card"]
