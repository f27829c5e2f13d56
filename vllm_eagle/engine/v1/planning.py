"""What the model runner drafts for the next step: for which requests, how deep, and how much of it is verified.

The budget (vllm_eagle/budget/) decides by costs, which are measured at start-up and learnt from every step. Whatever is decided
here, the emitted tokens are the same.
"""

from collections import Counter
from functools import partial

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Limits, Request
from vllm_eagle.algorithm.tree import DraftTree, depths_of
from vllm_eagle.budget.budget import Budget, Plan
from vllm_eagle.engine import costs
from vllm_eagle.engine.v1.clock import StepClock
from vllm_eagle.engine.v1.grammar import TreeGrammars
from vllm_eagle.engine.v1.proposer import DraftPlan, EagleTreeProposer
from vllm_eagle.metrics.counters import Decision, TreeMetrics
from vllm_eagle.options.per_request import RequestOptions

logger = init_logger(f"vllm.{__name__}")  # below "vllm", so that vLLM shows it with its own lines

_MOST_LEVEL_ROWS = 2048  # 256 requests of 8; where there are more, trees do not pay anyway
_GREEDY_BELOW = 1e-5  # temperatures that vLLM treats as greedy


class DraftPlanning(GPUModelRunner):
    """The part of `EagleTreeRunner` (runner.py) that plans drafting; its attributes are set in `init_trees` there."""

    tree_config: TreeConfig
    tree_metrics: TreeMetrics
    drafter: EagleTreeProposer
    budget: Budget | None  # from `measure_costs` on; None: as many nodes as allowed
    _stored: dict[str, DraftTree]  # drafted in the last step, by request id
    _options: dict[str, RequestOptions]  # by request id
    _grammars: TreeGrammars
    _prompt_rows: list[int]  # rows of this step that hold more than the last token and its tree
    _drafting: Plan  # of this step
    _clock: StepClock

    @property
    def most_nodes(self) -> int:
        """Nodes of all trees that one target pass can hold, roots included."""
        return min(self.max_num_tokens, self.max_num_reqs * (1 + self.tree_config.num_draft_tokens))

    @property
    def most_level_rows(self) -> int:
        """Nodes of a level of all trees: it must fit vLLM's input buffers, and the level's logits must fit the memory."""
        return min(self.max_num_tokens, _MOST_LEVEL_ROWS, self.max_num_reqs * self.tree_config.level_width)

    def measure_costs(self) -> None:
        """Find out what passes cost here, for the budget; takes seconds."""
        if not self.tree_config.budget:
            return

        def target_pass(num_tokens: int) -> None:
            # Of different tokens: experts are read for those that ask for them, and tokens that are all alike ask for the same few.
            hidden, _ = self._dummy_run(num_tokens, randomize_inputs=True)
            if self.lora_config is None:  # with adapters, logits want a real batch
                self.model.compute_logits(hidden[: min(num_tokens, self.most_nodes)])  # of the rest of a prompt there are none
            self._sync_device()

        def committed_pass(num_tokens: int) -> None:
            self.drafter.dummy_run(num_tokens)
            self._sync_device()

        def head_pass(num_tokens: int) -> None:
            self.drafter.dummy_run(num_tokens)
            self.drafter.logits(self.drafter.hidden_states[:num_tokens])
            self._sync_device()

        self.drafter.measuring_target = True
        try:
            target = costs.measure(target_pass, self.max_num_tokens)  # there are prompts in passes, too
        finally:
            self.drafter.measuring_target = False
        head = costs.measure(head_pass, self.most_nodes)
        committed = costs.measure(committed_pass, self.most_nodes)
        target, head, committed = (costs.agreed(curve) for curve in (target, head, committed))
        self.budget = Budget(target, head, self.tree_config.num_draft_tokens, self.tree_config.depth_limit, committed)
        for name, curve in (("target", target), ("head", head)):
            logger.info("Draft trees: milliseconds of a pass of the %s by tokens in it: %s", name, curve)

    def _keep_trees(self, trees: dict[int, DraftTree]) -> dict[int, DraftTree]:
        self.tree_metrics.add("num_drafted", sum(tree.num_nodes - 1 for tree in trees.values()))
        if self.budget is not None:
            scores, depths = [tree.scores[1:] for tree in trees.values()], [x[1:] for x in depths_of(list(trees.values()))]
            numbers = self.budget.keep(scores, depths, self._drafting.depth, self._num_decoding)
            trees = {row: tree.prefix(1 + number) for (row, tree), number in zip(trees.items(), numbers, strict=True)}
        for row, tree in trees.items():
            self._stored[self.input_batch.req_ids[row]] = tree
            self.tree_metrics.count_decision("tree" if tree.num_nodes > 1 else "budget")
        return trees

    @property
    def _num_decoding(self) -> int:
        """Requests that will be in the next pass with their last token."""
        return self.input_batch.num_reqs - int(self.discard_request_mask.np[: self.input_batch.num_reqs].sum())

    def _learn_costs(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the budget what this step's pass and the last step's drafting took."""
        if self.budget is None:
            return
        gap_s, pass_s, draft_s, levels_s = costs.agree([*self._clock.read(), self.drafter.levels_s])
        if not scheduler_output.scheduled_new_reqs:  # else the engine may have waited for them
            self.budget.costs.saw_gap(gap_s)
        num_tokens, req_ids = scheduler_output.num_scheduled_tokens, self.input_batch.req_ids
        self.budget.costs.saw_prompts(sum(num_tokens[req_ids[row]] for row in self._prompt_rows))
        if not self._prompt_rows:
            num_trees = len(scheduler_output.scheduled_spec_decode_tokens)
            self.budget.saw_pass(pass_s, scheduler_output.total_num_scheduled_tokens, num_trees)
        if (drafter := self.drafter).num_drafting:
            depth = self._drafting.depth
            self.budget.costs.saw_drafting(
                draft_s - levels_s, drafter.first_rows, levels_s, drafter.num_drafting, drafter.level_rows, depth
            )

    def _plan(self, most_draft_tokens: int) -> DraftPlan:
        """What to draft for the next step."""
        for row in self._prompt_rows:  # computed anew from the start, if the head has missed something of it
            self.drafter.forget(self.input_batch.req_ids[row])
        num_decoding = self._num_decoding
        self._drafting, limits = Plan(self.tree_config.depth_limit), Limits()
        if self.budget is not None and num_decoding:
            self._drafting = plan = self.budget.plan(num_decoding)
            limits = Limits(plan.node_floor, partial(self.budget.pays, plan))
        drawn, req_ids = self._requests_to_draft(most_draft_tokens), list(self.input_batch.req_ids)
        wanting = [row for row, req_id in enumerate(req_ids) if self._options[req_id].num_draft_tokens]
        now = {*drawn, *self._prompt_rows, *(() if self.drafter.puts_off else wanting)}
        later = [row for row in wanting if row not in now]
        return DraftPlan(req_ids, drawn, sorted(now), later, limits)

    def _requests_to_draft(self, most_draft_tokens: int) -> dict[int, Request]:
        """Requests that get a tree for the next step, by row, and how large it may be."""
        requests: dict[int, Request] = {}
        decisions: Counter[Decision] = Counter()
        room_for = self.most_level_rows // self.tree_config.level_width
        most_requests = min(room_for, self._drafting.most_requests or room_for)
        rows = list(enumerate(self.input_batch.req_ids))
        if self._drafting.most_requests is not None:  # those that cost the head least
            rows.sort(key=lambda place: self.drafter.missed(place[1]))
        for row, req_id in rows:
            if self.discard_request_mask.np[row]:
                continue
            options = self._options[req_id]
            room = self._room(row, most_draft_tokens)
            if options.num_draft_tokens == 0:
                decisions["switched_off"] += 1
            elif room <= 0:
                decisions["no_room"] += 1
            elif len(requests) == most_requests:
                decisions["buffer_full" if most_requests == room_for else "budget"] += 1
            elif not self._grammars.ready(req_id):
                decisions["grammar"] += 1
            elif self._drafting.depth == 0 or self.drafter.missed(req_id) > self._drafting.most_missed:
                decisions["budget"] += 1
            elif self.drafter.is_lost(req_id):
                decisions["left_behind"] += 1
            else:
                params = self.requests[req_id].sampling_params
                num_tokens = int(self.input_batch.num_tokens_no_spec[row])
                requests[row] = Request(
                    root_token_id=int(self.input_batch.token_ids_cpu[row, num_tokens - 1]),
                    num_draft_tokens=min(room, options.num_draft_tokens),
                    temperature=0.0 if params.temperature < _GREEDY_BELOW else params.temperature,
                    max_depth=min(options.max_depth, self._drafting.depth),
                    topk=1 if self._grammars.drafts_chain(req_id) else options.topk,
                )
        for decision, number in decisions.items():
            self.tree_metrics.count_decision(decision, number)
        return dict(sorted(requests.items()))

    def _room(self, row: int, most_draft_tokens: int) -> int:
        """How many draft tokens a request can use: its last token needs none, and slots end at the model's length."""
        state = self.requests[self.input_batch.req_ids[row]]
        most_tokens = state.sampling_params.max_tokens
        if most_tokens is not None and most_tokens - len(state.output_token_ids) <= 1:
            return 0
        return min(most_draft_tokens, self.max_model_len - int(self.input_batch.num_tokens_no_spec[row]))
