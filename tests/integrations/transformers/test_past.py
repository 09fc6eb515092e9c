"""Route C: models whose attention modules are handed their layer's past in a tuple.

Two small models of the forms that published files have: pairs (batch, heads, tokens, size) with
positions and a padding mask, and pairs (tokens, batch, heads, size) with a bool mask of the model's
own (True hides) and a token that every text must hold.
"""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp

transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402

from minipeft.integrations.transformers import NotProvedWarning, positions  # noqa: E402

HEADS, SIZE, LENGTH, START = 2, 8, 4, 30
# float64 states of up to 8 through two layers: the same sums, a concatenation apart; a few units in
# the last place, which is 1.8e-15
ROUNDING = 2e-14


class Settings(transformers.PreTrainedConfig):
    model_type = "tuples"

    def __init__(self, layout="bhsd", **kwargs):
        self.layout, self.vocab_size, self.hidden_size = layout, 32, HEADS * SIZE
        self.num_hidden_layers = 2
        super().__init__(**kwargs)


class Attending(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout, width = layout, HEADS * SIZE
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, states, mask, past=None, keep=False):
        q, k, v = (t.unflatten(-1, (HEADS, SIZE)) for t in self.qkv(states).chunk(3, -1))
        axis = 0 if self.layout == "sbhd" else 2
        if axis:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], axis), torch.cat([past[1], v], axis)
        pair = (k, v) if keep else None
        if not axis:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        scores = q @ k.mT / SIZE**0.5
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask, -1e4)
        else:
            later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            scores = scores.masked_fill(later.triu(k.shape[2] - q.shape[2] + 1), -1e4) + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(y if axis else y.transpose(0, 1)), pair


class Tuples(transformers.PreTrainedModel):
    config_class = Settings
    all_tied_weights_keys = {}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(64, config.hidden_size)
        self.layers = nn.ModuleList(Attending(config.layout) for _ in range(2))
        self.double()

    def get_input_embeddings(self):
        return self.embed


class Batched(Tuples):
    """(batch, heads, tokens, size); counts its positions, takes a mask of ones and zeros."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, use_cache=False, inputs_embeds=None):  # fmt: skip
        states = self.embed(input_ids)
        seen = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + states.shape[1])[None]
        if attention_mask is None:
            attention_mask = states.new_ones(len(states), seen + states.shape[1])
        mask = (1 - attention_mask[:, None, None].to(states.dtype)) * -1e4
        states, kept = states + self.places(position_ids), ()
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            change, pair = layer(states, mask, past=past, keep=use_cache)
            states, kept = states + change, (*kept, pair)
        return BaseModelOutputWithPast(states, past_key_values=kept if use_cache else None)


class Sequenced(Tuples):
    """(tokens, batch, heads, size); makes its mask from the text, which must hold START."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=False, inputs_embeds=None):
        states, n, kept = self.embed(input_ids).transpose(0, 1), input_ids.shape[1], ()
        mask = torch.zeros(1, 1, dtype=torch.bool)
        if past_key_values is None:
            starts = [row.index(START) for row in input_ids.tolist()]
            mask = torch.ones(n, n, dtype=torch.bool).triu(1).repeat(len(starts), 1, 1, 1)
            for row, start in enumerate(starts):
                mask[row, ..., :start] = False
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            change, pair = layer(states, mask, past=past, keep=use_cache)
            states, kept = states + change, (*kept, pair)
        states = states.transpose(0, 1)
        return BaseModelOutputWithPast(states, past_key_values=kept if use_cache else None)


IDS = torch.tensor([[5, 6, 7, START, 8, 9], [15, 16, START, 17, 18, 19]])


def build(kind):
    model = kind(Settings("sbhd" if kind is Sequenced else "bhsd")).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def attached(kind, model=None):
    model = model or build(kind)
    example = {"example": {"input_ids": IDS[:1]}} if kind is Sequenced else {}
    prefix = mp.attach_prefix(model, LENGTH, **example)
    for table in prefix.encoder.tables:
        nn.init.normal_(table)
    return model, prefix


def by_hand(model, prefix, ids, past=None):
    """The states with the prefix put into every layer by hand, text by text."""
    rows = []
    tables = [prefix.encoder.layer(i) for i in range(2)]
    with mp.disable_adapters(model):
        for row in ids:
            handles = []
            for layer, (k, v) in zip(model.layers, tables, strict=True):
                pair = (k[None], v[None])
                if isinstance(model, Sequenced):
                    pair = tuple(t.permute(2, 0, 1, 3) for t in pair)

                def put(module, args, kwargs, pair=pair):
                    states, mask = args
                    front = mask.new_zeros(*mask.shape[:-1], LENGTH)
                    return (states, torch.cat([front, mask], -1)), {**kwargs, "past": pair}

                handles.append(layer.register_forward_pre_hook(put, with_kwargs=True))
            kwargs = {}
            if isinstance(model, Batched):
                kwargs["position_ids"] = torch.arange(LENGTH, LENGTH + len(row))[None]
            rows.append(model(row[None], **kwargs).last_hidden_state)
            for handle in handles:
                handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("kind", [Batched, Sequenced])
def test_a_prefix_equals_the_same_pairs_put_in_by_hand(kind):
    model, prefix = attached(kind)
    assert prefix.route == "past"
    assert prefix.position == ("shift" if kind is Batched else "none")
    states = model(IDS).last_hidden_state
    assert (states - by_hand(model, prefix, IDS)).abs().max() <= ROUNDING
    with mp.disable_adapters(model):
        plain = model(IDS).last_hidden_state
    assert (states - plain).abs().max() > 0.01  # the prefix does something
    states.sum().backward()
    assert all(table.grad.abs().sum() > 0 for table in prefix.encoder.tables)


@pytest.mark.parametrize("kind", [Batched, Sequenced])
def test_the_cache_holds_real_tokens_and_the_prefix_counts_once(kind):
    model, _ = attached(kind)
    whole = model(IDS).last_hidden_state
    first = model(IDS[:, :4], use_cache=True)
    cache = first.past_key_values
    axis = 2 if kind is Batched else 0
    assert all(t.shape[axis] == 4 for pair in cache for t in pair)
    states = []
    for i in (4, 5):
        step = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        states.append(step.last_hidden_state)
        cache = step.past_key_values
    assert all(t.shape[axis] == 6 for pair in cache for t in pair)
    assert (torch.cat(states, 1) - whole[:, 4:]).abs().max() <= ROUNDING


def test_padding_and_tokens_put_back():
    model, prefix = attached(Batched)
    states = model(IDS).last_hidden_state
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    found = model(padded, attention_mask=mask).last_hidden_state[:, 3:]
    assert (found - states).abs().max() <= ROUNDING
    prompt = torch.tensor([[3, 4, 5, 6]])
    prefix.load_tokens(prompt)
    with mp.disable_adapters(model):
        whole = model(torch.cat([prompt.expand(2, -1), IDS], 1)).last_hidden_state
    # keys and values of up to 8 are kept in float32: half a unit in their last place is 2.4e-7
    assert (model(IDS).last_hidden_state - whole[:, 4:]).abs().max() <= 1e-6


class Numbered(Tuples):
    """A model of any layout that counts its positions from its own cache."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, use_cache=False, inputs_embeds=None):  # fmt: skip
        states, kept = self.embed(input_ids), ()
        axis = self.config.layout.index("s")
        seen = 0 if past_key_values is None else past_key_values[0][0].shape[axis]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + states.shape[1])[None]
        if attention_mask is None:
            attention_mask = states.new_ones(len(states), seen + states.shape[1])
        mask = (1 - attention_mask[:, None, None].to(states.dtype)) * -1e4
        states = states + self.places(position_ids)
        states = states if axis else states.transpose(0, 1)
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            change, pair = layer(states, mask, past=past, keep=use_cache)
            states, kept = states + change, (*kept, pair)
        states = states if axis else states.transpose(0, 1)
        return BaseModelOutputWithPast(states, past_key_values=kept if use_cache else None)


class TokensSecond(Attending):
    """(batch, tokens, heads, size)."""

    def forward(self, states, mask, past=None, keep=False):
        if past is not None:
            past = tuple(t.transpose(1, 2) for t in past)
        y, pair = super().forward(states, mask, past, keep)
        return y, tuple(t.transpose(1, 2) for t in pair) if keep else None


@torch.no_grad()
@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "bshd"])
def test_any_layout_with_padding_equals_past_key_values_by_hand(layout):
    model = Numbered(Settings(layout)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    for layer in model.layers:
        layer.__class__ = TokensSecond if layout == "bshd" else Attending
    model, prefix = attached(Numbered, model)
    order, axis = ["bhsd".index(letter) for letter in layout], layout.index("s")
    pairs = tuple(
        tuple(t.expand(2, -1, -1, -1).permute(order) for t in prefix.encoder.layer(i))
        for i in range(2)
    )
    ids = torch.cat([torch.tensor([[0, 0, 0], [11, 12, 13]]), IDS], 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    numbers = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask).last_hidden_state
    with mp.disable_adapters(model):
        longer = torch.cat([mask.new_ones(2, LENGTH), mask], 1)
        by_hand = model(ids, attention_mask=longer, position_ids=numbers + LENGTH,
                        past_key_values=pairs).last_hidden_state  # fmt: skip
    assert (found - by_hand)[mask.bool()].abs().max() <= ROUNDING

    cache, states = None, []  # decoding, with padding; the caller's cache may be lists
    for i in range(ids.shape[1]):
        step = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], use_cache=True,
                     past_key_values=cache)  # fmt: skip
        states.append(step.last_hidden_state)
        cache = [list(pair) for pair in step.past_key_values]
        assert all(t.shape[axis] == i + 1 for pair in cache for t in pair)
    assert (torch.cat(states, 1) - found)[mask.bool()].abs().max() <= ROUNDING


class Sloped(Tuples):
    """Counts distance in its mask, another slope for each head, and takes no mask."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=False, inputs_embeds=None):
        states, kept = self.embed(input_ids), ()
        seen = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        slots = torch.arange(seen + states.shape[1]).to(states.dtype)
        mask = torch.tensor([0.5, 0.125])[:, None, None] * slots.expand(states.shape[1], -1)
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            change, pair = layer(states, mask[None], past=past, keep=use_cache)
            states, kept = states + change, (*kept, pair)
        return BaseModelOutputWithPast(states, past_key_values=kept if use_cache else None)


@torch.no_grad()
def test_distances_in_a_mask_are_refused():
    model = build(Sloped).requires_grad_(False)
    before = model(IDS).last_hidden_state
    with pytest.raises(ValueError, match=r"attach_prefix: .* for near keys than for far ones"):
        mp.attach_prefix(model, LENGTH)
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


class OnesSeen(Attending):
    """Makes what it adds to its scores from ones and zeros, of whatever dtype."""

    dtype = torch.long

    def forward(self, states, mask, past=None, keep=False):
        if mask.dtype == self.dtype and mask.max() == 1:
            mask = (1 - mask.to(states.dtype)) * -1e4
        return super().forward(states, mask, past, keep)


class OnesSeenInFloat(OnesSeen):
    dtype = torch.float32


class HandsOnOnes(Batched):
    """Hands its attention modules ones and zeros."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, use_cache=False, inputs_embeds=None):  # fmt: skip
        def ones(module, args):
            return args[0], (args[1] == 0).to(module.dtype)

        handles = [layer.register_forward_pre_hook(ones, prepend=True) for layer in self.layers]
        try:
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, use_cache
            )
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("reads", [Attending, OnesSeen, OnesSeenInFloat])
def test_rows_of_a_batch_with_prefixes_of_their_own(reads):
    model = build(Batched if reads is Attending else HandsOnOnes)
    for layer in model.layers:
        layer.__class__ = reads
    model, prefix = attached(Batched, model)
    mp.attach_prefix(model, 2, name="other")
    nn.init.normal_(prefix.encoders["other"].tables[0])
    alone = []
    for row, name in enumerate(["default", "other"]):
        mp.use_adapters(model, name)
        alone.append(model(IDS[row : row + 1]).last_hidden_state)
    mp.use_adapters(model, rows=["default", "other"])
    assert (model(IDS).last_hidden_state - torch.cat(alone)).abs().max() <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("kind", [Batched, Sequenced])
def test_it_leaves_no_trace_and_copies_are_independent(kind, tmp_path):
    model = build(kind).requires_grad_(False)  # torch multiplies weights that train otherwise
    before = model(IDS).last_hidden_state
    model, prefix = attached(kind, model)
    on, twin = model(IDS).last_hidden_state, copy.deepcopy(model)
    mp.save_prefix(model, tmp_path)
    prefix.remove()
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)
    assert torch.equal(twin(IDS).last_hidden_state, on)
    mp.load_prefix(model, tmp_path, example={"input_ids": IDS[:1]})
    assert torch.equal(model(IDS).last_hidden_state, on)


@torch.no_grad()
def test_refusals_leave_the_model_as_it_was():
    model = build(Sequenced)
    before = model(IDS).last_hidden_state
    with pytest.raises(ValueError, match=r"attach_prefix: .*pass example="):
        mp.attach_prefix(model, LENGTH)
    with pytest.raises(ValueError, match=r"route 'past'.*without gated=True"):
        mp.attach_prefix(model, LENGTH, gated=True, example={"input_ids": IDS[:1]})
    with pytest.raises(ValueError, match="attach_prompt"):
        mp.attach_prompt(model, LENGTH)

    class Deaf(Attending):  # takes a past, and does not look at it
        def forward(self, states, mask, past=None, keep=False):
            y, pair = super().forward(states, mask[..., -states.shape[0] :], None, True)
            if past is not None:
                pair = tuple(torch.cat(both) for both in zip(past, pair, strict=True))
            return y, pair if keep else None

    for layer in model.layers:
        layer.__class__ = Deaf
    with pytest.raises(ValueError, match="does not see its prefix"):
        mp.attach_prefix(model, LENGTH, example={"input_ids": IDS[:1]})
    for layer in model.layers:
        layer.__class__ = Attending
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


class InEvalAlone(Attending):
    """Takes its past in eval mode alone, and returns none in training mode."""

    def forward(self, states, mask, past=None, keep=False):
        if not self.training:
            return super().forward(states, mask, past, keep)
        return super().forward(states, mask[..., -states.shape[1] :], None)[0], None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("position", ["shift", "none"])
def test_modules_that_take_no_past_in_training_say_so(training, position):
    model = build(Batched).train(training)
    for layer in model.layers:
        layer.__class__ = InEvalAlone
    torch.manual_seed(3)
    with pytest.warns(NotProvedWarning, match=r"layers \[0, 1\] does not look at its past"):
        prefix = mp.attach_prefix(model, LENGTH, position=position)
    random = torch.get_rng_state()
    torch.manual_seed(3)
    mp.PrefixEncoder(prefix.kv_shapes, LENGTH)  # all that attaching may draw
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is training
    assert all(layer.training is training for layer in model.layers)
    with pytest.raises(ValueError, match=r"training mode.* call eval\(\)"):
        model.train()(IDS)
    with mp.disable_adapters(model):
        model(IDS)
    model.eval()(IDS).last_hidden_state.sum().backward()
    assert all(table.grad.abs().sum() > 0 for table in prefix.encoder.tables)
    assert "training mode" in str(prefix.report())


def test_dropout_in_training_is_no_difference():
    class Dropping(InEvalAlone):
        def forward(self, states, mask, past=None, keep=False):
            y, pair = super().forward(states, mask, past, keep)
            return nn.functional.dropout(y, 0.5, self.training), pair

    model = build(Batched)
    for layer in model.layers:
        layer.__class__ = Dropping
    with pytest.warns(NotProvedWarning, match="training mode"):
        mp.attach_prefix(model, LENGTH)


def test_a_cache_whose_tokens_are_miscounted_is_refused(monkeypatch):
    """As a model would be whose layout was found wrongly: asked by a text in two steps."""
    model = build(Batched)
    monkeypatch.setattr(positions, "seen", lambda given: 0)
    monkeypatch.setattr(positions, "check_mask", lambda given: None)
    with pytest.raises(ValueError, match="a text in two steps must give what it gives in one"):
        mp.attach_prefix(model, LENGTH)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)
