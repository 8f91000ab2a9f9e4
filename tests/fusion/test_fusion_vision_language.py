# SPDX-License-Identifier: Apache-2.0
"""Models of texts and images, whose attention is called with the mask by keyword and rotates by three positions."""

import inspect

import pytest
import torch

import octavo

transformers = pytest.importorskip("transformers")
IMAGE, START, END = 90, 91, 92  # tokens


def qwen2_vl():
    rotation = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    text = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=96, rope_parameters=rotation
    )
    vision = dict(depth=1, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2)
    tokens = dict(
        image_token_id=IMAGE, video_token_id=93, vision_start_token_id=START, vision_end_token_id=END
    )
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={**text, **heads, "pad_token_id": 0}, vision_config=vision, **tokens
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # so that attention tells positions apart
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def test_the_attention_of_qwen2_vl_is_fused_for_texts_and_images():
    """With products in float32 the fused model is the original but for rounding: 1e-5 of the largest logit, where a
    wrong rotation or mask moves logits by as much as they are."""
    ids = torch.randint(3, 80, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 4:10] = torch.tensor([START, *[IMAGE] * 4, END])
    patches = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    with_image = dict(input_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 4]]))
    text = dict(input_ids=torch.randint(3, 80, (2, 60), generator=torch.Generator().manual_seed(2)))
    model = qwen2_vl()
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # later versions want it
        with_image["mm_token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in (with_image, text)]
        report = octavo.fuse_(model, with_image, attention="float32")
        found = [model(**inputs).logits for inputs in (with_image, text)]
    fused = [(row.step, row.name) for row in report.fused]
    kept = {row.reason for row in report.kept if row.step == "rotary"}
    if (
        "output_attentions"
        in inspect.signature(model.model.language_model.layers[0].self_attn.forward).parameters
    ):
        assert kept == {"its forward takes output_attentions, which is not known"}  # transformers 5.0
    else:
        assert {("rotary", f"model.language_model.layers.{i}.self_attn") for i in (0, 1)} <= set(
            fused
        ) and not kept
    assert "attention" in dict(fused)
    for x, y in zip(expected, found, strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max()
