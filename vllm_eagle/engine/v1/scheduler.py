"""vLLM's scheduler, which leaves grammars along trees to the worker.

vLLM trims a request's draft tokens to what its grammar allows, reading them as a chain, and makes one bitmask per chain position.
Tree nodes are no chain, and the scheduler does not know their parents. Here it passes them on as they are and makes the bitmask of
the root alone; the worker masks the other nodes on its way down the tree (grammar.py). Whatever is emitted still goes through the
scheduler's own grammar, which ends a request with an error if worker and scheduler should ever disagree.

With a reasoning parser vLLM's chain handling stays: where reasoning ends may depend on settings of the request that only the
scheduler sees, so constrained requests draft chains there.

Async scheduling is off. vLLM's CPU platform knows none; between two steps lie 0.4 to 0.9 ms there, of 25 to 45 (`outside_s` of
the budget on a target of 296M parameters, 1 to 16 requests), and that is all it could hide. Where it exists, it schedules a
step before the last one's tokens are known: so many draft tokens per request as placeholders, which the worker fills in. Trees
could keep that, because the scheduler needs only their number: schedule the number that the budget chose a step earlier, cut a
larger tree to it (every prefix is a tree), pad a smaller one with nodes that match nothing, and lay out positions and slots in
the worker, from the accepted lengths that it knows. Grammars would need the root's bitmask one step late, as in vLLM's own
async mode.
"""

from dataclasses import replace

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_eagle.engine.grammars import grammars_follow_trees

# By the name of the class: outlines may not be installed, and to import its module asks for it.
_GRAMMAR_BACKENDS = {"XgrammarBackend": "xgrammar", "GuidanceBackend": "guidance", "OutlinesBackend": "outlines"}


class EagleTreeScheduler(Scheduler):
    """vLLM's scheduler for draft trees. Decides nothing else differently."""

    def add_request(self, request: Request) -> None:
        """Name the backend of grammars that is in use here to the worker.

        With the backend "auto" vLLM takes the one that suits the first constrained request for all of them. The first that comes to
        the worker may be another one, and what two backends allow is not the same to the bit.
        """
        backend = type(self.structured_output_manager.backend).__name__
        if request.use_structured_output and backend in _GRAMMAR_BACKENDS:
            request.sampling_params.structured_outputs._backend = _GRAMMAR_BACKENDS[backend]
        super().add_request(request)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Hand each request its draft tokens for the next step.

        Sessions that go on after an answer (AsyncLLM's streaming input) get none: vLLM resumes them behind all tokens that a step
        accepted, also those beyond the end of the answer.
        """
        follow_trees = grammars_follow_trees(self.vllm_config)
        if not follow_trees:
            super().update_draft_token_ids(draft_token_ids)
        for req_id, token_ids in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            if request.resumable:
                request.spec_token_ids = []
            elif follow_trees:
                request.spec_token_ids = [] if request.is_prefill_chunk else token_ids

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Bitmasks of the roots: one row per constrained request, as without speculation."""
        if grammars_follow_trees(self.vllm_config):
            scheduler_output = replace(scheduler_output, scheduled_spec_decode_tokens={})
        return super().get_grammar_bitmask(scheduler_output)
