"""The words' tokenizer, and three samples: two that ended, one cut."""

from __future__ import annotations

import pytest
from reward_classifiers import WORDS, sample, word_tokenizer


@pytest.fixture
def policy_tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def samples(policy_tokenizer):
    return [
        sample("the cat", "was happy and then was sad", policy_tokenizer),
        sample("cat", "was", policy_tokenizer, "length"),
        sample("the", "cat was sad and", policy_tokenizer),
    ]
