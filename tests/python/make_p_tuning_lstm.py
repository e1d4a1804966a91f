"""Makes a prompt with PEFT's LSTM encoder, which the tests of modl-compute compare with.

Run by hand, with peft 0.21.2 and torch:

    python tests/python/make_p_tuning_lstm.py crates/modl-compute/tests/fixtures

The file holds the encoder's parameters under PEFT's names, and the `prompt` that they make.
"""

import sys

import torch
from peft.tuners.p_tuning import PromptEncoder, PromptEncoderConfig
from safetensors.torch import save_file

torch.manual_seed(3)
torch.set_num_threads(1)
config = PromptEncoderConfig(
    num_virtual_tokens=5,
    token_dim=32,
    num_transformer_submodules=1,
    encoder_reparameterization_type="LSTM",
    encoder_hidden_size=6,
    encoder_num_layers=2,
)
encoder = PromptEncoder(config)
with torch.no_grad():
    for p in encoder.parameters():
        p.add_(0.3 * torch.randn_like(p))
    prompt = encoder(torch.arange(5)[None])[0]
tensors = {name: t.contiguous().clone() for name, t in encoder.state_dict().items()}
save_file({**tensors, "prompt": prompt.contiguous()}, f"{sys.argv[1]}/p_tuning_lstm.safetensors")
