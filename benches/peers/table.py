#!/usr/bin/env python3
"""The table of run.sh: seconds of training an epoch from the files `NAME.THREADS.REPEAT.jsonl` of a folder."""

import collections
import json
import pathlib
import statistics
import sys


def main():
    found = collections.defaultdict(list)
    accuracy = {}
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
        name, threads, _ = path.stem.rsplit(".", 2)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(threads), name] += [line["seconds"] for line in lines]
        accuracy[int(threads), name] = 100 * lines[-1]["test_accuracy"]
    base = "PyTorch Adam"
    order = sorted(found, key=lambda key: (key[0], min(found[key])))
    print("| threads | program | least s/epoch | median s/epoch | least, ratio to PyTorch Adam | test % in the end |")
    print("|---|---|---|---|---|---|")
    for threads, name in order:
        seconds = found[threads, name]
        least = min(seconds)
        ratio = least / min(found[threads, base])
        middle = statistics.median(seconds)
        test = accuracy[threads, name]
        print(f"| {threads} | {name} | {least:.2f} | {middle:.2f} | {ratio:.2f} | {test:.2f} |")


if __name__ == "__main__":
    main()
