"""`vllm-eagle doctor --matrix`: what runs together with draft trees, what does not, and why.

What works names the test that shows it; what is refused comes from the very rules that refuse it (engine/support.py).
"""

from collections.abc import Iterator

_INTERPRETED = "run on CPUs through Triton's interpreter, on no GPU yet"
# Feature, remark, test.
WORKS = (
    ("vllm serve, OpenAI routes", "answers equal those of a server without trees", "test_serve_requests"),
    ("streaming", "several tokens per event, in order", "test_serve_streams"),
    ("tool calling", "named, required and free", "test_serve_tools"),
    ("tool and reasoning parsers, streamed", "read token by token, as without trees", "test_streams"),
    ("structured output", "trees with xgrammar, guidance, outlines; chains with a reasoning parser", "test_structured"),
    ("sampling parameters", "all, with min-p, logit bias, custom logits processors", "test_exactness"),
    ("logprobs, prompt logprobs, n, stop", "values as without trees", "test_serve_logprobs"),
    ("speculation per request", "off, or a smaller tree", "test_per_request"),
    ("offline LLM, in-process and multi-process", "", "test_engine"),
    ("chunked prefill, preemption, prefix caching", "", "test_engine"),
    ("torch.compile", "enforce_eager=False", "test_engine"),
    ("LoRA on the target", "the head has no adapter: its drafts stay those for the base model", "test_combine"),
    ("INT8 W8A8 (compressed-tensors)", "the head stays unquantized", "test_combine"),
    ("4-bit weights (compressed-tensors W4A16)", "the head stays unquantized", "test_combine"),
    ("tensor parallelism", "an exception in drafting ends the server there", "test_combine"),
    ("several API servers", "any of them has all metrics, a second old at most", "test_examples_serve"),
    ("Ray Data and Ray Serve", "a batch also when a node is lost", "test_ray"),
    ("sessions whose prompt goes on after an answer", "without drafts", "test_sessions"),
    ("Llama, Qwen2, Qwen3, Mistral, Granite, Qwen3-MoE, Phi3, SmolLM3, OLMo2", "", "test_families"),
    (
        "Gemma, Gemma 2, Gemma 3, Cohere, Mixtral, Qwen2-MoE, GLM4",
        "features for EAGLE-3 heads by listening to their layers",
        "test_families",
    ),
    (
        "sliding windows, soft-capped attention, sinks",
        f"as in Mistral, Qwen2, Gemma 2 and 3, EXAONE 4, gpt-oss; on CUDA with TRITON_ATTN; {_INTERPRETED}",
        "test_windows",
    ),
    ("EAGLE-1/2 and EAGLE-3 heads, fc.bias", "other formats are converted when they are served", "test_biased_head"),
    (
        "heads of several layers, EAGLE-3.1's norms, q and k norms, biases, own width, sliding layers",
        "the README's table of designs says which of them in which kind",
        "test_served",
    ),
    ("windows over the head (draft_window)", f"on CUDA with TRITON_ATTN; {_INTERPRETED}", "test_windows"),
    ("MTP modules of MiMo, GLM-4 MoE, Ernie 4.5 MoE, EXAONE MoE, HY 3", f"on CUDA: {_INTERPRETED}", "test_mtp"),
    (
        "Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        "text and pictures in the prompt; heads see the pictures' tokens, not the pictures",
        "test_pictures",
    ),
    ("Llama 4", "its text model, on CPUs, in its first chunk of attention", "test_chunks"),
    ("mixtures of experts", "costs are measured with tokens that ask for as many experts as text does", "test_experts"),
    ("CUDA's engine: vLLM's V2 runner, async scheduling", f"{_INTERPRETED}: vllm-eagle gpu-check", "test_v2"),
    ("on CUDA: sampling parameters, logprobs, n, prompts in pieces, preemption, prefix cache", _INTERPRETED, "test_v2"),
    ("on CUDA: FLASH_ATTN and xformers (CUSTOM)", f"with their kernels by torch; {_INTERPRETED}", "test_backends"),
    ("on CUDA: tensor parallelism", f"drafts are planned on the first rank; {_INTERPRETED}", "test_ranks"),
    ("on CUDA: CUDA graphs of whole steps and of drafting", f"captured and replayed without a GPU; {_INTERPRETED}", "test_graphs"),
    (
        "on CUDA: structured output",
        f"trees with xgrammar and guidance; chains with a reasoning parser; {_INTERPRETED}",
        "test_grammars",
    ),
    (
        "on CUDA: INT8 W8A8 and 4-bit weights (compressed-tensors)",
        f"with vLLM's layers for CPUs, and attention in float64, beside whose rounding nothing can be told; {_INTERPRETED}",
        "test_quantized",
    ),
    ("on CUDA: LoRA on the target", f"all requests have as many drafts; {_INTERPRETED}", "test_v2"),
    ("on CUDA: sessions whose prompt goes on after an answer", f"without drafts; {_INTERPRETED}", "test_v2"),
    (
        "on CUDA: MLA (DeepSeek-V2 and V3, Kimi K2)",
        f"TRITON_MLA for the target, heads of Llama's kind; a tiny random one; {_INTERPRETED}",
        "test_latents",
    ),
    ("heads as safetensors or as a pickle of tensors", "pickles that hold code are refused", "test_faults"),
)
OTHERWISE = (
    (
        "on CUDA: what the interpreter cannot show",
        "not run",
        "the own kernels of FLASH_ATTN and xformers (CUSTOM) and of quantized layers, real CUDA graphs; any GPU",
    ),
    ("tensor-parallel ranks as Ray actors", "not run", "vLLM refuses them on CPUs; worker and scheduler go to them by name"),
    ("lm-format-enforcer", "refused", "vLLM itself refuses it under speculation"),
)


def rows() -> Iterator[tuple[str, str, str]]:
    """Feature, "works", "refused" or another word, remark."""
    import vllm_eagle.engine.support  # noqa: F401  where all of them come together
    from vllm_eagle.engine.rules import RULES

    for feature, remark, _ in WORKS:
        yield feature, "works", remark
    yield from OTHERWISE
    for rule in RULES:
        yield rule.feature, "refused", rule.why


def run(markdown: bool = False) -> int:
    """Print the table."""
    table = [("feature", "with trees", "remark"), *rows()]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in table]
        print("\n".join([lines[0], "|---|---|---|", *lines[1:]]))
        return 0
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    for feature, status, remark in table:
        print(f"{feature:<{widths[0]}}  {status:<{widths[1]}}  {remark}".rstrip())
    return 0
