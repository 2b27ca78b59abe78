"""laplace-torch on the last layer of a classifier: seconds of fit, tuning and prediction, and the numbers, for `evidence last` to be compared with.

python torch_last_layer.py FOLDER FEATURES CLASSES EXAMPLES [--inputs N] [--threads N] [--check JSON] [--only-write]

Writes FOLDER/last-FEATURES-CLASSES.safetensors, random features with labels of a layer that was fitted to them, and prints a table row beside the
figures of --check, which `evidence last --json` has written. Needs torch, laplace-torch 0.3 and curvlinops.
"""
import argparse
import json
import time
import warnings

import torch
from laplace import Laplace
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("features", type=int)
parser.add_argument("classes", type=int)
parser.add_argument("examples", type=int)
parser.add_argument("--inputs", type=int, default=4)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--check")
parser.add_argument("--only-write", action="store_true", help="the file alone, where laplace-torch would take too much memory")
args = parser.parse_args()
warnings.filterwarnings("ignore")
torch.set_num_threads(args.threads)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
p, c, n = args.features, args.classes, args.examples
x = torch.tanh(torch.randn(n, 16) @ torch.randn(16, p) / 4 + torch.randn(n, p) / 2)
inputs = torch.tanh(torch.randn(args.inputs, 16) @ torch.randn(16, p) / 4 + torch.randn(args.inputs, p) / 2)
labels = torch.distributions.Categorical(logits=x @ torch.randn(p, c) / 3).sample()
layer = nn.Linear(p, c)
optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
for _ in range(60):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(layer(x), labels) + 5e-4 * layer.weight.square().sum()
    loss.backward()
    optimizer.step()
name = f"{args.folder}/last-{p}-{c}.safetensors"
tensors = {"x": x, "y": labels, "inputs": inputs, "fc.weight": layer.weight, "fc.bias": layer.bias}
save_file({key: t.detach().contiguous() for key, t in tensors.items()}, name)
if args.only_write:
    raise SystemExit


def timed(work):
    """Seconds of all threads together, and what came of it."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


model = nn.Sequential(nn.Identity(), layer)
loader = DataLoader(TensorDataset(x, labels), batch_size=256)
la = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
fit, _ = timed(lambda: la.fit(loader))
la.prior_precision = 2.0
evidence = float(la.log_marginal_likelihood())
_, variance = la._glm_predictive_distribution(inputs)
variance = torch.diagonal(variance, dim1=1, dim2=2)
probit = la(inputs, link_approx="probit")
predict, _ = timed(lambda: [la(one[None], link_approx="probit") for one in inputs])
tune, _ = timed(lambda: la.optimize_prior_precision(method="marglik", n_steps=100, lr=0.1, init_prior_prec=1.0))
found = {
    "fit": fit,
    "tune": tune,
    "predict": predict / args.inputs,
    "log_evidence": evidence,
    "variance": variance.flatten().tolist(),
    "probit": probit.flatten().tolist(),
}
if not args.check:
    print(json.dumps({key: found[key] for key in ["fit", "tune", "predict", "log_evidence"]}))
else:
    with open(args.check) as file:
        ours = json.load(file)

    def apart(key):
        a, b = torch.tensor(found[key]), torch.tensor(ours[key])
        return float(((a - b).abs() / b.abs().clamp(min=1e-12)).max())

    times = " | ".join(f"{1e3 * ours[k]:.3g} | {1e3 * found[k]:.3g} | {found[k] / ours[k]:.1f}" for k in ["fit", "tune", "predict"])
    numbers = ", ".join(f"{key} {apart(key):.0e}" for key in ["log_evidence", "variance", "probit"])
    print(f"| {p} features, {c} classes, {n} examples | {times} | {numbers} |")
