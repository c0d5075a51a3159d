"""Who comes from another tool is told this one's word, and why its metric does not fit."""

from __future__ import annotations

from functools import partial

import pytest
from models import random_case
from refusal import refused

from eapcore import attribute

MODEL, PAIRS = random_case([5, 5], d_vocab=29)


def logit_diff(logits, clean_logits, input_lengths, labels, mean=True, loss=False):
    return logits


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "EAP-IG-inputs"}, "got 'EAP-IG-inputs'; here that is 'eap-ig', with steps= for ig_steps"),
    ({"method": "EAP"}, "got 'EAP'; here that is 'eap'"),
    ({"method": "eap_ig"}, "got 'eap_ig'; here that is 'eap-ig'"),
    ({"method": "clean-corrupted"}, "here that is 'clean-corrupt'"),
    ({"method": "denoising"}, "here that is 'eap' with gradient_at='corrupt'"),
    ({"method": "exact"}, "here that is eapcore.patching.edges.patch_edges"),
    ({"ablation": "patching"}, "got 'patching'; here that is 'corrupt'"),
    ({"ablation": "denoising"}, "here that is 'corrupt', with gradient_at='corrupt'"),
    ({"ablation": "mean_positional"}, "here that is 'mean-positional'"),
    ({"metric": logit_diff}, "takes logits, clean_logits, input_lengths, labels, as those of EAP-IG do: .*attribute"),
    ({"metric": partial(logit_diff, loss=True)}, "takes logits, clean_logits, input_lengths, labels"),
    ({"metric": lambda logits: logits[:, -1, 3] - logits[:, -1, 4]}, r"not \[B, T, V\]: leave out the index"),
    ({"metric": lambda logits: (logits[:, 3] - logits[:, 4]).mean()}, r"got shape \[\]: leave out the mean"),
])  # fmt: skip
def test_another_tool_s_words_get_the_right_one(options, message):
    refused(message, attribute, MODEL, PAIRS, **options)


def test_an_option_that_is_not_there_names_ours():
    refused("no option 'ig_steps'; here that is steps", attribute, MODEL, PAIRS, ig_steps=5, error=TypeError)
    refused("no option 'intervention'; here that is ablation", attribute, MODEL, PAIRS, intervention=0, error=TypeError)
    refused("no option 'nothing'$", attribute, MODEL, PAIRS, nothing=0, error=TypeError)
