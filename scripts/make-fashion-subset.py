#!/usr/bin/env python3
"""Make the bundled data set: a class-balanced subset of Fashion-MNIST as four gzip IDX files.

Keeps the first 600 training and the first 100 test images of each of the ten classes, in the order of the source
files. Uses the standard library alone; the output depends on the input and on zlib only (no time stamps).

Source: the Debian package dataset-fashion-mnist (`apt-get install dataset-fashion-mnist`).
"""

import argparse
import gzip
import hashlib
import struct
import sys
from pathlib import Path

CLASSES = 10
ROOT = Path(__file__).resolve().parent.parent


def read_idx(path, magic, dims):
    """The sizes in the header and the bytes after it of a gzip IDX file."""
    data = gzip.decompress(path.read_bytes())
    header = struct.unpack_from(f">{1 + dims}I", data)
    if header[0] != magic:
        sys.exit(f"{path}: magic number {header[0]}, expected {magic}")
    body = data[4 * (1 + dims):]
    size = 1
    for n in header[1:]:
        size *= n
    if len(body) != size:
        sys.exit(f"{path}: {len(body)} bytes after the header, expected {size}")
    return header[1:], body


def write_gzip(path, data):
    """Writes `data`, compressed, without a name or a time in the gzip header; prints its SHA-256."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(data)
    print(f"{hashlib.sha256(data).hexdigest()}  {path.name.removesuffix('.gz')}")


def subset(source, target, part, per_class):
    """Copies the first `per_class` examples of each class of `part` (train or t10k) from `source` to `target`."""
    images_name, labels_name = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
    (count, rows, cols), images = read_idx(source / images_name, 2051, 3)
    (labelled,), labels = read_idx(source / labels_name, 2049, 1)
    if count != labelled:
        sys.exit(f"{part}: {count} images but {labelled} labels")
    taken, keep = [0] * CLASSES, []
    for i, label in enumerate(labels):
        if taken[label] < per_class:
            taken[label] += 1
            keep.append(i)
    if min(taken) < per_class:
        sys.exit(f"{part}: a class has only {min(taken)} examples, {per_class} are wanted")
    size = rows * cols
    picked = b"".join(images[i * size:(i + 1) * size] for i in keep)
    write_gzip(target / images_name, struct.pack(">4I", 2051, len(keep), rows, cols) + picked)
    write_gzip(target / labels_name, struct.pack(">2I", 2049, len(keep)) + bytes(labels[i] for i in keep))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--target", type=Path, default=ROOT / "examples/data/fashion-mnist-6k")
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    subset(args.source, args.target, "train", 600)
    subset(args.source, args.target, "t10k", 100)


if __name__ == "__main__":
    main()
