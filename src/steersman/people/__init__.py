"""People in the loop: what they judge is collected, stored, tested with, and learned from."""
