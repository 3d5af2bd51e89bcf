"""Strict reading of files that others wrote: every error is one line that names the file.

`said` is the flag that named a folder or file, "--model out/kto/model". An error line is
"--model out/kto/model: config.json: JSONDecodeError: Expecting value: line 1 column 1".
"""

import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open


@contextmanager
def reading(said):
    """Turn any error inside into one line. Only read inside: it would hide errors of writing."""
    try:
        yield
    except Exception as error:                               # many libraries have their own
        raise SystemExit(f"{said}: cannot be read ({one_line(error)})") from None


def one_line(error):
    """An exception in one line; of a collective's errors the first."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_path(path, said):
    """Refuse impossible paths, and pipes and devices: reading those may never end."""
    try:
        longest = max(os.fsencode(path).split(b"/"), key=len)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG                                  # opening it will fail, or make it
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error      # without the path, which may be long
        raise SystemExit(f"{said[:300]}: no path ({why})") from None
    if len(longest) > 255:
        raise SystemExit(f"{said[:300]}: no path (a name in it has more than 255 bytes)")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SystemExit(f"{said}: {path} is a pipe or a device; expected a file or a folder")


def read_json(path, said, kind=dict):
    """The object in a JSON file, or with kind=list the array."""
    path = Path(path)
    if not path.is_file():                                   # also a pipe, which would block
        raise SystemExit(f"{said}: no {path.name} there")
    with reading(f"{said}: {path.name}"):
        found = json.loads(path.read_bytes())
        check_kind(found, kind, "its content")
    return found


def check_kinds(found, kinds, said):
    """The values of an object must be of these kinds: {name: kind}."""
    with reading(said):
        for name, kind in kinds.items():
            check_kind(found.get(name), kind, name)


def check_kind(value, kind, name):
    """ValueError for another type. An int must be at least 1: here all are sizes or counts."""
    if type(value) is not kind or (kind is int and value < 1):
        words = {dict: "an object", list: "an array", str: "a text", int: "a number from 1"}
        raise ValueError(f"{name} is {value!r:.60}; expected {words[kind]}")


def tensors_of(folder, said):
    """{file: names of its tensors} of the safetensors files in a folder."""
    files = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        check_path(path, said)
        with reading(f"{said}: {path.name}"):
            files[path] = set(safe_open(path, "pt").keys())
    if not files:
        raise SystemExit(f"{said}: no *.safetensors there; only safetensors weights are loaded")
    return files
