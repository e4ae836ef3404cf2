"""One file a verb: a recipe in, a summary out."""
