"""Folders of draft heads, in the layouts in which they are published, opened as drafters and written."""
