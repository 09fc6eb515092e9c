"""Asking and choosing which rows of the operators' table compute."""

import pytest
import torch

import minipeft as mp
from minipeft import ops
from minipeft.adapters.products import is_slow
from minipeft.fast.backend import tried_first


def test_a_row_of_an_unknown_operator_is_refused():
    row = ops.Implementation("nothing", "k", lambda *_: True, "m", "f")
    with pytest.raises(ValueError, match="no operator 'nothing'"), tried_first(row):
        pass


def test_the_environment_turns_kernels_off(plain_python):
    script = """
import minipeft as mp
from minipeft import ops
from minipeft.fast.backend import tried_first
kernel = ops.Implementation("nf4_linear", "k", lambda *_: True, "math", "sqrt")
with tried_first(kernel):
    print(mp.backend()["nf4_linear"])
"""
    slow = is_slow(torch.bfloat16, torch.device("cpu"))
    said = "k, products in float32 (this CPU has none of bfloat16)" if slow else "k"
    assert plain_python(script).strip() == said
    assert "kernels are off" in plain_python(script, MINIPEFT_KERNELS="0")


def test_the_plain_rows_compute_everything_where_they_are_asked_for(plain_python):
    with mp.use_kernels("plain"):
        said = mp.backend("cuda")
    assert said.keys() == ops.OPERATORS.keys()
    assert {text.split(" ")[0] for text in said.values()} == {"plain"}
    for name in ("nf4_embedding", "nf4_experts"):
        assert said[name] == "plain (not pytorch: only plain rows are on)"
    assert "triton: only plain rows are on; numba: only plain" in said["dequantize_nf4"]
    assert not mp.backend()["nf4_linear"].startswith("plain")
    script = "import minipeft as mp; print(mp.backend()['nf4_linear'])"
    assert plain_python(script, MINIPEFT_KERNELS="plain").startswith("plain (not triton: only")


def test_other_settings_raise(plain_python):
    script = """
try:
    import minipeft
    with minipeft.use_kernels("fast"):
        pass
except ValueError as error:
    print(error)
"""
    assert "use_kernels: 'fast'; expected True, False" in plain_python(script)
    printed = plain_python(script, MINIPEFT_KERNELS="fast")
    assert "MINIPEFT_KERNELS='fast'; expected one of" in printed
