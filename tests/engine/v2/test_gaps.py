"""What `compare` says of two answers that differ at T > 0 needs the noise that the V2 sampler added."""

import numpy as np

from tests.engine.v2.bed import Bed, prompts_of
from tests.engine.v2.test_v2 import case
from tests.tiers import interpreted
from vllm_eagle.pair import TARGET

SEED, TEMPERATURE, TOKENS = 5, 1.3, 6


def noise(position: int, vocab_size: int) -> list[float]:
    from vllm_eagle.bench.passes.gaps import on_cuda

    found: list[float] = on_cuda(SEED, position, vocab_size, "cpu").tolist()
    return found


@interpreted
def test_noise_explains_every_token(bed: Bed) -> None:
    """Of plain vLLM, which adds it to scores over the temperature, and takes the best."""
    asked = case([{"temperature": TEMPERATURE, "seed": SEED, "logprobs": -1}], TOKENS, engine={"max_logprobs": -1})
    found, length = bed.run(asked), len(prompts_of(TARGET, 1)[0])
    greedy = []
    for place, token in enumerate(found.token_ids[0]):
        of_place = found.logprobs[0][place]
        scores = np.array([of_place[i].logprob for i in range(len(of_place))])
        added = np.array(bed.call(noise, length + place - 1, len(scores)))
        assert int((scores / TEMPERATURE + added).argmax()) == token
        greedy.append(int(scores.argmax()))
    assert greedy != found.token_ids[0]
