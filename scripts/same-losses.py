#!/usr/bin/env python3
"""Whether two logs of the mnist example say the same to 1e-9, times apart: same-losses.py ONE OTHER LINES, each of more than so many lines."""

import json
import sys

one, other = ([json.loads(line) for line in open(name)] for name in sys.argv[1:3])
assert len(one) == len(other) > int(sys.argv[3]), (len(one), len(other))
for a, b in zip(one, other):
    for key, value in a.items():
        if isinstance(value, float) and "second" not in key:
            assert abs(value - b[key]) <= 1e-9 * max(1, abs(value)), (key, value, b[key])
