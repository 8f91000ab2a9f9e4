# SPDX-License-Identifier: Apache-2.0
"""QuantEmbedding: rows are those of the dequantized weight, whatever the format; and one weight for tied layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import octavo
from octavo import formats
from octavo.nn import PreparedEmbedding, QuantEmbedding, QuantLinear
from octavo.schemes import Scheme

IDS = torch.tensor([[3, 0, 36], [1, 1, 20]])
WEIGHTS = [
    *(formats.Int8(), formats.Half("bfloat16"), formats.Half("float16")),
    *(formats.IntGroup(bits, 32, symmetric) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)),
    *(
        formats.IntGroup(4, None),
        formats.IntGroup(6, 16, False, "float32"),
        formats.IntGroup(4, 48, True, "bfloat16"),
    ),
    *(formats.MXFP4(), formats.NVFP4(), formats.FP4(double_quant=False), formats.NF4()),
]


def with_weights(weights) -> Scheme:
    if isinstance(weights, formats.Half):
        return octavo.HalfWeightOnly(weights.dtype)
    return octavo.Int8WeightOnly(weights=weights)


def embedding(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Embedding(37, 80, **options).to(dtype)


def quantized(layer, scheme) -> QuantEmbedding:
    model = octavo.quantized(nn.Sequential(layer), scheme, include_embeddings=True)
    assert type(model[0]) is QuantEmbedding
    return model[0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_the_dequantized_weight(weights, dtype):
    layer = quantized(embedding(dtype), with_weights(weights))
    rows = layer(IDS)
    assert rows.dtype == dtype and not rows.requires_grad
    expected = layer.dequantize(dtype)[IDS]
    if weights == formats.IntGroup(6, 16, False, "float32"):  # a zero point times its scale is rounded
        bound = 2**-24 * 64 * float(layer.canonical_tensors()["weight_scale"].max())
        assert (rows - expected).abs().max() <= bound + torch.finfo(dtype).eps * expected.abs().max() / 2
    else:
        assert torch.equal(rows, expected)
    assert torch.equal(layer(IDS.int()), rows)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_the_padding_row_stays_zero_in_every_format(weights):
    layer = quantized(embedding(padding_idx=5), with_weights(weights))
    assert layer.padding_idx == 5 and "padding_idx=5" in repr(layer)
    assert not layer(torch.tensor([5])).any()


def test_a_format_of_a_users_own_needs_no_kernel():
    class Plain(formats.Int8):
        def rows(self, layer, ids, dtype):
            return formats.WeightFormat.rows(self, layer, ids, dtype)

    layer = quantized(embedding(), octavo.Int8WeightOnly(weights=Plain()))
    assert torch.equal(layer(IDS), layer.dequantize()[IDS])
    with pytest.raises(IndexError):
        layer(torch.tensor([37]))


def test_ids_that_are_no_rows_are_refused():
    layer = quantized(embedding(), octavo.Int8Dynamic())
    with pytest.raises(IndexError, match="ids holds 37, the weight has 37 rows: ids from 0 to 36"):
        layer(torch.tensor([0, 37]))
    with pytest.raises(TypeError, match="ids is float32"):
        layer(torch.zeros(3))


def test_half_changes_what_rows_are_and_no_scale():
    layer = quantized(embedding(), octavo.Int4Dynamic())
    rows = layer(IDS)
    layer.half()
    assert torch.equal(layer(IDS), rows.half())
    layer.float()
    assert torch.equal(layer(IDS), rows)


class Scaled(nn.Embedding):
    """As Gemma 3's: a buffer, rounded to the weight's dtype."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.7), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """As BART's."""

    embed_scale = 3.7

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    """As BART's positions: no rows for its ids."""

    embed_scale = 1.0

    def forward(self, ids):
        return super().forward(ids + 2)


@pytest.mark.parametrize("kind", [Scaled, ScaledByNumber])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_that_scale_their_rows_are_served(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(kind(37, 80).to(dtype))
    float_layer = copy.deepcopy(model[0])
    octavo.quantize_(model, octavo.Int8Dynamic(), include_embeddings=True)
    float_layer.weight.data = model[0].dequantize(dtype)
    assert torch.equal(model(IDS), float_layer(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), model(IDS))


def test_their_scale_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(37, 80))
    octavo.quantize_(model, octavo.Int8Dynamic(), include_embeddings=True)
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(Scaled(37, 80))
    assert torch.equal(octavo.load(tmp_path, skeleton)(IDS), model(IDS))


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Embedding(8, 4, max_norm=1.0), "max_norm shortens rows"),
        (nn.Embedding(8, 4, sparse=True), "sparse is about gradients .* set embedding.sparse = False"),
        (nn.Embedding(8, 4, scale_grad_by_freq=True), "scale_grad_by_freq is about gradients"),
        (Shifted(8, 4), "Shifted has a forward of its own"),
    ],
    ids=["max_norm", "sparse", "scale_grad_by_freq", "forward"],
)
def test_what_a_frozen_weight_cannot_do_keeps_the_layer_float(layer, words):
    model = nn.Sequential(layer)
    (row,) = octavo.quantize_(model, octavo.Int8Dynamic(), include_embeddings=True).rows
    assert model[0] is layer and row.action == "kept"
    pytest.importorskip("re").search(words, row.reason) or pytest.fail(row.reason)


def test_prepared_rows_are_the_frozen_ones_and_gradients_reach_the_weight():
    model = nn.Sequential(embedding())
    octavo.prepare_(model, octavo.Int4Dynamic(), include_embeddings=True, learn_scales=True)
    assert type(model[0]) is PreparedEmbedding
    rows = model(IDS)
    rows.square().sum().backward()
    assert model[0].weight.grad[3].any() and not model[0].weight.grad[2].any()
    assert model[0].weight_scale.grad[3].any()
    octavo.freeze_(model)
    assert torch.equal(model(IDS), rows.detach())


def test_a_compiled_graph_and_an_exported_one_read_rows():
    model = nn.Sequential(quantized(embedding(), octavo.Int8Dynamic(group_size=32)))
    exported = torch.export.export(model, (IDS,)).module()
    assert torch.equal(exported(IDS), model(IDS))


# --- one weight for several layers ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head with its weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.head = nn.Linear(64, 40)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


TIED_IDS = torch.arange(40).reshape(4, 10)
SCHEMES = [
    *(octavo.Int8Dynamic(), octavo.Int8WeightOnly(), octavo.Int8Dynamic(group_size=32)),
    *(octavo.Int4WeightOnly(symmetric=False), octavo.NF4(double_quant=True), octavo.HalfWeightOnly()),
]


def tied(scheme=octavo.Int8Dynamic(), **options):
    torch.manual_seed(0)
    model = Tied()
    octavo.quantize_(model, scheme, include_embeddings=True, **options)
    return model


def is_tied(model):
    """Whether embedding and head hold the very same tensors, and know of each other."""
    names = model.embed.scheme.weights.held
    same = [model.embed._buffers[name] is model.head._buffers[name] for name in names]
    others = set(model.embed.scheme.weights.tensors(40, 64)) - set(model.embed.scheme.weights.replaced)
    same += [getattr(model.embed, name) is getattr(model.head, name) for name in others]
    return all(same) and model.embed.shared is model.head.shared is not None


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_a_tied_head_multiplies_by_the_memory_of_the_embedding(scheme):
    model = tied(scheme)
    assert is_tied(model) and type(model.head) is QuantLinear
    torch.manual_seed(0)
    alone = octavo.quantized(Tied().head, scheme)
    x = torch.randn(3, 64)
    assert torch.equal(model.head(x), alone(x))
    assert torch.equal(model.embed.codes(), alone.codes())


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_copies_pickles_files_and_state_dicts_stay_tied(scheme, tmp_path):
    model = tied(scheme)
    y = model(TIED_IDS)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.embed.packed is not model.embed.packed
    octavo.save(model, tmp_path)
    loaded = octavo.load(tmp_path, Tied())
    fresh = tied(scheme)
    fresh.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assigned = tied(scheme)
    assigned.load_state_dict(torch.load(file), assign=True)
    for other in (copied, pickled, loaded, fresh, assigned):
        assert is_tied(other) and torch.equal(other(TIED_IDS), y)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_what_one_of_them_loads_the_other_has(scheme):
    model, other = tied(scheme), Tied()
    octavo.quantize_(other, scheme, include_embeddings=True)
    state = {name: value for name, value in other.state_dict().items() if name.startswith("embed.")}
    model.load_state_dict(state, strict=False)
    assert is_tied(model) and torch.equal(model.head.codes(), other.head.codes())
    model.head.unpack_()
    assert not model.embed.is_packed
    model.embed.pack_()
    assert is_tied(model)


def test_a_state_dict_has_one_tensor_and_none_that_was_written_to():
    model = tied()
    state = model.state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    codes = state["embed.weight"].clone()
    state["embed.weight"].zero_()
    assert torch.equal(model.state_dict()["head.weight"], codes)


def test_a_float_weight_of_a_tied_head_reads_as_the_embedding():
    model = tied()
    assert torch.equal(model.head.weight.clone(), model.embed.weight.clone())
    model.head.weight = (
        model.embed.weight
    )  # what tie_weights of transformers does: nothing is left to be done
    assert is_tied(model)
    with pytest.raises(AttributeError, match="read-only"):
        model.head.weight = nn.Parameter(torch.zeros(40, 64))


def test_a_static_head_is_calibrated_and_shares_its_weight():
    model = tied(octavo.Int8Static(), data=TIED_IDS)
    assert is_tied(model)
    assert model(TIED_IDS).isfinite().all()


def test_training_a_tied_weight_with_learned_scales_keeps_the_two_equal(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    octavo.prepare_(model, octavo.Int4Dynamic(), include_embeddings=True, learn_scales=True)
    assert model.embed.weight is model.head.weight and model.embed.weight_scale is model.head.weight_scale
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(TIED_IDS).square().mean().backward()
        optimizer.step()
    octavo.save(model, tmp_path)
    again = octavo.load(tmp_path, Tied())
    assert again.embed.weight is again.head.weight
    for each in (model, again):
        octavo.freeze_(each)
        assert is_tied(each)
    assert torch.equal(again(TIED_IDS), model(TIED_IDS))
