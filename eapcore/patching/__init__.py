"""Exact patching of edges, nodes, paths and circuits, each by running the model rather than by its gradient."""
