"""Every core file is a lesson that runs: a page that fits the screen, whose numbers are right."""

import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dpo_variants
import objective
import world

ROOT = Path(world.__file__).parent


@cache
def lesson(file):
    """What `python FILE` prints, as lines."""
    done = subprocess.run([sys.executable, file], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and done.stderr == "", (file, done.stderr)
    return done.stdout.splitlines()


def numbers(line):
    return [float(word) for word in re.findall(r"[-+]?\d+\.\d+", line)]


def row(file, name):
    """The numbers of the line that begins with a name."""
    line, = (line for line in lesson(file) if line.startswith(name + " "))
    return numbers(line)


def test_each_lesson_is_a_page_of_40_lines_and_80_columns():
    for file in ("kto", "dpo_variants", "model", "objective", "ppo", "data"):
        lines = lesson(f"{file}.py")
        assert 15 <= len(lines) <= 40, file
        assert [line for line in lines if len(line) > 80] == [], file
        code = (ROOT / f"{file}.py").read_text().partition("\nif __name__")[2]
        code = re.sub(r'print\(f?""".*?"""\)', "print()", code, flags=re.S)
        lines = [line for line in code.splitlines()[1:] if line.strip()]
        assert len(lines) <= 25, file                            # the page's own text apart


def test_the_six_answers_reach_ktos_optimum_in_closed_form():
    ref = [0.15, 0.10, 0.10, 0.30, 0.15, 0.20]
    liked = [0.90, 0.75, 0.55, 0.25, 0.20, 0.05]
    rows = [(p, 2 * q - 1) for p, q in zip(ref, liked)]
    z0 = 0.0
    for _ in range(50):                                          # its fixed point
        best = [p * math.exp(r) for p, r in zip(ref, world.kto_logratios(rows, beta=0.5, z0=z0))]
        z0 = sum(p * math.log(p / q) for p, q in zip(best, ref) if p)
    page = lesson("kto.py")
    found = [numbers(line) for line in page[3:9]]
    for k in range(6):
        assert found[k][0] == ref[k]
        assert found[k][-2:] == pytest.approx([best[k]] * 2, abs=0.002), k
    assert row("kto.py", "z0,")[-1] == pytest.approx(z0, abs=0.005)
    assert row("kto.py", "mean loss")[0] == 0.5
    assert 0 <= numbers(page[-1])[0] < 0.002


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_each_objective_rests_where_its_slope_says_and_the_known_ones_at_their_closed_form():
    for name in dpo_variants.LOSSES:
        loss, slope, rest = row("dpo_variants.py", name)
        assert loss > 0 and 0 < rest <= 1, name
        assert (slope > 0) == (name == "discopop"), name         # the wrong way, as it says
        assert rest > 0.5 or name in ("discopop", "dpop"), name  # dpop's kink keeps it at 1/2
    closed = {"sft": 0.8, "dpo": 0.8, "wpo": 0.8, "sigmoid_norm": 0.8,       # 80 of 100
              "cdpo": 0.8 * 0.9 + 0.2 * 0.1, "rdpo": (0.8 - 0.1) / 0.8,      # labels 10 % wrong
              "ipo": sigmoid(0.6 / (2 * 0.1)),                   # the mean of +-1, times the target
              "ipo_bernoulli": sigmoid(0.6 / (2 * 0.1)),
              "hinge": sigmoid(1), "slic": sigmoid(1),           # the kink
              "rebel": sigmoid(0.6 * 2)}
    for name, rest in closed.items():
        assert row("dpo_variants.py", name)[2] == pytest.approx(rest, abs=0.0051), name
    assert row("dpo_variants.py", "dpo")[:2] == [0.69, -0.30]    # log 2; -(0.8 - 0.2) / 2


def test_the_flat_row_gives_each_response_its_own_log_prob():
    page = lesson("model.py")
    together, apart = (numbers(line) for line in page if "row " in line and numbers(line))
    assert together == apart and len(together) == 3
    tokens = [5, 4, 5]
    for logp, n in zip(together, tokens):
        assert logp / n == pytest.approx(-math.log(257), abs=0.3)            # untrained
    shapes = re.findall(r"\(([\d, ]+)\)$", "\n".join(page), re.M)
    assert shapes == ["21,", "21, 32", "14, 32", "14, 257", "14,", "3,"]


def test_what_the_losses_are_told_is_of_the_policy_that_the_page_names():
    a, b = sigmoid(0.7), sigmoid(-0.7)
    assert row("objective.py", "chosen_logratios, rejected_logratios") == pytest.approx(
        [math.log(2 * a), math.log(2 * b)], abs=0.0051)
    assert row("objective.py", "chosen_kl, rejected_kl") == pytest.approx(
        [-(math.log(2 * a) + math.log(2 * b)) / 2] * 2, abs=0.0051)
    assert numbers(lesson("objective.py")[-1])[-1] == pytest.approx(
        math.log(1 + math.exp(-0.07)), abs=5e-5)
    said = "\n".join(lesson("objective.py"))
    for name, quantity in objective.MEASURED.items():
        assert quantity.scope == "token" or re.search(rf"\b{name}\b", said), name


def test_ppos_page_is_a_computation_by_hand():
    rows = [numbers(line) for line in lesson("ppo.py")[3:8]]
    log_ratio, reward, critic, advantage, whitened, ratio, loss, slope = zip(*rows)
    gained = 0.0
    following = 0.0
    for t in reversed(range(5)):
        wanted = -0.1 * log_ratio[t] + (2.0 if t == 4 else 0.0)
        assert reward[t] == pytest.approx(wanted, abs=0.0011)
        gained = reward[t] + following - critic[t] + 0.95 * gained
        following = critic[t]
        assert advantage[t] == pytest.approx(gained, abs=0.003)
    mean = sum(advantage) / 5
    scale = (sum((x - mean) ** 2 for x in advantage) / 4) ** 0.5
    for t in range(5):
        assert whitened[t] == pytest.approx((advantage[t] - mean) / scale, abs=0.003)
        clipped = min(max(ratio[t], 0.8), 1.2)
        assert loss[t] == pytest.approx(
            -min(ratio[t] * whitened[t], clipped * whitened[t]), abs=0.003)
        free = ratio[t] * whitened[t] <= clipped * whitened[t]
        assert slope[t] == pytest.approx(-ratio[t] * whitened[t] * free, abs=0.003)
    assert slope[1] == 0                                         # "vents", as the page says


def test_the_made_up_file_is_shown_as_it_will_be_trained():
    page = "\n".join(lesson("data.py"))
    for line in ("+  Clean the vents. <end>", "-  Read the manual. <end>",
                 "~  Move it closer. <end>", "read 3 | desirable 2 | undesirable 1"):
        assert line in page
