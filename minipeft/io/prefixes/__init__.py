"""Prefixes and prompts as files: our own, and those of P-tuning v2, ChatGLM and VisualGLM.

Own directory: prefix_config.json and prefix.safetensors, whose `flat` is the whole prefix as one
table (prefix_length, sum of kv_heads * (key_dim + value_dim)): layer by layer, keys of all heads,
then values of all heads.  It says what no other format can: positions, windows, locations, gates.
A PrefixEncoder of attention of your own is such a directory too.
"""

from minipeft.io.prefixes.load import load_encoder, load_prefix
from minipeft.io.prefixes.ptuning_v2 import flat_table, load_prefix_encoder, save_prefix_encoder
from minipeft.io.prefixes.sat import load_sat_prefix
from minipeft.io.prefixes.save import save_prefix

__all__ = [
    "flat_table",
    "load_encoder",
    "load_prefix",
    "load_prefix_encoder",
    "load_sat_prefix",
    "save_prefix",
    "save_prefix_encoder",
]
