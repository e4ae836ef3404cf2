"""The pages on which people chat with models and judge their answers."""
