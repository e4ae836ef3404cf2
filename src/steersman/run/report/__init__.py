"""What a run leaves to read: report.html, the model card, and their charts."""
