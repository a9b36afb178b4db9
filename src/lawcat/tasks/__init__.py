"""Seeded generators of samples with known answers, and the text around them.

Below both `distill` and `evaluation`: training and evaluation data are made by the same code from disjoint
values and seeds. Importing this package imports neither torch nor transformers.
"""

from lawcat.tasks.babilong import (
    BABILONG_QA1,
    BABILONG_QA2,
    BABILONG_QA3,
    BABILONG_QA4,
    BABILONG_QA5,
    babilong_training_label,
    babilong_training_pair,
    babilong_training_pairs,
)
from lawcat.tasks.haystack import (
    TextSource,
    builtin_source,
    file_source,
    hub_source,
    noise_source,
    resolve_source,
)
from lawcat.tasks.last_word import LAST_WORD
from lawcat.tasks.niah import (
    NIAH_MULTIKEY_1,
    NIAH_MULTIKEY_2,
    NIAH_MULTIKEY_3,
    NIAH_MULTIQUERY,
    NIAH_MULTIVALUE,
    NIAH_SINGLE_1,
    NIAH_SINGLE_2,
    NIAH_SINGLE_3,
    niah_training_pair,
    niah_training_pairs,
)
from lawcat.tasks.passkey import PASSKEY, passkey_text, passkey_training_pair
from lawcat.tasks.recall import ASSOCIATIVE_RECALL, COPY
from lawcat.tasks.sample import (
    TASKS,
    Sample,
    Split,
    Task,
    encode_pair,
    encode_pairs,
    encode_pieces,
    get_task,
    held_out,
)
from lawcat.tasks.variable_tracking import VARIABLE_TRACKING

__all__ = [
    "ASSOCIATIVE_RECALL",
    "BABILONG_QA1",
    "BABILONG_QA2",
    "BABILONG_QA3",
    "BABILONG_QA4",
    "BABILONG_QA5",
    "COPY",
    "LAST_WORD",
    "NIAH_MULTIKEY_1",
    "NIAH_MULTIKEY_2",
    "NIAH_MULTIKEY_3",
    "NIAH_MULTIQUERY",
    "NIAH_MULTIVALUE",
    "NIAH_SINGLE_1",
    "NIAH_SINGLE_2",
    "NIAH_SINGLE_3",
    "PASSKEY",
    "TASKS",
    "VARIABLE_TRACKING",
    "Sample",
    "Split",
    "Task",
    "TextSource",
    "babilong_training_label",
    "babilong_training_pair",
    "babilong_training_pairs",
    "builtin_source",
    "encode_pair",
    "encode_pairs",
    "encode_pieces",
    "file_source",
    "get_task",
    "held_out",
    "hub_source",
    "niah_training_pair",
    "niah_training_pairs",
    "noise_source",
    "passkey_text",
    "passkey_training_pair",
    "resolve_source",
]
