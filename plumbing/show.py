"""`python data.py FILE`: the first batch of a preference file in colour, as train.py sees it."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from itertools import groupby

from data import TURNS, batch_rows, encode, lambda_weights, mismatched_units
from plumbing import chat, formats
from plumbing.formats import Feedback, counts_line
from plumbing.tokenizer import chat_settings, load_tokenizer

GREY, GREEN, RED, BLUE, BOLD = 90, 32, 31, 34, 1


def coloured(colour, text):
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        return f"\033[{colour}m{text}\033[0m"
    return text


def show_lines(sign, colour, text, end=""):
    print("\n".join(f"  {sign} {coloured(colour, line)}" for line in text.split("\n")) + end)


def show_response(row, title, sign, colour, tokenizer):
    """Print a response: trained tokens in colour after a sign, context in grey."""
    print(f"  {title}, {row.n_prompt} prompt + {row.length} trained tokens")
    for trained, run in groupby(range(row.n_prompt, len(row.ids)), key=lambda t: row.mask[t] > 0):
        ids = row.ids[list(run)]
        if not trained:
            show_lines(" ", GREY, tokenizer.decode(ids))
            continue
        end = " <end>" if ids[-1] in tokenizer.stops else " (cut: no end)"
        show_lines(sign, colour, tokenizer.text(ids), coloured(BOLD, end))


def show(unit, tokenizer, paired):
    """Print a unit: (y, y') or, with paired, (chosen, rejected, target)."""
    row = unit[0]
    print(coloured(BOLD, row.where))
    show_lines(" ", GREY, tokenizer.decode(row.ids[:row.n_prompt]))
    if row.desirable is None:                            # a prompt alone: the policy will answer
        return
    label = "desirable" if row.desirable else "undesirable"
    titles = [label, f"y' for z0, from {unit[-1].where}"]
    if paired:
        titles = ["chosen", "rejected", "target"]
    for row, title in zip(unit, titles):
        sign, colour = ("+", GREEN) if row.desirable else ("-", RED)
        if title.startswith("y'"):
            sign, colour = "~", BLUE
        show_response(row, title, sign, colour, tokenizer)
    print()


def main(argv):
    parser = argparse.ArgumentParser(
        prog="data.py", description="Show the first batch of a preference file, as it is trained.")
    flag = parser.add_argument
    flag("files", nargs="+", help="as --data takes them: files, a folder, org/name:split")
    flag("--model", "--tokenizer", dest="tokenizer", help="a tokenizer's folder (default: bytes)")
    flag("--paired", action="store_true", help="as the losses on pairs see it (default: labels)")
    flag("--template_args", nargs="+", default=[], help="of the chat template: NAME=VALUE ...")
    flag("--chat", action="store_true", help="a prompt that is a text is a user's turn")
    flag("--turns", choices=TURNS, default="last", help="which assistant's turns are trained")
    flag("--threshold", type=float, help="desirable: reward above this")
    flag("--columns", default="", help="prompt=question,completion=answer,...")
    flag("--batch_size", type=int, default=8)
    flag("--seed", type=int, default=0)
    flag("--max_len", type=int, default=1024)
    flag("--max_prompt_len", type=int, default=512)
    flag("--add_eot", choices=["true", "false"], default="true")
    args = parser.parse_args(argv)
    if args.max_len < 2 or args.max_prompt_len < 1 or args.batch_size < 1:
        raise SystemExit("--max_len must be at least 2, --max_prompt_len and --batch_size 1")

    scored = "pairs" if args.paired else "labels"
    examples, name = formats.read(args.files, columns=formats.parse_columns(args.columns),
                                  threshold=args.threshold, scored=scored, prompts=True)
    if args.paired and isinstance(examples[0], Feedback):
        raise SystemExit(f"--paired needs pairs or scored responses; the file has {name}")
    feedback = formats.to_feedback(examples)
    add_eot = args.add_eot == "true"
    if not args.paired:
        examples = feedback
    tokenizer = load_tokenizer(args.tokenizer, settings=chat_settings(args))
    units, counts = encode(examples, tokenizer, max_len=args.max_len, turns=args.turns,
                           max_prompt_len=args.max_prompt_len, add_eot=add_eot)
    print(f"format: {name}\n{counts_line(counts)}")
    print("\n".join(chat.remarks(examples, tokenizer)))
    print(formats.cut_hint(feedback, add_eot) or "")
    if not args.paired and not counts["prompts alone"]:
        lambda_d, lambda_u = lambda_weights(counts["desirable"], counts["undesirable"])
        print(f"--lambda_d auto --lambda_u auto: {lambda_d:.3g}, {lambda_u:.3g}\n")
        if counts["prompts"] > 1:
            units = mismatched_units(units, seed=args.seed, max_len=args.max_len)
    if units:
        for i in batch_rows(len(units), args.batch_size, seed=args.seed, step=0):
            show(units[i], tokenizer, args.paired)


def made_up_file():
    """Show a made-up file: three thumbs on two prompts."""
    records = [{"prompt": "It is too hot!", "completion": " Clean the vents.", "label": True},
               {"prompt": "It is too hot!", "completion": " Read the manual.", "label": False},
               {"prompt": "No signal.", "completion": " Move it closer.", "label": True}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    print(f"A file of thumbs:\n\n{lines}\nand its units. The tokens after + (good) and - (bad) are "
          "trained. Those after ~\nare only measured: y', the response to another prompt, for "
          "KTO's z0.\n")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with open("thumbs.jsonl", "w") as file:
            file.write(lines)
        main(["thumbs.jsonl"])
