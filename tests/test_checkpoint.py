"""A checkpoint brings everything back, is whole or not there, and runs no code."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from lab import run
from plumbing import checkpoint
from plumbing import run as plumbing_run
from plumbing.settings import Config
from test_split import lab, run_all, same_run, without_reports, words_of  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Learner:
    """A policy, its optimiser, a moving reference and a running mean; `learn` changes them all."""

    def __init__(self, seed=0, width=3):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(width, width) for _ in range(20)]      # 122 tensors: two files
        self.policy = torch.nn.Sequential(*layers).double()
        self.reference = torch.nn.Linear(2, 2)
        self.optimizer = train.make_optimizer(self.policy, Config())
        self.running = {}

    def learn(self):
        for p in self.policy.parameters():
            p.grad = torch.randn_like(p)
        self.optimizer.step()
        with torch.no_grad():
            self.reference.weight.add_(0.1)
        self.running["reward_sum"] = self.running.get("reward_sum", 0.0) + 1 / 3

    def save(self, folder, step):
        checkpoint.save(folder, step, self.policy, self.optimizer, self.running, self.reference)

    def load(self, folder):
        return checkpoint.load(folder, self.policy, self.optimizer, self.running, self.reference)

    def state(self):
        tensors = [*self.policy.parameters(), *self.reference.parameters()]
        for of_one in self.optimizer.state_dict()["state"].values():
            tensors += of_one.values()
        return [tensor.tolist() for tensor in tensors], self.running


@pytest.fixture
def saved(tmp_path):
    """(folder, {steps: the learner as it was then}) of checkpoints 2 and 4."""
    learners = {}
    for steps in (2, 4):
        learners[steps] = Learner()
        for _ in range(steps):
            learners[steps].learn()
        learners[steps].save(tmp_path / "checkpoint", steps)
    return tmp_path / "checkpoint", learners


def test_what_is_loaded_is_what_was_saved_and_learns_on_alike(saved):
    folder, learners = saved
    other = Learner(seed=1)
    assert other.load(folder) == 4 and other.state() == learners[4].state()
    for learner in (other, learners[4]):
        torch.manual_seed(2)
        learner.learn()
    assert other.state() == learners[4].state()              # Adam's counter, too


def test_the_last_two_are_kept_and_a_half_one_is_not_seen(saved):
    folder, learners = saved
    (folder / "step-000009.tmp").mkdir()
    learners[4].save(folder, 6)
    assert [path.name for path in checkpoint.saved(folder)] == ["step-000004", "step-000006"]


def test_the_newest_is_found_by_its_number(saved):
    folder, learners = saved
    for steps in (999_998, 999_999, 1_000_000):
        learners[4].save(folder, steps)
    assert [path.name for path in checkpoint.saved(folder)] == ["step-999999", "step-1000000"]
    assert Learner(seed=1).load(folder) == 1_000_000


# --- damage -------------------------------------------------------------------------------------

def cut_short(folder):
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def overwritten(folder):
    min(folder.glob("*.safetensors")).write_bytes(b"\xff" * 10_000)


def one_file_gone(folder):
    """torch alone would load what is there, and leave the other tensors as they were."""
    max(folder.glob("*.safetensors")).unlink()


def a_tensor_gone(folder):
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


def state_gone(folder):
    (folder / "state.json").unlink()


def half_a_state(folder):
    path = folder / "state.json"
    path.write_text(path.read_text()[:20])


@pytest.mark.parametrize("damage", [cut_short, overwritten, one_file_gone, a_tensor_gone,
                                    state_gone, half_a_state])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, damage, capsys):
    folder, learners = saved
    damage(folder / "step-000004")
    other = Learner(seed=1)
    assert other.load(folder) == 2 and other.state() == learners[2].state()
    assert "step-000004 cannot be read" in capsys.readouterr().out


def refused(learner, folder):
    """It ends in one line, and nothing was loaded."""
    before = learner.state()
    with pytest.raises(SystemExit) as stopped:
        learner.load(folder)
    line = stopped.value.code
    return "--overwrite" in line and "\n" not in line and learner.state() == before


def test_where_none_can_be_read_a_run_does_not_begin_again_unasked(saved):
    folder, _ = saved
    assert refused(Learner(width=4), folder)                 # another model's
    for path in folder.glob("*"):
        cut_short(path)
    assert refused(Learner(), folder)


# --- nothing is unpickled -----------------------------------------------------------------------

class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    """A file that code from a stranger would make."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path))).close()           # the bomb works
    path.unlink()
    yield path
    assert not path.exists(), "code from a file was executed"


def test_a_checkpoint_is_safetensors_and_json_and_no_pickle_is_read(saved, marker):
    folder, _ = saved
    names = {path.name.rpartition(".")[2] for path in folder.glob("*/*")}
    assert names == {"safetensors", "json"}
    for path in folder.glob("*/*"):
        path.write_bytes(pickle.dumps(Bomb(marker)))
    for path in folder.glob("*"):                            # names that torch itself would read
        for name in (".metadata", "model.pt", "pytorch_model.bin"):
            (path / name).write_bytes(pickle.dumps(Bomb(marker)))
    assert refused(Learner(), folder)


# --- the reference's table is part of the run ---------------------------------------------------

def half_a_run(words):
    assert run_all([["run", words, 3]])["run"] == "dead"


def test_a_resumed_run_asks_the_reference_nothing_again(lab, tmp_path, monkeypatch):
    words = words_of(lab, tmp_path / "run", "kto", "--save_every", 2)
    asked = []
    real = plumbing_run.score

    def score(policy, units, what=""):
        asked.append(what)
        return real(policy, units, what)

    monkeypatch.setattr(plumbing_run, "score", score)
    half_a_run(words)
    assert asked == ["reference log-probs"]
    asked.clear()
    run(*words, "--resume")
    assert "reference log-probs" not in asked
    run(*words_of(lab, tmp_path / "whole", "kto"))
    same_run(tmp_path / "whole", tmp_path / "run", 0)


def test_the_table_of_an_overwritten_run_is_not_taken_for_the_new_ones(lab, tmp_path):
    run(*words_of(lab, tmp_path / "run", "kto", "--ref", lab / "moved"))
    run(*words_of(lab, tmp_path / "run", "kto", "--overwrite"))
    run(*words_of(lab, tmp_path / "whole", "kto"))
    same_run(tmp_path / "whole", tmp_path / "run", 0)


def test_a_resumed_run_must_read_the_same_rows(lab, tmp_path):
    """With other rows the reference's table, which goes by number, would be wrong; labels, too."""
    file = tmp_path / "rows.jsonl"
    shutil.copy(lab / "rows.jsonl", file)
    words = words_of(lab, tmp_path / "run", "kto", "--data", file, "--save_every", 2)
    half_a_run(words)
    text = file.read_text()
    flipped = text.splitlines()
    up, down = (next(k for k, line in enumerate(flipped) if label in line)
                for label in ("true", "false"))
    flipped[up] = flipped[up].replace("true", "false")
    flipped[down] = flipped[down].replace("false", "true")   # as many of each as before
    for other in (text.replace("moon", "noon"), "\n".join(flipped)):
        file.write_text(other)
        with pytest.raises(SystemExit, match="--resume: .*rows"):
            run(*words, "--resume")


def test_with_stages_the_number_of_steps_may_not_change(lab, tmp_path):
    """4 steps done are the second stage of 2 x 2, and the first of 2 x 5."""
    words = words_of(lab, tmp_path / "run", "sdpo_stepwise", "--steps", 2, "--stages", 2)
    run(*words)
    with pytest.raises(SystemExit, match="--resume: .*steps was 2, is 5"):
        run(*words, "--resume", "--steps", 5)
