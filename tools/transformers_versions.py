"""The tests that touch transformers' insides, run with the oldest and the newest transformers of pyproject's range.

    python tools/transformers_versions.py [--only oldest] [--short] [--folder build/transformers] [--seconds 3600]

Each version is installed into a folder of its own, FOLDER/transformers-VERSION, with whatever it needs in another
version than the one that runs this; all else, torch among it, is this environment's. A folder that stands is used
again. For each version the tests run, and the fast paths that models of each family take are printed; --short runs
the few that say most. Exit code 1: a test failed, or another version was imported; 75: the version could not be had,
which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["tests/model/test_per_instance.py", "tests/model/test_fused.py", "tests/rollout/test_fast_paths.py"]
TESTS = ["tests/model", "tests/rollout", "--ignore=tests/rollout/remote", "tests/native/test_guards.py",
         "tests/train/test_first_ratio.py"]  # fmt: skip
ENDS = ["oldest", "newest"]
NOT_AVAILABLE = 75
ONE_PROCESS = """
import sys
import pytest
import transformers
version, *words = sys.argv[1:]
if transformers.__version__ != version:
    sys.exit(f"transformers {version} was asked for and {transformers.__version__} is imported")
code = pytest.main(words)
from fast_paths import PATHS, paths_taken, small
transformers.utils.logging.set_verbosity_error()
print(f"transformers {version}; fast paths on:")
for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2"):
    taken = paths_taken(small(family))
    print(f"  {family}: {', '.join(p for p in PATHS if p in taken)}", flush=True)
sys.exit(code)
"""
"""One start of Python for all that is asked of a version: importing torch and transformers takes seconds."""


class NotAvailableError(Exception):
    """A version that can not be installed here and now."""


def wanted() -> Requirement:
    """What pyproject.toml says of transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")


def requirement(which: str) -> str:
    """What pip is asked for."""
    if which == "newest":
        return str(wanted())
    lowest = next(part.version for part in wanted().specifier if part.operator == ">=")
    return f"transformers=={lowest}"


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    ran = subprocess.run(command, text=True, capture_output=True, timeout=300)
    if ran.returncode:
        raise NotAvailableError(ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else "pip failed")
    return ran.stdout


def version_of(which: str, folder: Path) -> str:
    """The version that pip would install; where it can not be asked, one that lies in the folder already."""
    try:
        report = pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", requirement(which))
        return json.loads(report)["install"][0]["metadata"]["version"]
    except (NotAvailableError, subprocess.TimeoutExpired) as error:
        allowed = Requirement(requirement(which)).specifier
        here = sorted((path.name.removeprefix("transformers-") for path in folder.glob("transformers-*")),
                      key=lambda version: [int(part) for part in version.split(".")])  # fmt: skip
        fitting = [version for version in here if allowed.contains(version)]
        if not fitting:
            raise NotAvailableError(
                f"pip can not say what {requirement(which)} is ({error}), and {folder} has none"
            ) from error
        return fitting[-1]


def environment(version: str, folder: Path) -> Path:
    """The folder with this version, and what it needs otherwise than this environment has it."""
    target = folder / f"transformers-{version}"
    if not (target / "transformers").is_dir():
        pip("install", "--no-deps", "--target", str(target), f"transformers=={version}")
    (told,) = target.glob("transformers-*.dist-info/METADATA")
    needs = [Requirement(r) for r in metadata.PathDistribution(told.parent).requires or []]
    here = {path.name.rpartition("-")[0].lower().replace("_", "-") for path in target.glob("*.dist-info")}
    others = [str(need) for need in needs if not need.marker and need.name not in here and not satisfied(need)]
    if others:
        pip("install", "--no-deps", "--target", str(target), *others)
    return target


def satisfied(need: Requirement) -> bool:
    try:
        return need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def run(which: str, folder: Path, *, short: bool, seconds: int) -> int:
    version = version_of(which, folder)
    places = [str(ROOT / "src")]
    if version != metadata.version("transformers"):
        places.insert(0, str(environment(version, folder)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    print(f"transformers {version} ({which})", flush=True)
    # slow: the test that starts this script
    words = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not vllm", *(SHORT if short else TESTS)]
    command = [sys.executable, "-c", ONE_PROCESS, version, *words]
    return subprocess.run(command, env=env, cwd=ROOT, timeout=seconds).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ENDS, help="leave out for both")
    parser.add_argument("--short", action="store_true")
    folder = os.environ.get("STEERSMAN_TRANSFORMERS", str(ROOT / "build" / "transformers"))
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--seconds", type=int, default=3600)
    args = parser.parse_args()
    failed = 0
    for which in [args.only] if args.only else ENDS:
        try:
            failed |= run(which, args.folder, short=args.short, seconds=args.seconds) != 0
        except (NotAvailableError, subprocess.TimeoutExpired) as error:
            print(f"the {which} transformers of the range: {error}", file=sys.stderr)
            return NOT_AVAILABLE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
