#!/usr/bin/env python3
"""Estimates a training step of K-FAC's family on several GPUs, from shapes and rates. Nothing of it is measured: the rates are the arguments.

A step is the forward and the backward pass, the factors (with a second backward pass for drawn labels) at every `period`th step, the inverses at
every `period`th, preconditioning and the elementwise work at each step, and what is sent:

    replicated   all-reduce of gradients and factors; all do all
    gathered     the same, but each factor is inverted by one, and the inverses are gathered
    owned        reduce-scatter of gradients and factors to a block's owner, who inverts, preconditions and steps; parameters are gathered

An all-reduce of b bytes over n sends 2 (n - 1) / n b from each GPU, a reduce-scatter or a gather half of that. Messages and work do not
overlap. Factors and blocks are given out as the library does it, the dearest first, each to whom has the least to do.
"""

import argparse


def bert_base():
    """Weights [out, in + 1] of BERT-base with its head for masked words, and the parameters of the head and the table, which Adam has."""
    layer = [(768, 769)] * 4 + [(3072, 769), (768, 3073)]
    return layer * 12 + [(768, 769)], 30522 * 768, 512 * 768


def decoder_1b():
    """Those of a decoder of 1.24e9 parameters: 16 layers of 2048, feed-forward 8192, 8 heads of keys and values, 128256 words, one table."""
    layer = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    return layer * 16, 128256 * 2048, 0


MODELS = {"BERT-base": bert_base, "decoder-1B": decoder_1b}


def runs(dim, limit):
    """Rows of the blocks on a factor's diagonal."""
    count = -(-dim // limit)
    return -(-dim // count), count


def spread(costs, ranks):
    """Who does what: the dearest goes first, each to whom has the least to do."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def most(costs, owners, ranks):
    """The largest load."""
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners):
        loads[owner] += cost
    return max(loads)


class Step:
    def __init__(self, args, model, inverse, period):
        self.args, self.period = args, period
        shapes, tied, rest = MODELS[model]()
        matrices = sum(out * columns for out, columns in shapes)
        self.values = 4 * (matrices + tied + rest)
        tokens = args.tokens
        # Two flops a weight and token forward, four backward; the table's rows are a product in the head alone.
        self.passes = 6 * (matrices + tied) * tokens / (args.bf16 * 1e12)
        drawn = 2 * (matrices + tied) * tokens / (args.bf16 * 1e12)
        eigen = inverse == "eigen"
        self.units, self.states, self.factor_times = [], [], []
        self.factors, self.inverses, moments = 0, 0, 0.0
        for out, columns in shapes:
            # The wake's average of gradients, and the last step.
            inverting, stepping, state = 0.0, 0.0, 2 * 4 * out * columns
            for dim in (out, columns):
                run, count = runs(dim, args.limit)
                # A factor is symmetric: half of it is computed, and sent.
                moments += tokens * run * run * count / (args.f32 * 1e12)
                self.factors += 4 * run * (run + 1) // 2 * count
                self.inverses += 4 * run * run * count
                # The average, and its inverse or eigenvectors.
                state += 2 * 4 * run * run * count
                work, rate = (9 * 2 * run**3, args.eigen) if eigen else (run**3, args.cholesky)
                self.factor_times.append(count * work / (rate * 1e12))
                inverting += self.factor_times[-1]
                stepping += 2 * out * columns * run * (2 if eigen else 1) / (args.f32 * 1e12)
            # Gradient, direction, averages, parameter and master: about twelve passes over the matrix.
            stepping += 12 * 4 * out * columns / (args.memory * 1e9)
            self.units.append((inverting, stepping))
            self.states.append(state)
        # Adam: the table in parts that can be divided.
        self.adam = 12 * 4 * (tied + rest) / (args.memory * 1e9)
        self.refreshing = (drawn + moments) / period
        self.inverting = sum(self.factor_times) / period
        self.stepping = sum(stepping for _, stepping in self.units)
        self.adam_state = 2 * 4 * (tied + rest)
        self.state = sum(self.states) + self.adam_state

    def owners(self, ranks):
        return spread([inverting / self.period + stepping for inverting, stepping in self.units], ranks)

    def owned_state(self, ranks):
        """The most that an owner holds; Adam's table in equal parts."""
        return most(self.states, self.owners(ranks), ranks) + self.adam_state / ranks

    def seconds(self, placement, ranks):
        # Rings between hosts go over all network cards of each.
        args = self.args
        rate = 1e9 * (args.near if ranks <= args.host else min(args.near, args.host * args.far))
        share = (ranks - 1) / ranks
        summed = self.values + self.factors / self.period
        here = self.passes + self.refreshing
        if placement == "replicated":
            return here + self.inverting + self.stepping + self.adam + 2 * share * summed / rate
        if placement == "gathered":
            inverting = most(self.factor_times, spread(self.factor_times, ranks), ranks) / self.period
            sent = 2 * summed + self.inverses / self.period
            return here + inverting + self.stepping + self.adam + share * sent / rate
        work = [inverting / self.period + stepping for inverting, stepping in self.units]
        own = most(work, self.owners(ranks), ranks) + self.adam / ranks
        return here + own + share * (summed + self.values) / rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = lambda name, value, what: parser.add_argument(name, type=float, default=value, help=f"{what} ({value:g})")
    number("--bf16", 350, "TFLOP/s of the passes")
    number("--f32", 45, "TFLOP/s of factors and preconditioning")
    number("--cholesky", 8, "TFLOP/s of an inverse by Cholesky, d^3 flops")
    number("--eigen", 1.5, "TFLOP/s of an eigendecomposition, 18 d^3 flops")
    number("--memory", 3000, "GB/s of the GPU's memory")
    number("--near", 350, "GB/s that a GPU sends to others of its host")
    number("--far", 45, "GB/s of each GPU's network card")
    parser.add_argument("--host", type=int, default=8, help="GPUs of a host (8)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a GPU's part of the batch (16384)")
    parser.add_argument("--limit", type=int, default=4096, help="rows of a factor's largest block (4096)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 64], help="numbers of GPUs (8 64)")
    args = parser.parse_args()
    placements = ["replicated", "gathered", "owned"]
    columns = [(ranks, placement) for ranks in args.gpus for placement in placements]
    print("| model, inverse, period | passes | 1 GPU | " + " | ".join(f"{r}, {p}" for r, p in columns) + " | state, GiB | "
          + " | ".join(f"of {r} owners at most" for r in args.gpus) + " |")
    print("|---" + "|---:" * (3 + len(columns) + len(args.gpus)) + "|")
    for model in MODELS:
        for inverse, period in [("Cholesky", 10), ("Cholesky", 100), ("eigen", 10), ("eigen", 100)]:
            step = Step(args, model, inverse, period)
            times = [step.passes, step.seconds("replicated", 1)]
            times += [step.seconds(placement, ranks) for ranks, placement in columns]
            sizes = [step.state / 2**30] + [step.owned_state(ranks) / 2**30 for ranks in args.gpus]
            cells = [f"{1e3 * t:.0f}" for t in times] + [f"{size:.2g}" for size in sizes]
            print(f"| {model}, {inverse}, {period} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
