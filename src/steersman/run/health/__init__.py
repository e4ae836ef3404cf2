"""The health watch: a run's numbers, checked at every step."""
