"""Sessions whose prompt goes on after an answer (AsyncLLM's streaming input): the same answers as without trees."""

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.engines import engine, trees
from vllm_eagle.pair import HEAD, TARGET

TURNS = ("Tom has 3 apples and buys 4 more. How many are there? ", " Then he eats two.", " And now? So in all")
COMMON = 224  # a token that the model likes to use: an answer that ends with it ends within a tree


def session(llm: LLM, params: SamplingParams) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each answer of one session, and what each goes on from, by the engine's core, which AsyncLLM talks to."""
    processor, core = llm.llm_engine.input_processor, llm.llm_engine.engine_core.engine_core
    answers: list[list[int]] = []
    contexts: list[list[int]] = []
    for turn in TURNS:
        ids = llm.get_tokenizer().encode(turn, add_special_tokens=False)
        request = processor.process_inputs(
            "session", {"prompt_token_ids": ids}, params.clone(), supported_tasks=("generate",), resumable=True
        )
        request.external_req_id = "session"
        core.add_request(*core.preprocess_add_request(request))
        contexts.append(list(core.scheduler.requests["session"].all_token_ids))
        answers.append([])
        finished = False
        while not finished:
            outputs, model_executed = core.step_fn()
            core.post_step(model_executed=model_executed)
            for output in outputs[0].outputs if outputs else []:
                answers[-1] += output.new_token_ids
                finished = output.finish_reason is not None
    core.abort_requests(["session"])
    return answers, contexts


def test_sessions_go_on_as_without_trees() -> None:
    kinds = [
        SamplingParams(temperature=temperature, seed=3, max_tokens=24, output_kind=RequestOutputKind.DELTA, stop_token_ids=stop)
        for temperature in (0, 1)
        for stop in ([], [COMMON])
    ]
    with engine(TARGET) as llm:
        expected = [session(llm, params) for params in kinds]
    assert any(answer[-1] == COMMON for answers, _ in expected for answer in answers)
    with engine(TARGET, **trees(HEAD)) as llm:
        assert [session(llm, params) for params in kinds] == expected
