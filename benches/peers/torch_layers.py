#!/usr/bin/env python3
"""The models of `cargo bench --bench layers` in eager PyTorch on the CPU: seconds of training steps, a JSON object a step."""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn


def tokens(batch, positions, vocabulary):
    """Token numbers that only look random, the same in the other program."""
    drawn = [(i * 2654435761) % 2**32 % vocabulary for i in range(batch * positions)]
    return torch.tensor(drawn).view(batch, positions)


def padding(batch, positions):
    """True for tokens: lengths from half of the positions to all."""
    lengths = torch.tensor([positions - row * positions // 2 // batch for row in range(batch)])
    return torch.arange(positions)[None, :] < lengths[:, None]


def split(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


class EncoderLayer(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.attended = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.after_attention, self.after_feed_forward = (nn.LayerNorm(hidden, 1e-12) for _ in range(2))

    def forward(self, x, mask):
        q, k, v = (split(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.after_attention(self.attended(join(attended)) + x)
        return self.after_feed_forward(self.down(F.gelu(self.up(x))) + x)


class Encoder(nn.Module):
    def __init__(self, hidden, layers):
        super().__init__()
        self.words, self.positions = nn.Embedding(30522, hidden), nn.Embedding(512, hidden)
        self.types, self.norm = nn.Embedding(2, hidden), nn.LayerNorm(hidden, 1e-12)
        self.layers = nn.ModuleList(EncoderLayer(hidden, 12) for _ in range(layers))

    def forward(self, numbers, live):
        positions = torch.arange(numbers.shape[1]).expand(numbers.shape)
        x = self.words(numbers) + self.positions(positions) + self.types(torch.zeros_like(numbers))
        x = self.norm(x)
        mask = (1 - live[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * live[:, :, None]).sum(1) / live.sum(1, keepdim=True)
        return mean / mean.square().sum(1, keepdim=True).sqrt()


class DecoderLayer(nn.Module):
    def __init__(self, hidden, inner, heads, key_heads):
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        of_keys = hidden // heads * key_heads
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.query, self.key, self.value = linear(hidden, hidden), linear(hidden, of_keys), linear(hidden, of_keys)
        self.attended = linear(hidden, hidden)
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)
        self.before_attention, self.before_feed_forward = (nn.RMSNorm(hidden, 1e-5) for _ in range(2))

    def forward(self, x, cos, sin):
        def rope(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        normed = self.before_attention(x)
        q = rope(split(self.query(normed), self.heads))
        k = rope(split(self.key(normed), self.key_heads))
        v = split(self.value(normed), self.key_heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = self.attended(join(attended)) + x
        normed = self.before_feed_forward(x)
        return self.down(F.silu(self.gate(normed)) * self.up(normed)) + x


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8192, 512)
        self.layers = nn.ModuleList(DecoderLayer(512, 1376, 8, 4) for _ in range(4))
        self.norm, self.output = nn.RMSNorm(512, 1e-5), nn.Linear(512, 8192, bias=False)
        rates = 1e4 ** (-2 * torch.arange(32) / 64)
        angles = torch.arange(256)[:, None] * rates[None, :]
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, numbers):
        x = self.words(numbers)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.output(self.norm(x))


def encoder_loss(hidden, layers, batch):
    model = Encoder(hidden, layers)
    numbers, live = tokens(batch, 128, 30522), padding(batch, 128)

    def loss():
        a, b = model(numbers, live).chunk(2)
        return ((a * b).sum(1) - 0.5).square().mean()

    return model, loss


def decoder_loss():
    model = Decoder()
    numbers = tokens(8, 257, 8192)
    inputs, following = numbers[:, :-1].contiguous(), numbers[:, 1:].reshape(-1)
    return model, lambda: F.cross_entropy(model(inputs).flatten(0, 1), following)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["minilm", "bert2", "decoder"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {"minilm": lambda: encoder_loss(384, 6, 16), "bert2": lambda: encoder_loss(768, 2, 8), "decoder": decoder_loss}
    model, loss = cases[args.model]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    for step in range(args.steps + 2):
        cpu, wall = [time.process_time()], time.perf_counter()
        value = loss()
        cpu.append(time.process_time())
        optimizer.zero_grad()
        value.backward()
        cpu.append(time.process_time())
        optimizer.step()
        cpu.append(time.process_time())
        wall = time.perf_counter() - wall
        if step >= 2:
            parts = {part: b - a for part, a, b in zip(["forward", "backward", "update"], cpu, cpu[1:])}
            print(json.dumps({"cpu": cpu[3] - cpu[0], "wall": wall, **parts, "loss": value.item()}), flush=True)


if __name__ == "__main__":
    main()
