"""A tokenizer of all words that the tasks have, for tests that need no one else's."""

from __future__ import annotations

import pytest

from eapcore.tasks import agreement, capitals, docstring, greater_than, ioi, toy_ioi

tokenizers = pytest.importorskip("tokenizers")
SENTENCES = {
    "ioi": ioi.SENTENCES, "greater-than": (greater_than.SENTENCE,), "docstring": (docstring.SENTENCE,),
    "agreement": agreement.SENTENCES, "capitals": capitals.SENTENCES,
}  # fmt: skip


def word_level(**options):
    """A tokenizer of all words that the tasks have, two digits together."""
    corpus = [sentence for of in SENTENCES.values() for sentence in of]
    words = [*ioi.NAMES, *toy_ioi.PLACES, *toy_ioi.OBJECTS, *greater_than.NOUNS, *docstring.ARGUMENTS, *docstring.WORDS]
    words += [word for noun in agreement.NOUNS for word in noun] + [*"is was has are were have".split()]
    words += [*capitals.CAPITALS, *capitals.CAPITALS.values(), *(f"{year:02d}" for year in range(100))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    pattern = tokenizers.Regex(r" ?\d\d| ?[A-Za-z_]+|\s|[^\w\s]")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    made.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"], show_progress=False)
    made.train_from_iterator([*corpus, *words, *(f" {word}" for word in words)], trainer)
    if options.get("begins"):
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made
