"""Text to token ids and back: what a tokenizer is here, those of a folder's files, and the words of the toys."""

from eapcore.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
