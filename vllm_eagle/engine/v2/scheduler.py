"""vLLM's scheduler for trees in its V2 runner: how many drafts a request has in its next step. The worker knows which they are.

The number may differ from request to request and step to step: every prefix of a tree is a tree.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_eagle.engine.grammars import grammars_follow_trees
from vllm_eagle.engine.v2.drafts import Drafts, said, say
from vllm_eagle.engine.v2.grammars import mask_nodes, parents_of
from vllm_eagle.options.per_request import RequestOptions


class EagleTreeScheduler(Scheduler):
    """vLLM's scheduler with drafts for those requests that may have them; an asynchronous one, where vLLM schedules ahead."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> "EagleTreeScheduler":
        """vLLM takes a class by name before it is known how it will schedule."""
        return super().__new__(AsyncEagleTreeScheduler if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._most_drafts: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        if self.dynamic_sd_lookup is None:
            # vLLM pads a new request's last token with drafts that nobody has drafted, so that all have as many, unless their
            # number goes by the number of requests.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self._allowed = list(self.dynamic_sd_lookup)  # by number of requests
        self._drafts: Drafts | None = None  # what the worker said last
        self._follows_trees = grammars_follow_trees(self.vllm_config)
        self._parents: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()  # of the nodes of the last trees known here

    def add_request(self, request: Request) -> None:
        """As vLLM's; sessions that go on after an answer (AsyncLLM's streaming input) get no drafts.

        vLLM resumes them behind all tokens that a step accepted, also those beyond the end of the answer.
        """
        try:
            asked = RequestOptions.from_extra_args(request.sampling_params.extra_args).num_draft_tokens
        except ValueError:  # refused before it comes here, where the plugin is loaded; else the worker says so
            asked = self.num_spec_tokens
        self._most_drafts[request] = 0 if request.resumable else asked
        super().add_request(request)

    def _trim(self, req_ids: Any) -> None:
        for req_id in req_ids:
            request = self.requests.get(req_id)
            if request is not None and request.spec_token_ids:
                request.spec_token_ids = request.spec_token_ids[: self._most_drafts.get(request, self.num_spec_tokens)]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; with what the worker said it goes to all ranks alike."""
        found = super().schedule(*args, **kwargs)
        if self._drafts is not None:
            say(found, self._drafts)
        return found

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """As vLLM's, and no more than a request asks for. What a grammar forbids is for `get_grammar_bitmask` to find."""
        if not self._follows_trees:
            super().update_draft_token_ids(draft_token_ids)
        else:
            for request, token_ids in self._with_trees(draft_token_ids):
                request.spec_token_ids = [] if request.is_prefill_chunk else token_ids
        self._trim(draft_token_ids.req_ids)

    def update_draft_token_ids_in_output(self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's, for a step that was scheduled before its drafts were known; the same goes for it."""
        if not self._follows_trees:
            super().update_draft_token_ids_in_output(draft_token_ids, scheduler_output)
            return
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        for request, token_ids in self._with_trees(draft_token_ids):
            if placeholders := scheduled.get(request.request_id):
                scheduled[request.request_id] = [*token_ids, *placeholders][: len(placeholders)]

    def _with_trees(self, draft_token_ids: DraftTokenIds) -> Iterator[tuple[Request, list[int]]]:
        """Requests and the tokens of their nodes, once it is noted how these hang together."""
        drafts = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, parents_of(draft_token_ids), strict=True)
        for req_id, token_ids, parents in drafts:
            request = self.requests.get(req_id)
            if request is not None and not request.is_finished():
                self._parents[request] = parents
                yield request, token_ids

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """As vLLM's, but the rows of a request's drafts are those of a tree's nodes: grammars.py."""
        if not self._follows_trees:
            return super().get_grammar_bitmask(scheduler_output)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        roots = super().get_grammar_bitmask(replace(scheduler_output, scheduled_spec_decode_tokens={}))
        if roots is None:
            return None
        constrained = roots.structured_output_request_ids
        # A row per node (vLLM 0.32), or as many for each request as a tree can have (0.33).
        width = len(roots.grammar_bitmask) // len(constrained)
        counts = [max(width, 1 + len(scheduled.get(req_id, ()))) for req_id in constrained]
        backend = self.structured_output_manager.backend
        assert backend is not None
        bitmask, known, row = backend.allocate_token_bitmask(sum(counts)).fill_(-1), [], 0
        for req_id, count in zip(constrained, counts, strict=True):
            request, token_ids = self.requests[req_id], scheduled.get(req_id, [])
            # Drafts that the host does not know are never accepted.
            token_ids, parents = (token_ids, self._parents.get(request, [])) if token_ids and token_ids[0] >= 0 else ([], [])
            forbidden = mask_nodes(request.structured_output_request.grammar, token_ids, parents, bitmask, row)
            if forbidden:
                scheduler_output.num_invalid_spec_tokens = (scheduler_output.num_invalid_spec_tokens or {}) | {req_id: forbidden}
            known.append(min(len(token_ids), len(parents)))
            row += count
        return replace(roots, grammar_bitmask=bitmask.numpy(), num_acceptable_drafts=known)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's; what the worker says of the drafts to come holds from the next step on."""
        drafts = said(model_runner_output)
        if drafts is not None:
            self._drafts = drafts
            self.dynamic_sd_lookup = [min(each, drafts.most) for each in self._allowed]
        return super().update_from_output(scheduler_output, model_runner_output)


class AsyncEagleTreeScheduler(EagleTreeScheduler, AsyncScheduler):
    """The same, a step ahead of what it knows."""

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        self._trim(scheduler_output.num_scheduled_tokens)
