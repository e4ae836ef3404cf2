"""Our own classes are asked by a method or a field: `isinstance` is for what comes from outside."""

from __future__ import annotations

import ast
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "steersman"

ALLOWED = {
    # What a user's file or settings made may be anything.
    "algorithms/load.py": {"Algorithm"},
    "update/returned.py": {"Advantage"},
    "recipe/on_policy.py": {"Algorithm"},
    "control/recipe.py": {"Algorithm"},
    "grue/task.py": {"Task"},
    "metrics/core.py": {"Corpus"},
    "metrics/named.py": {"Metric", "Scorer"},
    "metrics/workers.py": {"Scorer"},
    # A nested value whose leaves are of any type is walked.
    **{f"config/{name}.py": {"Section"} for name in ("problems", "sections", "dump", "help")},
    "distributed/pieces.py": {"StoredTensor"},
    "guards/untrusted.py": {"Fault"},
    # The kinds of example are a closed union, which files decide and pyright checks.
    **{f"data/{name}.py": {"Demonstration", "Feedback", "Preference", "Query", "Ranking", "Rating", "Steps"}
       for name in ("examples", "prepare", "split", "tools")},
    "distill/rows.py": {"Demonstration", "Query"},
    # What a folder or a recipe holds is known when it is read.
    "verbs/reward_model.py": {"AttributeModel", "EnsembleModel"},
    "verbs/plan.py": {"FeedbackRecipe", "OnPolicyRecipe", "PreferenceRecipe", "RewardModelRecipe"},
    "people/serve/app.py": {"LoadedModel"},
}  # fmt: skip
"""By file, the classes of ours that it may tell apart."""


def told_apart(source: str) -> set[str]:
    """Classes of ours, errors aside, that `isinstance` or `issubclass` is asked about."""
    tree = ast.parse(source)
    ours = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steersman"):
            ours |= {name.asname or name.name for name in node.names}
    asked = (
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
    )
    names = {name.id for kinds in asked for name in ast.walk(kinds) if isinstance(name, ast.Name)}
    return {name for name in names & ours if not name.endswith("Error")}


def test_our_own_classes_are_asked():
    seen = {str(path.relative_to(SRC)): told_apart(path.read_text()) for path in sorted(SRC.rglob("*.py"))}
    wrong = {file: names - ALLOWED.get(file, set()) for file, names in seen.items()}
    wrong = {file: names for file, names in wrong.items() if names}
    assert not wrong, f"give the class a method or a field with a default instead: {wrong}"
    idle = {file for file in ALLOWED if not seen.get(file)}
    assert not idle, f"nothing is told apart there any more: {idle}"


def test_what_counts_as_telling_apart():
    text = "from steersman.model import Policy\nclass Own: ...\nisinstance(a, Policy | Own) or isinstance(b, dict)\n"
    assert told_apart(text) == {"Policy", "Own"}
    assert told_apart("from steersman.types import SteersmanError\nisinstance(e, SteersmanError)\n") == set()
