"""The wheel: judgements of today make the model of tomorrow, behind gates and an A/B test."""
