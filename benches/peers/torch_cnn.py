#!/usr/bin/env python3
"""The CNN of the example mnist in plain eager PyTorch on the CPU, with Adam or with K-FAC: seconds of training an epoch.

All images are one float tensor in memory, and a batch is an indexing of it: no loader, no workers, no copies but that one.
K-FAC: forward hooks keep a layer's input and output on the steps that renew its factors; the gradients at the outputs for
labels drawn from the model, and unfolded patches, give the factors (Martens & Grosse 2015; Grosse & Martens 2016); inverses
by eigendecomposition, biases folded into the weights. Prints a JSON object an epoch.
"""

import argparse
import gzip
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from torch import nn


def idx(folder, name, header):
    """The bytes of an IDX file after its header."""
    for path in sorted(pathlib.Path(folder).glob(name + "*")):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8)
    raise SystemExit(f"{name} is not in {folder}")


def load(folder, prefix):
    """Normalized images [n, 1, 28, 28] and labels [n]."""
    pixels = idx(folder, f"{prefix}-images", 16).view(-1, 1, 28, 28).float()
    return (pixels / 255 - 0.1307) / 0.3081, idx(folder, f"{prefix}-labels", 8).long()


def network():
    """The CNN of the KLD-WRM paper, 4,712 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 5, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(5, 7, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(112, 30), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(30, 10),
    )  # fmt: skip


class KFac:
    """K-FAC with sampled labels, eigenvalue damping and a KL clip."""

    def __init__(self, model, lr=0.083, damping=0.0114, stat_decay=0.5, decay=1e-3, kl_clip=0.015, period=30):
        self.lr, self.damping, self.stat_decay = lr, damping, stat_decay
        self.decay, self.kl_clip, self.period = decay, kl_clip, period
        self.layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.seen, self.factors, self.inverses = {}, {}, {}
        self.steps = 0
        for layer in self.layers:
            layer.register_forward_hook(self.keep)

    def due(self):
        return self.steps % self.period == 0

    def keep(self, layer, inputs, output):
        if layer.training and self.due():
            self.seen[layer] = (inputs[0].detach(), output)

    def observe(self, logits):
        """Renews factors and inverses, when they are due, from the pass that gave `logits`."""
        if not self.due():
            return
        labels = torch.multinomial(F.softmax(logits.detach(), 1), 1).squeeze(1)
        # The sum: gradients of each example's loss.
        loss = F.cross_entropy(logits, labels, reduction="sum")
        outputs = [self.seen[layer][1] for layer in self.layers]
        grads = torch.autograd.grad(loss, outputs, retain_graph=True)
        for layer, grad in zip(self.layers, grads):
            a, g = self.rows(layer, self.seen[layer][0], grad)
            a, g = a.t() @ a / logits.shape[0], g.t() @ g / g.shape[0]
            if layer in self.factors:
                old_a, old_g = self.factors[layer]
                a, g = torch.lerp(a, old_a, self.stat_decay), torch.lerp(g, old_g, self.stat_decay)
            self.factors[layer] = (a, g)
            (da, qa), (dg, qg) = torch.linalg.eigh(a), torch.linalg.eigh(g)
            spectrum = torch.outer(dg.clamp(min=0), da.clamp(min=0)) + self.damping
            self.inverses[layer] = (qa, qg, spectrum)
        self.seen.clear()

    @staticmethod
    def rows(layer, x, grad):
        """A row for each example and position: inputs with a 1 for the bias, and gradients."""
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            x = x.transpose(1, 2).reshape(-1, x.shape[1])
            grad = grad.flatten(2).transpose(1, 2).reshape(-1, grad.shape[1])
        return torch.cat([x, x.new_ones(x.shape[0], 1)], 1), grad

    @torch.no_grad()
    def step(self):
        directions, length = [], 0.0
        for layer in self.layers:
            weight = layer.weight
            grad = torch.cat([weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
            value = torch.cat([weight.flatten(1), layer.bias[:, None]], 1)
            grad.add_(value, alpha=self.decay)
            qa, qg, spectrum = self.inverses[layer]
            direction = qg @ ((qg.t() @ grad @ qa) / spectrum) @ qa.t()
            length = length + (direction * grad).sum()
            directions.append(direction)
        scale = self.lr * min(1.0, math.sqrt(self.kl_clip / max(self.lr**2 * float(length), 1e-30)))
        for layer, direction in zip(self.layers, directions):
            layer.weight.sub_(direction[:, :-1].reshape(layer.weight.shape), alpha=scale)
            layer.bias.sub_(direction[:, -1], alpha=scale)
        self.steps += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the four IDX files of MNIST")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--optimizer", choices=["adam", "kfac"], default="adam")
    parser.add_argument("--period", type=int, default=30, help="steps between renewals of K-FAC's factors and inverses")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    (images, labels), (test_images, test_labels) = load(args.data, "train"), load(args.data, "t10k")
    # A tenth faster here than the default format.
    model = network().to(memory_format=torch.channels_last)
    kfac = KFac(model, period=args.period) if args.optimizer == "kfac" else None
    adam = None if kfac else torch.optim.Adam(model.parameters(), lr=0.01)
    peak = kfac.lr if kfac else 0.01
    steps = args.epochs * math.ceil(len(images) / args.batch)
    step = 0
    for epoch in range(args.epochs):
        model.train()
        total = torch.zeros(())
        start = time.perf_counter()
        for places in torch.randperm(len(images)).split(args.batch):
            lr = peak * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
            logits = model(images[places])
            loss = F.cross_entropy(logits, labels[places])
            if kfac:
                kfac.lr = lr
                kfac.observe(logits)
            else:
                adam.param_groups[0]["lr"] = lr
            model.zero_grad()
            loss.backward()
            (kfac or adam).step()
            total += loss.detach()
            step += 1
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            right = (model(test_images).argmax(1) == test_labels).float().mean().item()
        name = "kfac" if kfac else "adam"
        row = {"optimizer": name, "epoch": epoch + 1, "seconds": seconds, "test_accuracy": right}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
