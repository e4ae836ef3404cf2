"""The rooms stand on each other as docs/architecture.md says: imports point down, and heavy libraries stay home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "steersman"

MATHS = {"ops", "types"}
GROUND = MATHS | {"atomic", "extras", "guards", "jsonl", "config", "distributed", "run"}
MAY = {
    "types": set(),
    "assets": set(),
    "ops": {"types"},
    "native": MATHS | {"atomic"},
    "atomic": {"types"},
    "extras": {"types"},
    "guards": {"types"},
    "jsonl": {"types", "atomic", "guards"},
    "config": {"types", "guards"},
    "distributed": {"types", "atomic", "extras", "guards", "config"},
    "run": GROUND - {"run"},
    "data": GROUND,
    "model": GROUND | {"native"},
    "rollout": GROUND | {"model", "native"},
    "metrics": GROUND | {"model", "statistics"},  # how long a text a model reads; intervals
    "reward": GROUND | {"model", "metrics"},
    "loss": MATHS,
    "advantage": MATHS,
    "algorithms": MATHS | {"guards", "config", "advantage", "loss"},
    "update": MATHS | {"guards", "config", "distributed", "advantage", "loss", "algorithms"},
    "tabular": MATHS | {"distributed", "loss"},  # preference losses are followed to their fixed points there
    "verify": GROUND | {"advantage", "loss", "algorithms", "tabular", "update"},
    "control": GROUND | {"advantage", "loss", "algorithms", "tabular", "update", "train"},
    "judge": GROUND | {"data", "model", "rollout", "reward"},
    "statistics": GROUND | {"data"},
    "plan": GROUND | {"data", "model", "rollout", "update"},
    "environments": GROUND | {"data", "model", "rollout", "judge"},  # who plays a user, who judges a talk
    "recipe": GROUND
    | {"data", "model", "rollout", "reward", "environments", "loss", "update", "algorithms"},
    "setup": GROUND | {"data", "model", "rollout", "environments", "recipe"},
    "train": GROUND
    | {"environments", "data", "model", "rollout", "reward", "advantage", "loss", "update", "algorithms"}
    | {"plan", "recipe", "setup"},
    "evaluation": GROUND
    | {"data", "model", "rollout", "metrics", "reward", "recipe", "setup", "plan", "train"},
    "objectives": GROUND | {"data", "model", "loss", "setup", "train", "statistics"},
    "verbs": GROUND
    | {"native", "data", "model", "rollout", "reward", "metrics", "loss", "update", "algorithms"}
    | {"plan", "recipe", "setup", "train", "objectives", "statistics", "assets", "environments", "evaluation"},
    "flywheel": GROUND
    | {"data", "model", "rollout", "reward", "judge", "update", "algorithms", "train", "objectives", "verbs"}
    | {"metrics", "statistics", "recipe", "setup"},
    "distill": GROUND
    | {"data", "model", "rollout", "reward", "judge", "advantage", "loss", "update", "plan", "train"}
    | {"objectives", "recipe", "setup", "evaluation"},
    "grue": GROUND
    | {"data", "model", "metrics", "reward", "recipe", "setup", "train", "algorithms", "update", "verbs"},
    "people": GROUND
    | {"data", "model", "rollout", "judge", "statistics", "recipe", "setup", "verbs", "flywheel", "assets"},
}  # fmt: skip
"""What each room may import of the others; `GROUND` is what every run stands on."""

PUBLIC = {"cli", "verb_table", "api", "__init__", "__main__"}
"""What stands above all rooms and may import any; no room may import these."""

HOMES = {
    "transformers": {"model", "data", "reward", "rollout", "metrics"},
    "peft": {"model"},
    "deepspeed": {"update/zero.py"},
    "lm_eval": {"evaluation"},
    "datasets": {"data"},
    "gymnasium": {"control", "tabular/gym.py", "environments"},
    "matplotlib": {"run", "control", "grue"},
    "rich": {"run", "config", "verbs", "control", "verify", "flywheel", "grue", "people", "cli.py"},
    "httpx2": {"guards", "judge", "rollout", "people"},
    **{
        name: {"people"} for name in ("sqlalchemy", "alembic", "starlette", "uvicorn", "argon2", "nh3", "markdown_it")
    },
}
"""Where a library may be imported: rooms, or files."""

TEST_ONLY = {"pytest", "hypothesis", "beartype", "tests", "unittest", "tiny_models"}


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Every module that is imported anywhere in the source, with its line; relative ones made absolute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module) if x)
            # `from steersman import train` names a room as much as `from steersman.train import rl` does
            found += [
                (node.lineno, f"{module}.{name.name}" if module == "steersman" else module) for name in node.names
            ]
    return found


def sources() -> list[tuple[str, str, list[tuple[int, str]]]]:
    """(path from src, room, imports) of every file."""
    out = []
    for path in sorted(SRC.rglob("*.py")):
        inside = path.relative_to(SRC)
        room = inside.parts[0].removesuffix(".py")
        package = ".".join(["steersman", *inside.parts[:-1]])
        out.append((str(inside), room, imports(path.read_text(), package)))
    return out


@pytest.fixture(scope="module")
def every():
    return sources()


def test_every_room_is_in_the_plan(every):
    rooms = {room for _, room, _ in every if room not in PUBLIC}
    assert rooms <= set(MAY), f"give {rooms - set(MAY)} a place in the plan"
    assert len(rooms) >= 12


def test_imports_point_down(every):
    wrong = []
    for path, room, found in every:
        if room in PUBLIC:
            continue
        for line, module in found:
            parts = module.split(".")
            if parts[0] == "steersman" and len(parts) > 1 and parts[1] != room and parts[1] not in MAY[room]:
                wrong.append(f"{path}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_plan_has_no_circle():
    def below(room: str, seen: tuple[str, ...] = ()) -> None:
        assert room not in seen, f"circle: {' -> '.join([*seen, room])}"
        for other in MAY[room]:
            below(other, (*seen, room))

    for room in MAY:
        below(room)


def test_libraries_stay_in_their_rooms(every):
    wrong = []
    for path, room, found in every:
        for line, module in found:
            homes = HOMES.get(module.split(".")[0])
            if homes is not None and room not in homes and path not in homes:
                wrong.append(f"{path}:{line} imports {module}; its place is {', '.join(sorted(homes))}")
    assert not wrong, "\n".join(wrong)


def test_no_test_helper_in_the_package(every):
    wrong = [
        f"{path}:{line} imports {m}" for path, _, found in every for line, m in found if m.split(".")[0] in TEST_ONLY
    ]
    assert not wrong, "\n".join(wrong)


def test_help_needs_no_model_library(every):
    """`steersman --help` answers at once: the command line imports what it needs when it needs it."""
    heavy = {"torch", "transformers", "steersman"}
    for file in ("cli.py", "verb_table.py"):
        tree = ast.parse((SRC / file).read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top}
        assert not {name for name in names - {"steersman.verb_table"} if name.split(".")[0] in heavy}


def test_the_walk_sees_what_it_should():
    text = "import torch\nfrom steersman import train\nfrom . import x\nfrom ..loss.policy import y\n"
    text += "def f():\n    import gymnasium\n"
    found = {module for _, module in imports(text, "steersman.ops")}
    assert found == {"torch", "steersman.train", "steersman.ops", "steersman.loss.policy", "gymnasium"}
