"""`steersman instruct`: instructions made of checkable constraints, answers corrected until the checks pass."""
