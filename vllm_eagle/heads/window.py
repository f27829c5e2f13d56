"""How many of the newest tokens a head attends to when it drafts: the option `draft_window`, and what a head says itself.

Heads are trained on short texts. Far beyond their length attention is spread over more keys than it was ever trained with, and
fewer drafts are accepted; the newest tokens are enough to know how a text goes on. Answers are the target's, whatever a head sees.
"""

from pathlib import Path

from vllm_eagle.heads.formats import WINDOW, nested_settings, read_config, window_of_layers


def window_of(asked: int | None, folder: Path, longest: int) -> int:
    """Newest positions that rows of a head see, their own included; 0: all.

    Args:
        asked: the option `draft_window`.
        folder: of the head.
        longest: text that the target takes; a window as long is none.

    Raises:
        ValueError: nobody has asked, and the head's config.json cannot be read.
    """
    window = trained_length(folder) if asked is None else asked
    return 0 if window is None or window >= longest else window


def trained_length(folder: Path) -> int | None:
    """How long the texts were that a head was trained on, if its config.json says so.

    `vllm-eagle train` writes it there. Else it is the sliding window of its layers, or the positions that it was made for.

    Raises:
        ValueError: its config.json cannot be read.
    """
    config = read_config(folder)
    nested = nested_settings(config)
    layer = config if nested is None else config[nested]
    said = config.get(WINDOW) or layer.get(WINDOW) or window_of_layers(layer) or layer.get("max_position_embeddings")
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else None
