"""Recipes as text: typed sections, YAML and overrides in, what is wrong with them, YAML and help out."""
