"""The speed of an LSTM of 2 × 650 in steps of 20 × 35 tokens.

python -m launch.benchmark --config=configs/benchmark/lstm.py --against=torch
"""

from configs._common import finish
from configs.benchmark._recurrent import recurrent


def get_config(argument=""):
    return finish(recurrent("lstm"), argument)
