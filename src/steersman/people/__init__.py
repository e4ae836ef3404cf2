"""People in the loop: their judgements, experiments with them, and training on what they say."""
