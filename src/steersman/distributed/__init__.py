"""The processes that one run has: how they start, what they share out, tensors in pieces over them."""
