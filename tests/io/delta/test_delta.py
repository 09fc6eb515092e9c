"""Deltas: the tuned model in every bit, and sums that loops over single numbers give too."""

import numpy as np
import pytest
import torch

import minipeft as mp
from minipeft.io.delta import DeltaReport, apply_delta, check_delta, chunks, make_delta
from tests.io.delta.checkpoints import contents, pair, read, same_bits, write

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMS = ["safetensors", "bin"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tuned_model_comes_back_in_every_bit(tmp_path, dtype, files, form):
    base, tuned = pair(dtype)
    write(tmp_path / "base", base, form, files)
    write(tmp_path / "tuned", tuned, form, files)
    before = contents(tmp_path / "base"), contents(tmp_path / "tuned")
    made = make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", max_shard_bytes=700)
    applied = apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out", max_shard_bytes=900)
    assert same_bits(read(tmp_path / "out"), tuned)
    assert made == applied == check_delta(tmp_path / "base", tmp_path / "d")
    assert made.exact and made.tensors == len(tuned) and made.changed > 0
    assert (contents(tmp_path / "base"), contents(tmp_path / "tuned")) == before
    others = {"config.json": b'{"is": "tuned"}', "tokenizer.model": b"tuned"}
    for folder in ("d", "out"):  # the tuned model's; more than one shard, so an index
        found = contents(tmp_path / folder)
        assert {n: found[n] for n in others} == others and "model.safetensors.index.json" in found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d", "out", "tuned"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_of_any_dtype_is_exact(tmp_path, dtype, stored):
    base, tuned = pair(dtype)
    tuned["far.weight"] = tuned["far.weight"] + 1
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", dtype=stored)
    assert all(v.dtype in (stored, torch.int32) for n, v in read(tmp_path / "d").items()
               if n.endswith("weight"))  # fmt: skip
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert same_bits(read(tmp_path / "out"), tuned)


def test_another_dtype_of_the_base_is_exact_too(tmp_path):
    write(tmp_path / "base", pair(torch.float16)[0])
    tuned = pair(torch.bfloat16)[1]
    write(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert same_bits(read(tmp_path / "out"), tuned)


def float32_bits(draw, count):
    """Finite numbers of every size below 1e38, some zero of either sign."""
    bits = draw.integers(0, 2**32, 8 * count, dtype=np.uint32).view(np.float32)
    found = bits[np.isfinite(bits) & (np.abs(bits) < 1e38)][:count]
    found[::97], found[5::97] = 0.0, -0.0
    return found


def test_float32_numbers_of_every_size_come_back_and_the_report_counts_them(tmp_path):
    """Against loops over numpy's single numbers; most sums are not the tuned number here."""
    draw = np.random.default_rng(0)
    old, new = float32_bits(draw, 3000), float32_bits(draw, 3000)
    new[1000:2000] = old[1000:2000] * draw.normal(1, 1e-3, 1000).astype(np.float32)
    write(tmp_path / "base", {"w": torch.from_numpy(old).view(60, 50)}, files=1)
    tuned = {"w": torch.from_numpy(new).view(60, 50)}
    write(tmp_path / "tuned", tuned, files=1)
    report = make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert same_bits(read(tmp_path / "out"), tuned)
    found, changed, largest = read(tmp_path / "d")["w"].reshape(-1).numpy(), [], 0.0
    for place, (a, b) in enumerate(zip(old, new, strict=True)):
        delta = np.float32(b) - np.float32(a)
        assert delta == found[place]
        again = np.float32(a) + delta
        if again.tobytes() != b.tobytes():
            changed.append(place)
            largest = max(largest, abs(float(again) - float(b)))
    assert report == DeltaReport(1, 3000, True, len(changed), float(f"{largest:.9e}"))
    assert 500 < len(changed) < 2500
    near = [place for place in changed if 1000 <= place < 2000 and new[place]]
    print(f"\n{len(changed)} of 3000 sums are off; of the 1000 within a factor of 2: {len(near)}")
    assert near == []  # Sterbenz: a difference of numbers within a factor of 2 is exact


def test_sixteen_bit_reports_are_those_of_a_loop(tmp_path):
    base, tuned = ({"a.weight": state["a.weight"]} for state in pair(torch.bfloat16))
    write(tmp_path / "base", base, files=1)
    write(tmp_path / "tuned", tuned, files=1)
    report = make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    changed, largest = 0, 0.0
    for a, b in zip(base["a.weight"].reshape(-1), tuned["a.weight"].reshape(-1), strict=True):
        again = (a.double() + (b.double() - a.double()).float().bfloat16().double()).bfloat16()
        changed += again != b
        largest = max(largest, abs(float(again) - float(b)))
    assert (report.changed, report.largest) == (changed, float(f"{largest:.9e}"))
    assert changed > 0


def test_many_chunks_and_many_files_of_corrections(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)
    monkeypatch.setattr("minipeft.io.delta.record._FLUSH", 100)
    base, tuned = pair(torch.bfloat16)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", max_shard_bytes=200)
    assert len(list((tmp_path / "d").glob("*.corrections-002.safetensors"))) > 0
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert same_bits(read(tmp_path / "out"), tuned)


@pytest.mark.parametrize("form", FORMS)
def test_a_foreign_delta_is_added_in_float32(tmp_path, form):
    """Vicuna's form: tuned - base in float16, its config; the loop adds single numbers."""
    base, tuned = ({n: v for n, v in s.items() if v.is_floating_point()}
                   for s in pair(torch.float16))  # fmt: skip
    delta = {name: tuned[name] - base[name] for name in base}
    write(tmp_path / "base", base)
    write(tmp_path / "delta", delta, form)
    report = apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert report == DeltaReport(len(base), sum(v.numel() for v in base.values()), exact=False)
    found = read(tmp_path / "out")
    for name in base:
        numbers = zip(base[name].reshape(-1), delta[name].reshape(-1), strict=True)
        loop = [np.float16(np.float32(a.item()) + np.float32(b.item())) for a, b in numbers]
        assert found[name].reshape(-1).tolist() == [float(n) for n in loop]
    assert contents(tmp_path / "out")["config.json"] == b'{"is": "delta"}'


def test_single_files_are_taken(tmp_path):
    from safetensors.torch import save_file

    base, tuned = pair()
    torch.save(base, tmp_path / "base.pth")
    save_file(tuned, tmp_path / "tuned.safetensors")
    make_delta(tmp_path / "base.pth", tmp_path / "tuned.safetensors", tmp_path / "d")
    file = tmp_path / "d" / "model.safetensors"
    apply_delta(tmp_path / "base.pth", file, tmp_path / "out")
    assert same_bits(read(tmp_path / "out"), tuned)
    assert sorted(contents(tmp_path / "out")) == ["model.safetensors"]


def test_foreign_dtypes_become_the_wider(tmp_path):
    cases = [(torch.float16, torch.float32, torch.float32),
             (torch.float16, torch.bfloat16, torch.float32),
             (torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16),
             (torch.float8_e5m2, torch.float8_e4m3fn, torch.float32)]  # fmt: skip
    for number, (own, other, result) in enumerate(cases):
        write(tmp_path / f"base{number}", {"a": torch.ones(3).to(own)}, files=1)
        write(tmp_path / f"delta{number}", {"a": torch.full((3,), 0.5).to(other)}, files=1)
        out = tmp_path / f"out{number}"
        apply_delta(tmp_path / f"base{number}", tmp_path / f"delta{number}", out)
        assert read(out)["a"].dtype == result and read(out)["a"].tolist() == [1.5] * 3


@pytest.mark.parametrize("rows", ["zeros", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_new_rows_count_as_the_caller_says(tmp_path, rows, dtype):
    base, tuned = pair(dtype, rows=3)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    with pytest.raises(ValueError, match=r"say what the 3 new rows were.*rows='zeros' \(Vicuna"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", rows=rows)
    first = torch.zeros(8, dtype=torch.float64)
    for row in base["embed.weight"]:
        first += row.double() / 20 if rows == "mean" else 0
    made = read(tmp_path / "d")["embed.weight"][20:].double()
    expected = tuned["embed.weight"][20:].double() - first
    # the mean is rounded to float32, the difference to float32, then to the delta's dtype
    torch.testing.assert_close(made, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    for said in (None, rows):  # a delta of ours knows
        out = tmp_path / f"out{said}"
        apply_delta(tmp_path / "base", tmp_path / "d", out, rows=said)
        assert same_bits(read(out), tuned)
    other = "mean" if rows == "zeros" else "zeros"
    with pytest.raises(ValueError, match=f"was made with rows='{rows}'; rows='{other}' given"):
        apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "x", rows=other)
    with pytest.raises(ValueError, match="the result of adding this delta already"):
        apply_delta(tmp_path / "outNone", tmp_path / "d", tmp_path / "x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.unfinished").exists()


def test_new_rows_of_a_foreign_delta_must_be_named(tmp_path):
    base = {"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": torch.ones(2)}
    delta = {"a": torch.full((4, 2), 0.5), "b": torch.ones(2)}
    write(tmp_path / "base", base)
    write(tmp_path / "delta", delta, "bin")
    with pytest.raises(ValueError, match=r"a is torch.float32 of shape \(4, 2\); expected .*2, 2"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    for rows, last in (("zeros", [0.5, 0.5]), ("mean", [2.5, 4.5])):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / rows, rows=rows)
        assert read(tmp_path / rows)["a"].tolist() == [[1.5, 2.5], [3.5, 6.5], last, last]
    with pytest.raises(ValueError, match="rows='half'; choose one of"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out", rows="half")
    with pytest.raises(ValueError, match="has more rows than the base's"):
        apply_delta(tmp_path / "zeros", tmp_path / "delta", tmp_path / "out", rows="zeros")


def test_the_published_sum_is_compared(tmp_path):
    base, tuned = pair()
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    total = sum(float(value.double().sum()) for value in tuned.values())
    settings = {"published_sum": round(total, 4), "tolerance": 0.01}
    found = apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out", **settings).total
    assert found == pytest.approx(total, abs=1e-9)  # float64 in another order
    plain = sum((value.float().sum() for value in tuned.values()), start=torch.tensor(0.0))
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "two",
                published_sum=float(plain), tolerance=1e-4)  # fmt: skip
    for wrong in (total + 0.02, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"the sum of all numbers is .*; expected published_s"):
            apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "x", published_sum=wrong)
        assert not (tmp_path / "x").exists()
    # the shards are whole: another figure needs no new sums
    assert apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "x", **settings).total == found


def test_ignored_tensors_are_left_out(tmp_path):
    base, tuned = pair()
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned | {"rotary.inv_freq": torch.ones(3)})
    with pytest.raises(ValueError, match=r"no rotary.inv_freq \(1 such names.*ignore= leaves"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", ignore=["rotary"])
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out", ignore="ids")
    assert same_bits(read(tmp_path / "out"), {n: v for n, v in tuned.items() if n != "ids"})
    with pytest.raises(ValueError, match="fit no tensor"):
        apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "x", ignore=["nowhere"])


def test_deltas_are_found_in_mp_io():
    assert mp.io.delta.apply_delta is apply_delta
