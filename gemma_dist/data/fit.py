"""A raw row by the settings of a command: parsed, encoded, and made to fit the length limit.

What is sharded and what `inspect` shows goes through here, so that both see the same.
"""

from gemma_dist.config import RowConfig, ShardConfig
from gemma_dist.data.encode import Encoder
from gemma_dist.data.encoded import Encoded
from gemma_dist.data.places import Where
from gemma_dist.data.trajectory import Trajectory, parse_row
from gemma_dist.data.types import Message, RawRow
from gemma_dist.data.unroll import first_messages
from gemma_dist.errors import DataError, setting


def parse(row: RawRow | DataError, where: Where, settings: RowConfig) -> Trajectory:
    """A raw row, as `read_rows` gives it, by the settings. Raises DataError where it breaks the data contract."""
    if isinstance(row, DataError):
        raise row
    return parse_row(row, where, settings)


def encode_trained(trajectory: Trajectory, encoder: Encoder) -> Encoded:
    """The encoded trajectory. Raises DataError where the template cannot express it, or not one token is trained."""
    encoded = encoder.encode(trajectory)
    if not encoded.num_target_tokens:
        raise DataError("not one token of this row would be trained; at least one assistant message must say something")
    return encoded


def fit(
    trajectory: Trajectory, encoded: Encoded, encoder: Encoder, settings: ShardConfig
) -> tuple[Trajectory, Encoded] | None:
    """The trajectory with at most `settings.max_length` tokens: whole, or with turns cut from its end; None: dropped.

    Raises:
        DataError: it is longer and `settings.too_long` is "error".
    """
    limit = settings.max_length
    if limit is None or encoded.num_tokens <= limit:
        return trajectory, encoded
    if settings.too_long == "error":
        raise DataError(
            f"{encoded.num_tokens:,} tokens ({encoded.num_image_tokens:,} of images), but max_length is "
            f"{limit:,}; raise it, or use {setting('too_long', 'drop')} or {setting('too_long', 'cut_turns')}"
        )
    if settings.too_long == "cut_turns":
        # From long to short by trial: reasoning is rendered only after the last user turn, so that what remains after a
        # cut is not a prefix of the tokens of the whole.
        for end in reversed(cut_points(trajectory.messages)):
            shorter = first_messages(trajectory, end)
            encoded = encoder.encode(shorter)
            if encoded.num_tokens <= limit and encoded.num_target_tokens:
                return shorter, encoded
    return None


def cut_points(messages: list[Message]) -> list[int]:
    """How many messages may remain when a trajectory is cut at its end, without the whole of it.

    Each remainder ends with a trained assistant message, which may be a call: its responses go together. It never ends
    between two assistant messages in a row, which are one turn (the text before a call and the call): the model would
    learn to stop after announcing a call.
    """
    ends = []
    for end in range(1, len(messages)):
        last, following = messages[end - 1], messages[end]
        is_trained = last["role"] == "assistant" and last.get("train", True)
        if is_trained and following["role"] != "assistant":
            ends.append(end)
    return ends
