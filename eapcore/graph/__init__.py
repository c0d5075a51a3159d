"""Senders, receivers, edges; scores, circuits and their files."""

from eapcore.graph.graph import Graph

__all__ = ["Graph"]
