# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which scheme: patterns, include, exclude, filter_fn, dicts."""

import re

import pytest
import torch
from asserts import assert_unchanged, model_state
from models import LINEARS, model
from torch import nn

import octavo

SCHEME = octavo.Int8Dynamic()


def shown(value) -> str:
    """Ids without addresses, so that every process has the same."""
    return re.sub(r"<function .*? at \w+>", "a function", str(value))


def chosen(scheme=SCHEME, **options) -> dict[str, str]:
    """{layer name: scheme} of what quantize_ quantizes."""
    return {row.name: row.scheme for row in octavo.quantize_(model(), scheme, **options).quantized}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"include": "encoder.*"}, LINEARS[:6]),
        ({"include": ["head", "*.attention"]}, [LINEARS[0], LINEARS[3], "head"]),
        ({"exclude": "head"}, LINEARS[:6]),
        (
            {"exclude": ["re:encoder\\.\\d\\.mlp\\.0", "head"]},
            [LINEARS[0], LINEARS[2], LINEARS[3], LINEARS[5]],
        ),
        ({"include": "encoder.0.*", "exclude": "*.mlp.*"}, [LINEARS[0]]),
        ({"filter_fn": lambda module, name: module.out_features == 16}, [LINEARS[1], LINEARS[4]]),
        (
            {"filter_fn": lambda module, name: name.startswith("encoder.1"), "exclude": "*.mlp.0"},
            [LINEARS[3], LINEARS[5]],
        ),
        ({"include": ()}, []),
    ],
    ids=shown,
)
def test_include_exclude_and_filter(options, expected):
    assert list(chosen(**options)) == expected


def test_dict_of_patterns_takes_the_first_match_and_none_keeps_float():
    weight_only = octavo.Int8WeightOnly
    result = chosen(
        {"head": None, "re:.*mlp.*": weight_only(), "encoder.1.*": weight_only, "encoder.*": SCHEME}
    )
    assert result == {
        "encoder.0.attention": "Int8Dynamic",
        "encoder.0.mlp.0": "Int8WeightOnly",
        "encoder.0.mlp.2": "Int8WeightOnly",
        "encoder.1.attention": "Int8WeightOnly",
        "encoder.1.mlp.0": "Int8WeightOnly",
        "encoder.1.mlp.2": "Int8WeightOnly",
    }


@pytest.mark.parametrize(
    "options, name, reason",
    [
        ({"scheme": {"head": None, "*": SCHEME}}, "head", "'head' keeps it float"),
        ({"scheme": {"encoder.*": SCHEME}}, "head", "no pattern matches"),
        ({"include": "head"}, "encoder.0.attention", "not matched by include"),
        ({"exclude": "he*"}, "head", "excluded by 'he*'"),
        ({"filter_fn": lambda module, name: False}, "head", "refused by filter_fn"),
    ],
    ids=shown,
)
def test_what_the_patterns_leave_out_is_reported_with_the_pattern(options, name, reason):
    report = octavo.quantize_(model(), **{"scheme": SCHEME, **options})
    assert [row.reason for row in report.kept if row.name == name] == [reason]


def test_a_shared_module_is_matched_by_any_of_its_names():
    shared = nn.Linear(8, 8)
    m = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    assert {row.name for row in octavo.quantize_(m, SCHEME, exclude="b").quantized} == {"c"}


@pytest.mark.parametrize(
    "scheme, options, error, text",
    [
        (SCHEME, {"include": "encoder.*.atention"}, ValueError, "include: .*no layer.*'encoder...attention'"),
        (SCHEME, {"exclude": ["head", "hed"]}, ValueError, "exclude: pattern 'hed' matches no layer.*'head'"),
        (
            SCHEME,
            {"exclude": "encoder"},
            ValueError,
            r"module with layers inside, 'encoder.\*' matches those",
        ),
        ({"haed": None, "*": SCHEME}, {}, ValueError, "scheme: pattern 'haed' matches no layer.*'head'"),
        (SCHEME, {"include": "re:("}, ValueError, r"'re:\(' is not a regular expression"),
        (SCHEME, {"include": [nn.Linear]}, TypeError, "patterns are strings.*use filter_fn"),
        (SCHEME, {"filter_fn": "head"}, TypeError, "filter_fn must be callable"),
        (None, {}, TypeError, r"scheme is missing.*octavo.Int8Dynamic\(\)"),
        (torch.int8, {}, TypeError, "scheme is torch.int8"),
        ({"head": "int8"}, {}, ValueError, "scheme 'int8' is unknown"),
        ({nn.Linear: SCHEME}, {}, TypeError, "patterns are strings"),
    ],
)
def test_a_bad_choice_is_refused_with_the_remedy_and_the_model_unchanged(scheme, options, error, text):
    m = model()
    before = model_state(m)
    with pytest.raises(error, match=text):
        octavo.quantize_(m, scheme, **options)
    assert_unchanged(m, before)


def test_what_filter_fn_raises_comes_through_and_the_model_is_unchanged():
    m = model()
    before = model_state(m)
    with pytest.raises(KeyError):
        octavo.quantize_(m, SCHEME, filter_fn=lambda module, name: {}[name])
    assert_unchanged(m, before)
