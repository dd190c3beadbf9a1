"""Ahead-of-time compilation for devices that need not exist: what ``generate`` compiles to, and whether it is good."""
