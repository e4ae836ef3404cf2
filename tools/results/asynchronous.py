"""Makes, or goes on with, everything that docs/results/asynchronous.md shows, and writes the page.

    python tools/results/asynchronous.py --python ../env/vllm/bin/python --model HuggingFaceTB/SmolLM2-135M-Instruct

`--parts` names some of its parts. Each is a script beside this one that goes on where it was, so this command may be
stopped and given again; timings (`speed`) want a machine that does nothing else. Without `--python` what needs vLLM
is left out. What went wrong in one part does not keep the others from being made; the exit code tells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each part that can be made."""
    docs = ["--docs", str(given.docs)]
    vllm = ["--python", str(given.python)]
    learning = str(HERE / "asynchronous_learning.py")
    kills = [str(HERE / "asynchronous_kills.py"), *docs]
    found = {
        "kills": [*kills, "--kills", str(given.kills)],
        "vllm-kills": [
            *kills, "--kills", str(max(given.kills // 10, 1)), "--cases", "vllm", *vllm, "--out",
            "runs/asynchronous-kills-vllm",
        ],
        "tokens": [str(HERE / "asynchronous_tokens.py"), *docs],
        "lag": [learning, "lag"],
        "engines": [learning, "engines", *vllm],
        "receipts": [learning, "receipts", *vllm, "--model", str(given.model)],
        "draw": [learning, "draw", *docs],
        "speed": [str(HERE.parents[1] / "benchmarks" / "asynchronous.py")],
        "page": [str(HERE / "asynchronous_page.py"), *docs],
    }  # fmt: skip
    missing = {"vllm-kills", "engines"} if given.python is None else set()
    if given.python is None or given.model is None:
        missing |= {"receipts"}
    return {name: command for name, command in found.items() if name not in missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the Python that has vLLM")
    parser.add_argument("--model", help="the chat model of `receipts`")
    parser.add_argument("--kills", type=int, default=100, help="of our engine; a tenth of it with vLLM")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--parts", nargs="+", help="such as kills lag page")
    given = parser.parse_args()
    made = commands(given)
    wrong = []
    for name in given.parts or made:
        if name not in made:
            parser.error(f"no part {name}: there are {', '.join(made)} (some need --python, --model)")
        print(f"-- {name}", flush=True)
        if subprocess.run([sys.executable, *made[name]], check=False).returncode:
            wrong.append(name)
    print(f"not right: {', '.join(wrong)}" if wrong else "all made")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
