"""Searches that return a circuit."""
