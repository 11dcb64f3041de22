"""Text to token ids, by a tokenizer that anybody may have written.

A `tokenizer.json` may replace or drop words before it cuts the text (`normalizer`, `pre_tokenizer`), and its settings
may call any word the beginning of a text or of an image. So the ids of each text are read back, and must say the same.
"""

from typing import Any

from gemma_dist.data.strict import short
from gemma_dist.data.types import BackendTokenizer, Encoding
from gemma_dist.errors import CheckpointError, DataError
from gemma_dist.gemma_format import BOS, IMAGE, IMAGE_BEGIN, IMAGE_END

# What stands in rendered text by the tokenizer's word for it, whatever the chat template is.
_NAMED = {"bos_token": BOS, "image_token": IMAGE, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
_BLANK = "\u2581"  # ▁, as which Gemma's tokenizer writes a blank, so that one of the text reads back as a blank
AROUND = 40  # characters that an error shows
REMEDY = "take the tokenizer that the model was published with"


def tokenize(backend: BackendTokenizer, text: str) -> Encoding:
    """As transformers' `tokenizer(text, add_special_tokens=False)`, which takes a third longer to hand it over.

    Raises:
        DataError: the ids say something else than the text, or the tokenizer's own expressions fail on it.
    """
    backend.no_padding()  # of another call
    backend.no_truncation()
    try:
        encoding = backend.encode(text, add_special_tokens=False)
        said = backend.decode(encoding.ids, skip_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        raise DataError(f"the tokenizer fails on this row: {error}; {REMEDY}") from None
    if said != text and said.replace(_BLANK, " ") != text.replace(_BLANK, " "):
        pairs = enumerate(zip(said, text, strict=False))
        start = next((index for index, (one, other) in pairs if one != other), min(len(said), len(text)))
        found, given = (short(one[start : start + AROUND]) for one in (said, text))
        raise DataError(f"the tokenizer makes ids of this row that say {found} where the text says {given}; {REMEDY}")
    return encoding


def require_tokens(processor: Any, folder: str) -> None:
    """Refuse a processor that has other words for what its chat template and its images begin with than Gemma's.

    Raises:
        CheckpointError: it does, which would put that word into every row.
    """
    for name, token in _NAMED.items():
        given = getattr(processor.tokenizer, name, None)
        if given != token:
            raise CheckpointError(
                f"the tokenizer of {folder!r} has the {name} {given!r}, Gemma's is {token!r}; {REMEDY}"
            )
