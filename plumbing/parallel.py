"""Several processes that compute one step. With one process every function here does nothing.

Processes exchange only sums: each one fills in its part of a table and leaves the rest 0.

Two layouts. Replicated: every process has the whole model, and gradients are summed here.
Sharded (torch's fully_shard, FSDP2): every process keeps its part of every layer, a layer is
gathered when it is needed, and gradients are summed in backward. A sharded model hangs unless all
processes run equally many forwards, so `deal` gives them equally many parts.
"""

import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import token_batches

rank = int(os.environ.get("RANK", 0))
size = int(os.environ.get("WORLD_SIZE", 1))
local = int(os.environ.get("LOCAL_RANK", 0))
device = torch.device("cpu")                                # of this process, after `join`
store = None                                                # keys and values that all can read


# --- meeting and talking ------------------------------------------------------------------------

def join(name="", timeout=1800):
    """Meet the other processes that torchrun has started.   -> this process's device"""
    global device, store
    cuda = name.startswith("cuda") if name else torch.cuda.is_available()
    device = torch.device(f"cuda:{local}" if cuda else name or "cpu")
    if cuda:
        torch.cuda.set_device(local)
    if size > 1 and not dist.is_initialized():
        if size == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
            # One machine: its processes talk over loopback, where nobody else can listen.
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        wait = timedelta(seconds=timeout)
        first, *_ = next(dist.rendezvous("env://", timeout=wait))
        # torchrun keeps one store for all its restarts. Without a prefix of its own, a restart
        # would use the addresses of the processes that have died.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), first)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    barrier()                                               # until all have looked at --out
    return device


def say(*words):
    if rank == 0:
        print(*words, flush=True)


def bar(total, what, initial=0):
    """A progress bar with rate and time left, on process 0."""
    return tqdm(total=total, initial=initial, desc=what, disable=rank != 0, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 20)


def watch(items, what):
    """Yield the items; after two seconds process 0 shows a progress bar."""
    return tqdm(items, desc=what, disable=rank != 0, dynamic_ncols=True, delay=2, unit=" rows",
                mininterval=0.5 if sys.stderr.isatty() else 20)


def barrier():
    if size > 1:
        dist.barrier()


def total(tensor):
    """The sum of `tensor` over all processes, on the CPU."""
    if size > 1:
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor.cpu()


@contextmanager
def alone():
    """This process works by itself: nothing is dealt out, nothing is summed."""
    global rank, size
    before = rank, size
    rank, size = 0, 1
    try:
        yield
    finally:
        rank, size = before


def use_threads(policy):
    """Below a million weights matmuls are too small to share between threads."""
    cores = os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    small = sum(p.numel() for p in policy.parameters()) < 1e6
    torch.set_num_threads(1 if small else share)


def any_of(list_):
    """True if the list of any process is not empty."""
    return bool(total(torch.tensor(float(len(list_)))))


def until_first_is_done():
    """Wait for process 0, which works alone at the end. A barrier would end after --timeout."""
    if size > 1 and rank == 0:
        store.set("done", "yes")
    elif size > 1:
        store.wait(["done"], timedelta(days=7))


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_say(line):
    """True if no other process has said this line: an error of all is printed once."""
    if store is None:
        return rank == 0
    try:
        return store.add(line, 1) == 1
    except RuntimeError:                                    # torchrun, which holds it, has ended
        return True


# --- sharing a batch out ------------------------------------------------------------------------

def deal(units, budget, micro_batch_size=0):
    """This process's parts of a batch: [(indices, weight), ...], equally many on every process.

    Process r takes every size-th unit from the r-th on, `micro_batch_size` at a time, or as many
    as fit into `budget` tokens. A process with fewer parts repeats unit 0 with weight 0.
    """
    def parts_of(process):
        share = range(process, len(units), size)
        if micro_batch_size:
            starts = range(0, len(share), micro_batch_size)
            return [list(share[start:start + micro_batch_size]) for start in starts]
        return [list(share[part.start:part.stop])
                for part in token_batches([units[i] for i in share], budget)]

    parts = [parts_of(process) for process in range(size)]
    most = max(len(of_one) for of_one in parts)
    surplus = most - len(parts[rank])
    return [(part, 1.0) for part in parts[rank]] + [([0], 0.0)] * surplus


def sum_gradients(module):
    """Replace every gradient by its sum over processes. A missing one counts as 0."""
    if sharded(module):                                     # FSDP has summed in backward
        return
    for p in module.parameters():
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if size > 1:
            dist.all_reduce(p.grad)


def precision(dtype, where=None):
    """bf16: autocast, with weights in float32. Other dtypes: nothing, the weights decide."""
    if dtype != "bf16":
        return nullcontext()
    return torch.autocast((where or device).type, torch.bfloat16)


# --- models larger than one GPU -----------------------------------------------------------------

def sharded(module):
    return hasattr(module, "unshard")                       # fully_shard adds this method


def whole(tensor):
    """A whole tensor, of which each process may hold a part. All processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_sharded(load, dtype):
    """Call `load()` for a policy, and keep this process's part of every block.

    Embedding and head are sharded with the root module. The processes of a machine load one after
    the other, so main memory holds only one whole model. bf16: parts stay float32, a block is
    gathered and computed in bf16, and gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh(device.type, (size,))
    refusal = None
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        if turn == local:
            try:
                policy = load()
                shard(policy, mesh, dtype)
            except SystemExit as e:                         # raised later: others wait at barriers
                refusal = e
        barrier()
    if refusal:
        raise refusal
    return policy


def shard(policy, mesh, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if not policy.flat:
        raise SystemExit("--fsdp: this architecture needs padded rows, and how often these call "
                         "the model depends on the data")
    mixed = MixedPrecisionPolicy()
    if dtype == "bf16":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*policy.blocks("fsdp"), policy]:
        fully_shard(module, mesh=mesh, mp_policy=mixed)
        module.set_gradient_divide_factor(1.0)              # the loss is divided by n already
        module.set_force_sum_reduction_for_comms(True)      # a plain sum: gloo has no scaled one
