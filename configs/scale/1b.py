"""A decoder of 0.99 billion parameters as they are built today: rotary positions, RMSNorm, SwiGLU; a million tokens a step.

python -m launch.plan --config=configs/scale/1b.py --device=v5p --num_devices=16

Planned, not trained: lm/benchmark/results/scale/README.md.
"""

from configs._common import finish
from configs.scale._decoder import decoder


def get_config(argument=""):
    return finish(decoder(num_layers=18, hidden_dim=2_048, num_heads=16, mlp_dim=5_632, batch_size=512, seq_len=2_048), argument)
