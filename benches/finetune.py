#!/usr/bin/env python3
"""Fine-tuning by KLD-WRM, SO-KLD-WRM and AdamW under equal tuning: as many learning rates each, chosen on held-out examples with a seed of its own; then
fresh seeds on the test set. Prints tables in Markdown.

    cargo build --release --example finetune && python3 benches/finetune.py target/release/examples/finetune
"""

import re
import statistics
import subprocess
import sys
import tempfile

PROGRAM = sys.argv[1]
SEEDS = [1, 2, 3]
RATES = {
    "kldwrm": [0.25, 0.5, 0.7, 1.0, 1.4, 2.0],
    "so": [0.02, 0.05, 0.1, 0.2, 0.37, 0.7],
    "adamw": [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016],
}
TASKS = {
    "LeNet-5, classes 5 to 9 after 0 to 4, 3 epochs": ["--model", "lenet5", "--epochs", "3"],
    "the same by adapters of rank 4": ["--model", "lenet5", "--epochs", "3", "--lora", "4"],
    "vision transformer, classes 5 to 9 after 0 to 4, 3 epochs": ["--model", "vit", "--epochs", "3"],
    "decoder from random parameters, 3 epochs": ["--model", "decoder", "--scratch", "--epochs", "3", "--batch", "16"],
}
ROW = re.compile(r"^ *(\d+) +([\d.]+) +([\d.]+|NaN|inf) +([\d.]+) %$")


def run(words, folder):
    """(step, seconds, loss, accuracy) after every epoch; none if the training failed."""
    line = [PROGRAM, *words, "--out", folder]
    found = subprocess.run(line, capture_output=True, text=True)
    rows = [ROW.match(row) for row in found.stdout.splitlines()]
    rows = [(int(r[1]), float(r[2]), float(r[3]), float(r[4])) for r in rows if r]
    return rows if found.returncode == 0 and rows else None


def mean(values):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def main():
    for title, words in TASKS.items():
        print(f"\n## {title}\n", flush=True)
        chosen, finals = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            start = []
            if "--scratch" not in words:
                model = words[: words.index("--epochs")]
                run([*model, "--epochs", "1", "--optimizer", "adamw"], folder)
                start = ["--checkpoint", f"{folder}/base.safetensors"]
            for name, rates in RATES.items():
                losses = []
                for rate in rates:
                    more = ["--optimizer", name, "--lr", str(rate), "--hold-out", "--seed", "100"]
                    rows = run([*words, *start, *more], folder)
                    losses.append(rows[-1][2] if rows else float("inf"))
                chosen[name] = rates[losses.index(min(losses))]
                text = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in zip(rates, losses))
                print(f"{name}, held-out loss by learning rate: {text}\n", flush=True)
            for name, rate in chosen.items():
                more = ["--optimizer", name, "--lr", str(rate)]
                finals[name] = [run([*words, *start, *more, "--seed", str(s)], folder) for s in SEEDS]
        target = statistics.mean(rows[-1][2] for rows in finals["adamw"])
        print(f"| optimizer | learning rate | test loss | accuracy, % | seconds | steps to {target:.4f} | seconds to it |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, runs in finals.items():
            last = [rows[-1] for rows in runs]
            reached = [next((row for row in rows if row[2] <= target), None) for rows in runs]
            reached = [row for row in reached if row]
            steps = "-"
            if len(reached) == len(runs):
                steps = f"{statistics.mean(r[0] for r in reached):.0f} | {statistics.mean(r[1] for r in reached):.1f}"
            else:
                steps = f"- ({len(reached)} of {len(runs)} runs) | -"
            columns = [name, str(chosen[name]), mean([r[2] for r in last]), mean([r[3] for r in last])]
            seconds = f"{statistics.mean(r[1] for r in last):.1f}"
            print(f"| {' | '.join(columns)} | {seconds} | {steps} |", flush=True)


main()
