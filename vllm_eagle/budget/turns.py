"""When to do something else than what seems best, to learn what it would bring: deeper drafts, or plain decoding. By counting."""

_PROBE_EVERY, _PROBE_AT_MOST = 32, 256  # steps between two looks at deeper drafts
# Below this gain plain decoding is looked at, too: in turns with drafting at first, then every so many steps.
_SMALL_GAIN, _TRIAL, _PLAIN_EVERY = 1.15, 32, 16
_PLAIN_AT_LEAST_EVERY = 256  # whatever the gain: it may be wrong


class Turns:
    """Of one engine. Asked once a step for either."""

    def __init__(self) -> None:
        self._since_probe, self._probe_every = 0, _PROBE_EVERY
        self._probed_beside = 0  # the depth that seemed best at the last probe
        self._since_plain, self._plain_for = 0, 0  # steps since nothing was drafted, and for how many requests that was
        self._spell = 0  # steps since drafting began to pay

    def plain(self, pays: bool, gain: float, num_requests: int) -> bool:
        """Whether this step is plain decoding: because drafting does not pay, or to look at it, whose cost is known from the past
        alone. `gain`: how many times plain decoding's tokens per second drafting promises.
        """
        self._spell = self._spell + 1 if pays else 0
        self._since_plain += 1
        if pays and not self._look_at_plain(gain, num_requests):
            return False
        self._since_plain, self._plain_for = 0, num_requests
        return True

    def _look_at_plain(self, gain: float, num_requests: int) -> bool:
        if gain < _SMALL_GAIN:
            return self._spell % (2 if self._spell < _TRIAL else _PLAIN_EVERY) == 1
        known = self._plain_for and 0.25 < num_requests / self._plain_for < 4
        return self._since_plain >= (_PLAIN_AT_LEAST_EVERY if known else _PLAIN_EVERY)

    def probe(self, best: int, depth_limit: int) -> bool:
        """Whether to draft deeper than `best`, where that is possible. What was learned again and again is asked less and less."""
        self._since_probe += 1
        if best == depth_limit:
            self._since_probe, self._probe_every = 0, _PROBE_EVERY
        elif self._since_probe >= self._probe_every:
            self._probe_every = min(2 * self._probe_every, _PROBE_AT_MOST) if best == self._probed_beside else _PROBE_EVERY
            self._since_probe, self._probed_beside = 0, best
            return True
        return False
