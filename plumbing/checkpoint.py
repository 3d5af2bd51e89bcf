"""Checkpoints, from which a run is resumed, and the export of its model.

A checkpoint is a folder of safetensors: the trained weights, AdamW's two moments of each, and the
weights of a moving reference. state.json has the steps done, AdamW's counter and running means. The
order of the data and every random number are functions of (seed, step), so no generator's state is
stored.

torch.distributed.checkpoint reads these files and writes shards. So a run can be resumed with
another number of processes, replicated or sharded. (Its import takes 2 seconds, so whole tensors
are written without it.) Nothing is unpickled. A folder is written under another name and then
renamed: it is complete or absent. The last two are kept.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import parallel
from plumbing.reading import check_kind, one_line, read_json, reading, tensors_of
from plumbing.rundir import remove, write

warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# --- checkpoints --------------------------------------------------------------------------------

def contents(policy, optimizer, reference=None):
    """All tensors of a checkpoint by name. Loading fills them in place."""
    tensors = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            tensors[f"policy.{name}"] = p.detach()
            tensors[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    if reference is not None:
        for name, p in reference.named_parameters():
            tensors[f"reference.{name}"] = p.detach()
    return tensors


def save(folder, step, policy, optimizer, running, reference=None):
    """Write the checkpoint after `step` steps."""
    path = Path(folder) / f"step-{step:06d}"
    beside = path.with_suffix(".tmp")
    if parallel.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    parallel.barrier()
    tensors = contents(policy, optimizer, reference)
    try:
        if parallel.sharded(policy):
            write_shards(beside, tensors)
        elif parallel.rank == 0:
            write_whole(beside, tensors)
        if parallel.rank == 0:
            updates = max(int(state["step"]) for state in optimizer.state.values())
            state = {"step": step, "updates": updates, "running": running,
                     "files": len(list(beside.glob("*.safetensors")))}
            write(beside / "state.json", json.dumps(state))
            remove(path)
            os.replace(beside, path)
            for old in saved(folder)[:-2]:
                remove(old)
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{path}: the checkpoint cannot be written ({one_line(e)}); "
                         "the ones before it are untouched: make room, then --resume") from None
    parallel.barrier()


AT_ONCE = 64                            # tensors per file, which is assembled in main memory


def write_whole(folder, tensors):
    names = sorted(tensors)
    for start in range(0, len(names), AT_ONCE):
        some = {name: tensors[name].cpu().contiguous() for name in names[start:start + AT_ONCE]}
        save_file(some, folder / f"tensors-{start:05d}.safetensors")


def write_shards(folder, tensors):
    """Every process writes its own shards."""
    import torch.distributed.checkpoint as dcp
    files = {name: 1 + k // AT_ONCE for k, name in enumerate(sorted(tensors))}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=files, save_distributed=True))
    except dcp.CheckpointException as e:
        raise OSError(one_line(e)) from None


def load(folder, policy, optimizer, running, reference=None):
    """Fill everything in from the newest checkpoint that can be read.   -> steps done"""
    import torch.distributed.checkpoint as dcp
    for path in reversed(saved(folder)):
        try:
            state = read_json(path / "state.json", path)
            check(path, state)
            reader = dcp.HuggingFaceStorageReader(str(path))
            dcp.load(contents(policy, optimizer, reference), storage_reader=reader)
        except (Exception, SystemExit, dcp.CheckpointException) as e:
            parallel.say(f"--resume: {path} cannot be read ({one_line(e)}); "
                         "going back to the one before it")
            continue
        for of_weight in optimizer.state.values():
            of_weight["step"].fill_(state["updates"])
        running.update(state["running"])
        return state["step"]
    if saved(folder):
        raise SystemExit(f"--resume: no checkpoint in {folder} can be read; --overwrite starts "
                         "again")
    return 0


def check(path, state):
    """ValueError if a file is missing, which dcp would skip silently, or state.json is wrong."""
    if state["step"] != steps_of(path):
        raise ValueError(f"step is {state['step']!r:.60}")
    check_kind(state["updates"], int, "updates")
    if not all(isinstance(value, (int, float)) for value in state["running"].values()):
        raise ValueError(f"running is {state['running']!r:.60}")
    found = len(tensors_of(path, path))
    if found != state["files"]:
        raise ValueError(f"{found} of {state['files']} files are there")


def saved(folder):
    """The complete checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if not path.suffix]
    return sorted(found, key=steps_of)


def steps_of(path):
    """step-000250 -> 250. As texts, step-1000000 would come before step-999999."""
    name = path.name.removeprefix("step-")
    return int(name) if name.isdigit() else -1


# --- the model and the reference's table --------------------------------------------------------

def export(policy, folder, tokenizer, *, adapter=False):
    """Write the model to `folder` in Hugging Face format; a sharded one is gathered first."""
    folder = Path(folder)
    beside = folder.with_suffix(".tmp")
    how = {"adapter": True} if adapter else {}
    if parallel.sharded(policy):
        how["weights"] = gathered(policy)
    if parallel.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        try:
            policy.save(beside, eot=tokenizer.eot, **how)
            tokenizer.save(beside)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(beside, folder)
        except (OSError, SafetensorError) as e:
            raise SystemExit(f"{folder} cannot be written ({one_line(e)}): make room, then "
                             "--resume") from None
    parallel.barrier()


def gathered(policy):
    """Whole weights of a sharded policy by name, in main memory of process 0."""
    weights = {}
    for name, p in policy.named_parameters():
        tensor = parallel.whole(p.detach())
        if parallel.rank == 0:
            weights[name] = tensor.cpu()
    return weights


def save_table(path, table):
    if parallel.rank == 0:
        beside = path.with_suffix(".tmp")
        save_file({"logps": table}, beside)
        os.replace(beside, path)
    parallel.barrier()


def load_table(path, shape):
    with reading(f"--resume: {path}"), safe_open(path, "pt") as file:
        table = file.get_tensor("logps")
        if table.shape != shape:
            raise ValueError(f"its shape is {list(table.shape)}; expected {list(shape)}")
    return table
