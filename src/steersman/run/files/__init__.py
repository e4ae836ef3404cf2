"""The folder of a run: what is written into it, and what a resumed run reads from it."""
