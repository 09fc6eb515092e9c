"""What is refused: another base, a base that is the result, other tensors, damage of any kind."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeft.io.delta import apply_delta, check_delta, make_delta
from tests.io.delta.checkpoints import INDEX, contents, pair, read, same_bits, write


@pytest.fixture
def made(tmp_path):
    """A base, a tuned model and their delta, in folders of these names."""
    base, tuned = pair(torch.bfloat16)
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", max_shard_bytes=700)
    return tmp_path


def refuse(folder, message, base="base", delta="delta", **settings):
    with pytest.raises(ValueError, match=message) as caught:
        apply_delta(folder / base, folder / delta, folder / "out", **settings)
    assert not (folder / "out").exists()
    if not (folder / "out.unfinished").exists():
        with pytest.raises(ValueError, match=message):
            check_delta(folder / base, folder / delta, **settings)
    shutil.rmtree(folder / "out.unfinished", ignore_errors=True)
    return str(caught.value)


def changed(folder, name, change):
    """The base with one tensor changed, in a folder of its own; None: left out."""
    state = pair(torch.bfloat16)[0]
    value = change(state[name])
    state = {n: v for n, v in state.items() if n != name} | ({} if value is None else {name: value})
    shutil.rmtree(folder / "other", ignore_errors=True)
    write(folder / "other", state)


def test_a_delta_is_not_added_twice(made):
    apply_delta(made / "base", made / "delta", made / "once")
    for base in ("once", "tuned"):  # tuned: as others saved it
        refuse(made, r"is the result of adding this delta already", base=base)


def test_a_shard_written_again_is_not_taken_for_a_plain_delta(made):
    """The record goes with the metadata; the corrections beside it would be left out."""
    assert list((made / "delta").glob("*.corrections-*.safetensors"))
    for path in (made / "delta").glob("*.safetensors"):
        if ".corrections-" not in path.name:
            save_file(load_file(path), path, metadata={"format": "pt"})
    refuse(made, r"corrections-\d+.safetensors corrects it, and its own record .* get the delta")


def test_another_base_is_refused(made):
    def nudged(value):
        value.view(-1)[3] += 1
        return value

    changed(made, "a.weight", nudged)
    text = refuse(made, r"a.weight has the sha256 \w{64}; .* was made from \w{64}", base="other")
    assert "other" in text and "model-0000" in text and "get the one" in text
    changed(made, "a.weight", lambda value: value.half())
    refuse(made, "another version or dtype", base="other")
    changed(made, "a.weight", lambda value: value[:, :4].contiguous())
    refuse(made, r"of shape \(31, 7\); expected .* of shape \(31, 4\), as in", base="other")
    changed(made, "a.weight", lambda value: value[:, :1].contiguous())  # would broadcast
    refuse(made, r"of shape \(31, 7\); expected .* of shape \(31, 1\)", base="other")
    changed(made, "scalar", lambda value: value.reshape(1))
    refuse(made, r"of shape \(\); expected .* of shape \(1,\)", base="other")
    changed(
        made, "embed.weight", lambda value: torch.cat([value, value])
    )  # fewer rows in the delta
    refuse(made, r"of shape \(20, 8\); expected .* of shape \(40, 8\)", base="other")
    changed(made, "ids", lambda value: value.int())
    refuse(made, "ids is torch.int64 of shape .*; expected torch.int32", base="other")
    changed(made, "ids", lambda value: value.float())
    refuse(made, "ids is torch.int64 of shape .*; expected torch.float32", base="other")
    changed(made, "same", lambda value: None)
    refuse(made, r"other: no same \(1 such names in all\), which .*delta.* has", base="other")
    refuse(made, "is a delta; expected the base; are they swapped", base="delta", delta="base")
    refuse(made, "no such file or directory", base="nowhere")
    (made / "empty").mkdir()
    refuse(made, r"no model.safetensors .* no pytorch_model.bin.index.json; pass", base="empty")


def test_a_foreign_delta_is_refused_where_that_can_be_known(tmp_path):
    base, tuned = pair(torch.float16)
    delta = {n: tuned[n] ^ base[n] if n == "mask" else tuned[n] - base[n] for n in base}
    write(tmp_path / "base", base)
    write(tmp_path / "delta", delta, "bin")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "once")
    refuse(tmp_path, "the result of adding this delta already", base="once")
    write(tmp_path / "more", delta | {"extra": torch.ones(3)}, "bin")
    refuse(tmp_path, r"base: no extra \(1 such names in all\)", delta="more")
    write(tmp_path / "less", {n: v for n, v in delta.items() if n != "same"}, "bin")
    refuse(tmp_path, r"less: no same \(1 such names in all\)", delta="less")
    write(tmp_path / "wide", delta | {"scalar": torch.ones(1).half()}, "bin")
    refuse(tmp_path, r"scalar is .* of shape \(1,\); expected .* of shape \(\)", delta="wide")
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("large", 60000.0)):
        bad = delta | {"same": torch.full((6,), value).half()}
        bad["scalar"] = torch.tensor(60000.0).half()
        source = write(tmp_path / f"base-{name}", base | {"scalar": torch.tensor(60000.0).half()})
        write(tmp_path / name, bad, "bin")
        refuse(tmp_path, r"base \+ delta is NaN or Inf", base=source.name, delta=name)


def test_what_cannot_be_a_delta_is_refused_when_it_is_made(tmp_path):
    base, tuned = pair(torch.float16)
    write(tmp_path / "base", base)

    def run(state, message, **settings):
        shutil.rmtree(tmp_path / "tuned", ignore_errors=True)
        write(tmp_path / "tuned", state)
        with pytest.raises(ValueError, match=message):
            make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", **settings)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]

    for value in (float("nan"), float("-inf")):
        run({**tuned, "same": torch.full((6,), value).half()}, "tuned.*same holds NaN or Inf")
    run({n: v for n, v in tuned.items() if n != "same"}, r"tuned: no same")
    run({**tuned, "same": torch.ones(1).half()}, r"same is .*\(1,\); expected .*\(6,\)")
    run(tuned, "dtype=torch.int8; expected float32", dtype=torch.int8)
    run(tuned, "max_shard_bytes=0", max_shard_bytes=0)
    run(tuned, "has more rows than the base's", rows="mean")
    with pytest.raises(ValueError, match="never written to"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "base" / "d")
    with pytest.raises(ValueError, match="exists already"):
        make_delta(tmp_path / "base", tmp_path / "base", tmp_path / "tuned")


def test_a_difference_beyond_the_deltas_dtype_is_refused(tmp_path):
    write(tmp_path / "base", {"a": torch.tensor([60000.0]).half()}, files=1)
    write(tmp_path / "tuned", {"a": torch.tensor([-60000.0]).half()}, files=1)
    with pytest.raises(ValueError, match=r"a differs from the base by more than torch.float16"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", dtype=torch.float32)
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert read(tmp_path / "out")["a"].tolist() == [-60000.0]


def test_missing_and_cut_files_are_refused(made):
    apply_delta(made / "base", made / "delta", made / "whole")
    for folder in ("base", "delta"):
        for path in sorted((made / folder).glob("*.safetensors*")):
            data = path.read_bytes()
            for size in (None, 0, 5, len(data) // 2, len(data) - 1):
                path.unlink(missing_ok=True)
                if size is not None:
                    path.write_bytes(data[:size])
                text = refuse(made, "model")
                assert str(path) in text or size is None, (path, size, text)
            path.write_bytes(data)
    apply_delta(made / "base", made / "delta", made / "again")
    assert contents(made / "again") == contents(made / "whole")


def test_files_of_another_delta_are_refused(made):
    _, tuned = pair(torch.bfloat16)
    tuned["a.weight"] += 1
    write(made / "tuned2", tuned)
    make_delta(made / "base", made / "tuned2", made / "delta2", max_shard_bytes=700)
    names = [p.name for p in (made / "delta").glob("*.corrections-*")]
    swapped = 0
    for name in sorted(names):
        if (made / "delta2" / name).read_bytes() != (data := (made / "delta" / name).read_bytes()):
            (made / "delta" / name).write_bytes((made / "delta2" / name).read_bytes())
            refuse(made, r"expected the tuned model's, \w{64}: a file of corrections|fits no chunk")
            (made / "delta" / name).write_bytes(data)
            swapped += 1
    assert swapped
    foreign = read(made / "base")
    shard = next(p for p in sorted((made / "delta").glob("model-*-of-0000?.safetensors")))
    from safetensors.torch import load_file, save_file

    inside = load_file(shard)
    save_file({name: foreign[name] for name in inside}, shard)
    refuse(made, "is no part of the delta that")


def flip(path, draw):
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def proof(folder, form, count):
    """Flip a bit of a weight file or index, of base or delta, `count` times; how many are refused.

    The base has no checksums of its own as safetensors; the delta knows it.
    """
    base, tuned = pair(torch.bfloat16)
    write(folder / "base", base, form)
    write(folder / "tuned", tuned, form)
    make_delta(folder / "base", folder / "tuned", folder / "delta", max_shard_bytes=700)
    files = [p for name in ("base", "delta") for p in sorted((folder / name).iterdir())
             if p.suffix in (".safetensors", ".bin") or p.name.endswith("index.json")]  # fmt: skip
    whole, draw, refused = {p: p.read_bytes() for p in files}, random.Random(0), 0
    weights = [len(data) for data in whole.values()]
    for number in range(count):
        # half of them by size, half each file as often
        path = draw.choices(files, weights)[0] if number % 2 else draw.choice(files)
        flip(path, draw)
        try:
            apply_delta(folder / "base", folder / "delta", folder / "out")
        except ValueError:
            refused += 1
            assert not (folder / "out").exists()
        else:
            assert same_bits(read(folder / "out"), tuned), (path, number)
        for left in ("out", "out.unfinished"):
            shutil.rmtree(folder / left, ignore_errors=True)
        path.write_bytes(whole[path])
    print(f"\n{form}: {count} flipped bits: {refused} refused, {count - refused} equal, 0 other")
    return refused


@pytest.mark.parametrize("form", INDEX)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, form):
    assert proof(tmp_path, form, 60) > 20


@pytest.mark.slow
@pytest.mark.parametrize("form", INDEX)
def test_ten_thousand_flipped_bits_are_refused_or_change_nothing(tmp_path, form):
    assert proof(tmp_path, form, 5000) > 1000


@pytest.mark.parametrize("places", [{"a.weight": "../x.safetensors"}, {"a.weight": "x.bin"}, {}])
def test_an_index_that_leads_elsewhere_is_refused(made, places):
    (made / "delta" / INDEX["safetensors"]).write_text(json.dumps({"weight_map": places}))
    refuse(made, r"model.safetensors.index.json: ")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_delta_of_8_bits_is_not_added_twice(tmp_path, dtype):
    write(tmp_path / "base", {"a": torch.arange(6.0).to(dtype)}, files=1)
    write(tmp_path / "tuned", {"a": torch.ones(6).to(dtype)}, files=1)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "once")
    refuse(tmp_path, "is the result of adding this delta already", base="once")


def test_another_sum_names_the_folder_with_the_result(tmp_path):
    write(tmp_path / "base", {"a": torch.ones(4)}, files=1)
    write(tmp_path / "delta", {"a": torch.ones(4)}, files=1)
    with pytest.raises(ValueError, match=r"out.unfinished: the sum .* is 8.0000 .*delete this"):
        apply_delta(
            tmp_path / "base", tmp_path / "delta", tmp_path / "out", published_sum=4, progress=False
        )
    assert not (tmp_path / "out").exists()
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out", published_sum=8)
    assert not (tmp_path / "out.unfinished").exists()


def test_a_folder_of_something_else_keeps_its_files(made):
    other = made / "out.unfinished"
    other.mkdir()
    (other / ".notes.tmp").write_text("mine")
    (other / "more").write_text("mine")
    with pytest.raises(ValueError, match="left by a run with another source"):
        apply_delta(made / "base", made / "delta", made / "out")
    assert sorted(path.name for path in other.iterdir()) == [".notes.tmp", "more"]
