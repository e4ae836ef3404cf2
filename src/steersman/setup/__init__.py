"""What a recipe's sections ask for: models, the reference, and what samples."""
