"""What a run needs of its machine, foreseen before it starts."""
