"""Loops that turn a model's own samples, or its users' words, into the next round's data."""
