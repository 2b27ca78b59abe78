#!/usr/bin/env python3
"""Fine-tuning by KLD-WRM as it comes and by its rivals under equal tuning: six learning rates each and two or three values of their second knob, chosen on
held-out examples with seeds of their own; then ten fresh seeds on the test set. KLD-WRM takes part twice, as it comes and with six rates. Prints tables in
Markdown. Two runs at a time, of a thread each; seconds are of CPU time.

    cargo build --release -p kronwake-cli --example finetune && python3 benches/finetune.py target/release/examples/finetune [TASK ..]

With `unseen FILE` in place of tasks: a task that nothing was tuned on, a wider and deeper decoder on a text of one's own. Rivals have three rates, chosen
with one seed, and the second knob that was best on the small decoder; five fresh seeds.

With `random [TASK ..]`: twenty random settings of each of four optimizers, and how many of them come to AdamW's loss at its best setting, on held-out examples.
"""

import itertools
import random
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

if len(sys.argv) < 2:
    sys.exit(__doc__)
PROGRAM = sys.argv[1]
TUNING, SEEDS = [100, 101], list(range(1, 11))
ADAM = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
MATRIX = [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]
KFAC = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
OPTIMIZERS = {
    "kldwrm": ([None], [[]]),
    "kldwrm, tuned": ([0.25, 0.5, 0.7, 1.0, 1.4, 2.0], [[]]),
    "adamw": (ADAM, [["--beta2", "0.999"], ["--beta2", "0.95"]]),
    "sgd": ([0.01, 0.02, 0.05, 0.1, 0.2, 0.4], [["--momentum", "0.9"], ["--momentum", "0.8"]]),
    "kfac": (KFAC, [["--damping", "0.011"], ["--damping", "0.003"]]),
    "muon": (MATRIX, [["--momentum", "0.95"], ["--momentum", "0.9"], ["--momentum", "0.8"]]),
    "soap": (MATRIX, [["--momentum", "0.95"], ["--momentum", "0.9"], ["--momentum", "0.8"]]),
    "shampoo": (MATRIX, [["--momentum", "0.9"], ["--momentum", "0.8"]]),
    "kl-shampoo": (MATRIX, [["--momentum", "0.9"], ["--momentum", "0.8"]]),
}
UNSEEN = {
    "kldwrm": ([None], [[]]),
    "adamw": ([0.002, 0.004, 0.008], [["--beta2", "0.95"]]),
    "kfac": ([0.05, 0.1, 0.2], [["--damping", "0.003"]]),
    "muon": ([0.005, 0.01, 0.02], [["--momentum", "0.8"]]),
    "soap": ([0.0025, 0.005, 0.01], [["--momentum", "0.8"]]),
    "shampoo": ([0.0025, 0.005, 0.01], [["--momentum", "0.8"]]),
    "kl-shampoo": ([0.005, 0.01, 0.02], [["--momentum", "0.8"]]),
}
# What is left to set, with the ends between which a random setting lies; logarithms are uniform.
DECAY = ("--weight-decay", 1e-4, 1e-1)
RANDOM = {
    "kldwrm": [("--lr", 0.25, 2.0), ("--kl-target", 5e-4, 5e-2), DECAY],
    "adamw": [("--lr", ADAM[0], ADAM[-1]), DECAY],
    "muon": [("--lr", MATRIX[0], MATRIX[-1]), DECAY],
    "soap": [("--lr", MATRIX[0], MATRIX[-1]), DECAY],
}
# Bases that are new at every step: what a user of short runs would choose.
ALWAYS = {"soap": ["--period", "1"]}
TASKS = {
    "decoder from random parameters, 3 epochs": ["--model", "decoder", "--scratch", "--epochs", "3", "--batch", "16"],
    "vision transformer, classes 5 to 9 after 0 to 4, 3 epochs": ["--model", "vit", "--epochs", "3"],
    "LeNet-5, classes 5 to 9 after 0 to 4, 3 epochs": ["--model", "lenet5", "--epochs", "3"],
    "LeNet-5 by adapters of rank 4, 3 epochs": ["--model", "lenet5", "--epochs", "3", "--lora", "4"],
}
ROW = re.compile(r"^ *(\d+) +([\d.]+) +([\d.]+|NaN|inf) +([\d.]+) %$")


def run(words):
    """The test loss after every epoch and the CPU seconds of the program; none if the training failed."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["bash", "-c", 'TIMEFORMAT=%U; time "$@"', "run", PROGRAM, *words, "--threads", "1", "--out", folder]
        found = subprocess.run(line, capture_output=True, text=True)
    rows = [ROW.match(row) for row in found.stdout.splitlines()]
    losses = [float(r[3]) for r in rows if r]
    seconds = float(found.stderr.strip().splitlines()[-1])
    return (losses[1:], seconds) if found.returncode == 0 and len(losses) > 1 else None


def final(result):
    loss = result[0][-1] if result else float("inf")
    return loss if loss == loss else float("inf")


def with_error(values):
    ended = [value for value in values if value < float("inf")]
    spread = statistics.stdev(ended) if len(ended) > 1 else 0.0
    diverged = f", {len(values) - len(ended)} of {len(values)} diverged" if len(ended) < len(values) else ""
    return f"{statistics.mean(ended):.4f} ± {spread:.4f}{diverged}" if ended else "diverged"


def paired(values, against):
    """The mean difference with its standard error."""
    differences = [a - b for a, b in zip(values, against) if a < float("inf")]
    if len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"


def base(words, folder):
    """The options by which a fine-tuning starts from one base, which is trained here."""
    if "--scratch" in words:
        return []
    model = words[: words.index("--epochs")]
    subprocess.run([PROGRAM, *model, "--epochs", "1", "--optimizer", "adamw", "--out", folder], capture_output=True)
    return ["--checkpoint", f"{folder}/base.safetensors"]


def random_settings(title, words, pool):
    print(f"\n## Random settings: {title}\n", flush=True)
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, *base(words, folder), "--hold-out", "--seed", str(TUNING[0]), "--optimizer"]
        rates, knobs = OPTIMIZERS["adamw"]
        tuned = [pool.submit(run, [*words, "adamw", "--lr", str(rate), *knob]) for rate in rates for knob in knobs]
        runs = {}
        for name, ranges in RANDOM.items():
            settings = [[(option, low * (high / low) ** drawn.random()) for option, low, high in ranges] for _ in range(20)]
            lines = [[*words, name, *ALWAYS.get(name, []), *(str(word) for pair in one for word in pair)] for one in settings]
            runs[name] = [pool.submit(run, line) for line in lines]
        aim = min(final(one.result()) for one in tuned)
        print(f"AdamW at its best of {len(tuned)} settings: {aim:.4f}\n")
        print("| optimizer | reach AdamW's best | least | median | greatest |\n| --- | --- | --- | --- | --- |")
        for name, found in runs.items():
            losses = sorted(final(one.result()) for one in found)
            reached = sum(loss <= aim for loss in losses)
            row = [f"{reached} of {len(losses)}", *(f"{loss:.3f}" for loss in [losses[0], statistics.median(losses), losses[-1]])]
            print(f"| {name} | {' | '.join(row)} |", flush=True)


def task(title, words, pool):
    print(f"\n## {title}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start = base(words, folder)

        def line(name, rate, knob, seed):
            optimizer = name.split(",")[0]
            more = ["--optimizer", optimizer, *ALWAYS.get(optimizer, []), *knob, "--seed", str(seed)]
            return [*words, *start, *more, *(["--lr", str(rate)] if rate else [])]

        tuning = {}
        for name, (rates, knobs) in OPTIMIZERS.items():
            for rate, knob in itertools.product(rates, knobs):
                if len(rates) * len(knobs) > 1:
                    lines = [[*line(name, rate, knob, seed), "--hold-out"] for seed in TUNING]
                    tuning[name, rate, tuple(knob)] = [pool.submit(run, one) for one in lines]
        chosen = {}
        for name, (rates, knobs) in OPTIMIZERS.items():
            settings = list(itertools.product(rates, knobs))
            losses = {}
            for rate, knob in settings if len(settings) > 1 else []:
                results = tuning[name, rate, tuple(knob)]
                losses[rate, tuple(knob)] = statistics.mean(final(one.result()) for one in results)
            chosen[name] = min(losses, key=losses.get) if losses else settings[0]
            if losses:
                said = ", ".join(f"{r}{' ' + ' '.join(k) if k else ''}: {loss:.4f}" for (r, k), loss in losses.items())
                print(f"{name}, held-out loss: {said}\n", flush=True)
        runs = {
            name: [pool.submit(run, line(name, rate, knob, seed)) for seed in SEEDS] for name, (rate, knob) in chosen.items()
        }
        runs = {name: [one.result() for one in found] for name, found in runs.items()}
    cpu = statistics.mean(one[1] for one in runs["adamw"] if one)
    ours = [final(one) for one in runs["kldwrm"]]
    print("| optimizer | setting | loss after each epoch | test loss | less KLD-WRM's as it comes, paired | CPU time to AdamW's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in runs.items():
        rate, knob = chosen[name]
        setting = " ".join([f"lr {rate}" if rate else "as it comes", *knob])
        whole = [one for one in found if one]
        epochs = " ".join(f"{statistics.mean(values):.3f}" for values in zip(*(one[0] for one in whole)))
        last = [final(one) for one in found]
        seconds = f"{statistics.mean(one[1] for one in whole) / cpu:.2f}" if whole else "-"
        difference = "" if name == "kldwrm" else paired(last, ours)
        failed = f" ({len(found) - len(whole)} failed)" if len(whole) < len(found) else ""
        print(f"| {name} | {setting} | {epochs} | {with_error(last)}{failed} | {difference} | {seconds} |", flush=True)


def main():
    wanted = sys.argv[2:]
    with ThreadPoolExecutor(2) as pool:
        if wanted[:1] == ["unseen"]:
            OPTIMIZERS.clear()
            OPTIMIZERS.update(UNSEEN)
            TUNING[:], SEEDS[:] = [100], list(range(1, 6))
            # A step of new bases takes longer than all else here.
            ALWAYS["soap"] = ["--period", "5"]
            words = ["--model", "decoder:128-4", "--data", wanted[1], "--scratch", "--epochs", "3", "--batch", "16"]
            return task("decoder 128 wide and 4 layers deep, from random parameters, 3 epochs", words, pool)
        measure = task
        if wanted[:1] == ["random"]:
            measure, wanted = random_settings, wanted[1:]
        for title, words in TASKS.items():
            if not wanted or any(word in title for word in wanted):
                measure(title, words, pool)


main()
