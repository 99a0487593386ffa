"""A decoder of 9.8 billion parameters as they are built today: rotary positions, RMSNorm, SwiGLU; four million tokens a step.

python -m launch.plan --config=configs/scale/10b.py --device=v5p --num_devices=128

Planned, not trained: lm/benchmark/results/scale/README.md.
"""

from configs._common import finish
from configs.scale._decoder import decoder


def get_config(argument=""):
    return finish(
        decoder(num_layers=48, hidden_dim=4_096, num_heads=32, mlp_dim=11_008, batch_size=1_024, seq_len=4_096), argument
    )
