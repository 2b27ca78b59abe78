"""Reference values of laplace-torch for the posterior of a last layer and of a subnetwork: laplace.safetensors and laplace.json.

python make.py FOLDER, with torch, laplace-torch 0.3 and curvlinops 3.0.1.
"""
import json
import sys
import warnings

import torch
from laplace import Laplace
from laplace.utils import ModuleNameSubnetMask
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
N, IN, HIDDEN, CLASSES, INPUTS = 40, 3, 6, 5, 4
model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn_like(p))
x, y = torch.randn(N, IN), torch.randint(CLASSES, (N,))
inputs = torch.randn(INPUTS, IN)
targets = torch.randn(N, CLASSES)
tensors = {"x": x, "y": y, "inputs": inputs, "targets": targets}
for name, to in [("0", "fc1"), ("2", "fc2")]:
    for kind in ["weight", "bias"]:
        tensors[f"{to}.{kind}"] = dict(model.named_parameters())[f"{name}.{kind}"].detach().clone()
values = {"temperature": 0.7, "prior_precision": [0.8, 1.7], "noise": 0.6}


def record(name, likelihood, subset, structure, **more):
    labels = y if likelihood == "classification" else targets
    la = Laplace(model, likelihood, subset_of_weights=subset, hessian_structure=structure, temperature=values["temperature"], **more)
    la.fit(DataLoader(TensorDataset(x, labels), batch_size=16))
    precision = torch.tensor(values["prior_precision"])
    if structure == "kron" or subset == "subnetwork":
        # laplace-torch takes no more here.
        precision = precision[:1]
    else:
        precision = torch.cat([precision[:1].expand(HIDDEN * CLASSES), precision[1:].expand(CLASSES)])
    if likelihood == "regression":
        la.sigma_noise = values["noise"]
    la.prior_precision = precision
    mean, covariance = la._glm_predictive_distribution(inputs)
    if covariance.ndim == 2:
        covariance = torch.diag_embed(covariance)
    tensors[f"{name}.mean"], tensors[f"{name}.covariance"] = mean.detach().contiguous(), covariance.detach().contiguous()
    found = {"log_det_ratio": float(la.log_det_ratio), "log_likelihood": float(la.log_likelihood)}
    if likelihood == "classification":
        for link in ["probit", "bridge"]:
            p = la(inputs, link_approx=link)
            tensors[f"{name}.{link}"] = p.detach().contiguous()
    values[name] = found


for likelihood in ["classification", "regression"]:
    for structure in ["full", "kron", "diag"]:
        record(f"{likelihood}.last.{structure}", likelihood, "last_layer", structure)
subnetwork = ModuleNameSubnetMask(model, module_names=["2"]).select()
record("classification.subnetwork.full", "classification", "subnetwork", "full", subnetwork_indices=subnetwork.type(torch.LongTensor))
save_file(tensors, f"{sys.argv[1]}/laplace.safetensors")
with open(f"{sys.argv[1]}/laplace.json", "w") as file:
    json.dump(values, file, indent=1)
