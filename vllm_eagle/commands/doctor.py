"""`vllm-eagle doctor`: what is installed, what works here, and what to do about the rest."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

Finding = tuple[str, str, str]  # "ok", "note" or "FAIL"; what; detail


def run() -> int:
    """Print all findings; returns 1 if draft trees cannot run here."""
    findings = list(_findings())
    for status, what, detail in findings:
        print(f"{status:<5} {what:<22} {detail}")
    return int(any(status == "FAIL" for status, _, _ in findings))


def _findings() -> Iterator[Finding]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    yield ("ok" if sys.version_info >= (3, 11) else "FAIL", "python", platform.python_version())
    for name in ("vllm-eagle", "torch", "transformers"):
        yield _version(name, "FAIL")
    yield _version("vllm", "FAIL", "the vllm command cannot start without it; run: python -m vllm_eagle.bootstrap")
    for name in ("ray", "xformers"):
        yield _version(name, "note", "optional")
    try:
        import vllm
        from vllm.platforms import current_platform

        from vllm_eagle.engine import seams
    except ImportError as error:
        yield "FAIL", "import vllm", f"{error}; run: python -m vllm_eagle.bootstrap"
        return
    known, problem = seams.known_version(), seams.version_problem()
    if problem is not None or known is None:
        yield "FAIL", "vllm version", problem or ""
    else:
        yield "ok", "vllm version", f"{vllm.__version__}; run with {known}: {seams.TESTED_VERSIONS[known]}"
    changed, bodies = seams.changed_seams(), seams.changed_bodies()
    if changed:
        yield "FAIL", "vllm seams", "; ".join(changed)
    if bodies:
        yield "note", "vllm seams", "; ".join(bodies)
    if not changed and not bodies:
        yield "ok", "vllm seams", "signatures and bodies as tested"
    entry_points = [e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "eagle_trees" in entry_points:
        yield "ok", "plugin", "vLLM will load it"
    else:
        yield "FAIL", "plugin", "entry point missing; run: pip install -e ."
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "eagle_trees" not in allowed.split(","):
        yield "FAIL", "VLLM_PLUGINS", f"{allowed!r} leaves eagle_trees out; add it"
    if current_platform.is_cpu():
        yield from _cpu_findings()
    elif current_platform.is_cuda():
        device = current_platform.device_name
        yield (
            "note",
            "device",
            f"{device}: draft trees in vLLM's V2 model runner, run end to end on CPUs through Triton's interpreter, on no GPU yet; "
            "first run: vllm-eagle gpu-check",
        )
    else:
        yield "FAIL", "device", f"{current_platform.device_name}: draft trees run on CPU and CUDA"
    from vllm_eagle.pair import HEAD, TARGET

    missing = [str(path) for path in (TARGET, HEAD) if not (path / "model.safetensors").is_file()]
    yield ("note", "shipped pair", f"missing: {', '.join(missing)}") if missing else ("ok", "shipped pair", str(TARGET.parent))
    from vllm_eagle.patches import ledger

    for patch in ledger.patches():
        try:
            state = ledger.state(patch)
        except ValueError as error:
            state = f"state unknown: {error}"
        yield "note", f"patch {patch.name}", f"{state}; without it: {patch.header['Without it']}"


def _cpu_findings() -> Iterator[Finding]:
    from vllm_eagle import native

    problem = native.problem()
    yield ("note", "C++ operators", f"{problem}; torch is used, which is slower") if problem else ("ok", "C++ operators", "built")
    preload = os.environ.get("LD_PRELOAD", "")
    for library in ("libtcmalloc", "libiomp5"):
        if library in preload:
            yield "ok", "LD_PRELOAD", library
        else:
            yield "note", "LD_PRELOAD", f"{library} is not preloaded; vLLM recommends it for speed on CPU"


def _version(name: str, missing: str, hint: str = "") -> Finding:
    try:
        return "ok", name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return missing, name, f"not installed{f' ({hint})' if hint else ''}"
