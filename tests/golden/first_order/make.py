"""Trajectories of public implementations of Muon, SOAP and Shampoo, for tests/optim/first_order.rs.

    pip install torch pytorch_optimizer safetensors numpy
    python tests/golden/first_order/make.py

A net of two matrices, x -> W2 tanh(W1 x), learns 8 examples in f64. trajectories.safetensors has its first parameters, the examples, and both matrices
after the steps 1, 2, 5 and 12 of each run. The implementations compute parts in bf16 and f32: here these names mean f64, so that the comparison
is one of formulas.
"""
import pathlib

import pytorch_optimizer
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
# No factor of a first gradient lacks more than one rank: among vectors of the same eigenvalue SOAP's basis would be anyone's.
W1, W2 = torch.randn(5, 4), torch.randn(4, 5)
X, Y = torch.randn(8, 4), torch.randn(8, 4)
KEPT = (1, 2, 5, 12)


def trajectory(name, make, tensors):
    w1, w2 = W1.clone().requires_grad_(), W2.clone().requires_grad_()
    optimizer = make([w1, w2])
    for step in range(1, max(KEPT) + 1):
        optimizer.zero_grad()
        # The batches differ: 4 of the 8 examples, by turns.
        places = [(step + i) % 8 for i in range(4)]
        out = torch.tanh(X[places] @ w1.T) @ w2.T
        ((out - Y[places]) ** 2).sum().div(4).backward()
        optimizer.step()
        if step in KEPT:
            tensors[f"{name}.{step}.w1"] = w1.detach().clone()
            tensors[f"{name}.{step}.w2"] = w2.detach().clone()


tensors = {"w1": W1, "w2": W2, "x": X, "y": Y}
bfloat16, float32 = torch.bfloat16, torch.float32
torch.bfloat16 = torch.float32 = torch.float64

muon = torch.optim.Muon
trajectory("muon", lambda p: muon(p, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), tensors)
trajectory("muon_original", lambda p: muon(p, lr=0.02, weight_decay=0, nesterov=False, momentum=0.8), tensors)
soap = pytorch_optimizer.SOAP
for period in (1, 3):
    trajectory(
        f"soap_{period}",
        lambda p: soap(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0, precondition_frequency=period, eps=1e-16),
        tensors,
    )
# One side of each matrix is longer than the bound.
trajectory(
    "soap_one_side",
    lambda p: soap(p, lr=0.02, shampoo_beta=0.8, weight_decay=0, precondition_frequency=2, max_precondition_dim=4, eps=1e-16),
    tensors,
)
trajectory("shampoo", lambda p: pytorch_optimizer.Shampoo(p, lr=0.1, matrix_eps=1e-14), tensors)
trajectory(
    "shampoo_grafted",
    lambda p: pytorch_optimizer.ScalableShampoo(
        p, lr=0.02, betas=(0.0, 0.9), start_preconditioning_step=1, preconditioning_compute_steps=1, matrix_eps=1e-14, use_svd=True,
        shape_interpretation=False,
    ),
    tensors,
)
torch.bfloat16, torch.float32 = bfloat16, float32
save_file(tensors, pathlib.Path(__file__).with_name("trajectories.safetensors"))
print(torch.__version__, pytorch_optimizer.get_supported_optimizers and "pytorch_optimizer", len(tensors), "tensors")
