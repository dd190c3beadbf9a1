"""Ahead-of-time compilation for devices that need not exist: what ``generate`` compiles to, and whether it is good."""

from specjax.aot import programs, promises, report, topology

__all__ = ["programs", "promises", "report", "topology"]
