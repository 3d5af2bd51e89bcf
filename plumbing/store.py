"""results/runs.jsonl: one line per run of experiments.py, added when the run ends.

    {"arm": "dpo --beta 0.5", "seed": 3, "code": "1f2e3d4c5b", "commit": "...", "reward": 1.93, ...}

`code` is a hash of the code that the run depends on, without comments and docstrings. A run whose
code has changed since is stale: it still counts, and `experiments.py --refresh` makes it anew.
"""

import ast
import hashlib
import inspect
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

import data
import evaluate
import model
import objective
import recipes
import rollouts
import train
import world
from plumbing import rundir
from plumbing.arms import run_arm

PATH = Path(__file__).parents[1] / "results" / "runs.jsonl"
SHARED = (data, evaluate, model, objective, rollouts, train, world)      # by all runs
SETTINGS = {"SETTINGS", "ONLINE"}                        # an arm's flags have its loss's settings


# --- the file -------------------------------------------------------------------------------------

def read(path=PATH):
    """{arm's key: {seed: run}}; of two lines about one run the later one counts."""
    store = {}
    if path.exists():
        for line in path.read_text().splitlines():
            run = json.loads(line)
            store.setdefault(run["arm"], {})[run["seed"]] = run
    return store


def add(run, path=PATH):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(rounded(run)) + "\n")


def tidy(path=PATH):
    """Sort the lines by arm and seed, and drop those that later ones have replaced."""
    store = read(path)
    runs = [store[key][seed] for key in sorted(store) for seed in sorted(store[key])]
    rundir.write(path, "".join(json.dumps(run) + "\n" for run in runs))


def rounded(found):
    """To six digits, which is far below any run's noise."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


# --- what a run depends on ------------------------------------------------------------------------

@lru_cache(maxsize=None)
def code_of(loss):
    """Ten digits for the code behind a run with this loss."""
    digest = hashlib.sha256()
    used = recipes.find(loss).loss
    losses = [term[1] for term in getattr(used, "terms", [(1, used)])]     # a sum has several
    for part in (*SHARED, *losses):
        digest.update(without_prose(inspect.getsource(part)).encode())
    return digest.hexdigest()[:10]


def without_prose(source):
    """The code as text, without comments, docstrings and the settings of single losses."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            node.body = [part for part in node.body if not is_prose(part)] or [ast.Pass()]
    return ast.unparse(tree)


def is_prose(node):
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None) in SETTINGS
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_stale(run):
    return run["code"] != code_of(run["arm"].partition(" --")[0].partition(" |")[0])


# --- running --------------------------------------------------------------------------------------

def missing(arms, seeds, store, refresh=False):
    """[(arm, seed), ...] that the store lacks, all arms of seed 0 first, then of seed 1, ..."""
    jobs = []
    for seed in range(max(seeds.values(), default=0)):
        for arm in arms:
            run = store.get(arm.key, {}).get(seed)
            if seed < seeds[arm] and (run is None or refresh and is_stale(run)):
                jobs.append((arm, seed))
    return jobs


def make(jobs, out, processes, path=PATH, quick=False):
    """Run the jobs, `processes` at a time; each is stored when it ends."""
    commit = rundir.commit()
    code = {arm.loss: code_of(arm.loss) for arm, _ in jobs}              # before anybody edits it
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool, tqdm(total=len(jobs), unit="run") as bar:
        running = {pool.submit(run_arm, arm, seed, out, quick): (arm, seed) for arm, seed in jobs}
        for done in as_completed(running):
            arm, seed = running[done]
            try:
                found = done.result()
            except Exception as error:                   # one arm's fault is not the others'
                found = {"failed": f"{type(error).__name__}: {error}"}
            if "failed" in found:
                tqdm.write(f"{arm.key}, seed {seed}: {found['failed']}")
            about = {"arm": arm.key, "seed": seed, "code": code[arm.loss], "commit": commit}
            add(about | found, path)
            bar.update()
    tidy(path)
