"""The small GPT in GPT-2's Hugging Face format, which transformers and `load` below read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from plumbing.reading import read_json

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")       # GPT-2 stores them (in, out)


def save(policy, folder, eot, weights):
    """Write config.json and model.safetensors. A GPT without biases gets biases of 0."""
    folder, c = Path(folder), policy.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, p in weights.items():
        stored = p.t().contiguous() if name.endswith(TRANSPOSED) else p
        tensors["transformer." + name] = stored.cpu()
        if not c.bias and name.startswith(("h.", "ln_f.")):
            bias = "transformer." + name.removesuffix("weight") + "bias"
            tensors[bias] = torch.zeros(len(p), dtype=p.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
        n_positions=c.context, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu_new", n_inner=None, layer_norm_epsilon=1e-5,
        tie_word_embeddings=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        dtype=str(policy.wte.weight.dtype).removeprefix("torch."), bos_token_id=eot,
        eos_token_id=eot, nanokto={"bias": c.bias})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(gpt, shape, folder, dtype):
    """gpt: the class, shape: the class of its config.   -> a GPT on the CPU"""
    c = read_json(Path(folder) / "config.json", folder)
    stored = load_file(Path(folder) / "model.safetensors")
    if not 0 < c["n_layer"] < len(stored):                   # a huge number would never end
        raise ValueError(f"config.json: n_layer is {c['n_layer']}; there are {len(stored)} tensors")
    model = gpt(shape(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"],
                      c["nanokto"]["bias"])).to(dtype)
    weights = {}
    for name in model.state_dict():
        tensor = stored["transformer." + name]
        weights[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    model.load_state_dict(weights)
    return model
