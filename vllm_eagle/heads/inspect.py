"""`vllm-eagle inspect HEAD`: what a head is, what it fits, what is wrong or odd."""

import json
import textwrap
from pathlib import Path
from typing import Any

from vllm_eagle.heads import draft_vocab
from vllm_eagle.heads.formats import Head, read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.target import Target
from vllm_eagle.heads.window import trained_length

_MAPS = ("d2t", "t2d")
_WHAT_TO_DO = {"fits after convert": ": vllm serve does it by itself, vllm-eagle convert HEAD NEW_FOLDER for good"}


def inspect(folder: Path, target: Path | None) -> dict[str, Any]:
    """Everything about a head as one JSON object.

    Raises:
        ValueError: no readable head, or no such target.
    """
    head = read_head(folder)
    known = None if target is None else Target.read(target)
    found = judge(head, known)
    weights = {name: tensor for name, tensor in head.tensors.items() if name not in _MAPS}
    report: dict[str, Any] = {
        "head": str(folder),
        "kind": head.kind,
        "format": head.format,
        "files": list(head.files),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})),
        "hidden_size": head.hidden_size,
        "target_hidden_size": head.target_hidden_size,
        "vocab_size": head.vocab_size,
        "draft_vocab_size": _draft_vocab_size(head),
        "num_layers": head.num_layers,
        "num_heads": head.num_heads,
        "num_kv_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "intermediate_size": head.intermediate_size,
        "num_aux_layers": head.num_aux if head.kind == "EAGLE-3" else None,
        "aux_layers": None if head.aux_layers is None else list(head.aux_layers),
        "norms": [flag for flag, value in head.norms.items() if value],
        "fc_bias": head.fc_bias,
        "attention_biases": [part for part in ("qkv", "o") if head.has_bias(part)],
        "own_embedding": "embed_tokens.weight" in head.tensors,
        "own_lm_head": "lm_head.weight" in head.tensors,
        "max_position_embeddings": head.layer.get("max_position_embeddings"),
        "draft_window": trained_length(folder),
        "rope": head.layer["rope_parameters"],
        "verdict": found.verdict,
        "wrong": list(found.wrong),
        "converted": list(found.differences),
        "odd": list(found.odd),
    }
    if known is not None:
        report |= {"target": str(known.path), "fits_target": not found.misfits, "misfits": list(found.misfits)}
    return report


def _draft_vocab_size(head: Head) -> int | None:
    """How many tokens it drafts; None: the file that should say it is wrong, as the report does say."""
    if head.kind == "EAGLE-3":
        return head.draft_vocab_size
    try:
        return len(draft_vocab.read(head.path, head.vocab_size) or range(head.vocab_size))
    except ValueError:
        return None


def run(folder: Path, target: Path | None, as_json: bool) -> int:
    """Print the report; 1 if the head is broken or does not fit the target."""
    report = inspect(folder, target)
    print(json.dumps(report, indent=1) if as_json else _text(report))
    return int(report["verdict"] == "does not fit")


def _text(report: dict[str, Any]) -> str:
    eagle3, window = report["kind"] == "EAGLE-3", report["draft_window"]
    heads = f"{report['num_heads']} heads of {report['head_dim']} ({report['num_kv_heads']} for keys and values)"
    vocabulary = str(report["vocab_size"])
    if report["draft_vocab_size"] != report["vocab_size"]:
        vocabulary += f", of which it drafts {report['draft_vocab_size'] or 'what cannot be read'}"
    layers = "the last feature"
    if eagle3:
        layers = f"{report['num_aux_layers']} layers, " + (str(report["aux_layers"]) if report["aux_layers"] else "not named")
    own = [name for name, has in (("embedding", report["own_embedding"]), ("LM head", report["own_lm_head"])) if has]
    biases = [*(["fc"] if report["fc_bias"] else []), *report["attention_biases"]]
    rope = " ".join(f"{key}={value}" for key, value in report["rope"].items())
    lines = [
        ("head", f"{report['head']}: {report['kind']}, {report['format']} format ({', '.join(report['files'])})"),
        (
            "weights",
            f"{report['parameters']:,} parameters, {report['dtype']}; own {' and '.join(own) or 'embedding, LM head: none'}",
        ),
        ("layer", f"{report['num_layers']} of width {report['hidden_size']}, MLP {report['intermediate_size']}, {heads}"),
        ("biases", ", ".join(biases) or "none"),
        *([("norms", ", ".join(report["norms"]) or "as in SafeAILab's EAGLE-3")] if eagle3 else []),
        ("positions", f"up to {report['max_position_embeddings']}, {rope}"),
        *([("window", f"the newest {window} tokens, where texts are longer (draft_window)")] if window else []),
        ("vocabulary", vocabulary),
        ("reads", f"{layers} of targets with hidden size {report['target_hidden_size']} and that vocabulary"),
    ]
    if "target" in report:
        lines.append(("fits", f"{report['target']}: {'yes' if report['fits_target'] else 'NO'}"))
        lines += [("", f"- {reason}") for reason in report["misfits"]]
    lines.append(("verdict", report["verdict"] + _WHAT_TO_DO.get(report["verdict"], "")))
    lines += [("converted" if i == 0 else "", f"- {finding}") for i, finding in enumerate(report["converted"])]
    lines += [("wrong" if i == 0 else "", f"- {finding}") for i, finding in enumerate(report["wrong"])]
    lines += [("odd" if i == 0 else "", f"- {finding}") for i, finding in enumerate(report["odd"])]
    return "\n".join(
        line
        for label, text in lines
        for line in textwrap.wrap(text, 118, initial_indent=f"{label:<12}", subsequent_indent=" " * 14, break_long_words=False)
    )
