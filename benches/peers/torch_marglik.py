#!/usr/bin/env python3
"""Seconds of a gradient of the evidence by prior precisions in PyTorch, for `benches/evidence`.

The reference is the straightforward program: a vector-Jacobian product for every output, batched over outputs, the layers' inputs and
output gradients by hooks, kernels of them, a Cholesky factor, and the analytic gradient through its inverse, or autograd's through the
log-determinant. The peer is laplace-torch's Kronecker-factored Laplace approximation of all data with autograd's gradient of its log
marginal likelihood, continued from --kron-batches batches to all of them.

    python torch_marglik.py --data-dir DIR --nets DIR [--threads N] [--json FILE] [--check]

--nets is the folder that `benches/evidence speed --save` wrote, --check compares values with its --json.
"""

import argparse
import gzip
import json
import statistics
import struct
import time

import numpy as np
import torch
from torch import nn

PRECISION = 20.0


def safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            start, end = entry["data_offsets"]
            values = np.frombuffer(data[start:end], dtype="<f4").copy()
            tensors[name] = torch.from_numpy(values).reshape(entry["shape"])
    return tensors


def mnist(folder):
    def read(name, offset):
        with gzip.open(f"{folder}/{name}.gz") as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=offset)

    x = read("train-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
    x = (torch.from_numpy(x.copy()).float() / 255 - 0.1307) / 0.3081
    return x, torch.from_numpy(read("train-labels-idx1-ubyte", 8).copy()).long()


def build(kind, folder):
    if kind == "mlp":
        names = ["fc1", "fc2", "fc3"]
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)
        )
    else:
        names = ["conv1", "conv2", "fc"]
        model = nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    saved = safetensors(f"{folder}/{kind}.safetensors")
    with torch.no_grad():
        for name, layer in zip(names, layers):
            layer.weight.copy_(saved[f"{name}.weight"])
            layer.bias.copy_(saved[f"{name}.bias"])
    return model, layers


def rows(model, layers, x, one=None):
    """Outputs, and of each layer its inputs and the gradients `[rows of an example, examples, ..]` of its outputs."""
    seen = {}

    def keep(layer, inputs, output):
        seen[layer] = (inputs[0].detach(), output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    z = model(x)
    for handle in handles:
        handle.remove()
    p = z.detach().softmax(1)
    eye = torch.eye(z.shape[1])
    # sqrt(p_c) (e_c - p), [columns, examples, classes]
    columns = p.sqrt().t()[:, :, None] * (eye[:, None, :] - p[None])
    if one is not None:
        columns = columns[one : one + 1]
    outputs = [seen[layer][1] for layer in layers]
    grads = torch.autograd.grad(z, outputs, columns, is_grads_batched=True)
    return z.detach(), [(layer, seen[layer][0], g) for layer, g in zip(layers, grads)]


def kernels(parts):
    """Of every tensor its part of the kernel, at a precision of 1."""
    found = []
    for layer, a, g in parts:
        c, n = g.shape[:2]
        if isinstance(layer, nn.Linear):
            g = g.reshape(c * n, -1)
            of_bias = g @ g.t()
            of_inputs = (a @ a.t()).repeat(c, c)
            found += [of_inputs * of_bias, of_bias]
        else:
            patches = nn.functional.unfold(a, layer.kernel_size, padding=layer.padding)
            g = g.flatten(3)
            j = torch.einsum("cnot,nkt->cnok", g, patches).reshape(c * n, -1)
            b = g.sum(3).reshape(c * n, -1)
            found += [j @ j.t(), b @ b.t()]
    return found


def gradient(model, layers, x, log_precision, one=None, autograd=False):
    _, parts = rows(model, layers, x, one)
    m = kernels(parts)
    eye = torch.eye(m[0].shape[0])
    if autograd:
        log_precision = log_precision.clone().requires_grad_()
        total = eye + sum(k * torch.exp(-l) for k, l in zip(m, log_precision))
        value = 2 * torch.linalg.cholesky(total).diagonal().log().sum()
        (grad,) = torch.autograd.grad(-0.5 * value, log_precision)
    else:
        total = eye.clone()
        for k, l in zip(m, log_precision):
            total.add_(k, alpha=float(torch.exp(-l)))
        factor = torch.linalg.cholesky(total)
        value = 2 * factor.diagonal().log().sum()
        inverse = torch.cholesky_inverse(factor)
        grad = torch.stack([0.5 * (inverse * k).sum() * torch.exp(-l) for k, l in zip(m, log_precision)])
    theta = torch.stack([p.detach().square().sum() for layer in layers for p in (layer.weight, layer.bias)])
    return float(value.detach()), grad - 0.5 * torch.exp(log_precision) * theta


def measure(seconds, f):
    """The median of passed seconds, the mean of computed ones, and the least passed."""
    passed, computed, start = [], [], time.perf_counter()
    while len(passed) < 2 or (len(passed) < 200 and time.perf_counter() - start < seconds):
        before, cpu = time.perf_counter(), time.process_time()
        f(len(passed))
        passed.append(time.perf_counter() - before)
        computed.append(time.process_time() - cpu)
    return statistics.median(passed), statistics.mean(computed), min(passed), len(passed)


def laplace_kron(model, x, y, batches, size):
    """A fit and a gradient of the evidence, continued to all data: seconds passed and computed."""
    from laplace import KronLaplace
    from torch.utils.data import DataLoader, TensorDataset

    few = batches * size
    loader = DataLoader(TensorDataset(x[:few], y[:few]), batch_size=size)
    before, cpu = time.perf_counter(), time.process_time()
    la = KronLaplace(model, "classification")
    la.fit(loader, progress_bar=False)
    fitted = [time.perf_counter() - before, time.process_time() - cpu]
    before, cpu = time.perf_counter(), time.process_time()
    log_prior = torch.zeros(len(list(model.parameters())), requires_grad=True)
    la.log_marginal_likelihood(prior_precision=log_prior.exp()).neg().backward()
    after = [time.perf_counter() - before, time.process_time() - cpu]
    scale = len(x) / few
    return [scale * f + a for f, a in zip(fitted, after)]


def laplace_log_det(model, x, y):
    from laplace import KronLaplace
    from torch.utils.data import DataLoader, TensorDataset

    la = KronLaplace(model, "classification", prior_precision=PRECISION)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)), progress_bar=False)
    return float(la.log_det_ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--nets", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5, help="that the repeats of one figure may take")
    parser.add_argument("--kron-batches", type=int, default=8, help="of 250 images; 0 leaves laplace-torch out")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--check", help="the other program's figures, to compare values with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x, y = mnist(args.data_dir)
    figures = []
    for kind in ("mlp", "cnn"):
        model, layers = build(kind, args.nets)
        count = 2 * len(layers)
        logs = torch.full((count,), PRECISION).log()
        if args.check:
            with open(args.check, encoding="utf-8") as file:
                ours = [f for f in json.load(file)["figures"] if f["net"] == kind and f["estimator"] == "check"][0]
            for autograd in (False, True):
                value, grad = gradient(model, layers, x[:100], logs, autograd=autograd)
                off = max(abs(float(a) / b - 1) for a, b in zip(grad, ours["grad_log_precision"]))
                print(f"{kind}: log-determinant off by {value / ours['log_det'] - 1:.1e}, gradient by {off:.1e}")
            if args.kron_batches:
                value = laplace_log_det(model, x[:100], y[:100])
                print(f"{kind}: log-determinant of Kronecker factors off by {value / ours['kron_log_det'] - 1:.1e}")
        cases = [("batch 100", 100, False), ("batch 250", 250, False), ("one output, batch 250", 250, True)]
        for name, size, single in cases:
            for autograd in (False, True):

                def call(index):
                    order = torch.randperm(len(x))[:size]
                    one = index % 10 if single else None
                    gradient(model, layers, x[order], logs, one=one, autograd=autograd)

                passed, computed, least, repeats = measure(args.seconds, call)
                how = "autograd" if autograd else "analytic"
                print(f"{kind}, {name}, {how}: {1e3 * computed:.2f} ms computed, {1e3 * passed:.2f} passed, "
                      f"{1e3 * least:.2f} at the least, of {repeats}", flush=True)  # fmt: skip
                figures.append({"net": kind, "estimator": name, "how": how, "median_seconds": passed,
                                "computed_seconds": computed, "least_seconds": least})  # fmt: skip
        if args.kron_batches:
            passed, computed = laplace_kron(model, x, y, args.kron_batches, 250)
            print(f"{kind}, laplace-torch, Kronecker, all images: {computed:.2f} s computed, {passed:.2f} passed "
                  f"(from {args.kron_batches} of {len(x) // 250} batches)", flush=True)  # fmt: skip
            figures.append({"net": kind, "estimator": "Kronecker, all images", "how": "laplace-torch",
                            "median_seconds": passed, "computed_seconds": computed})  # fmt: skip
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
