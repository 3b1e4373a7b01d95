"""The Hub folder: its code in one file, its card, and how it is pushed."""
