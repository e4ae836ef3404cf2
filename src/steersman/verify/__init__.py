"""`steersman verify`: every method against the exact oracle, in one table."""
