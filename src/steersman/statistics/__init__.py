"""Estimates with intervals, and the reports that are made of them."""
