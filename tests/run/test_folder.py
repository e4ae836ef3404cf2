"""The run folder: one process, one run, whole files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import Field

from steersman.atomic import check_places, locked, recover, replace_dir, save_dir, write_atomic
from steersman.config.load import load_recipe
from steersman.config.sections import Section
from steersman.jsonl import append_jsonl
from steersman.run.files.folder import RunFolder, held
from steersman.run.files.log import FILES, SOMETIMES, Log
from steersman.types import SteersmanError


class Recipe(Section):
    rate: float = Field(0.1, description="rate")
    name: str = Field("a", description="name")


def python(code: str, *args: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args], text=True, stdout=subprocess.PIPE,
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


HOLDER = """
    import sys
    from pathlib import Path
    from steersman.config.sections import Section
    from steersman.run.files.folder import RunFolder
    from steersman.types import SteersmanError
    try:
        folder = RunFolder(Path(sys.argv[1]), Section(), resume="resume" in sys.argv)
    except SteersmanError as error:
        print("refused:", error)
        sys.exit(2)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_config_is_written_and_reads_back(tmp_path):
    with RunFolder(tmp_path / "a" / "b", Recipe(rate=1e-5)) as folder:
        assert load_recipe(Recipe, folder / "config.yaml", []) == Recipe(rate=1e-5)
        assert held[-1] == folder.path
        assert not folder.resumed


def test_a_folder_with_a_run_is_refused_unless_resuming(tmp_path):
    RunFolder(tmp_path, Recipe()).close()
    with pytest.raises(SteersmanError, match=r"another run already; .*--resume.*--run\.dir"):
        RunFolder(tmp_path, Recipe())
    with RunFolder(tmp_path, Recipe(rate=0.2), resume=True) as folder:
        assert folder.resumed
        assert folder.changes == ["rate: 0.1 -> 0.2"]
        assert (folder / "config.before-resume-1.yaml").exists()
    with RunFolder(tmp_path, Recipe(rate=0.2), resume=True) as folder:
        assert folder.changes == []


class Part(Section):
    first: int = Field(default=1, description="first")
    second: int = Field(default=2, description="a newer key")


class Newer(Recipe):
    offload: bool = Field(default=False, description="a newer key")
    inner: Part = Part(second=3)
    parts: dict[str, Part] = Field(default={}, description="sections by name")


def test_a_key_that_is_newer_than_the_run_changed_nothing_where_it_has_its_default(tmp_path):
    (tmp_path / "config.yaml").write_text("rate: 0.1\nname: a\ninner: {first: 1}\nparts: {x: {first: 5}}\n")
    newer = Newer(parts={"x": Part(first=5)})
    with RunFolder(tmp_path, newer, resume=True) as folder:
        assert folder.changes == []
    (tmp_path / "config.yaml").write_text("rate: 0.1\nname: a\nparts: {x: {first: 5}}\n")
    with RunFolder(tmp_path, newer.model_copy(update={"offload": True}), resume=True) as folder:
        assert folder.changes == ["offload: False -> True"]


def test_a_key_that_is_gone_since_the_run_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("rate: 0.1\nname: a\nold: 4\n")
    with RunFolder(tmp_path, Recipe(), resume=True) as folder:
        assert folder.changes == ["old: 4 -> not there"]


def test_resume_where_nothing_was_yet_starts_fresh(tmp_path):
    with RunFolder(tmp_path / "new", Recipe(), resume=True) as folder:
        assert not folder.resumed


def test_two_processes_one_folder(tmp_path):
    first = python(HOLDER, str(tmp_path))
    try:
        assert first.stdout.readline() == "held\n"
        out, err = python(HOLDER, str(tmp_path), "resume").communicate(timeout=60)
        assert "refused" in out, err
        assert f"process {first.pid} is writing to it" in out
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    # the lock dies with its holder, however that died
    with RunFolder(tmp_path, Section(), resume=True):
        pass


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(SteersmanError, match="can not be made"):
        RunFolder(tmp_path / "f", Recipe())


FILL = """
    import resource, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from steersman.run.files.checkpoint import Checkpointer
    from steersman.atomic import save_dir, write_atomic
    from steersman.types import SteersmanError

    root = Path(sys.argv[1])
    big = {"w": torch.zeros(1_000_000)}
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    keeper = Checkpointer(root)
    write_atomic(root / "f.bin", b"old")
    save_dir(root / "model", lambda d: save_file({"w": torch.ones(3)}, d / "w.safetensors"))
    keeper.save(1, {"w": torch.ones(3)})
    for attempt in (
        lambda: write_atomic(root / "f.bin", b"new" * 1_000_000),
        lambda: save_dir(root / "model", lambda d: save_file(big, d / "w.safetensors")),
        lambda: save_dir(root / "model", lambda d: torch.save(big, d / "w.pt")),
        lambda: keeper.save(2, big),
    ):
        try:
            attempt()
            print("no error")
        except SteersmanError as error:
            print("said:", error)
    print((root / "f.bin").read_bytes(), sorted(p.name for p in root.rglob("*") if p.is_file()))
    print("latest", keeper.load().step, keeper.load().state)
"""


EARLY = """
    import resource, sys
    from pathlib import Path
    from rich.console import Console
    from steersman.config.sections import Section
    from steersman.run.files.folder import RunFolder
    from steersman.run.files.log import Log
    from steersman.types import SteersmanError

    root = Path(sys.argv[1])

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def logged():
        with RunFolder(root / "log", Section()) as folder, Log(folder.path, title="t", total=9) as log:
            limit(300)
            for step in range(99):
                log.step(step, {"loss": 1.0})

    for size, attempt in (
        (0, lambda: RunFolder(root / "lock", Section())),
        (10, lambda: RunFolder(root / "inputs", Section())),
        (resource.RLIM_INFINITY, logged),
    ):
        limit(size)
        try:
            attempt()
        except SteersmanError as error:
            limit(resource.RLIM_INFINITY)
            print("said:", error)
    print(sorted(p.name for p in root.iterdir()), (root / "log/metrics.jsonl").read_text().count("loss"))
"""


def test_a_disk_that_is_full_at_the_start_or_under_the_log_is_told_once(tmp_path):
    out, err = python(EARLY, str(tmp_path)).communicate(timeout=60)
    said = [line for line in out.splitlines() if line.startswith("said:")]
    assert ["/lock/.lock: the disk is full" in said[0], "/inputs/inputs.json" in said[1]] == [True, True], out + err
    assert "/log/metrics.jsonl: the disk is full" in said[2]
    assert "Error" not in err
    rows = 300 // len('{"step": 0, "seconds": 0.0, "loss": 1.0}\n')
    assert out.splitlines()[-1].startswith("['log']"), "what was refused before it began left nothing"
    assert rows - 1 <= int(out.split()[-1]) <= rows + 1


def check_full_disk(out: str, err: str) -> None:
    assert out.count("said:") == 4, out + err
    assert out.count("the disk is full") == 4
    assert "make room and run again" in out
    assert "b'old' ['f.bin', 'manifest.json', 'state.pt', 'w.safetensors']" in out
    assert "latest 1 {'w': tensor([1., 1., 1.])}" in out


def test_size_limit_leaves_what_was_saved(tmp_path):
    check_full_disk(*python(FILL, str(tmp_path), "limit").communicate(timeout=60))


def test_a_disk_that_really_fills(tmp_path):
    mount = f"mount -t tmpfs -o size=900k tmpfs {tmp_path}"
    can = shutil.which("unshare") and subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True)
    if not can or can.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    code = [sys.executable, "-c", textwrap.dedent(FILL), str(tmp_path), "tmpfs"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *code], capture_output=True, text=True
    )
    check_full_disk(done.stdout, done.stderr)


def test_replacing_a_folder_and_a_kill_between_the_renames(tmp_path):
    final = tmp_path / "run" / "model"
    save_dir(final, lambda d: (d / "x").write_text("1"))
    save_dir(final, lambda d: (d / "x").write_text("2"))
    assert (final / "x").read_text() == "2"
    assert [p.name for p in final.parent.iterdir()] == ["model"]

    def killed_inside(d: Path) -> None:
        (d / "x").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_dir(final, killed_inside)
    assert (final / "x").read_text() == "2"
    # what a SIGKILL after the first rename of replace_dir leaves behind
    final.rename(final.with_name(".old-model"))
    (final.parent / ".tmp-model").mkdir()
    with RunFolder(final.parent, Recipe(), resume=True):
        assert (final / "x").read_text() == "2"
        assert not (final.parent / ".tmp-model").exists()


def test_write_atomic_never_shows_a_half(tmp_path):
    write_atomic(tmp_path / "a", "ä" * 10)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä" * 10
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_text("1")
    replace_dir(tmp_path / "t", tmp_path / "u")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "u"]


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file of the user's, to which links in a folder of somebody else's lead."""
    file = tmp_path / "authorized_keys"
    file.write_text("ssh-ed25519 AAAA my only key\n")
    return file


def test_a_start_that_is_refused_has_written_through_no_link(tmp_path, victim):
    run = tmp_path / "run"
    RunFolder(run, Recipe()).close()
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(victim)
    for resume in (False, True):
        with pytest.raises(SteersmanError, match=r"\.lock: it is a link \(to .*authorized_keys\).*remove the link"):
            RunFolder(run, Recipe(), resume=resume)
    assert victim.read_text() == "ssh-ed25519 AAAA my only key\n"


@pytest.mark.parametrize("name", [*FILES, *SOMETIMES])
def test_a_log_goes_through_no_link(tmp_path, victim, name):
    """Neither to what is there nor to what is not."""
    for target in (victim, tmp_path / "bash_profile"):
        run = tmp_path / f"run-{target.name}"
        run.mkdir()
        (run / name).symlink_to(target)
        with pytest.raises(SteersmanError, match=f"{name}: it is a link"):
            Log(run, title="t", total=1)
        with pytest.raises(SteersmanError, match=f"{name}: it is a link"):
            append_jsonl(run / name, {"a": 1})
    assert victim.read_text() == "ssh-ed25519 AAAA my only key\n"
    assert not (tmp_path / "bash_profile").exists()


def test_what_is_written_beside_its_place_goes_through_no_link(tmp_path, victim):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (other / "kept").touch()
    (run / ".tmp-a.json").symlink_to(victim)
    write_atomic(run / "a.json", "{}")
    (run / ".tmp-b.json").symlink_to(tmp_path / "made")
    check_places(run / "b.json")
    assert not (tmp_path / "made").exists()
    (run / ".lock-c").symlink_to(victim)
    with pytest.raises(SteersmanError, match="it is a link"), locked(run / "c"):
        pass
    (run / "model").symlink_to(other)
    for _ in range(2):
        (run / ".tmp-model").symlink_to(other)
        (run / ".old-model").symlink_to(other)
        save_dir(run / "model", lambda folder: (folder / "w").touch())
    (run / ".tmp-step-3").symlink_to(other)
    recover(run)
    assert victim.read_text() == "ssh-ed25519 AAAA my only key\n"
    assert [p.name for p in other.iterdir()] == ["kept"]
    assert (run / "a.json").read_text() == "{}"
    assert sorted(p.name for p in run.iterdir()) == [".lock-c", "a.json", "model"]
    assert [p.name for p in (run / "model").iterdir()] == ["w"]
    assert not (run / "model").is_symlink()
