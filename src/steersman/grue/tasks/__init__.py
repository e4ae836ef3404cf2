"""The seven tasks of GRUE (arXiv 2210.01241), one file each."""
