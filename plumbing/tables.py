"""Tables of objectives and claims: docs/objectives.md and results/README.md have them."""

import inspect
import json
import re
from pathlib import Path

import recipes
from objective import needs
from plumbing import methods
from plumbing.verdicts import by_chance, exact_interval, in_words

ROOT = Path(__file__).parents[1]
NAMES = list(dict.fromkeys([*recipes.LOSSES, *recipes.RECIPES]))


def refresh(every_claim, found, stored):
    """Paste the tables into the pages that have them."""
    results = ROOT / "results" / "README.md"
    paste(objectives(), ROOT / "docs" / "objectives.md")
    paste(claims(every_claim, found), results)
    paste(breakdowns(found), results)
    paste(table_of_methods(stored), results)
    text = results.read_text(encoding="utf-8")
    said = by_chance([check for one in found.values() for check in one["checks"]])
    text = re.sub(r"(?<=<!-- by chance -->\n).*", lambda _: said + ".", text)
    results.write_text(text, encoding="utf-8")


def paste(table, page):
    """In place of the page's table with the same first line."""
    text = page.read_text(encoding="utf-8")
    head = re.escape(table.splitlines()[0])
    pattern = rf"^{head}\n(?:\|.*\n)+"
    assert re.search(pattern, text, re.MULTILINE), f"{page} has no table {table.splitlines()[0]}"
    page.write_text(re.sub(pattern, lambda _: table + "\n", text, flags=re.MULTILINE),
                    encoding="utf-8")


def markdown(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


# --- what there is --------------------------------------------------------------------------------

def objectives():
    """Every loss and recipe, from signatures and docstrings."""
    rows = []
    for name in NAMES:
        recipe = recipes.find(name)
        link, paper, idea = source_of(name, recipe)
        rows.append((f"[`{name}`](../{link})", paper, reference_of(recipe), data_of(recipe), idea))
    return markdown(("`--loss`, its equation", "paper", "reference", "data", "idea"), rows)


def source_of(name, recipe):
    """Where its code is, paper, idea: a recipe's own, else from the docstring of the loss."""
    if recipe.paper:
        return "recipes.py", recipe.paper, recipe.idea + "."
    file = Path(inspect.getsourcefile(recipe.loss)).name
    said = re.search(r"Paper: (.+?)\nIdea: (.+?\.)(\n|$)", inspect.getdoc(recipe.loss), re.DOTALL)
    return file, " ".join(said[1].split()), " ".join(said[2].split())


def reference_of(recipe):
    if recipe.reference in (recipes.moving, recipes.following):
        return "moves"
    if "stages" in recipe.flags:
        return "the last stage"
    if recipe.reference is recipes.nothing or "reference" not in needs(recipe.wants):
        return "no"
    return "yes"


def data_of(recipe):
    words = {"thumbs": "labels", "replies": "good responses", "prompts": "prompts + a reward"}
    columns = {"score_gap": "scores", "chosen_win_prob": "win probabilities",
               "target_logps": "a third response"}
    more = [columns[name] for name in recipe.wants if name in columns]
    return " + ".join([words.get(recipe.learns_from, recipe.learns_from), *more])


# --- verdicts -------------------------------------------------------------------------------------

def read_verdicts():
    path = ROOT / "results" / "verdicts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def claims(every, found):
    """Every claim with a line for each of its parts."""
    rows = []
    for name, claim in every.items():
        if name not in found:
            rows.append((f"{claim.says} ({claim.source})", "not run yet", "", f"`{name}`", ""))
            continue
        one = found[name]
        link = f"[`{name}`](claims/{name}.png)"
        rows.append((f"**{claim.says}** ({claim.source})", f"**{one['verdict']}**", "", link,
                     seeds_of(one)))
        rows += [(check["says"], check["verdict"], in_words(check), "", "")
                 for check in one["checks"]]
    head = ("claim, and its parts", "verdict", "mean difference [95 %]", "picture", "seeds")
    return markdown(head, rows)


def seeds_of(one):
    if not one["runs"]:
        return "exact"
    if one["seeds"] < one["asked"]:
        return f"{one['seeds']} of {one['asked']}"
    return str(one["seeds"])


def rate(count, n):
    low, high = exact_interval(count, n)
    return f"{count} of {n} [{low:.0%}, {high:.0%}]"


def breakdowns(found):
    """Every arm that had one, each once, with most of its seeds."""
    rates = {}
    for one in found.values():
        for key, (count, n) in one["breakdowns"].items():
            rates[key] = max(rates.get(key, (0, 0)), (n, count))
    rows = [(f"`{key}`", rate(count, n)) for key, (n, count) in sorted(rates.items())]
    return markdown(("arm", "runs that broke down [95 %]"), rows)


def table_of_methods(stored):
    head = ("`--loss`", "learns from", "true utility [95 %]", "KL, nats", "share of the frontier",
            "win rate [95 %]", "malformed", "broke down", "CPU s", "chosen settings")
    return markdown(head, methods.rows(stored))
