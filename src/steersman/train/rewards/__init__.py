"""What reward models learn from: one objective for each shape of the data, and how well they do it."""
