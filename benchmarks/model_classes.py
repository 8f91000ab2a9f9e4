# SPDX-License-Identifier: Apache-2.0
"""Every decoder class of transformers, tiny and random: how much of it is quantized, which places are fused, and
whether the fused model gives what the unfused one gives.

Usage: python benchmarks/model_classes.py run [CLASS ...]   adds rows to benchmarks/results/model_classes.jsonl: of
                                                            these classes, or of all that have none yet
       python benchmarks/model_classes.py page              writes docs/models.md from that file

A run can be stopped and started again. Each class is tried in a process of its own, which is ended after a time limit.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import model_classes_page
import octavo

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/model_classes.jsonl"
PAGE = ROOT / "docs/models.md"

EXAMPLE = 24  # tokens
# Proving attention takes seconds for each model, so only these are fused with one and with two tokens as well: one of
# each kind of rotation, cache and limit that is known to deceive short examples. They are tried first.
SHORT_EXAMPLES = (1, 2)
DECEIVING = """Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3 Cohere Glm Glm4 Helium Ernie4_5 Ministral3 Olmo Olmo2 Olmoe
    GptOss Mixtral DeepseekV3 Phi3 GPTNeoX Granite""".split()
LENGTHS = (24, 120)  # tokens of the texts that fused and unfused are compared on
DECODED = 3  # the prompt's next token, and two more with the cache
LARGEST = 20_000_000  # parameters of a model that is still called tiny
# Beyond this, int8 codes or chosen experts have moved, or a formula is another one: the float model tells which.
ROUNDING = 1e-5
BUILDING_SECONDS, SECONDS = 10, 120  # of the CPU, so that other work on the machine changes no row

# Names that configurations have for their sizes. Those that a configuration does not know are left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "dim_model"), 64
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "ffn_size", "dff"), 96),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    "is_decoder": True,
}


def classes() -> list[str]:
    """The names of all classes, DECEIVING first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    first = [f"{name}ForCausalLM" for name in DECEIVING]
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), key=lambda name: (name not in first, name))


# --- tiny models ----------------------------------------------------------------------------------------------------


def tiny(name: str) -> Any:
    """The class `name` of transformers with random weights, in eval mode. Raises whatever building it raises."""
    kind = getattr(transformers, name)
    config = _config(kind.config_class)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters in spite of the small sizes")
    torch.manual_seed(0)
    return _lively(kind(config)).eval()


def _config(kind: Any) -> Any:
    """A configuration with SIZES, the configurations inside of it as well."""
    default = kind()
    computed = {name for name in SIZES if isinstance(getattr(kind, name, None), property)}
    known = {
        name: size
        for name, size in SIZES.items()
        if name not in computed and getattr(default, name, None) is not None
    }
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PretrainedConfig):
            known[name] = _config(type(inner)).to_dict()
    return kind(**known)


def _lively(model: nn.Module) -> nn.Module:
    """Weights that keep activations near 1, where transformers' own would make all attention alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = 1 if "embed" in name or name.endswith("wte.weight") else parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5)
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(length))


# --- what is measured -----------------------------------------------------------------------------------------------


def try_class(name: str) -> dict[str, Any]:
    """One row of the table."""
    row = _row(name)
    start = time.process_time()
    try:
        model = tiny(name)
        model(text(LENGTHS[0]))
    except Exception as error:
        return row | {"failure": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]}
    if time.process_time() - start > BUILDING_SECONDS:
        return row | {"failure": f"takes more than {BUILDING_SECONDS} s to build"}
    quantized = copy.deepcopy(model)
    try:
        report = octavo.quantize_(quantized, octavo.Int8Dynamic())
        row["share"] = sum(each.bytes_before for each in report.quantized) / max(report.bytes_before, 1)
        row["kept"] = dict(Counter(each.kind for each in report.kept if each.bytes_before))
    except Exception as error:
        row |= {"share": 0.0, "unquantized": f"{type(error).__name__}: {error}"[:200]}
    expected = outputs(quantized)
    row["examples"] = {}
    for length in (EXAMPLE, *(SHORT_EXAMPLES if name.removesuffix("ForCausalLM") in DECEIVING else ())):
        row["examples"][str(length)] = fused_row(model, quantized, expected, length)
    return row | {"seconds": round(time.process_time() - start, 1)}


def _row(name: str) -> dict[str, Any]:
    return {"class": name, "transformers": transformers.__version__, "of": len(classes())}


def fused_row(model: Any, quantized: Any, expected: dict[str, Any], length: int) -> dict[str, Any]:
    """What fuse_ does with an example of `length` tokens, and how far the fused model is from the unfused one."""
    fused = copy.deepcopy(quantized)
    try:
        report = octavo.fuse_(fused, [text(length)], attention="float32")
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:300]}
    found: dict[str, Any] = {
        "places": len(report.rows),
        "fused": dict(Counter(row.step for row in report.fused)),
        "reasons": sorted({f"{row.step}: {row.reason}" for row in report.kept}),
    }
    if report.fused:
        found["differences"] = differences(expected, outputs(fused))
        if any(not isinstance(each, float) or each > ROUNDING for each in found["differences"].values()):
            fused = copy.deepcopy(model)
            octavo.fuse_(fused, [text(length)], attention="float32")
            found["float_differences"] = differences(outputs(model), outputs(fused))
    return found


def outputs(model: Any) -> dict[str, Any]:
    """Logits of the texts and of tokens decoded with the cache, or the exception's type: the same must come again."""
    given: dict[str, Any] = {}
    for length in LENGTHS:
        given[str(length)] = _tried(lambda length=length: model(text(length)).logits)
    given["cache"] = _tried(lambda: _decoded(model))
    return given


def _tried(run: Any) -> Any:
    with torch.no_grad():
        try:
            return run().float().clone()
        except Exception as error:
            return type(error).__name__


def _decoded(model: Any) -> torch.Tensor:
    """Logits of DECODED tokens that generate writes."""
    chosen = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
    prompt = text(LENGTHS[0])
    given = {"attention_mask": torch.ones_like(prompt), "use_cache": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(prompt, **chosen, **given, output_logits=True).logits)


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float | str]:
    """Largest |difference| over the largest |logit|, for each of the outputs that the unfused model gives."""
    result: dict[str, float | str] = {}
    for name, y in expected.items():
        if isinstance(y, torch.Tensor):
            other = found[name]
            if isinstance(other, torch.Tensor) and other.shape == y.shape:
                finite = y.isfinite() & other.isfinite()
                same = torch.equal(y.isfinite(), other.isfinite()) and bool(finite.any())
                largest = (other - y)[finite].abs().max() / y[finite].abs().max() if same else None
                result[name] = "other elements are NaN" if largest is None else largest.item()
            else:
                result[name] = other if isinstance(other, str) else "another shape"
    return result


# --- all of them ----------------------------------------------------------------------------------------------------


def _child(name: str, connection: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    connection.send(try_class(name))


def in_process(name: str) -> dict[str, Any]:
    """try_class in a process of its own: it may crash, and it is killed after SECONDS."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported already
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    row = _row(name)
    try:
        row = ours.recv()
        process.join()
    except EOFError:
        process.join()
        late = process.exitcode in (-signal.SIGKILL, -signal.SIGXCPU)
        row["failure"] = f"not done after {SECONDS} s" if late else f"ended with code {process.exitcode}"
    return row


def run(names: list[str]) -> None:
    """Adds a row for each of `names`, or for each class that has none."""
    torch.set_num_threads(1)
    done = {row["class"] for row in model_classes_page.read(RESULTS)}
    for name in names or [each for each in classes() if each not in done]:
        row = in_process(name)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
        print(name, row.get("failure", row.get("seconds")), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "page"))
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    chosen = parser.parse_args()
    if chosen.command == "run":
        run(chosen.classes)
    else:
        PAGE.write_text(model_classes_page.page(model_classes_page.read(RESULTS)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
