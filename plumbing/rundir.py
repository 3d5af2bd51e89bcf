"""The run's folder: started, resumed, and overwritten only with --overwrite.

    config.json     every setting, where it came from, versions, commit
    metrics.jsonl   one line per optimiser step
    checkpoint/     what --resume needs; reference-K.safetensors: the reference's log-probs
    model/          what transformers loads;  eval.json, samples.md, curves.png: the results
"""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

from plumbing.reading import check_kinds, check_path, read_json

FILES = ("config.json", "metrics.jsonl", "curves.png", "frontier.png", "samples.md", "eval.json",
         "checkpoint", "model", "targets.json", "ordering.safetensors", "comparison.jsonl",
         "pairs_key.json")
ABOUT_THE_MACHINE = {"origin", "processes", "versions", "commit"}


def check(config):
    """Refuse to replace a run without --overwrite, and to delete files that are not a run's."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: is a file; expected a folder")
    there = set()                                            # listed once: others may write now
    if out.is_dir():
        there = {path.name for path in out.iterdir()}
    is_run = "config.json" in there and (out / "config.json").is_file()
    if config.resume and not is_run:
        raise SystemExit(f"--resume: {out} holds no run (no config.json); start without --resume")
    if config.resume:
        refuse_strange_kinds(out)
    if config.resume or config.dry_run or not out.is_dir():
        return
    if is_run and not config.overwrite:
        raise SystemExit(f"--out {out}: a run is there already; --resume continues it, "
                         "--overwrite replaces it, or choose another --out")
    begun = {"lock"}
    if "lock" in there:                                      # a run was killed as it began
        begun |= {"metrics.jsonl", "metrics.jsonl.tmp", "config.json.tmp"}
    if not is_run and there - begun:
        raise SystemExit(f"--out {out}: holds files that are not a run's; choose another folder")


def parts(out):
    """Everything that a run may leave in its folder."""
    return [*(out / name for name in FILES), *out.glob("stage-*"), *out.glob("reference-*")]


def refuse_strange_kinds(out):
    for path in parts(out):
        if path.exists() and path.suffix != ".tmp" and path.is_dir() != (path.suffix == ""):
            kind = "a folder, not a file" if path.is_dir() else "a file, not a folder"
            raise SystemExit(f"--resume: {path} is {kind}; move it away, or --overwrite")


def prepare(out, record, done):
    """Write config.json; delete what a replaced or killed run has left."""
    if not done:
        for path in parts(out):
            remove(path)
    for path in [*out.glob("*.tmp"), *out.glob("checkpoint/*.tmp")]:
        remove(path)
    lines = []
    if done and (out / "metrics.jsonl").is_file():
        lines = (out / "metrics.jsonl").read_text(errors="replace").splitlines()
    kept = {step_of(line): line for line in lines if step_of(line) < done}     # others are rerun
    write(out / "metrics.jsonl", "".join(line + "\n" for line in kept.values()))
    write(out / "config.json", json.dumps(record, indent=2) + "\n")


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def step_of(line):
    """The step of a line of metrics.jsonl; infinity for a broken line."""
    try:
        found = json.loads(line)
        numbers = all(isinstance(value, (int, float, type(None))) for value in found.values())
        return int(found["step"]) if numbers else float("inf")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return float("inf")


def read_config(out, said="--resume, or --overwrite", **kinds):
    """config.json of a run. kinds: types of the entries that will be used, init=str."""
    found = read_json(out / "config.json", f"{said}: {out}")
    check_kinds(found, kinds, f"{said}: {out}: config.json")
    return found


def refuse_changes(out, record, may_change):
    """Refuse to resume with other settings, except those in `may_change`."""
    old = read_config(out)
    changed = [f"{key} was {old[key]}, is {record[key]}"
               for key in sorted(record.keys() & old.keys() - may_change - ABOUT_THE_MACHINE)
               if old[key] != record[key]]
    if changed:
        raise SystemExit(f"--resume: settings changed since {out} was started: "
                         f"{'; '.join(changed)}")


def write(path, text):
    """Write a file under another name, rename it, and wait until it is on the disk."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise SystemExit(f"{path}: cannot be written ({e.strerror})") from None


@contextmanager
def locked(path, wait=True):
    """Hold a lock file. If another process holds it: wait, or end with one line."""
    check_path(path, f"--out {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as e:
        raise SystemExit(f"--out {path.parent}: cannot be written to ({e.strerror})") from None
    with file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:                                  # Windows: two runs are not guarded
            pass
        except BlockingIOError:
            raise SystemExit(f"--out {path.parent}: another run is writing there; wait for it, "
                             "or choose another --out") from None
        yield


def commit():
    """The git commit of this code, with "-dirty" if files differ from it; None without git.

    Changes in results/ do not count: earlier runs have written them.
    """
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], text=True,
                              capture_output=True, timeout=5, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
