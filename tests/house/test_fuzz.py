"""300 files with random faults: each is read, or refused by one sentence that names it and exit code 2.

The kinds of faults in what is read, where each is tested, and with how many members; a new member would fail there:

    text or ids by how a value looks        tests/tasks/test_task_files.py AMBIGUOUS      21
    fields unread, doubled, missing; cells  UNREAD as JSON and as a table; the test below 38, 15
    other people's files; what they lack    PUBLISHED and 8 published files; UNFIT        19, 21
    tokenizers of folders                   tests/text/test_tokenizer.py SETTINGS × TEXTS 34 × 12
    answers alike, coupled pairs, zeros     tests/tasks/test_metrics.py                   5, 8, 1
    layouts, what lies beside, tied ends    tests/models/test_checkpoints.py              7, 7, 4
    damaged torch files                     DAMAGE                                        6
    configurations out of proportion        tests/house/test_limits.py CONFIGS            24
    options, tasks, graphs, pipes, the Hub  OPTIONS, TASKS and the tests below            18, 10, 4, 5, 2
    random faults                           here, by fifteen kinds of files               300
    scores of another model, or unknown     tests/evaluation/test_evaluate.py, test_sign  9, 6
"""

from __future__ import annotations

from collections import Counter

import fuzz


def test_files_with_random_faults_are_read_or_refused_in_one_sentence(tmp_path):
    found = list(fuzz.tried(range(300), tmp_path))
    assert not [each for each in found if each[2] not in ("read", "refused")]
    assert min(Counter(kind for _, kind, _, _ in found).values()) > 8  # of each kind of file
    assert {how for _, _, how, _ in found} == {"read", "refused"}
