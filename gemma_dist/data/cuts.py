"""Where a text may be cut so that its parts have the tokens that they have in it: what comes again need not be
tokenized again.

There are two kinds of cuts. At control tokens a tokenizer cuts by itself. Within what stands between them Gemma's has
none: it merges over the whole of it, yet never over the beginning of a word, since no token of its vocabulary does.
"""

import json
import re
import string
from typing import Any

from gemma_dist.data.types import BackendTokenizer
from gemma_dist.gemma_format import CONTROL_TOKENS, IMAGE

BLANK = "\u2581"  # ▁, as which Gemma's tokenizer writes a blank, so that one of the text reads back as a blank
_CUT_AT = [token for token in CONTROL_TOKENS if token != IMAGE]  # the soft tokens of an image come together
_control = "|".join(map(re.escape, _CUT_AT))
_BY_THEMSELVES = {"Sequence", "Split", "Digits", "ByteLevel"}  # pre-tokenizers that know nothing but their piece
_NORMALIZER_OF_GEMMA = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PRE_TOKENIZERS_OF_GEMMA = (  # both leave a text whole in which blanks have been replaced
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)
_BYTE = "<0x[0-9A-F]{2}>"
_APART = "\ud800"  # stands in no token
_SIGNS = {*string.punctuation, *string.digits}


def find_cuts(backend: BackendTokenizer) -> re.Pattern[str] | None:
    """Where a text may be cut so that each piece has the tokens that it has in the text; None: nowhere for sure.

    A tokenizer first takes the tokens that were added to its vocabulary out of the text as it is given: from left to
    right, at each place the longest. What stands between two of them is normalized, split and merged by itself. So a
    text may be cut in front of and behind each of _CUT_AT if

    - it is such a token, is always taken, and no other one takes its place: none holds it, or ends as it begins;
    - no added token looks at what stands around it, or takes blanks along;
    - nothing else looks beyond a piece: the pre-tokenizer is of those that do not, a post-processor only adds special
      tokens, which nobody asks for, and BPE merges without chance.
    """
    added = list(backend.get_added_tokens_decoder().values())
    taken = [token.content for token in added if not token.normalized]
    is_sure = (
        not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not backend.encode_special_tokens
        and set(_CUT_AT) <= set(taken)
        and not any(_takes_place(other, token) for token in _CUT_AT for other in taken)
        and types_of(backend.pre_tokenizer) <= _BY_THEMSELVES
        and types_of(backend.post_processor) <= {"TemplateProcessing"}
        and type(backend.model).__name__ == "BPE"
        and not backend.model.dropout
    )
    return re.compile(f"({_control})") if is_sure else None


def find_word_cuts(backend: BackendTokenizer) -> list[re.Pattern[str]]:
    """What finds the words of a text between two control tokens, and then the parts of a word, if each has the tokens
    that it has in the text. Nothing where that is not sure; the tokenizer must be one for which `find_cuts` finds cuts.

    BPE begins with characters and joins two neighbours where what both say is a token. So it joins nothing over a place
    of which no token holds the characters on both sides, and what it joins on one side does not ask for the other. Of
    Gemma 4's 262,144 tokens none holds a line's end beside anything else, one a blank behind anything else (`>▁</`),
    and but for tags of HTML and the like none an ASCII letter beside another ASCII sign. What is so is read from the
    vocabulary that is given.
    """
    is_gemmas = (
        _state_of(backend.normalizer) == _NORMALIZER_OF_GEMMA
        and _state_of(backend.pre_tokenizer) in _PRE_TOKENIZERS_OF_GEMMA
        and not backend.model.continuing_subword_prefix
        and not backend.model.end_of_word_suffix
        and not backend.model.ignore_merges  # which takes a whole text that is a token for one, however it came about
    )
    vocabulary = backend.get_vocab() if is_gemmas else {}
    tokens = _APART.join(vocabulary.keys() - {*_CUT_AT}).replace(" ", BLANK)
    if not {"\n", BLANK} <= vocabulary.keys() or re.search(f"[^\n{_APART}]\n|\n[^\n{_APART}]", tokens):
        return []
    if re.search(f"[^{_APART}]{_BYTE}|{_BYTE}[^{_APART}]", tokens):  # joined to others they say what they look like
        return []
    before_blanks = _any_of({BLANK, *re.findall(f"([^{BLANK}{_APART}]){BLANK}", tokens)})
    words = re.compile(rf"\n+| *[^ \n]+(?:(?<={before_blanks}) +[^ \n]*)*| +")
    behind_letters = _SIGNS.difference(re.findall("[A-Za-z]([^A-Za-z])", tokens))
    before_letters = _SIGNS.difference(re.findall("([^A-Za-z])[A-Za-z]", tokens))
    if not (behind_letters and before_letters):
        return [words]
    run, other = "[A-Za-z]+", "[^A-Za-z]+"
    joined = rf"(?<=[A-Za-z])(?!{_any_of(behind_letters)}){other}|(?<!{_any_of(before_letters)}){run}"
    return [words, re.compile(rf"{_control}|(?:{run}|{other})(?:{joined})*")]


def _any_of(characters: set[str]) -> str:
    return f"[{re.escape(''.join(sorted(characters)))}]"


def _state_of(part: Any) -> Any:
    """A part of a tokenizer, as in `tokenizer.json`."""
    return json.loads(part.__getstate__()) if part else None


def _takes_place(other: str, token: str) -> bool:
    """Whether a text in which `token` begins may hold `other` there, or from further left on."""
    is_longer = token in other and token != other
    return is_longer or any(token.startswith(other[start:]) for start in range(1, len(other)))


def types_of(part: Any) -> set[str]:
    """The types of a part of a tokenizer, and of the parts in it, as in `tokenizer.json`."""
    found: set[str] = set()
    left = [_state_of(part)] if part else []
    for state in left:
        found.add(state["type"])
        left += state.get("pretokenizers", [])
    return found
