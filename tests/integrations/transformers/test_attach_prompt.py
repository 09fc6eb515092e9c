"""attach_prompt on small random models of the real classes."""

import copy
import gc
import sys
import threading
import types

import pytest
import torch

import minipeft as mp

pytest.importorskip("transformers")
from benchmarks.models import enable_checkpointing
from tests.prefix_behaviours import Case, P, difference, random_lora
from tests.prefix_families import FAMILIES

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
TOLERANCE = 1e-5  # float32, logits around 1, summed in another order


def with_rows_in_front(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """Logits of the text with these embeddings really in front of its own."""
    embedded = case.model.get_input_embeddings()(case.text)
    whole = torch.cat([rows.expand(2, -1, -1), embedded], 1)
    return case.model(inputs_embeds=whole).logits[:, len(rows) :]


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_is_embeddings_in_front_with_their_gradients(family):
    case = Case(family)
    prefix = mp.attach_prompt(case.model, P, init_std=0.5, window=case.window())
    case.model(**case.inputs()).logits.square().mean().backward()
    gradient = prefix.encoder.source.table.grad.clone()
    seen = case.logits()
    rows = prefix.encoder.source.table.detach().clone().requires_grad_()
    with mp.disable_adapters(case.model):
        expected = with_rows_in_front(case, rows)
        expected.square().mean().backward()
    assert difference(seen, expected) <= TOLERANCE
    assert difference(gradient, rows.grad) <= TOLERANCE * float(gradient.abs().max())


@pytest.mark.parametrize("family", ["LLaMA", "Gemma", "Gemma3, window", "BLOOM", "OPT"])
def test_a_prompt_from_the_ids_of_a_text_equals_the_text(family):
    case = Case(family)
    with torch.no_grad():
        whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
        expected = case.model(whole).logits[:, P:]
    mp.attach_prompt(case.model, P, init=case.prompt, window=case.window())
    assert difference(case.logits(), expected) <= TOLERANCE


@pytest.mark.parametrize("n_tokens", [1, 3, 7, 8, 20])
def test_rows_of_a_text_are_pefts(n_tokens, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ids = [(5 * i) % 30 for i in range(n_tokens)]
    monkeypatch.setattr(  # a tokenizer that needs no download
        transformers,
        "AutoTokenizer",
        types.SimpleNamespace(
            from_pretrained=lambda *a, **k: lambda text: {"input_ids": list(ids)}
        ),
    )
    case = Case("LLaMA")
    words = case.model.get_input_embeddings()
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, token_dim=32, num_transformer_submodules=1,
        prompt_tuning_init="TEXT", prompt_tuning_init_text="any", tokenizer_name_or_path="any",
    )  # fmt: skip
    theirs = peft.PromptEmbedding(config, words).embedding.weight
    prefix = mp.attach_prompt(case.model, 7, init=torch.tensor(ids))
    assert torch.equal(prefix.encoder.source.table, theirs)


def test_rows_of_the_vocabulary_are_embeddings_of_different_tokens():
    case = Case("LLaMA")
    words = case.model.get_input_embeddings().weight.detach().clone()
    table = mp.attach_prompt(case.model, 40, init="vocabulary").encoder.source.table
    ids = [torch.nonzero((words == row).all(1)).item() for row in table]
    assert len(set(ids)) == 40


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (torch.tensor([3, 97]), "ids from 3 to 97; the model has 0 to 96"),
        (torch.tensor([-1, 2]), "ids from -1"),
        (torch.tensor([], dtype=torch.long), "token ids of one text"),
        (torch.tensor(3), "token ids of one text"),
        (torch.tensor([[1, 2], [3, 4]]), "token ids of one text"),
        (torch.tensor([1.0]), "token ids of one text"),
        (torch.tensor([True, False]), "token ids of one text"),
        ("vocabulary", "prompt_length=98 of 97 tokens"),
    ],
)
def test_a_text_that_is_none_is_refused_and_the_model_is_as_it_was(init, message):
    case = Case("LLaMA")
    before = case.logits()
    with pytest.raises(ValueError, match=message):
        mp.attach_prompt(case.model, 98, init=init)
    assert not hasattr(case.model, "minipeft_prefix")
    assert torch.equal(case.logits(), before)


def test_ids_as_a_tokenizer_gives_them_are_cut_or_repeated():
    case = Case("LLaMA")
    words = case.model.get_input_embeddings().weight
    ids = torch.tensor([[5, 9, 5]])
    for length, expected in ((2, [5, 9]), (5, [5, 9, 5, 5, 9])):
        prefix = mp.attach_prompt(case.model, length, init=ids)
        assert torch.equal(prefix.encoder.source.table, words[expected])
        mp.remove(case.model)


def test_p_tuning_trains_its_network_and_bakes_it_away():
    case = Case("LLaMA")
    case.model.train()
    prefix = mp.attach_prompt(case.model, P, kind="mlp", hidden=12)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(case.model), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = case.model(case.text, labels=case.text).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    before = case.model.eval()(case.text).logits
    prefix.bake()
    assert difference(case.model(case.text).logits, before) <= TOLERANCE
    shapes = {tuple(p.shape) for p in mp.adapter_parameters(case.model)}
    assert shapes == {(P, 2 * 2 * 8)}


def test_generation_follows_the_prompt_and_a_conversation_keeps_it():
    case = Case("LLaMA")
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
    expected = case.model.generate(whole, **settings)[:, P:]
    prefix = mp.attach_prompt(case.model, P, init=case.prompt)
    runs = []
    run, holder = prefix.encoder.source.forward, prefix.encoder.source
    holder.forward = lambda: (runs.append(1), run())[1]
    assert torch.equal(case.model.generate(case.text, **settings), expected)
    assert len(runs) == 1  # at the first turn; the next tokens go on from it
    assert torch.equal(case.model.generate(case.text, use_cache=False, **settings), expected)


def test_checkpointing_leaves_the_gradients_and_re_entrant_is_refused():
    case = Case("LLaMA")
    case.model.train()
    prefix = mp.attach_prompt(case.model, P, init=case.prompt)

    def gradient():
        case.model.zero_grad()
        case.model(case.text, labels=case.text).loss.backward()
        return prefix.encoder.source.table.grad.clone()

    plain = gradient()
    enable_checkpointing(case.model, reentrant=False)
    assert difference(gradient(), plain) <= TOLERANCE * float(plain.abs().max())
    enable_checkpointing(case.model, reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant': False"):
        gradient()


def test_rows_of_a_batch_use_prompts_prefixes_or_none():
    case = Case("LLaMA")
    case.text = case.text[:1].expand(4, -1)
    bare = case.logits()[0]
    mp.attach_prompt(case.model, P, init=case.prompt)
    mp.attach_prefix(case.model, 3, name="deep", init_std=0.5)
    alone = {}
    for name in ("default", "deep"):
        mp.use_adapters(case.model, name)
        alone[name] = case.logits()[0]
    mp.use_adapters(case.model, rows=["deep", None, "default", "deep"])
    rows = case.logits()
    for row, expected in zip(
        rows, [alone["deep"], bare, alone["default"], alone["deep"]], strict=True
    ):
        assert difference(row, expected) <= TOLERANCE


def test_a_copy_keeps_its_own_prompt():
    case = Case("LLaMA")
    prefix = mp.attach_prompt(case.model, P, init=case.prompt)
    before = case.logits()
    case.model(case.text)  # a graph hangs on it
    twin = copy.deepcopy(case.model)
    with torch.no_grad():
        prefix.encoder.source.table.add_(1.0)
    assert torch.equal(twin(case.text).logits, before)


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        ("BERT", lambda m: mp.attach_prompt(m, P), "is not a decoder"),
        ("T5", lambda m: mp.attach_prompt(m, P), "is not a decoder"),
        ("LLaMA", lambda m: mp.attach_prompt(m, P, kind="lstm"), "kind='lstm'"),
        ("LLaMA", lambda m: mp.attach_prompt(m, P, init="text"), "init='text'"),
        ("LLaMA", lambda m: mp.attach_prompt(m, P, init=torch.randn(3)), "token ids"),
        ("LLaMA", lambda m: mp.attach_prompt(m, 0), "prompt_length=0"),
        ("LLaMA", lambda m: mp.attach_prompt(m, P, kind="mlp", init="vocabulary"), "kind='table'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(family, call, message):
    case = Case(family)
    before, names = case.logits(), set(case.model.state_dict())
    with pytest.raises(ValueError, match=message):
        call(case.model)
    assert set(case.model.state_dict()) == names
    assert all(p.requires_grad for p in case.model.parameters())
    assert torch.equal(case.logits(), before)


def runs_alive(case: Case) -> int:
    """Tensors of one layer's keys or values of a prompt that this process holds."""
    gc.collect()
    shape = case.model.minipeft_prefix.kv_shapes[0]
    sizes = {(shape.kv_heads, P, size) for size in (shape.key_dim, shape.value_dim)}
    return sum(type(x) is torch.Tensor and tuple(x.shape) in sizes for x in gc.get_objects())


def in_threads(count: int, work) -> None:
    """`work(number)` in as many threads, which all live until the last is done."""
    together, errors = threading.Barrier(count, timeout=60), []

    def run(number: int) -> None:
        try:
            together.wait()
            work(number)
            together.wait()
        except BaseException as error:
            together.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_runs_of_threads_that_have_ended_are_freed(capsys):
    case = Case("LLaMA")
    mp.attach_prompt(case.model, P)
    case.logits()
    before = runs_alive(case)
    in_threads(50, lambda _: case.logits())
    after = runs_alive(case)
    with capsys.disabled():
        print(f"\nkeys and values of prompts alive: {before}, after 50 threads {after}")
    assert before == after == 2 * len(case.model.minipeft_prefix.kv_shapes)  # this thread's own


def test_threads_that_serve_rows_or_prompts_of_their_own_do_not_meet():
    first, second = Case("LLaMA"), Case("LLaMA")
    for case, name in ((first, "one"), (second, "two")):
        mp.attach_prompt(case.model, P, name=name, init_std=0.5)
    mp.attach_prompt(first.model, P, name="other", kind="mlp", init_std=0.5)
    mp.use_adapters(first.model, rows=["one", "other"])
    texts = [torch.randint(3, 97, (2, 5 + number)) for number in range(4)]
    cases = [first, second, first, second]
    expected = [case.model(text).logits for case, text in zip(cases, texts, strict=True)]
    worst = [0.0] * 4

    def work(number: int) -> None:
        for turn in range(8):  # with gradients and without
            with torch.set_grad_enabled(turn % 2 == 0):
                seen = cases[number].model(texts[number]).logits
            if turn % 2 == 0:
                seen.sum().backward()
            worst[number] = max(worst[number], difference(seen, expected[number]))

    in_threads(4, work)
    assert max(worst) <= TOLERANCE


def test_a_thread_that_ran_nothing_gets_the_run_of_one_that_lives():
    """As backward's does, where checkpointing computes a layer again."""
    case = Case("LLaMA")
    prompt = mp.attach_prompt(case.model, P).encoder
    case.logits()
    found = []
    in_threads(1, lambda _: found.append(prompt.part(0).k))
    assert found[0] is prompt.part(0).k
    twin = copy.deepcopy(case.model)
    with pytest.raises(RuntimeError, match="has not been run"):
        twin.minipeft_prefix.encoder.part(0)


def test_a_conversation_is_not_taken_for_that_of_a_later_prompt(monkeypatch):
    """An id() is given out again; the keys of a prompt that is gone must not come back with it."""
    from transformers import DynamicCache

    from minipeft.integrations.transformers import prompt_runs as prompted

    monkeypatch.setattr(prompted, "id", lambda _: 1, raising=False)
    case = Case("LLaMA")
    cache = DynamicCache(config=case.model.config)
    with torch.no_grad():
        prefix = mp.attach_prompt(case.model, P, init_std=0.5)
        case.model(case.text[:, :3], past_key_values=cache)
        prefix.remove()
        prefix = mp.attach_prompt(case.model, P, init_std=0.5)
        case.model(case.text[:, 3:5], past_key_values=cache)
        seen = prefix.encoder.part(0).k
        case.model(case.text[:, :3])
        assert torch.equal(seen, prefix.encoder.part(0).k)


def test_prompts_beside_lora_rows_are_refused():
    case = Case("LLaMA")
    random_lora(case.model)
    mp.attach_prompt(case.model, 4, name="prompt")
    with pytest.raises(ValueError, match="is a prompt, which runs through the model once"):
        mp.use_adapters(case.model, rows=[["default", "prompt"], "prompt"])
    mp.use_adapters(case.model, rows=["default", None])
    with pytest.raises(ValueError, match="use_adapters"):
        mp.attach_prefix(case.model, 3, name="more")


def test_threads_do_not_see_each_others_prompts():
    case = Case("LLaMA")
    mp.attach_prompt(case.model, 4, init_std=1.0)
    expected, wrong = case.logits(), []

    def work() -> None:
        for _ in range(40):
            try:
                if difference(case.logits(), expected) > TOLERANCE:
                    wrong.append("differs")
            except Exception as error:
                wrong.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


@torch.no_grad()
def test_a_conversation_keeps_the_prompt_that_it_began_with():
    case = Case("LLaMA")
    mp.attach_prompt(case.model, 4, init_std=1.0)
    whole = case.logits()
    cache = case.model(case.text[:, :4], use_cache=True).past_key_values
    own = {name: value.clone() for name, value in mp.adapter_state_dict(case.model).items()}
    other = {name: torch.randn_like(value) for name, value in own.items()}
    mp.load_adapter_state_dict(case.model, other)
    case.model(case.text)
    for state in (other, own):  # whichever is there now
        mp.load_adapter_state_dict(case.model, state)
        again = copy.deepcopy(cache)
        rest = case.model(case.text[:, 4:], past_key_values=again).logits
        assert difference(rest, whole[:, 4:]) <= TOLERANCE


def test_baking_a_prompt_in_training_mode_bakes_no_dropout():
    case = Case("GPT-2", resid_pdrop=0.5)
    prefix = mp.attach_prompt(case.model, 3, kind="mlp")
    before = case.logits()
    case.model.train()
    prefix.bake()
    case.model.eval()
    assert difference(case.logits(), before) <= TOLERANCE
