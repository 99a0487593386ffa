"""A decoder of 99 billion parameters as they are built today: rotary positions, RMSNorm, SwiGLU; eight million tokens a step.

python -m launch.plan --config=configs/scale/100b.py --device=v5p --num_devices=1024

Planned, not trained: lm/benchmark/results/scale/README.md.
"""

from configs._common import finish
from configs.scale._decoder import decoder


def get_config(argument=""):
    return finish(
        decoder(num_layers=78, hidden_dim=10_240, num_heads=80, mlp_dim=27_648, batch_size=2_048, seq_len=4_096), argument
    )
