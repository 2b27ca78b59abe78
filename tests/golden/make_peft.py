"""Writes tests/golden/peft: adapters that Hugging Face's peft has made, and what it computes with those of this crate.

    pip install torch peft numpy
    python tests/golden/make_peft.py                            # base, inputs, and an adapter folder for each configuration
    KRONWAKE_GOLDEN=1 cargo test --test peft writes -- --ignored    # ours/*, the same adapters written by Lora::save
    python tests/golden/make_peft.py ours                       # loads ours/* by peft and writes its outputs

All f32. The model is emb [7, 6] -> fc1 6 -> 5 -> tanh -> block.fc1 5 -> 5 -> tanh -> fc2 5 -> 3 (no bias).
"""

import pathlib
import shutil
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

FOLDER = pathlib.Path(__file__).resolve().parent / "peft"
CONFIGS = {
    # A suffix that takes block.fc1 too, which is excluded; ranks and alphas by name; an embedding.
    "patterns": LoraConfig(r=2, lora_alpha=3, target_modules=["emb", "fc1", "fc2"], exclude_modules=["block.fc1"],
                           rank_pattern={"fc2": 3}, alpha_pattern={"^fc1": 5}, lora_dropout=0.1),
    "rslora": LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
    "expression": LoraConfig(r=3, lora_alpha=2, target_modules=r"block\.fc\d"),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(7, 6)
        self.fc1 = torch.nn.Linear(6, 5)
        self.block = torch.nn.ModuleDict({"fc1": torch.nn.Linear(5, 5)})
        self.fc2 = torch.nn.Linear(5, 3, bias=False)

    def forward(self, tokens):
        return self.fc2(self.block["fc1"](self.fc1(self.emb(tokens)).tanh()).tanh())


def base():
    model = Model()
    path = FOLDER / "base.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    return model


def outputs(model):
    with torch.no_grad():
        return model.eval()(TOKENS)


TOKENS = torch.tensor([[0, 3, 6, 1], [2, 2, 5, 4]])

if sys.argv[1:] == ["ours"]:
    found = {}
    for name in CONFIGS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of keys that are missing or left over
            found[name] = outputs(PeftModel.from_pretrained(base(), FOLDER / "ours" / name))
    save_file(found, FOLDER / "ours" / "outputs.safetensors")
else:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    torch.manual_seed(0)
    save_file(Model().state_dict(), FOLDER / "base.safetensors")
    found = {"tokens": TOKENS, "base": outputs(base())}
    for name, config in CONFIGS.items():
        model = get_peft_model(base(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
        found[name] = outputs(model)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
    save_file(found, FOLDER / "outputs.safetensors")
