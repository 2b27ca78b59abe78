#!/usr/bin/env python3
"""Training steps of K-FAC, Muon and AdamW in plain eager PyTorch, on the models of `cargo bench --bench kernels`.

K-FAC as it is usually written: a forward pre-hook keeps a layer's input, a full backward hook its output's gradient, on the
steps that renew the factors. A and G are matrix products with the bias's 1 appended to the input; their exponential averages,
inverses (eigendecompositions; of the stack Cholesky factorizations with pi damping), the preconditioning of each layer and the KL
clip are operations of their own. The labels are the batch's (empirical Fisher), so no second backward pass is needed. Parameters
outside linear layers get AdamW. Nothing is read back to the host in a step. Muon is torch.optim's, for the weights of linear
layers, with AdamW for the rest.

    torch_kfac.py [--device cpu|cuda] [--json FILE] [--only lenet300|stack] [--periods 30 10] [--longest S] [--tf32] [--quick]
    torch_kfac.py --check        # on the CPU in f64: factors, inverses and clip against their definitions

Prints a row a measurement and, at the end, all of it as JSON; FILE is whole after each row. Times are means over whole periods after
one to warm up, with the device's queue empty at both ends.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A transformer block without the attention itself: the sum of queries, keys and values stands for what it mixes."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, 2)
        x = x + self.out(q + k + v)
        return x + self.down(F.relu(self.up(self.norm2(x))))


def lenet300(args):
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return model, (16 if args.quick else 512, 784), 10


def stack(args):
    if args.quick:
        blocks, width, examples, positions = 1, 16, 2, 4
    elif args.device.startswith("cuda"):
        blocks, width, examples, positions = 12, 768, 16, 256
    else:
        blocks, width, examples, positions = 2, 128, 4, 64
    model = nn.Sequential(*(Block(width) for _ in range(blocks)), nn.Linear(width, 64))
    return model, (examples, positions, width), 64


class KFac:
    """K-FAC with a KL clip; the loss is a mean over rows. Damped in the eigenbasis, or, with `cholesky`, factor by factor with pi."""

    def __init__(self, model, lr=1e-5, damping=0.01, stat_decay=0.95, kl_clip=0.01, period=30, cholesky=False):
        self.cholesky = cholesky
        self.lr, self.damping, self.stat_decay = lr, damping, stat_decay
        self.kl_clip, self.period, self.steps = kl_clip, period, 0
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.inputs, self.grads, self.factors, self.inverses = {}, {}, {}, {}
        own = {id(p) for layer in self.layers for p in layer.parameters()}
        rest = [p for p in model.parameters() if id(p) not in own]
        self.rest = torch.optim.AdamW(rest, lr=1e-5) if rest else None
        for layer in self.layers:
            layer.register_forward_pre_hook(self.keep_input)
            layer.register_full_backward_hook(self.keep_grad)

    def due(self):
        return self.steps % self.period == 0

    def keep_input(self, layer, inputs):
        if self.due() and torch.is_grad_enabled():
            self.inputs[layer] = inputs[0].detach()

    def keep_grad(self, layer, _, grad_output):
        if self.due():
            self.grads[layer] = grad_output[0].detach()

    @torch.no_grad()
    def refresh(self):
        for layer in self.layers:
            x, g = self.inputs.pop(layer), self.grads.pop(layer)
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            x, g = x.reshape(-1, x.shape[-1]).to(wide), g.reshape(-1, g.shape[-1]).to(wide)
            rows = x.shape[0]
            x = torch.cat([x, x.new_ones(rows, 1)], 1)
            # The loss is a mean: a row's own gradient is `rows` times what arrives.
            g = g * rows
            a, g = x.t() @ x / rows, g.t() @ g / rows
            if layer in self.factors:
                old_a, old_g = self.factors[layer]
                a = self.stat_decay * old_a + (1 - self.stat_decay) * a
                g = self.stat_decay * old_g + (1 - self.stat_decay) * g
            self.factors[layer] = (a, g)
            if self.cholesky:
                pi = torch.sqrt(a.diagonal().mean() / g.diagonal().mean().clamp(min=1e-30))
                self.inverses[layer] = (self.inverse(a, self.damping**0.5 * pi), self.inverse(g, self.damping**0.5 / pi))
                continue
            (da, qa), (dg, qg) = torch.linalg.eigh(a), torch.linalg.eigh(g)
            scale = 1 / (torch.outer(dg.clamp(min=0), da.clamp(min=0)) + self.damping)
            self.inverses[layer] = (qa, qg, scale)

    @staticmethod
    def inverse(factor, damping):
        damped = factor.clone()
        damped.diagonal().add_(damping)
        # Not checked: that would be read back to the host.
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)

    def precondition(self, layer, grad):
        if self.cholesky:
            a, g = self.inverses[layer]
            grad = grad.to(a.dtype)
            return grad, g @ grad @ a
        qa, qg, scale = self.inverses[layer]
        grad = grad.to(scale.dtype)
        return grad, qg @ ((qg.t() @ grad @ qa) * scale) @ qa.t()

    @torch.no_grad()
    def step(self):
        if self.due():
            self.refresh()
        directions, squared = [], 0.0
        for layer in self.layers:
            grad, direction = self.precondition(layer, torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1))
            squared = squared + (direction * grad).sum()
            directions.append(direction)
        length = self.lr**2 * squared
        factor = torch.sqrt(self.kl_clip / length.clamp(min=1e-30)).clamp(max=1.0) * -self.lr
        for layer, direction in zip(self.layers, directions):
            change = (direction * factor).to(layer.weight.dtype)
            layer.weight.add_(change[:, :-1])
            layer.bias.add_(change[:, -1])
        if self.rest:
            self.rest.step()
        self.steps += 1


class Muon:
    """torch.optim's, of weights that are matrices, and AdamW for the rest."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        self.both = [torch.optim.Muon(matrices, lr=1e-5), torch.optim.AdamW(rest, lr=1e-5)]

    def step(self):
        for optimizer in self.both:
            optimizer.step()


def setup(build, args, dtype):
    torch.manual_seed(0)
    model, shape, classes = build(args)
    model = model.to(args.device, dtype)
    x = torch.randn(shape, device=args.device).to(dtype)
    y = torch.arange(x[..., 0].numel(), device=args.device) % classes
    return model, x, y


def stepper(model, x, y, optimizer):
    def step():
        z = model(x)
        loss = F.cross_entropy(z.reshape(-1, z.shape[-1]).float(), y)
        model.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(args, calls, step):
    """Of `calls` steps together."""
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return time.perf_counter() - start


def measure(args, period, step):
    """Mean, refresh and plain seconds of a step, by the same rules as `benches/kernels/steps.rs`."""

    def up(n):
        return -(-n // period) * period

    start = time.perf_counter()

    def passed():
        return time.perf_counter() - start

    for _ in range(up(3)):
        seconds(args, 1, step)
    means, refreshes, plains, longest = [], [], [], args.longest
    steps, most = (period, 1) if args.quick else (up(30), 5)
    while len(means) < most and passed() < longest / 2:
        means.append(seconds(args, steps, step) / steps)
    while not refreshes or (len(refreshes) < most and passed() < longest):
        for index in range(period):
            (plains if index else refreshes).append(seconds(args, 1, step))
    if not means:
        means.append(statistics.mean(refreshes + plains))
    refresh = statistics.median(refreshes)
    return statistics.median(means), refresh, statistics.median(plains) if plains else refresh


def run(args):
    rows = []

    def row(model, dtype, optimizer, period, adamw, make):
        mean, refresh, plain = measure(args, period, make())
        ratio = mean / adamw if adamw else 1.0
        rows.append({
            "model": model, "dtype": dtype, "optimizer": optimizer, "period": period, "seconds": mean,
            "refresh_seconds": refresh, "plain_seconds": plain, "ratio_to_adamw": ratio,
        })  # fmt: skip
        print(f"{model:<9} {dtype:<5} {optimizer:<16} {mean * 1e3:10.3f} ms a step, {ratio:.2f} of AdamW; "
              f"{plain * 1e3:.3f} ms without refresh, {refresh * 1e3:.3f} ms with", flush=True)  # fmt: skip
        write(args, described(args, rows))
        return mean

    for build in (lenet300, stack):
        name = build.__name__
        if args.only and name not in args.only:
            continue
        dtypes = ["float32"] + (["bfloat16"] if name == "stack" and args.device.startswith("cuda") else [])
        for dtype_name in dtypes:
            dtype, short = getattr(torch, dtype_name), {"float32": "f32", "bfloat16": "bf16"}[dtype_name]

            def adamw(fused):
                model, x, y = setup(build, args, dtype)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused or None)
                return stepper(model, x, y, optimizer)

            # An eigendecomposition of the stack's factors takes seconds for each of the larger ones.
            cholesky = name == "stack"

            def kfac(period):
                model, x, y = setup(build, args, dtype)
                return stepper(model, x, y, KFac(model, period=period, cholesky=cholesky))

            def muon():
                model, x, y = setup(build, args, dtype)
                return stepper(model, x, y, Muon(model))

            base = row(name, short, "AdamW", 1, None, lambda: adamw(False))
            if args.device.startswith("cuda"):
                row(name, short, "AdamW, fused", 1, base, lambda: adamw(True))
            for period in args.periods if short == "f32" else args.periods[:1]:
                row(name, short, f"K-FAC, {period}" + (", Cholesky" if cholesky else ""), period, base, lambda: kfac(period))
            if hasattr(torch.optim, "Muon"):
                row(name, short, "Muon", 1, base, muon)
            else:
                print(f"Muon: skipped, torch {torch.__version__} has none", flush=True)
    return described(args, rows)


def described(args, rows):
    cuda = args.device.startswith("cuda")
    return {
        "torch": torch.__version__, "cuda": torch.version.cuda if cuda else None, "tf32": args.tf32,
        "device": torch.cuda.get_device_name(args.device) if cuda else "cpu", "threads": torch.get_num_threads(),
        "steps": rows,
    }  # fmt: skip


def write(args, figures):
    """Whole at any time: a measurement may be stopped from outside."""
    if args.json:
        with open(args.json + ".part", "w", encoding="utf-8") as file:
            file.write(json.dumps(figures, indent=1) + "\n")
        os.replace(args.json + ".part", args.json)


def check(cholesky):
    """Holds factors, inverse and clip against their definitions."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    kfac = KFac(model, lr=0.5, damping=0.1, kl_clip=1e-3, period=1, cholesky=cholesky)
    layer, n = model[0], 7
    averages = None
    for _ in range(2):
        x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
        hidden = (x @ layer.weight.t() + layer.bias).detach().requires_grad_()
        own = F.cross_entropy(model[2](torch.tanh(hidden)), y, reduction="sum")
        rows = torch.autograd.grad(own, hidden)[0]
        one = torch.cat([x, torch.ones(n, 1).double()], 1)
        a = sum(torch.outer(row, row) for row in one) / n
        g = sum(torch.outer(row, row) for row in rows) / n
        averages = (a, g) if averages is None else tuple(0.95 * o + 0.05 * v for o, v in zip(averages, (a, g)))
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        kfac.step()
        for found, expected in zip(kfac.factors[layer], averages):
            torch.testing.assert_close(found, expected)
        squared, directions = 0.0, []
        for which, (w, b) in enumerate(((0, 1), (2, 3))):
            a, g = kfac.factors[kfac.layers[which]]
            grad = torch.cat([grads[w], grads[b][:, None]], 1)
            # vec by columns: (A (x) G + damping) vec(V) = vec(grad)
            if cholesky:
                pi = (a.trace() / a.shape[0] / (g.trace() / g.shape[0])) ** 0.5
                damp = lambda m, by: m + by * torch.eye(m.shape[0]).double()  # noqa: E731
                fisher = torch.kron(damp(a, 0.1**0.5 * pi), damp(g, 0.1**0.5 / pi))
            else:
                fisher = torch.kron(a, g) + 0.1 * torch.eye(a.shape[0] * g.shape[0]).double()
            v = torch.linalg.solve(fisher, grad.t().reshape(-1)).reshape(a.shape[0], g.shape[0]).t()
            squared += float((v * grad).sum())
            directions += [v[:, :-1], v[:, -1]]
        scale = 0.5 * min(1.0, (1e-3 / (0.25 * squared)) ** 0.5)
        for p, old, direction in zip(model.parameters(), before, directions):
            torch.testing.assert_close(p.detach(), old - scale * direction)
    print(f"factors, inverse{' by Cholesky' if cholesky else ''} and clip are what they are defined as")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--only", action="append", choices=["lenet300", "stack"])
    parser.add_argument("--periods", type=int, nargs="+", default=[30, 10])
    parser.add_argument("--longest", type=float, default=15.0, help="about the seconds of a measurement, at most")
    parser.add_argument("--tf32", action="store_true", help="let products round their operands to TF32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--check", action="store_true", help="hold the optimizer against its definition, and end")
    args = parser.parse_args()
    # The first layer's hook: its input is data and needs no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if args.check:
        check(False)
        check(True)
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    figures = run(args)
    print(json.dumps(figures, indent=1))
    write(args, figures)


if __name__ == "__main__":
    main()
