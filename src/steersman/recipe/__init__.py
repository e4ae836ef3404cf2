"""The recipe's keys: the sections that several verbs share, and the recipe of the on-policy verbs."""
