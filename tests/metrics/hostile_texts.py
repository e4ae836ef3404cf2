"""Texts that were written to break what reads them, as a model or a stranger's data may hold them."""

from hypothesis import strategies as st

ATOMS = [
    " ", "\n", "[", "]", "[[", "<", "<<", "*", "-", "(", "{", "\\frac{", "\\boxed{", "$", '"', "'", "a", "9", "a ",
    "9,", "1/", "e", ".", "! ", "\0", "\x1b[31m", "́", "あ", "\u202e", "\U0001f600", "\r", "\u2028", "[[A", "#### ",
    "1e", "^",
]  # fmt: skip


def hostile_texts(longest: int = 5000) -> st.SearchStrategy[str]:
    """One or two runs of a few characters, each up to `longest` times, with an odd end."""
    run = st.builds(lambda atom, n: atom * n, st.sampled_from(ATOMS), st.integers(1, longest))
    return st.builds("".join, st.tuples(run, run | st.just(""), st.sampled_from(["", "x", "]]", "!", "1e9999999"])))
